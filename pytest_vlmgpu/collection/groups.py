"""Which tests share a load, and what each group needs: equal in every worker, and sent to the controller as JSON."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from ..leasing.sets import Need
from ..overridden import estimate_of
from ..requirements import Requirements, VlmSpec
from ..state import GATED_TEST
from ..verdicts import WRONG

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..requirements import GatedTest


class Groups(NamedTuple):
    """What all tests of a run need; equal in all workers."""

    needs: list[Need]
    group_of: dict[int, int]
    """Position of a gated test in the collection to its need."""
    bound: dict[int, str]
    """Position of another test to its ``xdist_group``, whose tests stay together."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        # Thousands of tests may need the same, and share one object then.
        distinct = {id(need): need for need in self.needs}
        number = {key: position for position, key in enumerate(distinct)}
        return {
            "distinct": [asdict(need) for need in distinct.values()],
            "needs": [number[id(need)] for need in self.needs],
            "group_of": self.group_of,
            "bound": self.bound,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Groups:
        """What :meth:`to_json` gave, after a way through a file."""
        distinct = [_need_from(need) for need in fields["distinct"]]
        return cls(
            [distinct[number] for number in fields["needs"]],
            {int(position): number for position, number in fields["group_of"].items()},
            {int(position): name for position, name in fields["bound"].items()},
        )


def group_tests(items: Sequence[pytest.Item]) -> Groups:
    """Group gated tests by the model that they share; each that loads nothing is a group of its own."""
    groups = _Grouping()
    group_of: dict[int, int] = {}
    bound: dict[int, str] = {}
    for position, item in enumerate(items):
        test = item.stash.get(GATED_TEST, None)
        if test is not None:
            group_of[position] = groups.number_of(item.config, test)
            continue
        mark = item.get_closest_marker("xdist_group")
        if mark is not None:
            bound[position] = str(mark.args[0] if mark.args else mark.kwargs.get("name", "default"))
    counted = zip(groups.needs, groups.tests, strict=True)
    needs = [need if tests == 1 else replace(need, tests=tests) for need, tests in counted]
    return Groups(needs, group_of, bound)


def needs_of(config: pytest.Config, tests: Iterable[GatedTest]) -> list[Need]:
    """What different tests need, one need a model."""
    groups = _Grouping()
    for test in tests:
        groups.number_of(config, test)
    return groups.needs


class _Grouping:
    """Gives out numbers of groups."""

    def __init__(self) -> None:
        self.needs: list[Need] = []
        self.tests: list[int] = []
        """In each group."""
        self._shared: dict[VlmSpec, int] = {}
        # Tests that ask for the same share one object.
        self._number_of: dict[int, int] = {}
        self._need_of: dict[int, Need] = {}

    def number_of(self, config: pytest.Config, test: GatedTest) -> int:
        """The group of one more test."""
        number = self._number_of.get(id(test))
        if number is None:
            number = self._place(config, test)
        else:
            self.tests[number] += 1
        return number

    def _place(self, config: pytest.Config, test: GatedTest) -> int:
        need = self._need_of.get(id(test))
        if need is None:
            need = self._need_of[id(test)] = Need(test.specs, (_with_estimates(config, test),), test.takes_all)
        if not test.loads or not test.specs:
            return self._add(need)
        number = self._shared.get(test.specs[0])
        if number is None:
            number = self._shared[test.specs[0]] = self._add(need)
        else:
            known = self.needs[number]
            new = [asked for asked in need.requirements if asked not in known.requirements]
            self.needs[number] = Need(known.specs, (*known.requirements, *new), takes_all=known.takes_all or need.takes_all)
            self.tests[number] += 1
        self._number_of[id(test)] = number
        return number

    def _add(self, need: Need) -> int:
        self.needs.append(need)
        self.tests.append(1)
        return len(self.needs) - 1


def _with_estimates(config: pytest.Config, test: GatedTest) -> Requirements:
    """What a test asks for, and what an engine that places its model itself needs (``pytest_vlmgpu_estimate``)."""
    from vlm_doctor.errors import UsageError

    try:
        asked = [estimate_of(config, spec) for spec in test.specs]
    except UsageError as error:
        raise pytest.UsageError(f"{WRONG}: {error}") from error
    needs = [Requirements(gpus=one.gpus, vram_bytes=one.vram_bytes) for one in asked if one is not None]
    return Requirements.strictest([test.requirements, *needs]) if needs else test.requirements


def _need_from(fields: dict[str, Any]) -> Need:
    specs = tuple(VlmSpec(**spec) for spec in fields["specs"])
    requirements = []
    for required in fields["requirements"]:
        capability = required["capability"]
        requirements.append(Requirements(**{**required, "capability": tuple(capability) if capability else None}))
    return Need(specs, tuple(requirements), fields["takes_all"], fields["tests"])
