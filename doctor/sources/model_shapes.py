"""Dimensions of a model, from the many spellings of config.json. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..data.config_defaults import PARTS, SHAPES
from ..data.remote_registration import REMOTE_TOWERS
from ..errors import ModelFileError
from ..model import MOST_FRAMES, LayerCache, TextShape, VisionShape
from .checkpoint import StoredTensor
from .layer_caches import layer_caches, named_layers
from .shapes_from_tensors import kv_heads as kv_heads_of
from .shapes_from_tensors import mlp_width

_TEXT_PARTS = ("text_config", "llm_config", "language_config", "decoder")
"""Where families keep the text body: most; InternVL-Chat; DeepSeek-VL2; encoder-decoders. Otherwise the root is the text
config."""

_WHOLE = "vlm_config"
"""Where PI0 keeps the config of the model that it wraps."""

_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "layers", "decoder_layers"),
    "hidden": ("hidden_size", "embed_dim", "n_embd", "d_model", "dim", "width"),
    "intermediate": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "mlp_dim", "decoder_ffn_dim", "d_ff"),
    "heads": ("num_attention_heads", "num_heads", "n_head", "attention_heads", "decoder_attention_heads", "heads"),
    "kv_heads": ("num_key_value_heads", "num_multi_query_heads", "multi_query_group_num", "n_head_kv"),
    "head_dim": ("head_dim", "kv_channels", "attention_head_dim"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
    "max_positions": ("max_position_embeddings", "seq_length", "n_positions"),
    "patch": ("patch_size", "spatial_patch_size"),
    "frames": ("temporal_patch_size", "patch_temporal"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "active_experts": ("num_experts_per_tok", "moe_topk", "moe_k"),
    "shared_experts": ("n_shared_experts", "moe_num_shared_experts"),
}
"""Our word to the families' words, the usual one first. ``num_layers`` to ``seq_length``: ChatGLM (``glm-4v-9b``);
``num_multi_query_heads``: CogVLM2; ``depth`` and ``embed_dim``: the Qwen-VL towers; ``layers`` and ``attention_heads``:
Kosmos-2; ``decoder_...``: BART's heirs (Florence-2); ``d_ff``: T5's (UDOP); ``moe_k`` and its like: ERNIE 4.5 VL."""

_LISTS = frozenset({"moe_intermediate_size", "experts"})
"""Words that ERNIE 4.5 VL gives twice: for experts that read text and for those that read images. The larger counts."""

_MAX_DIMENSION = 2**31
"""Nothing real comes near; it keeps products of hostile numbers small."""


class Fields:
    """One part of a config, read by our own words.

    What the file leaves out has the value of the class's default, as in transformers: LLaVA-1.5's config.json does not
    say ``hidden_size`` at all.
    """

    def __init__(self, values: Mapping[str, Any], model_type: str, where: str) -> None:
        self.model_type = model_type
        self._values = values
        self._defaults: Mapping[str, float] = SHAPES.get(model_type, {})
        self._where = where

    def raw(self, key: str) -> Any:
        """The value under exactly this key, or ``None``."""
        value = self._values.get(key)
        return self._defaults.get(key) if value is None else value

    def says_none(self, key: str) -> bool:
        """True when the file itself holds ``null`` under this key, whatever the default of the class."""
        return key in self._values and self._values[key] is None

    def get(self, word: str) -> int | None:
        """A positive integer, or ``None`` when neither the file nor the class gives one.

        Raises:
            ModelFileError: The value is no integer from 1 to 2**31.
        """
        spellings = _SPELLINGS.get(word, (word,))
        found = [key for key in spellings if self._values.get(key) is not None]
        found += [key for key in spellings if key in self._defaults]
        if not found:
            return None
        value = self.raw(found[0])
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # InternVL writes patch_size and image_size as [height, width].
        if word in _LISTS and isinstance(value, list) and 0 < len(value) <= 8 and all(type(item) is int for item in value):
            value = max(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 < value < _MAX_DIMENSION:
            raise ModelFileError(
                f"config.json: {self._where}{found[0]} is {repr(value)[:60]}, not a positive integer; correct it."
            )
        return value

    def need(self, word: str) -> int:
        """As ``get``, for what a plan cannot do without.

        Raises:
            ModelFileError: Missing; the message names the key.
        """
        value = self.get(word)
        return self.missing(_SPELLINGS.get(word, (word,))[0]) if value is None else value

    def missing(self, key: str) -> NoReturn:
        """Report a key that is not there."""
        raise ModelFileError(f"config.json has no {self._where}{key}; use the config.json that belongs to this checkpoint.")


def text_fields(config: Mapping[str, Any]) -> Fields:
    """The part of a config that describes the text body.

    Raises:
        ModelFileError: ``text_config`` (or its like) is no JSON object.
    """
    whole = config.get(_WHOLE)
    if isinstance(whole, dict) and "text_config" in whole:
        config = whole
    for part in _TEXT_PARTS:
        if config.get(part) is not None:
            return _part(config, part)
    root_type = _word(config.get("model_type"))
    # Qwen2-VL's config.json is flat; what it leaves out has the default of the nested class.
    nested = PARTS.get(root_type, {}).get("text_config", root_type)
    return Fields(config, nested, "")


def vision_fields(config: Mapping[str, Any]) -> Fields | None:
    """The part of a config that describes the vision tower, if there is one.

    Raises:
        ModelFileError: ``vision_config`` is no JSON object.
    """
    if config.get("vision_config") is not None:
        return _part(config, "vision_config")
    family = _word(config.get("model_type"))
    if family in REMOTE_TOWERS:
        return Fields(REMOTE_TOWERS[family], family, "vision_config.")
    nested = PARTS.get(family, {}).get("vision_config")
    return Fields({}, nested, "vision_config.") if nested else None


def _part(config: Mapping[str, Any], part: str) -> Fields:
    values = config[part]
    if not isinstance(values, dict):
        raise ModelFileError(
            f"config.json: {part} is not a JSON object; use the config.json that belongs to this checkpoint."
        )
    named = _word(values.get("model_type"))
    usual = PARTS.get(_word(config.get("model_type")), {}).get(part, "")
    # 4.57 writes "Glm4vMoe_text" where 5.x has "glm4v_moe_text".
    is_usual = not named or named.replace("_", "").lower() == usual.replace("_", "")
    return Fields(values, usual if is_usual else named, f"{part}.")


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def text_shape(fields: Fields, tensors: Mapping[str, StoredTensor], layer: str) -> TextShape:
    """Dimensions of the text body.

    Args:
        fields: ``text_config`` or the root.
        tensors: By module name, for what the config does not say.
        layer: Key of any text layer.

    Raises:
        ModelFileError: A key that a plan needs is missing or no positive integer.
    """
    hidden, heads = fields.need("hidden"), fields.need("heads")
    head_dim = _width(fields, "head_dim") or max(1, hidden // heads)
    kv_heads = heads if fields.raw("multi_query_attention") is False else fields.get("kv_heads")
    kv_heads = kv_heads or kv_heads_of(tensors, layer, heads, head_dim) or heads
    layers, latent = fields.get("layers") or named_layers(fields) or fields.need("layers"), fields.get("kv_lora_rank")
    if latent:
        # Multi-head latent attention: transformers 4.57 caches the expanded keys (nope + rope) and values of every head.
        expanded = sum(_width(fields, key) or 0 for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        kv_heads, head_dim = heads, max(1, (expanded + 1) // 2)
    has_no_window = fields.raw("use_sliding_window") is False or fields.says_none("sliding_window")
    window = None if has_no_window else fields.get("sliding_window")
    caches = layer_caches(fields, layers, window)
    full_kv_heads, full_head_dim = _full_attention(fields, tensors, layer, caches, (heads, kv_heads, head_dim))
    return TextShape(
        layers=layers,
        hidden=hidden,
        intermediate=_active_width(fields),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=fields.need("vocabulary"),
        sliding_window=window,
        attention_chunk=fields.get("attention_chunk_size"),
        max_positions=fields.get("max_positions"),
        body=fields.model_type,
        experts=_count(fields, "experts"),
        active_experts=_count(fields, "active_experts"),
        expert_width=fields.get("moe_intermediate_size") or 0,
        kv_lora_rank=latent,
        qk_rope_head_dim=_width(fields, "qk_rope_head_dim") if latent else None,
        qk_nope_head_dim=_width(fields, "qk_nope_head_dim") if latent else None,
        v_head_dim=_width(fields, "v_head_dim") if latent else None,
        linear_width=(fields.get("linear_num_value_heads") or 0) * (fields.get("linear_value_head_dim") or 0),
        cached_layers=caches,
        full_head_dim=full_head_dim,
        full_kv_heads=full_kv_heads,
        layer_input=_width(fields, "hidden_size_per_layer_input") or 0,
    )


def _full_attention(
    fields: Fields,
    tensors: Mapping[str, StoredTensor],
    layer: str,
    caches: Sequence[LayerCache],
    usual: tuple[int, int, int],
) -> tuple[int, int]:
    """KV heads and head_dim of the layers with full attention, where they differ from those beside them; else zeros.

    The norm of its queries is as wide as a head, or as all of them (OLMo), and not packed in quantized checkpoints.
    Gemma 4's config.json says it in one of two ways, by release.
    """
    heads, kv_heads, head_dim = usual
    if not {"full", "sliding"} <= set(caches):
        return 0, 0
    own, beside = (f"{layer.rpartition('.')[0]}.{caches.index(kind)}" for kind in ("full", "sliding"))
    is_of_head = _norm_width(tensors, beside) in (None, head_dim)
    width = (is_of_head and _norm_width(tensors, own)) or _width(fields, "global_head_dim") or head_dim
    found = kv_heads_of(tensors, own, heads, width)
    if found is None:
        found = (fields.get("num_global_key_value_heads") if fields.raw("attention_k_eq_v") else None) or kv_heads
    return (0, 0) if (found, width) == (kv_heads, head_dim) else (found, width)


def _norm_width(tensors: Mapping[str, StoredTensor], layer: str) -> int | None:
    """Elements of the norm of a layer's queries."""
    norm = tensors.get(f"{layer}.self_attn.q_norm.weight")
    return norm.shape[0] if norm is not None and len(norm.shape) == 1 else None


