"""Model families: how checkpoint names become module names, and what else a ``device_map`` must name.

Checkpoints keep the names their authors saved; the class of transformers 4.52 and later has others, and a ``device_map``
speaks of the class. Sources of ``RENAMES``: the class attribute ``_checkpoint_conversion_mapping`` (4.52 to 4.57) and
``conversion_mapping.py`` (5.x), cut down to the part of a name above a tower or layer. ``tests/doctor/model/test_names.py``
holds the table against the installed transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .image_rules import IMAGE_RULES, ImageConstants
from .joins import MASKED_AT_INPUTS
from .linear_weights import QUANTIZED, UNQUANTIZED

Rename = tuple[str, str]
"""Dotted prefix in the checkpoint, dotted prefix in the class. The first that matches whole components wins. ``#`` in the
first stands for a number, in the second for the same number, ``#+1`` for the next one."""


class FamilyRules(NamedTuple):
    """What the names of a family's tensors do not tell by themselves. An entry of the tables below, or a user's own."""

    renames: tuple[Rename, ...] = ()
    vision: tuple[str, ...] = ()
    """Beginnings of components that hold a vision tower, besides the usual ones."""
    projector: tuple[str, ...] = ()
    """Beginnings of components between tower and text."""
    embedding: tuple[str, ...] = ()
    """Names of the token embedding."""
    head: tuple[str, ...] = ()
    """Names of the output head."""
    layers: str = ""
    """Module path of the list of text layers, where it is not the largest list outside the towers."""
    rotary: tuple[str, ...] | None = None
    """Modules with position buffers and no weights that the map must name; ``None`` for the usual one."""
    is_tower_whole: bool = False
    """The vision tower must not be broken: its code joins tensors of several blocks."""
    tower_buffers: tuple[str, ...] = ()
    """Modules below the tower that hold position buffers and no weights."""
    runs_inner_generate: bool = False
    image: ImageConstants | None = None
    text_multiples: tuple[float, float] | None = None
    """Elements a token while a layer runs: multiples of the MLP's width and of the hidden size."""
    vision_multiples: tuple[float, float] | None = None
    """The same for a patch in the tower."""
    unquantized: tuple[str, ...] = ()
    """Parts of names (whole components) below which bitsandbytes quantizes nothing."""
    quantized: tuple[str, ...] = ()
    """Modules or parameters that it quantizes though they do not look like linear layers."""


FamilyChanges = Mapping[str, Any]
"""Fields of ``FamilyRules`` that a user has given, in their types."""

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

_FLAT_TEXT: tuple[Rename, ...] = tuple(
    (part, f"model.language_model.{part}") for part in ("embed_tokens", "layers", "norm")
)
"""Checkpoints whose text body stands at the root."""

_FLAT_BODY: tuple[Rename, ...] = tuple(
    (f"model.{part}", f"model.language_model.{part}") for part in ("embed_tokens", "layers", "norm")
)
"""Checkpoints whose text body stands directly in ``model``."""

