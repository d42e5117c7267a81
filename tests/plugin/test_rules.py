"""Folders and files with fixtures of the ladder of their own: each test is placed and loaded by those that it sees."""

from __future__ import annotations

from typing import Any

LONG = """
import pytest
from vlm_doctor import Workload

@pytest.fixture(scope="session")
def vlm_workload(): return Workload(images=64, text_tokens=20000)
"""
LLAVA = """
import pytest

@pytest.mark.vlm("llava-hf/llava-1.5-7b-hf")
def test_llava(vlm): assert vlm.plan.fits
"""
GLM = LLAVA.replace("llava-hf/llava-1.5-7b-hf", "zai-org/GLM-4.1V-9B-Thinking").replace("test_llava", "test_glm")


def write(suite: Any, **files: str) -> None:
    """``long__conftest`` is long/conftest.py."""
    for name, text in files.items():
        path = suite.folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_the_workload_of_a_folder_counts_after_tests_of_another_one(suite: Any) -> None:
    suite.configure(without="vlm_planner")
    write(suite, a__test_short=LLAVA, b__conftest=LONG, b__test_long=GLM)

    for arguments in ((), ("--vlm-plan",), ("b",)):
        result = suite.run("-rs", *arguments)

        result.stdout.fnmatch_lines(["*b/test_long.py:*: VLM705: zai-org/GLM-4.1V-9B-Thinking does not fit: *"])
        assert "VLM705: llava-hf" not in result.stdout.str()
    assert suite.loads() == ["LOAD llava-hf/llava-1.5-7b-hf", "UNLOAD llava-hf/llava-1.5-7b-hf"]


def test_one_model_is_planned_by_the_workload_of_each_file(suite: Any) -> None:
    suite.configure(without="vlm_planner")
    write(suite, a__test_short=LLAVA, b__test_long=LONG + LLAVA, c__test_short_too=LLAVA)

    result = suite.run("-rs")

    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines(
        ["2 ran; 1 skipped *", "*b/test_long.py:*: VLM705: llava-hf/llava-1.5-7b-hf does not fit: *"]
    )
    assert suite.loads() == ["LOAD llava-hf/llava-1.5-7b-hf", "UNLOAD llava-hf/llava-1.5-7b-hf"]


def test_one_model_is_loaded_by_the_loader_of_each_folder(suite: Any) -> None:
    loader = """
    import pytest
    from contextlib import contextmanager

    @pytest.fixture(scope="session")
    def vlm_loader():
        @contextmanager
        def load(spec, plan): yield "engine of b"
        return load
    """.replace("\n    ", "\n")
    by_root = LLAVA.replace("llava-hf/llava-1.5-7b-hf", "org/a").replace("vlm.plan.fits", "vlm.name == 'org/a'")
    by_folder = by_root.replace("vlm.name == 'org/a'", "vlm == 'engine of b'")
    write(suite, a__test_a=by_root, b__conftest=loader, b__test_b=by_folder, c__test_c=by_root)

    for arguments in ((), ("--vlm-slots=fit",)):
        result = suite.run(*arguments)

        result.assert_outcomes(passed=3)
        result.stdout.fnmatch_lines(["org/a: loaded in *; 2 tests", "org/a (by the fixtures of b): loaded in *; 1 test"])
    assert suite.loads() == ["LOAD org/a", "UNLOAD org/a"] * 2


def test_the_factory_loads_by_the_fixtures_of_the_test_that_calls_it(suite: Any) -> None:
    suite.configure(without="vlm_planner")
    source = """
import pytest

def test_chosen(vlm_factory):
    with vlm_factory("llava-hf/llava-1.5-7b-hf") as vlm: assert vlm.plan.fits
"""
    write(suite, a__test_a=LLAVA + source, b__test_b=LONG + source, c__test_c=LLAVA + source)

    for arguments in ((), ("--vlm-slots=fit",)):
        result = suite.run(*arguments)

        result.assert_outcomes(passed=4, skipped=1)
        result.stdout.fnmatch_lines(["4 ran; 1 skipped*", "llava-hf/llava-1.5-7b-hf: loaded *; 2 tests"])


def test_a_policy_of_a_folder_is_its_own(suite: Any) -> None:
    suite.configure(without="vlm_planner")
    policy = """
import pytest
from vlm_doctor import Policy

@pytest.fixture(scope="session")
def vlm_policy(): return Policy(min_gpus=2)
"""
    write(suite, a__test_a=LLAVA.replace("plan.fits", "plan.stages[1:] == ()"), b__conftest=policy)
    write(suite, b__test_b=LLAVA.replace("vlm.plan.fits", "len(vlm.plan.stages) == 2"))

    suite.run("--vlm-gpus=0,1").assert_outcomes(passed=2)
