"""A plan as terminal text."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from ..machine import Libraries
from ..placement import Offload, Plan, Stage
from ..units import format_gib
from ..workload import Training
from .chain_text import write_auto, write_chain
from .key_runs import runs
from .ledger_text import write_bars, write_ledger, write_sources
from .page import Column, Page, Piece
from .to_python import snippet


def write_plan(page: Page, plan: Plan, *, gpu_count: int, code: str = "", verbose: bool = False) -> None:
    """Write the verdict, with the code that explains it, the memory of each GPU, and why the model is cut where it is."""
    page.ends([(verdict(plan, gpu_count), "bold green" if plan.fits else "bold red")], (code, "dim"))
    if plan.shortage is not None:
        page.text(plan.shortage.message)
    page.item(("Model", "dim"), plan.model, indent=2, marker_width=9)
    page.item(("Machine", "dim"), plan.machine, indent=2, marker_width=9)
    page.item(("Prompt", "dim"), _prompt(plan), indent=2, marker_width=9)
    page.item(("Loaded", "dim"), _loaded(plan), indent=2, marker_width=9)
    if plan.workload.training is not None:
        page.item(("Training", "dim"), _training(plan.workload.training), indent=2, marker_width=9)
    if plan.stages:
        page.gap()
        if not plan.fits:
            page.text(("The best split that was found:", "bold"))
        write_bars(page, plan.stages)
        page.gap()
        write_ledger(page, plan.stages)
        write_chain(page, plan)
        _write_keys(page, plan)
    _write_offload(page, plan.offloaded)
    _write_cuts(page, plan)
    _write_list(page, "Why", plan.reasons)
    _write_limits(page, plan)
    write_auto(page, plan.auto)
    _write_list(page, "Assumed", plan.notes)
    if verbose:
        page.gap()
        page.text(("Where the figures come from", "bold"))
        write_sources(page, plan.stages)


def verdict(plan: Plan, gpu_count: int) -> str:
    """``Fits on 1 of 2 GPUs: GPU 0.`` or ``Does not fit: 3.2 GiB missing.``."""
    if plan.fits:
        *first, last = [str(stage.gpu) for stage in plan.stages]
        used = f"GPUs {', '.join(first)} and {last}" if first else f"GPU {last}"
        return f"Fits on {len(plan.stages)} of {gpu_count} {'GPU' if gpu_count == 1 else 'GPUs'}: {used}."
    if plan.shortage is None or not plan.shortage.missing_bytes:
        return "Does not fit."
    when = "Does not fit" if plan.shortage.is_permanent else "Does not fit now, while other processes hold memory"
    return f"{when}: {format_gib(plan.shortage.missing_bytes)} missing."


def _prompt(plan: Plan) -> str:
    work = plan.workload
    parts = []
    if work.images:
        noun = "image" if work.images == 1 else "images"
        size = f" of {work.image_width} x {work.image_height}" if work.image_width and work.image_height else ""
        parts.append(f"{work.images} {noun}{size} ({plan.image_tokens:,} tokens)")
    parts.append(f"{work.text_tokens:,} text tokens")
    if work.makes_answer:
        parts.append(f"then {work.new_tokens:,} new tokens")
    parts.append(f"batch {work.batch}")
    return ", ".join(parts)


def _loaded(plan: Plan) -> str:
    work = plan.workload
    kind = {"int8": "8 bit (int8)", "nf4": "4 bit (nf4)", None: plan.dtype}[work.quantization]
    logits = "" if work.logits == "generate" else ", logits of every token"
    return f"{kind}, {work.attention} attention{logits}"


def _training(training: Training) -> str:
    method = "all weights" if training.method == "full" else f"LoRA adapters of rank {training.lora_rank}"
    kept = "gradient checkpointing" if training.gradient_checkpointing else "all activations kept"
    return f"{method}, {training.optimizer}, {kept}"


def _write_keys(page: Page, plan: Plan) -> None:
    if len(plan.stages) == 1:
        return
    page.gap()
    page.text(("Modules", "bold"))
    for stage in plan.stages:
        page.item(f"GPU {stage.gpu}", _keys(stage), indent=2)


def _keys(stage: Stage) -> str:
    return ", ".join(run.label for run in runs(stage.keys))


def _write_offload(page: Page, offloaded: Offload | None) -> None:
    if offloaded is None:
        return
    lines = [f"{format_gib(offloaded.weights_bytes)} of weights: {', '.join(run.label for run in runs(offloaded.keys))}"]
    if offloaded.host_left_bytes is not None:
        lines.append(f"{format_gib(offloaded.host_left_bytes)} of host memory left")
    _write_list(page, "In host memory", [*lines, offloaded.reason, offloaded.cost])


def _write_limits(page: Page, plan: Plan) -> None:
    """How far each quantity can grow while the others stay."""
    if not plan.fits or plan.longest_prompt_tokens is None:
        return
    page.gap()
    page.text(
        f"Longest prompt that fits this placement: {plan.longest_prompt_tokens:,} tokens; this one has "
        f"{plan.prompt_tokens:,}."
    )
    limits = plan.limits
    if limits is None:
        return
    others = [f"batch {limits.batch:,}"]
    if limits.new_tokens is not None:
        others.insert(0, f"{limits.new_tokens:,} new tokens")
    if limits.images:
        others.append(f"{limits.images:,} {'image' if limits.images == 1 else 'images'} in each prompt")
    if limits.image_edge is not None:
        edges = f"{limits.image_edge:,} x {limits.image_edge:,} pixels"
        asked = max(plan.workload.image_height or 0, plan.workload.image_width or 0)
        others.append(f"images of {edges}" if asked <= limits.image_edge else f"larger images, scaled down to {edges} too")
    page.text(f"Or, with the rest as asked: {_any(others)}.")


def _any(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])}, or {words[-1]}" if len(words) > 1 else words[0]


def _write_cuts(page: Page, plan: Plan) -> None:
    if not plan.cuts:
        return
    page.gap()
    page.text(("Cuts", "bold"))
    for cut, before, after in zip(plan.cuts, plan.stages, plan.stages[1:], strict=False):
        page.item("-", f"GPU {before.gpu} to GPU {after.gpu} over {cut.link}, after {cut.before}: {cut.reason}", indent=2)


def _write_list(page: Page, heading: str, lines: Iterable[str]) -> None:
    for number, line in enumerate(lines):
        if not number:
            page.gap()
            page.text((heading, "bold"))
        page.item("-", line, indent=2)


def write_levers(page: Page, plan: Plan) -> None:
    """Write what would make the model fit, or save memory: each change, what it saves, and whether it alone is enough."""
    levers = plan.shortage.levers if plan.shortage else plan.levers
    if not levers:
        return
    page.gap()
    page.text(("What would help", "bold"))
    columns = [Column("change", is_flexible=True), Column("saves", "right"), Column("fits then")]
    rows: list[list[Piece]] = [
        [lever.change, format_gib(lever.saves_bytes), ("yes", "bold green") if lever.fits else ("no", "dim")]
        for lever in levers
    ]
    page.table(columns, rows)


def write_gpu_sets(page: Page, plan: Plan) -> None:
    """Write which cards would do."""
    if not plan.gpu_sets:
        return
    page.gap()
    page.text(("Cards that would do", "bold"))
    columns = [Column("--machine"), Column("card", is_flexible=True), Column("memory", "right")]
    page.table(columns, [[found.spec, found.name, format_gib(found.total_bytes)] for found in plan.gpu_sets])


def write_snippet(page: Page, plan: Plan, libraries: Libraries | None, *, is_live: bool) -> None:
    """Write the code to paste."""
    page.gap()
    page.text(("Paste this", "bold"))
    page.gap()
    for line in snippet(plan, libraries, is_live=is_live).splitlines():
        page.verbatim(line, indent=0)


def write_suggestion(page: Page, plan: Plan, *, gpu_count: int, machine_option: str) -> None:
    """Write a plan in two lines, with the command that shows all of it."""
    page.gap()
    page.text((plan.model, "bold"), f": {verdict(plan, gpu_count)[0].lower()}{verdict(plan, gpu_count)[1:]}")
    for stage in plan.stages if plan.fits else ():
        page.item(
            f"GPU {stage.gpu}",
            f"{format_gib(stage.peak_bytes)} peak, {format_gib(stage.left_bytes)} left"
            + (f": {_keys(stage)}" if len(plan.stages) > 1 else ""),
            indent=2,
        )
    if not plan.fits and plan.shortage is not None:
        page.text(plan.shortage.message, indent=2)
    page.verbatim(f"vlm-doctor plan {shlex.quote(plan.model)}{machine_option}", indent=2, style="bold")
