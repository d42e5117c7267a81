"""What one text layer needs while it reads the prompt, by its kind. Pure arithmetic on shapes.

Symbols: T tokens, H hidden, I width of the MLP, Q width of the queries of all heads, k experts that one token passes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from ..data.activations import ATTENTION_STATES, DENSE_EXPERTS_BEFORE_5, SCORE_BYTES, TextCoefficient, text_coefficient
from ..model import LayerCache, ModelProfile, TextShape
from ..workload import Workload
from .image_tokens import ImageLoad
from .kv_cache import kept_elements
from .release import Release, is_before_5
from .weights import computed_item_bytes, score_bytes

_NORM_STATES = 6.1
"""Hidden states that live while a norm in the middle of a layer works: the layer's input, the sum with what attention
gave, the normed one in float32 and its square. Counted."""
_EAGER_QUERIES = 3
"""Queries, and keys and values repeated for every head. Counted."""
_CROSSED_STATES = 3
"""Of an image feature that a layer reads by cross-attention, each as wide as the queries of all heads. Counted for Llama
3.2 Vision, and measured on an H200."""
_LINEAR_VALUES = 2
"""Width of the values of linear attention in multiples of the hidden state: the most of Qwen3-Next and Qwen3.5 models."""


class LayerKind(NamedTuple):
    """What tells two layers of a text body apart."""

    cache: LayerCache
    has_experts: bool


def layer_kinds(profile: ModelProfile) -> dict[str, LayerKind]:
    """Kind of each text layer, by its key.

    A mixture has layers without experts (the first of DeepSeek and GLM-4.5V, every other one of Llama 4 Maverick): they
    have less than half of the bytes of the largest.
    """
    text = profile.text
    layers = [unit for unit in profile.units if unit.role == "layer"]
    largest = max((unit.stored_bytes for unit in layers), default=0)
    usual: LayerCache = "full" if text.sliding_window is None else "sliding"
    kinds = {}
    for number, unit in enumerate(layers):
        layer = number if unit.layer is None else unit.layer
        cache = text.cached_layers[layer] if layer < len(text.cached_layers) else usual
        kinds[unit.key] = LayerKind(cache, bool(text.experts) and 2 * unit.stored_bytes >= largest)
    return kinds


def coefficient_of(profile: ModelProfile) -> TextCoefficient:
    """The coefficient of a model's text body."""
    known = text_coefficient(profile.model_type, profile.text.body, profile.architecture)
    if profile.text_multiples is None:
        return known
    of_mlp, of_hidden = profile.text_multiples
    return msgspec.structs.replace(
        known, intermediate_multiple=of_mlp, hidden_multiple=of_hidden, source="your own rules for this family"
    )


def elements_of(kind: LayerKind, profile: ModelProfile, release: Release) -> float:
    """Elements a token that live at once while a layer with fused attention reads the prompt."""
    text, coefficient = profile.text, coefficient_of(profile)
    result = max(_attention(kind, text, coefficient), _NORM_STATES * text.hidden)
    if kind.has_experts:
        result = max(result, _experts(profile, coefficient, release))
        if coefficient.runs_all_experts:  # the width of its MLP is that of one expert
            return result
    return max(result, coefficient.elements(intermediate=text.intermediate, hidden=text.hidden))


def _attention(kind: LayerKind, text: TextShape, coefficient: TextCoefficient) -> float:
    """Elements a token around fused attention."""
    if kind.cache == "linear":
        values = text.linear_width or _LINEAR_VALUES * text.hidden
        return 2 * text.hidden + coefficient.linear_multiple * values
    if text.kv_lora_rank is not None:
        # Queries and keys joined of their parts; expanded keys and values; values and output as the kernel wants them.
        rotated, rest, value = text.qk_rope_head_dim or 0, text.qk_nope_head_dim or 0, text.v_head_dim or text.head_dim
        of_head = 3 * (rest + rotated) + (rest + value) + 2 * value + rotated
        return 2.05 * text.hidden + text.heads * of_head + text.kv_lora_rank + 4 * rotated
    _, head_dim = text.heads_of(kind.cache)
    return 2.1 * text.hidden + coefficient.attention_multiple * text.heads * head_dim


def _experts(profile: ModelProfile, coefficient: TextCoefficient, release: Release) -> float:
    """Elements a token in a mixture of experts.

    transformers 5 sorts all pairs of token and expert and multiplies them group by group (grouped_mm_experts_forward).
    Before, a loop took one expert after another, which at worst is passed by every token.
    """
    text = profile.text
    hidden, active = text.hidden, max(1, text.active_experts)
    width = _expert_width(text)
    copies = coefficient.experts_hidden_multiple
    if is_before_5(release):
        if profile.model_type in DENSE_EXPERTS_BEFORE_5 or text.body in DENSE_EXPERTS_BEFORE_5:
            return text.experts * max(hidden + 4 * width, 3 * hidden + 2 * width) + coefficient.beside_experts * hidden
        return (coefficient.beside_experts + 3) * hidden + 4 * width
    passed = text.experts if coefficient.runs_all_experts else active
    return passed * max(copies * hidden, hidden + 4 * width) + coefficient.beside_experts * hidden


def is_eager(text: TextShape, workload: Workload) -> bool:
    """Whether the layers of a text body make the scores of all pairs of tokens."""
    return workload.attention == "eager" or (workload.attention == "sdpa" and text.is_never_fused)


