"""What a run as a whole is held to: so many tests ran, and none that ran before is missing. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .. import verdicts
from ..wording import first, plural
from .evidence import Broken

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from ..models.loads import Load
    from .evidence import GatedRecord


def too_few_ran(tests: Mapping[str, GatedRecord], min_tests: int | None, origin: str) -> list[Broken]:
    """Hold a run to ``--vlm-min-tests``."""
    ran = sum(record.is_proof for record in tests.values())
    if min_tests is None or ran >= min_tests:
        return []
    others = Counter(_fate(record) for record in tests.values() if not record.is_proof)
    why = ", ".join(f"{count} {fate}" for fate, count in sorted(others.items()))
    rest = f": {why}" if why else "; no other one was collected"
    return [Broken(code=verdicts.TOO_FEW_RAN, message=f"{plural(ran, 'gated test')} ran, {origin}={min_tests}{rest}.")]


def did_not_run(tests: Mapping[str, GatedRecord], baseline: Collection[str] | None, name: str) -> list[Broken]:
    """Hold a run to ``--vlm-baseline``: each test listed must have run again."""
    listed = baseline or ()
    missing = [nodeid for nodeid in listed if nodeid not in tests or not tests[nodeid].is_proof]
    if not missing:
        return []
    told = first([f"{nodeid} {_what_became_of(tests.get(nodeid))}" for nodeid in missing])
    count = f"{len(missing)} of {plural(len(listed), 'test')} of {name} did not run again"
    return [Broken(code=verdicts.DID_NOT_RUN, message=f"{count}: {'; '.join(told)}.")]


def _what_became_of(record: GatedRecord | None) -> str:
    if record is None:
        return "was not collected as a gated test (gone, renamed, deselected, or its module skipped)"
    reason = (record.reason or "").rstrip(".")
    return f"{_was(record)} ({reason})" if reason else _was(record)


def _was(record: GatedRecord) -> str:
    if record.is_executed:
        return f"ran with {record.offloaded_gib:.1f} GiB of its model in host memory"
    return {"skipped": "was skipped", "error": "had an error", "not_run": "was not reached"}.get(
        record.outcome, "did not run"
    )


def _fate(record: GatedRecord) -> str:
    if record.is_executed:
        return "with part of its model in host memory"
    word = {"not_run": "not reached"}.get(record.outcome, record.outcome)
    return f"{word} ({record.code})" if record.code else word


def memory_stayed(loads: Iterable[Load], level: str, tolerance_bytes: int) -> list[Broken]:
    """Models that were unloaded and kept more than the tolerance in memory, where ``--vlm-leak-check=error`` is given."""
    from vlm_doctor.units import format_gib

    return [
        Broken(
            code=verdicts.LEFT_BY_MODEL,
            message=f"{format_gib(load.left_bytes)} of {load.model} are still held after it was unloaded"
            f"{', by ' if load.held_by else ''}{', '.join(load.held_by)}: delete that reference.",
        )
        for load in loads
        if level == "error" and load.left_bytes > tolerance_bytes
    ]
