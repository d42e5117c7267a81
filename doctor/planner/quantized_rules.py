"""Where a map and a quantized model clash, and what quantization leaves as it is."""

from __future__ import annotations

from ..data.quantization_rules import OFF_GPU_REFUSED, ONE_DEVICE, OffGpu
from ..model import ModelProfile
from ..units import format_gib
from ..workload import Workload
from .release import Release, is_before_5
from .weights import loaded_dtype, quantized_bytes, stays_float32, unit_bytes
from .wording import listed


def refusal(profile: ModelProfile, workload: Workload, place: str, *, is_alone: bool) -> OffGpu | None:
    """What transformers says to weights on the CPU or the disk; ``None`` where it loads them.

    Args:
        profile: The model.
        workload: How it is loaded.
        place: ``cpu`` or ``disk``.
        is_alone: No part of the model is on a GPU.
    """
    rule = OFF_GPU_REFUSED.get(method_of(profile, workload) or "")
    return rule if rule is not None and place in (rule.alone if is_alone else rule.beside_gpus) else None


def method_of(profile: ModelProfile, workload: Workload) -> str | None:
    """``quant_method`` of what will be loaded: the checkpoint's, or bitsandbytes where the workload asks for it."""
    return profile.quantization or ("bitsandbytes" if workload.quantization else None)


def why_on_one_gpu(profile: ModelProfile) -> str | None:
    """Why a quantized model cannot be parted; ``None`` where it can."""
    return ONE_DEVICE.get(profile.quantization or "") or profile.one_gpu


def loses_hooks(profile: ModelProfile, release: Release) -> str | None:
    """What makes a parted model fail at its first pass, unless it is unpacked while it loads; ``None`` where nothing does.

    compressed-tensors from 0.15 on, which transformers 5 asks for, unpacks all weights in a hook before the first pass, and
    takes accelerate's hooks away for that, the one that is running included (``decompress_model`` and ``remove_accelerate``
    of 0.20). Run on two H200s with transformers 5.17 (31 of 42 checkpoints; the other 11 fail on one device, too).
    """
    if profile.quantization != "compressed-tensors" or is_before_5(release):
        return None
    return (
        "compressed-tensors unpacks the weights at the first pass and takes accelerate's hooks away, which a model on "
        "several GPUs needs"
    )


def why_not_unpacked(profile: ModelProfile, release: Release) -> str | None:
    """Why a model that loses its hooks cannot be unpacked while it is loaded; ``None`` where it can, or need not.

    Before transformers 5.23 ``dequantize=True`` unpacks after accelerate has set its hooks, and takes them away then
    (``_process_model_after_weight_loading`` of quantizer_compressed_tensors.py, 5.17 to 5.22).
    """
    lost = loses_hooks(profile, release)
    if lost is None or release is None or release >= UNPACKS_FIRST:
        return None
    return f"{lost}; transformers {UNPACKS_FIRST[0]}.{UNPACKS_FIRST[1]} can unpack them while it loads"


UNPACKS_FIRST = (5, 23)
"""First transformers that unpacks compressed-tensors before the hooks are set."""
UNPACK_WHILE_LOADING = (
    "Load with quantization_config=CompressedTensorsConfig(dequantize=True): it unpacks while loading, and takes no more "
    "memory than after a first pass."
)


def about_quantization(profile: ModelProfile, workload: Workload) -> list[str]:
    """What loading leaves unquantized, or in float32, by name; a sentence each."""
    result = []
    if workload.quantization:
        replaced = sum(quantized_bytes(unit.linear, workload.quantization) for unit in profile.units)
        left = sum(unit_bytes(unit, profile, workload) for unit in profile.units) - replaced
        names = [unit.key for unit in profile.units if unit.role in ("embedding", "head") and not unit.linear.tensors]
        if any(unit.expert_linear.tensors for unit in profile.units):
            names.append("the experts, which transformers 5 joins into parameters that are no linear layers")
        which = f", among them {listed(names)}" if names else ""
        kind = loaded_dtype(profile, workload)
        result.append(f"bitsandbytes quantizes linear layers alone: {format_gib(left)} stay in {kind}{which}.")
    kept = [unit.key for unit in profile.units if stays_float32(unit, profile, workload)]
    if kept:
        result.append(f"transformers loads {listed(kept)} in float32 where float16 is asked for (_keep_in_fp32_modules).")
    return result
