"""A report as Markdown: for an issue, or for the summary of a CI job (``>> "$GITHUB_STEP_SUMMARY"``)."""

from __future__ import annotations

import re

from ..findings import Diagnosis, Finding
from ..machine import Machine
from ..report import Report
from ..units import format_gib
from ..verdict import next_step
from .headline import also_explains, headline, refuse_other_reports
from .inert import inert
from .look import Look

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!])")


def render(report: Report, look: Look) -> str:
    """Write the verdict, what is wrong, what to do, and the facts, folded away."""
    refuse_other_reports(report, "markdown")
    lines = [f"## vlm-doctor: {escaped(headline(report))}", ""]
    lines += _changes(report)
    diagnosis = report.diagnosis
    for finding in diagnosis.findings if diagnosis is not None else ():
        lines += _finding(finding, diagnosis)
    step = next_step(report)
    if step is not None:
        lines += [f"**Do this next:** {escaped(step.text)}", "", *_code(step.commands)]
        lines += [f"**Then verify with:** `{step.verify}`", ""]
    lines += _gpu_table(report.machine)
    if diagnosis is not None:
        unknown = [outcome for outcome in diagnosis.outcomes if outcome.state in ("unknown", "crashed")]
        if unknown:
            lines += ["<details><summary>Not known</summary>", ""]
            lines += [f"- {one.code} {escaped(one.title)}: {escaped(one.reason or one.state)}" for one in unknown]
            lines += ["", "</details>", ""]
    lines += [line for note in report.notes for line in (escaped(note), "")]
    lines.append(f"vlm-doctor {report.version}, {escaped(report.machine.description)}")
    text = "\n".join(lines) + "\n"
    return text if look.is_unicode else text.encode("ascii", "xmlcharrefreplace").decode()


def escaped(text: str) -> str:
    """Text from outside as Markdown that shows it and does nothing: no markup, no HTML, no mention."""
    return _SPECIAL.sub(r"\\\1", inert(text)).replace("@", "@\u2060")


def _finding(finding: Finding, diagnosis: Diagnosis | None) -> list[str]:
    lines = [f"### {finding.severity}: {escaped(finding.title)} ({finding.code})", "", escaped(finding.message), ""]
    explained = also_explains(finding, diagnosis)
    if explained:
        lines += [f"Also explains: {escaped(explained)}", ""]
    if finding.demoted_from is not None:
        lines += [f"Demoted from {finding.demoted_from}: {escaped(finding.demoted_by or '')}.", ""]
    if finding.cause:
        lines += [f"Cause: {escaped(finding.cause)}", ""]
    if finding.fix is not None and finding.severity != "info":
        lines += [f"{finding.fix.label}: {escaped(finding.fix.text)}", "", *_code(finding.fix.commands)]
    return lines


def _changes(report: Report) -> list[str]:
    if report.changes is None:
        return []
    since = escaped(report.changes.since)
    if not report.changes.changes:
        return [f"Nothing has changed since {since}.", ""]
    return [f"### Changed since {since}", "", *(f"- {escaped(change.text)}" for change in report.changes.changes), ""]


def _code(commands: tuple[str, ...]) -> list[str]:
    if not commands:
        return []
    shown = [inert(command) for command in commands]
    longest = max((len(run) for command in shown for run in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}console", *shown, fence, ""]


def _gpu_table(machine: Machine) -> list[str]:
    if not machine.gpus:
        return []
    rows = [
        f"| {gpu.index} | {escaped(gpu.name)} | {_size(gpu.memory_free_bytes)} | {_size(gpu.memory_total_bytes)} |"
        for gpu in machine.gpus
    ]
    return ["| GPU | name | free | total |", "| ---: | --- | ---: | ---: |", *rows, ""]


def _size(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else format_gib(size_bytes)
