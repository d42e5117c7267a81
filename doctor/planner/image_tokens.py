"""From pixels to patches in the vision tower and tokens in the prompt."""

from __future__ import annotations

import math

import msgspec

from ..data.activations import CROSS_ATTENTION
from ..model import ImageRule, ModelProfile
from ..workload import Workload

_ANY_SIZE = 1008
"""Edge in pixels where a model takes any size and the workload names none (see ``Workload.image_height``)."""


class ImageLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What the images of one prompt are to the model."""

    tokens: int
    """Tokens that they add to the prompt, all images together; one each where layers read them by cross-attention."""
    features: int = 0
    """Image features that the text body receives: as many as tokens, except with cross-attention."""
    sequences: int
    """Runs of patches that attend to each other: one an image, or one a tile."""
    patches: int
    """Patches in each of them."""
    patch: int
    """Pixels along a patch's edge; 0 when there are no images."""
    note: str | None = None
    """What was assumed about the size."""


NO_IMAGES = ImageLoad(tokens=0, sequences=0, patches=0, patch=0)


def image_rule(profile: ModelProfile) -> ImageRule | None:
    """The model's rule, or one token a patch where only its tower is known; ``None`` for a model that takes no images."""
    if profile.image is not None or profile.vision is None:
        return profile.image
    return ImageRule(kind="merge", size=_ANY_SIZE, patch=profile.vision.patch)


def image_load(profile: ModelProfile, workload: Workload) -> ImageLoad:
    """Count the tokens and patches of the images of one prompt.

    Args:
        profile: The model; without an image rule, each patch of its vision tower is taken to make one token.
        workload: Number and size of the images; one edge alone means a square.
    """
    if not workload.images:
        return NO_IMAGES
    rule = image_rule(profile)
    if rule is None:
        return msgspec.structs.replace(NO_IMAGES, note="The model takes no images; those of the workload are left out.")
    unknown = "" if profile.image else ", one token a patch since the model's image rule is unknown"
    one = {"fixed": _fixed, "merge": _merge, "tiles": _tiles}[rule.kind](rule, workload)
    note = f"{one.note}: {one.tokens:,} tokens each{unknown}."
    tokens = one.tokens * workload.images
    return msgspec.structs.replace(
        one,
        tokens=workload.images if profile.model_type in CROSS_ATTENTION else tokens,
        features=tokens,
        sequences=one.sequences * workload.images,
        note=note,
    )


def image_edges(rule: ImageRule, workload: Workload) -> tuple[int, int]:
    """Height and width in pixels: those of the workload, a square when it names one edge, else the rule's own size."""
    return (
        workload.image_height or workload.image_width or rule.size,
        workload.image_width or workload.image_height or rule.size,
    )


def _fixed(rule: ImageRule, workload: Workload) -> ImageLoad:  # noqa: ARG001 - one shape for all rules
    """Every image is resized to ``size``, whatever it was."""
    return ImageLoad(
        tokens=(rule.size // rule.patch // rule.merge) ** 2 + rule.extra_tokens,
        sequences=1,
        patches=(rule.size // rule.patch) ** 2 + rule.extra_patches,
        patch=rule.patch,
        note=f"Images are resized to {rule.size} x {rule.size} pixels",
    )


def _merge(rule: ImageRule, workload: Workload) -> ImageLoad:
    """Any size, rounded to whole tokens and kept between the processor's bounds on height x width."""
    rows, columns = _grid(rule, *image_edges(rule, workload))
    edge = rule.patch * rule.merge
    return ImageLoad(
        tokens=rows * columns + rule.extra_tokens,
        sequences=1,
        patches=rows * columns * rule.merge**2 + rule.extra_patches,
        patch=rule.patch,
        note=f"Images of {rows * edge} x {columns * edge} pixels (height x width)",
    )


def _grid(rule: ImageRule, height: int, width: int) -> tuple[int, int]:
    """Tokens along height and width. Source: the resize step of the Qwen2-VL and GLM-4.1V image processors."""
    edge = rule.patch * rule.merge
    rows, columns = max(1, round(height / edge)), max(1, round(width / edge))
    if rule.max_pixels and rows * columns * edge**2 > rule.max_pixels:
        shrink = math.sqrt(height * width / rule.max_pixels)
        return max(1, math.floor(height / shrink / edge)), max(1, math.floor(width / shrink / edge))
    if rule.min_pixels and rows * columns * edge**2 < rule.min_pixels:
        grow = math.sqrt(rule.min_pixels / (height * width))
        return math.ceil(height * grow / edge), math.ceil(width * grow / edge)
    return rows, columns


def _tiles(rule: ImageRule, workload: Workload) -> ImageLoad:
    """Cut into the grid of squares nearest in shape, plus a thumbnail; without a size, as many as there can be."""
    is_sized = (workload.image_height or workload.image_width) and not rule.is_always_full
    tiles = _tile_count(rule, *image_edges(rule, workload)) if is_sized else rule.max_tiles
    shown = tiles + (1 if rule.has_thumbnail and tiles > 1 else 0)
    return ImageLoad(
        tokens=shown * (rule.size // rule.patch // rule.merge) ** 2 + rule.extra_tokens,
        sequences=shown,
        patches=(rule.size // rule.patch) ** 2 + rule.extra_patches,
        patch=rule.patch,
        note=f"Images are cut into {shown} tiles of {rule.size} x {rule.size} pixels",
    )


def _tile_count(rule: ImageRule, height: int, width: int) -> int:
    """Tiles of the grid whose shape is nearest to the image's; the larger grid when the image has pixels for it.

    Source: ``dynamic_preprocess`` of InternVL-Chat and ``get_optimal_tiled_canvas`` of transformers' GotOcr2 processor.
    """
    grids = sorted(
        {(i, j) for i in range(1, rule.max_tiles + 1) for j in range(1, rule.max_tiles + 1) if i * j <= rule.max_tiles},
        key=lambda grid: grid[0] * grid[1],
    )
    best, best_gap = (1, 1), math.inf
    for columns, rows in grids:
        gap = abs(width / height - columns / rows)
        has_pixels = height * width > rule.size**2 * columns * rows / 2
        if gap < best_gap or (gap == best_gap and has_pixels):
            best, best_gap = (columns, rows), gap
    return best[0] * best[1]
