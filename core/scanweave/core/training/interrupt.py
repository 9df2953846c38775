"""Ctrl-C and SIGTERM as a request to stop after the step in hand."""

import os
import signal
import threading
from types import FrameType
from typing import Any

_MESSAGE = b"\nstopping after this step; once more to stop at once, without saving\n"


class StopSignals:
    """While entered, SIGINT and SIGTERM set `number` instead of raising.

    Does nothing outside the main thread, where Python allows no handlers.
    """

    def __init__(self, *, repeat_aborts: bool = True) -> None:
        """Prepare handlers.

        Args:
            repeat_aborts: Raise KeyboardInterrupt at the second signal. Off where a launcher
                sends its children the signal that they already had from the terminal.
        """
        self.number = 0
        self._repeat_aborts = repeat_aborts
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and self._repeat_aborts:
            raise KeyboardInterrupt
        self.number = number
        if self._repeat_aborts:
            # not through a buffered stream: the signal may have interrupted a write to it
            os.write(2, _MESSAGE)