def _width(fields: Fields, key: str) -> int | None:
    """A width that may be 0: GLM-5-Next writes so where a head has no such part."""
    return None if any(fields.raw(spelling) == 0 for spelling in _SPELLINGS.get(key, (key,))) else fields.get(key)


def _count(fields: Fields, word: str) -> int:
    """A number that may be 0 or left out: of experts, where there are some."""
    return _width(fields, word) or 0


def _active_width(fields: Fields) -> int:
    """MLP width that one token passes: the whole MLP, or its share of a mixture of experts."""
    experts_per_token = _count(fields, "active_experts")
    if not experts_per_token:
        # Gemma 4: layers that use the keys and values of others have an MLP of twice the width.
        is_doubled = fields.raw("use_double_wide_mlp") is True and _count(fields, "num_kv_shared_layers") > 0
        return fields.need("intermediate") * (2 if is_doubled else 1)
    expert = fields.get("moe_intermediate_size") or fields.need("intermediate")
    shared = fields.get("shared_expert_intermediate_size") or _count(fields, "shared_experts") * expert
    return max(experts_per_token * expert + shared, fields.get("intermediate") or 0)


def vision_shape(fields: Fields, tensors: Mapping[str, StoredTensor], tower: str) -> VisionShape | None:
    """Dimensions of the vision tower, or ``None`` when the config does not give them all.

    Args:
        fields: ``vision_config``.
        tensors: By module name: the width of the MLP is read there.
        tower: Key of the vision unit.

    Raises:
        ModelFileError: A value is no positive integer.
    """
    if isinstance(fields.raw("depths"), list):
        return None  # Florence-2's tower has stages of different widths.
    layers, heads = fields.get("layers"), fields.get("heads")
    # Qwen2-VL's tower is embed_dim wide and calls the width of its output hidden_size.
    hidden = fields.get("embed_dim") or fields.get("hidden")
    patch = fields.get("patch")
    if not (layers and heads and hidden and patch):
        return None
    intermediate = mlp_width(tensors, tower) or fields.get("intermediate") or int(hidden * _ratio(fields.raw("mlp_ratio")))
    kind = fields.raw("model_type")
    return VisionShape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        patch=patch,
        kind=kind if isinstance(kind, str) else "",
        frames=fields.get("frames") or MOST_FRAMES,
    )


def _ratio(value: Any) -> float:
    """``mlp_ratio``; 4 is the usual width of a transformer's MLP."""
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1024 else 4.0
