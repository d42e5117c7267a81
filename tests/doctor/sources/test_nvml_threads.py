"""Several questions side by side, with answers in order."""

from __future__ import annotations

import threading
import time

import pytest

from vlm_doctor.sources.nvml_threads import MAX_THREADS, side_by_side

from ...until import LIMIT_S


def test_results_are_in_the_order_of_the_jobs() -> None:
    def job(position: int) -> int:
        time.sleep(0.001 * (20 - position) / 20)
        return position

    assert side_by_side([lambda position=position: job(position) for position in range(20)]) == list(range(20))  # type: ignore[misc]
    assert side_by_side([]) == []


def test_jobs_run_side_by_side_and_one_alone_needs_no_thread() -> None:
    meeting = threading.Barrier(MAX_THREADS, timeout=LIMIT_S)
    side_by_side([meeting.wait] * MAX_THREADS)
    assert side_by_side([threading.current_thread]) == [threading.current_thread()]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_the_first_failure_is_raised_when_all_have_ended(error: type[BaseException]) -> None:
    done = []

    def fail(text: str, pause_s: float) -> None:
        time.sleep(pause_s)
        done.append(text)
        raise error(text)

    with pytest.raises(error, match="first"):
        side_by_side([lambda: done.append("none"), lambda: fail("first", 0.05), lambda: fail("second", 0.0)])
    assert sorted(done) == ["first", "none", "second"]
