"""SIGTERM and SIGINT as a wish that the work in hand sees to when it is at a point where nothing is lost."""

from __future__ import annotations

import os
import signal
import threading

from .errors import Interrupted


class Stop:
    """While its `with` block runs, the first SIGTERM or SIGINT is only remembered, for `check` to act on.

    A second SIGINT acts at once, as it always does in Python. Outside of the main thread, where Python knows no signal
    handlers, nothing changes.

    Attributes
    ----------
    signal : the number of the signal that came, 0 before
    """

    def __init__(self, quiet: bool = False):
        self.signal, self.quiet = 0, quiet
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.signal:
            raise Interrupted(self.signal)

    def _remember(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal and not self.quiet:  # os.write, since a print may have been interrupted
            os.write(2, f"\nbnfuse: {signal.Signals(number).name}: stopping as soon as the work in hand is safe\n".encode())
        self.signal = self.signal or number
