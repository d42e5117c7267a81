"""A model built of ghosts, and its runs. Used by the child program :mod:`.trace_child` only."""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import torch
import transformers
from torch.utils._pytree import tree_flatten

from .trace_attention import OnGpu
from .trace_ghost import CUDA, META, Ghost, pretend_cuda
from .trace_inputs import image_inputs, prompt_inputs
from .trace_recorder import Recorder

TOWER = -2
BEFORE = -1
ROUNDING_BYTES = 512
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Tracer:
    """Builds a model once and runs it as often as asked. Arguments: see :func:`.trace_child.main`."""

    def __init__(
        self,
        config: dict[str, Any],
        architecture: str,
        *,
        dtype: str,
        attention: str,
        layers: list[str],
        tower: list[str],
        folder: str | None,
        cudnn_width: int,
    ) -> None:
        pretend_cuda((9, 0) if cudnn_width else (8, 0))
        self._folder = folder
        self._cudnn_width = cudnn_width
        self._dtype = _HALF[dtype]
        self.model = build(config, architecture, self._dtype, attention)
        self.module_names = [""]
        self._numbers: dict[int, int] = {}
        for name, module in self.model.named_modules():
            if name:
                self._numbers.setdefault(id(module), len(self.module_names))
                self.module_names.append(name)
        parameters = {name for name, _ in self.model.named_parameters()}
        self._places = {id(self._module(name)): TOWER for name in tower if name not in parameters}
        self._places.update({id(self._module(name)): place for place, name in enumerate(layers)})
        self._behind = len(layers)
        self._layers = [self._module(name) for name in layers]
        seen = {parameter.inner.untyped_storage()._cdata: parameter for parameter in self._weights()}
        self.weights_bytes = sum(
            -(-parameter.inner.untyped_storage().nbytes() // ROUNDING_BYTES) * ROUNDING_BYTES for parameter in seen.values()
        )

    def _module(self, name: str) -> Any:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise LookupError(f"{type(self.model).__name__} has no module {name}") from None

    def _weights(self) -> list[Any]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [tensor for tensor in tensors if isinstance(tensor, Ghost)]

    def trace(
        self,
        *,
        tokens: int,
        batch: int,
        steps: int,
        images: int = 0,
        height: int = 0,
        width: int = 0,
        sequences: int = 0,
        marked: int | None = None,
    ) -> dict[str, Any]:
        """Events of one run, and where in them each forward pass begins."""
        pictures: dict[str, Any] = {}
        config = self.model.config
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            if images:
                pictures = image_inputs(
                    config, self._folder, images=images, height=height, width=width, batch=batch, sequences=sequences
                )
        finally:
            torch.set_default_dtype(before)
        if images and marked is None:
            marked = self._features(pictures) // batch if hasattr(self.model, "get_image_features") else images
        if marked and marked >= tokens:
            raise ValueError(f"a prompt of {tokens} tokens has no room for {marked} image features and text")
        inputs = prompt_inputs(config, tokens, batch, pictures, marked or 0)
        # Kinds of tokens are asked for by some releases of transformers alone.
        taken = inspect.signature(self.model.forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in taken or "token_type" not in name}
        events, passes = self._run(inputs, steps)
        return {"tokens": tokens, "events": events, "passes": passes, "marked": marked or 0}

    def _features(self, pictures: dict[str, Any]) -> int:
        """Image features that the tower gives: as many places the prompt has to have."""
        with torch.no_grad(), OnGpu(cudnn_width=self._cudnn_width), Recorder():
            ghosts = {name: _to_gpu(value) for name, value in pictures.items()}
            found = self.model.get_image_features(**ghosts)
        found = getattr(found, "pooler_output", found)
        parts = list(found) if isinstance(found, (list, tuple)) else [found]
        return sum(part.numel() // part.shape[-1] for part in parts if isinstance(part, torch.Tensor))

    def _run(self, inputs: dict[str, Any], steps: int) -> tuple[list[list[int]], list[int]]:
        recorder = Recorder()
        recorder.ignore(self._weights())
        recorder.place = BEFORE
        passes: list[int] = []
        handles = self._watch(recorder, passes)
        try:
            with torch.no_grad(), OnGpu(cudnn_width=self._cudnn_width), recorder:
                recorder.listen()
                ghosts = {name: _to_gpu(value) for name, value in inputs.items()}
                if steps:
                    output = self.model.generate(
                        **ghosts, max_new_tokens=steps, min_new_tokens=None, do_sample=False, use_cache=True
                    )
                else:
                    output = self.model(**ghosts, use_cache=True)
                del output, ghosts
        finally:
            for handle in handles:
                handle.remove()
        # What only a collection of cycles frees is freed here, before anybody counts the events.
        gc.collect()
        # The module may keep a tensor until the next run, which is none of this one's events.
        return list(recorder.events), passes

    def _watch(self, recorder: Recorder, passes: list[int]) -> list[Any]:
        """Keep the recorder's place and module up to date while modules run."""
        stack: list[tuple[int, int]] = []

        def enter(module: Any, _: Any) -> None:
            stack.append((recorder.place, recorder.module))
            if module is self.model:
                passes.append(len(recorder.events))
                recorder.place = BEFORE
            recorder.place = self._places.get(id(module), recorder.place)
            recorder.module = self._numbers.get(id(module), recorder.module)

        def arrive(_: Any, args: Any, kwargs: Any) -> None:
            # Hooks of accelerate copy whatever a layer is given before it runs, whether it reads it or not.
            for value in tree_flatten((args, kwargs))[0]:
                if isinstance(value, Ghost):
                    recorder.read(value)

        def leave(module: Any, _: Any, output: Any) -> None:
            place, recorder.module = stack.pop()
            if module is self.model:
                # Accelerate's hook around the whole model copies what it returns to where the inputs came from.
                recorder.place = BEFORE
                recorder.read(output.logits)
                recorder.place = self._behind
            elif self._places.get(id(module)) == TOWER:
                recorder.place = place
            elif module is self._layers[-1]:
                recorder.place = self._behind

        modules = torch.nn.modules.module
        handles = [modules.register_module_forward_pre_hook(enter), modules.register_module_forward_hook(leave)]
        handles.extend(layer.register_forward_pre_hook(arrive, with_kwargs=True) for layer in self._layers)
        return handles


def build(config: dict[str, Any], architecture: str, dtype: torch.dtype, attention: str) -> Any:
    """The model with weights that have no data, tied as the class ties them."""
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise LookupError(f"transformers {transformers.__version__} has no class {architecture}")
    fields = copy.deepcopy(config)
    fields.pop("quantization_config", None)
    settings = kind.config_class.from_dict(fields)
    with torch.no_grad(), OnGpu(), Recorder(), torch.device("cuda"):
        model = kind._from_config(settings, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False).eval()
    _forget(model)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.generation_config.cache_implementation = None
    return model


def _forget(model: Any) -> None:
    """Leave no data in any weight, so that no answer depends on what happened to be in memory."""
    empty: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in empty:
                    inner = torch.empty(parameter.shape, dtype=parameter.dtype, device=META)
                    empty[id(parameter)] = (torch.nn.Parameter(Ghost(inner), requires_grad=False), parameter)
                module._parameters[name] = empty[id(parameter)][0]


def _to_gpu(value: Any) -> Any:
    return value.to(CUDA) if isinstance(value, torch.Tensor) else value
