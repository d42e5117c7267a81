"""How each family turns an image into patches and prompt tokens: the constants that its files do not hold.

``sources/image_rule.py`` joins them with config.json, preprocessor_config.json and processor_config.json, which outdo them.
Files named here are those of transformers 5.23, below ``models/``, unless another repository is named. A family's entry
comes from its ``image_processing_*.py`` (sizes) and its ``processing_*.py`` (tokens).
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from ..image_rule import ImageKind, ImageRule

MERGE_DEFAULT_EDGE = 1008
"""Edge of the image assumed where any size goes and the workload names none: 36 x 36 tokens at 28 pixels a token."""


class ImageConstants(ImageRule, frozen=True):
    """What a family's processor does: a rule, 0 where only the checkpoint tells, and which of its keys tell."""

    kind: ImageKind
    size: int = 0
    patch: int = 0
    merge: int = 0
    frames: int = 1
    """Frames that the processor counts one image as, when it holds the image against its bounds on pixels."""
    size_keys: tuple[str, ...] = ("crop_size", "size")
    """Keys of preprocessor_config.json that may hold the edge of the resized image or tile."""
    token_keys: tuple[str, ...] = ()
    """Keys that may hold ``view_tokens``."""
    cut_keys: tuple[str, ...] = ()
    """Keys of preprocessor_config.json that say whether images are cut at all."""
    is_cut: bool = True
    """What they say when they are not there."""
    has_strategy: bool = False
    """``vision_feature_select_strategy`` says whether the tower's class token goes into the prompt (LLaVA)."""


_QWEN2_VL = ImageConstants("merge", extra_tokens=2, min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
"""preprocessor_config.json of Qwen/Qwen2-VL and Qwen2.5-VL: min_pixels 3136, max_pixels 12845056; vision start and end
tokens of the chat template."""

_QWEN3_VL = ImageConstants("merge", extra_tokens=2, min_pixels=256 * 256, max_pixels=4096 * 4096, merge=2)
"""preprocessor_config.json of Qwen/Qwen3-VL."""

_QWEN_CLASS = ImageConstants("merge", extra_tokens=2, min_pixels=56 * 56, max_pixels=28 * 28 * 1280, merge=2)
"""qwen2_vl/image_processing_qwen2_vl.py: the class itself, for families that use it."""

_GLM4V = ImageConstants(
    "merge", method="enlarged", extra_tokens=2, min_pixels=112 * 112, max_pixels=28 * 28 * 15000, frames=2, merge=2
)
"""glm4v/image_processing_glm4v.py: shortest_edge and longest_edge are bounds on frames x height x width, and smart_resize
counts an image as temporal_patch_size = 2 frames; begin and end of image tokens."""

_PIXTRAL = ImageConstants("merge", method="shrunk", row_tokens=1, max_height=1024, max_width=1024, patch=16)
"""pixtral: a break token ends each row, the last one is the end token."""

_INTERNVL = ImageConstants(
    "tiles",
    extra_tokens=2,
    extra_patches=1,
    max_tiles=12,
    has_thumbnail=True,
    merge=2,
    token_keys=("image_seq_length",),
)
"""got_ocr2/image_processing_got_ocr2.py (max_patches 12, thumbnail when more than one) and OpenGVLab/InternVL config.json
(max_dynamic_patch 12, use_thumbnail); class token; <img> and </img>. InternVLProcessor.images_kwargs cuts whatever
preprocessor_config.json says."""

_COGVLM = ImageConstants("fixed", extra_tokens=2, extra_patches=1)
"""THUDM/CogVLM2 and THUDM/glm-4v-9b visual.py: class token dropped after the tower, boi and eoi added around the image."""

_LLAVA_NEXT = ImageConstants(
    "tiles",
    method="pinpoint",
    row_tokens=1,
    has_thumbnail=True,
    is_whole_always=True,
    has_strategy=True,
    pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)
"""llava_next: the whole image, and tiles of the best of image_grid_pinpoints without their padding, a newline token behind
each row."""

_ONEVISION = replace(
    _LLAVA_NEXT,
    is_single_cut=True,
    max_patches=9,
    token_keys=("num_image_tokens",),
    pinpoints=tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)),
)
"""llava_onevision: as LLaVA-NeXT; what is beyond ``anyres_max_9`` tiles is interpolated away."""

