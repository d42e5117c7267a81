"""Types of the fixtures that ask the checks, and what is read off an answer."""

from __future__ import annotations

from collections.abc import Callable

from vlm_doctor.findings import Outcome
from vlm_doctor.machine import Machine

Ask = Callable[..., Outcome]
Said = Callable[[Outcome], list[tuple[str, str]]]
Load = Callable[..., Machine]


def commands(outcome: Outcome) -> tuple[str, ...]:
    fix = outcome.findings[0].fix
    assert fix is not None
    return fix.commands
