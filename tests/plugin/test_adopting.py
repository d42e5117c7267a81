"""Suites that were written for other gates: aliases of markers, decorators of other libraries, ``unittest``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pytest_vlmgpu import shim
from pytest_vlmgpu.collection.aliases import parse

ALIASES = """
[pytest]
vlm_marker_aliases =
    # what this suite always had
    gpu = vlm_requires
    multi_gpu = vlm_requires(gpus=2)
    distributed(num_gpus=4) = vlm_requires(gpus=num_gpus)
    large_gpu(min_gb) = vlm_requires(vram_gib=f"{min_gb}GB")
    checkpoint(name) = vlm(name, dtype="float16")
addopts = --strict-markers
"""


NO_VALUE = "a value is a number, a text or the name of an argument on the left"


def test_markers_of_the_project_gate_its_tests(suite: Any) -> None:
    suite.pytester.makeini(ALIASES)

    result = suite.run(
        "-rs",
        test_x="""
        import pytest
        pytestmark = pytest.mark.gpu
        @pytest.mark.multi_gpu
        def test_two(): pass
        @pytest.mark.distributed
        def test_four(): pass
        @pytest.mark.distributed(num_gpus=2)
        def test_two_again(): pass
        @pytest.mark.large_gpu(80)
        def test_large(): pass
        @pytest.mark.large_gpu(min_gb=20)
        class TestX:
            @pytest.mark.vlm_requires(gpus=3)
            def test_both(self): pass
        @pytest.mark.checkpoint("org/a")
        def test_model(vlm): assert vlm.name == "org/a"
        """,
    )

    result.assert_outcomes(passed=3, skipped=3)
    result.stdout.fnmatch_lines(["vlmgpu: 6 of 6 tests gated; org/a (float16) (1)"])
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED*VLM702: 4 GPUs are wanted, 2 can be used.",
            "SKIPPED*VLM703: 74.5 GiB is wanted on one GPU, 2 x NVIDIA L4 have 22.0 GiB.",
            "SKIPPED*VLM702: 3 GPUs are wanted, 2 can be used.",
        ]
    )


def test_an_alias_with_other_arguments_is_a_collection_error(suite: Any) -> None:
    suite.pytester.makeini(ALIASES)

    result = suite.run(test_x="import pytest\n@pytest.mark.large_gpu(gb=3)\ndef test_x(): pass")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["VLM720: test_x.py::test_x: @pytest.mark.large_gpu is an alias with other arguments: large_gpu(min_gb)."]
    )


def test_a_value_that_makes_no_sense_is_a_collection_error(suite: Any) -> None:
    suite.pytester.makeini(ALIASES)

    result = suite.run(test_x="import pytest\n@pytest.mark.distributed('two')\ndef test_x(): pass")

    result.stdout.fnmatch_lines(["VLM720: test_x.py::test_x: @pytest.mark.vlm_requires has gpus='two'; *"])


def test_aliases_are_listed_with_the_markers(suite: Any) -> None:
    suite.pytester.makeini(ALIASES)

    suite.run("--markers").stdout.fnmatch_lines(
        ["@pytest.mark.distributed(num_gpus=4): stands for vlm_requires of pytest-vlmgpu"]
    )


def test_folders_and_functions_of_an_aliass_name_are_not_gated(suite: Any) -> None:
    suite.pytester.makeini(ALIASES)
    suite.pytester.mkpydir("gpu").joinpath("test_gpu.py").write_text("def test_gpu(): pass")

    result = suite.run()

    result.assert_outcomes(passed=1)
    assert "vlmgpu:" not in result.stdout.str()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("gpu", "it has no =; "),
        ("gpu = ", ""),
        ("gpu = requires_gpu", "requires_gpu is no marker of the plugin, which has vlm and vlm_requires; "),
        ("vlm = vlm_requires", "vlm is a marker of the plugin's own; "),
        ("gpu(n) = vlm_requires(gpus=m)", "'m' is no argument of the marker on the left; "),
        ("gpu(2) = vlm_requires(gpus=2)", "the arguments of a marker are names, with or without a default; "),
        ("gpu.big = vlm_requires", "a marker is a name, with or without arguments; "),
        ("gpu(*n) = vlm_requires", "stars are not understood; "),
        ("gpu = vlm_requires(gpus=1+x)", "a value is a number, a text or the name of an argument on the left; "),
        (
            "gpu = vlm_requires(gpus=__import__('os'))",
            "a value is a number, a text or the name of an argument on the left; ",
        ),
        ("gpu(n, n) = vlm_requires", ""),
    ],
)
def test_a_line_that_is_no_alias(line: str, why: str) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        parse(line)

    advice = "write one such as multi_gpu = vlm_requires(gpus=2)."
    assert str(caught.value) == f"VLM720: vlm_marker_aliases: {line.strip()!r} is no alias: {why}{advice}"


def test_an_alias_given_twice_ends_pytest_with_status_4(suite: Any) -> None:
    suite.pytester.makeini("[pytest]\nvlm_marker_aliases =\n  gpu = vlm_requires\n  gpu = vlm_requires(gpus=2)\n")

    result = suite.run(test_x="")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: VLM720: vlm_marker_aliases: 'gpu' is defined twice."])


def test_comments_in_a_list_of_toml_are_passed_over(suite: Any) -> None:
    suite.pytester.makepyprojecttoml(
        '[tool.pytest.ini_options]\nvlm_marker_aliases = ["# ours", "", "gpu = vlm_requires"]\n'
    )

    suite.run(test_x="import pytest\n@pytest.mark.gpu\ndef test_x(): pass").stdout.fnmatch_lines(["1 ran"])


DECORATED = """
import unittest
from pytest_vlmgpu.shim import *

