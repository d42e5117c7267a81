"""The inverse questions: the largest workload that one placement can take, one quantity at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..placement import Limits
from .image_tokens import image_rule
from .order import Split
from .place import largest
from .problem import Problem
from .validate import MAX_BATCH, MAX_EDGE, MAX_IMAGES, MAX_TOKENS


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
        new_tokens=_most(problem, split, "new_tokens", workload.new_tokens, _most_new_tokens(problem)),
        batch=_most(problem, split, "batch", workload.batch, MAX_BATCH),
        images=_most(problem, split, "images", workload.images, MAX_IMAGES) if takes_images else None,
        image_edge=_largest_edge(problem, split) if takes_images and workload.images else None,
    )


def _most(problem: Problem, split: Split, field: str, low: int, high: int) -> int:
    return largest(low, max(low, high), _that_fit(split, lambda number: problem.changed(**{field: number})))


def _that_fit(split: Split, changed: Callable[[int], Problem]) -> Callable[[int], bool]:
    """Whether the split takes the workload, and the model has positions for it."""

    def holds(number: int) -> bool:
        problem = changed(number)
        has_positions = problem.most_text_tokens >= problem.workload.text_tokens
        return has_positions and problem.split_fits(split)

    return holds


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

    def with_cells(count: int) -> Problem:
        edges: dict[str, Any] = {"image_height": count * cell, "image_width": count * cell}
        return problem.changed(**edges)

    holds = _that_fit(split, with_cells)
    if not holds(1):
        return None
    return largest(1, max(1, most // cell), holds) * cell
