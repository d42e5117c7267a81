"""Is a test any concern of ours? Small and quick: it is asked of each test of each project."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


def may_be_gated(collector: pytest.Collector, items: Sequence[pytest.Function], ours: Ours) -> list[pytest.Function]:
    """Those of a collector's tests that use a fixture of ours, or a marker that looks like one of ours or stands for one.

    Markers of the collector and of what it is in are looked at once for all its tests: most projects have none.
    """
    if any(ours[mark.name] for mark in collector.iter_markers()):
        return list(items)
    found = []
    for item in items:
        for mark in item.own_markers if item.parent is collector else item.iter_markers():
            if ours[mark.name]:
                found.append(item)
                break
        else:
            if not GATED_FIXTURES.isdisjoint(item.fixturenames):
                found.append(item)
    return found


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


class Parametrizing:
    """Makes the models that a test names a session-wide parameter, where it may name several.

    Args:
        aliases: Markers of the project that stand for ours.
    """

    def __init__(self, aliases: Iterable[str]) -> None:
        self._aliases = frozenset(aliases)
        self._parent: object = None
        self._is_several = False
        """Markers of that parent, and of what it is in, may name more than one model."""

    def __dir__(self) -> list[str]:
        """The hook alone: pytest looks at everything that a plugin lists."""
        return ["pytest_generate_tests"]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Name the models; pytest keeps one value of such a parameter at a time."""
        if "vlm" in metafunc.fixturenames and self._may_name_several(metafunc.definition):
            from .collection import collecting

            collecting.parametrize(metafunc)

    def _may_name_several(self, definition: pytest.Function) -> bool:
        """False where no marker can name more than one model; cheap, as it is asked of every test with the fixture."""
        names = 0
        for mark in definition.own_markers:
            if mark.name == "vlm":
                names += len(mark.args)
            elif mark.name in self._aliases:
                return True
        if names:
            return names > 1
        parent = definition.parent
        if parent is not self._parent and parent is not None:
            marks = list(parent.iter_markers())
            above = sum(len(mark.args) for mark in marks if mark.name == "vlm")
            self._parent = parent
            self._is_several = above > 1 or any(mark.name in self._aliases for mark in marks)
        return self._is_several
