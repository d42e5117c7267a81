"""What the links between GPUs mean for a model that is split over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .health import fault_of_link
from .machine import Link, Machine

_MAX_NVLINKS = 36
"""``NVML_NVLINK_MAX_LINKS`` of nvidia-ml-py 13.615."""
_PATHS = ("INTERNAL", "PIX", "PXB", "PHB", "NODE", "SYS")
"""PCIe paths, nearest first. Source: legend of ``nvidia-smi topo -m``."""
WORST_RANK = _MAX_NVLINKS + len(_PATHS)
"""Rank of a link about which nothing is known."""


def link_rank(link: Link | None) -> int:
    """Order links from best (0) to worst: NVLink, more of them first, then PCIe from near to far, then unknown."""
    if link is None:
        return WORST_RANK
    if link.nvlinks:
        return max(0, _MAX_NVLINKS - link.nvlinks)
    return WORST_RANK if link.path is None else _MAX_NVLINKS + _PATHS.index(link.path)


_OUTSIDE_NVLINK = 1_000
"""More than any chain of NVLinks adds up to: one hop outside an NVLink island is worse than all hops inside it."""
_THROUGH_HOST = len(_PATHS)
"""Two copies instead of one, where the driver grants no peer access: worse than the longest direct path."""
_NO_PEER_ACCESS = (
    "chipset_not_supported",
    "gpu_not_supported",
    "topology_not_supported",
    "disabled_by_regkey",
    "not_supported",
)


def hop_rank(machine: Machine, a: int, b: int) -> int | None:
    """Order the hops from one stage of a model to the next from best (0) to worst.

    NVLink first, then direct copies over PCIe from near to far, then copies through the host's memory.

    Args:
        machine: The machine.
        a: GPU index.
        b: Another GPU index.

    Returns:
        ``None`` when the link must not be used, see :func:`~vlm_doctor.health.fault_of_link`.
    """
    if fault_of_link(machine, a, b) is not None:
        return None
    link = machine.link(a, b)
    if link is not None and (link.p2p_read in _NO_PEER_ACCESS or link.p2p_write in _NO_PEER_ACCESS):
        return _OUTSIDE_NVLINK + link_rank(Link(a=a, b=b, path=link.path)) + _THROUGH_HOST
    return link_rank(link) + (0 if link is not None and link.nvlinks else _OUTSIDE_NVLINK)


def islands(machine: Machine, gpus: Sequence[int] | None = None) -> tuple[tuple[int, ...], ...]:
    """Group GPUs that NVLink joins, directly or through other GPUs of the same group.

    Args:
        machine: The machine.
        gpus: GPU indices to look at; links through GPUs outside do not count. ``None`` is every GPU.

    Returns:
        Groups of rising GPU indices, ordered by their first; a GPU without NVLink is a group of its own.
    """
    chosen = {gpu.index for gpu in machine.gpus} if gpus is None else set(gpus)
    neighbors: dict[int, list[int]] = {index: [] for index in sorted(chosen)}
    for link in machine.links:
        if link.nvlinks and link.a in neighbors and link.b in neighbors:
            neighbors[link.a].append(link.b)
            neighbors[link.b].append(link.a)
    found: list[tuple[int, ...]] = []
    waiting = set(neighbors)
    for start in neighbors:
        if start not in waiting:
            continue
        waiting.remove(start)
        group = [start]
        for index in group:
            fresh = [other for other in neighbors[index] if other in waiting]
            waiting.difference_update(fresh)
            group.extend(dict.fromkeys(fresh))
        found.append(tuple(sorted(group)))
    return tuple(found)


def describe(machine: Machine, gpus: Sequence[int] | None = None) -> str:
    """Say in one sentence how the GPUs are joined and what that means for a split.

    Args:
        machine: The machine.
        gpus: GPU indices to look at; ``None`` is every GPU.
    """
    chosen = sorted({gpu.index for gpu in machine.gpus} if gpus is None else set(gpus))
    if len(chosen) < 2:
        return "No GPU, so there are no links." if not chosen else "1 GPU: nothing to split over, no link matters."
    groups = islands(machine, chosen)
    members = set(chosen)
    links = [link for link in machine.links if link.a in members and link.b in members]
    pairs = len(chosen) * (len(chosen) - 1) // 2
    known = [link for link in links if link_rank(link) < WORST_RANK]
    if len(groups) == 1:
        return _one_island(machine, chosen, [link for link in links if link.nvlinks], pairs)
    if not known:
        gap = machine.gap("links")
        return f"{len(chosen)} GPUs, and how they are joined is unknown{f' ({gap.reason})' if gap else ''}."
    crossing = _paths(link for link in known if not link.nvlinks)
    if all(len(group) == 1 for group in groups):
        doubt = "" if len(known) == pairs else ", as far as is known"
        return f"{len(chosen)} GPUs without NVLink{doubt}: a split crosses PCIe{crossing} at each border, so use few GPUs."
    return _several_islands(chosen, groups, crossing)


def _one_island(machine: Machine, chosen: list[int], nvlinks: list[Link], pairs: int) -> str:
    if len(nvlinks) < pairs:
        return f"{len(chosen)} GPUs joined by NVLink, not every pair directly: keep neighboring stages on joined pairs."
    labels = sorted({link.nvlinks or 0 for link in nvlinks})
    width = f"NV{labels[0]}" if len(labels) == 1 else f"NVLink (NV{labels[0]} to NV{labels[-1]})"
    members = set(chosen)
    has_switch = any(port.remote == "switch" for gpu in machine.gpus if gpu.index in members for port in gpu.nvlinks)
    switch = " through NVSwitch" if has_switch else ""
    if len(labels) > 1:
        return f"{len(chosen)} GPUs joined by {width}{switch}: any split may cross them, best where there are most links."
    return f"{len(chosen)} GPUs joined by {width}{switch}: any split may cross them freely."


def _several_islands(chosen: list[int], groups: tuple[tuple[int, ...], ...], crossing: str) -> str:
    joined = [group for group in groups if len(group) > 1]
    alone = [str(group[0]) for group in groups if len(group) == 1]
    noun = "pair" if all(len(group) == 2 for group in joined) else "island"
    number = {1: "one", 2: "two", 3: "three", 4: "four"}.get(len(joined), str(len(joined)))
    names = ", ".join(_name(group) for group in joined)
    rest = f"; GPU{'s' if len(alone) > 1 else ''} {', '.join(alone)} without NVLink" if alone else ""
    place = f"that {noun}" if len(joined) == 1 else f"one {noun}"
    between = "outside it" if len(joined) == 1 else f"between {noun}s"
    return (
        f"{len(chosen)} GPUs with {number} NVLink {noun}{'s' if len(joined) > 1 else ''} ({names}){rest}: "
        f"keep a split inside {place}; {between} a hop crosses PCIe{crossing}."
    )


def _name(group: tuple[int, ...]) -> str:
    """``0-1`` for a pair, ``0-3`` for a run, ``0+2+5`` otherwise."""
    if len(group) == 2 or group[-1] - group[0] == len(group) - 1:
        return f"{group[0]}-{group[-1]}"
    return "+".join(map(str, group))


def _paths(links: Iterable[Link]) -> str:
    """`` (PHB)``, or the range of paths, nearest and farthest, or nothing when unknown."""
    ranked = sorted({link.path for link in links if link.path is not None}, key=_PATHS.index)
    if not ranked:
        return ""
    return f" ({ranked[0]})" if len(ranked) == 1 else f" ({ranked[0]} to {ranked[-1]})"
