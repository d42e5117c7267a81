"""Models that are loaded already: judge where they lie, and move them where a plan wants them.

torch and accelerate are imported in the functions that need them: whoever has a loaded model has both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from .device_map import MapCheck
from .errors import MapError
from .findings import Finding, Fix
from .machine import Gpu, Machine
from .model import ModelProfile
from .planner.budget import CONTEXT_BYTES
from .planner.map_check import check_placed
from .planner.map_devices import spelled
from .planner.map_names import owner, prefixes
from .planner.map_question import TITLES
from .sources import Collection
from .sources.checkpoint import TORCH_DTYPES, Checkpoint, StoredTensor
from .sources.model_profile import build_profile
from .visibility import visible_gpus
from .workload import Policy, Workload

if TYPE_CHECKING:
    from .placement import Plan

_WORDS = {torch_word: word for word, torch_word in TORCH_DTYPES.items()} | {
    "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL",
}  # fmt: skip
"""torch's word for a dtype to that of safetensors."""
_NO_HOOKS = "VLM626"
_DEFAULT_WORKLOAD = Workload()
_DEFAULT_POLICY = Policy()


def check_model(
    model: Any,
    *,
    machine: Machine | None = None,
    workload: Workload = _DEFAULT_WORKLOAD,
    policy: Policy = _DEFAULT_POLICY,
) -> MapCheck:
    """Judge a loaded transformers model as :func:`vlm_doctor.check_map` judges a map.

    Its real tensors are looked at (names, shapes, dtypes, devices), no files. The map is the model's ``hf_device_map``
    where its tensors are where that says, otherwise the one that its tensors make.

    Args:
        model: Loaded with ``from_pretrained``, dispatched or not.
        machine: ``None`` looks at this one, and counts what this process holds on the GPUs as free: it is the model itself.
        workload: One call of the model, at its largest.
        policy: As for :func:`vlm_doctor.check_map`.

    Raises:
        MapError: It is no transformers model, or has no tensors.
        ModelFileError: Its config lacks what a plan needs.
    """
    profile = profile_of(model)
    device_map, has_moved = _map_of(model)
    if machine is None:
        with Collection(with_torch=False) as collection:
            machine = _without_this_process(collection.without_torch())
    checked = check_placed(device_map, profile, machine, workload, policy, main=_main_of(model))
    extra = []
    if len(set(device_map.values())) > 1 and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        extra.append(_no_hooks(device_map))
    notes = ("Tensors are not where hf_device_map says: the map shown is that of the tensors.",) if has_moved else ()
    return msgspec.structs.replace(
        checked, findings=(*extra, *checked.findings), notes=(*notes, *checked.notes) if notes else checked.notes
    )


def profile_of(model: Any) -> ModelProfile:
    """Describe a loaded model from its own tensors.

    Raises:
        MapError: It is no transformers model.
        ModelFileError: Its config lacks what a plan needs.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or not hasattr(model, "named_parameters"):
        raise MapError(
            f"{type(model).__name__} is no transformers model: it has no config; pass what from_pretrained gave."
        )
    fields = config.to_dict()
    fields.setdefault("architectures", None)
    fields["architectures"] = fields["architectures"] or [type(model).__name__]
    kept = model.state_dict().keys()
    stored = {
        name: StoredTensor(
            _WORDS.get(_word(tensor.dtype), "U8"), tuple(tensor.shape), tensor.numel() * tensor.element_size()
        )
        for name, tensor in _named_tensors(model)
        if name in kept
    }
    if not stored:
        raise MapError(f"{type(model).__name__} has no tensors, so there is nothing to judge.")
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    return build_profile(Checkpoint(fields, stored), name=name, origin="checkpoint")


def _word(dtype: Any) -> str:
    return _WORDS.get(str(dtype).removeprefix("torch."), "U8")


def _named_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers; of tied ones the first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _plain(device: Any) -> int | str:
    """A ``torch.device`` as a map writes it."""
    if device.type == "cuda":
        return device.index or 0
    return str(device.type)


def _map_of(model: Any) -> tuple[dict[str, int | str], bool]:
    """The map that a model follows; and whether its tensors have left ``hf_device_map``."""
    written = {key: _written(value) for key, value in (getattr(model, "hf_device_map", None) or {}).items()}
    real: dict[str, int | str] = {}
    for name, tensor in _named_tensors(model):
        device = _plain(tensor.device)
        key = owner(written, name)
        # Offloaded tensors are on the meta device, and only the map knows where their weights lie.
        real[name] = written[key] if device == "meta" and key is not None else device
    if written and all(real[name] == written[key] for name in real if (key := owner(written, name)) is not None):
        return written, False
    return joined(real), bool(written)


def _main_of(model: Any) -> int | str | None:
    """Where accelerate's hook around the whole model takes what that is given; ``None`` without one."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return None if device is None else spelled(_written(device)).device


