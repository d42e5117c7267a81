"""Where the plan wants each weight, in the ordinals of this process, and whether it is there. Pure: no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vlm_doctor.planner.map_names import owner
from vlm_doctor.units import format_gib

from ..wording import first, plural
from .failures import LoadFailure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vlm_doctor.machine import Gpu
    from vlm_doctor.placement import Plan, Stage

_SHOWN = 3
"""Offenders named in a message; the rest are counted."""
_WITHOUT_GPU = ("cpu", "disk", "meta")


class Placed(NamedTuple):
    """A part of a loaded model: a parameter, a buffer or a module."""

    name: str
    device: str
    """torch's word: ``cuda:0``, ``cpu``, ``disk``, ``meta``."""
    size_bytes: int = 0


class Orders(NamedTuple):
    """How a model is to be placed while it is loaded."""

    device_map: dict[str, int | str] | str = {}  # noqa: RUF012 - a NamedTuple's default, which nobody writes into
    """For ``from_pretrained``: a map, or transformers' own ``auto`` or ``balanced``; empty for the CPU."""
    max_memory: dict[int | str, int] | None = None
    """Device to bytes, where transformers' own choice is not to be among all GPUs that torch sees."""
    may_offload: bool = False
    """Part of the model may stay in host memory."""
    gpus: Mapping[int, Gpu] = {}
    """CUDA ordinal to the GPU, of those among which transformers may choose."""


def device_map_for(plan: Plan, ordinals: Mapping[str, int], *, may_offload: bool = False) -> dict[str, int | str]:
    """The plan's ``device_map`` in the ordinals of this process.

    Args:
        plan: Its map counts positions in ``plan.cuda_visible_devices``, which are the positions of its stages.
        ordinals: GPU UUID to CUDA ordinal.
        may_offload: Part of the model may stay in host memory, as the plan says.

    Returns:
        Module path to CUDA ordinal, as an integer: with text, accelerate's choice of the main device depends on the hash
        seed. ``cpu`` for what is offloaded. ``{"": ordinal}`` when one GPU takes it all, which needs no hooks.

    Raises:
        LoadFailure: VLM712, when a GPU of the plan is not among ``ordinals``; VLM714, when the plan leaves part of
            the model in host memory.
    """
    if plan.offloaded is not None and not may_offload:
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
    if len(plan.stages) == 1 and plan.offloaded is None:
        return {"": positions[0]}
    return {key: positions[at] if isinstance(at, int) else at for key, at in plan.device_map.items()}


def ordinals_in(device_map: Mapping[str, object] | None) -> list[int]:
    """CUDA ordinals of a map, each once, in its order; what is on the CPU or on disk is left out."""
    return list(dict.fromkeys(device for device in (device_map or {}).values() if isinstance(device, int)))


def check_placement(name: str, parts: Iterable[Placed], device_map: Mapping[str, int | str]) -> None:
    """Compare where the parts of a model are with where the plan wants them.

    Args:
        name: The model, for the message.
        parts: Its parameters and buffers, or the modules of ``model.hf_device_map``.
        device_map: Module path to CUDA ordinal, or to ``cpu`` or ``disk``; the longest key that covers a part counts, and
            ``""`` covers all. An empty map means that the model was loaded for the CPU.

    Raises:
        LoadFailure: VLM714 when a part is on the CPU, on disk or has no data (meta) although the plan names a GPU; VLM716
            when it is on another GPU than planned, or covered by no key.
    """
    fallen: list[Placed] = []
    astray: list[Placed] = []
    for part in parts:
        planned = _planned(part.name, device_map)
        # accelerate keeps the weights of an offloaded module apart, and leaves tensors without data in it.
        is_offloaded = bool(device_map) and planned in _WITHOUT_GPU and part.device in _WITHOUT_GPU
        if part.device != planned and not is_offloaded:
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


def check_automatic(name: str, how: str, parts: Iterable[Placed], *, may_offload: bool) -> None:
    """Hold what transformers has placed itself to the GPUs.

    Args:
        name: The model, for the message.
        how: The ``device_map`` that it was given, ``auto`` or ``balanced``.
        parts: As for :func:`check_placement`.
        may_offload: Part of the model may be on the CPU or on disk.

    Raises:
        LoadFailure: VLM714.
    """
    fallen = [] if may_offload else [part for part in parts if part.device in _WITHOUT_GPU]
    if fallen:
        shown = first([f"{part.name or 'all'} is on {part.device}" for part in fallen], _SHOWN)
        raise LoadFailure(
            "VLM714",
            f'device_map="{how}" has put {_amount(fallen)} of {name} off the GPUs ({"; ".join(shown)}): run vlm-doctor to '
            'see who holds memory, let the planner place the model (device_map="doctor"), or allow it with '
            "--vlm-allow-offload.",
        )


def stages_of(device_map: Mapping[str, int | str], gpus: Mapping[int, Gpu]) -> tuple[Stage, ...]:
    """The GPUs of a model that transformers has placed, with the keys of its map there and no ledger."""
    from vlm_doctor.placement import Stage

    return tuple(
        Stage(
            gpu=gpus[ordinal].index,
            uuid=gpus[ordinal].uuid,
            name=gpus[ordinal].name,
            keys=tuple(key for key, device in device_map.items() if device == ordinal),
            ledger=(),
            total_bytes=0,
        )
        for ordinal in ordinals_in(device_map)
        if ordinal in gpus
    )


def offloaded_bytes(parts: Iterable[Placed], device_map: Mapping[str, int | str]) -> int:
    """What of a loaded model is in host memory or on disk, where its map says so."""
    return sum(part.size_bytes for part in parts if device_map and _planned(part.name, device_map) in _WITHOUT_GPU)


def _planned(name: str, device_map: Mapping[str, int | str]) -> str:
    """Device of the longest key that is the part's name or a parent of it."""
    key = owner(device_map, name)
    if key is None:
        return "nowhere" if device_map else "cpu"
    device = device_map[key]
    return f"cuda:{device}" if isinstance(device, int) else device


def _offenders(name: str, parts: Sequence[Placed], device_map: Mapping[str, int | str]) -> str:
    found = [f"{part.name or 'all'} is on {part.device}, planned {_planned(part.name, device_map)}" for part in parts]
    shown, count, size = first(found, _SHOWN), plural(len(parts), "part"), _size(parts)
    return f"{count} of {name}{f', {size},' if size else ''} landed elsewhere than planned ({'; '.join(shown)})"


def _amount(parts: Sequence[Placed]) -> str:
    size = _size(parts)
    count = plural(len(parts), "part")
    return f"{count} ({size})" if size else count


def _size(parts: Sequence[Placed]) -> str:
    size_bytes = sum(part.size_bytes for part in parts)
    return format_gib(size_bytes) if size_bytes else ""
