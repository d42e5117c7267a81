"""The lines that a run prints about its gated tests."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..wording import first, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..models.loads import Load
    from .evidence import GatedRecord

_WORTH_TELLING_S = 0.1


def counts(tests: Mapping[str, GatedRecord]) -> str:
    """``3 ran; 1 skipped (VLM702 too few GPUs: 1)``."""
    from vlm_doctor.codes import all_codes

    titles = all_codes()
    fates = Counter((_fate(record), record.code or "") for record in tests.values())
    parts = []
    for fate in ("ran", "skipped", "error", "not reached"):
        codes = {code: count for (of, code), count in sorted(fates.items()) if of == fate}
        if codes:
            # A code that the test's own end made says nothing about why it ran.
            reasons = [f"{_title(code, titles)}: {number}" for code, number in codes.items() if code and fate != "ran"]
            why = f" ({', '.join(reasons)})" if reasons else ""
            count = sum(codes.values())
            parts.append(f"{plural(count, fate) if fate == 'error' else f'{count} {fate}'}{why}")
    waited = sum(record.wait_s or 0.0 for record in tests.values())
    return "; ".join([*parts, f"waited {waited:.1f} s"] if waited else parts)


def _fate(record: GatedRecord) -> str:
    if record.is_executed:
        return "ran"
    words = {"skipped": "skipped", "xfailed": "skipped", "not_run": "not reached"}
    return words.get(record.outcome, "error")


def _title(code: str, titles: Mapping[str, str]) -> str:
    """``VLM702 too few GPUs``; a code of the project's own (by the hook) alone."""
    return f"{code} {titles[code].rpartition(': ')[2]}" if code in titles else code


def offloaded_lines(tests: Mapping[str, GatedRecord]) -> list[str]:
    """Tests that ran with part of their model in host memory; none in most runs."""
    found = [
        f"{nodeid}: {record.offloaded_gib:.1f} GiB of {record.model}"
        for nodeid, record in tests.items()
        if record.is_executed and record.offloaded_gib
    ]
    if not found:
        return []
    named = [f"  {line}" for line in first(found)]
    head = f"{plural(len(found), 'test').upper()} RAN WITH PART OF THE MODEL OFF THE GPUS"
    return [f"{head} (--vlm-allow-offload): slow, and no proof of what GPUs do.", *named]


def load_line(load: Load, tests: int) -> str:
    """One load: where, how long, what was predicted beside what was measured, and how many tests it served."""
    from vlm_doctor.units import format_gib

    line = f"{load.model}: loaded in {load.seconds:.1f} s on {load.where}"
    if load.attached_age_s is not None:
        from ..warm.run import duration

        line = (
            f"{load.model}: attached in {load.seconds:.1f} s to a model loaded {duration(load.attached_age_s)} ago on "
            f"{load.where}"
        )
        # A tiny model is loaded as quickly as it is attached to.
        line += f", which saved {load.saved_seconds:.1f} s" if load.saved_seconds >= _WORTH_TELLING_S else ""
    elif load.warm:
        line += f" ({load.warm})"
    if load.weights_bytes:
        line += f", {format_gib(load.weights_bytes)} of weights, peak {format_gib(load.predicted_peak_bytes)} predicted"
    if load.offloaded_bytes:
        line += f"; {format_gib(load.offloaded_bytes)} of it in host memory"
    if load.measured_peak_bytes:
        line += f", {format_gib(load.measured_peak_bytes)} measured"
    if load.left_bytes:
        by = f" by {', '.join(load.held_by)}" if load.held_by else ""
        line += f"; {format_gib(load.left_bytes)} still held{by} after it was unloaded"
    elif load.missing_bytes:
        line += f"; {format_gib(load.missing_bytes)} of GPU memory did not come back after it was unloaded"
    # One that a test asks for at run time has no test of its own.
    return f"{line}; {plural(tests, 'test')}" if tests else line