def _written(value: Any) -> int | str:
    return value if isinstance(value, (int, str)) else _plain(value)


def joined(devices: Mapping[str, int | str]) -> dict[str, int | str]:
    """The shortest map that puts each tensor where it is: one key for the outermost modules that are on one device."""
    held: dict[str, set[int | str]] = {}
    for name, device in devices.items():
        for path in prefixes(name):
            held.setdefault(path, set()).add(device)
    result: dict[str, int | str] = {}
    for name, device in devices.items():
        parts = name.split(".")
        paths = (".".join(parts[:count]) for count in range(len(parts) + 1))
        result[next(path for path in paths if len(held[path]) == 1)] = device
    return result


def _no_hooks(device_map: Mapping[str, int | str]) -> Finding:
    places = sorted({f"cuda:{device}" if isinstance(device, int) else device for device in device_map.values()})
    return Finding(
        code=_NO_HOOKS,
        severity="error",
        title=TITLES[_NO_HOOKS],
        message=f"The model is on {' and '.join(places)}, and no hook moves what goes from one to the other: the first "
        'call says "Expected all tensors to be on the same device".',
        cause="Its parts were moved by hand, or its hooks were removed.",
        fix=Fix(text="Move it with vlm_doctor.redistribute(model, plan), or load it with a device_map."),
    )


def _without_this_process(machine: Machine) -> Machine:
    """The machine, were this process not on its GPUs: what the model takes must not count against it."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return machine
    visible = visible_gpus(machine).gpus
    own = {
        visible[number]: torch.cuda.memory_reserved(number) + CONTEXT_BYTES
        for number in range(min(len(visible), torch.cuda.device_count()))
        if torch.cuda.memory_reserved(number)
    }

    def freed(gpu: Gpu) -> Gpu:
        listed = sum(process.used_bytes or 0 for process in gpu.processes if process.pid == os.getpid())
        if gpu.index not in own or gpu.memory_free_bytes is None or gpu.memory_total_bytes is None:
            return gpu
        room = gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0)
        free_bytes = min(room, gpu.memory_free_bytes + (listed or own[gpu.index]))
        return msgspec.structs.replace(gpu, memory_free_bytes=max(gpu.memory_free_bytes, free_bytes))

    return msgspec.structs.replace(machine, gpus=tuple(map(freed, machine.gpus)))


class _Move(NamedTuple):
    """One tensor that has to change its device."""

    name: str
    tensor: Any
    target: Any
    size_bytes: int


def redistribute(model: Any, plan: Plan, *, devices: Sequence[Any] | None = None) -> Any:
    """Move a loaded model where a plan wants it, and attach accelerate's hooks anew.

    Tensors move one by one, in an order in which no device ever holds more than the larger of what it held before and will
    hold after, plus the largest tensor. Tied weights stay tied: a parameter is moved, not replaced.

    Args:
        model: Loaded with ``from_pretrained``; in full weights, not offloaded.
        plan: Of :func:`vlm_doctor.plan`, for this model.
        devices: The torch device of each stage; ``None`` finds the GPUs of the plan by their UUID.

    Returns:
        The model itself.

    Raises:
        MapError: It cannot be moved, the plan is not for it, or a GPU of the plan is not there. What is said before
            anything moves leaves the model as it was; when memory runs out on the way, it has to be loaded again.
    """
    import torch
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    _refuse(model, plan)
    places = [torch.device(device) for device in (_devices_of(plan) if devices is None else devices)]
    if len(places) != len(plan.stages):
        raise MapError(f"The plan has {len(plan.stages)} stages and {len(places)} devices were given; give one for each.")
    positions = {key: position for key, position in plan.device_map.items() if isinstance(position, int)}
    targets = _targets(model, positions, places)
    remove_hook_from_submodules(model)
    with torch.no_grad():
        for move in in_safe_order(_moves(model, targets), _held(model)):
            _carry_out(model, move)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    device_map = {key: _plain(places[position]) for key, position in positions.items()}
    if len(set(device_map.values())) > 1:
        skip = getattr(model, "_skip_keys_device_placement", None)
        dispatch_model(model, device_map, main_device=_plain(places[0]), skip_keys=skip)
    model.hf_device_map = device_map
    astray = next((name for name, tensor in _named_tensors(model) if tensor.device != targets[name]), None)
    if astray is not None:
        raise MapError(f"{astray} did not arrive on {targets[astray]}; load the model again with the plan's device_map.")
    return model


def _refuse(model: Any, plan: Plan) -> None:
    """Say why a model cannot be moved, before anything is.

    Raises:
        MapError: One sentence with the reason.
    """
    name = type(model).__name__
    if not plan.fits or not plan.device_map:
        raise MapError(f"The plan for {plan.model} does not fit, so it has no map to follow.")
    if plan.offloaded is not None:
        raise MapError(f"The plan for {plan.model} offloads layers to the CPU; load the model again with its device_map.")
    if not hasattr(model, "named_parameters"):
        raise MapError(f"{name} is no torch module; pass what from_pretrained gave.")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise MapError(
            f"{name} is quantized, and quantized weights are not moved; load it again with the plan's device_map."
        )
    away = next((key for key, tensor in _named_tensors(model) if tensor.device.type == "meta"), None)
    if away is not None:
        raise MapError(f"{away} is offloaded (on the meta device); load the model again with the plan's device_map.")
    modules = dict(model.named_modules())
    tensors = {key for key, _ in _named_tensors(model)}
    unknown = next((key for key in plan.device_map if key not in modules and key not in tensors), None)
    if unknown is not None:
        raise MapError(f"The plan is not for this model: {name} has no module {unknown!r}.")
    uncovered = next((key for key in model.state_dict() if owner(plan.device_map, key) is None), None)
    if uncovered is not None:
        raise MapError(f"The plan is not for this model: it names no device for {uncovered} of {name}.")


def _devices_of(plan: Plan) -> list[Any]:
    """The torch device of each stage, by UUID."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {_uuid(torch.cuda.get_device_properties(number).uuid): number for number in range(count)}
    found = []
    for stage in plan.stages:
        if _uuid(stage.uuid) not in there:
            raise MapError(
                f"The plan wants GPU {stage.gpu} ({stage.uuid}), which this process does not see; make the plan for this "
                "machine, or name the torch device of each stage in devices=[...]."
            )
        found.append(torch.device("cuda", there[_uuid(stage.uuid)]))
    return found


