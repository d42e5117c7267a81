"""Tensors of a checkpoint that is quantized already: several stored for each weight. Pure.

Each weight is joined with its scales, zero points and indices into one tensor that has the parameters' true number and the
bytes that it really takes, in the checkpoint and on a GPU. Recognized by the layouts that the libraries write:

- GPTQ, AWQ, AutoRound: ``qweight`` of 32-bit words with ``qzeros``, ``scales``, ``g_idx`` (gptqmodel, autoawq).
- compressed-tensors: ``weight_packed`` with ``weight_scale``, ``weight_zero_point`` ..., or ``weight`` in 8 bit.
- FP8 of transformers, fbgemm, DeepSeek: ``weight`` in F8 with ``weight_scale_inv`` or ``weight_scale``.
- bitsandbytes: 4-bit ``weight`` of bytes with ``weight.absmax`` and ``weight.quant_state.bitsandbytes__nf4``; nested ones
  with double quantization; 8-bit ``weight`` with ``SCB`` (``bitsandbytes.functional.QuantState.as_dict``).
- torchao: ``_weight_qdata`` with ``_weight_scale``, ``_weight_zero_point`` ... (``flatten_tensor_state_dict``); the name
  between the bars is the parameter's.
- MXFP4: ``gate_up_proj_blocks`` with ``gate_up_proj_scales`` (gpt-oss).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from ..errors import ModelFileError
from .checkpoint import StoredTensor

_BESIDE_QWEIGHT = ("qzeros", "scales", "g_idx", "perm", "bias_q")
_BESIDE_WEIGHT = (
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
    "weight_global_scale",
    "weight_g_idx",
    "weight_shape",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "activation_scale",
)
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_BESIDE_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_QDATA = "_qdata"
_BESIDE_QDATA = ("scale", "zero_point", "scale_and_zero", "per_tensor_scale", "act_pre_scale")
"""Source: ``serialized_names`` of quantizer_torchao.py, transformers 5.23."""
_EIGHT_BITS = frozenset({"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "I8"})

_TORCHAO_INT4 = "Int4"
"""Beginning of the names of torchao's configs that pack two weights a byte (``quant_type.default._type``)."""

_DENSE_BYTES = 2
"""Of an element that is unpacked: in the type of its scales, 16 bit."""

_OFFSET_BYTES = 4
"""Of the mean of a 4-bit weight's scales where these are quantized too: a number in its state, and a tensor on the GPU.
Source: ``QuantState.from_dict``, bitsandbytes 0.50, functional.py."""

