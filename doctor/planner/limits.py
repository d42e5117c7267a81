"""The inverse questions: the largest workload that one placement can take, one quantity at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from ..placement import Limits
from .image_tokens import image_rule
from .order import Split
from .place import largest
from .problem import Problem
from .validate import MAX_BATCH, MAX_EDGE, MAX_IMAGES, MAX_TOKENS

ASKED = 4
"""Parts into which the doubt is cut by asking the allocator: two questions."""


def limits(problem: Problem, split: Split, longest_text_tokens: int) -> Limits:
    """Find how far each quantity of the workload can grow on a split that fits it, the others as they are.

    Args:
        problem: The question.
        split: Its answer.
        longest_text_tokens: Most text tokens that the split can take.
    """
    workload, images = problem.workload, problem.footprint.images
    takes_images = problem.profile.image is not None or problem.profile.vision is not None
    return Limits(
        prompt_tokens=longest_text_tokens + images.tokens,
        new_tokens=_most(problem, split, "new_tokens", workload.new_tokens, _most_new_tokens(problem))
        if workload.makes_answer
        else None,
        batch=_most(problem, split, "batch", workload.batch, MAX_BATCH),
        images=_most(problem, split, "images", workload.images, MAX_IMAGES) if takes_images else None,
        image_edge=_largest_edge(problem, split) if takes_images and workload.images else None,
    )


def _most(problem: Problem, split: Split, field: str, low: int, high: int) -> int:
    return _largest(problem, split, low, max(low, high), lambda asked, number: asked.changed(**{field: number}))


def _largest(problem: Problem, split: Split, low: int, high: int, changed: Callable[[Problem, int], Problem]) -> int:
    """The largest number with which the split takes the workload; ``low`` is taken to do.

    Between what the formulas promise and what even a perfect allocator could not do, the allocator is asked.
    """
    priced = msgspec.structs.replace(problem, is_replayed=False)
    safe = largest(low, high, lambda number: _holds(changed(priced, number), split))
    if problem.replay is None:
        return safe
    ideal = largest(safe, high, lambda number: _holds(changed(problem.bare, number), split))
    least = max(1, (ideal - safe) // ASKED)
    while ideal - safe >= least:
        middle = (safe + ideal + 1) // 2
        if _holds(changed(problem, middle), split):
            safe = middle
        else:
            ideal = middle - 1
    return safe


def _holds(problem: Problem, split: Split) -> bool:
    """Whether the split takes the workload, and the model has positions for it."""
    return problem.most_text_tokens >= problem.workload.text_tokens and problem.split_fits(split)


def _most_new_tokens(problem: Problem) -> int:
    positions = problem.profile.text.max_positions
    if positions is None:
        return MAX_TOKENS
    return positions - problem.workload.text_tokens - problem.footprint.images.tokens


def _largest_edge(problem: Problem, split: Split) -> int | None:
    """Edge of the largest square image; ``None`` where the model makes one size, or tiles, of every image.

    Prices grow with the number of tokens along the edge, so those are what is searched.
    """
    rule = image_rule(problem.profile)
    if rule is None or rule.kind != "merge":
        return None
    cell = rule.patch * rule.merge
    most = MAX_EDGE if rule.max_pixels is None else min(MAX_EDGE, math.isqrt(rule.max_pixels))

    def with_cells(asked: Problem, count: int) -> Problem:
        return asked.changed(image_height=count * cell, image_width=count * cell)

    if not _holds(with_cells(problem, 1), split):
        return None
    return _largest(problem, split, 1, max(1, most // cell), with_cells) * cell
