"""How a model's processor turns pixels into patches and tokens, from config.json and the table of families. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..data.image_rules import MERGE_DEFAULT_EDGE, ImageConstants
from ..model import ImageRule, VisionShape
from .model_shapes import Fields


def image_rule(
    constants: ImageConstants,
    config: Mapping[str, Any],
    vision: VisionShape,
    fields: Fields,
    processor: Mapping[str, Any] | None,
    *,
    has_conv: bool,
) -> ImageRule | None:
    """Work out the rule, or ``None`` when neither the family nor the config tells.

    Args:
        constants: Of the family; ``UNKNOWN`` resizes each image to ``image_size``.
        config: config.json.
        vision: Dimensions of the tower.
        fields: ``vision_config``.
        processor: preprocessor_config.json, which may narrow the bounds on pixels.
        has_conv: The tower ends in a 2 x 2 convolution with stride 2 (CogVLM2, GLM-4V-9B).

    Raises:
        ModelFileError: ``image_size`` or the like is no positive integer.
    """
    if constants.kind == "merge":
        return _any_size(constants, vision, fields, processor)
    forced = config.get("force_image_size")  # InternVL-Chat: wins over vision_config
    size = forced if type(forced) is int and 0 < forced < 2**31 else constants.size or fields.get("image_size")
    if size is None or size < vision.patch:
        return None
    return ImageRule(
        kind=constants.kind,
        size=size,
        patch=vision.patch,
        merge=2 if has_conv else constants.merge or _merge(config, fields, size // vision.patch),
        extra_tokens=constants.extra_tokens,
        extra_patches=constants.extra_patches,
        max_tiles=constants.max_tiles,
        has_thumbnail=constants.has_thumbnail,
        is_always_full=constants.is_always_full,
    )


def _any_size(
    constants: ImageConstants, vision: VisionShape, fields: Fields, processor: Mapping[str, Any] | None
) -> ImageRule:
    """The Qwen2-VL and GLM-4.1V families: any size between two bounds."""
    bounds = processor or {}
    size = bounds.get("size")
    edges = size if isinstance(size, dict) else {}
    lowest = _pixels(bounds.get("min_pixels")) or _pixels(edges.get("shortest_edge")) or constants.min_pixels or 1
    highest = _pixels(bounds.get("max_pixels")) or _pixels(edges.get("longest_edge")) or constants.max_pixels or lowest
    lowest, highest = lowest // constants.frames, highest // constants.frames
    return ImageRule(
        kind="merge",
        size=MERGE_DEFAULT_EDGE,
        patch=vision.patch,
        merge=fields.get("spatial_merge_size") or constants.merge or 1,
        extra_tokens=constants.extra_tokens,
        extra_patches=constants.extra_patches,
        min_pixels=max(1, lowest),
        max_pixels=max(1, lowest, highest),
    )


def _pixels(value: Any) -> int | None:
    """A bound on pixels, or ``None`` for anything else."""
    return value if type(value) is int and 0 < value < 2**40 else None


def _merge(config: Mapping[str, Any], fields: Fields, patches_per_edge: int) -> int:
    """Patches along the edge of the square that becomes one token, under the families' names for it."""
    ratio = config.get("downsample_ratio")
    if isinstance(ratio, float) and 0.05 < ratio < 1:
        return round(1 / ratio)  # InternVL: 0.5
    factor = config.get("scale_factor")
    if type(factor) is int and 1 <= factor <= patches_per_edge:
        return factor  # Idefics3: 2
    tokens = config.get("mm_tokens_per_image")
    if type(tokens) is int and 0 < tokens <= patches_per_edge**2:
        return max(1, patches_per_edge // math.isqrt(tokens))  # Gemma 3: 256 of 64 x 64 patches
    return fields.get("spatial_merge_size") or 1