@require_torch_gpu
class TestModel(unittest.TestCase):
    def test_one(self): pass
    @require_torch_multi_gpu
    def test_two(self): pass
    @require_torch_n_accelerators(3)
    def test_three(self): pass
    @require_torch_large_gpu
    def test_large(self): pass
    @require_torch_large_accelerator(memory=40)
    def test_larger(self): pass
    @require_torch_accelerator_memory(memory=40)
    def test_sharded(self): pass

@require_multi_gpu
@require_fp8
def test_function(): pass
@require_accelerator_memory(30)
def test_memory(): pass
@large_gpu_test(min_gb=24)
def test_decimal(): pass
@multi_gpu_test(num_gpus=4)
def test_four(): pass
"""


def test_decorators_of_other_libraries(suite: Any) -> None:
    result = suite.run("-v", test_x=DECORATED)

    assert {
        line.split()[0].rpartition("::")[2]: line.split()[1] for line in result.outlines if line.startswith("test_x")
    } == {
        "test_one": "PASSED",
        "test_two": "PASSED",
        "test_three": "SKIPPED",
        "test_large": "PASSED",
        "test_larger": "SKIPPED",
        "test_sharded": "PASSED",
        "test_function": "PASSED",
        "test_memory": "SKIPPED",
        "test_decimal": "SKIPPED",
        "test_four": "SKIPPED",
    }


def test_decorators_are_harmless_without_pytest(suite: Any) -> None:
    (suite.folder / "test_x.py").write_text(DECORATED)

    run = subprocess.run(
        [sys.executable, "-m", "unittest", "test_x"], cwd=suite.folder, capture_output=True, text=True, check=False
    )

    assert run.returncode == 0
    assert "Ran 6 tests" in run.stderr


def test_importing_the_decorators_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'msgspec', 'vlm_doctor'}"
    code = f"import sys, pytest_vlmgpu.shim; print(sorted({heavy} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_all_names_are_there() -> None:
    assert all(callable(getattr(shim, name)) for name in shim.__all__)


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
def test_decorators_take_what_those_of_the_libraries_take() -> None:
    """One name, one call: otherwise changing the import would not be enough."""
    code = """if True:
        import inspect
        import accelerate.test_utils, transformers.testing_utils
        from pytest_vlmgpu import shim
        seen = 0
        for library in (accelerate.test_utils, transformers.testing_utils):
            for name in shim.__all__:
                theirs = getattr(library, name, None)
                if theirs is None:
                    continue
                seen += 1
                wanted, ours = inspect.signature(theirs).parameters, inspect.signature(getattr(shim, name)).parameters
                assert list(ours) == list(wanted), (name, wanted, ours)
                assert all(one.default in (one.empty, ours[key].default) for key, one in wanted.items()), name
        print(seen)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 10
