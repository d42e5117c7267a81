"""What ``device_map="auto"`` would have done on this machine, and whether that is worse than the plan."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..machine import Libraries
from ..model import Registered
from ..placement import AutoPlacement, AutoShare
from ..units import MIB
from ..visibility import visible_gpus
from .auto_faults import cut_blocks, parted_parameters
from .auto_need import as_split, longest_text_tokens, shares_of
from .auto_replay import AutoError, Device, Placed, Route, replay
from .auto_tree import tree
from .auto_verdict import compared
from .budget import Budget
from .constraints import chain
from .memory import item_bytes, loaded_dtype, unit_bytes
from .order import Split
from .problem import Problem

START_CONTEXT_BYTES = 618 * MIB
"""CUDA context when ``auto`` asks for free memory, before any kernel is loaded. Measured: H200 (planner/budget.py)."""
CACHED_BYTES = 2 * MIB
"""Segment that torch takes for the one number that ``get_max_memory`` puts on each GPU first. Source: accelerate,
``get_max_memory``; torch, CUDACachingAllocator, kSmallBuffer."""
_UNLIMITED = 2**60
NEWEST = "transformers 5"
"""What is meant where none is installed."""


def auto_placement(problem: Problem, *, split: Split | None, longest_prompt_tokens: int | None) -> AutoPlacement:
    """Replay ``device_map="auto"`` on the GPUs that a plan could use, and compare.

    Args:
        problem: What was planned. The machine's libraries decide whose ``auto``, its environment the order of the GPUs.
        split: The plan's; ``None`` when nothing fits.
        longest_prompt_tokens: Longest prompt that the plan takes, text and image tokens.

    Returns:
        The placement; ``unknown`` says why where it cannot be known.
    """
    library, route = _library(problem.machine.libraries)
    unknown = _why_unknown(problem, route)
    if unknown:
        return AutoPlacement(library=library, unknown=unknown, verdict=f"Not known: {unknown}.")
    has_offload = bool(problem.offloaded)
    if has_offload or problem.chain.is_tower_broken:
        # What it puts where is told by whole towers.
        problem = msgspec.structs.replace(problem, chain=chain(problem.profile), offloaded=0, alike=None)
    budgets = _in_torch_order(problem)
    items = problem.profile.registered[_major(route)]
    try:
        placed = _replayed(problem, items, budgets, route)
    except AutoError as error:
        return AutoPlacement(library=library, verdict=f"auto {error}.")
    answer = _judged(problem, items, placed, budgets, library)
    return compared(
        answer, plan_gpus=len(split.gpus) if split else 0, plan_longest=longest_prompt_tokens, offloads=has_offload
    )


def _judged(
    problem: Problem, items: Sequence[Registered], placed: Placed, budgets: Sequence[Budget], library: str
) -> AutoPlacement:
    """The placement with all but its sentence."""
    footprint = problem.footprint
    shares = shares_of(problem, items, placed, budgets)
    cuts = cut_blocks(items, placed, [budget.gpu.index for budget in budgets])
    parted = parted_parameters(problem.profile, items, placed)
    elsewhere = {device: _weights_on(problem, items, placed, device) for device in ("cpu", "disk")}
    runs = not parted and not any(cut.fails for cut in cuts)
    as_stages = None if any(elsewhere.values()) else as_split(problem, shares)
    longest = None if any(elsewhere.values()) or not runs else longest_text_tokens(problem, shares, as_stages)
    return AutoPlacement(
        library=library,
        shares=tuple(
            AutoShare(
                gpu=share.budget.gpu.index,
                keys=tuple(key for key, device in placed.device_map.items() if device == share.ordinal),
                layers=share.holding.layers,
                weights_bytes=share.holding.weights_bytes,
                need_bytes=need_bytes,
                left_bytes=share.budget.available_bytes - need_bytes,
            )
            for share, need_bytes in ((share, share.need_bytes(problem.workload.text_tokens)) for share in shares)
        ),
        cpu_bytes=elsewhere["cpu"],
        disk_bytes=elsewhere["disk"],
        cut_blocks=cuts,
        parted=parted,
        fits=longest is not None,
        longest_prompt_tokens=None if longest is None else longest + footprint.images.tokens,
        verdict="",
    )


def _library(libraries: Libraries | None) -> tuple[str, Route]:
    """Name and version of what decides, and whose code that is."""
    version = libraries.version("transformers") if libraries else None
    if version is None:
        return NEWEST, "5.18"
    numbers = [int(part) if part.isdecimal() else 0 for part in version.split(".")[:2]]
    routes: tuple[tuple[list[int], Route], ...] = (([5], "4"), ([5, 18], "5"))
    return f"transformers {version}", next((route for since, route in routes if numbers < since), "5.18")


def _major(route: Route) -> str:
    """Which table of registration holds for a route."""
    return route[0]


def _why_unknown(problem: Problem, route: Route) -> str | None:
    profile = problem.profile
    if problem.workload.quantization:
        return f"loading in {problem.workload.quantization} replaces modules before auto counts them"
    if profile.quantization:
        return f"the sizes that auto counts in a checkpoint quantized with {profile.quantization} are not in its headers"
    if _major(route) not in profile.registered:
        return f"in which order {profile.architecture} registers its modules is not known for transformers {_major(route)}"
    return None if problem.budgets else "no GPU can be used"


def _in_torch_order(problem: Problem) -> list[Budget]:
    """Budgets of the GPUs that the plan could use, as torch numbers them."""
    order = visible_gpus(problem.machine).gpus
    return sorted(problem.budgets, key=lambda budget: order.index(budget.gpu.index))


def _replayed(problem: Problem, items: Sequence[Registered], budgets: Sequence[Budget], route: Route) -> Placed:
    size = item_bytes(loaded_dtype(problem.profile, problem.workload))
    root = tree(items, lambda item: item.unit.elements * size + item.buffer_bytes)
    memory: dict[Device, float] = {}
    for ordinal, budget in enumerate(budgets):
        context_bytes = min(START_CONTEXT_BYTES, budget.context_bytes)
        memory[ordinal] = max(0, budget.free_bytes - context_bytes - CACHED_BYTES)
    if not any(budget.gpu.has_unified_memory for budget in budgets):
        host = problem.machine.host
        host_bytes = host.memory_available_bytes if host else None
        memory["cpu"] = _UNLIMITED if host_bytes is None else host_bytes
    ties = [[f"{key}.weight" for key in group] for group in problem.profile.tied]
    return replay(root, memory, ties, route=route, cached_bytes=CACHED_BYTES)


def _weights_on(problem: Problem, items: Sequence[Registered], placed: Placed, device: Device) -> int:
    own = (item.unit for item in items if placed.devices[item.unit.key] == device)
    return sum(unit_bytes(unit, problem.profile, problem.workload) for unit in own)
