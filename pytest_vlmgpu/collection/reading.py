"""What the markers and fixtures of a collected test ask for. Equal tests of a module or class are read once.

Suites of thousands of tests carry the same few markers, and collection is what everybody waits for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .. import markers
from ..declare import GATED_FIXTURES, MARKER_PREFIXES
from ..requirements import GatedTest, Requirements, WatchedTest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from ..requirements import VlmSpec
    from .aliases import Alias

FIXTURES_MODULE = "pytest_vlmgpu.fixtures"
_RUN_TIME = frozenset({"vlm_factory", "vlm_device"})
"""Fixtures that ask for GPUs when they are used."""


class Reading:
    """What a test asks for, as far as markers and fixtures say; shared by all tests that say the same."""

    def __init__(self, item: pytest.Function, used: frozenset[str]) -> None:
        limit_bytes, mutates = markers.read_limit(item, item.nodeid), markers.may_mutate(item, item.nodeid)
        requirements = markers.read_requirements(item, item.nodeid)
        self.loads = "vlm" in used
        uses_factory = not _RUN_TIME.isdisjoint(used)
        is_metered = limit_bytes is not None or "vlm_vram" in used
        is_ours = bool(used or requirements or is_metered or mutates)
        markers.refuse_unknown(item, is_surely_meant=is_ours)
        # A project may have had a marker or a fixture vlm before this plugin was installed: its tests run as they did.
        is_theirs = not is_ours and ("vlm" in item.fixturenames or "vlm" in markers.registered(item.config))
        self.named: tuple[VlmSpec, ...] = () if is_theirs else markers.read_models(item, item.nodeid)
        self.requirements = Requirements.strictest(requirements)
        self.wants_gpus = bool(requirements) or "vlm_gpus" in used
        self.is_gated = bool(self.wants_gpus or self.named or self.loads or uses_factory)
        self.watched: WatchedTest | None = None
        if self.loads or uses_factory or is_metered:
            self.watched = WatchedTest(self.loads, mutates, limit_bytes, self.requirements.vram_bytes)
        self.callspecs: dict[VlmSpec, Any] = {}
        """Model to what pytest reads of a parameter; nobody writes into it."""
        self._tests: dict[tuple[VlmSpec, ...], GatedTest] = {}

    def test(self, specs: tuple[VlmSpec, ...]) -> GatedTest:
        """The gated test with these models; the same object each time, which makes grouping quick."""
        test = self._tests.get(specs)
        if test is None:
            test = self._tests[specs] = GatedTest(specs, self.requirements, self.wants_gpus, self.loads)
        return test


class _Key(NamedTuple):
    parent: int
    """Identity of the module or class, which lives as long as the readings."""
    marks: tuple[tuple[str, str, str], ...]
    used: frozenset[str]
    has_fixture_vlm: bool


class Readings:
    """The readings of the tests of one collector.

    Args:
        aliases: Markers that stand for ours.
    """

    def __init__(self, aliases: dict[str, Alias]) -> None:
        self._aliases = aliases
        self._known: dict[_Key, Reading] = {}

    def of(self, item: pytest.Function) -> Reading:
        """Read what a test asks for, or remember.

        Raises:
            pytest.Collector.CollectError: A marker is wrong.
        """
        names = item.fixturenames
        near = GATED_FIXTURES.intersection(names)
        used = frozenset(name for name in near if uses(item, names, name)) if near else near
        marks = tuple(
            [
                (mark.name, repr(mark.args), repr(mark.kwargs))
                for mark in item.own_markers
                if mark.name.startswith(MARKER_PREFIXES) or mark.name in self._aliases
            ]
        )
        key = _Key(id(item.parent), marks, used, "vlm" in near)
        reading = self._known.get(key)
        if reading is None:
            reading = self._known[key] = Reading(item, used)
        return reading


def uses(definition: Any, fixturenames: Sequence[str], name: str) -> bool:
    """True when a test reaches our fixture of that name, and not only one of the project's own with the same name."""
    if name not in fixturenames:
        return False
    for fixture in reversed(definition._fixtureinfo.name2fixturedefs.get(name, ())):
        if fixture.func.__module__ == FIXTURES_MODULE:
            return True
        if name not in fixture.argnames:
            return False
    return False
