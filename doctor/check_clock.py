"""Keeps checks in time: one that is slow is named, one that does not end is stopped and its verdict is unknown.

Checks are pure functions of bounded records and together take milliseconds, so this only ever speaks of a defect. It is for
the command line: stopping takes a timer signal, which a program that merely calls :func:`~vlm_doctor.diagnose` may want for
itself.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checks import Check, Facts
    from .findings import Outcome

DEADLINE_S = 3.0
"""What one check may take, as what one source may take: a thousand times what the slowest of them does."""
SLOW_S = 0.5
"""From here on a check is named. Far above what a loaded machine makes of a millisecond."""
_MOST_NAMED = 3


class _OutOfTimeError(BaseException):
    """Raised inside a check by the timer. Not an Exception: no handler of a check may take it for a failure of its own."""


class CheckClock:
    """Examines one check after the other, for :func:`~vlm_doctor.checks.diagnose`, and remembers which were slow.

    Where the timer cannot be had (outside the main thread, on a system without it, or while somebody else has set it)
    checks are only measured.

    Args:
        deadline_s: Seconds after which a check is stopped.
        slow_s: Seconds from which on it is named.
    """

    def __init__(self, *, deadline_s: float = DEADLINE_S, slow_s: float = SLOW_S) -> None:
        self._deadline_s = deadline_s
        self._slow_s = slow_s
        self._seconds: dict[str, float] = {}
        self._stopped: set[str] = set()

    def __call__(self, check: Check, facts: Facts) -> Outcome:
        """Examine a check; one that was stopped before is not tried again."""
        # Late: a clock is made before the sources run, and the checks are loaded while they do.
        from .checks import examine

        if check.code in self._stopped:
            return self._unknown(check)
        started = time.perf_counter()
        try:
            outcome = self._in_time(lambda: examine(check, facts))
        except _OutOfTimeError:
            self._stopped.add(check.code)
            outcome = self._unknown(check)
        seconds = time.perf_counter() - started
        if seconds >= self._slow_s:
            self._seconds[check.code] = max(seconds, self._seconds.get(check.code, 0.0))
        return outcome

    def notes(self) -> tuple[str, ...]:
        """A sentence that names the slowest checks; none when all were quick."""
        slowest = sorted(self._seconds.items(), key=lambda pair: -pair[1])[:_MOST_NAMED]
        named = ", ".join(f"{code} {seconds:.1f} s" for code, seconds in slowest)
        return (f"Slow to judge: {named}. This is a defect of vlm-doctor, please report it.",) if named else ()

    def _unknown(self, check: Check) -> Outcome:
        from .findings import Outcome

        reason = f"no verdict within {self._deadline_s:g} s; please report this"
        return Outcome(code=check.code, title=check.title, state="unknown", reason=reason)

    def _in_time(self, judge: Callable[[], Outcome]) -> Outcome:
        if not _is_timer_free():
            return judge()
        is_running = True

        def stop(_number: int, _frame: FrameType | None) -> None:
            if is_running:
                raise _OutOfTimeError

        previous = signal.signal(signal.SIGALRM, stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, self._deadline_s)
            outcome = judge()
            # A signal that comes between these two lines finds nothing to stop.
            is_running = False
            return outcome
        finally:
            is_running = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            # ``None`` is a handler that is not Python's.
            signal.signal(signal.SIGALRM, signal.SIG_DFL if previous is None else previous)


def _is_timer_free() -> bool:
    """Whether the timer is there, and nobody's: Python delivers signals to the main thread only."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return False
    return signal.getitimer(signal.ITIMER_REAL)[0] == 0
