"""What commands answer besides findings: what changed since a saved report, whether a gate is met, what an error means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from .findings import SEVERITIES, Finding, Fix, Severity

News = Literal["new", "unchanged", "updated", "absent"]
"""What became of a finding since a report was saved, in the words of SARIF's ``baselineState``."""
ChangeKind = Literal["finding", "gpu", "link", "memory", "library", "driver", "environment", "host"]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One difference between then and now."""

    kind: ChangeKind
    subject: str
    """What changed, such as ``driver``, ``torch`` or ``GPU 3 (NVIDIA H100)``."""
    before: str | None = None
    """``None`` when it was not there."""
    after: str | None = None
    """``None`` when it is gone."""

    @property
    def text(self) -> str:
        """``driver: 580.65.06 → 590.48.01``."""
        if self.before is None:
            return f"{self.subject}: {self.after} (new)"
        if self.after is None:
            return f"{self.subject}: {self.before} (gone)"
        return f"{self.subject}: {self.before} → {self.after}"


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What is different since a report was saved, most telling first."""

    where: str
    """File that was compared with."""
    saved_at: str | None = None
    """ISO 8601, UTC; ``None`` when the file does not say."""
    saved_exit_status: int | None = None
    """Of the saved report; ``None`` for a bare snapshot of a machine."""
    changes: tuple[Change, ...] = ()
    findings_before: dict[str, Severity] | None = None
    """Code to its worst severity then; ``None`` where the file does not tell."""

    @property
    def since(self) -> str:
        """When the report was saved, or which file it is."""
        return self.saved_at or self.where

    def news(self, findings: Iterable[Finding]) -> dict[str, News]:
        """Code to what became of it: of the findings of now, and of those that are gone; empty where nothing is known."""
        if self.findings_before is None:
            return {}
        now = worst_by_code(findings)
        return {
            code: "absent"
            if code not in now
            else "new"
            if code not in self.findings_before
            else "unchanged"
            if now[code] == self.findings_before[code]
            else "updated"
            for code in sorted({*now, *self.findings_before})
        }


def worst_by_code(findings: Iterable[Finding]) -> dict[str, Severity]:
    """Code to the worst severity that a finding of it has, before anybody demoted it."""
    worst: dict[str, Severity] = {}
    for finding in findings:
        severity = finding.demoted_from or finding.severity
        if finding.code not in worst or SEVERITIES.index(severity) < SEVERITIES.index(worst[finding.code]):
            worst[finding.code] = severity
    return worst


class Unmet(msgspec.Struct, frozen=True, kw_only=True):
    """One expectation that a machine does not meet."""

    code: str
    text: str
    """One phrase with the numbers."""


class GateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a machine is what a job expects."""

    is_met: bool
    reason: str
    """One line, with the codes of what is not met."""
    expected: dict[str, str] = {}
    """Expectation to its value, such as ``vram``: ``20.0 GiB``."""
    gpus: tuple[int, ...] = ()
    """GPU indices that meet the expectations, best joined ones first; empty when the gate is not met."""
    cuda_visible_devices: str = ""
    """UUIDs of these GPUs."""
    model: str | None = None
    device_map: dict[str, int | str] | None = None
    """Of ``model`` on these GPUs, counted as CUDA counts them under ``cuda_visible_devices``."""
    unmet: tuple[Unmet, ...] = ()


class SeenText(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a log that is recognized."""

    name: str
    """Of the known text, such as ``driver-too-old``."""
    code: str
    line: int
    """Counted from 1; of a log with ``skipped_bytes``, among the lines that were looked at."""
    text: str
    """The line without prefixes, shortened."""


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a log or traceback says, and whether this machine agrees."""

    where: str
    """File, or ``standard input``."""
    is_recognized: bool
    cause: SeenText | None = None
    """The one that explains the others."""
    explanation: str | None = None
    """One sentence: what happened."""
    facts: dict[str, str] = {}
    """What the text itself tells, such as ``tried to allocate``: ``2.0 GiB``."""
    checks: tuple[str, ...] = ()
    """Codes of the checks that see the same trouble on a machine."""
    confirmation: Literal["confirmed", "not_seen", "unknown", "no_check"] = "no_check"
    """``confirmed``: a check finds the same here; ``not_seen``: the checks that could see it find nothing; ``unknown``:
    they could not tell; ``no_check``: no check can see this kind of error."""
    confirmed_by: tuple[Finding, ...] = ()
    fix: Fix | None = None
    verify: str | None = None
    """Command that shows whether it helped."""
    source: str | None = None
    """Where this text is explained."""
    also: tuple[SeenText, ...] = ()
    """Other texts that are recognized; the cause explains them, or they come after it."""
    last_error: str | None = None
    """The exception that the text ends with, when nothing is recognized."""
    skipped_bytes: int = 0
    """Bytes of a huge input that were not looked at."""
