"""The only door to transformers and accelerate: load a model where the plan puts it, prove it is there, use it, let it go.

Nothing is imported from torch or transformers before :func:`load` is called.
"""

from __future__ import annotations

import gc
import time
import weakref
from typing import TYPE_CHECKING, Any

from vlm_doctor.probes.loading import auto_class, workload_options

from ..watching.meter import driver_info, empty_cache
from .failures import Allocation, LoadFailure, broken_torch, check_weights, explained, needs_remote_code
from .first_stage import send_inputs_to_first
from .keepers import holder_of
from .loaded import LoadedVlm
from .placing import (
    Orders,
    Placed,
    check_automatic,
    check_placement,
    device_map_for,
    offloaded_bytes,
    ordinals_in,
    stages_of,
)
from .processors import load_processor
from .source import Source, find_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlm_doctor.machine import Gpu
    from vlm_doctor.placement import Plan, Stage

__all__ = ["LoadFailure", "LoadedVlm", "device_map_for", "load", "torch_ordinals", "unload"]


def load(
    name: str,
    plan: Plan | None,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    ordinals: Mapping[str, int] | None = None,
    device_map: str | None = None,
    gpus: Sequence[Gpu] = (),
    may_offload: bool = False,
) -> LoadedVlm:
    """Load a model where the plan puts it, and check that every weight is there.

    Args:
        name: Folder, hub id (``org/name@revision`` too) or catalogue name.
        plan: Of a live machine; ``None`` loads for the CPU.
        dtype: torch's word, such as ``bfloat16``; ``None`` is the plan's, or the checkpoint's own without a plan.
        trust_remote_code: Allow Python code of the checkpoint to run.
        ordinals: GPU UUID to CUDA ordinal as the doctor sees it, used only where torch names no UUIDs.
        device_map: ``auto`` or ``balanced``: transformers places the model, and the plan says only that it fits.
        gpus: Among which it may choose then.
        may_offload: Part of the model may stay in host memory, as plan or transformers want.

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
    orders = Orders()
    try:
        _import_torch()
        if plan is not None:
            orders = _orders(plan, torch_ordinals(ordinals), device_map, gpus, may_offload=may_offload)
        model, processor, landed = _load_and_check(source, plan, orders, dtype, trust_remote_code)
        first = next(iter(ordinals_in(landed)), None)
        return LoadedVlm(
            name=name,
            model=model,
            processor=processor,
            plan=plan if device_map is None else None,
            device_map=landed,
            gpus=stages if device_map is None else stages_of(landed, orders.gpus),
            input_device=f"cuda:{first}" if first is not None else "cpu",
            load_seconds=time.perf_counter() - started,
            offloaded_bytes=offloaded_bytes(_tensors_of(model), landed),
        )
    except LoadFailure as error:
        failure = error.with_traceback(None)
    except Exception as error:  # noqa: BLE001 - border to foreign code: whatever it raises becomes one sentence
        failure = explained(name, error, stages, lambda: _allocations(stages, orders.device_map))
    # Only here are the tracebacks gone whose frames hold half a model: raised above, the failure, which pytest keeps to the
    # end of the session, would keep that memory from the next model.
    _give_back()
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
    _give_back()
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
        # torch prints the bare UUID; NVML puts "GPU-" before it, and "MIG-" before that of a slice.
        return {
            f"{'MIG' if ' MIG ' in str(device.name) else 'GPU'}-{device.uuid}": ordinal
            for ordinal, device in enumerate(properties)
        }
    return dict(fallback or {})


def _import_torch() -> None:
    """Tell a torch that is broken from a model that is."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise
    except (ImportError, OSError) as error:
        raise broken_torch(error) from None


