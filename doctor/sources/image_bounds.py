"""The bounds of a family's rule for images: of sizes, patches and tiles, as its files give them. Pure."""

from __future__ import annotations

from typing import Any

from ..data.image_rules import ImageConstants
from .image_files import MAX_NUMBER, ImageFiles, number_of

MAX_TILES = 144
"""Published files ask for up to 36; it bounds the time of a plan."""
_MAX_PINPOINTS = 256
_MAX_PIXELS = 2**40
_BOUNDED = ("", "enlarged", "enlarged_in_turn", "searched", "any_size")
"""Methods that hold height x width against bounds."""
_TILES_ALONG = 4
"""Tiles along the longer edge: ``size`` of Idefics 3 and SmolVLM is four times ``max_image_size``."""
_MOST_TILES = ("max_patches", "max_tiles", "max_image_tiles", "max_num_tiles", "max_crops", "max_slice_nums")
_LEAST_TILES = ("min_patches", "min_tiles")

Bounds = dict[str, Any]
"""Fields of ``ImageRule``."""


def size_bounds(constants: ImageConstants, files: ImageFiles, patch: int, merge: int) -> Bounds:
    """For images of any size.

    Args:
        constants: Of the family.
        files: Of the checkpoint.
        patch: Pixels along a patch's edge.
        merge: Patches along a token's edge.
    """
    return pixel_bounds(constants, files, patch * merge) | _patch_bounds(constants, files, merge) | _edges(constants, files)


