"""Bytes of a model's parts once they are loaded, and while they are being loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..data.quantization_rules import KEPT_IN_FLOAT32
from ..model import LinearWeights, ModelProfile, Unit
from ..workload import Quantization, Workload
from .release import Release, is_before_5

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_CONVERTED = frozenset({"F64", "F32", "F16", "BF16"})
"""Stored dtypes that loading converts; packed and integer tensors stay as they are."""
_STORED_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F4": 4,
}  # fmt: skip
"""Bits of an element by safetensors' words; every other word (F8_E4M3, I8, U8, BOOL …) is one byte."""
_NF4_BLOCK, _NF4_CODES_BYTES = 64, 64
"""bitsandbytes keeps one float32 scale for so many weights of 4 bits, and with each tensor the 16 values they stand for.
Source: ``quantize_4bit`` and ``get_4bit_type``, bitsandbytes 0.50, functional.py."""
_SCALE_BYTES = 4
"""Of a float32 scale: one a block (nf4), one a row (int8, ``SCB`` of ``Int8Params``)."""
_TENSORS_OF_MODULE = 1.5
"""Bytes of the largest module in multiples of its largest tensor: ``gate_up_proj`` and ``down_proj`` of joined experts.
Source: modeling_qwen3_vl_moe.py, modeling_glm4v_moe.py and modeling_gpt_oss.py of transformers 5.23."""


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a torch dtype, such as 2 for ``bfloat16``; 2 for a dtype that is not a plain float."""
    return _ITEM_BYTES.get(dtype, 2)


def loaded_dtype(profile: ModelProfile, workload: Workload) -> str:
    """Word of torch for the type the weights are loaded in."""
    return workload.dtype or profile.dtype


def unit_bytes(unit: Unit, profile: ModelProfile, workload: Workload) -> int:
    """Bytes of a unit once it is loaded.

    A checkpoint that is already quantized keeps its quantized weights, and what it left in floats is converted. Otherwise
    float tensors are converted to the workload's dtype (``None``: the checkpoint's main one), and packed or integer tensors
    stay. bitsandbytes replaces linear layers and leaves the rest in that dtype.
    """
    if profile.quantization and unit.kept_bytes is None:
        return unit.stored_bytes
    size = item_bytes("float32" if stays_float32(unit, profile, workload) else loaded_dtype(profile, workload))
    converted = sum(count for stored, count in unit.parameters.items() if stored in _CONVERTED)
    if profile.quantization:
        return (unit.kept_bytes or 0) + converted * size
    kept_bits = sum(
        count * _STORED_BITS.get(stored, 8) for stored, count in unit.parameters.items() if stored not in _CONVERTED
    )
    kept_bytes = math.ceil(kept_bits / 8)
    if workload.quantization is None:
        return converted * size + kept_bytes
    plain = max(0, converted - unit.linear.elements)
    return plain * size + quantized_bytes(unit.linear, workload.quantization) + kept_bytes


def stays_float32(unit: Unit, profile: ModelProfile, workload: Workload) -> bool:
    """Whether transformers loads the unit in float32 though float16 is asked for."""
    return loaded_dtype(profile, workload) == "float16" and unit.key in KEPT_IN_FLOAT32.get(profile.model_type, ())


def quantized_bytes(linear: LinearWeights, quantization: Quantization) -> int:
    """Bytes of linear weights as bitsandbytes keeps them, with their scales."""
    if quantization == "int8":
        return linear.elements + _SCALE_BYTES * linear.rows
    scales = math.ceil(linear.elements / _NF4_BLOCK)
    return math.ceil(linear.elements / 2) + _SCALE_BYTES * scales + _NF4_CODES_BYTES * linear.tensors


def copied_bytes(unit: Unit, profile: ModelProfile, workload: Workload) -> int:
    """Most bytes of weights that are on the executing GPU at once while an offloaded unit runs.

    accelerate copies each module that has tensors of its own when it is called, and lets the copy go when it returns
    (``attach_align_device_hook``, ``AlignDevicesHook.pre_forward`` and ``post_forward`` of accelerate 1.15): a linear layer
    has its weight, the joined experts of a mixture have two, the larger of twice the other's size.
    """
    size = item_bytes(loaded_dtype(profile, workload))
    of_module = math.ceil(_TENSORS_OF_MODULE * size * unit.largest_tensor_elements)
    whole = unit_bytes(unit, profile, workload)
    return min(whole, of_module) if of_module else whole


def computed_item_bytes(profile: ModelProfile, workload: Workload) -> int:
    """Bytes of an element of a hidden state: of the loaded type, 16 bit in a checkpoint that is quantized already.

    Layers of bitsandbytes give back the type that they are given (``Linear4bit.forward``, ``MatMul8bitLt``).
    """
    size = item_bytes(loaded_dtype(profile, workload))
    return min(size, 2) if profile.quantization else size


def score_bytes(profile: ModelProfile, workload: Workload) -> int:
    """Bytes that eager attention holds at once for a head and pair of tokens.

    Scores in the model's type, their softmax in float32, and a cast; bfloat16 scores are copied to float32 first, since the
    kernel that converts takes float16 alone (``softmax`` in aten/src/ATen/native/SoftMax.cpp).
    """
    is_bfloat16 = computed_item_bytes(profile, workload) == 2 and loaded_dtype(profile, workload) != "float16"
    return 10 if is_bfloat16 else 8


def loading_bytes(units: Sequence[Unit], profile: ModelProfile, workload: Workload, release: Release) -> int:
    """Bytes that are needed beside the weights of a device while they are loaded.

    - Plain tensors need none: transformers reserves what they take at once (``caching_allocator_warmup``), copies one after
      another, and torch converts types on the CPU when a copy blocks (``copy_kernel_cuda`` of ATen's Copy.cu).
    - transformers 5 joins the experts of a layer on the GPU: those of ``gate`` and of ``up`` are stacked, then both are
      joined, so that they exist twice (``MergeModulelist`` and ``Concatenate`` of core_model_loading.py, 5.23).
    - bitsandbytes gets each linear weight on the GPU as it is before, one after another, since transformers does not read
      ahead then. In 8 bit a copy in float16 comes beside it (``Bnb8bitQuantize``, which holds the first, and
      ``Int8Params._quantize``); transformers 4 reads it on the CPU, unless the whole model is on one GPU.
    """
    layers = [unit for unit in units if unit.role == "layer"]
    text = profile.text
    joined = 0
    size = item_bytes(loaded_dtype(profile, workload))
    if layers and text.experts and not is_before_5(release) and not profile.quantization:
        width = text.expert_width or text.intermediate // max(1, text.active_experts)
        # Joined experts are none of bitsandbytes' layers: they stay in the loaded type.
        joined = min(2 * text.experts * width * text.hidden * size, max(unit_bytes(u, profile, workload) for u in layers))
    if workload.quantization is None:
        return joined
    copies = size + (2 if workload.quantization == "int8" or is_before_5(release) else 0)
    return max(joined, copies * max((unit.linear.largest for unit in units), default=0))