def _orders(
    plan: Plan, ordinals: Mapping[str, int], device_map: str | None, gpus: Sequence[Gpu], *, may_offload: bool
) -> Orders:
    """What transformers is told about devices."""
    if device_map is None:
        return Orders(device_map_for(plan, ordinals, may_offload=may_offload), may_offload=may_offload)
    import torch

    open_to = {ordinals[gpu.uuid]: gpu for gpu in gpus if gpu.uuid in ordinals}
    max_memory: dict[int | str, int] | None = None
    if set(open_to) != set(range(torch.cuda.device_count())):
        import psutil

        # As accelerate asks, for these GPUs alone.
        max_memory = {ordinal: torch.cuda.mem_get_info(ordinal)[0] for ordinal in sorted(open_to)}
        max_memory["cpu"] = psutil.virtual_memory().available
    return Orders(device_map, max_memory, may_offload, open_to)


def _load_and_check(
    source: Source, plan: Plan | None, orders: Orders, dtype: str | None, trust_remote_code: bool
) -> tuple[Any, Any, dict[str, int | str]]:
    """Model, processor and where the model is; all that refers to it while it can still fail is in the frames below."""
    import transformers

    model, problems = _load_model(source, plan, orders, dtype, trust_remote_code)
    check_weights(source.name, problems)
    landed = check_devices(source.name, model, orders)
    processor = load_processor(transformers, source, model.config, trust_remote_code=trust_remote_code)
    _wait_for(landed)
    return model, processor, landed


def _load_model(
    source: Source, plan: Plan | None, orders: Orders, dtype: str | None, trust_remote_code: bool
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
    if orders.device_map:
        options["device_map"] = orders.device_map
    if orders.max_memory is not None:
        options["max_memory"] = orders.max_memory
    if plan is not None:
        work = plan.workload
        kinds = {"attention": work.attention, "quantization": work.quantization, "dtype": options["dtype"]}
        options.update(workload_options(transformers, **kinds, config=config, device_map=orders.device_map))
    model, problems = loader.from_pretrained(
        source.name, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, **options
    )
    send_inputs_to_first(model, orders.device_map)
    return model, problems


def check_devices(name: str, model: Any, orders: Orders) -> dict[str, int | str]:
    """Where the model is: module path to CUDA ordinal, ``cpu`` or ``disk``; empty for the CPU."""
    # transformers 5 sets no hf_device_map when one device takes all: then the tensors alone tell.
    reported = getattr(model, "hf_device_map", None) or {}
    devices = {key: f"cuda:{device}" if isinstance(device, int) else str(device) for key, device in reported.items()}
    modules, tensors = [Placed(key, device) for key, device in devices.items()], _tensors_of(model)
    planned = orders.device_map
    if isinstance(planned, str):
        check_automatic(name, planned, [*modules, *tensors], may_offload=orders.may_offload)
        planned = {key: _ordinal(device) for key, device in (devices or {"": tensors[0].device}).items()}
    check_placement(name, modules, planned)
    check_placement(name, tensors, planned)
    return planned


def _ordinal(device: str) -> int | str:
    kind, _, number = device.partition(":")
    return int(number) if kind == "cuda" and number else device


def _tensors_of(model: Any) -> list[Placed]:
    return [Placed(key, str(tensor.device), tensor.nbytes) for key, tensor in _named_tensors(model)]


def _named_tensors(model: Any) -> list[tuple[str, Any]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _wait_for(device_map: Mapping[str, int | str]) -> None:
    for ordinal in ordinals_in(device_map):
        import torch

        torch.cuda.synchronize(ordinal)


def _give_back() -> None:
    """Free what nothing refers to, and return it to the driver."""
    # accelerate's hooks refer to modules that refer to the hooks: reference counts alone free nothing.
    gc.collect()
    empty_cache()


def _allocations(stages: Sequence[Stage], device_map: Mapping[str, int | str] | str) -> dict[str, Allocation]:
    """GPU UUID to what torch and the driver say now; empty where transformers has placed the model."""
    if not device_map or isinstance(device_map, str):
        return {}
    import torch

    readings = {}
    for stage, ordinal in zip(stages, ordinals_in(device_map), strict=False):
        info = driver_info(torch.cuda, ordinal)
        if info is not None:
            held = torch.cuda.memory_allocated(ordinal), torch.cuda.memory_reserved(ordinal)
            readings[stage.uuid] = Allocation(*held, info[0])
    return readings
