"""One sentence: why ``auto`` is worse than the plan, or equal."""

from __future__ import annotations

import msgspec

from ..placement import AutoPlacement
from ..units import format_gib

CLEARLY = 1.05
"""From which factor on a longer prompt is more than the uncertainty of ``auto``'s."""
_ERROR = "Expected all tensors to be on the same device"


def compared(auto: AutoPlacement, *, plan_gpus: int, plan_longest: int | None, offloads: bool) -> AutoPlacement:
    """Give a placement its sentence; what stops it counts before what it wastes.

    Args:
        auto: The placement.
        plan_gpus: GPUs that the plan uses.
        plan_longest: Longest prompt that the plan takes; ``None`` when nothing fits.
        offloads: The plan itself keeps layers in host memory.
    """
    suffice = plan_longest is not None and not offloads
    sentence = _fault(auto) or _shortage(auto, suffice=suffice)
    return msgspec.structs.replace(auto, verdict=sentence or _side_by_side(auto, plan_gpus, plan_longest))


def _fault(auto: AutoPlacement) -> str | None:
    failing = next((cut for cut in auto.cut_blocks if cut.fails), None)
    if failing:
        more = sum(cut.fails for cut in auto.cut_blocks) - 1
        others = f" (and {more} more)" if more else ""
        return f'auto cuts {failing.key}{others} between {" and ".join(failing.devices)}, which raises "{_ERROR}".'
    if auto.parted:
        return f'auto parts {" and ".join(auto.parted)} from the output they are joined with, which raises "{_ERROR}".'
    return None


def _shortage(auto: AutoPlacement, *, suffice: bool) -> str | None:
    """A GPU that overflows, weights that are elsewhere, or both."""
    told = []
    tightest = min(auto.shares, key=lambda share: share.left_bytes)
    if tightest.left_bytes < 0:
        told.append(f"lacks {format_gib(-tightest.left_bytes)} on GPU {tightest.gpu} for this prompt")
    sizes = ((auto.cpu_bytes, "on the CPU"), (auto.disk_bytes, "on disk"))
    places = [f"{format_gib(size)} {where}" for size, where in sizes if size]
    if places:
        told.append(f"leaves {' and '.join(places)}, which slows every token{', although the GPUs suffice' * suffice}")
    return f"auto {' and '.join(told)}." if told else None


def _side_by_side(auto: AutoPlacement, plan_gpus: int, plan_longest: int | None) -> str:
    """Both work, or there is no plan."""
    used = sum(bool(share.weights_bytes) for share in auto.shares)
    longest = auto.longest_prompt_tokens
    if plan_longest is None or longest is None:
        return f"auto would put it on {_gpus(used)}."
    takes = f"auto takes a longest prompt of about {longest:,} tokens on {_gpus(used)}; this plan {plan_longest:,} on"
    if plan_longest > CLEARLY * longest:
        return f"{takes} {plan_gpus} ({plan_longest / longest:.1f} x)."
    if plan_gpus < used:
        return f"{takes} {plan_gpus}, and each token passes {_gpus(used - plan_gpus)} fewer."
    return f"{takes} {plan_gpus}: no worse."


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
