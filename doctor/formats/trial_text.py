"""What came of a trial as terminal text: the verdict, planned beside measured, the cause of a failure, ``auto`` beside."""

from __future__ import annotations

from collections.abc import Sequence

from ..findings import Finding
from ..machine import Machine
from ..placement import Plan
from ..trial import Attempt, Trial
from ..units import format_gib
from .finding_text import write_findings
from .ledger_text import write_ledger
from .page import Column, Page, Piece

OUT_OF_MEMORY = "VLM010"
_WHOSE = {"plan": "the plan", "auto": 'device_map="auto"', "cpu": "the CPU"}
_DECODED_CHARS = 200


def write_trial(page: Page, trial: Trial, plan: Plan | None, machine: Machine, *, verbose: bool = False) -> None:
    """Write a whole trial.

    Args:
        page: Where to.
        trial: What came of it.
        plan: What was followed; ``None`` on the CPU.
        machine: Where it was.
        verbose: Also the tokens as text, and tracebacks.
    """
    # A failure is told by its finding, with its code and what to do.
    if trial.findings and not trial.is_good:
        page.text((f"Failed: {_headline(trial)}", "bold red"))
    else:
        page.text((trial.sentence, "bold green" if trial.is_good else "bold red"))
    page.item(("Model", "dim"), trial.model, indent=2, marker_width=9)
    page.item(("Machine", "dim"), machine.description, indent=2, marker_width=9)
    first = trial.attempts[0] if trial.attempts else None
    if first is not None:
        page.item(("Loaded by", "dim"), _loaded_by(first, plan), indent=2, marker_width=9)
        page.item(("With", "dim"), _libraries(first), indent=2, marker_width=9)
    write_findings(page, trial.findings, verbose=verbose)
    if first is not None and first.route != "auto":
        _write_peaks(page, first)
        _write_checks(page, first)
    if plan is not None and any(_is_out_of_memory(attempt) for attempt in trial.attempts if attempt.route == "plan"):
        page.gap()
        page.text(("What was planned", "bold"))
        write_ledger(page, plan.stages)
    _write_beside(page, trial.attempts, plan)
    for attempt in trial.attempts:
        _write_details(page, attempt, verbose=verbose)


def _headline(trial: Trial) -> str:
    errors = [finding for finding in trial.findings if finding.severity == "error"]
    return _titles(errors)


def _titles(findings: Sequence[Finding]) -> str:
    return ", ".join(dict.fromkeys(finding.title for finding in findings)) + "."


def _loaded_by(attempt: Attempt, plan: Plan | None) -> str:
    if attempt.route != "plan" or plan is None:
        return _WHOSE[attempt.route]
    where = " and ".join(f"GPU {stage.gpu}" for stage in plan.stages)
    return f"{_WHOSE['plan']}, on {where}{' and the CPU' if plan.offloaded is not None else ''}"


def _libraries(attempt: Attempt) -> str:
    names = [f"{name} {version}" for name in ("torch", "transformers") if (version := getattr(attempt, name))]
    return ", ".join([*names, *([attempt.class_name] if attempt.class_name else [])]) or "not known: it did not come so far"


def _write_peaks(page: Page, attempt: Attempt) -> None:
    """Predicted beside measured, GPU by GPU; on the CPU the process as a whole."""
    page.gap()
    if not attempt.peaks:
        if attempt.host_peak_bytes is not None:
            page.text(f"Most memory of the process on the host: {format_gib(attempt.host_peak_bytes)}.")
        return
    columns = [Column("peak"), *(Column(heading, "right") for heading in _PEAK_HEADINGS)]
    rows: list[list[Piece]] = [
        [
            f"GPU {peak.gpu}",
            _size(attempt.held_bytes.get(peak.device)),
            _size(peak.planned_allocated_bytes),
            _size(peak.allocated_bytes),
            _size(peak.planned_reserved_bytes),
            _size(peak.reserved_bytes),
            _size(peak.free_bytes),
        ]
        for peak in attempt.peaks
    ]
    page.table(columns, rows)


_PEAK_HEADINGS = ("weights", "tensors plan", "took", "segments plan", "took", "then free")
"""Parameters and buffers; torch's peaks of tensors and of segments, planned and measured; what the driver had left."""


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_gib(size_bytes)


