"""Families of transformers whose default config builds a model that the doctor can describe."""

from __future__ import annotations

FAMILIES = (
    "aria", "blip-2", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "fuyu", "gemma3", "gemma4",
    "git", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "got_ocr2", "granite_docling", "idefics", "idefics2", "idefics3",
    "instructblip", "internvl", "janus", "kimi_k25", "lfm2_vl", "llama4", "llava", "llava_next", "llava_onevision",
    "minicpmv4_6", "mistral3", "mllama", "molmo2", "ovis2", "paddleocr_vl", "paligemma", "qwen2_5_omni_thinker",
    "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "step3p7", "video_llama_3", "vipllava",
)  # fmt: skip
"""By ``model_type``. A version that lacks one, or whose default config does not build, skips it."""
