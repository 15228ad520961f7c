"""The errors a user can cause and can mend. The command line prints them without a traceback; anything else is a bug."""

import signal


class BnfuseError(Exception):
    """Base of every error whose message says what was given, what was expected and what to do."""


class InputError(BnfuseError, ValueError):
    """An argument, a file or a dataset that does not fit."""


class BackendError(BnfuseError, RuntimeError):
    """A backend, or an instruction set of one, was asked for by name and is not there."""


class Interrupted(BnfuseError):
    """A signal asked the run to stop, and what it had in hand is safe.

    Attributes
    ----------
    signal : its number
    kept : what of the work in hand was kept, for the message
    """

    def __init__(self, number: int, kept: str = ""):
        self.signal, self.kept = number, kept
        super().__init__(f"stopped by {signal.Signals(number).name}" + (f"; {kept}" if kept else ""))


class UnitWarning(UserWarning):
    """A unit begins anew, and why. It is shown whichever rank it happens on."""
