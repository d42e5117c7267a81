"""What every output format takes: one machine, its diagnosis, and a plan if one was asked for."""

from __future__ import annotations

from typing import Literal

import msgspec

from .answers import Changes, ErrorAnswer, GateAnswer
from .device_map import MapCheck
from .findings import Diagnosis
from .machine import Machine
from .placement import Plan

REPORT_SCHEMA = 1


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer of one run."""

    schema: int = REPORT_SCHEMA
    version: str
    """Of pytest-vlmgpu."""
    command: Literal["check", "plan", "check-map", "gate", "explain-error"] = "check"
    """What was asked: in ``check`` the plan is only a sketch, in ``plan`` it is the answer, in ``check-map`` the map's
    judgement is, in ``gate`` whether expectations are met, in ``explain-error`` what a text says."""
    machine: Machine
    diagnosis: Diagnosis | None = None
    plan: Plan | None = None
    map_check: MapCheck | None = None
    changes: Changes | None = None
    """What is different since the report of ``--since``."""
    gate: GateAnswer | None = None
    error_text: ErrorAnswer | None = None
    exit_status: int
    """0 usable; 1 an error was found (with --strict also a warning), the plan does not fit or the gate is not met; 3 could
    not look, or the error text is not recognized."""
    notes: tuple[str, ...] = ()
    """What this run left out, and why."""
    seconds: float | None = None