COMPRESSED = "compressed-tensors"
COUNTED = frozenset(
    {
        *(COMPRESSED, "gptq", "awq", "fp8", "fbgemm_fp8", "mxfp4", "torchao"),
        *("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
    }
)
"""Methods whose tensors are understood; ``AUTO_QUANTIZATION_CONFIG_MAPPING`` of transformers 5.23 has more."""


class _Weight(NamedTuple):
    """One quantized weight."""

    name: str
    """Of the parameter that it stands for."""
    dtype: str
    """Our word, such as ``INT4``."""
    shape: tuple[int, ...]
    beside: tuple[str, ...]
    """Names of what goes with it onto the GPU."""
    on_host: tuple[str, ...] = ()
    """Names of what is read and never moved there."""


def quantization_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says about quantization, at its root or in its text part; ``None`` for a plain checkpoint.

    Raises:
        ModelFileError: It is no JSON object.
    """
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):  # The second: compressed-tensors before 0.6.
            section = place.get(key)
            if section is None or section == {}:
                continue
            if not isinstance(section, dict):
                raise ModelFileError(
                    f"config.json: {key} is not a JSON object; use the config.json that belongs to this checkpoint."
                )
            return section
    return None


def quantization_method(section: Mapping[str, Any] | None) -> str | None:
    """``quant_method`` in transformers' word; files of bitsandbytes that are older than the key leave it out."""
    if section is None:
        return None
    method = section.get("quant_method")
    if isinstance(method, str) and method:
        return method[:60]
    return "bitsandbytes" if section.get("load_in_4bit") or section.get("load_in_8bit") else "unknown"


def computes_in(section: Mapping[str, Any] | None) -> Literal["int8", "float32"] | None:
    """What linear layers of bitsandbytes compute in where it is not the type that they are given.

    Source: ``BitsAndBytesConfig`` of transformers 5.23 (``bnb_4bit_compute_dtype`` is float32 by default, and handed to
    each layer) and ``Linear4bit`` of bitsandbytes 0.50, which keeps to it.
    """
    if section is None or not (quantization_method(section) or "").startswith("bitsandbytes"):
        return None
    if section.get("load_in_8bit"):
        return "int8"
    return "float32" if section.get("bnb_4bit_compute_dtype") in (None, "float32", "torch.float32") else None


def join_quantized(tensors: Mapping[str, StoredTensor], section: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Make one tensor of each quantized weight and what belongs to it.

    Args:
        tensors: By parameter name.
        section: ``quantization_config``.

    Returns:
        Tensors by parameter name; stored bytes add up to the same sum. Joined ones have a dtype such as ``INT4``.
    """
    bits = _bits(section)
    unpacks = quantization_method(section) == COMPRESSED
    weights, taken = _weights(tensors, bits)
    joined: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name in taken:
            continue
        weight = weights.get(name)
        if weight is None:
            joined[name] = tensor
            continue
        beside = _sum(tensors, weight.beside)
        stored = tensor.stored_bytes + beside + _sum(tensors, weight.on_host)
        loaded = beside + (_dense_bytes(weight) if unpacks else tensor.stored_bytes)
        if f"{name}.nested_absmax" in weight.beside:
            loaded += _OFFSET_BYTES
        packed = tensor.stored_bytes if unpacks and name != weight.name else 0
        joined[weight.name] = StoredTensor(weight.dtype, weight.shape, stored, loaded, packed)
    return joined


def _weights(tensors: Mapping[str, StoredTensor], bits: int) -> tuple[dict[str, _Weight], set[str]]:
    """The packed weights by the name of their tensor, and the names of what goes with them; no tensor is in two."""
    found = {name: weight for name, tensor in tensors.items() if (weight := _weight(name, tensor, tensors, bits))}
    # A scale may be in 8 bit itself, and look like a weight.
    scales = {other for weight in found.values() for other in (*weight.beside, *weight.on_host)}
    weights: dict[str, _Weight] = {}
    taken: set[str] = set()
    named: set[str] = set()
    for name, weight in found.items():
        others = {*weight.beside, *weight.on_host}
        if name not in scales and weight.name not in named and not others & taken:
            weights[name] = weight
            named.add(weight.name)
            taken |= others
    return weights, taken


def _dense_bytes(weight: _Weight) -> int:
    """What is there after the first forward pass: compressed-tensors unpacks all weights and keeps the results.

    From 0.15 on (which transformers 5 asks for) they replace the packed words (``ModelCompressor.decompress_model``);
    before, words that had a name of their own stayed (``CompressedLinear.forward``).
    """
    return _DENSE_BYTES * StoredTensor(weight.dtype, weight.shape, 0).elements


def _sum(tensors: Mapping[str, StoredTensor], names: Iterable[str]) -> int:
    return sum(tensors[name].stored_bytes for name in names)


def _weight(name: str, tensor: StoredTensor, tensors: Mapping[str, StoredTensor], bits: int) -> _Weight | None:
    """What a tensor is the packed weight of; ``None`` for any other tensor."""
    stem, _, last = name.rpartition(".")

    def there(names: Iterable[str], prefix: str = f"{stem}.") -> tuple[str, ...]:
        return tuple(prefix + other for other in names if prefix + other in tensors)

    plain = f"{stem}.weight"
    if last == "qweight" and plain not in tensors:
        shape = _of_groups(stem, tensors) or (tensor.stored_bytes * 8 // bits,)
        return _Weight(plain, f"INT{bits}", shape, there(_BESIDE_QWEIGHT))
    if last.startswith("_") and last.endswith(_QDATA):
        return _flattened(name, tensor, tensors, bits)
    if last == "weight_packed" and plain not in tensors:
        is_float = tensor.dtype == "U8"
        count = tensor.stored_bytes * 2 if is_float else tensor.stored_bytes * 8 // bits
        return _Weight(plain, "FP4" if is_float else f"INT{bits}", (count,), there(_BESIDE_WEIGHT))
    if last.endswith("_blocks") and tensor.dtype == "U8":
        whole, scales = name.removesuffix("_blocks"), f"{name.removesuffix('_blocks')}_scales"
        if scales in tensors and whole not in tensors:
            return _Weight(whole, "MXFP4", (tensor.stored_bytes * 2,), (scales,))
    states = there(_STATES, f"{name}.")
    if states:
        word = "NF4" if states[0].endswith("nf4") else "FP4"
        return _Weight(name, word, (tensor.stored_bytes * 2,), there(_BESIDE_4BIT, f"{name}."), states)
    if tensor.dtype in _EIGHT_BITS:
        return _eight_bits(name, tensor, tensors)
    return None


def _flattened(name: str, tensor: StoredTensor, tensors: Mapping[str, StoredTensor], bits: int) -> _Weight | None:
    """A tensor of torchao, which is stored in parts."""
    stem, _, last = name.rpartition(".")
    own = last.removesuffix(_QDATA)
    whole = f"{stem}.{own[1:]}"
    if whole in tensors or len(own) < 2:
        return None
    beside = tuple(part for kind in _BESIDE_QDATA if (part := f"{stem}.{own}_{kind}") in tensors)
    word = "FP8" if tensor.dtype.startswith("F8") else f"INT{bits}"
    is_whole = tensor.dtype in _EIGHT_BITS and bits == 8
    return _Weight(whole, word, tensor.shape if is_whole else (tensor.stored_bytes * 8 // bits,), beside)


def _eight_bits(name: str, tensor: StoredTensor, tensors: Mapping[str, StoredTensor]) -> _Weight:
    """A weight of one byte each, of a module (``weight``) or bare (``gate_up_proj`` of joined experts)."""
    stem, _, last = name.rpartition(".")
    names = [f"{stem}.{other}" for other in (*_BESIDE_WEIGHT, "SCB")] if last == "weight" else []
    names += [f"{name}_scale", f"{name}_scale_inv"]
    beside = tuple(dict.fromkeys(other for other in names if other in tensors))
    host = (f"{stem}.weight_format",) if f"{stem}.SCB" in beside and f"{stem}.weight_format" in tensors else ()
    return _Weight(name, "INT8" if tensor.dtype == "I8" else "FP8", tensor.shape, beside, host)


def _of_groups(stem: str, tensors: Mapping[str, StoredTensor]) -> tuple[int, ...] | None:
    """Shape of a GPTQ weight from ``g_idx`` (one number an input) and ``scales`` (one column an output).

    Needs no number of bits, which gptqmodel can set for each module (``dynamic``).
    """
    index, scales = tensors.get(f"{stem}.g_idx"), tensors.get(f"{stem}.scales")
    if index is None or scales is None or len(scales.shape) != 2 or not index.elements or not scales.shape[1]:
        return None
    return scales.shape[1], index.elements


def _bits(section: Mapping[str, Any]) -> int:
    """Bits of a packed weight; the fewest where groups differ, which counts too many elements rather than too few."""
    if quantization_method(section) == "torchao":
        kind: Any = section.get("quant_type")
        kind = kind.get("default") if isinstance(kind, dict) else None
        name = kind.get("_type") if isinstance(kind, dict) else None
        return 4 if isinstance(name, str) and name.startswith(_TORCHAO_INT4) else 8
    groups = section.get("config_groups")
    parts = [section, *(groups.values() if isinstance(groups, dict) else ())]
    named = [part.get(key) for part in parts if isinstance(part, dict) for key in ("bits", "w_bit", "wbits")]
    for part in parts[1:]:
        weights = part.get("weights") if isinstance(part, dict) else None
        named.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    return min((value for value in named if type(value) is int and 1 <= value <= 8), default=4)
