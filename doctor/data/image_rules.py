"""How each family turns an image into patches and prompt tokens: the constants that config.json does not hold.

``sources/image_rule.py`` joins them with ``vision_config``. Every entry names where its numbers come from; files are those
of transformers 5.23 unless another repository is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

MERGE_DEFAULT_EDGE = 1008
"""Edge of the image assumed where any size goes and the workload names none: 36 x 36 tokens at 28 pixels a token."""


class ImageConstants(NamedTuple):
    """What a family's processor does."""

    kind: Literal["fixed", "merge", "tiles"]
    extra_tokens: int = 0
    extra_patches: int = 0
    max_tiles: int = 1
    has_thumbnail: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    frames: int = 1
    """Frames that the processor counts one image as, when it holds the image against its bounds on pixels."""
    size: int | None = None
    """Edge of a tile in pixels, where the processor decides it and not ``vision_config``."""
    merge: int | None = None
    """Patches along the edge of the square that becomes one token, where the config does not say."""
    is_always_full: bool = False
    """An image of any size counts as ``max_tiles`` tiles: an upper bound where the choice of the grid is not modelled."""


_QWEN2_VL = ImageConstants("merge", extra_tokens=2, min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
"""preprocessor_config.json of Qwen/Qwen2-VL and Qwen2.5-VL: min_pixels 3136, max_pixels 12845056; vision start and end
tokens of the chat template."""

_GLM4V = ImageConstants("merge", extra_tokens=2, min_pixels=112 * 112, max_pixels=28 * 28 * 15000, frames=2)
"""models/glm4v/image_processing_glm4v.py: shortest_edge and longest_edge are bounds on frames x height x width, and
smart_resize counts an image as temporal_patch_size = 2 frames; begin and end of image tokens."""

_INTERNVL = ImageConstants("tiles", extra_tokens=2, extra_patches=1, max_tiles=12, has_thumbnail=True)
"""models/got_ocr2/image_processing_got_ocr2.py (max_patches 12, thumbnail when more than one) and OpenGVLab/InternVL
config.json (max_dynamic_patch 12, use_thumbnail); class token; <img> and </img>."""

_COGVLM = ImageConstants("fixed", extra_tokens=2, extra_patches=1)
"""THUDM/CogVLM2 and THUDM/glm-4v-9b visual.py: class token dropped after the tower, boi and eoi added around the image."""

_LLAVA_NEXT = ImageConstants("tiles", extra_tokens=48, extra_patches=1, max_tiles=4, has_thumbnail=True)
"""preprocessor_config.json of llava-v1.6 (image_grid_pinpoints of up to 4 tiles) and the whole image; a newline token ends
each of 2 x 24 rows."""

IMAGE_RULES: Mapping[str, ImageConstants] = {
    "llava": ImageConstants("fixed", extra_patches=1),
    "vipllava": ImageConstants("fixed", extra_patches=1),
    "paligemma": ImageConstants("fixed"),
    "gemma3": ImageConstants("fixed", extra_tokens=4),
    "shieldgemma2": ImageConstants("fixed", extra_tokens=4),
    "llava_next": _LLAVA_NEXT,
    "llava_next_video": _LLAVA_NEXT,
    "llava_onevision": ImageConstants("tiles", max_tiles=36, has_thumbnail=True),
    "internvl": _INTERNVL,
    "internvl_chat": _INTERNVL,
    "mllama": ImageConstants("tiles", extra_patches=1, max_tiles=4),
    "idefics3": ImageConstants("tiles", max_tiles=16, has_thumbnail=True),
    "smolvlm": ImageConstants("tiles", max_tiles=16, has_thumbnail=True),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen3_vl": ImageConstants("merge", extra_tokens=2, min_pixels=256 * 256, max_pixels=4096 * 4096),
    "qwen3_vl_moe": ImageConstants("merge", extra_tokens=2, min_pixels=256 * 256, max_pixels=4096 * 4096),
    "glm4v": _GLM4V,
    "glm4v_moe": _GLM4V,
    "glm46v": _GLM4V,
    "cogvlm": _COGVLM,
    "cogagent": _COGVLM._replace(extra_tokens=2 + 1600, extra_patches=1 + 700),
    "chatglm": _COGVLM,
    "minicpmv": ImageConstants(
        "tiles", extra_tokens=40, max_tiles=9, has_thumbnail=True, size=448, merge=4, is_always_full=True
    ),
    "deepseek_vl_v2": ImageConstants(
        "tiles", extra_tokens=411, max_tiles=9, has_thumbnail=True, size=384, merge=2, is_always_full=True
    ),
    "kimi_vl": ImageConstants("merge", extra_tokens=132, min_pixels=1, max_pixels=16384 * 14 * 14, merge=2),
    "molmo": ImageConstants(
        "tiles", extra_tokens=160, extra_patches=1, max_tiles=12, has_thumbnail=True, size=336, merge=2, is_always_full=True
    ),
    "phi3_v": ImageConstants(
        "tiles", extra_tokens=205, extra_patches=1, max_tiles=16, has_thumbnail=True, size=336, merge=2, is_always_full=True
    ),
}
"""By ``model_type``. LLaVA-1.5 drops the class token (``vision_feature_select_strategy`` "default"). Gemma 3: two newlines
and a begin or end token on each side (models/gemma3/processing_gemma3.py). LLaVA-OneVision: pinpoints of up to 6 x 6 tiles;
its tokens beyond nine tiles are interpolated away, so that this is an upper bound. Idefics3 and SmolVLM: longest edge of
four tiles. Mllama's image tokens feed cross-attention only: counted as prompt tokens they are an upper bound."""

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