def pixel_bounds(constants: ImageConstants, files: ImageFiles, cell: int) -> Bounds:
    """Bounds on height x width in pixels, where the family or its files have them."""
    if constants.method not in _BOUNDED:
        return {}
    size = files.images.get("size")
    edges = size if isinstance(size, dict) else {}
    least = _pixels(files.images.get("min_pixels")) or _pixels(edges.get("shortest_edge"))
    most = _pixels(files.images.get("max_pixels")) or _pixels(edges.get("longest_edge"))
    least = (files.cut(("min_image_tokens",)) or 0) * cell**2 or least or constants.min_pixels or 1
    most = (files.cut(("max_image_tokens",)) or 0) * cell**2 or most or constants.max_pixels
    least = max(1, least // constants.frames)
    return {"min_pixels": least, "max_pixels": None if most is None else max(least, most // constants.frames)}


def _pixels(value: Any) -> int | None:
    """A bound on pixels, or ``None`` for anything else."""
    return value if type(value) is int and 0 < value < _MAX_PIXELS else None


def _patch_bounds(constants: ImageConstants, files: ImageFiles, merge: int) -> Bounds:
    """Bounds on patches, or on tokens where the family counts those."""
    if not constants.max_patches:
        return {}
    soft = files.cut(("max_soft_tokens",))
    if constants.kind == "fill":
        most = soft * merge**2 if soft else constants.max_patches
        return {"max_patches": most, "view_patches": most}
    most = files.cut(("max_patches", "max_image_tokens", "max_num_patches")) or constants.max_patches
    length = files.cut(("max_model_len",))
    if length:
        # Nemotron Omni: patches for the whole context but four tokens.
        most = min(most, max((length - 4) * merge**2, 1))
    least = files.cut(("min_num_patches",)) or constants.min_patches
    return {"min_patches": least, "max_patches": max(least, most)}


def _edges(constants: ImageConstants, files: ImageFiles) -> Bounds:
    """Bounds on the edges."""
    if not constants.max_height:
        return {}
    height = files.edge("longest_edge", "height", "max_height") or constants.max_height
    width = files.edge("longest_edge", "width", "max_width") or constants.max_width
    bounds = {"max_height": height, "max_width": width}
    # LightOnOCR rounds edges to the patches of its image processor, and counts tokens by its own.
    align = number_of(files.images.get("patch_size")) if files.prompts.get("patch_size") else None
    if constants.method != "shrunk" or constants.row_tokens:
        align = None
    return bounds | ({"align": align} if align else {}) | _pixels_of(constants, height, width)


def _pixels_of(constants: ImageConstants, height: int, width: int) -> Bounds:
    """What the largest image has, for what searches for it."""
    return {"max_pixels": height * width} if constants.method == "shrunk" else {}


def tile_bounds(constants: ImageConstants, files: ImageFiles, size: int, patch: int, merge: int) -> Bounds:
    """For images that are cut.

    Args:
        constants: Of the family.
        files: Of the checkpoint.
        size: Edge of a tile in pixels.
        patch: Pixels along a patch's edge.
        merge: Patches along a token's edge.
    """
    most = _most_tiles(constants, files)
    whole = max(patch, files.edge("height") or constants.whole_size) if constants.whole_size else 0
    return {
        "max_tiles": most,
        "min_tiles": min(files.cut(_LEAST_TILES) or constants.min_tiles, most),
        "has_thumbnail": constants.has_thumbnail and files.word("use_thumbnail") is not False,
        "whole_size": whole,
        "cut_above": (size if constants.cut_above else 0) if _is_cut(constants, files) else MAX_NUMBER,
        **_method_bounds(constants, files, size, patch, merge),
    }


def _most_tiles(constants: ImageConstants, files: ImageFiles) -> int:
    tower = number_of(files.tower("max_num_tiles"))
    said = files.cut(_MOST_TILES) or number_of(files.config.get("max_dynamic_patch")) or tower
    is_fixed = constants.method == "number" and constants.has_thumbnail
    return said if said and said <= MAX_TILES and not is_fixed else constants.max_tiles


def _is_cut(constants: ImageConstants, files: ImageFiles) -> bool:
    said = (files.images.get(key) for key in constants.cut_keys)
    asked = next((word for word in said if word is not None), constants.is_cut)
    return bool(asked) and files.config.get("dynamic_image_size") is not False


def _method_bounds(constants: ImageConstants, files: ImageFiles, size: int, patch: int, merge: int) -> Bounds:
    if constants.method == "pinpoint":
        return {"pinpoints": _pinpoints(constants, files, size), "max_patches": _most_scaled(constants, files)}
    if constants.method == "longest_edge":
        return {"max_height": files.edge("longest_edge") or _TILES_ALONG * size}
    if constants.method == "windows":
        return {"max_height": files.cut(("max_image_size",)) or constants.max_height}
    if constants.method == "crops":
        margins = files.images.get("overlap_margins")
        is_said = isinstance(margins, list) and len(margins) == 2 and all(type(margin) is int for margin in margins)
        margin = (sum(margins) if is_said and margins else constants.margin) * patch
        return {"margin": margin if 0 <= margin < size else 0}
    if constants.method == "any_size":
        bounds = pixel_bounds(constants, files, patch * merge)
        most = max(bounds["max_pixels"] or 0, size**2) // patch**2
        tolerance = files.images.get("max_pixels_tolerance")
        is_said = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool) and 0 < tolerance < MAX_NUMBER
        return {
            **bounds,
            "view_patches": most,
            "tolerance": float(tolerance) if is_said and tolerance else constants.tolerance,
        }
    return {}


def _pinpoints(constants: ImageConstants, files: ImageFiles, size: int) -> tuple[tuple[int, int], ...]:
    """Those of the file, as long as a tile fits into each; else the family's, for tiles of this size."""
    said = files.images.get("image_grid_pinpoints") or files.config.get("image_grid_pinpoints")
    entries = said if isinstance(said, list) and len(said) <= _MAX_PINPOINTS else []
    found = tuple(tuple(entry) for entry in entries if isinstance(entry, list) and len(entry) == 2)
    is_sound = found and len(found) == len(entries)
    is_sound = is_sound and all(type(edge) is int and size <= edge <= MAX_TILES * size for pair in found for edge in pair)
    if is_sound:
        return tuple((pair[0], pair[1]) for pair in found)
    tile = min(edge for pair in constants.pinpoints for edge in pair)
    return tuple((height // tile * size, width // tile * size) for height, width in constants.pinpoints)


def _most_scaled(constants: ImageConstants, files: ImageFiles) -> int:
    """The nine of ``anyres_max_9``."""
    word = files.word("vision_aspect_ratio")
    number = word.removeprefix("anyres_max_") if isinstance(word, str) else ""
    return int(number) if number.isdecimal() and 0 < int(number[:9]) < MAX_NUMBER else constants.max_patches


__all__ = ["MAX_TILES", "Bounds", "pixel_bounds", "size_bounds", "tile_bounds"]
