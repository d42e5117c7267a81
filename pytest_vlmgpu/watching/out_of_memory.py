"""A test ran out of GPU memory: what was planned beside what is there, GPU by GPU, in place of a bare traceback.

Pure: what torch, the driver and other processes say comes in as data.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from vlm_doctor.units import format_gib

from ..verdicts import OUT_OF_MEMORY_IN_TEST

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlm_doctor.machine import GpuProcess
    from vlm_doctor.placement import Limits, Plan, Stage

    from .meter import Allocator

_SIGNS = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""In messages of errors that are not torch's own class: of CUDA itself and its libraries, and of libraries that wrap it."""
_REQUEST = re.compile(r"Tried to allocate ([0-9.]+ [KMGT]?i?B)")
_ORDINAL = re.compile(r"GPU ([0-9]+) has a total capacity")
_LARGER = 1.02
"""From here on a peak is larger than planned: predictions are within 1 percent of it (benchmarks/README.md)."""
_GAPS = 0.1
"""Share of the segments from which gaps are worth a word: the planner's own allowance is below."""
_SHOWN_PROCESSES = 5


class GpuFacts(NamedTuple):
    """One GPU of the test when memory ran out."""

    ordinal: int
    stage: Stage | None
    """What was planned; ``None`` where the model was not placed here."""
    allocator: Allocator | None
    """What torch says; ``None`` where it cannot be asked."""
    weights_bytes: int
    """Of the model's tensors that are really there."""
    processes: tuple[GpuProcess, ...]
    """Of others than this process."""


def find(error: BaseException | None) -> tuple[BaseException, bool] | None:
    """The out-of-memory error in an exception, and whether it is the reason of it.

    Returns:
        ``None`` without one. True when it was raised as it is, or wrapped (``raise ... from``, exception groups); False
        when something else was raised while it was handled.
    """
    for found, is_reason in _chain(error, is_reason=True, seen=set()):
        name = type(found).__name__
        if name == "OutOfMemoryError" or (isinstance(found, RuntimeError) and any(sign in str(found) for sign in _SIGNS)):
            return found, is_reason
    return None


def headline(error: BaseException, plan: Plan | None, gpus: Sequence[GpuFacts]) -> str:
    """The failure in a sentence, with the one cause that the figures show."""
    text = str(error)
    request, ordinal = _REQUEST.search(text), _ORDINAL.search(text)
    tried = f", when it asked for {request[1]} more" if request else ""
    where = f" on cuda:{ordinal[1]}" if ordinal else ""
    return f"{OUT_OF_MEMORY_IN_TEST}: out of GPU memory{where} in the test{tried}: {_cause(plan, gpus)}"


def describe(plan: Plan | None, gpus: Sequence[GpuFacts]) -> str:
    """The ledger: planned beside found for each GPU, others' processes, the allocator's figures, and what to do."""
    blocks = ["\n".join(_gpu_lines(facts)) for facts in gpus]
    if not blocks:
        blocks = ["Nothing is known of the GPUs: torch cannot be asked, and the model was not placed by a plan."]
    blocks.append("\n".join(["what to do:", *(f"  - {line}" for line in _advice(plan, gpus))]))
    return "\n\n".join(blocks)


def _chain(error: BaseException | None, *, is_reason: bool, seen: set[int]) -> Iterator[tuple[BaseException, bool]]:
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error, is_reason
        for inner in getattr(error, "exceptions", ()):
            yield from _chain(inner, is_reason=is_reason, seen=seen)
        if error.__cause__ is None:
            is_reason = False
        error = error.__cause__ or error.__context__


def _planned(stage: Stage | None, *kinds: str) -> int | None:
    if stage is None:
        return None
    return sum(line.size_bytes for line in stage.ledger if line.kind in kinds)


