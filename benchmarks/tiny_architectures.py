"""A tiny model of every image-text-to-text architecture of the installed transformers: one shrinker, few exceptions.

The default config of a class is walked key by key: widths, depths, tables and experts become small, and whatever counts
layers follows. What a class demands beyond that is in ``EXCEPTIONS``. ``all_architectures.py`` runs them,
and so do tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WIDTH, HEADS, HEAD_DIM, MLP_WIDTH = 64, 4, 16, 128
TEXT_LAYERS = BLOCKS = 4
VOCABULARY = 256
_FIRST_SPECIAL = 200
"""Token ids from here on are special; a config's own are renumbered to them."""
IMAGE_TOKEN = 199

_VALUES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "embed_dim", "out_hidden_size", "projection_dim", "projector_hidden_size",
            "text_hidden_size", "decoder_hidden_size", "encoder_hidden_size", "word_embed_proj_dim", "output_dim",
            "vision_dim",
            "projection_hidden_size", "projector_input_dim", "projector_output_dim", "image_text_hidden_size",
            "image_token_embed_dim", "output_channels", "downsample_hidden_size", "lru_width",
            "projection_hidden_dim", "image_embed_dim", "n_embd", "adapter_out_dim", "vision_hidden_size",
            "hidden_size_per_layer_input", "pooler_output_size", "adapter_in_dim", "vision_embed_dim",
            "moe_hidden_size",
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "d_ff", "mlp_dim", "encoder_ffn_dim", "decoder_ffn_dim",
            "alignment_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size",
            "projection_intermediate_size",
            "shared_intermediate_size", "share_expert_dim", "vit_mlp_dim", "merged_hidden_size",
        ),
        MLP_WIDTH,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
            "resampler_n_heads", "resampler_heads", "swa_num_attention_heads", "num_sliding_attention_heads", "n_head",
            "conf_num_attention_heads", "index_n_heads", "mamba_num_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads", "num_attention_groups"), 2
    ),
    **dict.fromkeys(
        (
            "head_dim", "d_kv", "resampler_head_dim", "resampler_dim_head", "swa_head_dim", "global_head_dim",
            "index_head_dim",
            "v_head_dim", "qk_nope_head_dim", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim",
        ),
        HEAD_DIM,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "layers",
            "n_layer",
            "n_layers", "depth", "conf_num_hidden_layers",
        ),
        TEXT_LAYERS,
    ),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
        4,
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "num_mtp_layers", "num_nextn_predict_layers"), 1),
    "qk_rope_head_dim": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "n_mel_bins": 16,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "max_position_embeddings": 1024,
    "num_query_tokens": 4,
    "latent_query_num": 4,
    "resampler_n_latents": 4,
    "resampler_num_latents": 4,
    "resampler_depth": 2,
    "aligner_num_add_layers": 2,
    "num_kv_shared_layers": 0,
    "num_global_layers": 2,
    "num_embeddings": 64,
    "codebook_size": 64,
    "base_channels": 32,
    "latent_channels": 32,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "num_position_embeddings": 64,
    "fullatt_block_indexes": [1, 3],
    "deepstack_visual_indexes": [0, 1, 2],
    "global_attn_indexes": [1, 3],
    "cross_attention_layers": [1, 3],
    "intermediate_layers_indices": [0, 1],
    "full_attn_idxs": [1, 3],
    "moe_layers": [1, 3],
    "kv_source_layers": [0, 1, 2, 3],
    "num_patches": 16,
    "downsample_channels": [32, WIDTH],
    "post_conv_in_channels": WIDTH,
    "post_conv_mid_channels": WIDTH,
    "post_conv_out_channels": WIDTH,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
"""Key of a config, wherever it stands, to its tiny value. Keys that are missing, or ``None``, stay so."""


_MROPE = {"text_config.rope_parameters.mrope_section": [4, 2, 2]}
_HALF_MROPE = {"text_config.rope_parameters.mrope_section": [2, 1, 1]}
_VISION_START = {"vision_start_token_id": 198, "vision_end_token_id": 197}
_VOCABULARY_MAP = {"<image>": IMAGE_TOKEN, "<|extra_200|>": 198}
_GEMMA4_TOWER = {
    "model_type": "gemma4_vision", "hidden_size": WIDTH, "intermediate_size": MLP_WIDTH, "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "position_embedding_size": 64,
    "global_head_dim": HEAD_DIM, "patch_size": 16, "pooling_kernel_size": 2,
}  # fmt: skip

EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "qwen2_5_vl", "qwen2_vl", "paddleocr_vl",
    "cosmos3_edge"), _MROPE),
    "glm4v_moe": _HALF_MROPE,
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [2, 2, 4]},
    "qwen2_5_omni_thinker": {**_MROPE, **_VISION_START},
    "qwen3_omni_moe_thinker": _VISION_START,
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "instructblipvideo": {"video_token_index": IMAGE_TOKEN},
    "llama4": {"vision_config.intermediate_size": 4 * WIDTH, "vision_config.vision_output_dim": WIDTH},
    "mllama": {"vision_config.vision_output_dim": 3 * WIDTH},
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "vipllava": {"vision_feature_layers": [-1, -2, -3, -4, 1], "vision_feature_layer": [-1, -2, -3, -4, 1]},
    "udop": {"decoder_start_token_id": 0},
    "vision-encoder-decoder": {"decoder_start_token_id": 0, "pad_token_id": 0},
    "t5gemma2": {"encoder.mm_tokens_per_image": 4},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "chameleon": {"vocabulary_map": {**_VOCABULARY_MAP,
    **{"IMGIMG" + "".join(chr(65 + int(digit)) for digit in str(n)) + "Z": 100 + n for n in range(64)}}},
    "emu3": {"vocabulary_map": {**_VOCABULARY_MAP, **{f"<|visual token {n:06}|>": 100 + n for n in range(64)}}},
    "cohere_compass": {
        "text_config.rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
        }
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "text_config.num_key_value_heads": HEADS,
    },
    "unlimited_ocr": {"text_config.num_key_value_heads": HEADS},
    # What timm's towers give out cannot be made smaller.
    "gemma3n": {"text_config.intermediate_size": MLP_WIDTH, "vision_config.hidden_size": 2048},
    "fast_vlm": {"vision_config.hidden_size": 3072},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "num_classes": 0,
            "do_pooling": False,
            "model_args": {
                "embed_dim": WIDTH, "depth": BLOCKS, "num_heads": HEADS, "img_size": [56, 56], "global_pool": "",
                "use_post_transformer_norm": False, "ref_feat_shape": [4, 4],
            },
        },
    },
    "granite4_vision": {
        "text_config.model_type": "granite", "deepstack_layer_map": [[-2, 1], [-1, 2]], "downsample_rate": "1/2",
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 32,
        "vision_config": _GEMMA4_TOWER, "canvas_length": 8,
    },
    "dots3_note": {
        "text_config.per_layer_config": {
            at: {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
                 "head_dim": 24}
            for at in (1, 2)
        },
        "audio_config.adapter_input_size": WIDTH, "audio_config.conv_output_size": 120 * WIDTH,
        "text_config.layer_types": ["indexed_attention", "sliding_attention", "sliding_attention", "indexed_attention"],
    },
    "gemma4": {"vision_config": _GEMMA4_TOWER},
    "gemma4_unified": {
        "vision_config": {
            "model_type": "gemma4_unified_vision", "mm_embed_dim": WIDTH, "output_proj_dims": WIDTH,
            "mm_posemb_size": 64,
        },
    },
    "glm5_next": {"text_config.qk_rope_head_dim": 0, "text_config.head_dim": HEAD_DIM,
    "text_config.qk_head_dim": HEAD_DIM,
                  "text_config.linear_head_dim": HEAD_DIM, "text_config.linear_num_heads": HEADS},
    "hunyuan_vl": {"text_config.head_dim": HEAD_DIM, "text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "mistral4": {"rope_parameters.partial_rotary_factor": 8 / 24},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 1], "vision_config.num_position_embeddings": 16},
    "muse_spark": {"out_hidden_size": 4 * WIDTH, "audio_config.hidden_sizes": [16, 32, 48, 64]},
    "qwen4_exp": {
        "text_config.indexer_budget": 8, "text_config.indexer_compress_ratio": 4,
        "text_config.indexer_head_dim": HEAD_DIM,
        "text_config.indexer_n_heads": HEADS, "text_config.indexer_kv_heads": 1,
        "text_config.ngram_vocab_size_base": 64,
        "text_config.split_ngram_parts": 2, "text_config.hc_lowrank": 8, "text_config.ple_embed_dim": WIDTH,
    },
    "step3p7": {"text_config.sliding_window": 16},
}  # fmt: skip
"""Family to what it needs beyond: dotted path in the config to value."""