_GEMMA3 = ImageConstants("fixed", extra_tokens=4, view_tokens=256, token_keys=("image_seq_length", "mm_tokens_per_image"))
"""gemma3/processing_gemma3.py: two newlines and a begin or end token on each side; pan and scan is off in
Gemma3Processor.images_kwargs."""

_GEMMA4 = ImageConstants("fill", method="filled", extra_tokens=2, patch=16, merge=3, max_patches=280 * 9)
"""gemma4: max_soft_tokens 280 of 3 x 3 patches; patches are padded to as many as there may be."""

_IDEFICS3 = ImageConstants(
    "tiles",
    method="longest_edge",
    merge=2,
    extra_tokens=3,
    tile_tokens=2,
    row_tokens=1,
    has_thumbnail=True,
    max_tiles=16,
    size_keys=("max_image_size",),
    token_keys=("image_seq_len",),
    cut_keys=("do_image_splitting",),
)
"""idefics3, smolvlm: a fake and a position token before each tile, a newline behind each row; the two newlines before the
whole image are one token."""

_MINICPM = ImageConstants(
    "tiles",
    method="slices",
    size=448,
    merge=4,
    extra_tokens=5,
    tile_tokens=2,
    has_thumbnail=True,
    max_tiles=9,
    size_keys=("scale_resolution",),
    cut_keys=("slice_mode",),
)
"""minicpmv4_6: number of the image between two tokens, begin and end of it and of each slice, newlines between rows."""

_QUERIES = ImageConstants("fixed", extra_patches=1, view_tokens=32, token_keys=("num_query_tokens",), size_keys=("size",))
"""blip_2/processing_blip_2.py: the queries of the Q-Former, at the beginning of the prompt."""

_KIMI = ImageConstants(
    "merge", method="shrunk_by_patches", extra_tokens=4, merge=2, max_patches=16384, max_height=512, max_width=512
)
"""kimi_k25: bounds on patches, and on patches along an edge; begin, word, content and end tokens of the chat template."""

_MOST = ImageConstants("tiles", method="number", has_thumbnail=True, is_bound=True, size_keys=())
"""Tiles of a family with code of its own, where the choice of their number is not modelled."""

