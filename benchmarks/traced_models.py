"""True dimensions of published models and inputs for them: the material of ``trace_memory.py``."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_QWEN2_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
    }


def _gemma3(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    text = _llama(hidden, intermediate, layers, heads, kv_heads, 262208)
    text.update(model_type="gemma3_text", head_dim=head_dim, sliding_window=1024, query_pre_attn_scalar=head_dim)
    return {"text_config": text, "vision_config": {**_SIGLIP, "image_size": 896, "num_hidden_layers": 27}}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava-1.5-7b": ("llava", {"text_config": _llama(4096, 11008, 32, 32, 32, 32064), "vision_config": _CLIP}),
    "llava-1.5-13b": ("llava", {"text_config": _llama(5120, 13824, 40, 40, 40, 32064), "vision_config": _CLIP}),
    "llava-v1.6-7b": ("llava_next", {"text_config": _llama(4096, 11008, 32, 32, 32, 32064), "vision_config": _CLIP}),
    "llava-onevision-7b": (
        "llava_onevision",
        {"text_config": {"model_type": "qwen2", **_QWEN2_TEXT}, "vision_config": _SIGLIP},
    ),
    "internvl3-8b": ("internvl", {"text_config": {"model_type": "qwen2", **_QWEN2_TEXT, "vocab_size": 151674}}),
    "glm-4.1v-9b": (
        "glm4v",
        {
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [8, 12, 12],
                    "partial_rotary_factor": 0.5,
                }
            }
        },
    ),
    "qwen2-vl-7b": ("qwen2_vl", {"text_config": {**_QWEN2_TEXT, **_MROPE}, "vision_config": {"hidden_size": 3584}}),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "text_config": {**_QWEN2_TEXT, **_MROPE},
            "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        },
    ),
    "qwen2.5-vl-72b": (
        "qwen2_5_vl",
        {
            "text_config": {
                **_MROPE,
                "hidden_size": 8192,
                "intermediate_size": 29568,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "vocab_size": 152064,
            },
            "vision_config": {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 8192},
        },
    ),
    "qwen3-vl-8b": (
        "qwen3_vl",
        {
            "text_config": {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
            },
            "vision_config": {"out_hidden_size": 4096},
        },
    ),
    "qwen3-vl-30b-a3b": (
        "qwen3_vl_moe",
        {
            "tie_word_embeddings": False,
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "vocab_size": 151936,
                "tie_word_embeddings": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
            },
            "vision_config": {"out_hidden_size": 2048},
        },
    ),
    "gemma-3-4b": ("gemma3", _gemma3(2560, 10240, 34, 8, 4, 256)),
    "gemma-3-12b": ("gemma3", _gemma3(3840, 15360, 48, 16, 8, 256)),
    "gemma-3-27b": ("gemma3", _gemma3(5376, 21504, 62, 32, 16, 128)),
    "paligemma-3b": (
        "paligemma",
        {
            "text_config": {**_llama(2048, 16384, 18, 8, 1, 257216), "model_type": "gemma", "head_dim": 256},
            "vision_config": {**_SIGLIP, "image_size": 448, "num_hidden_layers": 27},
        },
    ),
    "pixtral-12b": (
        "llava",
        {
            "text_config": {
                **_llama(5120, 14336, 40, 32, 8, 131072),
                "model_type": "mistral",
                "head_dim": 128,
                "sliding_window": None,
            },
            "vision_config": {"model_type": "pixtral"},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    ),
    "llama-3.2-11b-vision": ("mllama", {"vision_config": {"image_size": 560, "max_num_tiles": 4}}),
    "idefics3-8b": (
        "idefics3",
        {
            "text_config": _llama(4096, 14336, 32, 32, 8, 128259),
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 364,
                "patch_size": 14,
            },
            "scale_factor": 2,
        },
    ),
    "smolvlm-2.2b": (
        "smolvlm",
        {
            "text_config": _llama(2048, 8192, 24, 32, 32, 49280),
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
            },
            "scale_factor": 3,
        },
    ),
}
"""``model_type`` and what differs from the class's defaults."""


def config_of(name: str) -> Any:
    model_type, fields = CONFIGS[name]
    return transformers.AutoConfig.for_model(model_type, **fields)


def text_inputs(config: Any, tokens: int, batch: int) -> dict[str, Any]:
    """Token numbers that mean nothing, and a mask that hides nothing."""
    ids = torch.full((batch, tokens), 5)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type == "gemma3":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def image_inputs(config: Any, image_tokens: int, text: int, batch: int, *, edge: int, sequences: int) -> dict[str, Any]:
    """One image for each prompt: ``edge`` pixels along each side, or so many squares of the tower's own size."""
    vision = config.vision_config
    kind = config.model_type
    marker = next(
        value for key in ("image_token_id", "image_token_index") if (value := getattr(config, key, None)) is not None
    )
    ids = torch.cat([torch.full((batch, image_tokens), marker), torch.full((batch, text), 5)], 1)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("glm4v", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
        inputs["mm_token_type_ids"] = (ids == marker).int()
        grid = edge // vision.patch_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        inputs["pixel_values"] = torch.empty(batch * grid**2, width, dtype=torch.bfloat16)
        inputs["image_grid_thw"] = torch.tensor([[1, grid, grid]] * batch)
        return inputs
    size = vision.image_size
    side = edge if vision.model_type == "pixtral" else size[0] if isinstance(size, (list, tuple)) else size
    squares = torch.empty(batch, sequences, 3, side, side, dtype=torch.bfloat16)
    if kind == "mllama":
        inputs["pixel_values"] = squares[:, None]
        inputs["aspect_ratio_ids"] = torch.full((batch, 1), 6)
        inputs["aspect_ratio_mask"] = torch.ones(batch, 1, sequences, dtype=torch.long)
        inputs["cross_attention_mask"] = torch.ones(batch, ids.shape[1], 1, sequences, dtype=torch.long)
    elif kind in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = squares
        inputs["pixel_attention_mask"] = torch.ones(batch, sequences, side, side, dtype=torch.bool)
    elif kind in ("llava_next", "llava_onevision"):
        inputs["pixel_values"] = squares
        inputs["image_sizes"] = torch.tensor([[edge, edge]] * batch)
    else:
        inputs["pixel_values"] = squares.flatten(0, 1)
        if vision.model_type == "pixtral":
            inputs["image_sizes"] = torch.tensor([[side, side]] * batch)
    if kind in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == marker).long()
    return inputs
