"""What the work on one prompt needs, wherever it runs.

Symbols: T prompt tokens, N new tokens, B batch, H hidden, V vocabulary, b bytes an element.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from ..data.activations import (
    ALL_LOGITS,
    ALL_LOGITS_BEFORE_5,
    FULL_LOGITS_ARCHITECTURES,
    MULTIPLIED_EMBEDDINGS,
    RESCALED_LOGITS,
    RESCALED_SINCE,
)
from ..model import ModelProfile
from ..workload import Workload
from .image_tokens import ImageLoad
from .kv_cache import Cached, cached
from .layer_work import LayerKind, coefficient_of, layer_bytes, next_token_bytes
from .release import Release, is_before_5
from .vision_work import vision_bytes
from .weights import computed_item_bytes

JOINED_GATE_AND_UP = 4
"""``TextCoefficient.intermediate_multiple`` of bodies whose gate and up are one weight."""
_PRODUCT_BYTES, _PRODUCT_OF_JOINED_BYTES = 4, 10
"""A token and unit of the MLP's width, in 8 bit. The widest product is in int32 (4 bytes), in float16 and in the model's
type at once: of ``up`` beside the result of ``gate`` 8 + 2 bytes where the layer's own figure has 3 x 2, of both in one
16."""
_FLOAT32_BYTES = 4
_NORM_STATES = 6
"""Hidden states that a norm over the whole prompt holds at once: input, output and two in float32."""


class Work(msgspec.Struct, frozen=True):
    """Bytes that the work on one prompt of a given length needs, wherever it runs."""

    cached: dict[LayerKind, Cached]
    """What one layer of each kind keeps."""
    layer: dict[LayerKind, int]
    """Prefill of one layer; layers run one after another, so a stage pays for the neediest."""
    next_token: dict[LayerKind, int]
    """One layer, beside its cache, while one more token is made."""
    head: int
    answer: int
    """The head while it makes the next token."""
    returned: int
    """Logits of the prompt, which accelerate's hook around the whole model copies to where the inputs came from."""
    pixels: int
    held: int
    """Where the prompt is embedded, all through prefill: embeddings, pixels, the tower's output and image features."""
    encode: int
    """The vision tower with its input."""


def prompt_work(
    kinds: Collection[LayerKind],
    profile: ModelProfile,
    workload: Workload,
    images: ImageLoad,
    text_tokens: int,
    *,
    release: Release,
) -> Work:
    """Bytes of the work on one prompt.

    Args:
        kinds: Of the layers.
        profile: The model.
        workload: What it is to do.
        images: Its images, counted.
        text_tokens: In place of the workload's.
        release: Of transformers.
    """
    item = computed_item_bytes(profile, workload)
    prompt = text_tokens + images.tokens
    tokens = prompt * workload.batch
    states = tokens * profile.text.hidden * item
    pixels, encode, kept = vision_bytes(profile, workload, images, item)
    temporary = _quantization_temporary(profile, workload, tokens)
    has_next = workload.answer_tokens > 1
    rows, logits, returned = _logits(profile, workload, tokens, item, release=release)
    return Work(
        cached={
            kind: cached(
                kind.cache,
                profile.text,
                workload,
                item_bytes=item,
                tokens=prompt,
                features=images.features,
                release=release,
            )
            for kind in kinds
        },
        layer={kind: temporary + layer_bytes(kind, profile, workload, images, prompt, release=release) for kind in kinds},
        next_token={
            kind: next_token_bytes(
                kind, profile, workload, prompt + workload.answer_tokens, features=images.features, release=release
            )
            if has_next
            else 0
            for kind in kinds
        },
        head=max(_NORM_STATES * states, 2 * states + max(logits, _head_product(profile, workload, rows, item))),
        answer=max(
            workload.batch * profile.text.vocabulary * (item + 4), _head_product(profile, workload, workload.batch, item)
        ),
        returned=returned,
        pixels=pixels,
        held=states * (2 if profile.text.body in MULTIPLIED_EMBEDDINGS else 1)
        + pixels
        + kept
        + _layer_inputs(profile, tokens, item),
        encode=encode,
    )


