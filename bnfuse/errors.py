"""The errors a user can cause and can mend. The command line prints them without a traceback; anything else is a bug."""


class BnfuseError(Exception):
    """Base of every error whose message says what was given, what was expected and what to do."""


class InputError(BnfuseError, ValueError):
    """An argument, a file or a dataset that does not fit."""


class BackendError(BnfuseError, RuntimeError):
    """A backend was asked for by name and is not there."""
