"""A report as workflow commands of GitHub Actions, so that findings show up as annotations of the run.

Source: docs.github.com, "Workflow commands for GitHub Actions" (setting an error message; escaping as in actions/toolkit,
``packages/core/src/command.ts``). GitHub shows the first ten annotations of each level of a step, so the worst come first.
"""

from __future__ import annotations

from ..findings import Severity
from ..report import Report
from .headline import advice, headline, refuse_other_reports, since
from .inert import inert
from .look import Look

_LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "notice"}


def render(report: Report, look: Look) -> str:
    """Write one command a finding, then the verdict and what has to be said of the run as plain text."""
    refuse_other_reports(report, "github")
    lines = []
    if report.gate is not None and not report.gate.is_met:
        lines.append(command("error", "vlm-doctor gate", headline(report)))
    if report.changes is not None and report.changes.changes:
        body = "\n".join(inert(change.text) for change in report.changes.changes)
        lines.append(command("notice", f"changed since {report.changes.since}", body))
    for finding in report.diagnosis.findings if report.diagnosis is not None else ():
        body = "\n".join([inert(finding.message), *since(report, finding.code), *advice(finding, report.diagnosis)])
        lines.append(command(_LEVELS[finding.severity], f"{finding.code} {finding.title}", body))
    text = "".join(f"{line}\n" for line in [*lines, headline(report), *map(inert, report.notes)])
    return text if look.is_unicode else text.encode("ascii", "backslashreplace").decode()


def command(level: str, title: str, text: str) -> str:
    """One workflow command. Text from outside cannot begin another: line ends and separators are escaped."""
    shown = _escaped(inert(title)).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={shown}::{_escaped(text)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
