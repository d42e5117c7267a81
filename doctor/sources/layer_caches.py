"""What each text layer keeps between tokens, from the many ways of config.json to say so. Pure.

As ``get_layer_types_and_kwargs`` of ``cache_utils.py`` (transformers 5.23) decides which cache a layer gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..data.config_defaults import LAYER_PATTERNS
from ..model import LayerCache

if TYPE_CHECKING:
    from .model_shapes import Fields

_WORDS: Mapping[str, LayerCache] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "hybrid_sliding": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "linear",
    "recurrent": "linear",
    "conv": "linear",
    "moe": "none",
    "mlp": "none",
}
"""Words of transformers (``ALLOWED_LAYER_TYPES`` in ``configuration_utils.py``, and older ones remapped there). A word
that is not here (``indexed_attention``, ``hybrid``) keeps every token: the upper bound."""

_LISTS = ("layer_types", "layers_block_type")
"""Keys under which a config names its layers one by one."""

_MAX_LAYERS = 10_000
"""Far more than any model has; the profile of one that promises more is refused once its tensors are counted."""

_LETTERS: Mapping[str, LayerCache] = {"M": "linear", "*": "full", "-": "none", "E": "none"}
"""``hybrid_override_pattern`` of Nemotron-H."""


def layer_caches(fields: Fields, layers: int, sliding_window: int | None) -> tuple[LayerCache, ...]:
    """One word a layer, or nothing where all layers are alike.

    Args:
        fields: ``text_config`` or the root.
        layers: Their number.
        sliding_window: Tokens, ``None`` when no layer has a window.
    """
    if layers > _MAX_LAYERS:
        return ()
    found = list(_named(fields, layers) or _by_rule(fields, layers, sliding_window))
    for layer in _numbers(fields.raw("cross_attention_layers")):  # Mllama
        if layer < len(found):
            found[layer] = "cross"
    shared = _count(fields.raw("num_kv_shared_layers"))  # Gemma 3n and 4: the last layers read what earlier ones keep.
    if 0 < shared < layers:
        found[layers - shared :] = ["none"] * shared
    if sliding_window is None:
        found = ["full" if kind == "sliding" else kind for kind in found]
    usual: LayerCache = "full" if sliding_window is None else "sliding"
    return () if all(kind == usual for kind in found) else tuple(found)


def named_layers(fields: Fields) -> int:
    """Number of layers in a list of their kinds, which is all that Nemotron-H's config says; 0 where there is none."""
    words = next((words for key in _LISTS if isinstance(words := fields.raw(key), list)), [])
    return len(words) if len(words) <= _MAX_LAYERS else 0


def _named(fields: Fields, layers: int) -> list[LayerCache] | None:
    """What the file says layer by layer, unless it contradicts the number of layers."""
    letters = fields.raw("hybrid_override_pattern")
    if isinstance(letters, str) and len(letters) == layers:
        return [_LETTERS.get(letter, "full") for letter in letters]
    for key in _LISTS:
        words = fields.raw(key)
        if isinstance(words, list) and len(words) == layers and all(isinstance(word, str) for word in words):
            return [_WORDS.get(word, "full") for word in words]
    return None


def _by_rule(fields: Fields, layers: int, sliding_window: int | None) -> list[LayerCache]:
    """What the class makes of a file that does not name its layers."""
    every = _count(fields.raw("full_attention_interval"))  # Qwen3-Next and 3.5: the others are linear.
    if every:
        return ["linear" if (layer + 1) % every else "full" for layer in range(layers)]
    every = _count(fields.raw("sliding_window_pattern"))  # Gemma 3, Cohere 2, EXAONE 4
    if every and sliding_window is not None:
        return ["sliding" if (layer + 1) % every else "full" for layer in range(layers)]
    first = fields.raw("max_window_layers")  # Qwen2
    if type(first) is int and sliding_window is not None:
        return ["sliding" if layer >= first else "full" for layer in range(layers)]
    pattern = LAYER_PATTERNS.get(fields.model_type)
    if pattern:
        return [_WORDS.get(pattern[layer % len(pattern)], "full") for layer in range(layers)]
    return ["full" if sliding_window is None else "sliding"] * layers


def _count(value: Any) -> int:
    """A number of layers; 0 for anything else."""
    return value if type(value) is int and 0 < value < 2**31 else 0


def _numbers(value: Any) -> list[int]:
    """A list of layer numbers; nothing for anything else."""
    return [item for item in value if type(item) is int and item >= 0] if isinstance(value, list) else []
