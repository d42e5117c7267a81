"""MIG slices as GPUs of their own, with their UUID, memory and lease. Pure.

CUDA shows a process one slice, and no whole GPU beside it (NVIDIA MIG user guide, "CUDA Device Enumeration"). So what is
one GPU to the driver is as many to a run as it has slices: each process of it uses one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from vlm_doctor.machine import Gap, Gpu, Machine, TorchView

PREFIX = "MIG-"
ONE_A_PROCESS = "a process sees one MIG slice, and no GPU beside it"
_WHOSE = "the driver names the processes of a GPU, and not on which of its slices they are"
_COUNTED_ALONE = "torch counts the one MIG slice that a process sees"
_GPU_PATH = re.compile(r"gpus\[(\d+)\](?:\.mig_devices\[(\d+)\])?")


def is_slice(gpu: Gpu) -> bool:
    """True for a slice that :func:`unfold` made a GPU of."""
    return gpu.uuid.startswith(PREFIX)


def has_slices(machine: Machine, indices: Collection[int]) -> bool:
    """True when any of these GPUs of a machine is a slice."""
    return any(is_slice(gpu) for gpu in machine.gpus if gpu.index in indices)


def unfold(machine: Machine) -> Machine:
    """The same machine with each MIG slice in the place of a GPU; the machine itself, where there is none.

    The first slice of a GPU keeps its index, others are counted behind the last GPU. CUDA_VISIBLE_DEVICES is translated, so
    that it shows the slices that it names, or all those of the GPUs that it names.
    """
    if not any(map(_is_sliced, machine.gpus)):
        return machine
    from msgspec.structs import replace

    from vlm_doctor.visibility import VARIABLE, visible_gpus

    following = max(gpu.index for gpu in machine.gpus) + 1
    gpus: list[Gpu] = []
    units: dict[int, list[Gpu]] = {}
    for gpu in machine.gpus:
        units[gpu.index] = _units(gpu, following) if _is_sliced(gpu) else [gpu]
        following += len(units[gpu.index]) - 1
        gpus += units[gpu.index]
    whole = replace(
        machine,
        gpus=tuple(gpus),
        links=tuple(link for link in machine.links if not any(map(is_slice, (*units[link.a], *units[link.b])))),
        gaps=_gaps(machine, gpus, units),
        torch=_without_count(machine.torch),
        environment={name: value for name, value in machine.environment.items() if name != VARIABLE},
    )
    value = machine.environment.get(VARIABLE)
    if value is None:
        return whole
    order = visible_gpus(whole).gpus
    shown = ",".join(str(order.index(index)) for index in _shown(value, machine, units) if index in order)
    # A number that CUDA refuses could be that of a slice here.
    refused = f"no GPU {value}" if value[:1].isdigit() else value
    return replace(whole, environment={**whole.environment, VARIABLE: shown or refused})


def _is_sliced(gpu: Gpu) -> bool:
    return bool(gpu.mig_enabled and any(part.uuid for part in gpu.mig_devices))


def _units(gpu: Gpu, following: int) -> list[Gpu]:
    from msgspec.structs import replace

    named = [part for part in gpu.mig_devices if part.uuid]
    return [
        replace(
            gpu,
            index=gpu.index if number == 0 else following + number - 1,
            uuid=part.uuid,
            name=part.name or f"slice of {gpu.name}",
            memory_total_bytes=part.memory_total_bytes,
            memory_free_bytes=part.memory_free_bytes,
            memory_used_bytes=None,
            memory_reserved_bytes=None,
            mig_enabled=False,
            mig_pending=False,
            mig_devices=(),
            nvlinks=(),
            # On which slice they are is not known where there are several.
            processes=gpu.processes if len(named) == 1 else (),
        )
        for number, part in enumerate(named)
    ]


def _gaps(machine: Machine, gpus: Sequence[Gpu], units: Mapping[int, Sequence[Gpu]]) -> tuple[Gap, ...]:
    """What could not be read, at the places that the GPUs have now."""
    from msgspec.structs import replace

    from vlm_doctor.machine import Gap

    place = {gpu.index: position for position, gpu in enumerate(gpus)}
    gaps = [Gap(path=f"gpus[{place[unit.index]}].processes", reason=_WHOSE) for own in units.values() for unit in own[1:]]
    gaps += [Gap(path=f"gpus[{place[own[0].index]}].processes", reason=_WHOSE) for own in units.values() if len(own) > 1]
    for gap in machine.gaps:
        match = _GPU_PATH.match(gap.path)
        own = units[machine.gpus[int(match[1])].index] if match and int(match[1]) < len(machine.gpus) else ()
        number = int(match[2] or 0) if match else 0
        path = f"gpus[{place[own[number].index]}]{gap.path[match.end() :]}" if match and number < len(own) else gap.path
        gaps.append(replace(gap, path=path))
    return tuple(gaps)


def _without_count(torch: TorchView) -> TorchView:
    """Of several slices torch counts one: no reason to miss the others."""
    from vlm_doctor.machine import TorchView

    return TorchView(state="not_asked", message=_COUNTED_ALONE) if torch.state == "ok" and torch.device_count else torch


def _only_slice(entry: str, machine: Machine, units: Mapping[int, Sequence[Gpu]]) -> list[int]:
    """``MIG-GPU-UUID/1/0``, as drivers before 470 named slices: the numbers are not read, and of one are not needed."""
    parent = entry.removeprefix(PREFIX).partition("/")[0]
    found = [units[gpu.index] for gpu in machine.gpus if gpu.uuid == parent]
    return [found[0][0].index] if found and len(found[0]) == 1 else []


def _shown(value: str, machine: Machine, units: Mapping[int, Sequence[Gpu]]) -> list[int]:
    """Indices of what CUDA_VISIBLE_DEVICES names: slices, or all slices of GPUs."""
    if not value.startswith(PREFIX):
        from vlm_doctor.visibility import visible_gpus

        return [unit.index for index in visible_gpus(machine).gpus for unit in units[index]]
    slices = [unit for own in units.values() for unit in own if is_slice(unit)]
    shown: list[int] = []
    for entry in value.split(",")[: len(slices)]:
        # A launcher that gives a job several slices names them all, though one process sees the first alone.
        found = [unit.index for unit in slices if unit.uuid.startswith(entry)] or _only_slice(entry, machine, units)
        if len(found) != 1 or found[0] in shown:
            break
        shown += found
    return shown
