"""A model built of ghosts, and its runs. Used by the child program :mod:`.trace_child` only."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import transformers
from torch.utils._pytree import tree_flatten

from ..trace import Pictures
from .trace_attention import OnGpu
from .trace_ghost import CUDA, META, Ghost, map_nested, pretend_cuda
from .trace_inputs import OTHER_WORD, TAKE_SQUARES, marker_of, prompt_inputs, square_inputs
from .trace_pictures import count_features, encoder_of, image_inputs, names_taken
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
        code: str | None,
        cudnn_width: int,
    ) -> None:
        # What has no data cannot be held against the values that it may have.
        torch.distributions.Distribution.set_default_validate_args(False)
        pretend_cuda((9, 0) if cudnn_width else (8, 0))
        self._folder = folder
        self._cudnn_width = cudnn_width
        self._dtype = _HALF[dtype]
        self._is_remote = code is not None
        kind = class_of_library(architecture) if code is None or folder is None else class_of_code(code, folder)
        # Classes that cannot take fused attention refuse it by name; without a name each takes what it can.
        self.model = build(kind, config, self._dtype, None if attention == "sdpa" else attention)
        self.features = 0
        """Of the images of one prompt, in the run before."""
        self.module_names = [""]
        self._numbers: dict[int, int] = {}
        for name, module in self.model.named_modules():
            if name:
                self._numbers.setdefault(id(module), len(self.module_names))
                self.module_names.append(name)
        parameters = {name for name, _ in self.model.named_parameters()}
        # Parts of a tower may be called without it, as the encoder of an image tokenizer is.
        towers = [self._module(name) for name in tower if name not in parameters]
        self._places = {id(module): TOWER for one in towers for module in one.modules()}
        self._places.update({id(self._module(name)): place for place, name in enumerate(layers)})
        self._behind = len(layers)
        self._layers = [self._module(name) for name in layers]
        # A call of the outermost is a forward pass: of the model, or of its text model where that is what generates.
        around = ["", *(layers[0][:end] for end, char in enumerate(layers[0]) if char == ".")]
        self._bodies = {id(self._module(name)) for name in around}
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
        self, *, tokens: int, batch: int, steps: int, pictures: Pictures | None = None, marked: int | None = None
    ) -> dict[str, Any]:
        """Events of one run, and where in them each forward pass begins."""
        taken = inspect.signature(self.model.forward).parameters
        with _by_default(self._dtype):
            inputs = self._inputs(taken, tokens, batch, pictures, marked)
        if pictures and "image_flags" in taken and not steps:
            # InternVL-Chat: which of the squares are no padding; its generate takes none.
            inputs["image_flags"] = torch.ones(batch * pictures.sequences, 1, dtype=torch.long)
        events, passes = self._run(inputs, steps)
        return {"tokens": tokens, "events": events, "passes": passes}

    def _inputs(
        self, taken: Collection[str], tokens: int, batch: int, pictures: Pictures | None, marked: int | None
    ) -> dict[str, Any]:
        """Of one call: a prompt that begins with its images, if it has any."""
        config = self.model.config
        if pictures is None:
            return prompt_inputs(config, taken, tokens, batch)
        if self._is_remote and config.model_type in TAKE_SQUARES:
            pixels = torch.empty(batch * pictures.images, 3, pictures.height, pictures.width)
            return square_inputs(config, taken, pixels, tokens=tokens, batch=batch, places=marked or 0)
        encode = encoder_of(self.model)
        if getattr(self.model, "img_context_token_id", 0) is None:
            # What ``chat`` of InternVL-Chat sets.
            config.img_context_token_id = self.model.img_context_token_id = OTHER_WORD
        if self._is_remote and (encode is None or marker_of(config) is None):
            raise LookupError("it is not known how its code takes images")
        images = image_inputs(
            config, names_taken(taken, encode), None if self._is_remote else self._folder, pictures, batch
        )
        self.features = pictures.images if encode is None else self._features(encode, images) // batch
        places = [self.features // pictures.images] * pictures.images
        return prompt_inputs(config, taken, tokens, batch, images=images, places=places)

    def _features(self, encode: Callable[..., Any], images: dict[str, Any]) -> int:
        """Image features that the tower gives: as many places the prompts have to have."""
        with torch.no_grad(), OnGpu(cudnn_width=self._cudnn_width), Recorder():
            return count_features(encode, map_nested(_to_gpu, images))

    def _run(self, inputs: dict[str, Any], steps: int) -> tuple[list[list[int]], list[int]]:
        recorder = Recorder()
        recorder.ignore(self._weights())
        recorder.place = BEFORE
        passes: list[int] = []
        handles = self._watch(recorder, passes)
        try:
            with torch.no_grad(), OnGpu(cudnn_width=self._cudnn_width), recorder:
                recorder.listen()
                ghosts = map_nested(_to_gpu, inputs)
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
        running: list[Any] = []

        def enter(module: Any, _: Any) -> None:
            stack.append((recorder.place, recorder.module))
            if id(module) in self._bodies:
                if not running:
                    passes.append(len(recorder.events))
                    recorder.place = BEFORE
                running.append(module)
            recorder.place = self._places.get(id(module), recorder.place)
            recorder.module = self._numbers.get(id(module), recorder.module)

        def arrive(_: Any, args: Any, kwargs: Any) -> None:
            # Hooks of accelerate copy whatever a layer is given before it runs, whether it reads it or not.
            for value in tree_flatten((args, kwargs))[0]:
                if isinstance(value, Ghost):
                    recorder.read(value)

        def leave(module: Any, _: Any, output: Any) -> None:
            place, recorder.module = stack.pop()
            if id(module) in self._bodies:
                running.pop()
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


def class_of_library(architecture: str) -> Any:
    """A class of the installed transformers."""
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise LookupError(f"transformers {transformers.__version__} has no class {architecture}")
    return kind


def class_of_code(code: str, folder: str) -> Any:
    """Run the code of a checkpoint, which its user has allowed."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(code, folder, local_files_only=True)


def build(kind: Any, config: dict[str, Any], dtype: torch.dtype, attention: str | None) -> Any:
    """The model with weights that have no data, tied as the class ties them."""
    fields = _without_weights(config)
    fields.pop("quantization_config", None)
    settings = kind.config_class.from_dict(fields)
    with torch.no_grad(), OnGpu(), Recorder(), torch.device("cuda"):
        model = kind._from_config(settings, dtype=dtype, **({"attn_implementation": attention} if attention else {}))
    model.requires_grad_(False).eval()
    _forget(model)
    for part in model.modules():
        # Of a model that calls generate of its text model both may have settings.
        generation = getattr(part, "generation_config", None)
        if generation is not None:
            generation.eos_token_id = None
            generation.pad_token_id = 0
            generation.bos_token_id = generation.bos_token_id or 0
            generation.cache_implementation = None
    return model


def _without_weights(config: Any) -> Any:
    """A copy of what config.json holds without files of weights: timm would load them, older ones with their pickle."""
    if isinstance(config, dict):
        return {key: _without_weights(value) for key, value in config.items() if key != "checkpoint_path"}
    return [_without_weights(value) for value in config] if isinstance(config, list) else config


@contextlib.contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[None]:
    """Tensors have this type if nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