def _layer_inputs(profile: ModelProfile, tokens: int, item_bytes: int) -> int:
    """Embeddings that each layer has of its own: as looked up, and joined with their projection; with another copy of the
    prompt's embedding. Counted for Gemma 3n and Gemma 4.
    """
    text = profile.text
    return tokens * item_bytes * (2 * text.layers * text.layer_input + text.hidden) if text.layer_input else 0


def makes_all_logits(profile: ModelProfile, release: Release) -> bool:
    """Whether the class makes the logits of every token of the prompt, whoever calls it."""
    return profile.model_type in (ALL_LOGITS_BEFORE_5 if is_before_5(release) else ALL_LOGITS)


def _logits(
    profile: ModelProfile, workload: Workload, tokens: int, item_bytes: int, *, release: Release
) -> tuple[int, int, int]:
    """Of the last token in ``generate``, of every token in a plain forward and in classes that always compute all.

    Returns:
        Of how many tokens, bytes while they are made, and of what the model returns. ``generate`` copies
        what it reads to float32; CogVLM and GLM-4V-9B copy all before they return them.
    """
    if profile.architecture.startswith(FULL_LOGITS_ARCHITECTURES):
        elements = tokens * profile.text.vocabulary
        return tokens, elements * (item_bytes + 4), elements * 4
    if workload.logits == "forward" or makes_all_logits(profile, release):
        made = tokens * profile.text.vocabulary * item_bytes
        is_rescaled = RESCALED_LOGITS.get(profile.model_type) in ("", profile.text.body)
        since = RESCALED_SINCE.get(profile.model_type)
        if since is not None and release is not None and release < since:
            is_rescaled = False
        return tokens, made * (2 if is_rescaled else 1), made
    elements = workload.batch * profile.text.vocabulary
    return workload.batch, elements * (item_bytes + 4), elements * item_bytes


def _head_product(profile: ModelProfile, workload: Workload, rows: int, item_bytes: int) -> int:
    """Bytes at which a head that bitsandbytes quantizes multiplies hidden states of so many tokens; 0 where it does not.

    Beside the logits as they are made, nf4 unpacks the weight, but for one token, whose kernel reads it packed; int8 has
    its product in 32 bit and in float16 (backends/cuda/ops.py of bitsandbytes 0.50). Read in the code. What was measured
    fits: GLM-4V-9B in nf4 took 12 % less than was predicted with its head in 16 bit, which is what this says of its GPU.
    """
    weight = max((unit.linear.largest for unit in profile.units if unit.role == "head"), default=0)
    if workload.quantization is None or not weight:
        return 0
    made = rows * weight // profile.text.hidden
    if workload.quantization == "int8":
        return made * (item_bytes + _FLOAT32_BYTES + 2)
    return made * item_bytes + (weight * item_bytes if rows > 1 else 0)


def _quantization_temporary(profile: ModelProfile, workload: Workload, tokens: int) -> int:
    """What quantized weights need beside a layer.

    bitsandbytes unpacks the weight in use (nf4), or has its product in 32 bit beside two results, the second in the model's
    type (int8: ``int8_scaled_mm`` and ``int8_mm_dequant``, backends/cuda/ops.py). A layer's own figure holds three results
    as wide as the MLP. Kernels of checkpoints that are quantized already (AWQ, GPTQ, FP8 on cards without it) unpack the
    weight in use for long prompts; where bitsandbytes computes in float32, to that, with input and output in it as well.
    """
    text = profile.text
    is_joined = coefficient_of(profile).intermediate_multiple >= JOINED_GATE_AND_UP
    width = (1 + is_joined) * text.intermediate
    if "int8" in (workload.quantization, profile.computes_in):
        return (_PRODUCT_OF_JOINED_BYTES if is_joined else _PRODUCT_BYTES) * tokens * text.intermediate
    if profile.computes_in == "float32":
        return _FLOAT32_BYTES * (text.hidden * width + tokens * (width + text.hidden))
    if profile.quantization:
        return 2 * text.hidden * width
    if workload.quantization is None:
        return 0
    layers = (unit for unit in profile.units if unit.role == "layer")
    return computed_item_bytes(profile, workload) * max(unit.linear.largest for unit in layers)
