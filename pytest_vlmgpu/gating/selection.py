"""The gate: requirements and a machine in, a verdict out. Pure, so that it is tested without pytest, GPU or torch.

Order of the questions: which GPUs may be used, can they ever meet the requirements, can torch use them, do they meet the
requirements right now, does the model fit. What cannot be told is an error, never a skip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .. import verdicts
from ..verdicts import Verdict
from . import peers
from .faults import fault, is_ill, judge_absence, torch_fault
from .slices import ONE_A_PROCESS, PREFIX, is_slice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.placement import Plan

    from ..options import GpuChoice
    from ..requirements import Requirements

GIB = 2**30


class _Unmet(NamedTuple):
    code: str
    text: str


def judge(
    requirements: Requirements,
    machine: Machine,
    choice: GpuChoice,
    *,
    plan: Plan | None = None,
    needs_torch: bool = False,
    is_busy_decided_later: bool = False,
    own_pid: int | None = None,
) -> Verdict:
    """Decide about one test.

    Args:
        requirements: What its markers ask for, joined.
        machine: As last read.
        choice: ``--vlm-gpus``; ``none`` is not asked here.
        plan: Placement of its model on the GPUs of an earlier verdict, if it names one.
        needs_torch: True when torch will load a model.
        is_busy_decided_later: True when memory that is taken may be that of a model which is unloaded first.
        own_pid: Of the process that runs the test, which does not keep it from having GPUs to itself.

    Returns:
        ``run`` with the GPUs that meet the requirements, or a skip or an error with its reason.
    """
    gpus = _allowed(choice, machine)
    if isinstance(gpus, Verdict):
        return gpus
    if any(map(is_slice, gpus)):
        requirements = _within_one_gpu(requirements)
    unknown = _unknown(requirements, machine, gpus)
    if unknown is not None:
        return unknown
    unmet = _unmet(requirements, machine, choice, gpus)
    if unmet is not None:
        return unmet
    problem = torch_fault(machine, gpus) if needs_torch else ""
    if problem:
        return Verdict("error", verdicts.FAULT, problem)
    able = [gpu for gpu in gpus if _is_able(gpu, requirements, machine)]
    ready = able if is_busy_decided_later else _free_now(requirements, machine, able, own_pid)
    if isinstance(ready, Verdict):
        return ready
    if requirements.p2p:
        ready = peers.largest_group(ready, machine)
        if len(ready) < requirements.gpus:
            taken = [gpu for gpu in able if gpu not in ready]
            wanted = f"{requirements.gpus} free GPUs that reach each other's memory are wanted"
            return Verdict("error", verdicts.BUSY, f"{wanted}: {_holders(taken, machine)}.")
    refusal = _refuse_plan(plan, machine, ready)
    if refusal is not None and not (is_busy_decided_later and refusal.code == verdicts.BUSY):
        return refusal
    return Verdict("run", gpus=tuple(gpu.index for gpu in ready))


def _unmet(requirements: Requirements, machine: Machine, choice: GpuChoice, gpus: Sequence[Gpu]) -> Verdict | None:
    """Why these GPUs can never meet the requirements, whoever uses them; ``None`` where they can."""
    unmet = _short_of_count(requirements, choice, gpus) + _short_of_strength(requirements, machine, gpus)
    if not unmet and requirements.p2p:
        unmet = _short_of_peers(requirements, machine, gpus)
        unknown = peers.unknown([gpu for gpu in gpus if _is_able(gpu, requirements, machine)], machine) if unmet else ""
        if unknown:
            # What a made-up machine leaves open is for whoever made it up to say: nothing is broken.
            return Verdict("error", verdicts.WRONG if machine.origin == "synthetic" else verdicts.FAULT, unknown)
    if not unmet:
        return None
    wanted = "; ".join(item.text for item in unmet)
    broken = fault(machine)
    if broken:
        return Verdict("error", verdicts.FAULT, f"{wanted}. {broken}")
    why = f" ({requirements.reason})" if requirements.reason else ""
    return Verdict("skip", min(item.code for item in unmet), f"{wanted}{why}.")


def judge_without_gpus(choice: GpuChoice, *, wants_gpus: bool) -> Verdict:
    """Decide about one test on a run that is to use no GPU: models run on the CPU, tests of GPUs are skipped."""
    if wants_gpus:
        return Verdict("skip", verdicts.NO_GPU, f"a GPU is wanted, and {choice.text} allows none.")
    return Verdict("run")


def keep_from_acting(verdict: Verdict, machine: Machine) -> Verdict:
    """Turn ``run`` into a skip where the machine is not this one: a recorded or made-up machine is never acted on."""
    if verdict.action != "run" or machine.origin == "live":
        return verdict
    where = f"GPU {', '.join(map(str, verdict.gpus))}" if verdict.gpus else "the CPU"
    return Verdict("skip", None, f"would run on {where} of {machine.description}, which is {machine.origin}, not live.")


def _allowed(choice: GpuChoice, machine: Machine) -> list[Gpu] | Verdict:
    """The GPUs that ``--vlm-gpus`` and CUDA_VISIBLE_DEVICES leave, in CUDA order."""
    from vlm_doctor.visibility import visible_gpus

    if not machine.gpus:
        return judge_absence(machine)
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    seen = visible_gpus(machine)
    visible = [by_index[index] for index in seen.gpus]
    healthy = [gpu for gpu in visible if not is_ill(gpu)]
    if not healthy:
        broken = fault(machine)
        if broken:
            return Verdict("error", verdicts.FAULT, broken)
        return Verdict("skip", verdicts.NO_GPU, seen.problem or "no GPU is visible.")
    if choice.kind == "positions":
        return _by_position(choice, machine, visible)
    if choice.kind == "uuids":
        return _by_uuid(choice, machine, visible)
    # Where there are both, a slice is used only where it is named.
    healthy = [gpu for gpu in healthy if not is_slice(gpu)] or healthy
    return healthy[: choice.number] if choice.kind == "count" else healthy


def _by_position(choice: GpuChoice, machine: Machine, visible: Sequence[Gpu]) -> list[Gpu] | Verdict:
    missing = [position for position in choice.positions if position >= len(visible)]
    if missing:
        there = f"{len(visible)} GPUs are visible" if len(visible) > 1 else "1 GPU is visible"
        return Verdict("error", verdicts.WRONG, f"{choice.text}: there is no GPU {missing[0]}; {there}, counted from 0.")
    return _usable([visible[position] for position in choice.positions], choice, machine)


def _by_uuid(choice: GpuChoice, machine: Machine, visible: Sequence[Gpu]) -> list[Gpu] | Verdict:
    chosen: list[Gpu] = []
    for uuid in choice.uuids:
        found = [gpu for gpu in machine.gpus if gpu.uuid.lower().startswith(uuid.lower())]
        problem = ""
        if len(found) != 1:
            problem = f"{uuid} is the beginning of {len(found)} UUIDs" if found else _no_uuid(uuid, machine)
        elif found[0] in chosen:
            problem = f"{found[0].label} is named twice"
        elif found[0] not in visible and not found[0].error:
            problem = f"CUDA_VISIBLE_DEVICES hides {found[0].label}"
        if problem:
            return Verdict("error", verdicts.WRONG, f"{choice.text}: {problem}; see nvidia-smi -L.")
        chosen.append(found[0])
    return _usable(chosen, choice, machine)


def _no_uuid(uuid: str, machine: Machine) -> str:
    if not uuid.startswith(PREFIX):
        return f"no GPU has the UUID {uuid}"
    has_slices = any(map(is_slice, machine.gpus))
    return f"no MIG slice has the UUID {uuid}" if has_slices else f"there is no MIG slice {uuid}: no GPU here is divided"


def _within_one_gpu(requirements: Requirements) -> Requirements:
    """What a process that sees one slice can add up: the memory of one."""
    from dataclasses import replace

    vram = max(requirements.vram_bytes or 0, requirements.total_vram_bytes or 0)
    return replace(requirements, vram_bytes=vram or None, total_vram_bytes=None)


def _usable(chosen: list[Gpu], choice: GpuChoice, machine: Machine) -> list[Gpu] | Verdict:
    if any(map(is_ill, chosen)):
        return Verdict("error", verdicts.FAULT, f"{choice.text}: {fault(machine)}")
    if len({is_slice(gpu) for gpu in chosen}) > 1:
        return Verdict("error", verdicts.WRONG, f"{choice.text} names a MIG slice beside a GPU: {ONE_A_PROCESS}.")
    return chosen


def _unknown(requirements: Requirements, machine: Machine, gpus: Sequence[Gpu]) -> Verdict | None:
    """The error for what a requirement asks about and nobody could read, or nobody said of a made-up machine."""
    for gpu in gpus:
        missing = ""
        if requirements.capability and gpu.compute_capability is None:
            missing = "compute_capability"
        elif requirements.needs_memory and _total(gpu, machine) is None:
            missing = "memory_total_bytes"
        elif requirements.needs_memory and _free(gpu, machine) is None:
            missing = "memory_free_bytes"
        elif requirements.exclusive and machine.gap(f"gpus[{machine.gpus.index(gpu)}].processes"):
            missing = "processes"
        if missing == "compute_capability" and machine.origin == "synthetic":
            text = f"the compute capability of {gpu.label} is not said of the made-up machine {machine.description}"
            return Verdict("error", verdicts.WRONG, f"{text}: name a card of the catalogue there, such as L4.")
        if missing:
            gap = machine.gap(f"gpus[{machine.gpus.index(gpu)}].{missing}")
            text = f"{gpu.label}: {missing} could not be read{f' ({gap.reason})' if gap else ''}."
            return Verdict("error", verdicts.FAULT, text)
    return None


def _short_of_count(requirements: Requirements, choice: GpuChoice, gpus: Sequence[Gpu]) -> list[_Unmet]:
    wanted = max(requirements.gpus, choice.number)
    if requirements.gpus > 1 and any(map(is_slice, gpus)):
        return [_Unmet(verdicts.TOO_FEW, f"{requirements.gpus} GPUs are wanted, and {ONE_A_PROCESS}")]
    if len(gpus) >= wanted:
        return []
    by = f" ({choice.text})" if choice.kind != "auto" else ""
    return [_Unmet(verdicts.TOO_FEW, f"{wanted} GPUs are wanted, {len(gpus)} can be used{by}")]


def _short_of_strength(requirements: Requirements, machine: Machine, gpus: Sequence[Gpu]) -> list[_Unmet]:
    """What these GPUs can never meet, whoever uses them."""
    # Where GPUs are missing, each one there is still held to the rest, so that the reason is complete.
    count = min(requirements.gpus, len(gpus))
    capability, vram, total = requirements.capability, requirements.vram_bytes, requirements.total_vram_bytes
    unmet = []
    if vram and sum(_attainable(gpu, machine) >= vram for gpu in gpus) < count:
        found = _each(gpus, lambda gpu: _gib(_attainable(gpu, machine)))
        hint = _decimal_hint(vram, max(_attainable(gpu, machine) for gpu in gpus))
        unmet.append(_Unmet(verdicts.TOO_SMALL, f"{_gib(vram)} is wanted {_on_each(requirements)}, {found}{hint}"))
    if capability and sum(_is_new_enough(gpu, capability) for gpu in gpus) < count:
        found = _each(gpus, lambda gpu: _version(gpu.compute_capability))
        wanted = f"compute capability {_version(capability)} is wanted {_on_each(requirements)}"
        unmet.append(_Unmet(verdicts.TOO_OLD, f"{wanted}, {found}"))
    able = [gpu for gpu in gpus if _is_able(gpu, requirements, machine)]
    if not unmet and len(able) < count:
        unmet.append(
            _Unmet(verdicts.TOO_SMALL, f"memory and compute capability together are met by {len(able)} of {count} GPUs")
        )
    if not unmet and total and sum(_attainable(gpu, machine) for gpu in able) < total:
        found = _each(able, lambda gpu: _gib(_attainable(gpu, machine)))
        unmet.append(_Unmet(verdicts.TOO_SMALL, f"{_gib(total)} is wanted in all, {found}"))
    return unmet


def _short_of_peers(requirements: Requirements, machine: Machine, gpus: Sequence[Gpu]) -> list[_Unmet]:
    able = [gpu for gpu in gpus if _is_able(gpu, requirements, machine)]
    if len(peers.largest_group(able, machine)) >= requirements.gpus:
        return []
    found = peers.told(able, machine)
    return [_Unmet(verdicts.NO_PEERS, f"{requirements.gpus} GPUs that reach each other's memory are wanted, {found}")]


def _free_now(requirements: Requirements, machine: Machine, able: list[Gpu], own_pid: int | None) -> list[Gpu] | Verdict:
    """The GPUs that have the memory right now, or who has taken it."""
    vram, total = requirements.vram_bytes or 0, requirements.total_vram_bytes or 0
    ready = [gpu for gpu in able if (_free(gpu, machine) or 0) >= vram]
    if requirements.exclusive:
        alone = [gpu for gpu in ready if all(process.pid == own_pid for process in gpu.processes)]
        if len(alone) < requirements.gpus <= len(ready):
            taken = [gpu for gpu in ready if gpu not in alone]
            wanted = f"{requirements.gpus} GPU{'s' if requirements.gpus > 1 else ''} without any other process"
            return Verdict("error", verdicts.BUSY, f"{wanted} wanted: {_holders(taken, machine)}.")
        ready = alone
    if len(ready) < requirements.gpus:
        taken = [gpu for gpu in able if gpu not in ready]
        wanted = f"{_gib(vram)} free is wanted {_on_each(requirements)}"
        return Verdict("error", verdicts.BUSY, f"{wanted}: {_holders(taken, machine)}.")
    if total and sum(_free(gpu, machine) or 0 for gpu in ready) < total:
        return Verdict("error", verdicts.BUSY, f"{_gib(total)} free is wanted in all: {_holders(ready, machine)}.")
    return ready


def _refuse_plan(plan: Plan | None, machine: Machine, gpus: Sequence[Gpu]) -> Verdict | None:
    if plan is None or plan.fits:
        return None
    if plan.shortage is not None and not plan.shortage.is_permanent:
        return Verdict("error", verdicts.BUSY, f"{plan.shortage.message} {_holders(gpus, machine)}.")
    reason = plan.shortage.message if plan.shortage is not None else f"{plan.model} does not fit."
    return Verdict("skip", verdicts.DOES_NOT_FIT, reason)


def _total(gpu: Gpu, machine: Machine) -> int | None:
    host = machine.host if gpu.has_unified_memory else None
    return host.memory_total_bytes if host is not None else gpu.memory_total_bytes


def _free(gpu: Gpu, machine: Machine) -> int | None:
    host = machine.host if gpu.has_unified_memory else None
    return host.memory_available_bytes if host is not None else gpu.memory_free_bytes


def _attainable(gpu: Gpu, machine: Machine) -> int:
    """Free memory if nobody used the GPU: the driver's own share never is."""
    return (_total(gpu, machine) or 0) - (gpu.memory_reserved_bytes or 0)


