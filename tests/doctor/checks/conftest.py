from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.checks import diagnose
from vlm_doctor.codec import machine_from_json
from vlm_doctor.findings import Outcome
from vlm_doctor.machine import Machine
from vlm_doctor.placement import Plan

from .asking import Ask, Load

MACHINES = Path(__file__).parents[2] / "machines"


@pytest.fixture(scope="session")
def load() -> Load:
    """A machine of tests/machines by name, with changes: fields of the machine, or ``gpu=(index, {field: value})``."""

    def loaded(name: str, *, gpu: tuple[int, dict[str, Any]] | None = None, **changes: Any) -> Machine:
        path = MACHINES / f"{name}.json"
        machine = replace(machine_from_json(path.read_bytes(), where=path.name), **changes)
        if gpu is not None:
            index, fields = gpu
            gpus = tuple(replace(one, **fields) if one.index == index else one for one in machine.gpus)
            machine = replace(machine, gpus=gpus)
        return machine

    return loaded


@pytest.fixture(scope="session")
def ask(load: Load) -> Ask:
    """Outcome of one code on a machine, or on a named machine with changes."""

    def asked(code: str, machine: Machine | str, *, plan: Plan | None = None, **changes: Any) -> Outcome:
        whole = load(machine, **changes) if isinstance(machine, str) else machine
        return next(outcome for outcome in diagnose(whole, plan=plan).outcomes if outcome.code == code)

    return asked


@pytest.fixture(scope="session")
def said() -> Callable[[Outcome], list[tuple[str, str]]]:
    """Severity and message of each finding."""
    return lambda outcome: [(finding.severity, finding.message) for finding in outcome.findings]
