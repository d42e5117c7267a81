"""Rows and columns of tokens of an image that keeps its shape: how each family rounds and bounds its edges.

Each function does what an image processor of transformers does, in the same order of operations, so that sizes at a bound
come out alike. ``tests/models/test_image_rules.py`` holds them against the processors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

from ..image_rule import ImageRule

Cells = tuple[int, int]
"""Units along height and width: tokens, but for families that round edges to something else."""


def cell(rule: ImageRule) -> int:
    """Pixels along the edge of what becomes one token."""
    return rule.patch * rule.merge


def unit(rule: ImageRule) -> int:
    """Pixels that edges are rounded to."""
    return rule.align or cell(rule)


def rounded(rule: ImageRule, height: int, width: int, least: int = 0) -> Cells:
    """To the nearest whole tokens; then scaled into the bounds on height x width. Source: ``smart_resize`` of Qwen2-VL.

    LFM2-VL counts an edge as one token at ``least`` before it looks at the bounds.
    """
    edge = cell(rule)
    rows, columns = max(least, round(height / edge)), max(least, round(width / edge))
    if rule.max_pixels and rows * columns * edge**2 > rule.max_pixels:
        shrink = math.sqrt((height * width) / rule.max_pixels)
        return max(1, math.floor(height / shrink / edge)), max(1, math.floor(width / shrink / edge))
    if rule.min_pixels and rows * columns * edge**2 < rule.min_pixels:
        grow = math.sqrt(rule.min_pixels / (height * width))
        return math.ceil(height * grow / edge), math.ceil(width * grow / edge)
    return max(1, rows), max(1, columns)


def _enlarged(rule: ImageRule, height: int, width: int) -> Cells:
    """The same; an edge below one token is brought up to it first, the other with it. Source: GLM-4.1V."""
    edge = cell(rule)
    if height < edge or width < edge:
        scale = max(edge / height, edge / width)
        height, width = int(height * scale), int(width * scale)
    return rounded(rule, height, width)


def _enlarged_in_turn(rule: ImageRule, height: int, width: int) -> Cells:
    """The same, first the height and then the width. Source: PaddleOCR-VL."""
    edge = cell(rule)
    if height < edge:
        height, width = edge, round((width * edge) / height)
    if width < edge:
        height, width = round((height * edge) / width), edge
    return rounded(rule, height, width)


def _shrunk(rule: ImageRule, height: int, width: int) -> Cells:
    """Scaled down to fit, never up; a part of a token counts. Source: ``get_resize_output_image_size`` of Pixtral."""
    ratio = max(height / rule.max_height, width / rule.max_width)
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    return max(1, math.ceil(height / unit(rule))), max(1, math.ceil(width / unit(rule)))


def _shrunk_by_scale(rule: ImageRule, height: int, width: int) -> Cells:
    """As ``_shrunk``, by a factor that is applied to both edges. Source: Fuyu."""
    scale = min(rule.max_height / height, rule.max_width / width)
    if scale < 1:
        height, width = int(height * scale), int(width * scale)
    return max(1, math.ceil(height / cell(rule))), max(1, math.ceil(width / cell(rule)))


def _shrunk_by_patches(rule: ImageRule, height: int, width: int) -> Cells:
    """Scaled down to a number of patches, and of patches along an edge, then padded. Source: ``navit_resize`` of Kimi."""
    patches = max(1.0, height // rule.patch) * max(1.0, width // rule.patch)
    scale = min(
        1.0,
        math.sqrt(rule.max_patches / patches),
        (rule.max_height * rule.patch) / height,
        (rule.max_height * rule.patch) / width,
    )
    edges = (min(max(1, int(edge * scale)), rule.max_height * rule.patch) for edge in (height, width))
    rows, columns = (math.ceil(edge / cell(rule)) for edge in edges)
    return rows, columns


def _padded(rule: ImageRule, height: int, width: int) -> Cells:
    """Padded to whole tokens, whatever the size. Source: Inkling 2."""
    return math.ceil(height / cell(rule)), math.ceil(width / cell(rule))


def _padded_beyond(rule: ImageRule, height: int, width: int) -> Cells:
    """The same, with one more column where the width is a whole number of tokens. Source: Inkling."""
    return math.ceil(height / cell(rule)), width // cell(rule) + 1


def _within_patches(rule: ImageRule, height: int, width: int) -> Cells:
    """Between two numbers of patches, and whole tokens. Source: ``get_patch_grid_size`` of Nemotron Omni."""
    rows, columns = round(height / rule.patch + 0.5), round(width / rule.patch + 0.5)
    factor = min(math.sqrt(rule.max_patches / (rows * columns)), 1.0)
    rows, columns = max(1, math.floor(factor * rows)), max(1, math.floor(factor * columns))
    if rule.max_patches > rule.min_patches > rows * columns:
        factor = math.sqrt(rule.min_patches / (rows * columns))
        rows, columns = math.ceil(factor * rows), math.ceil(factor * columns)
    rows = _in_tokens(rows, columns, rule)
    columns = _in_tokens(columns, rows, rule)
    return rows // rule.merge, columns // rule.merge


def _in_tokens(patches: int, across: int, rule: ImageRule) -> int:
    rest = patches % rule.merge
    if rest and (patches + rule.merge - rest) * across <= rule.max_patches:
        return patches + rule.merge - rest
    return max(rule.merge, patches - rest)


def _searched(rule: ImageRule, height: int, width: int) -> Cells:
    """Padded to whole tokens; the largest height that keeps within the bound. Source: ``smart_resize`` of GLM-5."""
    edge = cell(rule)
    lowest, highest = rule.min_pixels or 0, rule.max_pixels or 0
    rows, columns = math.ceil(height / edge), math.ceil(width / edge)
    if rows * columns * edge**2 < lowest:
        scale = math.sqrt(lowest / (height * width))
        rows, columns = (math.ceil(max(1, math.ceil(pixels * scale)) / edge) for pixels in (height, width))
    if rows * columns * edge**2 <= highest:
        return rows, columns
    low, high, best = 1, height, (1, 1)
    while low <= high:
        middle = (low + high) // 2
        tried = math.ceil(middle / edge), math.ceil(max(1, math.floor(width * middle / height)) / edge)
        if tried[0] * tried[1] * edge**2 <= highest:
            best, low = tried, middle + 1
        else:
            high = middle - 1
    return best


def _nearest_shape(rule: ImageRule, height: int, width: int) -> Cells:
    """Of the whole tokens around the edges those nearest in shape, within a number. Source: ``smart_resize`` of Muse."""
    rows, columns = height / cell(rule), width / cell(rule)
    ratio = columns / rows
    if rows * columns > rule.max_patches:
        rows = (rule.max_patches / ratio) ** 0.5
        columns = rows * ratio
    around = itertools.product((math.floor(rows), math.ceil(rows)), (math.floor(columns), math.ceil(columns)))
    found = [(i, j) for i, j in set(around) if i >= 1 and j >= 1 and i * j <= rule.max_patches]
    if not found:
        return max(1, round(rows)), max(1, round(columns))
    return min(found, key=lambda grid: abs(grid[0] / grid[1] - height / width))


def _filled(rule: ImageRule, height: int, width: int) -> Cells:
    """Scaled up or down to a number of patches. Source: ``get_aspect_ratio_preserving_size`` of Gemma 4."""
    factor = math.sqrt(rule.max_patches * rule.patch**2 / (height * width))
    rows = math.floor(factor * height / cell(rule))
    columns = math.floor(factor * width / cell(rule))
    most = rule.max_patches // rule.merge**2
    if not rows:
        return 1, max(1, min(width // height, most))
    if not columns:
        return min(height // width, most), 1
    return rows, columns


CELLS: Mapping[str, Callable[[ImageRule, int, int], Cells]] = {
    "": rounded,
    "enlarged": _enlarged,
    "enlarged_in_turn": _enlarged_in_turn,
    "shrunk": _shrunk,
    "shrunk_by_scale": _shrunk_by_scale,
    "shrunk_by_patches": _shrunk_by_patches,
    "padded": _padded,
    "padded_beyond": _padded_beyond,
    "within_patches": _within_patches,
    "searched": _searched,
    "nearest_shape": _nearest_shape,
    "filled": _filled,
}
"""``ImageRule.method`` of the kinds ``merge`` and ``fill``."""
