"""Cards that would do: for each card of the catalogue the fewest that fit a workload, with nobody else on them."""

from __future__ import annotations

import msgspec

from ..data.gpus import GPUS, GpuModel
from ..machine import Gpu, Machine
from ..model import ModelProfile
from ..placement import GpuSet
from ..workload import Policy, Workload
from .budget import budgets
from .constraints import can_break_tower, chain
from .memory import loaded_dtype
from .place import smallest_count
from .problem import Problem

MOST_CARDS = 16
"""Of one kind: two of the largest machines that are sold with eight."""
MOST_SETS = 5
"""Sets that are named."""
_BFLOAT16_FROM = (8, 0)
"""Compute capability with bfloat16, and with flash attention 2. Source: CUDA C++ programming guide, arithmetic throughput;
README of flash-attention."""


def suggest_gpus(profile: ModelProfile, workload: Workload, policy: Policy, *, most: int = MOST_SETS) -> tuple[GpuSet, ...]:
    """Sets of equal cards on which the workload fits, least total memory first, then fewest cards.

    No prices are known, so memory stands for them. Which GPUs to use, pins and limits of this machine do not count;
    headroom and the bounds on the number of GPUs do.

    Args:
        profile: The model.
        workload: What it is to do.
        policy: How careful to be.
        most: Sets that are returned.

    Raises:
        ModelFileError: The profile cannot be placed.
    """
    elsewhere = msgspec.structs.replace(policy, gpus=None, exclude=(), pins=(), max_memory=(), offload=False)
    chains = [chain(profile)]
    if can_break_tower(profile):
        chains.append(chain(profile, breaks_tower=True))
    found: dict[tuple[int, int], GpuSet] = {}
    for spec, card in GPUS.items():
        if not _computes(card, profile, workload):
            continue
        machine = Machine(origin="synthetic", description=spec, gpus=(_gpu(card),))
        cards = budgets(machine, elsewhere).usable * MOST_CARDS
        alike = (Problem(profile, made, workload, elsewhere, machine, {}, cards) for made in chains)
        count = next((count for count in map(_fewest, alike) if count is not None), None)
        if count is not None:
            total_bytes = count * card.memory_total_bytes
            name = f"{count}x{spec}" if count > 1 else spec
            found.setdefault((total_bytes, count), GpuSet(spec=name, name=card.name, count=count, total_bytes=total_bytes))
    return tuple(found[key] for key in sorted(found))[:most]


def _fewest(problem: Problem) -> int | None:
    need = problem.footprint.needs(problem.workload.text_tokens)
    return smallest_count(len(problem.atoms), need, problem.fleet, problem.counts)


def _computes(card: GpuModel, profile: ModelProfile, workload: Workload) -> bool:
    """Whether the card computes in the type that the model is loaded in, with the attention that is asked for."""
    needs_ampere = loaded_dtype(profile, workload) == "bfloat16" or workload.attention == "flash"
    return not needs_ampere or card.compute_capability >= _BFLOAT16_FROM


def _gpu(card: GpuModel) -> Gpu:
    return Gpu(
        index=0,
        uuid="0",
        name=card.name,
        memory_total_bytes=card.memory_total_bytes,
        memory_free_bytes=card.memory_total_bytes - card.memory_reserved_bytes,
        memory_reserved_bytes=card.memory_reserved_bytes,
        compute_capability=card.compute_capability,
    )
