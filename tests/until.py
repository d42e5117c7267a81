"""For tests of several processes: wait for what is to come, never for a time that a busy machine may need longer than."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

AnswerT = TypeVar("AnswerT")

LIMIT_S = 300
"""No machine is so busy: what has not come by then does not come."""


def until(question: Callable[[], AnswerT | None]) -> AnswerT:
    """Ask again and again; the first answer that is something."""
    end = time.monotonic() + LIMIT_S
    while not (answer := question()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return answer


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