def _uuid(value: Any) -> str:
    return str(value).lower().removeprefix("gpu-")


def _targets(model: Any, positions: Mapping[str, int], places: Sequence[Any]) -> dict[str, Any]:
    """The device of every tensor; a buffer that no key covers goes to the first stage."""
    targets = {}
    for name, _ in _named_tensors(model):
        key = owner(positions, name)
        targets[name] = places[0] if key is None else places[positions[key]]
    return targets


def _held(model: Any) -> dict[Any, int]:
    """Bytes of the model on each device."""
    held: dict[Any, int] = {}
    for _, tensor in _named_tensors(model):
        held[tensor.device] = held.get(tensor.device, 0) + tensor.numel() * tensor.element_size()
    return held


def _moves(model: Any, targets: Mapping[str, Any]) -> list[_Move]:
    return [
        _Move(name, tensor, targets[name], tensor.numel() * tensor.element_size())
        for name, tensor in _named_tensors(model)
        if tensor.device != targets[name]
    ]


def in_safe_order(moves: Sequence[_Move], held: Mapping[Any, int]) -> Iterator[_Move]:
    """Order moves so that no device exceeds max(before, after) by more than one tensor.

    A move is made when its target holds no more than that maximum. There is always such a move: a target above it has more
    to give away than to get, which cannot be true of all targets at once, since every tensor given away is got by one.
    """
    now = dict(held)
    after = dict(held)
    for move in moves:
        after[move.tensor.device] -= move.size_bytes
        after[move.target] = after.get(move.target, 0) + move.size_bytes
    most = {device: max(now.get(device, 0), after[device]) for device in after}
    waiting = list(moves)
    while waiting:
        move = next(move for move in waiting if now.get(move.target, 0) <= most[move.target])
        waiting.remove(move)
        now[move.tensor.device] -= move.size_bytes
        now[move.target] = now.get(move.target, 0) + move.size_bytes
        yield move


def _carry_out(model: Any, move: _Move) -> None:
    """Move one tensor: a parameter keeps its identity, so that what is tied to it moves with it."""
    try:
        moved = move.tensor.to(move.target)
        if move.tensor.grad is not None:
            gradient = move.tensor.grad.to(move.target)
            move.tensor.grad = None
        else:
            gradient = None
    except RuntimeError as error:
        raise MapError(
            f"{move.name} could not be moved to {move.target} ({str(error)[:120]}); the model lies in two layouts now, so "
            "load it again with the plan's device_map."
        ) from error
    path, _, last = move.name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._parameters:
        move.tensor.data = moved
        move.tensor.grad = gradient
        return
    for other in model.modules():
        for name, buffer in other._buffers.items():
            if buffer is move.tensor:
                other._buffers[name] = moved
