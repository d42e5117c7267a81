"""The order in which classes of checkpoints' own code register their modules; see ``doctor/sources/registration.py``.

Read in the code that the checkpoints publish; the sums of their sizes equal the published ones. Their ``_no_split_modules``
names the text block alone, so ``device_map="auto"`` may cut a vision block (CogVLM2#10, GLM-4#350).
"""

from __future__ import annotations

from collections.abc import Mapping

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
    "internvl_chat": (
        "vision_model =InternVisionModel",
        "language_model @llm_config=qwen2/lm",
        "mlp1.*",
    ),
}
"""``model_type`` to entries. Sources: ``modeling_chatglm.py``, ``modeling_cogvlm.py``, ``modeling_internvl_chat.py``
(``_no_split_modules`` of the last: InternVisionModel and the block of each text body)."""
