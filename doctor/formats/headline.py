"""What formats for machines share: the one line a report comes to, and the advice of a finding as plain lines."""

from __future__ import annotations

from ..errors import UsageError
from ..findings import Diagnosis, Finding
from ..report import Report
from ..verdict import verdict
from .inert import inert

JUDGED = ("check", "gate")
"""Commands whose report is a list of verdicts, which is what formats for CI hold."""


def headline(report: Report) -> str:
    """The verdict on the machine, or the reason of the gate, in one line."""
    return inert(report.gate.reason if report.gate is not None else verdict(report))


def refuse_other_reports(report: Report, format: str) -> None:  # noqa: A002 - the word of the command line
    """Refuse a report that such a format cannot hold.

    Raises:
        UsageError: It is a plan, the judgement of a map or the explanation of an error.
    """
    if report.command not in JUDGED:
        raise UsageError(f"--format {format} holds verdicts on a machine; for {report.command} take --format json.")


def also_explains(finding: Finding, diagnosis: Diagnosis | None) -> str:
    """Titles and codes of what a finding explains besides itself; empty when there is nothing."""
    symptoms = diagnosis.symptoms(finding.code) if diagnosis is not None else ()
    return ", ".join(f"{one.title} ({one.code})" for one in symptoms)


def since(report: Report, code: str) -> list[str]:
    """What became of a code since a report was saved, as one inert line; empty when it is as it was, or not known."""
    changes = report.changes
    if changes is None or changes.findings_before is None:
        return []
    news = changes.news(report.diagnosis.findings if report.diagnosis is not None else ()).get(code)
    before = changes.findings_before.get(code)
    was = f"{'a' if before == 'warning' else 'an'} {before}"
    lines = {
        "new": f"New since {changes.since}.",
        "updated": f"Of another severity since {changes.since}: it was {was}.",
        "absent": f"Gone since {changes.since}: it was {was}.",
    }
    return [inert(lines[news])] if news in lines else []


def advice(finding: Finding, diagnosis: Diagnosis | None = None) -> list[str]:
    """What it also explains, cause, demotion, fix and its commands, one inert line each."""
    explained = also_explains(finding, diagnosis)
    lines = [f"Also explains: {explained}"] if explained else []
    lines += [f"Cause: {finding.cause}"] if finding.cause else []
    if finding.demoted_from is not None:
        lines.append(f"Demoted from {finding.demoted_from}: {finding.demoted_by}.")
    if finding.fix is not None:
        lines += [f"{finding.fix.label}: {finding.fix.text}", *(f"    {command}" for command in finding.fix.commands)]
    return [inert(line) for line in lines]
