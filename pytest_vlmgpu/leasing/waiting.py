"""Waiting for a GPU that others use, with progress that people can see and CI logs do not drown in."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..output import Line

GRACE_S = 2.0
"""Even with no wait at all: another run may hold what it gives back in a moment, while it chooses or ends."""
_POLL_S = (0.05, 1.0)


class Waiting:
    """The time that one process may wait, for leases and for memory together.

    Args:
        seconds: In all; 0 asks a few times within :data:`GRACE_S`.
        open_line: Gives the line that says what is waited for.
        clock: Seconds that no change of the wall clock moves.
        sleep: For tests.
    """

    def __init__(
        self,
        seconds: float,
        open_line: Callable[[], Line],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.left_s = seconds
        self.waited_s = 0.0
        self._open_line = open_line
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
        pause = _POLL_S[0]
        line: Line | None = None
        try:
            while (elapsed := self._clock() - started) < allowed:
                if elapsed > grace_s:
                    line = line or self._open_line()
                    line.show(partial(_told, elapsed, allowed, reason))
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
            if line is not None:
                line.end(f"vlmgpu: waited {waited:.0f} s")


def _told(elapsed_s: float, allowed_s: float, reason: Callable[[], str]) -> str:
    return f"vlmgpu: waiting {elapsed_s:.0f} of {allowed_s:.0f} s: {reason()}"
