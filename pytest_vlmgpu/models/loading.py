"""The only door to transformers and accelerate: load a model where the plan puts it, prove it is there, use it, let it go.

Nothing is imported from torch or transformers before :func:`load` is called.
"""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_doctor.errors import UsageError
from vlm_doctor.probes.loading import auto_class, workload_options

from ..watching.meter import driver_info, empty_cache
from .failures import Allocation, LoadFailure, broken_torch, check_weights, explained, needs_remote_code
from .keepers import holder_of
from .placing import Placed, check_placement, device_map_for
from .processors import load_processor, prompt_text
from .source import Source, find_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

    from vlm_doctor.placement import Plan, Stage

__all__ = ["LoadFailure", "LoadedVlm", "device_map_for", "load", "torch_ordinals", "unload"]


@dataclass
class LoadedVlm:
    """A model with its processor, ready to be asked."""

    name: str
    model: Any
    """``None`` after :func:`unload`."""
    processor: Any
    plan: Plan | None
    """``None`` when the model was loaded for the CPU."""
    device_map: dict[str, int]
    """Module path to CUDA ordinal of this process; ``""`` is the whole model. Empty on the CPU."""
    gpus: tuple[Stage, ...]
    """One a GPU, in the order of the stages, with the plan's ledger. Empty on the CPU."""
    input_device: str
    """Where inputs belong: the first stage's device, such as ``cuda:0``."""
    load_seconds: float
    held_by: str = ""
    """Who kept some of the model after :func:`unload`, such as ``variable KEPT of module test_ocr``; else empty."""

    def __repr__(self) -> str:
        where = ", ".join(f"cuda:{ordinal}" for ordinal in dict.fromkeys(self.device_map.values())) or "cpu"
        return f"<LoadedVlm {self.name} on {where}>" if self.model is not None else f"<LoadedVlm {self.name}, unloaded>"

    def generate(
        self,
        images: Image | Sequence[Image] | None,
        text: str,
        *,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> str:
        """Ask the model once, as its chat template wants to be asked.

        Args:
            images: None, one or several PIL images, put before the text.
            text: The user's words.
            max_new_tokens: At most this many tokens are made.
            do_sample: False takes the likeliest token each time, so that the answer is the same each time.
            seed: For sampling. The random state of torch is left as it was.
            options: Passed on to ``model.generate``.

        Returns:
            The new text alone, without prompt and special tokens.

        Raises:
            UsageError: The model was unloaded, or its processor takes no images.
        """
        import torch

        if self.model is None:
            raise UsageError(f"{self.name} was unloaded: ask before the fixture is torn down.")
        inputs = self._inputs(images, text)
        if not do_sample:
            # A checkpoint's own sampling settings would only be warned about.
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        ordinals = sorted(set(self.device_map.values()))
        with torch.random.fork_rng(devices=ordinals), torch.inference_mode():
            for generator in (torch.default_generator, *(torch.cuda.default_generators[ordinal] for ordinal in ordinals)):
                generator.manual_seed(seed)
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=do_sample, **options)
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.decode(new_tokens, skip_special_tokens=True))

    def peak_bytes(self) -> dict[int, int]:
        """CUDA ordinal to the most memory that torch had allocated since the peak was last reset; empty on the CPU."""
        import torch

        return {ordinal: torch.cuda.max_memory_allocated(ordinal) for ordinal in sorted(set(self.device_map.values()))}

    def _inputs(self, images: Image | Sequence[Image] | None, text: str) -> dict[str, Any]:
        pictures = _as_list(images)
        if pictures and not hasattr(self.processor, "image_processor"):
            raise UsageError(f"{self.name} has no image processor: use vlm.model and vlm.processor as its model card says.")
        arguments = {"images": pictures} if pictures else {}
        batch = self.processor(text=prompt_text(self.processor, len(pictures), text), return_tensors="pt", **arguments)
        return {key: self._on_input_device(value) for key, value in batch.items()}

    def _on_input_device(self, value: Any) -> Any:
        if isinstance(value, list):
            # Some processors keep images of different sizes apart.
            return [self._on_input_device(item) for item in value]
        if not hasattr(value, "is_floating_point"):
            return value
        if value.is_floating_point():
            return value.to(self.input_device, self.model.dtype)
        return value.to(self.input_device)


