"""Count the memory of a forward pass without a GPU, and hold the planner's figures against it.

The true-size model of the installed transformers runs its real code, but no floating-point arithmetic: an operation's
result is shaped by a dry run on the meta device and then allocated, unwritten, on the CPU, where untouched pages cost
nothing. Integer and boolean tensors are computed, since vision towers read them. Two things are as on a GPU and not as on
the CPU: fused attention holds its output and row statistics (and a mask's additive copy, twice when the rows of the mask
are not aligned), and a softmax in float32 of float16 scores (of those alone) makes no copy of them first.

    python benchmarks/trace_memory.py [NAME ...]

prints, for each model and input, traced and predicted peak in GiB (weights included) and predicted over traced. Needs torch
and transformers (5.23 for the figures in tests/doctor/planner/test_traced.py), 24 GiB of virtual memory and up, and no GPU.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from traced_models import CONFIGS, config_of, image_inputs, text_inputs

from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile
from vlm_doctor.workload import Workload

GIB = 2**30
BEFORE = -1
"""Place of what happens before the first layer."""


@dataclass
class Event:
    """A storage comes to life, or (``size_bytes`` 0) ends."""

    storage: int
    size_bytes: int
    place: int
    """The layer at work; ``BEFORE`` the first, or the number of layers behind the last."""


@dataclass
class Trace:
    """All events of one forward pass."""

    events: list[Event] = field(default_factory=list)
    layers: int = 0

    def peak_bytes(self, first: int = BEFORE, end: int | None = None) -> int:
        """Most bytes alive at once, of storages made at places from ``first`` up to, not including, ``end``."""
        end = self.layers + 1 if end is None else end
        alive: dict[int, int] = {}
        now = most = 0
        for event in self.events:
            if event.size_bytes:
                if first <= event.place < end:
                    alive[event.storage] = -(-event.size_bytes // 512) * 512
                    now += alive[event.storage]
                    most = max(most, now)
            else:
                now -= alive.pop(event.storage, 0)
        return most


class Recorder(TorchDispatchMode):
    """Replaces arithmetic by allocation, and notes every storage that comes and goes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.place = BEFORE
        self._known: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()._cdata] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, kwargs or {})
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return result

    def note(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        number = len(self.trace.events)
        self._known[key] = number
        self.trace.events.append(Event(number, storage.nbytes(), self.place))
        weakref.finalize(storage, self._end, key, number)

    def _end(self, key: int, number: int) -> None:
        self._known.pop(key, None)
        self.trace.events.append(Event(number, 0, 0))

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        changed = [
            args[position]
            for position, argument in enumerate(func._schema.arguments[: len(args)])
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if changed:
            is_float = isinstance(changed[0], torch.Tensor) and changed[0].is_floating_point()
            return changed[0] if is_float else func(*args, **kwargs)
        inputs: dict[int, torch.Tensor] = {}

        def shape_of(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("meta")
            if not isinstance(value, torch.Tensor):
                return value
            like = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
            inputs[like.untyped_storage()._cdata] = like
            return like

        try:
            shapes = func(*tree_map(shape_of, args), **tree_map(shape_of, kwargs))
        except (RuntimeError, NotImplementedError):
            return func(*args, **kwargs)  # depends on data
        outputs = [value for value in tree_flatten(shapes)[0] if isinstance(value, torch.Tensor)]
        is_view = any(value.untyped_storage()._cdata in inputs for value in outputs)
        if is_view or not outputs or not all(value.is_floating_point() for value in outputs):
            return func(*args, **kwargs)
        return tree_map(
            lambda value: (
                torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
                if isinstance(value, torch.Tensor)
                else value
            ),
            shapes,
        )


class AsOnGpu(TorchFunctionMode):
    """Attention and softmax hold what their CUDA kernels hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        # Source: softmax in aten/src/ATen/native/SoftMax.cpp.
        if func is torch.nn.functional.softmax and kwargs.get("dtype") is not None and args[0].dtype == torch.float16:
            return torch.empty(args[0].shape, dtype=kwargs["dtype"])
        return func(*args, **kwargs)

    @staticmethod
    def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:  # noqa: ARG004
        held = []
        if attn_mask is not None:
            # Source: convert_boolean_attn_mask and preprocess_mask (8 elements) of aten/native/transformers/attention.cpp.
            if attn_mask.dtype == torch.bool:
                held.append(torch.empty(attn_mask.shape, dtype=query.dtype))
            if attn_mask.shape[-1] % 8:
                held.append(torch.empty(attn_mask.shape, dtype=query.dtype))
        batch, heads, tokens, _ = query.shape
        held.append(torch.empty(batch, heads, tokens, dtype=torch.float32))
        return torch.empty(batch, tokens, heads, value.shape[-1], dtype=query.dtype).transpose(1, 2)


def trace(model: torch.nn.Module, inputs: dict[str, Any], **options: Any) -> Trace:
    """Run a forward pass and count; the layers of the text body mark the places."""
    layers = model.get_submodule(
        "model.language_model.layers" if "model.language_model" in _names(model) else "model.text_model.layers"
    )
    recorder = Recorder(model)

    def arrive(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            recorder.place = number

        return hook

    handles = [layer.register_forward_pre_hook(arrive(number)) for number, layer in enumerate(layers)]
    handles.append(layers[-1].register_forward_hook(arrive(len(layers))))
    with torch.no_grad(), recorder, AsOnGpu():
        for value in inputs.values():
            recorder.note(value)
        output = model(**inputs, use_cache=True, **options)
    del output
    for handle in handles:
        handle.remove()
    recorder.trace.layers = len(layers)
    return recorder.trace


def _names(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def build(config: Any, attention: str) -> Any:
    """The model with unwritten weights in bfloat16."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    model.to_empty(device="cpu")
    model.tie_weights()
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            buffer.zero_()
    return model.eval()


def profile_of(model: Any) -> ModelProfile:
    """The planner's view of a model: config, names and shapes."""
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.named_parameters():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = StoredTensor("BF16", tuple(tensor.shape), 2 * tensor.numel())
    return build_profile(Checkpoint(config, tensors), name=config["model_type"], origin="checkpoint")


@dataclass
class Case:
    """One input of one model."""

    text: int
    batch: int = 1
    edge: int = 0
    """Pixels along each side of the image; 0 for none."""
    attention: str = "sdpa"
    logits: str = "generate"


TEXT_CASES = (
    Case(1024),
    Case(4096),
    Case(8192),
    Case(32768),
    Case(2048, batch=2),
    Case(4096, logits="forward"),
    Case(2048, attention="eager"),
)
IMAGE_CASES = (Case(64, edge=336), Case(64, edge=1120), Case(64, edge=2240), Case(512, edge=1120, batch=2))


def cases_of(model_type: str) -> Iterator[Case]:
    """Text for all; images of several sizes where the size makes a difference."""
    yield from TEXT_CASES
    takes_any_size = model_type in ("glm4v", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    yield from IMAGE_CASES if takes_any_size else (case for case in IMAGE_CASES if case.edge == 1120)


def run(models: dict[str, Any], name: str, case: Case) -> tuple[float, float, float]:
    """Weights, traced peak and predicted peak in GiB."""
    if case.attention not in models:
        models[case.attention] = build(config_of(name), case.attention)
    model = models[case.attention]
    profile = profile_of(model)
    workload = Workload(
        images=int(bool(case.edge)),
        image_height=case.edge or None,
        text_tokens=case.text,
        new_tokens=0,
        batch=case.batch,
        attention="eager" if case.attention == "eager" else "sdpa",
        logits="forward" if case.logits == "forward" else "generate",
    )
    load = image_load(profile, workload)
    if case.edge:
        # What the rule adds around an image is no marker, except line ends.
        ends = profile.image.extra_tokens if profile.image and name != "llava-v1.6-7b" else 0
        marked = load.tokens if load.tokens == 1 else load.tokens - ends
        text = case.text + load.tokens - marked
        inputs = image_inputs(model.config, marked, text, case.batch, edge=case.edge, sequences=load.sequences)
    else:
        inputs = text_inputs(model.config, case.text, case.batch)
    options = {"logits_to_keep": 1} if case.logits == "generate" else {}
    traced = trace(model, inputs, **options)
    footprint = Footprint(profile, workload, load, chain(profile).atoms)
    need = footprint.detail(0, len(footprint.atoms), case.text)
    predicted = need.weights_bytes + need.kv_cache_bytes + need.activations_bytes
    return need.weights_bytes / GIB, (need.weights_bytes + traced.peak_bytes()) / GIB, predicted / GIB


def main() -> None:
    print(f"{'model':21}{'input':34}{'weights':>8}{'traced':>9}{'predicted':>10}{'ratio':>7}{'without weights':>16}")
    for name in sys.argv[1:] or CONFIGS:
        models: dict[str, Any] = {}
        for case in cases_of(CONFIGS[name][0]):
            words = f"text {case.text}" + (f", image {case.edge}" if case.edge else "")
            words += (f" x {case.batch}" if case.batch > 1 else "") + (
                f" {case.attention}" if case.attention != "sdpa" else ""
            )
            words += f" {case.logits}" if case.logits != "generate" else ""
            try:
                weights, traced, predicted = run(models, name, case)
            except Exception as error:  # noqa: BLE001 - one model that cannot be run must not end the table
                print(f"{name:21}{words:34}{type(error).__name__}: {str(error)[:90]}", flush=True)
                continue
            inner = (predicted - weights) / (traced - weights)
            print(
                f"{name:21}{words:34}{weights:8.2f}{traced:9.3f}{predicted:10.3f}{predicted / traced:7.3f}{inner:16.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
