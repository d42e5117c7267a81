from __future__ import annotations

from typing import Any

import pytest

from vlm_doctor.findings import Outcome
from vlm_doctor.placement import Lever, Plan, Shortage
from vlm_doctor.units import GIB
from vlm_doctor.workload import Workload

from .asking import Ask, Said


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "model": "org/model",
        "machine": "2 x NVIDIA L4",
        "fits": True,
        "workload": Workload(),
        "dtype": "bfloat16",
        "prompt_tokens": 2112,
        "image_tokens": 1600,
        "device_map": {},
        "max_memory": {},
        "cuda_visible_devices": "",
        "stages": (),
    }
    return Plan(**(fields | changes))


def short(*levers: Lever, is_permanent: bool = True) -> Plan:
    shortage = Shortage(
        missing_bytes=3 * GIB, message="3.0 GiB are missing on GPU 0.", is_permanent=is_permanent, levers=levers
    )
    return plan(fits=False, shortage=shortage)


def fixed_by(outcome: Outcome) -> tuple[str, tuple[str, ...]]:
    fix = outcome.findings[0].fix
    assert fix is not None
    return fix.text, fix.commands


def test_does_not_fit_this_machine(ask: Ask, said: Said) -> None:
    outcome = ask("VLM601", "2xl4-idle", plan=short())

    assert said(outcome) == [("error", "org/model does not fit this machine: 3.0 GiB are missing on GPU 0.")]
    assert outcome.findings[0].evidence == {
        "plan.shortage.missing_bytes": "3.0 GiB",
        "plan.prompt_tokens": "2112",
        "plan.dtype": "bfloat16",
    }
    assert fixed_by(outcome) == (
        "No single change makes it fit: combine the changes of the plan, or take another machine.",
        (),
    )
    assert ask("VLM602", "2xl4-idle", plan=short()).state == "passed"


def test_where_gpus_are_missing_no_memory_is(ask: Ask) -> None:
    shortage = Shortage(missing_bytes=0, message="At least 3 GPUs are asked for, and 2 can be used.", is_permanent=True)

    outcome = ask("VLM601", "2xl4-idle", plan=plan(fits=False, shortage=shortage))

    assert "plan.shortage.missing_bytes" not in outcome.findings[0].evidence


def test_does_not_fit_now(ask: Ask, said: Said) -> None:
    outcome = ask("VLM602", "2xl4-idle", plan=short(is_permanent=False))

    assert said(outcome) == [("error", "org/model does not fit at the moment: 3.0 GiB are missing on GPU 0.")]
    assert fixed_by(outcome) == ("Wait for the other processes, or stop those that are yours.", ("nvidia-smi",))
    assert ask("VLM601", "2xl4-idle", plan=short(is_permanent=False)).state == "passed"


@pytest.mark.parametrize("is_permanent", [True, False])
def test_the_first_change_that_makes_it_fit_is_offered(is_permanent: bool, ask: Ask) -> None:
    small = Lever(change="prompt of at most 64 text tokens", saves_bytes=GIB, fits=False)
    enough = Lever(change="load in 4 bit (nf4)", saves_bytes=9 * GIB, fits=True)

    outcome = ask("VLM601" if is_permanent else "VLM602", "2xl4-idle", plan=short(small, enough, is_permanent=is_permanent))

    assert fixed_by(outcome) == ("It fits with this change: load in 4 bit (nf4) (saves 9.0 GiB).", ())


def test_a_plan_that_says_nothing_of_what_is_missing(ask: Ask, said: Said) -> None:
    outcome = ask("VLM601", "2xl4-idle", plan=plan(fits=False))

    assert said(outcome) == [("error", "org/model does not fit this machine: no placement was found.")]
    assert outcome.findings[0].evidence["plan.shortage.missing_bytes"] == "unknown"


def test_remote_code(ask: Ask, said: Said) -> None:
    outcome = ask("VLM603", "2xl4-idle", plan=plan(is_remote_code=True))

    assert said(outcome) == [
        ("warning", "org/model needs trust_remote_code=True: loading it runs code from the checkpoint.")
    ]
    assert outcome.findings[0].evidence == {"plan.is_remote_code": "true"}


@pytest.mark.parametrize("code", ["VLM601", "VLM602", "VLM603"])
def test_a_plan_that_fits_and_no_plan(code: str, ask: Ask) -> None:
    assert ask(code, "2xl4-idle", plan=plan()).state == "passed"
    assert ask(code, "2xl4-idle").reason == "no model was named"
