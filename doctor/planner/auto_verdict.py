"""One sentence: why ``auto`` is worse than the plan, or equal."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..placement import AutoPlacement
from ..units import format_gib

_ERROR = "Expected all tensors to be on the same device"


def verdict(
    auto: AutoPlacement, *, plan_stages: Sequence[tuple[int, tuple[str, ...]]], plan_longest: int | None
) -> AutoPlacement:
    """Give a placement its sentence; what stops it counts before what it wastes."""
    sentence = _fault(auto) or _offload(auto, has_plan=plan_longest is not None) or _overflow(auto)
    if sentence is None:
        sentence = _compared(auto, plan_stages, plan_longest)
    return msgspec.structs.replace(auto, verdict=sentence)


def _fault(auto: AutoPlacement) -> str | None:
    failing = next((cut for cut in auto.cut_blocks if cut.fails), None)
    if failing:
        more = sum(cut.fails for cut in auto.cut_blocks) - 1
        others = f" (and {more} more)" if more else ""
        return f'auto cuts {failing.key}{others} between {" and ".join(failing.devices)}, which raises "{_ERROR}".'
    if auto.parted:
        return f'auto parts {" and ".join(auto.parted)} from the output they are joined with, which raises "{_ERROR}".'
    return None


def _offload(auto: AutoPlacement, *, has_plan: bool) -> str | None:
    places = [
        f"{format_gib(size)} {where}"
        for size, where in ((auto.cpu_bytes, "on the CPU"), (auto.disk_bytes, "on disk"))
        if size
    ]
    if not places:
        return None
    although = ", which slows every token, although the GPUs suffice" if has_plan else ", which slows every token"
    return f"auto leaves {' and '.join(places)}{although}."


def _overflow(auto: AutoPlacement) -> str | None:
    tightest = min(auto.shares, key=lambda share: share.left_bytes)
    if tightest.left_bytes >= 0:
        return None
    return f"auto lacks {format_gib(-tightest.left_bytes)} on GPU {tightest.gpu} for this prompt."


def _compared(auto: AutoPlacement, plan_stages: Sequence[tuple[int, tuple[str, ...]]], plan_longest: int | None) -> str:
    """Both work, or there is no plan."""
    used = [share for share in auto.shares if share.weights_bytes]
    longest = auto.longest_prompt_tokens
    if plan_longest is None or longest is None:
        return f"auto would put it on {_gpus(len(used))}."
    takes = f"auto takes a longest prompt of {longest:,} tokens on {_gpus(len(used))}; this plan {plan_longest:,}"
    if plan_longest > longest:
        return f"{takes} ({plan_longest / longest:.1f} x) on {len(plan_stages)}."
    if len(plan_stages) < len(used):
        return f"{takes} on {len(plan_stages)}, with {len(used) - len(plan_stages)} fewer to pass through for each token."
    return f"{takes}: no difference worth a map of your own."


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