def load(
    name: str,
    plan: Plan | None,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    ordinals: Mapping[str, int] | None = None,
) -> LoadedVlm:
    """Load a model where the plan puts it, and check that every weight is there.

    Args:
        name: Folder, hub id (``org/name@revision`` too) or catalogue name.
        plan: Of a live machine; ``None`` loads for the CPU.
        dtype: torch's word, such as ``bfloat16``; ``None`` is the plan's, or the checkpoint's own without a plan.
        trust_remote_code: Allow Python code of the checkpoint to run.
        ordinals: GPU UUID to CUDA ordinal as the doctor sees it, used only where torch names no UUIDs.

    Raises:
        LoadFailure: VLM712 a planned GPU cannot be used from this process; VLM713 the model cannot be read; VLM714 weights
            on CPU, disk or meta; VLM715 out of memory; VLM716 placement differs from the plan.
    """
    started = time.perf_counter()
    source = find_source(name)
    if plan is not None and not plan.fits:
        raise LoadFailure("VLM705", plan.shortage.message if plan.shortage else f"{name} fits nowhere on this machine.")
    if plan is not None and plan.is_remote_code and not trust_remote_code:
        raise needs_remote_code(name)
    stages = () if plan is None else plan.stages
    device_map: dict[str, int] = {}
    try:
        _import_torch()
        if plan is not None:
            device_map = device_map_for(plan, torch_ordinals(ordinals))
        model, processor = _load_and_check(source, plan, device_map, dtype, trust_remote_code)
        return LoadedVlm(
            name=name,
            model=model,
            processor=processor,
            plan=plan,
            device_map=device_map,
            gpus=stages,
            input_device=f"cuda:{next(iter(device_map.values()))}" if device_map else "cpu",
            load_seconds=time.perf_counter() - started,
        )
    except LoadFailure as error:
        failure = error.with_traceback(None)
    except Exception as error:  # noqa: BLE001 - border to foreign code: whatever it raises becomes one sentence
        failure = explained(name, error, stages, lambda: _allocations(stages, device_map))
    # Only here are the tracebacks gone whose frames hold half a model: raised above, the failure, which pytest keeps to the
    # end of the session, would keep that memory from the next model.
    _give_back(device_map)
    raise failure


def unload(loaded: LoadedVlm) -> int:
    """Let a model go and give its memory back to the driver.

    Args:
        loaded: Cannot be asked any more afterwards.

    Returns:
        Bytes of weights that are still in memory because something else (a test's variable, the traceback of a failed
        test) refers to them; 0 is what should be. ``loaded.held_by`` then names it.
    """
    if loaded.model is None:
        return 0
    model = weakref.ref(loaded.model)
    tensors = [weakref.ref(tensor) for _, tensor in _named_tensors(loaded.model)]
    loaded.model = loaded.processor = None
    _give_back(loaded.device_map)
    left_bytes: int = sum(tensor.nbytes for ref in tensors if (tensor := ref()) is not None)
    if left_bytes:
        # The model as a whole is fewer links away from whoever has a name.
        kept = next((thing for ref in (model, *tensors) if (thing := ref()) is not None), None)
        loaded.held_by = holder_of(kept)
    return left_bytes


def torch_ordinals(fallback: Mapping[str, int] | None = None) -> dict[str, int]:
    """GPU UUID, as NVML writes it, to the ordinal under which torch knows the GPU in this process.

    Args:
        fallback: Used where this torch names no UUIDs.

    Raises:
        LoadFailure: VLM712, when torch cannot use any GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise LoadFailure(
            "VLM712", f"torch {torch.__version__} sees no usable GPU in this process: run vlm-doctor to see why."
        )
    properties = [torch.cuda.get_device_properties(ordinal) for ordinal in range(torch.cuda.device_count())]
    if all(hasattr(device, "uuid") for device in properties):
        # torch prints the bare UUID; NVML puts "GPU-" before it.
        return {f"GPU-{device.uuid}": ordinal for ordinal, device in enumerate(properties)}
    return dict(fallback or {})


def _import_torch() -> None:
    """Tell a torch that is broken from a model that is."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise
    except (ImportError, OSError) as error:
        raise broken_torch(error) from None


