"""Whether a machine is what a job expects: which GPUs meet it, or the one line that says what is missing. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from .answers import GateAnswer, Unmet
from .expectations import Expectations
from .findings import Diagnosis
from .health import fault_of_gpu
from .machine import Gpu, Machine
from .placement import Plan
from .topology import islands
from .units import format_gib
from .verdict import could_not_look
from .visibility import visible_gpus

TOO_FEW = "VLM003"
TOO_LITTLE_MEMORY = "VLM004"
NOT_JOINED = "VLM005"
TOO_OLD = "VLM006"
DOES_NOT_FIT = "VLM601"
DOES_NOT_FIT_NOW = "VLM602"
_HIDING = ("VLM202", "VLM203")
"""Codes that say which GPUs CUDA_VISIBLE_DEVICES hides."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What the expectations come to, before a model is looked at."""

    gpus: tuple[int, ...] = ()
    """So many GPUs as are wanted, best first; empty when there are not enough."""
    able: tuple[int, ...] = ()
    """All GPUs that meet the expectations on their own."""
    unmet: tuple[Unmet, ...] = ()
    unknown: str | None = None
    """What could not be read, though an expectation asks about it."""


def choose(wanted: Expectations, machine: Machine, diagnosis: Diagnosis) -> Choice:
    """Find GPUs that meet the expectations.

    Args:
        wanted: What to look for; its model is not looked at.
        machine: What was seen.
        diagnosis: What the checks say: an error about the machine, or about GPUs that are needed, stands against it.
    """
    if could_not_look(machine, diagnosis):
        return Choice(unknown="the driver library (NVML) does not answer (VLM105)")
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    visible = [by_index[index] for index in visible_gpus(machine).gpus]
    working = [gpu for gpu in visible if gpu.error is None and fault_of_gpu(gpu) is None]
    general = tuple(_general_errors(diagnosis))
    unknown = _unknown(wanted, machine, working)
    if unknown is not None and not general and len(working) >= wanted.gpus:
        return Choice(unknown=unknown)
    unmet = [*general]
    if len(working) < wanted.gpus:
        lost = {gpu.index for gpu in machine.gpus}.difference(gpu.index for gpu in working)
        more = f" ({len(lost)} more hidden or faulty{_why(diagnosis, lost, told=general)})" if lost else ""
        unmet.append(Unmet(code=TOO_FEW, text=f"{_gpus(wanted.gpus)} wanted, {len(working)} can be used{more}"))
    recent = [gpu for gpu in working if (gpu.compute_capability or (0, 0)) >= (wanted.capability or (0, 0))]
    if working and len(recent) < min(wanted.gpus, len(working)):
        unmet.append(_too_old(wanted, working))
    roomy = [gpu for gpu in working if free_bytes(gpu, machine) >= (wanted.vram_bytes or 0)]
    if working and len(roomy) < min(wanted.gpus, len(working)):
        unmet.append(_too_little(wanted, machine, diagnosis, working))
    able = [gpu for gpu in recent if gpu in roomy]
    if not unmet and len(able) < wanted.gpus:
        unmet.append(
            Unmet(
                code=TOO_FEW, text=f"{_gpus(wanted.gpus)} wanted, {len(able)} meet memory and compute capability together"
            )
        )
    chosen = _best(wanted, machine, able)
    if not unmet and not chosen:
        unmet.append(_not_joined(wanted, machine, able))
    return Choice(gpus=() if unmet else chosen, able=tuple(gpu.index for gpu in able), unmet=tuple(unmet))


