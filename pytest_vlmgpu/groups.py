"""Which tests share a load, and what each group needs: equal in every worker, and sent to the controller as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from .requirements import Requirements, VlmSpec
from .sets import Need
from .state import GATED_TEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest


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
    for position, item in enumerate(items):
        test = item.stash.get(GATED_TEST, None)
        if test is None:
            mark = item.get_closest_marker("xdist_group")
            if mark is not None:
                bound[position] = str(mark.args[0] if mark.args else mark.kwargs.get("name", "default"))
            continue
        takes_all = "vlm_gpus" in getattr(item, "fixturenames", ())
        number = shared.get(test.specs[0]) if test.loads and test.specs else None
        if number is None:
            number = len(needs)
            needs.append(Need(test.specs, (test.requirements,), takes_all))
            if test.loads and test.specs:
                shared[test.specs[0]] = number
        else:
            known = needs[number]
            joined = tuple(dict.fromkeys([*known.requirements, test.requirements]))
            needs[number] = Need(known.specs, joined, known.takes_all or takes_all, known.tests + 1)
        group_of[position] = number
    return Groups(needs, group_of, bound)


def _need_from(fields: dict[str, Any]) -> Need:
    specs = tuple(VlmSpec(**spec) for spec in fields["specs"])
    requirements = []
    for required in fields["requirements"]:
        capability = required["capability"]
        requirements.append(Requirements(**{**required, "capability": tuple(capability) if capability else None}))
    return Need(specs, tuple(requirements), fields["takes_all"], fields["tests"])
