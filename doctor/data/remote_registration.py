"""The order in which classes of checkpoints' own code register their modules; see ``doctor/sources/registration.py``.

Read in the code that the checkpoints publish; the sums of their sizes equal the published ones. Their ``_no_split_modules``
names the text block alone, so ``device_map="auto"`` may cut a vision block (CogVLM2#10, GLM-4#350).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EVA_CLIP: tuple[str, ...] = (
    "boi -",
    "eoi -",
    "patch_embedding.cls_embedding -",
    "patch_embedding.proj",
    "patch_embedding.position_embedding",
    "transformer.layers.*.input_layernorm",
    "transformer.layers.*.attention.query_key_value",
    "transformer.layers.*.attention.dense",
    "transformer.layers.*.mlp.fc1",
    "transformer.layers.*.mlp.fc2",
    "transformer.layers.*.post_attention_layernorm",
    "linear_proj.linear_proj",
    "linear_proj.norm1",
    "linear_proj.dense_h_to_4h",
    "linear_proj.gate_proj",
    "linear_proj.dense_4h_to_h",
    "conv",
)
"""``EVA2CLIPModel`` in ``visual.py`` of THUDM/glm-4v-9b and THUDM/cogvlm2-llama3-chat-19B. Bare parameters come first:
splitting a module yields its own parameters before its children."""

_EVA_LARGE: tuple[str, ...] = (
    "cls_token -",
    "pos_embed -",
    "patch_embed.proj",
    "blocks.*.norm1",
    "blocks.*.attn.q_bias -",
    "blocks.*.attn.v_bias -",
    "blocks.*.attn.q_proj",
    "blocks.*.attn.k_proj",
    "blocks.*.attn.v_proj",
    "blocks.*.attn.inner_attn_ln",
    "blocks.*.attn.proj",
    "blocks.*.norm2",
    "blocks.*.mlp.w1",
    "blocks.*.mlp.w2",
    "blocks.*.mlp.ffn_ln",
    "blocks.*.mlp.w3",
    "norm",
)
"""``EVAVisionTransformer`` in ``cross_visual.py`` of THUDM/cogagent-chat-hf."""

_NAVIT_SIGLIP: tuple[str, ...] = (
    "embeddings.patch_embedding",
    "embeddings.position_embedding",
    "encoder.layers.*.self_attn.k_proj",
    "encoder.layers.*.self_attn.v_proj",
    "encoder.layers.*.self_attn.q_proj",
    "encoder.layers.*.self_attn.out_proj",
    "encoder.layers.*.layer_norm1",
    "encoder.layers.*.mlp.fc1",
    "encoder.layers.*.mlp.fc2",
    "encoder.layers.*.layer_norm2",
    "post_layernorm",
)
"""``SiglipVisionTransformer`` in ``modeling_navit_siglip.py`` of openbmb/MiniCPM-V-2_6."""

REMOTE_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "chatglm": (
        "transformer.embedding.word_embeddings",
        "transformer.encoder.layers.* =GLMBlock",
        "transformer.encoder.final_layernorm",
        "transformer.output_layer",
        *(f"transformer.vision.{entry}" for entry in _EVA_CLIP),
    ),
    "cogvlm": (
        "model.embed_tokens",
        "model.layers.* =CogVLMDecoderLayer",
        "model.norm",
        *(f"model.vision.{entry}" for entry in _EVA_CLIP),
        "lm_head",
    ),
    "cogagent": (
        "model.embed_tokens",
        "model.layers.* =CogAgentDecoderLayer",
        "model.norm",
        *(f"model.vision.{entry}" for entry in (*_EVA_CLIP[:2], "pos_embed -", *_EVA_CLIP[2:-1])),
        "model.cross_vision.pos_embed -",
        *(f"model.cross_vision.vit.model.{entry}" for entry in _EVA_LARGE),
        "lm_head",
    ),
    "minicpmv": (
        "llm @=qwen2/lm",
        *(f"vpm.{entry}" for entry in _NAVIT_SIGLIP),
        "resampler.query -",
        "resampler.proj -",
        "resampler.kv_proj",
        "resampler.attn.in_proj_weight -",
        "resampler.attn.in_proj_bias -",
        "resampler.attn.out_proj",
        "resampler.ln_q",
        "resampler.ln_kv",
        "resampler.ln_post",
    ),
    "deepseek_vl_v2": (
        "image_newline -",
        "view_seperator -",
        "vision.pos_embed -",
        "vision.patch_embed.proj",
        "vision.blocks.*.norm1",
        "vision.blocks.*.attn.qkv",
        "vision.blocks.*.attn.proj",
        "vision.blocks.*.norm2",
        "vision.blocks.*.mlp.fc1",
        "vision.blocks.*.mlp.fc2",
        "vision.norm",
        "projector.layers.*",
        "language.model.embed_tokens",
        "language.model.layers.* =DeepseekV2DecoderLayer",
        "language.model.norm",
        "language.lm_head",
    ),
    "molmo": (
        "model.transformer.wte",
        "model.transformer.ln_f",
        "model.transformer.blocks.*.attn_out",
        "model.transformer.blocks.*.ff_out",
        "model.transformer.blocks.*.attn_norm",
        "model.transformer.blocks.*.ff_norm",
        "model.transformer.blocks.*.att_proj",
        "model.transformer.blocks.*.ff_proj",
        "model.transformer.ff_out",
        "model.vision_backbone.pad_embed -",
        "model.vision_backbone.image_vit.class_embedding -",
        "model.vision_backbone.image_vit.positional_embedding -",
        "model.vision_backbone.image_vit.patch_embedding",
        "model.vision_backbone.image_vit.pre_ln",
        *(
            f"model.vision_backbone.image_vit.transformer.resblocks.*.{entry}"
            for entry in (
                *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo")),
                *("feed_forward.w1", "feed_forward.w2", "attention_norm", "ffn_norm"),
            )
        ),
        *(f"model.vision_backbone.image_pooling_2d.{name}" for name in ("wq", "wk", "wv", "wo")),
        *(f"model.vision_backbone.image_projector.{name}" for name in ("w1", "w2", "w3")),
    ),
    "kimi_vl": (
        "vision_tower.patch_embed.proj",
        "vision_tower.patch_embed.pos_emb",
        "vision_tower.encoder.blocks.* =MoonVitEncoderLayer",
        "vision_tower.encoder.final_layernorm",
        "multi_modal_projector.pre_norm",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "language_model.model.embed_tokens",
        "language_model.model.layers.* =DeepseekV3DecoderLayer",
        "language_model.model.norm",
        "language_model.lm_head",
    ),
    "internvl_chat": (
        "vision_model =InternVisionModel",
        "language_model @llm_config=qwen2/lm",
        "mlp1.*",
    ),
}
"""``model_type`` to entries. Sources: ``modeling_chatglm.py``, ``modeling_cogvlm.py``, ``modeling_cogagent.py``,
``modeling_internvl_chat.py`` (``_no_split_modules``: InternVisionModel and the block of each text body),
``modeling_minicpmv.py`` of 2.6, ``modeling_deepseek_vl_v2.py``, ``modeling_kimi_vl.py``, ``modeling_molmo.py`` (it declares
``MolmoBlock``, and its blocks are of another class: nothing is protected). Phi-3-vision registers one embedding twice,
which is not modelled."""

REMOTE_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "molmo": {
        "num_hidden_layers": 23,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
    },
    "phi3_v": {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
    },
}
"""Towers of which config.json says nothing, since their sizes are in the code: ``VisionBackboneConfig`` in
``modeling_molmo.py``; ``CLIP_VIT_LARGE_PATCH14_336_CONFIG`` in ``image_embedding_phi3_v.py``."""
