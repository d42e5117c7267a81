"""Other plugins beside ours, each where it is installed: one load a model, every test in the report, no verdict lost."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

SUITE = """
import pytest

count = {"flaky": 0}

@pytest.mark.vlm("org/a")
def test_a1(vlm): pass
@pytest.mark.vlm("org/b")
def test_b1(vlm): pass
@pytest.mark.vlm("org/a")
def test_a2(vlm): pass
@pytest.mark.vlm("org/b")
def test_b2(vlm): pass
@pytest.mark.vlm_requires(gpus=4)
def test_few(): pass
@pytest.mark.vlm("org/oom")
def test_oom(vlm): pass
def test_free(): pass
"""
FLAKY = """
@pytest.mark.vlm("org/a")
def test_flaky(vlm):
    count["flaky"] += 1
    assert count["flaky"] == 2
"""


@pytest.fixture(autouse=True)
def settled(suite: Any) -> None:
    """pytest-asyncio warns where this is not said, and warnings are errors here."""
    with contextlib.suppress(ImportError):
        import pytest_asyncio  # type: ignore[import-not-found]  # noqa: F401

        suite.pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")


def records(suite: Any) -> dict[str, dict[str, Any]]:
    report = json.loads((suite.folder / "out.json").read_text())
    assert report["state"] == "finished"
    return {test["nodeid"].partition("::")[2]: test for test in report["tests"]}


def assert_complete(suite: Any, result: Any) -> None:
    outcomes = {name: (test["outcome"], test["code"]) for name, test in records(suite).items() if name != "test_flaky"}
    assert outcomes == {
        **dict.fromkeys(("test_a1", "test_a2", "test_b1", "test_b2"), ("passed", None)),
        "test_few": ("skipped", "VLM702"),
        "test_oom": ("error", "VLM715"),
    }
    assert "INTERNALERROR" not in result.stdout.str()


def test_alone(suite: Any) -> None:
    result = suite.run("--vlm-report=out.json", "-p", "no:randomly", test_x=SUITE)

    assert_complete(suite, result)
    assert suite.loads() == ["LOAD org/a", "UNLOAD org/a", "LOAD org/b", "UNLOAD org/b"]


def test_reruns(suite: Any) -> None:
    pytest.importorskip("pytest_rerunfailures")

    result = suite.run("--vlm-report=out.json", "--reruns=2", "-p", "no:randomly", test_x=SUITE + FLAKY)

    assert_complete(suite, result)
    tests = records(suite)
    assert (tests["test_flaky"]["outcome"], tests["test_flaky"]["attempts"]) == ("passed", 2)
    assert tests["test_oom"]["attempts"] == 3
    assert suite.loads().count("LOAD org/b") == 1


def test_timeouts(suite: Any) -> None:
    pytest.importorskip("pytest_timeout")
    # Of the call alone: on a busy machine the setup may take longer than that.
    slow = """
@pytest.mark.vlm("org/a")
@pytest.mark.timeout(0.3, func_only=True)
def test_flaky(vlm):
    import time; time.sleep(60)
"""

    result = suite.run("--vlm-report=out.json", "--timeout=300", "-p", "no:randomly", test_x=SUITE + slow)

    assert_complete(suite, result)
    assert records(suite)["test_flaky"]["outcome"] == "failed"
    assert "Timeout" in records(suite)["test_flaky"]["reason"]


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_a_shuffled_order(suite: Any, seed: str) -> None:
    pytest.importorskip("pytest_randomly")

    result = suite.run("--vlm-report=out.json", f"--randomly-seed={seed}", test_x=SUITE)

    assert_complete(suite, result)
    assert sorted(suite.loads()) == ["LOAD org/a", "LOAD org/b", "UNLOAD org/a", "UNLOAD org/b"]


def test_coverage(suite: Any) -> None:
    pytest.importorskip("pytest_cov")

    suite.pytester.makepyfile(test_x=SUITE)
    result = suite.pytester.runpytest_subprocess(
        "--vlm-report=out.json", "--cov=.", "-p", "no:randomly", "-p", "no:hypothesispytest"
    )

    assert_complete(suite, result)
    result.stdout.fnmatch_lines(["TOTAL *"])


def test_coroutines(suite: Any) -> None:
    pytest.importorskip("pytest_asyncio")
    source = """
    import pytest
    pytestmark = pytest.mark.asyncio
    @pytest.mark.vlm("org/a")
    async def test_model(vlm): assert vlm.name == "org/a"
    @pytest.mark.vlm_requires(gpus=4)
    async def test_few(): pass
    """

    result = suite.run("--vlm-report=out.json", test_x=source)

    result.assert_outcomes(passed=1, skipped=1)
    assert {name: test["outcome"] for name, test in records(suite).items()} == {
        "test_model": "passed",
        "test_few": "skipped",
    }


def test_all_of_them_with_workers(suite: Any) -> None:
    for name in ("xdist", "pytest_rerunfailures", "pytest_timeout", "pytest_randomly", "pytest_cov", "pytest_asyncio"):
        pytest.importorskip(name)
    suite.pytester.makepyfile(test_x=SUITE)

    result = suite.pytester.runpytest_subprocess(
        *("-n2", "--reruns=1", "--timeout=300", "--randomly-seed=7", "--cov=.", "--vlm-report=out.json"),
        *("--junitxml=out.xml", "-p", "no:hypothesispytest"),
    )

    assert_complete(suite, result)
    assert (suite.folder / "out.xml").read_text().count('name="vlmgpu.verdict"') >= 6