def _write_checks(page: Page, attempt: Attempt) -> None:
    """What was held against the plan."""
    page.gap()
    if attempt.is_loaded:
        planned = "as planned" if attempt.route == "plan" else "on the CPU"
        elsewhere = f"{attempt.astray_count} elsewhere than planned" if attempt.astray_count else f"all {planned}"
        page.item("Tensors:", elsewhere)
        random = f"{attempt.missing_count} missing" if attempt.missing_count else "all in the checkpoint"
        page.item("Weights:", random)
    if attempt.is_finite is not None:
        finite = "finite" if attempt.is_finite else "NaN or infinity"
        again = "the same tokens when asked again" if attempt.is_repeatable else "other tokens when asked again"
        page.item("Logits:", f"{finite}; {again}")


def _is_out_of_memory(attempt: Attempt) -> bool:
    return attempt.error is not None and attempt.error.cause is not None and attempt.error.cause.code == OUT_OF_MEMORY


def _write_beside(page: Page, attempts: Sequence[Attempt], plan: Plan | None) -> None:
    """The plan and ``auto``, question by question."""
    if not any(attempt.route == "auto" for attempt in attempts):
        return
    page.gap()
    columns = [Column(""), *(Column(_WHOSE[attempt.route], is_flexible=True) for attempt in attempts)]
    rows: list[list[Piece]] = [
        ["loads", *(_loads(attempt) for attempt in attempts)],
        ["blocks cut", *(_cut(attempt) for attempt in attempts)],
        ["off the GPUs", *(_size(attempt.offloaded_bytes) if attempt.is_loaded else "-" for attempt in attempts)],
        ["answers", *(_answers(attempt) for attempt in attempts)],
    ]
    for device in dict.fromkeys(peak.device for attempt in attempts for peak in attempt.peaks):
        rows.append([f"peak, {device}", *(_peak(attempt, device) for attempt in attempts)])
    if plan is not None:
        longest = {"plan": plan.longest_prompt_tokens, "auto": plan.auto.longest_prompt_tokens if plan.auto else None}
        edge = {"plan": plan.limits.image_edge if plan.limits else None}
        rows += [
            ["longest prompt*", *(_tokens(longest.get(attempt.route)) for attempt in attempts)],
            ["largest image*", *(_pixels(edge.get(attempt.route)) for attempt in attempts)],
        ]
    page.table(columns, rows)
    if plan is not None:
        page.text(("  * predicted, not tried", "dim"))


def _loads(attempt: Attempt) -> str:
    return f"yes, {attempt.load_seconds or 0:.1f} s" if attempt.is_loaded else f"no: {_inside(attempt)}"


def _cut(attempt: Attempt) -> str:
    if not attempt.is_loaded:
        return "-"
    named = [f"{block.key} ({', '.join(block.devices)})" for block in attempt.cut_blocks]
    more = attempt.cut_count - len(named)
    return ", ".join([*named, *([f"{more} more"] if more else [])]) or "none"


def _answers(attempt: Attempt) -> Piece:
    if not attempt.is_loaded:
        return "-"
    if attempt.state != "ran":
        return (f"no: {_inside(attempt)}", "bold red")
    nonsense = "" if attempt.is_finite else ", not finite"
    return f"yes, {attempt.new_tokens or 0} tokens in {attempt.call_seconds or 0:.1f} s{nonsense}"


def _inside(attempt: Attempt) -> str:
    """Its sentence inside another."""
    return f"{attempt.sentence[:1].lower()}{attempt.sentence[1:]}"


def _peak(attempt: Attempt, device: str) -> str:
    peak = next((peak for peak in attempt.peaks if peak.device == device), None)
    return "-" if peak is None else f"{format_gib(peak.reserved_bytes)} (GPU {peak.gpu})"


def _tokens(number: int | None) -> str:
    return "-" if number is None else f"{number:,} tokens"


def _pixels(edge: int | None) -> str:
    return "-" if edge is None else f"{edge:,} x {edge:,}"


def _write_details(page: Page, attempt: Attempt, *, verbose: bool) -> None:
    for note in attempt.notes:
        page.gap()
        page.text(f"With {_WHOSE[attempt.route]}: {note}")
    if not verbose:
        return
    if attempt.text:
        page.gap()
        page.item("Answer:", attempt.text[:_DECODED_CHARS])
    if attempt.traceback is not None:
        page.gap()
        page.text((f"Traceback with {_WHOSE[attempt.route]}", "bold"))
        for line in attempt.traceback.splitlines():
            page.verbatim(line, indent=2)
