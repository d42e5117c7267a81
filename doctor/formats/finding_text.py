"""Findings, and what could not be judged, as terminal text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..findings import Diagnosis, Finding, Outcome, Severity
from ..machine import Machine
from .page import Page, Piece

STYLES: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_MARKS: dict[Severity, tuple[str, str]] = {"error": ("✗", "x"), "warning": ("!", "!"), "info": ("i", "i")}
"""Mark in Unicode and in ASCII. The word always follows, so that nothing hangs on a mark or a color."""


def write_findings(
    page: Page, findings: Iterable[Finding], *, diagnosis: Diagnosis | None = None, verbose: bool = False
) -> None:
    """Write findings in the order given, each with what to do about it; without ``verbose``, infos only in brief.

    Args:
        page: Where to write.
        findings: What to write.
        diagnosis: All outcomes: what a finding also explains is said with it.
        verbose: Also evidence and links.
    """
    said: set[str] = set()
    for finding in findings:
        page.gap()
        mark = _MARKS[finding.severity][0 if page.is_unicode else 1]
        left: list[Piece] = [(f"{mark} {finding.severity}", STYLES[finding.severity]), "  ", (finding.title, "bold")]
        page.ends(left, (finding.code, "dim"))
        page.text(finding.message, indent=2)
        if finding.demoted_from is not None:
            page.text((f"Demoted from {finding.demoted_from}: {finding.demoted_by}.", "dim"), indent=2)
        if diagnosis is not None and finding.code not in said:
            said.add(finding.code)
            _write_symptoms(page, diagnosis.symptoms(finding.code))
        if verbose or finding.severity != "info":
            _write_advice(page, finding)
        if verbose:
            for path, value in finding.evidence.items():
                page.item("Seen:", f"{path} = {value}", indent=2)
            for link in finding.links:
                page.verbatim(link, indent=2, style="dim")


def _write_symptoms(page: Page, symptoms: Sequence[Outcome]) -> None:
    if symptoms:
        page.item("Also explains:", ", ".join(f"{one.title} ({one.code})" for one in symptoms), indent=2)


def _write_advice(page: Page, finding: Finding) -> None:
    if finding.cause:
        page.item("Cause:", finding.cause, indent=2)
    if finding.fix is None:
        return
    page.item(f"{finding.fix.label}:", finding.fix.text, indent=2)
    for command in finding.fix.commands:
        page.verbatim(command, indent=6, style="bold")


def write_unknowns(page: Page, machine: Machine, diagnosis: Diagnosis, *, verbose: bool = False) -> None:
    """Write what could not be judged and why; with ``verbose`` also each field that could not be read."""
    unknown = [outcome for outcome in diagnosis.outcomes if outcome.state == "unknown"]
    crashed = [outcome for outcome in diagnosis.outcomes if outcome.state == "crashed"]
    gaps = machine.gaps if verbose else ()
    if not (unknown or crashed or gaps):
        return
    page.gap()
    page.text(("Not known", "bold"))
    for reason, outcomes in _by_reason(unknown):
        page.item("-", f"{_subjects(outcomes)}: {reason}", indent=2)
    for outcome in crashed:
        why = outcome.reason or "no reason recorded"
        page.item("-", f"{outcome.code} {outcome.title}: this check itself failed, please report it ({why})", indent=2)
    for gap in gaps:
        page.item("-", f"{gap.path}: {gap.reason}", indent=2)


def _by_reason(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Outcome]]]:
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.reason or "no reason recorded", []).append(outcome)
    return list(grouped.items())


def _subjects(outcomes: Sequence[Outcome]) -> str:
    """Title where one check is meant, codes where many share a reason."""
    if len(outcomes) == 1:
        return f"{outcomes[0].title} ({outcomes[0].code})"
    return ", ".join(outcome.code for outcome in outcomes)


def write_tally(page: Page, machine: Machine, diagnosis: Diagnosis, *, verbose: bool = False) -> None:
    """Count the checks by what became of them; with ``verbose`` also name them."""
    by_state: dict[str, list[Outcome]] = {}
    for outcome in diagnosis.outcomes:
        by_state.setdefault(outcome.state, []).append(outcome)
    words = {
        "passed": "passed",
        "found": "found something",
        "skipped": "not applicable",
        "unknown": "unknown",
        "crashed": "failed",
    }
    counted = [f"{len(by_state[state])} {word}" for state, word in words.items() if state in by_state]
    if not counted:
        return
    fields = "field" if len(machine.gaps) == 1 else "fields"
    unread = f"; {len(machine.gaps)} {fields} could not be read" if machine.gaps else ""
    hint = "" if verbose else " (--verbose names them)"
    checks = "check" if len(diagnosis.outcomes) == 1 else "checks"
    page.text((f"{len(diagnosis.outcomes)} {checks}: {', '.join(counted)}{unread}{hint}.", "dim"))
    if verbose:
        for state in ("passed", "skipped"):
            for outcome in by_state.get(state, ()):
                why = f": {outcome.reason}" if outcome.reason else ""
                page.item("-", f"{outcome.code} {outcome.title}: {words[state]}{why}", indent=2)