def _is_new_enough(gpu: Gpu, capability: tuple[int, int]) -> bool:
    return (gpu.compute_capability or (0, 0)) >= capability


def _is_able(gpu: Gpu, requirements: Requirements, machine: Machine) -> bool:
    """True when the GPU meets all that it can be asked for on its own. Memory nobody asked for may be unknown."""
    has_memory = not requirements.vram_bytes or _attainable(gpu, machine) >= requirements.vram_bytes
    return has_memory and _is_new_enough(gpu, requirements.capability or (0, 0))


def _decimal_hint(vram: int, largest: int) -> str:
    """Cards are sold in GB: an "80 GB" H100 has 79.6 GiB, a "24 GB" L4 has 22.5 GiB."""
    number = vram // GIB
    if vram % GIB or largest < number * 10**9:
        return ""
    return f' (for a "{number} GB" card write "{number}GB")'


def _holders(gpus: Sequence[Gpu], machine: Machine) -> str:
    """Who holds memory of these GPUs, and how much, largest first."""
    parts = []
    for gpu in gpus:
        held = []
        for process in sorted(gpu.processes, key=lambda process: -(process.used_bytes or 0)):
            size = f" {_gib(process.used_bytes)}" if process.used_bytes is not None else ""
            owner = process.user or "user not visible"
            held.append(f"pid {process.pid} ({owner}{f', {process.command}' if process.command else ''}){size}")
        free, total = _gib(_free(gpu, machine) or 0), _gib(_attainable(gpu, machine))
        by = f"held by {', '.join(held)}" if held else "no holder is visible from here"
        parts.append(f"{gpu.label} has {free} of {total} free, {by}")
    return "; ".join(parts)


def _each(gpus: Sequence[Gpu], value: Callable[[Gpu], str]) -> str:
    """``2 x NVIDIA L4 have 22.5 GiB, GPU 2 (NVIDIA T4) has 14.6 GiB``: equal GPUs once."""
    groups: dict[tuple[str, str], list[Gpu]] = {}
    for gpu in gpus:
        groups.setdefault((gpu.name, value(gpu)), []).append(gpu)
    return ", ".join(
        f"{len(same)} x {name} have {text}" if len(same) > 1 else f"{same[0].label} has {text}"
        for (name, text), same in groups.items()
    )


def _on_each(requirements: Requirements) -> str:
    return f"on each of {requirements.gpus} GPUs" if requirements.gpus > 1 else "on one GPU"


def _version(capability: tuple[int, int] | None) -> str:
    return ".".join(map(str, capability or ()))


def _gib(size_bytes: int) -> str:
    from vlm_doctor.units import format_gib

    return format_gib(size_bytes)