def _gpu_lines(facts: GpuFacts) -> Iterator[str]:
    stage, found = facts.stage, facts.allocator
    name = f"GPU {stage.gpu} ({stage.name}), cuda:{facts.ordinal}" if stage else f"cuda:{facts.ordinal}"
    yield f"{name:<44}{'planned':>12}{'found':>12}"
    others = sum(process.used_bytes or 0 for process in facts.processes) if facts.processes else None
    own = found.total - found.free - found.reserved - (others or 0) if found else None
    rows: list[tuple[str, int | None, int | None]] = [
        ("other processes", _planned(stage, "others"), others if others is not None else (0 if found else None)),
        ("driver, CUDA context, libraries", _planned(stage, "driver", "context"), own),
        ("weights", _planned(stage, "weights"), facts.weights_bytes or None),
        (
            "KV cache, activations, workspace",
            _planned(stage, "kv_cache", "activations", "workspace", "training"),
            max(0, found.allocated - facts.weights_bytes) if found else None,
        ),
        (
            "gaps in the allocator's segments",
            _planned(stage, "fragmentation"),
            found.reserved - found.allocated if found else None,
        ),
        ("headroom and what is left: free", _planned(stage, "headroom", "left"), found.free if found else None),
        ("in all", stage.total_bytes if stage else None, found.total if found else None),
    ]
    for label, planned, actual in rows:
        yield f"  {label:<42}{_cell(planned):>12}{_cell(actual):>12}"
    if found is not None:
        yield (
            f"  torch: {format_gib(found.allocated)} in tensors now, {format_gib(found.peak)} at most; "
            f"{format_gib(found.reserved)} in {found.segments} segments, {format_gib(found.split)} of it in blocks that "
            f"nobody uses; {found.retries} retries"
        )
    for process in sorted(facts.processes, key=lambda process: -(process.used_bytes or 0))[:_SHOWN_PROCESSES]:
        size = format_gib(process.used_bytes) if process.used_bytes is not None else "an unknown amount"
        owner = f"{process.user or 'user not visible'}, {process.command or 'command not visible'}"
        yield f"  pid {process.pid} ({owner}): {size}"


def _cell(size: int | None) -> str:
    return "-" if size is None else format_gib(size)


def _is_larger_than_planned(gpus: Sequence[GpuFacts]) -> bool:
    return any(
        facts.stage is not None and facts.allocator is not None and facts.allocator.peak > _LARGER * facts.stage.peak_bytes
        for facts in gpus
    )


def _taken_by_others(gpus: Sequence[GpuFacts]) -> int:
    """Bytes that other processes hold beyond what the plan knew of."""
    more = 0
    for facts in gpus:
        planned = _planned(facts.stage, "others")
        if planned is not None:
            more = max(more, sum(process.used_bytes or 0 for process in facts.processes) - planned)
    return more


def _has_gaps(gpus: Sequence[GpuFacts]) -> bool:
    found = [facts.allocator for facts in gpus if facts.allocator is not None]
    return any(one.reserved - one.allocated > _GAPS * one.reserved for one in found)


def _cause(plan: Plan | None, gpus: Sequence[GpuFacts]) -> str:
    if _taken_by_others(gpus) > 0:
        return f"other processes hold {format_gib(_taken_by_others(gpus))} more than when the model was placed."
    if _is_larger_than_planned(gpus):
        return "its tensors took more than was planned for; plan for calls of this size with the fixture vlm_workload."
    if _has_gaps(gpus):
        return "memory is there, but in pieces too small."
    if plan is None:
        return "the model was not placed by a plan, so nothing was compared."
    return "see what was planned beside what is there."


def _advice(plan: Plan | None, gpus: Sequence[GpuFacts]) -> Iterator[str]:
    if _taken_by_others(gpus) > 0:
        yield "wait for the processes above, or end those that are yours; then run again."
    if plan is not None:
        work = plan.workload
        images = f"{work.images} image{'' if work.images == 1 else 's'}"
        answer = f", {work.new_tokens} new tokens" if work.makes_answer else ""
        yield (
            f"the model was placed for calls of up to {plan.prompt_tokens} prompt tokens ({images}){answer}, "
            f"batch {work.batch}: if this call is larger, override the fixture vlm_workload, so that the plan "
            "leaves room for it or says that it cannot."
        )
        if plan.limits is not None:
            yield _limits(plan.limits)
        wider = (
            f"spread the model wider: @pytest.mark.vlm_requires(gpus={len(plan.stages) + 1}), or use --vlm-gpus with more."
        )
        yield wider
    yield "make the call smaller: smaller or fewer images, a shorter prompt, fewer new tokens, a smaller batch."
    yield "call model(...) under torch.inference_mode(): with gradients every activation is kept (vlm.generate does so)."
    if _has_gaps(gpus):
        yield "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which leaves fewer gaps."


def _limits(limits: Limits) -> str:
    parts = [f"prompts of {limits.prompt_tokens} tokens", f"a batch of {limits.batch}"]
    if limits.images is not None:
        parts.append(f"{limits.images} images in a prompt")
    if limits.image_edge is not None:
        parts.append(f"images of {limits.image_edge} pixels")
    return f"changing one thing at a time, this placement can take {', '.join(parts)}."
