"""From pytest's reports of gated tests to one record each. It sees only what reaches the controller of pytest-xdist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ..verdicts import OWN_SKIP
from .evidence import GatedRecord
from .reporting import PHASES, PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from .evidence import Outcome

_REASON_LENGTH = 1000
"""Characters of a reason that are kept: it is a sentence, and a traceback of the test's own is elsewhere."""


_NUMBERS = ("need_gib", "peak_gib", "offloaded_gib", "wait_s")
"""Properties of a report that are fields of the record."""


class Recorder:
    """One record for each gated test, in the order in which they were met."""

    def __init__(self) -> None:
        self.tests: dict[str, GatedRecord] = {}
        self._crashed: dict[str, pytest.TestReport] = {}
        """Tests whose worker died before it could say anything of them, gated or not."""
        self._failed_within: set[str] = set()
        """Tests of which a subtest has failed in this attempt."""

    def expect(self, nodeids: Iterable[str]) -> None:
        """Note tests that were collected: they are listed even if the run ends before them."""
        for nodeid in nodeids:
            self.tests.setdefault(nodeid, GatedRecord(nodeid=nodeid))
            crash = self._crashed.pop(nodeid, None)
            if crash is not None and not self.tests[nodeid].attempts:
                self.tests[nodeid] = _in_phase(GatedRecord(nodeid=nodeid, attempts=1), crash)

    def add(self, report: pytest.TestReport) -> None:
        """Take over one phase of a test; a test that is not gated is ignored."""
        if _is_of_subtest(report) and report.outcome != "failed":
            return  # what became of the test is in its own report, which comes next
        found = {name: value for name, value in report.user_properties if name.startswith(PREFIX)}
        known = self.tests.get(report.nodeid)
        if not found and (known is None or known.attempts == 0):
            if report.when not in PHASES:
                self._crashed[report.nodeid] = report
                self.expect([report.nodeid] if known is not None else ())
            return
        record = known or GatedRecord(nodeid=report.nodeid)
        if report.when == "setup":
            record = GatedRecord(nodeid=report.nodeid, attempts=record.attempts + 1)
            self._failed_within.discard(report.nodeid)
        has_failed = report.nodeid in self._failed_within
        self.tests[report.nodeid] = _in_phase(_with_properties(record, found), report, has_failed_within=has_failed)
        if _is_of_subtest(report):
            self._failed_within.add(report.nodeid)


def _with_properties(record: GatedRecord, found: dict[str, Any]) -> GatedRecord:
    """What our properties say; those of other helpers of the plugin may come with a later phase."""
    texts = {name: found.get(f"{PREFIX}{name}", getattr(record, name)) for name in ("verdict", "code", "model")}
    numbers = {name: found.get(f"{PREFIX}{name}", getattr(record, name)) for name in _NUMBERS}
    uuids = found.get(f"{PREFIX}gpus")
    gpus = tuple(str(uuids).split(",")) if uuids else record.gpus
    values: dict[str, Any] = {**texts, **{name: _number(value) for name, value in numbers.items()}, "gpus": gpus}
    return replace(record, **values)


def _in_phase(record: GatedRecord, report: pytest.TestReport, *, has_failed_within: bool = False) -> GatedRecord:
    path, line, _ = report.location
    outcome = _outcome(record, report)
    has_failed = has_failed_within and report.when == "call"
    if has_failed and not hasattr(report, "wasxfail"):
        outcome = "failed"  # of unittest's subtests, the test itself passes
    # A subtest that failed has said why.
    reason = reason_of(report) if outcome not in ("passed", "xpassed") and not has_failed else None
    return replace(
        record,
        file=path,
        line=line + 1 if line is not None else None,
        outcome=outcome,
        is_executed=record.is_executed or (report.when == "call" and outcome != "skipped" and record.code != OWN_SKIP),
        # A teardown that passes says nothing about why the test failed.
        reason=reason or record.reason,
        # The test's own report counts the time of its subtests.
        duration_s=round(record.duration_s + (0.0 if _is_of_subtest(report) else max(0.0, report.duration)), 3),
        worker=getattr(report, "worker_id", None) or record.worker,
    )


def _outcome(record: GatedRecord, report: pytest.TestReport) -> Outcome:
    """``rerun`` (pytest-rerunfailures) counts as failed until the next attempt begins."""
    is_expected_to_fail = hasattr(report, "wasxfail")
    if report.when == "teardown":
        return "error" if report.outcome == "failed" else record.outcome
    if report.outcome == "passed":
        if report.when == "setup":
            return record.outcome
        return "xpassed" if is_expected_to_fail else "passed"
    if report.outcome == "skipped":
        return "xfailed" if is_expected_to_fail else "skipped"
    return "error" if report.when == "setup" else "failed"


def _is_of_subtest(report: pytest.TestReport) -> bool:
    """True for what pytest 9 or pytest-subtests says of one subtest, as part of the call of its test."""
    return hasattr(report, "context")


def reason_of(report: pytest.TestReport) -> str | None:
    """Why a phase did not pass, in the words of its end: a skip's reason, or what was raised."""
    longrepr = report.longrepr
    if not longrepr:
        return None
    if isinstance(longrepr, tuple):
        text = str(longrepr[2]).removeprefix("Skipped: ")
    else:
        crash = getattr(longrepr, "reprcrash", None)
        text = str(crash.message if crash is not None else longrepr).removeprefix("Failed: ")
    return text.strip()[:_REASON_LENGTH] or None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