def answer_gate(wanted: Expectations, machine: Machine, choice: Choice, plan: Plan | None = None) -> GateAnswer:
    """Put the answer together.

    Args:
        wanted: What was asked.
        machine: What was seen.
        choice: The GPUs for it.
        plan: Placement of its model on them; ``None`` when none was named or no GPUs were found.
    """
    unmet = list(choice.unmet)
    if plan is not None and not plan.fits:
        shortage = plan.shortage
        is_permanent = shortage is None or shortage.is_permanent
        text = shortage.message.rstrip(".") if shortage is not None else f"{plan.model} does not fit"
        unmet.append(Unmet(code=DOES_NOT_FIT if is_permanent else DOES_NOT_FIT_NOW, text=text))
    if choice.unknown is not None or unmet:
        said = "; ".join(f"{one.text} ({one.code})" for one in unmet)
        reason = f"Not met: {said}." if unmet else f"Not known: {choice.unknown}."
        return GateAnswer(is_met=False, reason=reason, expected=wanted.described(), model=wanted.model, unmet=tuple(unmet))
    gpus = choice.gpus
    if plan is not None:
        # The map counts the GPUs of its stages, so that these come first.
        used = [stage.gpu for stage in plan.stages]
        gpus = (*used, *(index for index in gpus if index not in used))
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    return GateAnswer(
        is_met=True,
        reason=_met(wanted, [by_index[index] for index in gpus], plan),
        expected=wanted.described(),
        gpus=gpus,
        cuda_visible_devices=",".join(by_index[index].uuid for index in gpus),
        model=wanted.model,
        device_map=None if plan is None else plan.device_map,
    )


def refused(answer: GateAnswer, diagnosis: Diagnosis) -> GateAnswer:
    """The answer where warnings count and there are some."""
    warnings = [finding for finding in diagnosis.findings if finding.severity == "warning"]
    unmet = tuple(Unmet(code=finding.code, text=finding.message.rstrip(".")) for finding in warnings)
    said = "; ".join(f"{one.text} ({one.code})" for one in unmet)
    return GateAnswer(
        is_met=False,
        reason=f"Not met, warnings count: {said}.",
        expected=answer.expected,
        model=answer.model,
        unmet=unmet,
    )


def free_bytes(gpu: Gpu, machine: Machine) -> int:
    """Free memory of a GPU; of one without memory of its own, that of the host; 0 where it is not known."""
    if gpu.has_unified_memory and machine.host is not None:
        return machine.host.memory_available_bytes or 0
    return gpu.memory_free_bytes or 0


def _why(diagnosis: Diagnosis, gpus: Collection[int], *, told: Sequence[Unmet]) -> str:
    """``: VLM403``, the codes of what was found about GPUs that cannot be used, without those that are told anyway."""
    about = {f.code for f in diagnosis.findings if f.severity == "error" and not set(f.gpus).isdisjoint(gpus)}
    hiding = {f.code for f in diagnosis.findings if f.code in _HIDING}
    codes = sorted((about | hiding).difference(one.code for one in told))
    return f": {', '.join(codes)}" if codes else ""


def _general_errors(diagnosis: Diagnosis) -> list[Unmet]:
    """Errors that are about no particular GPU: nothing runs on any of them."""
    found = [finding for finding in diagnosis.findings if finding.severity == "error" and not finding.gpus]
    return [Unmet(code=finding.code, text=finding.message.rstrip(".")) for finding in found]


def _unknown(wanted: Expectations, machine: Machine, working: Sequence[Gpu]) -> str | None:
    for gpu in working:
        if wanted.capability is not None and gpu.compute_capability is None:
            return f"the compute capability of {gpu.label} could not be read"
        if wanted.vram_bytes is not None and gpu.memory_free_bytes is None and not gpu.has_unified_memory:
            return f"the free memory of {gpu.label} could not be read"
    indices = {gpu.index for gpu in working}
    pairs = [link for link in machine.links if link.a in indices and link.b in indices]
    if wanted.nvlink and wanted.gpus > 1 and len(working) > 1 and all(link.nvlinks is None for link in pairs):
        return "how the GPUs are joined could not be read"
    return None


