"""One cause gives one error: what it also explains is named with it, and what is only a symptom is not said twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from vlm_doctor.checks import CHECKS, diagnose
from vlm_doctor.findings import Diagnosis
from vlm_doctor.machine import Machine, TorchView

NO_CUDA = TorchView(state="ok", version="2.13.0+cu130", cuda="13.0", is_available=False, device_count=0)
"""What torch says whenever CUDA does not start, whatever the reason."""


def errors(diagnosis: Diagnosis) -> list[str]:
    return list(dict.fromkeys(finding.code for finding in diagnosis.findings if finding.severity == "error"))


@pytest.mark.parametrize(
    ("machine", "cause"),
    [
        # In the order in which the causes are asked about: the first that is there is the answer.
        ("driver-missing", "VLM102"),
        ("nouveau", "VLM103"),
        ("driver-mismatch", "VLM104"),
        ("nvml-crashed", "VLM105"),
        ("device-files-forbidden", "VLM106"),
        ("exclusive-process", "VLM109"),
        ("container-no-injection", "VLM205"),
        ("cpu-torch", "VLM303"),
        ("old-driver", "VLM306"),
        ("8xh100-fabric-down", "VLM403"),
        ("2xl4-idle", "VLM206"),
    ],
)
def test_torch_without_cuda_has_one_cause_or_is_said_to_have_none_known(
    machine: str, cause: str, load: Callable[..., Machine]
) -> None:
    diagnosis = diagnose(load(machine, torch=NO_CUDA))

    assert errors(diagnosis) == [cause]
    symptom = next(outcome for outcome in diagnosis.outcomes if outcome.code == "VLM206")
    assert symptom.state == ("found" if cause == "VLM206" else "skipped")
    if symptom.symptom_of is not None:
        assert symptom.symptom_of == cause
        assert symptom in diagnosis.symptoms(cause)


@pytest.mark.parametrize(
    ("machine", "cause"), [("cpu-torch", "VLM303"), ("old-driver", "VLM306"), ("8xh100-fabric-down", "VLM403")]
)
def test_a_cause_names_the_symptoms_that_are_there(machine: str, cause: str, load: Callable[..., Machine]) -> None:
    diagnosis = diagnose(load(machine))

    assert [outcome.code for outcome in diagnosis.symptoms(cause)] == ["VLM206"]


def test_a_symptom_that_is_not_there_is_not_named(load: Callable[..., Machine]) -> None:
    works = TorchView(state="ok", version="2.13.0+cu130", cuda="13.0", is_available=True, device_count=2)

    diagnosis = diagnose(load("exclusive-process", torch=works))

    assert errors(diagnosis) == ["VLM109"]
    assert diagnosis.symptoms("VLM109") == ()
    assert next(outcome.reason for outcome in diagnosis.outcomes if outcome.code == "VLM206") == "explained by VLM109"


def test_two_causes_that_have_nothing_to_do_with_each_other_are_two_errors(load: Callable[..., Machine]) -> None:
    wheel = load("cpu-torch").libraries

    diagnosis = diagnose(load("8xh100-fabric-down", libraries=wheel, torch=NO_CUDA))

    assert errors(diagnosis) == ["VLM303", "VLM403"]
    assert [outcome.code for outcome in diagnosis.symptoms("VLM303")] == ["VLM206"]


def test_causes_never_explain_each_other_in_a_circle() -> None:
    explains = {check.code: set(check.explained_by) for check in CHECKS}

    def reaches(code: str, wanted: str, seen: frozenset[str]) -> bool:
        return any(
            next_ == wanted or (next_ not in seen and reaches(next_, wanted, seen | {next_})) for next_ in explains[code]
        )

    assert [code for code in explains if reaches(code, code, frozenset())] == []


def test_what_was_demoted_says_by_what_and_counts_no_more(load: Callable[..., Machine]) -> None:
    diagnosis = diagnose(load("cpu-torch"), ignore=("vlm30",))
    (finding,) = (finding for finding in diagnosis.findings if finding.code == "VLM303")

    assert (finding.severity, finding.demoted_from, finding.demoted_by) == ("info", "error", "--ignore VLM30")
    assert diagnosis.count("error") == 0
    assert replace(finding, severity="error").demoted("again").demoted_by == "again"
    assert finding.demoted("again") is finding
