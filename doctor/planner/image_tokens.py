"""From pixels to patches in the vision tower and tokens in the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

import msgspec

from ..data.activations import CROSS_ATTENTION
from ..image_rule import ImageRule
from ..model import ModelProfile
from ..trace import Pictures
from ..workload import Workload
from .image_sizes import CELLS, cell, rounded, unit
from .image_tiles import GRIDS, WHOLE, Grid, best_pinpoint, grids

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
    """Patches in each of them; in the largest where they differ."""
    patch: int
    """Pixels along a patch's edge; 0 when there are no images."""
    height: int = 0
    """Pixels of each image, before it is resized or cut."""
    width: int = 0
    run_height: int = 0
    """Pixels of each run."""
    run_width: int = 0
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
    if rule.is_single_cut and workload.images > 1:
        rule = _uncut(rule)
    is_sized = bool(workload.image_height or workload.image_width)
    edges = image_edges(rule, workload) if is_sized or rule.kind != "tiles" else _most(rule)
    one = _one(rule, *edges)
    bound = "at most " if rule.is_bound else ""
    note = f"{one.note}: {bound}{one.tokens:,} tokens each{unknown}."
    tokens = one.tokens * workload.images
    return msgspec.structs.replace(
        one,
        tokens=workload.images if profile.model_type in CROSS_ATTENTION else tokens,
        features=tokens,
        sequences=one.sequences * workload.images,
        height=edges[0],
        width=edges[1],
        note=note,
    )


def pictures(profile: ModelProfile, workload: Workload) -> Pictures | None:
    """The images of one prompt as inputs; ``None`` without images, or where it is not known how the model takes them."""
    load = image_load(profile, workload)
    if not load.sequences or profile.image is None:
        return None
    return Pictures(
        images=workload.images,
        height=load.height,
        width=load.width,
        sequences=load.sequences,
        run_height=load.run_height,
        run_width=load.run_width,
        patches=load.patches,
        patch=load.patch,
        merge=max(1, profile.image.merge),
    )


def image_edges(rule: ImageRule, workload: Workload) -> tuple[int, int]:
    """Height and width in pixels: those of the workload, a square when it names one edge, else the rule's own size."""
    return (
        workload.image_height or workload.image_width or rule.size,
        workload.image_width or workload.image_height or rule.size,
    )


def _uncut(rule: ImageRule) -> ImageRule:
    """LLaVA-OneVision pads each of several images to a square; a newline token ends it."""
    return msgspec.structs.replace(rule, kind="fixed", extra_tokens=rule.extra_tokens + 1)


@lru_cache(maxsize=512)
def _one(rule: ImageRule, height: int, width: int) -> ImageLoad:
    """One image of a size in pixels."""
    if rule.kind == "tiles":
        return _in_tiles(rule, height, width)
    if rule.kind == "fixed":
        return _whole(rule, rule.size)
    return _in_cells(rule, height, width)


@lru_cache(maxsize=64)
def _most(rule: ImageRule) -> tuple[int, int]:
    """Of the sizes that just fill a grid of tiles, the one with the most tokens."""

    def count(edges: tuple[int, int]) -> tuple[int, int]:
        load = _one(rule, *edges)
        return load.tokens, load.sequences

    return max(_full_grids(rule), key=count)


def _full_grids(rule: ImageRule) -> Iterator[tuple[int, int]]:
    yield rule.size, rule.size
    yield from rule.pinpoints
    longest = math.ceil(rule.max_height / rule.size) if rule.method in ("longest_edge", "windows") else 0
    if longest:
        yield longest * rule.size, longest * rule.size
        return
    for columns, rows in grids(1, rule.max_tiles, rule.longest_grid):
        yield rows * rule.size, columns * rule.size