def families() -> list[str]:
    """Every ``model_type`` behind ``AutoModelForImageTextToText`` of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def tiny_config(family: str) -> Any:
    """The config of the tiny model of a family.

    Raises:
        Exception: Whatever the class raises where it does not like what was made; the runner counts it.
    """
    import transformers

    config = transformers.AutoConfig.for_model(family)
    fields = config.to_dict()
    _shrink(fields)
    _renumber(fields)
    for path, value in EXCEPTIONS.get(family, {}).items():
        _set(fields, path, value)
    return type(config).from_dict(fields)


def _sections(fields: Any) -> Iterator[dict[str, Any]]:
    """A config and every config in it, outermost first."""
    if isinstance(fields, dict):
        yield fields
        for value in fields.values():
            yield from _sections(value)


def _shrink(fields: dict[str, Any]) -> None:
    for section in _sections(fields):
        layers = next((section[key] for key in ("num_hidden_layers", "n_layers", "num_layers") if section.get(key)), None)
        if isinstance(layers, int) and section.get("per_layer_config"):
            kept = [0, *range(layers - TEXT_LAYERS + 1, layers)]
            own = {int(number): value for number, value in section["per_layer_config"].items()}
            section["per_layer_config"] = {at: own[number] for at, number in enumerate(kept) if number in own}
        for key, value in list(section.items()):
            if key in _VALUES and value is not None:
                section[key] = _like(_VALUES[key], value)
            elif isinstance(value, list) and isinstance(layers, int) and len(value) == layers > TEXT_LAYERS:
                section[key] = [value[0], *value[1 - TEXT_LAYERS :]]
            elif key == "mrope_section":
                section[key] = [2, 1, 1]
        if section.get("kv_lora_rank") is not None:
            # Multi-head latent attention has as many heads of keys as of queries.
            section.update(num_key_value_heads=HEADS, **({"head_dim": 8} if "head_dim" in section else {}))
        _shrink_images(section)


def _like(tiny: Any, value: Any) -> Any:
    """One for each of a list."""
    return [tiny] * len(value) if isinstance(value, list) and not isinstance(tiny, list) else tiny


def _shrink_images(section: dict[str, Any]) -> None:
    """Four patches along an edge, and two tiles at most."""
    tower = section.get("vision_config")
    if section.get("image_grid_pinpoints") and isinstance(tower, dict):
        edge = 4 * tower["patch_size"]
        section["image_grid_pinpoints"] = [[edge, 2 * edge], [2 * edge, edge]]
    patch, size = section.get("patch_size"), section.get("image_size")
    if isinstance(patch, int) and size is not None:
        section["image_size"] = _like(4 * patch, size)


def _renumber(fields: dict[str, Any]) -> None:
    """Token ids beyond the table to those at its end, equal ones alike."""
    known: dict[int, int] = {}

    def small(value: Any) -> Any:
        if isinstance(value, list):
            return [small(item) for item in value]
        if not isinstance(value, int) or value < _FIRST_SPECIAL:
            return value
        return known.setdefault(value, _FIRST_SPECIAL + len(known))

    for section in _sections(fields):
        for key, value in section.items():
            if isinstance(key, str) and key.endswith(("token_id", "token_index", "token_ids", "_id")):
                section[key] = small(value)
    for key in ("image_token_id", "image_token_index"):
        if key in fields and fields[key] is None:
            fields[key] = IMAGE_TOKEN


def _set(fields: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for part in above:
        if fields.get(part) is None:
            return  # A tower that this release leaves out by default.
        fields = fields[part]
    fields[last] = value


def tiny_model(family: str) -> Any:
    """The tiny model of a family with random weights, in float32 on the CPU."""
    import torch
    import transformers

    config = tiny_config(family)
    torch.manual_seed(0)
    architecture = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return architecture._from_config(config, attn_implementation="eager").eval()
