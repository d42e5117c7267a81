"""Published vision-language models by the dimensions that decide about memory: what config.json of each says that differs
from the defaults of its class. Names and figures as in the configs on the model hub, written from memory where a page
could not be opened: what they are for is that widths, heads and towers go together as they do in real models.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def body(kind: str, width: int, mlp: int, layers: int, heads: tuple[int, int], vocabulary: int, **more: Any) -> Config:
    """A ``text_config``; ``heads`` of queries, and of keys and values."""
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": 32_768,
        **more,
    }


def tower(kind: str, width: int, mlp: int, layers: int, image: int, patch: int, **more: Any) -> Config:
    """A ``vision_config`` with 16 heads."""
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "image_size": image,
        "patch_size": patch,
        **more,
    }


_CLIP = tower("clip_vision_model", 1024, 4096, 24, 336, 14, projection_dim=768)
_SIGLIP = tower("siglip_vision_model", 1152, 4304, 26, 384, 14)
_SIGLIP_896 = tower("siglip_vision_model", 1152, 4304, 27, 896, 14, vision_use_head=False)
_SIGLIP_DEEPSEEK = tower("siglip_vision_model", 1024, 4096, 24, 384, 16)
_PIXTRAL = tower("pixtral", 1024, 4096, 24, 1024, 16, head_dim=64)
_INTERN: Config = {
    **tower("internvl_vision", 1024, 4096, 24, 448, 14, attention_bias=True),
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
_QWEN2_TOWER: Config = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
_QWEN25_TOWER: Config = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "window_size": 112}
_QWEN3_TOWER: Config = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
_NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
_GRANITE = [[384, 768], [384, 1152], [384, 1536], [768, 384], [768, 768], [1152, 384], [1536, 384]]
_LLAMA_7B = body("llama", 4096, 11_008, 32, (32, 32), 32_064)
_MISTRAL_7B = body("mistral", 4096, 14_336, 32, (32, 8), 32_064, sliding_window=None)

PUBLISHED: dict[str, tuple[str, Config]] = {
    "qwen2-vl-2b": ("qwen2_vl", {
        "text_config": body("qwen2_vl_text", 1536, 8960, 28, (12, 2), 151_936, tie_word_embeddings=True),
        "vision_config": {**_QWEN2_TOWER, "hidden_size": 1536}, "tie_word_embeddings": True,
    }),
    "qwen2-vl-7b": ("qwen2_vl", {
        "text_config": body("qwen2_vl_text", 3584, 18_944, 28, (28, 4), 152_064),
        "vision_config": {**_QWEN2_TOWER, "hidden_size": 3584},
    }),
    "qwen2.5-vl-3b": ("qwen2_5_vl", {
        "text_config": body("qwen2_5_vl_text", 2048, 11_008, 36, (16, 2), 151_936, tie_word_embeddings=True),
        "vision_config": {**_QWEN25_TOWER, "intermediate_size": 3420, "out_hidden_size": 2048}, "tie_word_embeddings": True,
    }),
    "qwen2.5-vl-32b": ("qwen2_5_vl", {
        "text_config": body("qwen2_5_vl_text", 5120, 27_648, 64, (40, 8), 152_064),
        "vision_config": {**_QWEN25_TOWER, "intermediate_size": 3456, "out_hidden_size": 5120},
    }),
    "qwen3-vl-8b": ("qwen3_vl", {
        "text_config": body("qwen3_vl_text", 4096, 12_288, 36, (32, 8), 151_936, head_dim=128),
        "vision_config": {**_QWEN3_TOWER, "out_hidden_size": 4096},
    }),
    "qwen3-vl-30b-a3b": ("qwen3_vl_moe", {
        "text_config": body(
            "qwen3_vl_moe_text", 2048, 6144, 48, (32, 4), 151_936,
            head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        ),
        "vision_config": {**_QWEN3_TOWER, "out_hidden_size": 2048},
    }),
    "internvl3-1b": ("internvl", {
        "text_config": body("qwen2", 896, 4864, 24, (14, 2), 151_674), "vision_config": _INTERN,
    }),
    "internvl3-38b": ("internvl", {
        "text_config": body("qwen2", 5120, 27_648, 64, (40, 8), 151_674),
        "vision_config": {
            **_INTERN, "hidden_size": 3200, "intermediate_size": 12_800, "num_hidden_layers": 45, "num_attention_heads": 25,
            "use_qk_norm": True, "norm_type": "rms_norm",
        },
    }),
    "internvl3.5-30b-a3b": ("internvl", {
        "text_config": body(
            "qwen3_moe", 2048, 6144, 48, (32, 4), 151_936,
            head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        ),
        "vision_config": _INTERN,
    }),
    "internvl3.5-gpt-oss": ("internvl", {"text_config": {"model_type": "gpt_oss"}, "vision_config": _INTERN}),
    "llava-1.5-7b": ("llava", {"text_config": _LLAMA_7B, "vision_config": _CLIP}),
    "llava-1.6-mistral-7b": ("llava_next", {
        "text_config": _MISTRAL_7B, "vision_config": _CLIP, "image_grid_pinpoints": _NEXT,
    }),
    "llava-next-video-7b": ("llava_next_video", {
        "text_config": _LLAMA_7B, "vision_config": _CLIP, "image_grid_pinpoints": _NEXT,
    }),
    "llava-onevision-0.5b": ("llava_onevision", {
        "text_config": body("qwen2", 896, 4864, 24, (14, 2), 152_000, tie_word_embeddings=True),
        "vision_config": _SIGLIP, "image_grid_pinpoints": _ONEVISION, "tie_word_embeddings": True,
    }),
    "llava-onevision-7b": ("llava_onevision", {
        "text_config": body("qwen2", 3584, 18_944, 28, (28, 4), 152_000), "vision_config": _SIGLIP,
        "image_grid_pinpoints": _ONEVISION,
    }),
    "video-llava-7b": ("video_llava", {"text_config": _LLAMA_7B, "vision_config": {**_CLIP, "image_size": 224}}),
    "vip-llava-7b": ("vipllava", {"text_config": _LLAMA_7B, "vision_config": _CLIP}),
    "granite-vision-3.2-2b": ("llava_next", {
        "text_config": body("granite", 2048, 8192, 40, (32, 8), 49_156),
        "vision_config": {**_SIGLIP, "num_hidden_layers": 27},
        "vision_feature_layer": [-24, -20, -12, -1], "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": _GRANITE,
    }),
    "gemma-3-4b": ("gemma3", {
        "text_config": body("gemma3_text", 2560, 10_240, 34, (8, 4), 262_208, head_dim=256, sliding_window=1024),
        "vision_config": _SIGLIP_896,
    }),
    "gemma-3-27b": ("gemma3", {
        "text_config": body("gemma3_text", 5376, 21_504, 62, (32, 16), 262_208, head_dim=128, sliding_window=1024),
        "vision_config": _SIGLIP_896,
    }),
    "paligemma2-3b-448": ("paligemma", {
        "text_config": body("gemma2", 2304, 9216, 26, (8, 4), 257_216, head_dim=256),
        "vision_config": {**_SIGLIP_896, "image_size": 448, "projection_dim": 2304},
        "projection_dim": 2304, "hidden_size": 2304,
    }),
    "llama-3.2-11b-vision": ("mllama", {
        "text_config": body(
            "mllama_text_model", 4096, 14_336, 40, (32, 8), 128_256, cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38]
        ),
        "vision_config": {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8,
            "attention_heads": 16, "image_size": 560, "patch_size": 14, "max_num_tiles": 4, "vision_output_dim": 7680,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
    }),
    "pixtral-12b": ("llava", {
        "text_config": body("mistral", 5120, 14_336, 40, (32, 8), 131_072, head_dim=128, sliding_window=None),
        "vision_config": _PIXTRAL, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    }),
    "mistral-small-3.1-24b": ("mistral3", {
        "text_config": body("mistral", 5120, 32_768, 40, (32, 8), 131_072, head_dim=128, sliding_window=None),
        "vision_config": {**_PIXTRAL, "image_size": 1540, "patch_size": 14},
    }),
    "idefics3-8b": ("idefics3", {
        "text_config": body("llama", 4096, 14_336, 32, (32, 8), 128_259),
        "vision_config": tower("idefics3_vision", 1152, 4304, 27, 364, 14), "scale_factor": 2,
    }),
    "smolvlm2-2.2b": ("smolvlm", {
        "text_config": body("llama", 2048, 8192, 24, (32, 32), 49_280),
        "vision_config": tower("smolvlm_vision", 1152, 4304, 27, 384, 14), "scale_factor": 3, "image_token_id": 49_190,
    }),
    "aya-vision-8b": ("aya_vision", {
        "text_config": body("cohere2", 4096, 14_336, 32, (32, 8), 256_000),
        "vision_config": {**_SIGLIP_896, "image_size": 364},
    }),
    "deepseek-vl-7b": ("deepseek_vl", {
        "text_config": body("llama", 4096, 11_008, 30, (32, 32), 102_400), "vision_config": _SIGLIP_DEEPSEEK,
    }),
    "deepseek-vl-7b-hybrid": ("deepseek_vl_hybrid", {
        "text_config": body("llama", 4096, 11_008, 30, (32, 32), 102_400), "vision_config": _SIGLIP_DEEPSEEK,
    }),
    "janus-pro-7b": ("janus", {
        "text_config": body("llama", 4096, 11_008, 30, (32, 32), 102_400),
        "vision_config": {
            "model_type": "janus_vision_model", "hidden_size": 1024, "mlp_ratio": 4.0, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 384, "patch_size": 16, "projection_dim": 4096,
        },
    }),
}  # fmt: skip
"""Name to ``model_type`` and what its configuration is made of."""

WORKLOADS: dict[str, Config] = {
    "1 image": {"images": 1, "text_tokens": 32},
    "4 images": {"images": 4, "text_tokens": 256},
    "7,000 tokens": {"images": 0, "text_tokens": 7000},
    "batch of 4": {"images": 1, "text_tokens": 512, "batch": 4},
    "eager": {"images": 1, "text_tokens": 1024, "attention": "eager"},
    "forward": {"images": 1, "text_tokens": 1024, "logits": "forward"},
}