def _patches(rule: ImageRule, size: int) -> int:
    """Of a square in the tower."""
    return rule.view_patches or (size // rule.patch) ** 2 + rule.extra_patches


def _tokens(rule: ImageRule, size: int) -> int:
    """Of a square in the prompt."""
    return (size // rule.patch // rule.merge) ** 2 if rule.view_tokens is None else rule.view_tokens


def _whole(rule: ImageRule, size: int) -> ImageLoad:
    """An image that is resized to a square, whatever it was."""
    return ImageLoad(
        tokens=_tokens(rule, size) + rule.extra_tokens,
        sequences=1,
        patches=_patches(rule, size),
        patch=rule.patch,
        run_height=size,
        run_width=size,
        note=f"Images are resized to {size} x {size} pixels",
    )


def _in_cells(rule: ImageRule, height: int, width: int) -> ImageLoad:
    """An image that keeps its shape, in whole tokens."""
    high, wide = (count * unit(rule) for count in CELLS[rule.method](rule, height, width))
    rows, columns = high // cell(rule), wide // cell(rule)
    return ImageLoad(
        tokens=rows * (columns + rule.row_tokens) + rule.extra_tokens,
        sequences=1,
        patches=rule.view_patches or (high // rule.patch) * (wide // rule.patch) + rule.extra_patches,
        patch=rule.patch,
        run_height=high,
        run_width=wide,
        note=f"Images of {high} x {wide} pixels (height x width)",
    )


def _in_tiles(rule: ImageRule, height: int, width: int) -> ImageLoad:
    """An image in squares, the whole one beside them where the family shows it."""
    rows, columns = GRIDS[rule.method](rule, height, width) if max(height, width) > rule.cut_above else WHOLE
    if rows * columns == 1 and not rule.is_whole_always:
        rows, columns = WHOLE
    tokens = TOKENS.get(rule.method, _usual)(rule, (rows, columns), height, width) + rule.extra_tokens
    whole_size = rule.whole_size or rule.size
    patches = max(_patches(rule, rule.size), _patches(rule, whole_size)) if rows else _patches(rule, whole_size)
    if rule.method == "slices":
        patches = max(_slices(rule, (rows, columns), height, width)) * rule.merge**2
    if not rows:
        return msgspec.structs.replace(_whole(rule, whole_size), tokens=tokens, patches=patches)
    shown = rows * columns + rule.has_thumbnail
    return ImageLoad(
        tokens=tokens,
        sequences=shown,
        patches=patches,
        patch=rule.patch,
        run_height=rule.size,
        run_width=rule.size,
        note=f"Images are cut into {shown} tiles of {rule.size} x {rule.size} pixels"
        if whole_size == rule.size
        else f"Images are cut into {shown - 1} tiles of {rule.size} x {rule.size} pixels beside the whole",
    )


def _usual(rule: ImageRule, grid: Grid, height: int, width: int) -> int:  # noqa: ARG001 - one shape for all
    """As many tokens for each tile, and those of the whole image."""
    rows, columns = grid
    whole = _tokens(rule, rule.whole_size or rule.size)
    if not rows:
        return whole
    tiles = rows * columns * (_tokens(rule, rule.size) + rule.tile_tokens) + rows * rule.row_tokens
    return tiles + rule.split_tokens + (whole if rule.has_thumbnail else 0)


def _of_pinpoint(rule: ImageRule, grid: Grid, height: int, width: int) -> int:  # noqa: ARG001 - one shape for all
    """Tiles without their padding, a newline token behind each row. Source: processing_llava_next.py, _onevision.py."""
    edge = math.isqrt(_tokens(rule, rule.size))
    most_height, most_width = best_pinpoint(rule.pinpoints, height, width)
    high, wide = edge * (most_height // rule.size), edge * (most_width // rule.size)
    if width / height > wide / high:
        high -= (high - int(round(height * (wide / width), 7))) // 2 * 2
    else:
        wide -= (wide - int(round(width * (high / height), 7))) // 2 * 2
    if rule.max_patches:
        # LLaVA-OneVision scales the features of more than ``anyres_max_9`` tiles down.
        ratio = math.sqrt(high * wide / (rule.max_patches * edge**2))
        if ratio > 1.1:
            high, wide = int(high // ratio), int(wide // ratio)
    return high * wide + high + edge**2


def _of_lines(rule: ImageRule, grid: Grid, height: int, width: int) -> int:  # noqa: ARG001 - one shape for all
    """A newline behind each row of tokens, of the tiles together and of the whole. Source: processing_unlimited_ocr.py."""
    whole, tile = (math.isqrt(_tokens(rule, size)) for size in (rule.whole_size, rule.size))
    rows, columns = grid
    return whole * (whole + 1) + rows * tile * (columns * tile + 1)


def _of_crops(rule: ImageRule, grid: Grid, height: int, width: int) -> int:  # noqa: ARG001 - one shape for all
    """A column token behind each row: of the whole image, and of the crops without what they share. Source: Molmo 2."""
    window, edge = rule.size - rule.margin, math.ceil(rule.size // rule.patch / rule.merge)
    rows, columns = (math.ceil((count * window + rule.margin) // rule.patch / rule.merge) for count in grid)
    return edge * (edge + rule.row_tokens) + rows * (columns + rule.row_tokens)


def _of_slices(rule: ImageRule, grid: Grid, height: int, width: int) -> int:
    """The whole image and its slices at their own sizes, a newline between rows. Source: processing_minicpmv4_6.py."""
    rows, columns = grid
    whole, one = _slices(rule, grid, height, width)
    return whole + rows * columns * (one + rule.tile_tokens) + max(0, rows - 1)


def _slices(rule: ImageRule, grid: Grid, height: int, width: int) -> tuple[int, int]:
    """Tokens of the whole image and of one slice; 0 when there are none."""
    rows, columns = grid
    whole = _slice(rule, height, width)
    if not rows:
        return whole, 0
    high, wide = (max(round(edge / count), 1) for edge, count in ((height, rows), (width, columns)))
    return whole, _slice(rule, high, wide)


def _slice(rule: ImageRule, height: int, width: int) -> int:
    """Scaled to about the area of a square, in whole tokens. Source: ``find_best_resize`` of MiniCPM-V 4.6."""
    shape = width / height
    high = int(rule.size / math.sqrt(shape))
    wide = int(high * shape)
    return max(1, round(high / cell(rule))) * max(1, round(wide / cell(rule)))


def _of_any_size(rule: ImageRule, grid: Grid, height: int, width: int) -> int:
    """Tiles beside a whole image that keeps its shape; one without tiles where it is small. Source: LFM2-VL."""
    rows, columns = rounded(rule, height, width, least=1)
    tiles = grid[0] * grid[1]
    if not tiles:
        return rows * columns
    return (rows * columns + rule.split_tokens) * rule.has_thumbnail + tiles * (_tokens(rule, rule.size) + rule.tile_tokens)


TOKENS: Mapping[str, Callable[[ImageRule, Grid, int, int], int]] = {
    "any_size": _of_any_size,
    "crops": _of_crops,
    "lines": _of_lines,
    "pinpoint": _of_pinpoint,
    "slices": _of_slices,
}
"""``ImageRule.method`` of ``tiles`` whose tokens are not those of a number of like squares, ``extra_tokens`` left out."""
