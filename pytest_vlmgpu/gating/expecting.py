"""``--vlm-expect-gpus`` and ``--vlm-expect-vram``: is the machine what this run needs, in the first second?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .. import verdicts
from ..requirements import Requirements
from ..results.evidence import Broken
from ..results.examining import faults, told
from ..state import gate_of
from .selection import judge

if TYPE_CHECKING:
    from vlm_doctor.machine import Machine

    from ..options import Settings

_TOLD = 5
"""Findings that the message repeats; ``vlm-doctor`` shows all."""


def unmet(config: pytest.Config) -> Broken | None:
    """Look at the machine; say what is missing, or nothing when it is as expected.

    Free memory is what is free now, so that memory which others hold is missing, unless ``--vlm-wait`` was given.
    """
    gate = gate_of(config)
    machine = gate.machine()
    gate.machine_used = machine
    return judge_expectation(gate.settings, machine)


def judge_expectation(settings: Settings, machine: Machine) -> Broken | None:
    """Hold a machine to what is expected. Pure."""
    wanted = Requirements(gpus=settings.expect_gpus or 1, vram_bytes=settings.expect_vram)
    # Whoever says how long to wait means memory that others hold, too: then the tests wait for it.
    verdict = judge(wanted, machine, settings.gpus, is_busy_decided_later="wait" in settings.origins)
    if verdict.action == "run":
        return None
    names = [settings.origins[name] for name in ("expect_gpus", "expect_vram") if name in settings.origins]
    lines = [f"{' and '.join(names)}: {verdict.text}"]
    found = [told(finding) for finding in faults(machine)]
    lines += [f"  {line}" for line in found[:_TOLD]]
    if len(found) > _TOLD:
        lines.append(f"  and {len(found) - _TOLD} more: run vlm-doctor.")
    elif not found:
        lines.append("  vlm-doctor finds nothing wrong with this machine: it is another one than expected.")
    return Broken(code=verdicts.EXPECTATION, message="\n".join(lines))
