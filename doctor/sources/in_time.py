"""Looks that a dead disk or network file system must not hold up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")


def in_time(look: Callable[[], ResultT], deadline_s: float) -> ResultT:
    """What a look gives. It runs in a thread of its own, since nothing can be done about a disk that does not answer.

    Raises:
        TimeoutError: It did not end in time; the thread is left to itself.
        Exception: Whatever the look raised.
    """
    given: list[ResultT] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            given.append(look())
        except Exception as error:  # noqa: BLE001 - raised again in the thread that asked
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if raised:
        raise raised[0]
    if not given:
        raise TimeoutError(f"no answer within {deadline_s:g} s")
    return given[0]
