"""What holds for every check alike: it fires, is silent, and does not judge what it cannot see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.checks import CHECKS, diagnose
from vlm_doctor.checks._check import Check
from vlm_doctor.codec import machine_from_json
from vlm_doctor.machine import Gap, Machine, TorchView

MACHINES = sorted((Path(__file__).parents[2] / "machines").glob("*.json"))
OF_MACHINES = [check for check in CHECKS if not check.code.startswith("VLM6")]
"""Those of family 6xx judge a plan, and have tests of their own."""


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, list[str]]]:
    """Code to state to the machines on which the check has it."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in MACHINES:
        for outcome in diagnose(machine_from_json(path.read_bytes(), where=path.name)).outcomes:
            found[outcome.code][outcome.state].append(path.stem)
    return found


@pytest.mark.parametrize("check", OF_MACHINES, ids=lambda check: check.code)
def test_fires_is_silent_and_does_not_judge(check: Check, states: dict[str, dict[str, list[str]]]) -> None:
    mine = states[check.code]

    assert mine["found"], f"no machine in tests/machines makes {check.code} fire"
    assert mine["passed"] or check.code == "VLM401", f"{check.code} is silent on no machine in tests/machines"
    assert mine["skipped"] or mine["unknown"], f"{check.code} judges every machine in tests/machines"


def without(machine: Machine, need: str) -> Machine:
    """Take away a fact, and leave a gap that says why."""
    gap = Gap(path=need.replace("gpus[]", "gpus[0]"), reason="NVML: Unknown Error")
    machine = replace(machine, gaps=(*machine.gaps, gap))
    if need.startswith("gpus[]."):
        field = need.removeprefix("gpus[].")
        empty: Any = () if field == "processes" else None
        gaps = tuple(Gap(path=f"gpus[{at}].{field}", reason="NVML: Unknown Error") for at in range(len(machine.gpus)))
        gpus = tuple(replace(gpu, **{field: empty}) for gpu in machine.gpus)
        return replace(machine, gpus=gpus, gaps=(*machine.gaps, *gaps))
    if "." in need:
        part, _, field = need.partition(".")
        return replace(machine, **{part: replace(getattr(machine, part), **{field: None})})
    if need == "torch":
        return replace(machine, torch=TorchView(state="not_asked", message="still being asked"))
    empty = () if isinstance(getattr(machine, need), tuple) else None
    return replace(machine, **{need: empty})


NEEDS = [(check, need) for check in OF_MACHINES for need in check.needs]


@pytest.mark.parametrize(("check", "need"), NEEDS, ids=lambda value: getattr(value, "code", value))
def test_a_fact_that_is_missing_is_never_passed(check: Check, need: str, load: Callable[..., Machine]) -> None:
    diagnosis = diagnose(without(load("8xa100-nvswitch"), need))

    outcome = next(outcome for outcome in diagnosis.outcomes if outcome.code == check.code)
    assert outcome.state in ("unknown", "skipped"), (outcome.state, outcome.findings)
    assert outcome.reason


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_one_cause_gives_one_error(path: Path) -> None:
    """A broken machine has one error; more only where the story has more than one fault."""
    errors = [f for f in diagnose(machine_from_json(path.read_bytes(), where=path.name)).findings if f.severity == "error"]

    assert len(errors) <= 1, [finding.message for finding in errors]


def test_codes_that_explain_are_checks_of_machines() -> None:
    known = {check.code for check in OF_MACHINES}

    assert {code for check in OF_MACHINES for code in check.explained_by} <= known
