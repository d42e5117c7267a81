"""What the checks answer: an outcome for every check, and findings with cause, evidence and fix."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""Worst first."""


class Fix(msgspec.Struct, frozen=True, kw_only=True):
    """What to do about a finding."""

    text: str
    """One sentence, imperative."""
    commands: tuple[str, ...] = ()
    """Ready to paste, in order."""
    who: Literal["you", "administrator"] = "you"
    place: Literal["here", "host"] = "here"
    """``host``: the commands belong on the computer that runs this container, not into it."""

    @property
    def label(self) -> str:
        """``Fix``, ``Fix (administrator)``, ``Fix (on the host)`` or ``Fix (administrator, on the host)``."""
        said = ["administrator"] * (self.who == "administrator") + ["on the host"] * (self.place == "host")
        return f"Fix ({', '.join(said)})" if said else "Fix"

    @property
    def request(self) -> str:
        """The text, and who is to do it and where."""
        where = "On the host: " if self.place == "host" else ""
        return f"{'Ask your administrator: ' if self.who == 'administrator' else ''}{where}{self.text}"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing a check found."""

    code: str
    """``VLM`` and three digits, fixed for ever; ``vlm-doctor explain CODE`` explains it."""
    severity: Severity
    title: str
    """The pattern in a few words, such as ``GPU memory held by other processes``."""
    message: str
    """One sentence with the numbers of this machine."""
    cause: str | None = None
    """Why it happens, in one sentence."""
    evidence: dict[str, str] = {}
    """Field path of the machine to the value seen there, such as ``gpus[0].memory_free_bytes``: ``12.0 GiB``."""
    fix: Fix | None = None
    gpus: tuple[int, ...] = ()
    """Indices of the GPUs it is about."""
    links: tuple[str, ...] = ()
    """Addresses to read more."""
    demoted_from: Severity | None = None
    """Severity before it was demoted to info; ``None`` when it was not."""
    demoted_by: str | None = None
    """Why: the option that did it, such as ``--ignore VLM503``, or that it is about a GPU that is not asked for."""

    def demoted(self, reason: str) -> Finding:
        """This finding as an info that says why it is one; an info stays as it is."""
        if self.severity == "info":
            return self
        return msgspec.structs.replace(self, severity="info", demoted_from=self.severity, demoted_by=reason)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one check. Every registered check has one in every report."""

    code: str
    title: str
    state: Literal["passed", "found", "skipped", "unknown", "crashed"]
    """``skipped``: does not apply here; ``unknown``: the facts it needs could not be read; ``crashed``: the check itself
    failed, which is a defect of the doctor. Unknown is never folded into passed or found."""
    reason: str | None = None
    symptom_of: str | None = None
    """Code of the cause that explains what this check, too, would have found; it is then ``skipped``, or ``found`` where
    it found something else besides."""
    findings: tuple[Finding, ...] = ()


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """Outcomes of all checks, in the order of their codes."""

    outcomes: tuple[Outcome, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, worst first, then by code."""
        found = [finding for outcome in self.outcomes for finding in outcome.findings]
        return tuple(sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), finding.code)))

    def symptoms(self, code: str) -> tuple[Outcome, ...]:
        """What a cause also explains: outcomes of the checks that see the same trouble."""
        return tuple(outcome for outcome in self.outcomes if outcome.symptom_of == code)

    def count(self, severity: Severity) -> int:
        """How many findings have this severity."""
        return sum(finding.severity == severity for finding in self.findings)
