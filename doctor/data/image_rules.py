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
    "chatglm": _COGVLM,
}
"""By ``model_type``. LLaVA-1.5 drops the class token (``vision_feature_select_strategy`` "default"). Gemma 3: two newlines
and a begin or end token on each side (models/gemma3/processing_gemma3.py). LLaVA-OneVision: pinpoints of up to 6 x 6 tiles;
its tokens beyond nine tiles are interpolated away, so that this is an upper bound. Idefics3 and SmolVLM: longest edge of
four tiles. Mllama's image tokens feed cross-attention only: counted as prompt tokens they are an upper bound."""

UNKNOWN = ImageConstants("fixed")
"""A family that is not listed: an assumption, which the profile notes."""
