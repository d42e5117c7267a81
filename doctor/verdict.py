"""What a report comes to: the exit status, the verdict in one line, and the one thing to do next.

Every output format takes these from here, so that no two formats can disagree.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from .findings import Diagnosis, Finding
from .machine import Machine
from .placement import Plan
from .report import Report
from .visibility import visible_gpus

USABLE = 0
PROBLEM = 1
COULD_NOT_LOOK = 3

NVML_PROBLEM = "VLM105"
_CAUSES = ("VLM1", "VLM2", "VLM310")
"""Beginnings of codes that say why NVML does not answer: driver, visibility, and a package that shadows its binding."""
_BLIND_STATES = ("no_binding", "error", "crashed", "timed_out")


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The one thing to do next."""

    text: str
    commands: tuple[str, ...] = ()
    verify: str
    """Command that shows whether it helped."""


def could_not_look(machine: Machine, diagnosis: Diagnosis | None = None) -> bool:
    """Tell whether nothing that matters is known: there are GPUs, but NVML would not speak, and no check found out why.

    A cause that a check found (the driver is not loaded, its versions differ, pynvml is shadowed) is an answer, and so is
    an error of NVML whose cause is known.
    """
    is_expected = bool(machine.pci_devices or machine.driver.device_files)
    if machine.gpus or not is_expected or machine.driver.nvml_state not in _BLIND_STATES:
        return False
    findings = diagnosis.findings if diagnosis else ()
    causes = (finding for finding in findings if finding.severity == "error" and finding.code.startswith(_CAUSES))
    return all(finding.code == NVML_PROBLEM and finding.cause is None for finding in causes)


def exit_status(machine: Machine, diagnosis: Diagnosis | None, plan: Plan | None = None, *, strict: bool = False) -> int:
    """Give the exit status of a run.

    Args:
        machine: What was seen.
        diagnosis: What the checks said of it.
        plan: The plan, when it is the answer; a mere suggestion does not count.
        strict: Count warnings like errors.

    Returns:
        0 usable; 1 an error was found (with ``strict`` also a warning) or the plan does not fit; 3 could not look.
    """
    if could_not_look(machine, diagnosis):
        return COULD_NOT_LOOK
    if plan is not None and not plan.fits:
        return PROBLEM
    if diagnosis is None:
        return USABLE
    return PROBLEM if diagnosis.count("error") or (strict and diagnosis.count("warning")) else USABLE


def focus(diagnosis: Diagnosis, gpus: Collection[int]) -> Diagnosis:
    """Demote to info what is only about GPUs other than ``gpus``: shown, but it decides nothing."""

    def demoted(finding: Finding) -> Finding:
        if not finding.gpus or not set(finding.gpus).isdisjoint(gpus):
            return finding
        return finding.demoted("it is about a GPU that is not asked for")

    return Diagnosis(
        outcomes=tuple(
            msgspec.structs.replace(outcome, findings=tuple(map(demoted, outcome.findings)))
            for outcome in diagnosis.outcomes
        )
    )


def summary(diagnosis: Diagnosis) -> str:
    """Count errors and warnings: ``2 errors, 1 warning``, or ``no errors, no warnings``."""
    errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
    if not errors and not warnings:
        return "no errors, no warnings"
    counted = ((errors, "error"), (warnings, "warning"))
    return ", ".join(f"{number} {word}{'s' if number > 1 else ''}" for number, word in counted if number)


def verdict(report: Report) -> str:
    """Say in one sentence how things stand with the machine."""
    machine, diagnosis = report.machine, report.diagnosis
    if diagnosis is None:
        return "Not examined."
    if could_not_look(machine, diagnosis):
        return "Could not look: there are NVIDIA GPUs, but the driver library (NVML) does not answer."
    counted = summary(diagnosis)
    if diagnosis.count("error"):
        return f"Not ready: {counted}."
    if not machine.gpus:
        return "No NVIDIA GPU here: nothing to run on, nothing to repair."
    working = {gpu.index for gpu in machine.gpus if gpu.error is None}
    visible = working.intersection(visible_gpus(machine).gpus)
    noun = "GPU" if len(working) == 1 else "GPUs"
    number = f"{len(working)} {noun}" if visible == working else f"{len(visible)} of {len(working)} {noun} visible"
    return f"{'Usable' if diagnosis.count('warning') else 'Ready'}: {number}, {counted}."


def next_step(report: Report) -> Step | None:
    """Choose what to do next: the fix of the worst finding that has one, what you can do yourself before what you cannot.

    Returns:
        ``None`` when there is nothing to repair.
    """
    findings = report.diagnosis.findings if report.diagnosis else ()
    fixable = [(finding, finding.fix) for finding in findings if finding.fix is not None and finding.severity != "info"]
    if not fixable:
        return None
    worst = fixable[0][0].severity
    finding, fix = min(
        (pair for pair in fixable if pair[0].severity == worst), key=lambda pair: pair[1].who == "administrator"
    )
    return Step(text=f"{fix.request} ({finding.code})", commands=fix.commands, verify="vlm-doctor")