IMAGE_RULES: Mapping[str, ImageConstants] = {
    "aria": ImageConstants("fixed", size=980, view_tokens=256, size_keys=()),
    "aya_vision": ImageConstants("tiles", merge=2, extra_tokens=3, tile_tokens=1, max_tiles=12, has_thumbnail=True),
    "blip": ImageConstants("fixed", extra_patches=1, extra_tokens=1, is_bound=True, size_keys=("size",)),
    "blip-2": _QUERIES,
    "chameleon": ImageConstants(
        "fixed", extra_tokens=2, view_tokens=1024, size=512, patch=16, token_keys=("image_seq_length",)
    ),
    "cohere2_vision": ImageConstants(
        "tiles",
        method="scale",
        merge=2,
        extra_tokens=3,
        tile_tokens=1,
        max_tiles=12,
        has_thumbnail=True,
        cut_keys=("crop_to_patches",),
    ),
    "cohere_compass": _QWEN_CLASS,
    "cosmos3_edge": replace(_GLM4V, min_pixels=256 * 256, max_pixels=4096 * 4096, frames=1),
    "cosmos3_omni": _QWEN_CLASS,
    "deepseek_ocr2": ImageConstants(
        "tiles",
        extra_tokens=1,
        size=768,
        whole_size=1024,
        cut_above=768,
        patch=16,
        merge=4,
        min_tiles=2,
        max_tiles=6,
        has_thumbnail=True,
        size_keys=("tile_size",),
    ),
    "deepseek_vl": ImageConstants("fixed", view_tokens=576, token_keys=("num_image_tokens",), size_keys=("size",)),
    "deepseek_vl_hybrid": ImageConstants(
        "fixed",
        view_tokens=576,
        view_patches=24**2 + 64**2,
        token_keys=("num_image_tokens",),
        size_keys=("size",),
    ),
    "diffusion_gemma": _GEMMA4,
    "dots3_note": _QWEN_CLASS,
    "emu3": ImageConstants(
        "merge", extra_tokens=11, row_tokens=1, patch=8, merge=1, min_pixels=2**18, max_pixels=2**20, is_bound=True
    ),
    "ernie4_5_vl_moe": replace(_QWEN_CLASS, max_pixels=28 * 28 * 6177),
    "exaone4_5": _QWEN_CLASS,
    "fast_vlm": ImageConstants("fixed", view_tokens=256, size=1024, patch=64, token_keys=("image_seq_length",)),
    "florence2": ImageConstants(
        "fixed", view_tokens=577, size=768, patch=16, size_keys=("size",), token_keys=("image_seq_length",)
    ),
    "fuyu": ImageConstants(
        "merge", method="shrunk_by_scale", extra_tokens=1, row_tokens=1, patch=30, merge=1, max_height=1080, max_width=1920
    ),
    "gemma3": _GEMMA3,
    "gemma3n": replace(_GEMMA3, size=768, patch=16, token_keys=("image_seq_length", "vision_soft_tokens_per_image")),
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "git": ImageConstants("fixed", extra_tokens=1, extra_patches=1),
    "glm46v": _GLM4V,
    "glm4v": _GLM4V,
    "glm4v_moe": _GLM4V,
    "glm5_next": ImageConstants(
        "merge", method="searched", extra_tokens=2, merge=2, min_pixels=16 * 28**2, max_pixels=8000 * 28**2
    ),
    "glm_ocr": _GLM4V,
    "glmga": _GLM4V,
    "got_ocr2": ImageConstants("fixed", extra_tokens=2, view_tokens=256, size_keys=("size",)),
    "granite4_vision": _LLAVA_NEXT,
    "granite_docling": ImageConstants(
        "tiles",
        extra_tokens=3,
        tile_tokens=2,
        row_tokens=1,
        has_thumbnail=True,
        max_tiles=32,
        longest_grid=16,
        view_tokens=64,
        token_keys=("image_seq_len",),
        cut_keys=("crop_to_patches",),
    ),
    "hunyuan_vl": replace(_QWEN_CLASS, extra_tokens=4, row_tokens=1, min_pixels=512 * 512, max_pixels=2048 * 2048),
    "hyperclovax_vision_v2": _QWEN_CLASS,
    "idefics": ImageConstants("fixed", extra_tokens=3, extra_patches=1, is_bound=True, size_keys=("size",)),
    "idefics2": ImageConstants(
        "tiles",
        method="number",
        size=980,
        extra_tokens=2,
        tile_tokens=1,
        max_tiles=4,
        has_thumbnail=True,
        view_tokens=64,
        size_keys=("size",),
        token_keys=("image_seq_len",),
        cut_keys=("do_image_splitting",),
        is_cut=False,
    ),
    "idefics3": _IDEFICS3,
    "inkling2": ImageConstants("merge", method="padded", patch=20, merge=2),
    "inkling_mm_model": ImageConstants("merge", method="padded_beyond", extra_tokens=1, patch=40, merge=1),
    "instructblip": _QUERIES,
    "instructblipvideo": replace(_QUERIES, kind="tiles", method="number", max_tiles=4),  # four frames
    "internvl": _INTERNVL,
    "internvl_chat": _INTERNVL,
    "janus": ImageConstants(
        "fixed", extra_tokens=2, view_tokens=576, token_keys=("num_image_tokens",), size_keys=("size",)
    ),
    "kimi_k25": _KIMI,
    "kosmos-2": ImageConstants("fixed", extra_tokens=2, extra_patches=1, view_tokens=64, token_keys=("latent_query_num",)),
    "kosmos-2.5": ImageConstants(
        "fixed",
        extra_tokens=2,
        view_tokens=2048,
        view_patches=4096,
        size=1024,
        patch=16,
        size_keys=(),
        token_keys=("num_image_tokens", "latent_query_num"),
    ),
    "lfm2_vl": ImageConstants(
        "tiles",
        method="any_size",
        size=512,
        merge=2,
        extra_tokens=2,
        tile_tokens=1,
        split_tokens=1,
        min_tiles=2,
        max_tiles=10,
        has_thumbnail=True,
        min_pixels=64 * 32**2,
        max_pixels=256 * 32**2,
        tolerance=2.0,
        size_keys=("tile_size",),
        cut_keys=("do_image_splitting",),
    ),
    "lfm3_vl": _QWEN_CLASS,
    "lighton_ocr": replace(_PIXTRAL, row_tokens=0, patch=14, merge=2),
    "llama4": ImageConstants(
        "tiles",
        method="canvas",
        merge=2,
        extra_tokens=3,
        extra_patches=1,
        tile_tokens=1,
        max_tiles=16,
        has_thumbnail=True,
        size_keys=("size",),
    ),
    "llava": ImageConstants("fixed", has_strategy=True),
    "llava_next": _LLAVA_NEXT,
    "llava_next_video": _LLAVA_NEXT,
    "llava_onevision": _ONEVISION,
    "minicpm_ocr": replace(_MINICPM, merge=2),
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "minimax_m3_vl": replace(_QWEN_CLASS, min_pixels=4 * 28 * 28, max_pixels=451584),
    "mistral3": _PIXTRAL,
    "mistral_large4": _PIXTRAL,
    "mllama": ImageConstants("tiles", method="number", tile_tokens=1, extra_patches=1, max_tiles=4),
    "molmo2": ImageConstants(
        "tiles",
        method="crops",
        size=378,
        merge=2,
        extra_tokens=4,
        row_tokens=1,
        max_tiles=8,
        has_thumbnail=True,
        is_whole_always=True,
        margin=8,
        size_keys=("size",),
    ),
    "muse_glimmer": ImageConstants("merge", method="nearest_shape", extra_tokens=2, merge=2, max_patches=4096),
    "muse_spark": ImageConstants("merge", method="nearest_shape", extra_tokens=2, merge=2, max_patches=4096),
    "nemotron_h_omni": ImageConstants(
        "merge", method="within_patches", extra_tokens=2, merge=2, min_patches=1024, max_patches=13312
    ),
    "ovis2": ImageConstants(
        "tiles",
        method="cover",
        extra_tokens=3,
        tile_tokens=1,
        split_tokens=-1,
        max_tiles=12,
        has_thumbnail=True,
        view_tokens=256,
        size_keys=("size",),
        token_keys=("image_seq_length",),
        cut_keys=("crop_to_patches",),
        is_cut=False,
    ),
    "paddleocr_vl": ImageConstants(
        "merge", method="enlarged_in_turn", extra_tokens=2, merge=2, min_pixels=384 * 384, max_pixels=1536 * 1536
    ),
    "paligemma": ImageConstants("fixed", token_keys=("image_seq_length",), size_keys=("size",)),
    "perception_lm": ImageConstants(
        "tiles",
        method="fit",
        size=448,
        patch=14,
        merge=2,
        max_tiles=36,
        has_thumbnail=True,
        is_whole_always=True,
        size_keys=("tile_size",),
    ),
    "pi0": ImageConstants(
        "fixed", view_tokens=256, size=224, patch=14, token_keys=("image_seq_length",), size_keys=("pad_size",)
    ),
    "pix2struct": ImageConstants(
        "fixed", view_tokens=2048, view_patches=2048, size=720, patch=16, size_keys=(), is_bound=True
    ),
    "pixtral": _PIXTRAL,
    "pp_chart2table": ImageConstants("fixed", extra_tokens=2, view_tokens=256, size_keys=("size",)),
    "pp_formulanet": ImageConstants("fixed", size=768, patch=16, merge=4, size_keys=("size",), is_bound=True),
    "qianfan_ocr": _INTERNVL,
    "qwen2_5_omni_thinker": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen2_vl": _QWEN2_VL,
    "qwen3_5": _QWEN3_VL,
    "qwen3_5_moe": _QWEN3_VL,
    "qwen3_omni_moe_thinker": _QWEN3_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen4_exp": _QWEN3_VL,
    "shieldgemma2": _GEMMA3,
    "smolvlm": _IDEFICS3,
    "step3p7": ImageConstants(
        "tiles",
        method="windows",
        size=504,
        whole_size=728,
        merge=4,
        extra_tokens=2,
        tile_tokens=2,
        row_tokens=1,
        split_tokens=-1,
        has_thumbnail=True,
        is_whole_always=True,
        max_tiles=36,
        max_height=3024,
        size_keys=("patch_size",),
    ),
    "t5gemma2": replace(_GEMMA3, size=896, patch=14),
    "udop": ImageConstants("fixed", size=224, patch=16, size_keys=("size",), is_bound=True),
    "unlimited_ocr": ImageConstants(
        "tiles",
        method="lines",
        extra_tokens=1,
        size=640,
        whole_size=1024,
        cut_above=640,
        patch=16,
        merge=4,
        min_tiles=2,
        max_tiles=32,
        has_thumbnail=True,
        size_keys=("tile_size",),
        cut_keys=("crop_to_patches",),
    ),
    "video_llama_3": ImageConstants("merge", merge=1, patch=14, min_pixels=56 * 56, max_pixels=28 * 28 * 1280),
    "video_llava": ImageConstants("fixed", has_strategy=True),
    "vipllava": ImageConstants("fixed", has_strategy=True),
    "cogvlm": _COGVLM,
    "cogagent": replace(_COGVLM, extra_tokens=2 + 1600, extra_patches=1 + 700),
    "chatglm": _COGVLM,
    "minicpmv": replace(_MOST, extra_tokens=40, max_tiles=9, size=448, merge=4),
    "deepseek_vl_v2": replace(_MOST, extra_tokens=411, max_tiles=9, size=384, merge=2),
    "kimi_vl": ImageConstants("merge", extra_tokens=132, min_pixels=1, max_pixels=16384 * 14 * 14, merge=2, is_bound=True),
    "molmo": replace(_MOST, extra_tokens=160, extra_patches=1, max_tiles=12, size=336, merge=2),
    "phi3_v": replace(_MOST, extra_tokens=205, extra_patches=1, max_tiles=16, size=336, merge=2),
}
"""By ``model_type``.

Where the tokens of an image do not stand in the prompt but layers read its features, or where their number depends on a
tokenizer, the figures are an upper bound (``is_bound``): BLIP, Emu3, Idefics, Pix2Struct, PP-FormulaNet, UDOP. Of Llama
3.2 Vision the tower sees four tiles, and layers their features by cross-attention. Towers that are given images of two
sizes (DeepSeek-OCR 2, Step 3.7, Unlimited OCR) or padded ones (Idefics 2) count all of them at the larger."""

