"""What the model is to do, and how careful the plan has to be."""

from __future__ import annotations

from typing import Literal

import msgspec

from .calibration import Calibration
from .units import MIB

DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "nf4"]
Attention = Literal["sdpa", "eager", "flash"]
"""transformers' ``attn_implementation``; ``flash`` is ``flash_attention_2``."""
Optimizer = Literal["adamw", "adamw_8bit", "adafactor", "sgd"]
Preference = Literal["balanced", "speed", "context"]


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step instead of a call of the model."""

    method: Literal["full", "lora"] = "lora"
    optimizer: Optimizer = "adamw"
    lora_rank: int = 16
    """Of adapters on every linear layer of the text body; means nothing for ``full``."""
    gradient_checkpointing: bool = True


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
    """Tokens that ``generate`` makes; means nothing for a training step or a plain forward pass."""
    batch: int = 1
    dtype: DType | None = None
    """Type the weights are loaded in; ``None`` is the checkpoint's own."""
    quantization: Quantization | None = None
    """bitsandbytes at load time: ``int8`` (LLM.int8) or ``nf4`` (4 bit)."""
    is_padded: bool = False
    """The prompts of the batch differ in length, so that attention needs a mask that hides the padding."""
    attention: Attention = "sdpa"
    logits: Literal["generate", "forward"] = "generate"
    """``generate`` keeps the logits of the last token only; a plain forward keeps those of every token."""
    training: Training | None = None
    """``None`` is inference."""
    allocator: Literal["native", "expandable"] = "native"
    """torch's caching allocator as it is, or with ``expandable_segments:True``."""

    @property
    def makes_answer(self) -> bool:
        """Whether tokens are made: not in a training step or a plain forward pass."""
        return self.training is None and self.logits == "generate"

    @property
    def answer_tokens(self) -> int:
        """Tokens behind the prompt."""
        return self.new_tokens if self.makes_answer else 0


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose among the placements that fit."""

    headroom_fraction: float = 0.02
    """Share of each GPU's memory that is free now which the plan leaves free."""
    headroom_min_bytes: int = 256 * MIB
    context_bytes: int | None = None
    """CUDA context of one process on one GPU; ``None`` takes the measured default of ``planner/budget.py``."""
    calibrations: tuple[Calibration, ...] = ()
    """Readings of ``vlm-doctor calibrate``, which take the place of that default on the same card and driver; before those
    that the machine itself brings (``Machine.calibrations``)."""
    prefer: Preference = "balanced"
    """What counts among the placements that fit. ``balanced``: fewest GPUs, then longest prompt, then fastest links;
    ``speed``: fewest GPUs, then fastest links, then longest prompt; ``context``: longest prompt, then fewest GPUs."""
    gpus: tuple[int, ...] | None = None
    """GPU indices that may be used; ``None`` is every visible one."""
    exclude: tuple[int, ...] = ()
    """GPU indices that must not be used."""
    pins: tuple[tuple[str, int], ...] = ()
    """Module path and the GPU index it must be on; a path covers every unit in it."""
    max_memory: tuple[tuple[int, int], ...] = ()
    """GPU index and the bytes that this process may take there, CUDA context included."""
    offload: bool = False
    """Allow the last layers on the CPU when the GPUs do not suffice."""
    max_gpus: int | None = None
    min_gpus: int = 1
    """Spread over at least this many GPUs, for tests that must see a sharded model."""
    keeps_numbers: bool = False
    """The process that loads the model numbers its GPUs as ``gpus`` lists them, or else as CUDA shows them. Otherwise the
    plan's own ``CUDA_VISIBLE_DEVICES`` makes the first stage device 0, to which accelerate's hooks take what the model is
    given."""
