"""How a model's processor turns pixels into patches and tokens, from its files and the table of families. Pure."""

from __future__ import annotations

from typing import Any

from ..data.image_rules import IMAGE_RULES, IMAGE_RULES_BY_TOWER, MERGE_DEFAULT_EDGE, ImageConstants
from ..image_rule import ImageRule
from .image_bounds import Bounds, size_bounds, tile_bounds
from .image_files import MAX_NUMBER, ImageFiles, number_of

_MERGES = (
    *("merge_size", "spatial_merge_size", "downsample_factor", "downsample_ratio", "pixel_shuffle_ratio", "scale_factor"),
    *("pooling_ratio", "projector_pooling_ratio", "pooling_kernel_size", "pooling_size", "hidden_stride"),
    "merge_kernel_size",
)
"""Names of the patches along the edge of what becomes one token; a ratio below one is its inverse."""
_MODES = {"4x": 2, "16x": 4}
"""``downsample_mode`` of MiniCPM-V to the same."""
_OWN_PATCHES = ("slices", "crops")
"""Methods whose tiles are measured in the patches of the processor's file."""
_MAX_MERGE = 64
"""Published files have 1 to 8."""
_MAX_RATE_LETTERS = 20


def image_rule(
    constants: ImageConstants, files: ImageFiles, tower_patch: int | None, *, has_conv: bool = False
) -> ImageRule | None:
    """Work out the rule, or ``None`` when neither the family nor the files tell.

    Args:
        constants: Of the family; ``UNKNOWN`` resizes each image to ``image_size``.
        files: Of the checkpoint.
        tower_patch: Pixels along a patch's edge in the tower, where that is known.
        has_conv: The tower ends in a 2 x 2 convolution with stride 2 (CogVLM2, GLM-4V-9B).

    Raises:
        ModelFileError: ``image_size`` or the like is no positive integer.
    """
    family = files.config.get("model_type")
    if isinstance(family, str) and files.vision and constants == IMAGE_RULES.get(family):
        constants = IMAGE_RULES_BY_TOWER.get((family, files.vision.model_type), constants)
    patch = _patch(constants, files, tower_patch)
    if not patch:
        return None
    merge = 2 if has_conv else _merge(constants, files)
    said = files.counted(constants.token_keys) or constants.view_tokens
    fields: dict[str, Any] = {name: getattr(constants, name) for name in ImageRule.__struct_fields__}
    fields |= {"patch": patch, "merge": merge, "view_tokens": said}
    if constants.kind in ("merge", "fill"):
        return ImageRule(**fields | {"size": MERGE_DEFAULT_EDGE} | size_bounds(constants, files, patch, merge))
    size = _size(constants, files)
    if size is None or size < patch:
        return None
    fields |= {"size": size} | _class_token(constants, files)
    if said is None:
        fields |= _fraction(files, size // patch)
    if constants.kind == "tiles":
        fields |= tile_bounds(constants, files, size, patch, merge)
    return ImageRule(**fields)


def _patch(constants: ImageConstants, files: ImageFiles, tower: int | None) -> int:
    """Pixels along a patch's edge: the processor's word where it makes patches of any size, else the tower's."""
    said, own = number_of(files.prompts.get("patch_size")), number_of(files.images.get("patch_size"))
    if constants.kind in ("merge", "fill") or constants.method in _OWN_PATCHES:
        return said or own or tower or constants.patch
    return tower or said or constants.patch


def _merge(constants: ImageConstants, files: ImageFiles) -> int:
    """Patches along the edge of the square that becomes one token, under the families' names for it."""
    mode = files.word("downsample_mode")
    if isinstance(mode, str) and mode in _MODES:
        return _MODES[mode]
    said = [place.get(key) for place in (files.prompts, files.images, files.config) for key in _MERGES]
    for value in (*said, *(files.tower(key) for key in _MERGES)):
        if isinstance(value, float) and 0.05 < value < 1:
            return round(1 / value)  # InternVL: 0.5
        number = number_of(int(value) if isinstance(value, float) and value.is_integer() else value)
        if number and number <= _MAX_MERGE:
            return number
    return constants.merge or 1


def _size(constants: ImageConstants, files: ImageFiles) -> int | None:
    """Edge of the resized image, or of a tile."""
    is_cropped = files.images.get("do_center_crop") is not False
    said = files.cut(key for key in constants.size_keys if is_cropped or key != "crop_size")
    forced = number_of(files.config.get("force_image_size"))  # InternVL-Chat: wins over vision_config
    return said or constants.size or forced or (files.vision.get("image_size") if files.vision else None)


def _class_token(constants: ImageConstants, files: ImageFiles) -> Bounds:
    """LLaVA: a CLIP tower has a class token, and a strategy drops the first token or not."""
    if not constants.has_strategy:
        return {}
    has_class = int(files.vision is None or "clip" in files.vision.model_type)
    more = files.prompts.get("num_additional_image_tokens")
    kept = more if type(more) is int and 0 <= more < MAX_NUMBER else has_class
    drops = (files.word("vision_feature_select_strategy") or "default") == "default"
    return {"extra_patches": has_class, "extra_tokens": max(0, kept - drops)}


def _fraction(files: ImageFiles, patches: int) -> Bounds:
    """Granite 4 Vision: a fraction of the patches along an edge is left, such as "4/8"."""
    rate = files.word("downsample_rate")
    parts = rate.split("/") if isinstance(rate, str) and len(rate) <= _MAX_RATE_LETTERS else []
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        return {}
    share, whole = (int(part) for part in parts)
    return {"view_tokens": (patches * share // whole) ** 2} if 0 < share <= whole <= patches * share else {}


__all__ = ["image_rule"]