def _score_bytes(profile: ModelProfile, workload: Workload) -> float:
    return SCORE_BYTES.get(profile.text.body) or score_bytes(profile, workload)


def pairs(
    kind: LayerKind, profile: ModelProfile, workload: Workload, images: ImageLoad, prompt_tokens: int
) -> tuple[int, int]:
    """Bytes for pairs of tokens: of masks that live through all layers, and beside the attention of one layer.

    Eager attention has an additive mask, and scores of each head. Fused attention has none of it, except where it needs an
    explicit mask: in a padded batch, where a window slides once the prompt is longer, or where images attend both ways
    (Gemma 3, with a second mask for the full layers). It is boolean, and the kernel makes an additive copy and another with
    aligned rows. flash_attention_2 takes no mask. Source: masking_utils.py of transformers 5; convert_boolean_attn_mask and
    preprocess_mask of torch.
    """
    text, (kept, each) = profile.text, coefficient_of(profile).pair_bytes
    working: float = each
    item_bytes = computed_item_bytes(profile, workload)
    window = text.attention_chunk if text.sliding_window is None else text.sliding_window
    if is_eager(text, workload):
        kept += item_bytes * (1 if window is None else 2)
        working += 0 if kind.cache in ("linear", "cross") else text.heads * _score_bytes(profile, workload)
    elif workload.attention == "sdpa":
        slides = window is not None and (prompt_tokens > window or images.tokens > 0)
        has_two = window is not None and (images.tokens > 0 or workload.is_padded)
        kept += 2 if has_two else int(slides or workload.is_padded)
        working += 2 * item_bytes if slides or workload.is_padded else 0
    count = prompt_tokens**2 * workload.batch
    kept, beside = kept * count, math.ceil(working * count)
    if kind.cache == "cross":
        # A mask of text tokens by image features in the model's type, and its copies.
        across = prompt_tokens * images.features * workload.batch * item_bytes
        kept, beside = kept + across, beside + 2 * across + crossed_bytes(text, workload, item_bytes, images.features)
        if is_eager(text, workload):
            seen = text.heads * prompt_tokens * images.features * workload.batch
            beside += math.ceil(seen * _score_bytes(profile, workload))
    return kept, beside


def layer_bytes(
    kind: LayerKind, profile: ModelProfile, workload: Workload, images: ImageLoad, prompt_tokens: int, *, release: Release
) -> int:
    """Bytes that a layer needs at its worst moment, masks included, its own keys and values not."""
    text, each = profile.text, prompt_tokens * workload.batch * computed_item_bytes(profile, workload)
    kept, attention = pairs(kind, profile, workload, images, prompt_tokens)
    result = math.ceil(each * elements_of(kind, profile, release))
    if attention:
        _, head_dim = text.heads_of(kind.cache)
        states = max(ATTENTION_STATES * text.hidden, 2.2 * text.hidden + _EAGER_QUERIES * text.heads * head_dim)
        if text.kv_lora_rank is not None:
            states = _attention(kind, text, coefficient_of(profile))
        result = max(result, math.ceil(each * states) + attention)
    return result + kept


def crossed_bytes(text: TextShape, workload: Workload, item_bytes: int, features: int) -> int:
    """Keys and values of image features, repeated for every head, and the keys once more as the kernel wants them."""
    return _CROSSED_STATES * text.heads * text.head_dim * features * workload.batch * item_bytes


def next_token_bytes(
    kind: LayerKind, profile: ModelProfile, workload: Workload, tokens: int, *, features: int, release: Release
) -> int:
    """Bytes beside its cache that a layer needs for one more token when it has ``tokens`` tokens behind it.

    What reads images by cross-attention has ``features`` image features behind it instead.

    ``DynamicCache`` joins the keys, then the values, into new tensors. Eager attention repeats both for every head; latent
    attention expands what it keeps. transformers 5 copies the weights of the chosen experts (batched_mm_experts_forward).
    """
    text, item_bytes = profile.text, computed_item_bytes(profile, workload)
    each = item_bytes * workload.batch * tokens
    experts = 0
    if kind.has_experts and not is_before_5(release):
        passed = workload.batch * max(1, text.active_experts)
        experts = 3 * passed * _expert_width(text) * text.hidden * item_bytes
    if kind.cache in ("linear", "none"):
        return experts
    keys, values = kept_elements(kind.cache, text, release)
    kv_heads, head_dim = text.heads_of(kind.cache)
    if kind.cache == "cross":
        scores = math.ceil(text.heads * workload.batch * features * _score_bytes(profile, workload))
        return crossed_bytes(text, workload, item_bytes, features) + is_eager(text, workload) * scores
    joined = max(keys, values) * each
    expanded = 0
    if text.kv_lora_rank is not None:
        rotated, rest, value = text.qk_rope_head_dim or 0, text.qk_nope_head_dim or 0, text.v_head_dim or text.head_dim
        expanded = 0 if is_before_5(release) else text.heads * (2 * rest + rotated + value) * each
    elif is_eager(text, workload) and text.heads > kv_heads:
        expanded = 2 * text.heads * head_dim * each
    if is_eager(text, workload):
        expanded += math.ceil(text.heads * workload.batch * tokens * _score_bytes(profile, workload))
    return max(joined, expanded, experts)


def _expert_width(text: TextShape) -> int:
    return text.expert_width or math.ceil(text.intermediate / max(1, text.active_experts))
