"""Which GPUs reach each other's memory directly (``vlm_requires(p2p=True)``). Pure."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm_doctor.machine import Gpu, Machine


def largest_group(gpus: Sequence[Gpu], machine: Machine) -> list[Gpu]:
    """The most GPUs each of which reaches the memory of every other one; the first such group of them."""
    reach = {(a.index, b.index): reaches(a, b, machine) is True for a, b in combinations(gpus, 2)}
    best: list[Gpu] = []

    def grow(group: list[Gpu], rest: Sequence[Gpu]) -> None:
        nonlocal best
        if len(group) > len(best):
            best = group
        for position, gpu in enumerate(rest):
            if len(group) + len(rest) - position <= len(best):
                return
            if all(reach[one.index, gpu.index] for one in group):
                grow([*group, gpu], rest[position + 1 :])

    grow([], gpus)
    return best


def reaches(a: Gpu, b: Gpu, machine: Machine) -> bool | None:
    """True when the driver grants both GPUs access to the memory of the other; ``None`` when that is not known."""
    link = machine.link(a.index, b.index)
    if link is None:
        return None
    if link.nvlinks:
        # Over NVLink it is there, unless the driver says otherwise.
        return link.p2p_read in (None, "ok") and link.p2p_write in (None, "ok")
    if None in (link.p2p_read, link.p2p_write) or "unknown" in (link.p2p_read, link.p2p_write):
        return None
    return link.p2p_read == link.p2p_write == "ok"


def unknown(gpus: Sequence[Gpu], machine: Machine) -> str:
    """The first pair about which it is not known, and what to do; empty when all are."""
    for a, b in combinations(gpus, 2):
        if reaches(a, b, machine) is not None:
            continue
        what = f"whether {a.label} and {b.label} reach each other's memory (p2p)"
        if machine.origin == "synthetic":
            spec = machine.description
            return f"{what} is not said of the made-up machine {spec}: write {spec}:p2p, or {spec}:p2p=off."
        pair = f"links[{min(a.index, b.index)}-{max(a.index, b.index)}]"
        gap = machine.gap(f"{pair}.p2p_read") or machine.gap(pair)
        return f"{what} could not be read{f' ({gap.reason})' if gap else ''}; look at nvidia-smi topo -p2p r."
    return ""


def told(gpus: Sequence[Gpu], machine: Machine) -> str:
    """``GPU 0 (NVIDIA L4) and GPU 1 (NVIDIA L4) do not (chipset_not_supported)``: the first pair that does not."""
    for a, b in combinations(gpus, 2):
        link = machine.link(a.index, b.index)
        if link is not None and reaches(a, b, machine) is False:
            why = link.p2p_read if link.p2p_read not in (None, "ok") else link.p2p_write
            return f"{a.label} and {b.label} do not ({why})"
    return f"there are {len(gpus)}"
