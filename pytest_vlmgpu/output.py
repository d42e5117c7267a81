"""One line about what takes long (a load, a wait): it renews itself on a terminal, and comes now and then in a log.

The one place that knows where such a line goes and how often. pytest has the output of tests captured meanwhile, so it is
written to what the run printed to before.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

LOG_S = 30.0
"""Between two lines in a log."""
_QUIET = -1
"""Verbosity below which nothing is shown: ``-qq``."""
_OUTPUT: pytest.StashKey[int] = pytest.StashKey()
"""File descriptor of what the run prints to, from before pytest captures the output of tests."""
_BELOW = "\x1bD\x1b[A\x1b7\x1b[B\r"
"""Make room for a line below the cursor, remember where the cursor is, go there. pytest's own line stays whole."""
_BACK = "\x1b[K\x1b8"


def keep_output(config: pytest.Config) -> None:
    """Remember where the run prints to; called while pytest captures nothing."""
    if _OUTPUT in config.stash or hasattr(config, "workerinput"):
        return
    with suppress(OSError):
        descriptor = os.dup(1)
        config.stash[_OUTPUT] = descriptor
        config.add_cleanup(lambda: os.close(descriptor))


def open_line(config: pytest.Config, *, first_s: float, in_log_of_worker: bool = False) -> Line:
    """A line on what the run prints to; one that shows nothing where nobody would see it.

    Args:
        config: Of the run.
        first_s: Seconds before it comes in a log for the first time.
        in_log_of_worker: A worker of pytest-xdist has no output of its own; where no terminal is in front, its line goes to
            the standard error of the controller, among the lines of others.
    """
    if config.get_verbosity() < _QUIET:
        return Line(None, first_s=first_s)
    if not hasattr(config, "workerinput"):
        return Line(config.stash.get(_OUTPUT, None), first_s=first_s)
    terminal = _terminal_in_front()
    if terminal is not None:
        return Line(terminal, first_s=first_s, is_own=True)
    return Line(2 if in_log_of_worker else None, first_s=first_s)


class Line:
    """Shows one thing as long as it lasts. What goes wrong with the output does not matter to whoever waits.

    Args:
        descriptor: Where to write; ``None`` shows nothing.
        first_s: Seconds before it comes in a log for the first time.
        clock: Seconds that no change of the wall clock moves.
        is_own: Close the descriptor at the end.
    """

    def __init__(
        self,
        descriptor: int | None,
        *,
        first_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        is_own: bool = False,
    ) -> None:
        self._descriptor = descriptor
        self._clock = clock
        self._is_own = is_own
        self._next = clock() + first_s
        self._has_spoken = False
        # A line that wraps could not be written over.
        self._width = 0
        with suppress(OSError):
            if descriptor is not None and os.isatty(descriptor):
                self._width = max(20, (os.get_terminal_size(descriptor).columns or 80) - 1)

    def show(self, text: Callable[[], str]) -> None:
        """Renew the line; in a log only when it is time."""
        if self._width:
            self._write(f"{_BELOW}{text()[: self._width]}{_BACK}")
        elif self._descriptor is not None and self._clock() >= self._next:
            self._next = self._clock() + LOG_S
            self._write(f"\n{text()}\n")

    def end(self, text: str) -> None:
        """Take the line away; in a log say how it ended, if it was there."""
        if self._width and self._has_spoken:
            self._write(f"{_BELOW}{_BACK}")
        elif self._has_spoken:
            self._write(f"\n{text}\n")
        if self._is_own and self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._width, self._has_spoken = None, 0, False

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        try:
            while data and self._descriptor is not None:
                data = data[os.write(self._descriptor, data) :]
            self._has_spoken = True
        except OSError:  # gone, and not worth a word
            self._width, self._next = 0, float("inf")


def _terminal_in_front() -> int | None:
    """The terminal of this process, if it is the one that people look at."""
    try:
        terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        is_in_front = os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        is_in_front = False
    if is_in_front:
        return terminal
    os.close(terminal)
    return None