def _too_old(wanted: Expectations, working: Sequence[Gpu]) -> Unmet:
    found = ", ".join(f"{gpu.label} {_version(gpu.compute_capability)}" for gpu in working)
    return Unmet(code=TOO_OLD, text=f"compute capability {_version(wanted.capability)} is wanted, there are {found}")


def _too_little(wanted: Expectations, machine: Machine, diagnosis: Diagnosis, working: Sequence[Gpu]) -> Unmet:
    want = wanted.vram_bytes or 0
    held = {
        index: finding for finding in diagnosis.findings for index in finding.gpus if finding.code in ("VLM501", "VLM502")
    }
    parts = []
    for gpu in working:
        free = free_bytes(gpu, machine)
        why = f", {held[gpu.index].code}" if gpu.index in held and free < want else ""
        total = f" of {format_gib(gpu.memory_total_bytes)}" if gpu.memory_total_bytes is not None else ""
        parts.append(f"{gpu.label} has {format_gib(free)}{total} free{why}")
    each = " each" if wanted.gpus > 1 else ""
    return Unmet(code=TOO_LITTLE_MEMORY, text=f"{format_gib(want)} free{each} is wanted, {', '.join(parts)}")


def _best(wanted: Expectations, machine: Machine, able: Sequence[Gpu]) -> tuple[int, ...]:
    """So many GPUs as are wanted: with NVLink inside one island, otherwise there if possible; most free memory first."""
    indices = [gpu.index for gpu in able]
    free = {gpu.index: free_bytes(gpu, machine) for gpu in able}
    groups = sorted(islands(machine, indices), key=lambda group: (-min(len(group), wanted.gpus), len(group), group))
    large = [group for group in groups if len(group) >= wanted.gpus]
    if large:
        pool: Sequence[int] = large[0]
    elif wanted.nvlink or len(able) < wanted.gpus:
        return ()
    else:
        pool = [index for group in groups for index in group][: wanted.gpus]
    ordered = sorted(pool, key=lambda index: (-free[index], index))
    if wanted.nvlink and wanted.gpus > 1:
        ordered = _connected(machine, ordered, wanted.gpus)
    return tuple(sorted(ordered[: wanted.gpus]))


def _connected(machine: Machine, ordered: Sequence[int], count: int) -> list[int]:
    """The first GPUs of an island that are joined among themselves, begun with the one that has most free memory."""
    chosen = [ordered[0]]
    while len(chosen) < count:
        chosen.append(
            next(
                index
                for index in ordered
                if index not in chosen and any((link := machine.link(index, one)) and link.nvlinks for one in chosen)
            )
        )
    return chosen


def _not_joined(wanted: Expectations, machine: Machine, able: Sequence[Gpu]) -> Unmet:
    largest = max((len(group) for group in islands(machine, [gpu.index for gpu in able])), default=0)
    most = "no two are" if largest < 2 else f"at most {largest} are"
    return Unmet(code=NOT_JOINED, text=f"{wanted.gpus} GPUs joined by NVLink are wanted, {most}")


def _met(wanted: Expectations, gpus: Sequence[Gpu], plan: Plan | None) -> str:
    names = dict.fromkeys(gpu.name for gpu in gpus)
    said = [f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(str(gpu.index) for gpu in gpus)} ({', '.join(names)})"]
    if wanted.vram_bytes is not None:
        said.append(f"{format_gib(wanted.vram_bytes)} free{' each' if wanted.gpus > 1 else ''}")
    if wanted.nvlink and wanted.gpus > 1:
        said.append("joined by NVLink")
    if wanted.capability is not None:
        said.append(f"compute capability {_version(wanted.capability)} or later")
    if plan is not None:
        said.append(f"{plan.model} fits")
    return f"Met: {', '.join(said)}."


def _gpus(number: int) -> str:
    return f"{number} GPU{'s are' if number > 1 else ' is'}"


def _version(capability: tuple[int, int] | None) -> str:
    return ".".join(map(str, capability or ("?",)))
