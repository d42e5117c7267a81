"""A report as text for people: the news first, worst on top, then the facts, then one thing to do.

On a terminal the report comes in two parts, since torch takes a second to answer: :func:`head` is printed at once,
:func:`tail` when torch has spoken. Together, printed in one go, they are the whole report.
"""

from __future__ import annotations

import shlex

from ..findings import Diagnosis
from ..report import Report
from ..trial import Trial
from ..verdict import COULD_NOT_LOOK, USABLE, next_step, verdict
from .changes_text import write_changes
from .finding_text import write_findings, write_tally, write_unknowns
from .look import Look
from .machine_text import write_machine, write_torch
from .page import Page
from .plan_text import write_gpu_sets, write_levers, write_plan, write_snippet, write_suggestion

EXAMPLE_MODEL = "zai-org/GLM-4.1V-9B-Thinking"
MISFITS = ("VLM601", "VLM602")
"""Codes that say why a plan does not fit."""


def render(report: Report, look: Look) -> str:
    """Write a whole report."""
    if report.command == "plan":
        return _plan(report, look)
    if report.command == "check-map":
        return _map_check(report, look)
    if report.trial is not None:
        return _trial(report, report.trial, look)
    if report.error_text is not None:
        from .error_text import write_error

        page = _page(look)
        write_error(page, report.error_text, report.machine, verbose=look.verbose)
        _write_notes(page, report)
        return page.render()
    if report.gate is not None:
        from .gate_text import write_gate

        page = _page(look)
        write_gate(page, report, report.gate, verbose=look.verbose)
        return page.render()
    return head(report, look) + tail(report, look)


def _page(look: Look) -> Page:
    return Page(width=look.width, color=look.color, is_unicode=look.is_unicode)


def head(report: Report, look: Look) -> str:
    """Write what was found and what was seen."""
    page = _page(look)
    machine = report.machine
    origin = {"live": "this machine", "recorded": "recorded", "synthetic": "made up"}[machine.origin]
    page.text((f"vlm-doctor {report.version}", "dim"), "  ", (machine.description, "bold"), (f" ({origin})", "dim"))
    if report.changes is not None:
        write_changes(page, report.changes, verbose=look.verbose)
    findings = report.diagnosis.findings if report.diagnosis else ()
    write_findings(page, findings, diagnosis=report.diagnosis, verbose=look.verbose)
    write_machine(page, machine, report.diagnosis)
    return page.render()


def tail(report: Report, look: Look, *, earlier: Report | None = None) -> str:
    """Write what is not known, the verdict and what to do.

    Args:
        report: The final report.
        look: How it is to look.
        earlier: The report whose head was printed, when it was another one: its findings are not repeated.
    """
    page = _page(look)
    diagnosis = report.diagnosis or Diagnosis(outcomes=())
    if earlier is not None:
        write_torch(page, report.machine.torch)
        if report.changes is not None and earlier.changes is not None:
            write_changes(page, report.changes, shown=earlier.changes.changes, verbose=look.verbose)
        seen = earlier.diagnosis.findings if earlier.diagnosis else ()
        news = [finding for finding in diagnosis.findings if finding not in seen]
        write_findings(page, news, diagnosis=diagnosis, verbose=look.verbose)
    write_unknowns(page, report.machine, diagnosis, verbose=look.verbose)
    page.gap()
    write_tally(page, report.machine, diagnosis, verbose=look.verbose)
    _write_closing(page, report, look)
    return "\n" + page.render()


def _write_closing(page: Page, report: Report, look: Look) -> None:
    page.gap()
    page.text((verdict(report), {0: "bold green", 1: "bold red"}.get(report.exit_status, "bold yellow")))
    step = next_step(report)
    if step is not None:
        page.item("Do this next:", step.text)
        for command in step.commands:
            page.verbatim(command, indent=4, style="bold")
        page.item("Then verify with:", (step.verify, "bold"))
    _write_notes(page, report)
    if report.plan is not None:
        write_suggestion(page, report.plan, gpu_count=len(report.machine.gpus), machine_option=look.machine_option)
    elif not report.machine.gpus and report.exit_status == USABLE:
        _write_other_machine(page, EXAMPLE_MODEL)
    _write_time(page, report)


def _write_notes(page: Page, report: Report) -> None:
    for note in report.notes:
        page.text(note)


def _write_other_machine(page: Page, model: str) -> None:
    page.gap()
    page.text("To plan for a machine that is not this one, describe it:")
    page.verbatim(f"vlm-doctor plan {shlex.quote(model)} --machine 2xL4", style="bold")


def _plan(report: Report, look: Look) -> str:
    page = _page(look)
    plan = report.plan
    findings = report.diagnosis.findings if report.diagnosis else ()
    if report.exit_status == COULD_NOT_LOOK:
        page.text((verdict(report), "bold yellow"))
    elif plan is not None:
        code = next((finding.code for finding in findings if finding.code in MISFITS and not plan.fits), "")
        write_plan(page, plan, gpu_count=len(report.machine.gpus), code=code, verbose=look.verbose)
        write_levers(page, plan)
        write_gpu_sets(page, plan)
        if plan.fits:
            write_snippet(page, plan, report.machine.libraries, is_live=report.machine.origin == "live")
        if not report.machine.gpus:
            _write_other_machine(page, plan.model)
    _write_machine_trouble(page, report, look)
    _write_notes(page, report)
    _write_time(page, report)
    return page.render()


def _map_check(report: Report, look: Look) -> str:
    page = _page(look)
    if report.exit_status == COULD_NOT_LOOK:
        page.text((verdict(report), "bold yellow"))
    elif report.map_check is not None:
        from .map_text import write_map_check

        write_map_check(page, report.map_check, verbose=look.verbose)
    _write_machine_trouble(page, report, look)
    _write_notes(page, report)
    _write_time(page, report)
    return page.render()


def _trial(report: Report, trial: Trial, look: Look) -> str:
    from .trial_text import write_trial

    page = _page(look)
    write_trial(page, trial, report.plan, report.machine, verbose=look.verbose)
    if not trial.is_good:
        _write_machine_trouble(page, report, look)
    _write_time(page, report)
    return page.render()


def _write_machine_trouble(page: Page, report: Report, look: Look) -> None:
    """Point at errors of the machine: a plan that fits is of no use on a machine that does not work."""
    findings = report.diagnosis.findings if report.diagnosis else ()
    errors = [finding for finding in findings if finding.severity == "error" and not finding.code.startswith("VLM6")]
    if not errors:
        return
    page.gap()
    page.text(("This machine has errors that stop any model:", "bold red"))
    for finding in errors:
        page.item("-", f"{finding.title} ({finding.code})", indent=2)
    page.item("See:", (f"vlm-doctor{look.machine_option}", "bold"))


def _write_time(page: Page, report: Report) -> None:
    if report.seconds is not None:
        page.gap()
        page.text((f"Took {report.seconds:.2f} s.", "dim"))
