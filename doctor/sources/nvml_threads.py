"""The part of the NVML program that asks several things side by side.

``concurrent.futures`` would do it as well, but imports ``logging``: 7 ms more of the 135 that this child takes, which
everything waits for (Python 3.11).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

ResultT = TypeVar("ResultT")

MAX_THREADS = 8
"""As many as GPUs of the largest usual machine; NVML itself lets one question at a time pass to a GPU."""


def side_by_side(jobs: Sequence[Callable[[], ResultT]]) -> list[ResultT]:
    """Results of all jobs, in their order, whoever was first.

    Raises:
        BaseException: What the first job that failed, in that order, raised; all have ended by then.
    """
    results: dict[int, ResultT] = {}
    errors: dict[int, BaseException] = {}
    waiting = iter(enumerate(jobs))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                position, job = next(waiting, (-1, None))
            if job is None:
                return
            try:
                results[position] = job()
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
                errors[position] = error

    helpers = [threading.Thread(target=work, daemon=True) for _ in range(min(MAX_THREADS, len(jobs)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[min(errors)]
    return [results[position] for position in range(len(jobs))]
