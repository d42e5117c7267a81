"""Into how many tiles each family cuts an image, as rows and columns; nothing where the image is shown whole.

Each function does what an image processor of transformers does, in the same order of operations.
``tests/models/test_image_rules.py`` holds them against the processors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache

from ..image_rule import ImageRule

Grid = tuple[int, int]
"""Rows and columns of tiles."""
WHOLE: Grid = (0, 0)
"""The image is not cut."""
_MAX_EDGE_PIXELS = 4096
"""``MAX_IMAGE_SIZE`` of image_processing_idefics3.py."""
_COVERED = 0.9
"""``covering_threshold`` of image_processing_ovis2.py."""


@lru_cache(maxsize=64)
def grids(lowest: int, highest: int, longest: int = 0) -> tuple[Grid, ...]:
    """Columns and rows of between ``lowest`` and ``highest`` tiles, the fewest first. ``longest`` bounds an edge."""
    edge = range(1, min(highest, longest or highest) + 1)
    found = [(i, j) for i in edge for j in edge if lowest <= i * j <= highest]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def _by_shape(rule: ImageRule, height: int, width: int) -> Grid:
    """The grid nearest in shape; the larger one of the same shape when the image has pixels for it.

    Source: ``dynamic_preprocess`` of InternVL-Chat and ``get_optimal_tiled_canvas`` of transformers' GotOcr2 processor.
    """
    best, best_gap = (1, 1), math.inf
    for columns, rows in grids(rule.min_tiles, rule.max_tiles, rule.longest_grid):
        gap = abs(width / height - columns / rows)
        has_pixels = width * height > 0.5 * rule.size * rule.size * columns * rows
        if gap < best_gap or (gap == best_gap and has_pixels):
            best, best_gap = (columns, rows), gap
    return best[1], best[0]


def _by_area(rule: ImageRule, height: int, width: int) -> Grid:
    """As by shape, only where the image is well beyond the largest that is shown whole. Source: LFM2-VL."""
    edge = rule.patch * rule.merge
    rows, columns = (max(rule.patch, round(pixels / edge) * edge) for pixels in (height, width))
    return _by_shape(rule, height, width) if rows * columns > (rule.max_pixels or 0) * rule.tolerance else WHOLE


def _by_scale(rule: ImageRule, height: int, width: int) -> Grid:
    """The grid that needs least enlarging; else least reducing. Source: ``get_optimal_tiled_canvas`` of Cohere 2 Vision."""
    scales = [min(i * rule.size / width, j * rule.size / height) for i, j in grids(1, rule.max_tiles)]
    columns, rows = grids(1, rule.max_tiles)[_least_scaling(scales)]
    return rows, columns


def _least_scaling(scales: list[float]) -> int:
    """Place of the smallest factor of at least one, else of the largest; the first of equals."""
    enlarging = [scale for scale in scales if scale >= 1]
    return scales.index(min(enlarging) if enlarging else max(scales))


def _by_canvas(rule: ImageRule, height: int, width: int) -> Grid:
    """The same in single precision, and of equals the fewest tiles. Source: ``get_best_fit`` of Llama 4."""
    found = grids(1, rule.max_tiles)
    scales = [min(_single(i * rule.size / height), _single(j * rule.size / width)) for i, j in found]
    return found[_least_scaling(scales)]


def _single(number: float) -> float:
    """Rounded to single precision."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def _by_cover(rule: ImageRule, height: int, width: int) -> Grid:
    """The fewest tiles that show 90 % of the image at its own size. Source: ``get_min_tile_covering_grid`` of Ovis 2."""
    shares = {grid: _covered(grid, rule.size, height, width) for grid in grids(1, rule.max_tiles)}
    enough = {grid: share for grid, share in shares.items() if share > _COVERED}
    if enough:
        columns, rows = min(enough, key=lambda grid: (grid[0] * grid[1], -enough[grid]))
    else:
        columns, rows = min(shares, key=lambda grid: (-shares[grid], grid[0] * grid[1]))
    return rows, columns


