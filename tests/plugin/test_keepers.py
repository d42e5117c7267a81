"""Whoever still refers to a tensor has a name that a person can look for."""

from __future__ import annotations

import gc
import weakref
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vlmgpu.models.keepers import holder_of


class Tensor:
    """Anything that can be referred to weakly."""


KEPT: dict[str, Any] = {}
HERE = __name__


class Owner:
    cached: Any = None


@lru_cache
def cached() -> Tensor:
    return Tensor()


@pytest.fixture(autouse=True)
def _tidy() -> Any:
    yield
    KEPT.clear()
    Owner.cached = None
    cached.cache_clear()


def ask(reference: weakref.ref[Any]) -> str:
    thing = reference()
    assert thing is not None
    return holder_of(thing)


def test_a_module_variable_however_deep() -> None:
    KEPT["models"] = [SimpleNamespace(model=SimpleNamespace(layers=[{"weight": Tensor()}]))]

    assert ask(weakref.ref(KEPT["models"][0].model.layers[0]["weight"])) == f"variable KEPT of module {HERE}"


def test_a_class_attribute() -> None:
    Owner.cached = Tensor()

    assert ask(weakref.ref(Owner.cached)) == f"attribute cached of class {HERE}.Owner"


def test_a_cache_of_functools() -> None:
    assert ask(weakref.ref(cached())) == f"variable cached of module {HERE}"


def test_a_closure() -> None:
    def make() -> Any:
        weight = Tensor()
        return lambda: weight

    function = make()

    assert ask(weakref.ref(function())).startswith(f"closure variable weight of function {HERE}.test_a_closure")


def test_a_traceback() -> None:
    reference: list[weakref.ref[Any]] = []

    def fails() -> None:
        image = Tensor()
        reference.append(weakref.ref(image))
        raise ValueError("x")

    with pytest.raises(ValueError, match="x") as caught:
        fails()

    assert ask(reference[0]).startswith("variable image of fails (plugin/test_keepers.py:")
    assert ask(reference[0]).endswith(", kept by a traceback")
    del caught


def test_the_value_of_a_fixture(suite: Any) -> None:
    suite.configure(
        """
import weakref
from pytest_vlmgpu.models.keepers import holder_of
class Tensor: pass
@pytest.fixture(scope="session")
def weights(): return Tensor()
"""
    )

    result = suite.run(
        test_x="""
        import gc, weakref
        KEPT = []
        def test_first(weights): KEPT.append(weakref.ref(weights))
        def test_second():
            from pytest_vlmgpu.models.keepers import holder_of
            assert holder_of(KEPT[0]()) == "the value of fixture weights"
        """
    )

    result.assert_outcomes(passed=2)


def test_nobody_has_no_name() -> None:
    loop = [Tensor()]
    loop.append(loop)  # type: ignore[arg-type]
    reference = weakref.ref(loop[0])
    del loop

    assert ask(reference) == ""
    gc.collect()
    assert reference() is None