_OMNI: tuple[Rename, ...] = (
    *((part, f"model.{part}") for part in ("visual", "audio_tower")),
    *((f"model.{part}", f"model.{part}") for part in ("visual", "audio_tower", "language_model")),
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
    "lfm3_vl": (("model.vision_tower.patchifier", "model.vision_tower.patch_embed"),),
    "minimax_m3_vl": (
        ("vision_tower.vision_model.encoder", "model.vision_tower"),
        ("vision_tower.vision_model", "model.vision_tower"),
        *_LLAVA,
        ("patch_merge_mlp", "model.multi_modal_projector.patch_merge_mlp"),
    ),
    "molmo2": (
        ("model.transformer.blocks", "model.language_model.layers"),
        ("model.transformer.ln_f", "model.language_model.norm"),
        ("model.transformer.wte", "model.language_model.embed_tokens"),
        ("model.transformer", "model.language_model"),
        ("model.vision_backbone.image_vit", "model.vision_tower"),
        ("model.vision_backbone", "model.multi_modal_projector"),
    ),
    "step3p7": (
        ("vision_model.conv1", "model.vision_model.embeddings.patch_embedding"),
        ("vision_model.ln_pre", "model.vision_model.pre_layernorm"),
        ("vision_model.positional_embedding", "model.vision_model.embeddings.position_embedding.weight"),
        ("vision_model.transformer.resblocks", "model.vision_model.layers"),
        ("vision_model.vit_downsampler#", "model.vision_model.downsampler#"),
        ("vision_model", "model.vision_model"),
        ("vit_large_projector", "model.multi_modal_projector"),
        ("model.embed_tokens", "model.language_model.embed_tokens"),
        ("model.layers", "model.language_model.layers"),
        ("model.norm", "model.language_model.norm"),
    ),
    "shieldgemma2": (("model.language_model.model", "model.language_model"), *_LLAVA),
    "cosmos3_edge": _FLAT_TEXT,
    "deepseek_ocr2": (
        ("model.sam_model.blocks", "model.vision_tower.sam_encoder.layers"),
        ("model.sam_model.net_#", "model.vision_tower.sam_encoder.proj.conv#"),
        ("model.sam_model", "model.vision_tower.sam_encoder"),
        ("model.qwen2_model.model.model", "model.vision_tower.vision_encoder"),
        ("model.qwen2_model.query_768", "model.vision_tower.query_768_resolution"),
        ("model.qwen2_model.query_1024", "model.vision_tower.query_1024_resolution"),
        ("model.projector.layers", "model.multi_modal_projector"),
        ("model.view_seperator", "model.view_separator"),
        *_FLAT_BODY,
    ),
    "gemma4_unified": (
        ("model.embed_vision.embedding_projection", "model.embed_vision.multimodal_embedder.embedding_projection"),
        ("model.vision_embedder", "model.embed_vision"),
    ),
    "hunyuan_vl": (
        ("vit.perceive.proj.0", "model.vision_tower.patch_merger.proj_conv"),
        ("vit.perceive.proj.2", "model.vision_tower.patch_merger.proj_out"),
        ("vit.perceive", "model.vision_tower.patch_merger"),
        ("vit", "model.vision_tower"),
        *_FLAT_BODY,
    ),
    "cosmos3_omni": (
        *_FLAT_TEXT,
        *((part, f"model.visual.{part}") for part in ("patch_embed", "pos_embed", "blocks", "merger")),
        ("deepstack_merger_list", "model.visual.deepstack_merger_list"),
    ),
    "dots3_note": (
        ("vision_encoder.adapter", "model.vision_tower.merger"),
        ("vision_encoder.post_trunk_norm", "model.vision_tower.norm"),
        ("vision_encoder", "model.vision_tower"),
        ("audio_encoder", "model.audio_tower"),
        ("model.vision_tower", "model.vision_tower"),
        ("model.audio_tower", "model.audio_tower"),
        ("model.language_model", "model.language_model"),
        ("model", "model.language_model"),
    ),
    "hyperclovax_vision_v2": (("model.vision_projector", "model.projector"),),
    "inkling_mm_model": (
        ("model.llm.embed_norm", "model.language_model.embed_tokens.embed_norm"),
        ("model.llm.embed", "model.language_model.embed_tokens"),
        ("model.llm.unembed", "lm_head"),
        ("model.llm", "model.language_model"),
        ("model.visual.layers.linear_#", "model.vision_tower.encoder_layers.#.projection"),
        ("model.visual.layers.norm_#", "model.vision_tower.encoder_layers.#.layer_norm"),
        ("model.visual", "model.vision_tower"),
        ("model.audio", "model.audio_tower"),
    ),
    "inkling2": (
        ("model.llm.attn_res.attn_queries.#", "model.language_model.layers.#+1.attention_input.query"),
        ("model.llm.attn_res.mlp_queries.#", "model.language_model.layers.#.mlp_input.query"),
        ("model.llm.attn_res.output_query", "model.language_model.final_input.query"),
        ("model.llm.embed_norm", "model.language_model.embed_tokens.embed_norm"),
        ("model.llm.embed", "model.language_model.embed_tokens"),
        ("model.llm.unembed", "lm_head"),
        ("model.llm", "model.language_model"),
        ("model.visual.backbone.ln_pre", "model.vision_tower.pre_layernorm"),
        ("model.visual.backbone", "model.vision_tower"),
        ("model.visual.proj_in", "model.vision_tower.merger.linear_1"),
        ("model.visual.proj_out", "model.vision_tower.merger.linear_2"),
    ),
    "kimi_k25": (
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.blocks", "model.language_model.layers"),
        ("language_model.model", "model.language_model"),
        ("vision_tower.encoder.blocks", "model.vision_tower.layers"),
        ("vision_tower.encoder", "model.vision_tower"),
        ("vision_tower", "model.vision_tower"),
        ("mm_projector", "model.mm_projector"),
    ),
    "mistral_large4": (
        ("output", "lm_head"),
        ("tok_embeddings", "model.language_model.embed_tokens"),
        ("layers", "model.language_model.layers"),
        ("norm", "model.language_model.norm"),
        ("lerope", "model.language_model.rotary_emb"),
        ("vision_encoder", "model.vision_tower"),
        ("vision_language_adapter", "model.multi_modal_projector"),
        ("pre_mm_projector_norm", "model.multi_modal_projector.norm"),
        ("patch_merger", "model.multi_modal_projector.patch_merger"),
    ),
    "nemotron_h_omni": (
        ("language_model.backbone", "language_model.model"),
        ("mlp1", "multi_modal_projector"),
        ("vision_model.radio_model.model.blocks", "vision_model.encoder.layer"),
        ("vision_model.radio_model.model.patch_generator", "vision_model.embeddings"),
        ("vision_model.radio_model.model", "vision_model"),
        ("vision_model.radio_model", "vision_model"),
    ),
    "qianfan_ocr": (
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.encoder", "model.language_model"),
        ("language_model.model", "model.language_model"),
        ("vision_model.encoder", "model.vision_tower"),
        ("vision_model", "model.vision_tower"),
        ("mlp1", "model.multi_modal_projector"),
    ),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), _OMNI),
    "t5gemma2": tuple(
        (f"model.encoder.{part}", f"model.encoder.text_model.{part}") for part in ("embed_tokens", "layers", "norm")
    ),
    "unlimited_ocr": (
        ("model.sam_model.blocks", "model.vision_tower.sam_encoder.layers"),
        ("model.sam_model.net_#", "model.vision_tower.sam_encoder.proj.conv#"),
        ("model.sam_model", "model.vision_tower.sam_encoder"),
        ("model.vision_model.transformer", "model.vision_tower.vision_encoder.encoder"),
        ("model.vision_model", "model.vision_tower.vision_encoder"),
        ("model.projector", "model.multi_modal_projector"),
        ("model.view_seperator", "model.view_separator"),
        *_FLAT_BODY,
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

FLAT_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "mlcd_vision_model"})
"""Towers, by ``vision_config.model_type``, whose class has lost its inner ``vision_model`` in 5.x: what 4.57 calls
``vision_tower.vision_model.encoder`` is ``vision_tower.encoder``. Source: ``PrefixChange`` of ``CLIPVisionModel`` and the
classes that share it, ``conversion_mapping.py``."""

