"""What each kind of text layer keeps between tokens, in bytes, as transformers really keeps it."""

from __future__ import annotations

from typing import NamedTuple

from ..model import LayerCache, TextShape
from ..workload import Workload
from .release import Release, is_before_5

_STATE_ELEMENTS = 256
"""Of a layer of linear attention, for each element of a hidden state, in float32: its values are up to twice as wide as the
hidden state, with 128 rows (``linear_key_head_dim`` of Qwen3-Next and Qwen3.5; ``ssm_state_size`` of Mamba 2)."""


class Cached(NamedTuple):
    """Bytes that one layer keeps."""

    prefill: int
    """When the prompt has been read."""
    final: int
    """When the last token has been made."""


def kept_elements(kind: LayerCache, text: TextShape, release: Release) -> tuple[int, int]:
    """Elements a token of the keys and of the values that a kind of layer keeps.

    Multi-head latent attention keeps one compressed vector and the rotated part of the keys under transformers 5
    (``expand_kv`` of modeling_deepseek_v3.py comes behind the cache), the expanded keys and values of every head before.
    """
    if text.kv_lora_rank is not None:
        rotated, rest, value = text.qk_rope_head_dim or 0, text.qk_nope_head_dim or 0, text.v_head_dim or text.head_dim
        if is_before_5(release):
            return text.heads * (rest + rotated), text.heads * value
        return text.kv_lora_rank, rotated
    heads, width = text.heads_of(kind)
    return heads * width, heads * width


def cached(
    kind: LayerCache, text: TextShape, workload: Workload, *, item_bytes: int, tokens: int, features: int, release: Release
) -> Cached:
    """What a layer keeps.

    Args:
        kind: Of the layer.
        text: Dimensions of the text body.
        workload: For batch and new tokens.
        item_bytes: Bytes of an element.
        tokens: Of one prompt, image tokens included.
        features: Image features of one prompt, for cross-attention.
        release: Of transformers.
    """
    if kind == "none":
        return Cached(0, 0)
    if kind == "linear":
        state = 4 * workload.batch * _STATE_ELEMENTS * text.hidden
        return Cached(state, state)
    each = sum(kept_elements(kind, text, release)) * item_bytes * workload.batch
    if kind == "cross":
        return Cached(each * features, each * features)
    window = {"sliding": text.sliding_window, "chunked": text.attention_chunk}.get(kind)
    most = tokens + workload.answer_tokens
    # What is beyond a window goes with the next token: DynamicSlidingWindowLayer keeps a view of the whole tensor.
    return Cached(each * tokens, each * (most if window is None else min(window, most)))
