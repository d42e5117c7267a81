"""Which tests share a load, and what each group needs: equal in every worker, and sent to the controller as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from ..leasing.sets import Need
from ..requirements import Requirements, VlmSpec
from ..state import GATED_TEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from ..requirements import GatedTest

_TAKES_ALL = frozenset({"vlm_gpus", "vlm_factory"})
"""Fixtures whose tests may use every GPU of the run."""


class Groups(NamedTuple):
    """What all tests of a run need; equal in all workers."""

    needs: list[Need]
    group_of: dict[int, int]
    """Position of a gated test in the collection to its need."""
    bound: dict[int, str]
    """Position of another test to its ``xdist_group``, whose tests stay together."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"needs": [asdict(need) for need in self.needs], "group_of": self.group_of, "bound": self.bound}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Groups:
        """What :meth:`to_json` gave, after a way through a file."""
        return cls(
            [_need_from(need) for need in fields["needs"]],
            {int(position): number for position, number in fields["group_of"].items()},
            {int(position): name for position, name in fields["bound"].items()},
        )


def group_tests(items: Sequence[pytest.Item]) -> Groups:
    """Group gated tests by the model that they share; each that loads nothing is a group of its own."""
    needs: list[Need] = []
    group_of: dict[int, int] = {}
    bound: dict[int, str] = {}
    shared: dict[VlmSpec, int] = {}
    asked_by: dict[int, Requirements] = {}
    for position, item in enumerate(items):
        test = item.stash.get(GATED_TEST, None)
        if test is None:
            mark = item.get_closest_marker("xdist_group")
            if mark is not None:
                bound[position] = str(mark.args[0] if mark.args else mark.kwargs.get("name", "default"))
            continue
        # Which models a test with vlm_factory loads is not known before it runs.
        takes_all = not _TAKES_ALL.isdisjoint(getattr(item, "fixturenames", ()))
        # Tests that ask for the same share one object.
        asked = asked_by.get(id(test))
        if asked is None:
            asked = asked_by[id(test)] = _with_estimates(item, test)
        number = shared.get(test.specs[0]) if test.loads and test.specs else None
        if number is None:
            number = len(needs)
            needs.append(Need(test.specs, (asked,), takes_all))
            if test.loads and test.specs:
                shared[test.specs[0]] = number
        else:
            known = needs[number]
            joined = known.requirements if asked in known.requirements else (*known.requirements, asked)
            needs[number] = Need(known.specs, joined, known.takes_all or takes_all, known.tests + 1)
        group_of[position] = number
    return Groups(needs, group_of, bound)


def _with_estimates(item: pytest.Item, test: GatedTest) -> Requirements:
    """What a test asks for, and what an engine that places its model itself needs (``pytest_vlmgpu_estimate``)."""
    asked = [item.config.hook.pytest_vlmgpu_estimate(config=item.config, spec=spec) for spec in test.specs]
    needs = [Requirements(gpus=one.gpus, vram_bytes=one.vram_bytes) for one in asked if one is not None]
    return Requirements.strictest([test.requirements, *needs]) if needs else test.requirements


def _need_from(fields: dict[str, Any]) -> Need:
    specs = tuple(VlmSpec(**spec) for spec in fields["specs"])
    requirements = []
    for required in fields["requirements"]:
        capability = required["capability"]
        requirements.append(Requirements(**{**required, "capability": tuple(capability) if capability else None}))
    return Need(specs, tuple(requirements), fields["takes_all"], fields["tests"])