def _covered(grid: Grid, size: int, height: int, width: int) -> float:
    """Share of the image that tiles show when none is enlarged. The class cuts by the grid read the other way round."""
    row_height, column_width = height // grid[0], width // grid[1]
    total = 0.0
    for row in range(grid[0]):
        for column in range(grid[1]):
            down = height - row * row_height if row == grid[0] - 1 else row_height
            right = width - column * column_width if column == grid[1] - 1 else column_width
            longer, shorter = float(max(down, right)), float(min(down, right))
            if longer > size:
                longer, shorter = float(size), shorter / longer * size
            total += longer * shorter
    return total / (width * height)


def _by_fit(rule: ImageRule, height: int, width: int) -> Grid:
    """The grid that holds the image at its largest, else that nearest in shape. Source: Perception LM."""
    best, best_edges = WHOLE, (0.0, 0.0)
    for columns, rows in _descending(rule.max_tiles):
        if columns * rule.size < width or rows * rule.size < height:
            continue
        edges = _fitted(height, width, rows * rule.size, columns * rule.size)
        if best == WHOLE or edges[width >= height] >= best_edges[width >= height]:
            best, best_edges = (rows, columns), edges
    return best if best != WHOLE else _nearest(rule, height, width)


@lru_cache(maxsize=16)
def _descending(highest: int) -> tuple[Grid, ...]:
    """Columns and rows: from the most tiles to the fewest, those of one shape together."""
    by_shape: dict[float, list[Grid]] = {}
    for count in range(highest, 0, -1):
        for columns in (i for i in range(1, count + 1) if count % i == 0):
            by_shape.setdefault(columns / (count // columns), []).append((columns, count // columns))
    return tuple(grid for alike in by_shape.values() for grid in alike)


def _fitted(height: int, width: int, most_height: int, most_width: int) -> tuple[float, float]:
    """Width and height of the image inside a canvas."""
    factor, shape = min(most_width / width, most_height / height), width / height
    if shape > 1.0:
        return factor * width, math.floor(factor * width / shape)
    return math.floor(factor * height * shape), factor * height


def _nearest(rule: ImageRule, height: int, width: int) -> Grid:
    shape, found = width / height, _descending(rule.max_tiles)
    if shape >= 1:
        nearest = min((i / j for i, j in found if i / j <= shape), key=lambda ratio: abs(ratio - shape))
    else:
        nearest = min((i / j for i, j in found if i / j > shape), key=lambda ratio: abs(1 / ratio - 1 / shape))
    columns, rows = max((grid for grid in found if grid[0] / grid[1] == nearest), key=lambda grid: grid[shape < 1])
    return rows, columns


def best_pinpoint(pinpoints: tuple[tuple[int, int], ...], height: int, width: int) -> tuple[int, int]:
    """The resolution that keeps most of the image and wastes least. Source: ``select_best_resolution`` of transformers."""
    best, best_rank = pinpoints[0], (0, 0)
    for most_height, most_width in pinpoints:
        scale = min(most_width / width, most_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        rank = kept, kept - most_height * most_width
        if kept and rank > best_rank:
            best, best_rank = (most_height, most_width), rank
    return best


def _by_pinpoint(rule: ImageRule, height: int, width: int) -> Grid:
    """LLaVA-NeXT: one of a list of resolutions."""
    most_height, most_width = best_pinpoint(rule.pinpoints, height, width)
    return max(1, math.ceil(most_height / rule.size)), max(1, math.ceil(most_width / rule.size))


def _by_longest_edge(rule: ImageRule, height: int, width: int) -> Grid:
    """The longer edge is brought to a length, then cut into squares. Source: image_processing_idefics3.py."""
    height, width = _even_edges(height, width, rule.max_height)
    if max(height, width) > _MAX_EDGE_PIXELS:
        height, width = _even_edges(height, width, _MAX_EDGE_PIXELS, is_even=False)
    shape = width / height
    if width >= height:
        columns = math.ceil(width / rule.size)
        rows = math.ceil(int(columns * rule.size / shape) / rule.size)
    else:
        rows = math.ceil(height / rule.size)
        columns = math.ceil(int(rows * rule.size * shape) / rule.size)
    return (max(1, rows), max(1, columns)) if rows > 1 or columns > 1 else WHOLE


def _even_edges(height: int, width: int, longest: int, *, is_even: bool = True) -> tuple[int, int]:
    shape = width / height
    if width >= height:
        height = int(longest / shape)
        return max(1, height + height % 2 * is_even), longest
    width = int(longest * shape)
    return longest, max(1, width + width % 2 * is_even)


def _by_windows(rule: ImageRule, height: int, width: int) -> Grid:
    """Windows beside the whole image, none for a small one. Source: ``_plan_patches`` of image_processing_step3p7.py."""
    if min(height, width) < 32 and max(width / height, height / width) > 4:
        height = width = max(height, width)
    if max(height, width) > rule.max_height:
        scale = rule.max_height / max(height, width)
        height, width = int(height * scale), int(width * scale)
    shorter, longer = max(1, min(height, width)), max(height, width)
    window = rule.size
    if longer <= rule.whole_size:
        window = shorter if longer / shorter > 1.5 else 0
    elif longer / shorter > 4:
        window = min(shorter, rule.size)
    if not window:
        return WHOLE
    rows, columns = (edge // window + (edge % window > 0.2 * window) if edge >= window else 1 for edge in (height, width))
    return rows, columns


def _by_slices(rule: ImageRule, height: int, width: int) -> Grid:
    """Slices of about the area of a square, as near to squares as can be. Source: ``get_sliced_grid`` of MiniCPM-V."""
    wanted = min(math.ceil(width * height / (rule.size * rule.size)), rule.max_tiles)
    if wanted <= 1:
        return WHOLE
    shape = math.log(width / height)
    best, best_gap = (1, 1), math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > rule.max_tiles:
            continue
        for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
            gap = abs(shape - math.log(count // rows / rows))
            if gap < best_gap or (gap == best_gap and rows > best[0]):
                best, best_gap = (rows, count // rows), gap
    return best


def _by_crops(rule: ImageRule, height: int, width: int) -> Grid:
    """Squares that overlap by a margin. Source: ``select_tiling`` of image_processing_molmo2.py, in single precision."""
    window = rule.size - rule.margin
    found = sorted(grids(1, rule.max_tiles), key=lambda grid: (grid[0] * grid[1], grid[0]))
    scales = [min(_over(i * window, height - rule.margin), _over(j * window, width - rule.margin)) for i, j in found]
    return found[_least_scaling(scales)]


def _over(pixels: int, edge: int) -> float:
    return _single(pixels / edge) if edge else math.inf


def _by_number(rule: ImageRule, height: int, width: int) -> Grid:  # noqa: ARG001 - one shape for all
    """Always as many: the quarters of Idefics 2, the tiles that Llama 3.2 Vision pads each image to, a bound where it is
    not known how many.
    """
    return 1, rule.max_tiles


GRIDS: Mapping[str, Callable[[ImageRule, int, int], Grid]] = {
    "": _by_shape,
    "any_size": _by_area,
    "canvas": _by_canvas,
    "cover": _by_cover,
    "crops": _by_crops,
    "fit": _by_fit,
    "lines": _by_shape,
    "longest_edge": _by_longest_edge,
    "number": _by_number,
    "pinpoint": _by_pinpoint,
    "scale": _by_scale,
    "slices": _by_slices,
    "windows": _by_windows,
}
"""``ImageRule.method`` of the kind ``tiles``."""
