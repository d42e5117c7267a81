"""The order of tests: each model once, whatever else orders tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vlmgpu.collection import ordering
from pytest_vlmgpu.collection.reading import Examined
from pytest_vlmgpu.requirements import GatedTest, Requirements, VlmSpec, WatchedTest
from pytest_vlmgpu.state import ASKED

INTERLEAVED = """
    import pytest
    @pytest.mark.vlm("org/a")
    def test_a1(vlm): pass
    @pytest.mark.vlm("org/b")
    def test_b1(vlm): pass
    @pytest.mark.vlm("org/a")
    def test_a2(vlm): assert not {broken}
    @pytest.mark.vlm("org/b")
    def test_b2(vlm): assert not {broken}
"""


def loading(model: str, *, mutates: bool) -> Examined:
    spec = VlmSpec(model)
    test = GatedTest((spec,), Requirements(), wants_gpus=False, loads=True)
    return Examined(1, test, WatchedTest(loads=True, mutates=mutates), spec)


KINDS: list[Examined | None] = [
    None,
    Examined(1, GatedTest((), Requirements(), wants_gpus=True, loads=False)),
    Examined(1, GatedTest((), Requirements(vram_bytes=1), wants_gpus=True, loads=False)),
    Examined(1, GatedTest((VlmSpec("org/a"),), Requirements(), wants_gpus=False, loads=False)),
    *(loading(model, mutates=mutates) for model in ("org/a", "org/b", "org/c") for mutates in (False, True)),
]


def arranged(kinds: list[Examined | None]) -> list[tuple[int, Examined | None]]:
    items: Any = list(range(len(kinds)))
    requests = list(kinds)
    config: Any = SimpleNamespace(stash={ASKED: [kind for kind in kinds if kind is not None]})
    ordering.arrange(config, items, requests)
    return list(zip(items, requests, strict=True))


@given(st.lists(st.sampled_from(KINDS), max_size=12))
def test_every_order_becomes_one_that_loads_each_model_once(kinds: list[Examined | None]) -> None:
    tests = arranged(kinds)

    assert sorted(position for position, _ in tests) == list(range(len(kinds)))
    assert all(request is kinds[position] for position, request in tests)
    models = [(request.model, request.mutates) for _, request in tests if request is not None and request.model is not None]
    runs = [model for place, (model, _) in enumerate(models) if place == 0 or models[place - 1][0] != model]
    assert len(set(runs)) == len(runs), "a model is loaded twice"
    for model in runs:
        flags = [mutates for other, mutates in models if other == model]
        assert flags == sorted(flags), "a test gets a changed model"
    loads = [place for place, (_, request) in enumerate(tests) if request is not None and request.model is not None]
    late = [place for place, (_, request) in enumerate(tests) if request is not None and request.runs_before_loads]
    assert not loads or all(place < loads[0] for place in late), "a test that needs memory comes after a load"
    assert arranged([request for _, request in tests]) == list(enumerate(request for _, request in tests)), "not settled"


@given(st.lists(st.sampled_from(KINDS), max_size=12))
def test_tests_that_are_no_concern_keep_their_order(kinds: list[Examined | None]) -> None:
    others = [position for position, request in arranged(kinds) if request is None or not request.gated]

    assert others == sorted(others)


def test_an_order_that_loads_each_model_once_stays(suite: Any) -> None:
    result = suite.run(
        "--co",
        "-q",
        test_x="""
        import pytest
        @pytest.mark.vlm("org/a")
        def test_a1(vlm): pass
        def test_between(): pass
        @pytest.mark.vlm("org/a")
        def test_a2(vlm): pass
        @pytest.mark.vlm("org/b")
        def test_b(vlm): pass
        """,
    )

    result.stdout.fnmatch_lines([f"test_x.py::test_{name}" for name in ("a1", "between", "a2", "b")], consecutive=True)


@pytest.mark.parametrize("option", ["--ff", "--lf", "--nf"])
def test_failed_first_loads_each_model_once(suite: Any, option: str) -> None:
    def run(*arguments: str) -> Any:
        return suite.pytester.runpytest_inprocess("-p", "no:hypothesispytest", *arguments)

    suite.pytester.makepyfile(test_x=INTERLEAVED.format(broken=True))
    run().assert_outcomes(passed=2, failed=2)
    (suite.folder / "log.txt").unlink()

    run(option).assert_outcomes(passed=0 if option == "--lf" else 2, failed=2)

    assert sorted(suite.loads()) == ["LOAD org/a", "LOAD org/b", "UNLOAD org/a", "UNLOAD org/b"]


def test_stepwise_forgets_no_test(suite: Any) -> None:
    def run(*arguments: str) -> list[str]:
        result = suite.pytester.runpytest_inprocess("-p", "no:hypothesispytest", "-v", *arguments)
        return [line.split()[0].split("::")[1] for line in result.outlines if " PASSED" in line or " FAILED" in line]

    suite.pytester.makepyfile(test_x=INTERLEAVED.format(broken=True))
    first = run("--sw")
    suite.pytester.makepyfile(test_x=INTERLEAVED.format(broken=False))
    second = run("--sw")

    assert first == ["test_a1", "test_a2"]
    assert second == ["test_a2", "test_b1", "test_b2"]
