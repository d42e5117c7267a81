"""What a model looks like, cheaply enough to look after every test: settings of modules, tensors, samples of their values.

One walk over the modules in Python, then one batch of samples from all tensors and one transfer a device. Nothing here
refers to a tensor afterwards, so that a fingerprint keeps no memory alive.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLES = 4
"""Elements of each tensor that are compared. Every tensor is sampled: an optimizer step changes nearly every element, a
layer that was zeroed or merged all of its own, so a few of each find what many of some would miss."""
SEED = 0
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PROCESSOR_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "chat_template", "pad_token", "eos_token")
"""Of a tokenizer. What calls change by themselves (the padding of the backend) is not among them."""
_CONFIGS = ("config", "generation_config")
_ABSENT = object()
_SIMPLE = (str, int, float, bool, type(None))


class TensorState(NamedTuple):
    """A parameter or persistent buffer, without its values."""

    dtype: Any
    device: Any
    shape: tuple[int, ...]
    address: int
    """Of its memory: another one means another tensor in its place."""
    requires_grad: bool
    has_grad: bool


@dataclass
class Fingerprint:
    """A model at one moment; two are compared with :func:`changes`."""

    training: dict[str, bool] = field(default_factory=dict)
    """Module path to its training flag."""
    hooks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """``path.kind`` to the ids of hooks registered there; only where there are any."""
    tensors: dict[str, TensorState] = field(default_factory=dict)
    samples: dict[str, bytes] = field(default_factory=dict)
    """Tensor path to sampled elements, as bytes (NaN equals NaN); tensors whose type cannot be sampled are left out."""
    settings: dict[str, object] = field(default_factory=dict)
    """``config.key`` and settings of the processor to their values; what is not plain as a tuple of its text."""


class Changes(NamedTuple):
    """How a model differs from what it was."""

    texts: tuple[str, ...]
    """For people, such as ``training mode of 212 modules (model.visual, …)``."""
    is_restorable: bool
    """True when :func:`restore` can undo all of it; False when the model has to be loaded again."""


def take(model: Any, processor: Any = None) -> Fingerprint | None:
    """Look at a model.

    Args:
        model: A ``torch.nn.Module``; anything else is not looked at.
        processor: Its processor, if it has one.

    Returns:
        ``None`` where there is no module to look at. Torch is not imported for that.

    Raises:
        RuntimeError: A GPU does not answer any more (a CUDA error of the test before).
    """
    torch = torch_of(model)
    if torch is None:
        return None
    found = Fingerprint()
    tensors: dict[str, Any] = {}
    for path, module in _modules(model):
        own = vars(module)
        found.training[path] = own["training"]
        for kind in _HOOKS:
            if own.get(kind):
                registered = tuple(key for key, hook in own[kind].items() if _is_of_a_test(hook))
                if registered:
                    found.hooks[f"{path}.{kind}"] = registered
        prefix = f"{path}." if path else ""
        for name, tensor in own["_parameters"].items():
            if tensor is not None:
                tensors[prefix + name] = tensor
        for name, tensor in own["_buffers"].items():
            if tensor is not None and name not in own["_non_persistent_buffers_set"]:
                tensors[prefix + name] = tensor
    found.tensors = {name: _state(tensor) for name, tensor in tensors.items()}
    found.samples = _sample(torch, tensors)
    for name in _CONFIGS:
        _flatten(name, getattr(model, name, None), found.settings)
    if processor is not None:
        found.settings.update(_processor_settings(processor))
    return found


def torch_of(model: Any) -> Any:
    """The module torch where a model is one of its modules, else ``None``. Torch is not imported for that."""
    torch: Any = sys.modules.get("torch")
    return torch if torch is not None and isinstance(model, torch.nn.Module) else None


def changes(before: Fingerprint, after: Fingerprint) -> Changes:
    """Compare two looks at one model; no texts when nothing changed."""
    texts: list[str] = []
    is_restorable = True
    modules = _differing(before.training, after.training)
    added = [path for path in modules if path not in before.training or path not in after.training]
    if added:
        is_restorable = False
        texts.append(f"modules added or removed ({_some(added)})")
    flipped = [path for path in modules if path not in added]
    if flipped:
        mode = "training" if after.training[flipped[0]] else "evaluation"
        texts.append(f"{mode} mode of {_count(flipped, 'module')}")
    hooks = _differing(before.hooks, after.hooks)
    if hooks:
        is_restorable = is_restorable and all(
            set(before.hooks.get(key, ())) <= set(after.hooks.get(key, ())) for key in hooks
        )
        texts.append(f"hooks of {_count([key.rpartition('.')[0] for key in hooks], 'module')}")
    for text, can_be_undone in _tensor_changes(before, after):
        texts.append(text)
        is_restorable = is_restorable and can_be_undone
    settings = _differing(before.settings, after.settings)
    if settings:
        is_restorable = is_restorable and all(_is_plain(before.settings.get(key)) for key in settings)
        shown = [f"{key}{_told(after.settings, key, ' = ')}, was{_told(before.settings, key, ' ')}" for key in settings[:3]]
        more = f" and {len(settings) - 3} more" if len(settings) > 3 else ""
        texts.append(f"settings ({'; '.join(shown)}{more})")
    return Changes(tuple(texts), is_restorable)


def restore(model: Any, processor: Any, before: Fingerprint) -> None:
    """Undo restorable changes: training flags, ``requires_grad``, gradients, added hooks, plain settings."""
    for path, module in model.named_modules():
        module.training = before.training.get(path, module.training)
        for kind in _HOOKS:
            kept = before.hooks.get(f"{path}.{kind}", ())
            registered = getattr(module, kind, None) or {}
            for key in [key for key, hook in registered.items() if key not in kept and _is_of_a_test(hook)]:
                del registered[key]
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            state = before.tensors.get(prefix + name)
            if parameter is None or state is None:
                continue
            parameter.requires_grad_(state.requires_grad)
            if not state.has_grad:
                parameter.grad = None
    now: dict[str, object] = {}
    for name in _CONFIGS:
        _flatten(name, getattr(model, name, None), now)
    if processor is not None:
        now.update(_processor_settings(processor))
    for key in _differing(before.settings, now):
        _put_back(model, processor, key, before.settings.get(key, _ABSENT))


def _tensor_changes(before: Fingerprint, after: Fingerprint) -> list[tuple[str, bool]]:
    """Text and whether it can be undone, for each kind of change of tensors."""
    names = _differing(before.tensors, after.tensors)
    parts: dict[str, list[str]] = {}
    for name in names:
        old, new = before.tensors.get(name), after.tensors.get(name)
        if old is None or new is None:
            parts.setdefault("tensors added or removed", []).append(name)
            continue
        if old.requires_grad != new.requires_grad:
            parts.setdefault(f"requires_grad={new.requires_grad}", []).append(name)
        if old.has_grad != new.has_grad:
            parts.setdefault("gradients left on" if new.has_grad else "gradients taken from", []).append(name)
        if old.dtype != new.dtype:
            parts.setdefault(f"dtype {new.dtype} (was {old.dtype})", []).append(name)
        elif old.device != new.device:
            parts.setdefault(f"moved to {new.device} (was {old.device})", []).append(name)
        elif old.shape != new.shape:
            parts.setdefault("shape", []).append(name)
        elif old.address != new.address:
            parts.setdefault("replaced by another tensor", []).append(name)
    values = [
        name
        for name in _differing(before.samples, after.samples)
        if name in before.samples and name in after.samples and _is_comparable(before, after, name)
    ]
    if values:
        parts["values"] = values
    restorable = ("requires_grad", "gradients left")
    return [(f"{kind}: {_count(found, 'tensor')}", kind.startswith(restorable)) for kind, found in parts.items()]


def _is_comparable(before: Fingerprint, after: Fingerprint, name: str) -> bool:
    """False where another change of the same tensor already tells."""
    old, new = before.tensors[name], after.tensors[name]
    return (old.dtype, old.device, old.shape) == (new.dtype, new.device, new.shape)


def _is_of_a_test(hook: Any) -> bool:
    """False for hooks that transformers registers by itself at the first call that wants hidden states."""
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return not module.startswith("transformers.")


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    """As ``named_modules``, each module once, without its generators within generators."""
    seen = {id(model)}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        yield path, module
        children = [
            (f"{path}.{name}" if path else name, child)
            for name, child in vars(module)["_modules"].items()
            if child is not None and id(child) not in seen
        ]
        seen.update(id(child) for _, child in children)
        waiting += reversed(children)


def _state(tensor: Any) -> TensorState:
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        address = 0  # a tensor without memory of its own, as quantized subclasses are
    return TensorState(
        tensor.dtype, tensor.device, tuple(tensor.shape), address, tensor.requires_grad, tensor.grad is not None
    )


def _sample(torch: Any, tensors: dict[str, Any]) -> dict[str, bytes]:
    """A few elements of every tensor, gathered by one kernel and one copy for each device and type."""
    chance = random.Random(SEED)
    groups: dict[tuple[Any, Any], list[tuple[str, Any]]] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            draw = chance.random()
            size = tensor.numel()
            if not size or tensor.is_meta:
                continue
            count = min(SAMPLES, size)
            step = size // count
            try:
                view = tensor.as_strided((count,), (step,), tensor.storage_offset() + int(draw * step))
            except (NotImplementedError, RuntimeError):
                continue  # a tensor subclass (quantized weights) without storage of its own
            groups.setdefault((tensor.device, tensor.dtype), []).append((name, view))
        found: dict[str, bytes] = {}
        for members in groups.values():
            data, position = _bytes(torch, [view for _, view in members]), 0
            width = members[0][1].element_size()
            for name, view in members:
                end = position + width * view.shape[0]
                found[name] = data[position:end]
                position = end
    return found


def _bytes(torch: Any, views: list[Any]) -> bytes:
    """The elements of tensors of one device and type, one after the other."""
    try:
        joined = torch.cat(views)
    except (NotImplementedError, RuntimeError) as error:
        if "CUDA error" in str(error):
            raise
        # A type that has no such kernel, as 8-bit floats on some devices: its bits have.
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        joined = torch.cat([view.view(integers[view.element_size()]) for view in views])
    return bytes(joined.contiguous().view(torch.uint8).cpu().tolist())


def _flatten(path: str, value: Any, into: dict[str, object]) -> None:
    """Settings of a config and the configs in it, as plain values by path."""
    if value is None:
        return
    for key, item in vars(value).items() if hasattr(value, "__dict__") else ():
        place = f"{path}.{key}"
        if isinstance(item, _SIMPLE):
            into[place] = item
        elif hasattr(item, "to_dict"):
            _flatten(place, item, into)
        else:
            into[place] = (repr(item),) if isinstance(item, (list, tuple, dict, set)) else (type(item).__name__,)


def _processor_settings(processor: Any) -> dict[str, object]:
    found: dict[str, object] = {}
    tokenizer = getattr(processor, "tokenizer", processor)
    for name in _PROCESSOR_SETTINGS:
        value = getattr(tokenizer, name, None)
        if isinstance(value, _SIMPLE):
            found[f"tokenizer.{name}"] = value
    if hasattr(tokenizer, "__len__"):
        found["vocabulary"] = (len(tokenizer),)
    image_processor = getattr(processor, "image_processor", None)
    for name, value in vars(image_processor).items() if hasattr(image_processor, "__dict__") else ():
        if isinstance(value, _SIMPLE):
            found[f"image_processor.{name}"] = value
        elif isinstance(value, (list, tuple, dict)):
            found[f"image_processor.{name}"] = (repr(value),)
    return found


def _put_back(model: Any, processor: Any, key: str, value: object) -> None:
    """Set one plain setting by its path."""
    first, *path, last = key.split(".")
    owner = getattr(model, first) if first in _CONFIGS else getattr(processor, first, processor)
    for name in path:
        owner = getattr(owner, name)
    if value is _ABSENT:
        vars(owner).pop(last, None)
    elif last in vars(owner):
        # A config's own setter may do more than store it; what was found in vars() goes back there.
        vars(owner)[last] = value
    else:
        setattr(owner, last, value)


def _is_plain(value: object) -> bool:
    return isinstance(value, _SIMPLE)


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    if before == after:
        return []
    return [key for key in {**before, **after} if before.get(key, _ABSENT) != after.get(key, _ABSENT)]


def _told(settings: dict[str, object], key: str, between: str) -> str:
    return f"{between}{_short(settings[key])}" if key in settings else " not set"


def _short(value: object) -> str:
    # What is not plain is kept as its text, which is never put back.
    text = str(value[0]) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _some(names: list[str]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:2])
    return shown if len(names) <= 2 else f"{shown}, …"


def _count(names: list[str], word: str) -> str:
    return f"{len(names)} {word}{'s' * (len(names) > 1)} ({_some(names)})"
