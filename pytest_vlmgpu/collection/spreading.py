"""A test that names several models becomes one for each, with the last part of the model's name in its id.

pytest's own way, ``pytest_generate_tests``, would cost every test of every project a call.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..state import ALIASES
from .reading import scope_of_vlm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pytest

    from ..requirements import VlmSpec

_NO_PARAMETERS = SimpleNamespace(params={}, indices={}, _arg2scope={}, _idlist=(), marks=())


class Spreading:
    """The tests of one collector that are to run with each of several models."""

    def __init__(self) -> None:
        self._tests: dict[int, list[tuple[Any, tuple[VlmSpec, ...]]]] = {}
        """Identity of what pytest knows of a function to its tests, and the models of each."""
        self._function_of: dict[int, int] = {}
        """Identity of a test to that of its function."""

    def takes(self, item: Any, named: tuple[VlmSpec, ...]) -> bool:
        """Note a test that names several models; False where pytest or the project has chosen one, or it can run once."""
        callspec = getattr(item, "callspec", _NO_PARAMETERS)
        is_chosen = "vlm" in callspec.params or any(_names_a_model(item, mark) for mark in callspec.marks)
        if len(named) < 2 or is_chosen or getattr(item, "nofuncargs", False):
            return False
        function = self._function_of[id(item)] = id(item._fixtureinfo)
        self._tests.setdefault(function, []).append((item, named))
        return True

    def spread(self) -> dict[int, list[pytest.Function]]:
        """Function to its tests with the first model, then those with the next."""
        return {function: list(_with_each_model(tests)) for function, tests in self._tests.items()}

    def in_their_place(self, found: Iterable[Any], spread: dict[int, list[pytest.Function]]) -> Iterator[Any]:
        """What was collected, with the tests of each function at the place of its first."""
        waiting = dict(spread)
        for node in found:
            function = self._function_of.get(id(node))
            if function is None:
                yield node
            else:
                yield from waiting.pop(function, ())


def _names_a_model(item: Any, mark: pytest.Mark) -> bool:
    alias = item.config.stash.get(ALIASES, {}).get(mark.name)
    return (mark.name if alias is None else alias.target) == "vlm"


def _with_each_model(tests: Sequence[tuple[Any, tuple[VlmSpec, ...]]]) -> Iterator[pytest.Function]:
    names = [spec.name for spec in tests[0][1]]
    short = [name.rstrip("/").split("/")[-1] for name in names]
    for number, label in enumerate(short if len(set(short)) == len(short) else names):
        for item, named in tests:
            # As pytest writes what is not ASCII.
            yield _with_model(item, named[number], number, label.encode("unicode_escape").decode())


def _with_model(item: Any, spec: VlmSpec, number: int, label: str) -> pytest.Function:
    """The same test with one of its models as a parameter."""
    known = getattr(item, "callspec", _NO_PARAMETERS)
    labels = [label, *known._idlist]
    callspec = SimpleNamespace(
        params={"vlm": spec, **known.params},
        indices={"vlm": number, **known.indices},
        _arg2scope={"vlm": scope_of_vlm(item), **known._arg2scope},
        _idlist=labels,
        marks=known.marks,
        id="-".join(labels),
    )
    test: pytest.Function = type(item).from_parent(
        item.parent,
        name=f"{item.originalname}[{callspec.id}]",
        callspec=callspec,
        fixtureinfo=item._fixtureinfo,
        keywords={callspec.id: True},
        originalname=item.originalname,
    )
    test.own_markers[:] = item.own_markers
    return test
