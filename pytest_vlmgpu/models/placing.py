"""Where the plan wants each weight, in the ordinals of this process, and whether it is there. Pure: no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vlm_doctor.units import format_gib

from .failures import LoadFailure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vlm_doctor.placement import Plan

_SHOWN = 3
"""Offenders named in a message; the rest are counted."""
_WITHOUT_GPU = ("cpu", "disk", "meta")


class Placed(NamedTuple):
    """A part of a loaded model: a parameter, a buffer or a module."""

    name: str
    device: str
    """torch's word: ``cuda:0``, ``cpu``, ``disk``, ``meta``."""
    size_bytes: int = 0


def device_map_for(plan: Plan, ordinals: Mapping[str, int]) -> dict[str, int]:
    """The plan's ``device_map`` in the ordinals of this process.

    Args:
        plan: Its map counts positions in ``plan.cuda_visible_devices``, which are the positions of its stages.
        ordinals: GPU UUID to CUDA ordinal.

    Returns:
        Module path to CUDA ordinal, integers only: with strings, accelerate's choice of the main device depends on the
        hash seed. ``{"": ordinal}`` when one GPU takes it all, which needs no hooks.

    Raises:
        LoadFailure: VLM712, when a GPU of the plan is not among ``ordinals``; VLM714, when the plan leaves part of
            the model in host memory.
    """
    if plan.offloaded is not None:
        raise LoadFailure(
            "VLM714",
            f"The plan leaves {format_gib(plan.offloaded.weights_bytes)} of {plan.model} on the CPU "
            f"({plan.offloaded.keys[0]} and what follows), and a test on GPUs must not run there: plan without offload, "
            "with more GPUs or a smaller workload.",
        )
    positions = {}
    for position, stage in enumerate(plan.stages):
        if stage.uuid not in ordinals:
            seen = ", ".join(ordinals) or "none"
            raise LoadFailure(
                "VLM712",
                f"torch does not see GPU {stage.gpu} ({stage.uuid}), where the plan puts part of {plan.model}; it sees "
                f"{seen}: check CUDA_VISIBLE_DEVICES of this process, or run vlm-doctor.",
            )
        positions[position] = ordinals[stage.uuid]
    if len(plan.stages) == 1:
        return {"": positions[0]}
    return {key: positions[position] for key, position in plan.device_map.items() if isinstance(position, int)}


def check_placement(name: str, parts: Iterable[Placed], device_map: Mapping[str, int]) -> None:
    """Compare where the parts of a model are with where the plan wants them.

    Args:
        name: The model, for the message.
        parts: Its parameters and buffers, or the modules of ``model.hf_device_map``.
        device_map: Module path to CUDA ordinal; the longest key that covers a part counts, and ``""`` covers all. An empty
            map means that the model was loaded for the CPU.

    Raises:
        LoadFailure: VLM714 when a part is on the CPU, on disk or has no data (meta) although the plan names a GPU; VLM716
            when it is on another GPU than planned, or covered by no key.
    """
    fallen: list[Placed] = []
    astray: list[Placed] = []
    for part in parts:
        if part.device != _planned(part.name, device_map):
            (fallen if part.device in _WITHOUT_GPU else astray).append(part)
    if fallen:
        raise LoadFailure(
            "VLM714",
            f"{_offenders(name, fallen, device_map)}: a GPU had too little free memory for its part of the plan, or "
            "something moved the model after loading; run vlm-doctor to see who holds memory, then plan again.",
        )
    if astray:
        raise LoadFailure(
            "VLM716",
            f"{_offenders(name, astray, device_map)}: give the plan's device_map to the loader unchanged, or plan again "
            "with the transformers version that loads the model.",
        )


def _planned(name: str, device_map: Mapping[str, int]) -> str:
    """Device of the longest key that is the part's name or a parent of it."""
    path = name
    while path not in device_map:
        if not path:
            return "nowhere" if device_map else "cpu"
        path = path.rpartition(".")[0]
    return f"cuda:{device_map[path]}"


def _offenders(name: str, parts: Sequence[Placed], device_map: Mapping[str, int]) -> str:
    shown = [
        f"{part.name or 'all'} is on {part.device}, planned {_planned(part.name, device_map)}" for part in parts[:_SHOWN]
    ]
    if len(parts) > _SHOWN:
        shown.append(f"and {len(parts) - _SHOWN} more")
    size_bytes = sum(part.size_bytes for part in parts)
    count = f"{len(parts)} parts" if len(parts) > 1 else "1 part"
    size = f", {format_gib(size_bytes)}," if size_bytes else ""
    return f"{count} of {name}{size} landed elsewhere than planned ({'; '.join(shown)})"
