"""Waiting for a GPU that others use, with progress that people can see and CI logs do not drown in."""

from __future__ import annotations

import random
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

GRACE_S = 2.0
"""Even with no wait at all: another run may hold what it gives back in a moment, while it chooses or ends."""
_POLL_S = (0.05, 1.0)
_LOG_EVERY_S = 60.0
"""Between two lines where nobody watches."""
_TERMINAL_EVERY_S = 1.0


class Show(Protocol):
    """Where progress goes."""

    def __call__(self, line: str, *, is_last: bool = False) -> None:
        """Print one line about the wait; the last one ends it."""


class Waiting:
    """The time that one process may wait, for leases and for memory together.

    Args:
        seconds: In all; 0 asks a few times within :data:`GRACE_S`.
        show: Where progress goes.
        clock: Seconds that no change of the wall clock moves.
        sleep: For tests.
    """

    def __init__(
        self,
        seconds: float,
        show: Show,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.left_s = seconds
        self.waited_s = 0.0
        self._show = show
        self._clock = clock
        self._sleep = sleep

    def until(
        self, is_done: Callable[[], bool], reason: Callable[[], str], *, grace_s: float = GRACE_S, may_wait: bool = True
    ) -> bool:
        """Ask again and again, less often as time goes by.

        Args:
            is_done: Asked at least once.
            reason: What is waited for, as one sentence: who holds it.
            grace_s: Time that is given even where none is left.
            may_wait: False gives no more than that.

        Returns:
            False when time ran out first.
        """
        if is_done():
            return True
        started = self._clock()
        allowed = max(self.left_s if may_wait else 0.0, grace_s)
        pause, has_spoken, spoken = _POLL_S[0], False, 0.0
        try:
            while (elapsed := self._clock() - started) < allowed:
                if elapsed > grace_s and (not has_spoken or elapsed - spoken >= self._show_every_s()):
                    self._show(f"vlmgpu: waiting {elapsed:.0f} of {allowed:.0f} s: {reason()}")
                    has_spoken, spoken = True, elapsed
                # Two runs that take each other's GPUs in turn must fall out of step.
                self._sleep(min(pause * random.uniform(0.5, 1.0), allowed - elapsed))
                pause = min(pause * 1.5, _POLL_S[1])
                if is_done():
                    return True
            return False
        finally:
            waited = self._clock() - started
            self.waited_s += waited
            self.left_s = max(0.0, self.left_s - waited)
            if has_spoken:
                self._show(f"vlmgpu: waited {waited:.0f} s", is_last=True)

    def _show_every_s(self) -> float:
        return _TERMINAL_EVERY_S if getattr(self._show, "is_terminal", False) else _LOG_EVERY_S


class Progress:
    """Writes lines past pytest's capture: over each other on a terminal, below each other in a log."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        # A worker of pytest-xdist has no terminal of its own, but the controller's stderr.
        reporter: Any = config.pluginmanager.getplugin("terminalreporter")
        is_worker = hasattr(config, "workerinput")
        self._stream: Any = sys.__stderr__ if reporter is None or is_worker else reporter._tw._file
        self.is_terminal = bool(self._stream is not None and self._stream.isatty() and not is_worker)
        self._is_quiet = config.get_verbosity() < 0

    def __call__(self, line: str, *, is_last: bool = False) -> None:
        """Print a line; the last one ends the line that was written over."""
        if self._is_quiet or self._stream is None:
            return
        manager: Any = self._config.pluginmanager.getplugin("capturemanager")
        with manager.global_and_fixture_disabled() if manager is not None else nullcontext():
            if self.is_terminal:
                self._stream.write(f"\r\x1b[K{line}" + ("\n" if is_last else ""))
            else:
                self._stream.write(f"\n{line}" if not is_last else f"\n{line}\n")
            self._stream.flush()
