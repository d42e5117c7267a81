"""Model families: how checkpoint names become module names, and what else a ``device_map`` must name.

Checkpoints keep the names their authors saved; the class of transformers 4.52 and later has others, and a ``device_map``
speaks of the class. Sources of ``RENAMES``: the class attribute ``_checkpoint_conversion_mapping`` (4.52 to 4.57) and
``conversion_mapping.py`` (5.x), cut down to the part of a name above a tower or layer. ``tests/doctor/model/test_names.py``
holds the table against the installed transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

Rename = tuple[str, str]
"""Dotted prefix in the checkpoint, dotted prefix in the class. The first that matches whole components wins."""

_LLAVA: tuple[Rename, ...] = (
    ("language_model.lm_head", "lm_head"),
    ("language_model.model", "model.language_model"),
    ("language_model", "model.language_model"),
    ("vision_tower", "model.vision_tower"),
    ("vision_model", "model.vision_model"),
    ("image_tower", "model.image_tower"),
    ("video_tower", "model.video_tower"),
    ("multi_modal_projector", "model.multi_modal_projector"),
    ("image_newline", "model.image_newline"),
)

_QWEN_VL: tuple[Rename, ...] = (
    ("visual", "model.visual"),
    ("model.visual", "model.visual"),
    ("model.language_model", "model.language_model"),
    ("model", "model.language_model"),
)

RENAMES: Mapping[str, tuple[Rename, ...]] = {
    **dict.fromkeys(
        (
            "aria",
            "aya_vision",
            "gemma3",
            "got_ocr2",
            "internvl",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "mistral3",
            "mllama",
            "paligemma",
            "pp_chart2table",
            "video_llava",
            "vipllava",
        ),
        _LLAVA,
    ),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "ernie4_5_vl_moe": (
        ("vision_model", "model.vision_tower"),
        ("model.vision_model", "model.vision_tower"),
        ("model.vision_tower", "model.vision_tower"),
        ("model.resampler_model", "model.resampler_model"),
        ("model.language_model", "model.language_model"),
        ("model", "model.language_model"),
    ),
    "emu3": (
        ("text_model.lm_head", "lm_head"),
        ("text_model.model", "model.text_model"),
        ("text_model", "model.text_model"),
        ("vqmodel", "model.vqmodel"),
    ),
    "fuyu": (
        ("language_model.lm_head", "lm_head"),
        ("language_model.model", "model.language_model"),
        ("vision_embed_tokens", "model.vision_embed_tokens"),
    ),
    "minimax_m3_vl": (*_LLAVA, ("patch_merge_mlp", "model.multi_modal_projector.patch_merge_mlp")),
    "molmo2": (
        ("model.transformer.blocks", "model.language_model.layers"),
        ("model.transformer.ln_f", "model.language_model.norm"),
        ("model.transformer.wte", "model.language_model.embed_tokens"),
        ("model.transformer", "model.language_model"),
        ("model.vision_backbone.image_vit", "model.vision_tower"),
        ("model.vision_backbone", "model.multi_modal_projector"),
    ),
    "step3p7": (
        ("vision_model", "model.vision_model"),
        ("vit_large_projector", "model.multi_modal_projector"),
        ("model.embed_tokens", "model.language_model.embed_tokens"),
        ("model.layers", "model.language_model.layers"),
        ("model.norm", "model.language_model.norm"),
    ),
    "paddleocr_vl": (
        ("mlp_AR", "model.projector"),
        ("visual", "model.visual"),
        ("model.visual", "model.visual"),
        ("model.projector", "model.projector"),
        ("model.language_model", "model.language_model"),
        ("model", "model.language_model"),
    ),
}
"""By ``model_type``. A family that is not here keeps its names (Qwen3-VL, GLM-4.1V, Idefics, SmolVLM, all remote code)."""

REMOTE_TYPES: Mapping[str, str] = {
    "CogVLMForCausalLM": "cogvlm",
    "CogAgentForCausalLM": "cogvlm",
    "ChatGLMModel": "chatglm",
    "ChatGLMForConditionalGeneration": "chatglm",
    "InternVLChatModel": "internvl_chat",
}
"""Class in the checkpoint's own code to family, since these config.json files may lack ``model_type``."""

ROTARY: Mapping[str, str] = {"chatglm": "transformer.rotary_pos_emb", "minicpmv": "llm.model.rotary_emb"}
"""Family of remote code to its parameter-free module with position buffers, which the map must name as well (InternVL#688:
left out, its buffer stays on the CPU). Sources: ``modeling_chatglm.py`` of THUDM/glm-4v-9b, ``modeling_minicpmv.py``. Text
bodies of transformers itself call it ``rotary_emb``, beside the layers' list."""

NO_ROTARY = frozenset(
    {
        "bart",
        "bert",
        "blip_text_model",
        "bloom",
        "florence2",
        "git",
        "glm5_next_text",
        "gpt2",
        "idefics",
        "inkling2_text",
        "inkling_text",
        "kosmos_2_5_text_model",
        "kosmos_2_text_model",
        "mpt",
        "nemotron_h",
        "opt",
        "pix2struct_text_model",
        "pp_formulanet_text",
        "t5",
        "udop",
        "vision-encoder-decoder",
    }
)
"""Text bodies, by ``model_type``, whose class has no ``rotary_emb`` beside its layers. Source: every class behind
``AutoModelForImageTextToText`` of transformers 4.57.6 and 5.23, built on the meta device."""

INNER_GENERATE = ("InternVLChat", "MiniCPMV", "MiniCPMO", "DeepseekVLV2", "DeepseekVL2")
"""Beginnings of remote classes whose ``generate`` calls that of their text model, so that the logits come back on the last
GPU. Sources: InternVL#96, #132, #229; DeepSeek-VL2#8, #113; MiniCPM-V ``docs/inference_on_multiple_gpus.md``."""
