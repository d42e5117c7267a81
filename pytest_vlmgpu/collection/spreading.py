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

    Function = tuple[int | str, ...]
    """Identity of what pytest knows of a function, and the names of its models."""

_NO_PARAMETERS = SimpleNamespace(params={}, indices={}, _arg2scope={}, _idlist=(), marks=())


class Spreading:
    """The tests of one collector that are to run with each of several models."""

    def __init__(self) -> None:
        self._tests: dict[Function, list[tuple[Any, tuple[VlmSpec, ...]]]] = {}
        """The tests of each function, with the models of each test."""
        self._function_of: dict[int, Function] = {}
        """Of each test, by its identity."""

    def takes(self, item: Any, named: tuple[VlmSpec, ...]) -> bool:
        """Note a test that names several models; False where pytest or the project has chosen one, or it can run once."""
        callspec = getattr(item, "callspec", _NO_PARAMETERS)
        is_chosen = "vlm" in callspec.params or any(_names_a_model(item, mark) for mark in callspec.marks)
        if len(named) < 2 or is_chosen or getattr(item, "nofuncargs", False):
            return False
        # A hook may have added other models to one of its parameters.
        function = self._function_of[id(item)] = (id(item._fixtureinfo), *(spec.name for spec in named))
        self._tests.setdefault(function, []).append((item, named))
        return True

    def spread(self) -> dict[Function, list[pytest.Function]]:
        """Function to its tests with the first model, then those with the next."""
        return {function: list(_with_each_model(tests)) for function, tests in self._tests.items()}

    def in_their_place(self, found: Iterable[Any], spread: dict[Function, list[pytest.Function]]) -> Iterator[Any]:
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
    for number, label in enumerate(_labels(tests[0][1])):
        for item, named in tests:
            # As pytest writes what is not ASCII.
            yield _with_model(item, named, number, label.encode("unicode_escape").decode())


def _labels(specs: Sequence[VlmSpec]) -> Sequence[str]:
    """What tells models apart: the last part of the name; with how it is loaded; with the whole name; or a number."""
    short = [spec.name.rstrip("/").split("/")[-1] for spec in specs]
    details = ["".join(f"-{word}" for word in (spec.dtype, spec.device_map) if word) for spec in specs]
    for names, more in ((short, [""] * len(specs)), (short, details), ([spec.name for spec in specs], details)):
        labels = [name + detail for name, detail in zip(names, more, strict=True)]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{name}-{number}" for number, name in enumerate(short)]


def _with_model(item: Any, named: Sequence[VlmSpec], number: int, label: str) -> pytest.Function:
    """The same test with one of its models as a parameter."""
    known = getattr(item, "callspec", _NO_PARAMETERS)
    labels = [label, *known._idlist]
    callspec = SimpleNamespace(
        params={"vlm": named[number], **known.params},
        indices={"vlm": number, **known.indices},
        _arg2scope={"vlm": scope_of_vlm(item), **known._arg2scope},
        _idlist=labels,
        marks=known.marks,
        id="-".join(labels),
        # No word of pytest's: a hook that names more of them later is too late.
        models=len(named),
    )
    test: pytest.Function = type(item).from_parent(
        item.parent,
        name=f"{item.originalname}[{callspec.id}]",
        callspec=callspec,
        fixtureinfo=item._fixtureinfo,
        keywords={callspec.id: True},
        originalname=item.originalname,
        **_replaced(item),
    )
    # What hooks have added, which saw one test where there will be several.
    test.own_markers[:] = item.own_markers
    test.keywords.update((mark.name, mark) for mark in item.own_markers)
    test.extra_keyword_matches |= item.extra_keyword_matches
    test.user_properties += item.user_properties
    return test


def _replaced(item: Any) -> dict[str, Any]:
    """What a hook runs in the place of a function; pytest finds all others itself, methods on an object for each test."""
    try:
        is_found = item._getobj() == item.obj
    except AttributeError:
        is_found = False
    return {} if is_found else {"callobj": item.obj}