IMAGE_RULES_BY_TOWER: Mapping[tuple[str, str], ImageConstants] = {("llava", "pixtral"): _PIXTRAL}
"""By ``model_type`` of model and tower, where the tower brings its own processor (mistral-community/pixtral-12b)."""

NO_IMAGES = frozenset({"evolla", "mistral4"})
"""Architectures behind ``AutoModelForImageTextToText`` that take no images: Evolla reads proteins."""

ASSUMED = frozenset({"vision-encoder-decoder"})
"""Architectures whose rule depends on parts that can be anything."""

# CogAgent keeps keys and values of a second tower's 6,400 patches in every layer, 1,024 wide: as much as 1,600 tokens 4,096
# wide; that tower's own work is that of 700 patches more in the first. The prompt itself grows by 258 tokens an image.
# Families that bring code of their own, all as upper bounds (the file of the checkpoint, or of its repository):
# MiniCPM-V: image_processing_minicpmv.py, scale_resolution 448, up to max_slice_nums 9 slices and the whole, query_num 64
# tokens each (8 x 8), two marks each, a newline a row, the number of the image. DeepSeek-VL2: candidate_resolutions of up
# to nine tiles of 384 pixels; 14 x 15 + 1 + (14 i) x (14 j + 1) tokens, at most 2,101 for i x j = 9 x 1. Kimi-VL:
# in_token_limit of preprocessor_config.json is 4,096 patches, 16,384 for Thinking-2506; edges are rounded up, which is at
# most a row and a column of 64 tokens more than rounding, and four marks. Molmo: image_preprocessing_molmo.py, max_crops
# 12 and the whole, 12 x 12 tokens each, a token behind each row, four marks. Phi-3-vision: image_processing_phi3_v.py,
# num_crops 16: (tiles + 1) x 144 + 1 + (rows + 1) x 12.

UNKNOWN = ImageConstants("fixed")
"""A family that is not listed: an assumption, which the profile notes."""
