"""What an image costs as data: how a processor turns its pixels into patches and prompt tokens."""

from __future__ import annotations

from typing import Literal

import msgspec

ImageKind = Literal["fixed", "merge", "fill", "tiles"]
"""``fixed``: every image is resized to ``size``; ``merge``: any size, ``merge`` x ``merge`` patches make a token
(Qwen2-VL, GLM-4.1V); ``fill``: the same, scaled up or down to ``max_patches`` (Gemma 4); ``tiles``: cut into up to
``max_tiles`` squares of ``size``, with or without the whole image beside them (InternVL, LLaVA-NeXT)."""


class ImageRule(msgspec.Struct, frozen=True, kw_only=True):
    """How pixels become patches (in the tower) and tokens (in the prompt). Source: each family's image processor."""

    kind: ImageKind
    method: str = ""
    """How edges are rounded, or tiles chosen, where that is not the usual way (``planner/image_sizes.py``,
    ``planner/image_tiles.py``)."""
    size: int
    """Edge in pixels of the resized image or tile; for ``merge`` the default edge when the workload names none."""
    patch: int
    merge: int = 1
    """Patches along the edge of the square that becomes one token."""
    extra_tokens: int = 0
    """Tokens added to each image, such as begin and end of image."""
    extra_patches: int = 0
    """Patches added to each image or tile, such as the class token."""
    view_tokens: int | None = None
    """Tokens of a resized image or tile where its patches do not tell, such as the queries of a resampler."""
    view_patches: int | None = None
    """Patches of each image where its size does not tell: those that all are padded to."""
    row_tokens: int = 0
    """Tokens behind each row of tokens, or of tiles."""
    tile_tokens: int = 0
    """Tokens around each tile."""
    split_tokens: int = 0
    """Tokens added to an image that is cut."""
    min_tiles: int = 1
    max_tiles: int = 1
    longest_grid: int = 0
    """Most tiles along an edge; 0 is no bound."""
    cut_above: int = 0
    """Only images with a longer edge are cut."""
    has_thumbnail: bool = False
    """The whole image stands beside its tiles."""
    is_whole_always: bool = False
    """Even beside a single tile."""
    is_single_cut: bool = False
    """Images are cut only where the prompt has no other (LLaVA-OneVision)."""
    whole_size: int = 0
    """Edge of the whole image beside its tiles, where it is not that of a tile."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Bounds of the processor on height x width; larger images are scaled down to ``max_pixels``."""
    min_patches: int = 0
    max_patches: int = 0
    """Bounds on patches; 0 is none."""
    max_height: int = 0
    max_width: int = 0
    """Pixels (patches for Kimi) that an image is scaled down to; 0 is no bound."""
    align: int = 0
    """Pixels that edges are rounded up to where it is not a token's edge."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Height and width of the resolutions that an image may be cut at."""
    margin: int = 0
    """Pixels that tiles share with their neighbours."""
    tolerance: float = 0.0
    """An image is cut when it has so many times ``max_pixels`` (LFM2-VL)."""
    is_bound: bool = False
    """The figures are at most what the family makes of an image, not exactly that."""