def _load_and_check(
    source: Source, plan: Plan | None, device_map: dict[str, int], dtype: str | None, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Model and processor; everything that refers to the model while it can still fail is in the frames below this one."""
    import transformers

    model, problems = _load_model(source, plan, device_map, dtype, trust_remote_code)
    check_weights(source.name, problems)
    _check_devices(source.name, model, device_map)
    processor = load_processor(transformers, source, model.config, trust_remote_code=trust_remote_code)
    _wait_for(device_map)
    return model, processor


def _load_model(
    source: Source, plan: Plan | None, device_map: dict[str, int], dtype: str | None, trust_remote_code: bool
) -> tuple[Any, dict[str, Any]]:
    """The model and what ``from_pretrained`` has to say about its weights."""
    import torch
    import transformers

    # An explicit False: None would make transformers ask at the terminal and wait.
    config = transformers.AutoConfig.from_pretrained(
        source.name, revision=source.revision, trust_remote_code=trust_remote_code
    )
    loader = auto_class(transformers, config)
    if loader is None:
        raise LoadFailure(
            "VLM713",
            f"{source.name} has model_type {config.model_type!r}, which transformers {transformers.__version__} does "
            "not know as a vision-language model: check the name, or install a transformers version that does.",
        )
    if loader is not transformers.AutoModelForImageTextToText and not trust_remote_code:
        raise needs_remote_code(source.name)
    wanted = dtype or (plan.dtype if plan is not None else "auto")
    options: dict[str, Any] = {
        "dtype": wanted if wanted == "auto" else getattr(torch, wanted),
        "revision": source.revision,
    }
    if device_map:
        options["device_map"] = device_map
    if plan is not None:
        work = plan.workload
        options.update(workload_options(transformers, attention=work.attention, quantization=work.quantization))
    model, problems = loader.from_pretrained(
        source.name, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, **options
    )
    return model, problems


def _check_devices(name: str, model: Any, device_map: dict[str, int]) -> None:
    # transformers 5 sets no hf_device_map when one device takes all: then the tensors alone tell.
    reported = getattr(model, "hf_device_map", None) or {}
    devices = {key: f"cuda:{device}" if isinstance(device, int) else str(device) for key, device in reported.items()}
    check_placement(name, [Placed(key, device) for key, device in devices.items()], device_map)
    tensors = _named_tensors(model)
    check_placement(name, [Placed(key, str(tensor.device), tensor.nbytes) for key, tensor in tensors], device_map)


def _named_tensors(model: Any) -> list[tuple[str, Any]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _wait_for(device_map: Mapping[str, int]) -> None:
    if device_map:
        import torch

        for ordinal in set(device_map.values()):
            torch.cuda.synchronize(ordinal)


def _give_back(device_map: Mapping[str, int]) -> None:
    """Free what nothing refers to, and return it to the driver."""
    # accelerate's hooks refer to modules that refer to the hooks: reference counts alone free nothing.
    gc.collect()
    if device_map:
        empty_cache()


def _allocations(stages: Sequence[Stage], device_map: Mapping[str, int]) -> dict[str, Allocation]:
    """GPU UUID to what torch and the driver say now."""
    if not device_map:
        return {}
    import torch

    readings = {}
    for stage, ordinal in zip(stages, dict.fromkeys(device_map.values()), strict=False):
        info = driver_info(torch.cuda, ordinal)
        if info is not None:
            held = torch.cuda.memory_allocated(ordinal), torch.cuda.memory_reserved(ordinal)
            readings[stage.uuid] = Allocation(*held, info[0])
    return readings


def _as_list(images: Image | Sequence[Image] | None) -> list[Image]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]
