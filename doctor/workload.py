"""What the model is to do, and how careful the plan has to be."""

from __future__ import annotations

from typing import Literal

import msgspec

from .units import MIB

DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "nf4"]


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the model, at its largest."""

    images: int = 1
    """Images in each prompt."""
    image_height: int | None = None
    """Pixels; ``None`` is the model's own size (LLaVA 336, GLM-4V-9B 1120, CogVLM2 1344) or 1008 where any size goes."""
    image_width: int | None = None
    text_tokens: int = 512
    """Text tokens of the prompt, image tokens not counted."""
    new_tokens: int = 256
    batch: int = 1
    dtype: DType | None = None
    """Type the weights are loaded in; ``None`` is the checkpoint's own."""
    quantization: Quantization | None = None
    """bitsandbytes at load time: ``int8`` (LLM.int8) or ``nf4`` (4 bit)."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    logits: Literal["generate", "forward"] = "generate"
    """``generate`` keeps the logits of the last token only; a plain forward keeps those of every token."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose among the placements that fit."""

    headroom_fraction: float = 0.02
    """Share of each GPU's memory that is free now which the plan leaves free."""
    headroom_min_bytes: int = 256 * MIB
    context_bytes: int | None = None
    """CUDA context of one process on one GPU; ``None`` takes the measured default of ``planner/budget.py``."""
    gpus: tuple[int, ...] | None = None
    """GPU indices that may be used; ``None`` is every visible one."""
    max_gpus: int | None = None
    min_gpus: int = 1
    """Spread over at least this many GPUs, for tests that must see a sharded model."""