WHOLE_TOWERS = frozenset(MASKED_AT_INPUTS) | frozenset(
    {"deepseek_ocr2", "florence2", "mllama", "molmo2", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "unlimited_ocr"}
    | {"vipllava"}
)
"""Families whose tower no cut may part: their code stacks or joins the outputs of several blocks, or of two encoders, which
would be on several GPUs (``torch.stack`` in modeling_mllama.py, ``torch.cat`` in the others). Florence-2's blocks take
turns with the convolutions of another list. Qwen Omni names the encoder itself in ``_no_split_modules``. Those of
``MASKED_AT_INPUTS`` want the embedding where the inputs are, and that is where a tower begins.
"""

_ROTARY_POS_EMB = (
    *(
        "cohere_compass",
        "cosmos3_omni",
        "dots3_note",
        "ernie4_5_vl_moe",
        "exaone4_5",
        "glm46v",
        "glm4v",
        "glm4v_moe",
        "glm5_next",
        "glm_ocr",
    ),
    *("glmga", "hyperclovax_vision_v2", "lfm3_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5"),
    *("qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "video_llama_3"),
)

TOWER_BUFFERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_ROTARY_POS_EMB, ("rotary_pos_emb",)),
    **dict.fromkeys(("inkling2", "kimi_k25", "minimax_m3_vl", "muse_glimmer", "muse_spark", "step3p7"), ("rotary_emb",)),
    **dict.fromkeys(("lighton_ocr", "mistral3", "mistral_large4", "pixtral"), ("patch_positional_embedding",)),
    **dict.fromkeys(("diffusion_gemma", "gemma4"), ("encoder.rotary_emb",)),
    "llama4": ("rotary_embedding",),
    "paddleocr_vl": ("vision_model.encoder.rotary_pos_emb",),
}
"""Modules below a family's tower that hold position buffers and no weights: a map that breaks the tower must name them.
Source: the classes of 4.57.6 and 5.23, built on the meta device."""

