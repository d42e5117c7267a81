"""The answer of the gate: as terminal text, and as outputs of a CI step."""

from __future__ import annotations

import json

import msgspec

from ..answers import GateAnswer
from ..findings import Diagnosis
from ..report import Report
from ..verdict import next_step
from .page import Page


def write_gate(page: Page, report: Report, answer: GateAnswer, *, verbose: bool = False) -> None:
    """Write the one line, and what to do when the gate is not met."""
    # One line, whatever its length: that is what a log is searched for.
    style = "bold green" if answer.is_met else "bold red" if report.exit_status == 1 else "bold yellow"
    page.verbatim(answer.reason, indent=0, style=style)
    if verbose:
        for name, value in answer.expected.items():
            page.item(f"{name}:", value, indent=2)
        if answer.gpus:
            page.item("CUDA_VISIBLE_DEVICES:", answer.cuda_visible_devices, indent=2)
    step = None if answer.is_met else next_step(_about(report, answer))
    if step is not None:
        page.item("Do this next:", step.text)
        for command in step.commands:
            page.verbatim(command, indent=4, style="bold")
    for note in report.notes:
        page.text((note, "dim"))


def _about(report: Report, answer: GateAnswer) -> Report:
    """The report with the findings only that the reason names: others are no help here."""
    outcomes = report.diagnosis.outcomes if report.diagnosis is not None else ()
    named = tuple(outcome for outcome in outcomes if outcome.code in answer.reason)
    return msgspec.structs.replace(report, diagnosis=Diagnosis(outcomes=named))


def step_outputs(answer: GateAnswer) -> dict[str, str]:
    """Name to value of the outputs of a step; every name is always there."""
    return {
        "run-gpu-tests": "true" if answer.is_met else "false",
        "reason": " ".join(answer.reason.split()),
        "gpus": ",".join(map(str, answer.gpus)),
        "gpu-count": str(len(answer.gpus)),
        "cuda-visible-devices": answer.cuda_visible_devices,
        "device-map": "" if answer.device_map is None else json.dumps(answer.device_map),
    }
