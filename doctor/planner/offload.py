"""The last layers in host memory: whether that is possible, how many, and what it costs.

What really happens (``dispatch_model`` of accelerate 1.15, which transformers 4.57 and 5 call): modules mapped to ``cpu``
are executed on the main device, the lowest GPU of the map, which is the plan's first. Hooks copy each module that has
tensors of its own to that GPU when it is called and drop the copy when it returns. So the first stage has their KV cache
and their work besides its own, and the host has their weights.
"""

from __future__ import annotations

from ..machine import Gpu
from ..placement import Offload
from ..units import GIB, format_gib
from .memory import unit_bytes
from .problem import Problem
from .quantized_rules import refusal

HOST_RESERVE_BYTES = 3 * GIB
"""Host memory for Python, torch, transformers and CUDA's own: 0.3 GiB measured with a CPU build of torch 2.13, the rest for
CUDA's libraries and context, which was not measured."""

_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Payload of one PCIe lane in one direction, by generation. Source: PCI-SIG, encoding included."""


def obstacle(problem: Problem) -> str | None:
    """Why the last layers cannot be offloaded for this question, as the end of a sentence; ``None`` when they can."""
    profile, workload = problem.profile, problem.workload
    quantized = workload.quantization or profile.quantization
    if quantized:
        refused = refusal(profile, workload, "cpu", is_alone=False)
        why = "transformers refuses a map with the CPU in it" if refused else "such layers work on a GPU only"
        return f"{profile.name} is loaded quantized ({quantized}), and {why}"
    if workload.training is not None:
        return "weights in host memory cannot be trained by accelerate's hooks"
    if any(budget.gpu.has_unified_memory for budget in problem.budgets):
        return "the GPU uses the host's memory already, so nothing would be gained"
    if not _most(problem):
        return "no part at the end is free to go: all are pinned, or share a GPU with vision tower or embedding"
    return None


def with_offload(problem: Problem) -> Problem | None:
    """The same question with as few atoms in host memory as make it fit; ``None`` when no number does.

    Only the last layers and what follows them go, never vision or embedding, and never what is pinned to a GPU.
    """
    room_bytes = _host_room_bytes(problem)
    if obstacle(problem) is not None or not problem.budgets:
        return None
    gpus_bytes = sum(max(0, budget.available_bytes) for budget in problem.budgets)
    for count in range(1, _most(problem) + 1):
        candidate = problem.with_offloaded(count)
        if room_bytes is not None and _weights_bytes(candidate) > room_bytes:
            return None
        if candidate.footprint.least_bytes <= gpus_bytes and candidate.fits():
            return candidate
    return None


def _most(problem: Problem) -> int:
    """Atoms at the end of the chain that may go; at least one stays."""
    atoms = problem.chain.atoms
    pins = problem.pins
    count = 0
    while count < len(atoms) - 1 and pins[-1 - count] is None:
        atom = atoms[-1 - count]
        if atom.has_tower or atom.has_embedding:
            break
        count += 1
    return count


def _weights_bytes(problem: Problem) -> int:
    units = (unit for atom in problem.offloaded_atoms for unit in atom.units)
    return sum(unit_bytes(unit, problem.profile, problem.workload) for unit in units)


def _host_room_bytes(problem: Problem) -> int | None:
    host = problem.machine.host
    available = host.memory_available_bytes if host is not None else None
    return None if available is None else available - HOST_RESERVE_BYTES


def offloaded(problem: Problem, executing: Gpu) -> Offload | None:
    """What is in host memory, why, and what it costs; ``None`` when nothing is.

    Args:
        problem: The question that was answered.
        executing: GPU of the first stage.
    """
    if not problem.offloaded:
        return None
    weights_bytes, room_bytes = _weights_bytes(problem), _host_room_bytes(problem)
    layers = sum(atom.layers for atom in problem.offloaded_atoms)
    less = problem.with_offloaded(problem.offloaded - 1).margin_bytes()
    lacking = "" if less is None else f": with one part less in host memory a GPU would lack {format_gib(-less)}"
    head = " and the head" if any(atom.has_head for atom in problem.offloaded_atoms) else ""
    parts = f"the last {layers} layers{head}" if layers > 1 else f"the last layer{head}" if layers else "the head"
    stay = "stay" if layers > 1 or (layers and head) else "stays"
    return Offload(
        keys=tuple(unit.key for atom in problem.offloaded_atoms for unit in atom.units),
        weights_bytes=weights_bytes,
        copy_bytes=problem.footprint.copy_bytes,
        host_left_bytes=None if room_bytes is None else room_bytes - weights_bytes,
        reason=f"The GPUs do not suffice, so {parts} {stay} in host memory{lacking}.",
        cost=_cost(weights_bytes, executing),
    )


def _cost(weights_bytes: int, gpu: Gpu) -> str:
    """What every forward pass copies, and the time that takes at best."""
    copied = f"Every new token copies {format_gib(weights_bytes)} from host memory to GPU {gpu.index}"
    generation, width = gpu.pcie_generation_max or gpu.pcie_generation, gpu.pcie_width_max or gpu.pcie_width
    if generation not in _LANE_BYTES_PER_S or not width:
        return f"{copied}."
    seconds = weights_bytes / (_LANE_BYTES_PER_S[generation] * width)
    return f"{copied}, which takes at least {seconds:.2g} s over PCIe {generation} x{width}."