REMOTE_TYPES: Mapping[str, str] = {
    "CogVLMForCausalLM": "cogvlm",
    "CogAgentForCausalLM": "cogagent",
    "ChatGLMModel": "chatglm",
    "ChatGLMForConditionalGeneration": "chatglm",
    "InternVLChatModel": "internvl_chat",
    "MiniCPMV": "minicpmv",
    "DeepseekVLV2ForCausalLM": "deepseek_vl_v2",
    "KimiVLForConditionalGeneration": "kimi_vl",
    "MolmoForCausalLM": "molmo",
    "Phi3VForCausalLM": "phi3_v",
}
"""Class in the checkpoint's own code to family, since these config.json files may lack ``model_type``."""

PACKAGED = frozenset({"DeepseekVLV2ForCausalLM"})
"""Classes that are neither of transformers nor of the checkpoint, but of a package that its authors publish."""

ROTARY: Mapping[str, tuple[str, ...]] = {
    "chatglm": ("transformer.rotary_pos_emb",),
    "minicpmv": ("llm.model.rotary_emb",),
    # Theirs are inside the attention of each layer, or are none.
    **dict.fromkeys(("cogagent", "cogvlm", "deepseek_vl_v2", "kimi_vl", "molmo", "phi3_v"), ()),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), ("text_model.model.embed_positions",)),
    # Tables that share the tensor of another: a checkpoint stores nothing for them.
    "diffusion_gemma": (
        "model.encoder.language_model.rotary_emb",
        *(f"model.decoder.{part}" for part in ("embed_tokens", "norm", "rotary_emb")),
    ),
    "florence2": (
        *(f"model.language_model.{part}.embed_tokens" for part in ("encoder", "decoder")),
        "lm_head",
    ),
    "t5gemma2": ("model.decoder.embed_tokens",),
    "udop": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    "molmo2": ("model.language_model.rotary_emb", "model.language_model.rotary_emb_unscaled"),
}
"""Family to its parameter-free modules with position buffers, which the map must name as well (InternVL#688: left out, its
buffer stays on the CPU). Sources: ``modeling_chatglm.py`` of THUDM/glm-4v-9b, ``modeling_minicpmv.py``,
``modeling_kosmos2.py``, ``modeling_molmo2.py``. Other text bodies of transformers itself call it ``rotary_emb``, beside the
layers' list."""

EMBEDDINGS: Mapping[str, tuple[str, ...]] = {"blip": ("embeddings",)}
"""Family to the name of its token embedding, where that is none of the usual ones. BLIP's adds positions inside a module of
its own (``_no_split_modules``)."""

HEADS: Mapping[str, tuple[str, ...]] = {"blip": ("cls",), "molmo": ("ff_out",)}
"""Family to the name of its output head, where that is none of the usual ones."""

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
        "internlm2",
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
``AutoModelForImageTextToText`` of transformers 4.57.6 and 5.23, built on the meta device; modeling_internlm2.py."""

INNER_GENERATE = ("InternVLChat", "MiniCPMV", "MiniCPMO", "DeepseekVLV2", "DeepseekVL2")
"""Beginnings of remote classes whose ``generate`` calls that of their text model, so that the logits come back on the last
GPU. Sources: InternVL#96, #132, #229; DeepSeek-VL2#8, #113; MiniCPM-V ``docs/inference_on_multiple_gpus.md``."""


def rules_of(model_type: str, architecture: str = "") -> FamilyRules:
    """The built-in rules of a family; those of nobody in particular for one that is not listed."""
    return FamilyRules(
        renames=RENAMES.get(model_type, ()),
        embedding=EMBEDDINGS.get(model_type, ()),
        head=HEADS.get(model_type, ()),
        rotary=ROTARY.get(model_type),
        is_tower_whole=model_type in WHOLE_TOWERS,
        tower_buffers=TOWER_BUFFERS.get(model_type, ()),
        runs_inner_generate=architecture.startswith(INNER_GENERATE),
        image=IMAGE_RULES.get(model_type),
        unquantized=UNQUANTIZED.get(model_type, ()),
        quantized=QUANTIZED.get(model_type, ()),
    )


class OutsideNorm(NamedTuple):
    """A norm of the embedding that was a module beside it."""

    release: tuple[int, int]
    """Of transformers: the first in which it is part of the embedding."""
    embedding: str
    norm: str


NORM_OUTSIDE_BEFORE: Mapping[str, OutsideNorm] = {
    "inkling_mm_model": OutsideNorm((5, 18), "model.language_model.embed_tokens", "model.language_model.embed_norm"),
}
"""Source: modeling_inkling.py of transformers 5.17 and 5.18."""
