"""What a map puts on each device, and whether the device has that much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..device_map import DeviceUse
from ..findings import Finding
from ..model import Role
from ..units import format_gib
from .budget import Budget
from .map_devices import OFF_GPU, shown
from .map_layout import Device, Layout
from .map_question import Question, finding
from .memory import Holding
from .problem import Problem
from .weights import copied_bytes, loading_bytes

_WORDS: dict[Role, str] = {
    "vision": "vision tower",
    "projector": "projector",
    "embedding": "embedding",
    "norm": "final norm",
    "head": "head",
    "other": "other",
}


def device_uses(question: Question, layout: Layout) -> tuple[DeviceUse, ...]:
    """What is on each device of a map, in the order in which the model meets them."""
    problem = question.problem
    full = {name: layout.device_of.get(name, "missing") for names in layout.anatomy.tensors_of.values() for name in names}
    weights = layout.anatomy.weights(full)
    weights.pop("missing", None)
    budgets = {budget.gpu.index: budget for budget in question.budgets.usable}
    units = question.profile.units
    executed: dict[Device | None, list[str]] = {}
    for unit in units:
        if unit.role == "layer" and unit.key in layout.unit_device:
            executed.setdefault(layout.runs(layout.unit_device[unit.key]), []).append(unit.key)
    held = _held(layout)
    guests = {key for place in OFF_GPU for key in held.get(place, ())}
    copies = (copied_bytes(unit, question.profile, question.workload) for unit in units if unit.key in guests)
    copy_bytes = max(copies, default=0)
    uses = []
    for device in weights:
        roles = [unit.role for unit in units if layout.unit_device.get(unit.key) == device]
        gpu = question.gpu_of(device)
        budget = None if gpu is None else budgets.get(gpu)
        keys = tuple(executed.get(device, ()))
        here = held.get(device, Counter())
        loaded = [unit for unit in units if here[unit.key]]
        holding = Holding(
            weights_bytes=weights[device],
            layers=len(keys),
            has_tower=any(unit.role == "vision" and device in layout.runs_on(unit.key) for unit in units),
            has_embedding=layout.role_device("embedding") == device,
            has_head=layout.role_device("head") == device,
            layer_keys=keys,
            loading_bytes=loading_bytes(loaded, question.profile, question.workload, problem.footprint.release),
            is_main=None if layout.role_device("embedding") == layout.main else device == layout.main,
        )
        need_bytes = _need(problem, layout, device, holding, budget) if budget else None
        if need_bytes is not None and device == layout.main:
            need_bytes += copy_bytes
        uses.append(
            DeviceUse(
                device=shown(device),
                gpu=gpu,
                name=budget.gpu.name if budget else "",
                layers=roles.count("layer"),
                parts=_parts(layout, here),
                weights_bytes=weights[device],
                need_bytes=need_bytes,
                available_bytes=budget.available_bytes if budget else None,
            )
        )
    return tuple(uses)


def _held(layout: Layout) -> dict[Device, Counter[str]]:
    """For each device, how many tensors of each unit it holds."""
    held: dict[Device, Counter[str]] = {}
    for unit, names in layout.anatomy.tensors_of.items():
        for name in names:
            if name in layout.device_of:
                held.setdefault(layout.device_of[name], Counter())[unit] += 1
    return held


def _parts(layout: Layout, here: Mapping[str, int]) -> tuple[str, ...]:
    """What a device holds beside layers, in words."""
    found: dict[str, None] = {}
    for unit in layout.anatomy.profile.units:
        if here.get(unit.key) and unit.role in _WORDS:
            is_whole = here[unit.key] == len(layout.anatomy.tensors_of[unit.key])
            found[_WORDS[unit.role] if is_whole else f"part of the {_WORDS[unit.role]}"] = None
    return tuple(found)


def _need(problem: Problem, layout: Layout, device: Device, holding: Holding, budget: Budget) -> int:
    """Bytes at the worst moment.

    Of a stage as the planner makes them by the planner's own account; of anything else by what it holds, with what the
    allocator loses on a stage of the same kind.
    """
    footprint, text_tokens = problem.footprint, problem.workload.text_tokens
    stage = _stage(problem, layout, device)
    if stage is not None:
        if problem.replay is None:
            return footprint.detail(*stage, text_tokens, is_main=holding.is_main).total_bytes
        position = problem.budgets.index(budget)
        return problem.replay.need(stage, position, budget.available_bytes, is_main=holding.is_main).total_bytes
    atoms = len(footprint.atoms)
    if holding.has_embedding or holding.has_tower:
        run = (0, min(atoms, 1 + holding.layers))
    elif holding.has_head:
        run = (max(1, atoms - 1 - holding.layers), atoms)
    else:
        run = (1, max(2, min(atoms, 1 + holding.layers)))
    lost = footprint.lost_of(holding, run, text_tokens) if atoms > 1 else 0
    return footprint.need_of(holding, text_tokens).total_bytes + lost


def _stage(problem: Problem, layout: Layout, device: Device) -> tuple[int, int] | None:
    """The run of atoms that is all that a device holds and executes, or ``None`` when that is no run of whole atoms."""
    if device == layout.main and any(place in OFF_GPU for place in layout.device_of.values()):
        # It executes what is off the GPUs, too.
        return None
    holders = [
        {layout.device_of.get(name) for unit in atom.units for name in layout.anatomy.tensors_of[unit.key]}
        for atom in problem.atoms
    ]
    here = [number for number, devices in enumerate(holders) if device in devices]
    is_run = bool(here) and here[-1] - here[0] + 1 == len(here)
    return (here[0], here[-1] + 1) if is_run and all(holders[number] == {device} for number in here) else None


def about_memory(question: Question, uses: tuple[DeviceUse, ...]) -> Iterator[Finding]:
    """VLM620: a device that does not have what the map wants of it."""
    budgets = {budget.gpu.index: budget for budget in question.budgets.usable}
    for use in uses:
        if use.gpu is None or use.need_bytes is None or use.gpu not in budgets:
            continue
        budget = budgets[use.gpu]
        if use.need_bytes > budget.available_bytes:
            yield _overflow(question, use, use.need_bytes, budget)


def _overflow(question: Question, use: DeviceUse, need_bytes: int, budget: Budget) -> Finding:
    room = max(0, budget.available_bytes + budget.headroom_bytes)
    index = int(use.device.partition(":")[2])
    where = f"GPU {use.gpu} ({use.device})"
    if need_bytes <= room:
        message = (
            f"{where} keeps only {format_gib(room - need_bytes)} of the {format_gib(budget.headroom_bytes)} that the "
            f"policy leaves free: the map needs {format_gib(need_bytes)} there."
        )
    else:
        when = "while it loads" if use.weights_bytes > room else "at this workload"
        message = (
            f"{where} runs out of memory {when}: the map needs {format_gib(need_bytes)} there "
            f"({format_gib(use.weights_bytes)} of weights), and {format_gib(room)} can be had: "
            f"{format_gib(need_bytes - room)} are missing."
        )
    return finding(
        question,
        "VLM620",
        "warning" if need_bytes <= room else "error",
        message,
        cause=f"It holds {use.layers} layers" + (f", {', '.join(use.parts)}" if use.parts else "") + ".",
        fix="Move layers to a GPU with room, as the corrected map does, or make the call smaller.",
        devices=[index],
    )
