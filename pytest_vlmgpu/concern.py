"""Is a test any concern of ours? Small and quick: it is asked of each test of each project."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

MARKER_PREFIXES = ("vlm", "vml")
"""What a marker of ours begins with, typed right or wrong."""
GATED_FIXTURES = frozenset({"vlm", "vlm_gpus", "vlm_factory", "vlm_vram", "vlm_device"})
"""Fixtures that make a test a gated one, or one whose memory is measured."""


class Ours(dict[str, bool]):
    """Name of a marker to whether it looks like one of ours, typed right or wrong, or stands for one.

    Args:
        aliases: Markers of the project that stand for ours.
    """

    def __init__(self, aliases: Iterable[str] = ()) -> None:
        super().__init__(dict.fromkeys(aliases, True))

    def __missing__(self, name: str) -> bool:
        is_ours = self[name] = name.startswith(MARKER_PREFIXES)
        return is_ours


def may_be_gated(item: pytest.Function, ours: Ours) -> bool:
    """True for a test that uses a fixture of ours, or a marker that looks like one of ours or stands for one."""
    return not GATED_FIXTURES.isdisjoint(item.fixturenames) or any(ours[mark.name] for mark in item.iter_markers())


def any_may_be_gated(collector: pytest.Collector, tests: Iterable[pytest.Function], ours: Ours) -> bool:
    """True when :func:`may_be_gated` is for any of a collector's tests.

    Markers of the collector and of what it is in are looked at once for all its tests: most projects have none.
    """
    if any(ours[mark.name] for mark in collector.iter_markers()):
        return True
    for test in tests:
        if not GATED_FIXTURES.isdisjoint(test.fixturenames):
            return True
        for mark in test.own_markers if test.parent is collector else test.iter_markers():
            if ours[mark.name]:
                return True
    return False


def are_marked(items: Iterable[pytest.Item], ours: Ours) -> bool:
    """True when any of these tests, or what it is in, has a marker that is one of ours."""
    parent = None
    for item in items:
        for mark in item.own_markers:
            if ours[mark.name]:
                return True
        if item.parent is not parent:
            parent = item.parent
            if parent is not None and any(ours[mark.name] for mark in parent.iter_markers()):
                return True
    return False
