"""A checkpoint as it lies on disk or on the hub: config, tensors by name, file names. Records only, no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element. Source: ``enum Dtype`` of safetensors 0.8 (``safetensors/src/tensor.rs``)."""

TORCH_DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""safetensors' word to torch's, for the types a model can compute or be stored in."""


class StoredTensor(NamedTuple):
    """One tensor as a safetensors header describes it."""

    dtype: str
    """safetensors' word, a key of ``DTYPE_BITS``; for a quantized weight joined with its scales what it is quantized to,
    such as ``INT4`` or ``NF4``."""
    shape: tuple[int, ...]
    stored_bytes: int
    loaded_bytes: int | None = None
    """On a GPU, where a quantized weight takes something else there than in its file."""
    packed_bytes: int = 0
    """Of packed words that old libraries keep beside the weight they have unpacked; not in ``loaded_bytes``."""

    @property
    def elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)


class Checkpoint(NamedTuple):
    """What can be known of a model without reading a single weight."""

    config: Mapping[str, Any]
    """config.json."""
    tensors: Mapping[str, StoredTensor]
    """All shards together, under the names of the checkpoint."""
    files: tuple[str, ...] = ()
    """Safetensors files that the headers were read from; empty for a catalogue entry."""
    processor: Mapping[str, Any] | None = None
    """preprocessor_config.json, or the part of processor_config.json about images; ``None`` where there is neither."""
    notes: tuple[str, ...] = ()
    """What the reader of the files assumed, for the user."""
    shared: Mapping[str, str] = {}
    """Name of a tensor that is the same memory as another, to that one's; only files of ``torch.save`` say so."""
    broken_calls: tuple[str, ...] | None = None
    """What code beside it relies on (``data/removed_calls.py``); ``None`` where there is no code."""
    moved_joins: tuple[str, ...] | None = None
    """What that code moves itself before it is joined (``data/joins.py``); ``None`` where there is no code."""
    tells_head: bool = False
    """Whether code beside it names its head to transformers."""
    prompts: Mapping[str, Any] = {}
    """processor_config.json without its parts: what counts the tokens of images in a prompt."""
