"""``--vlm-plan`` and ``--vlm-fake-gpus``: what would run where, and a run that pretends."""

from __future__ import annotations

import fnmatch
import json
from typing import Any

import pytest

from .projects import plan_lines

SUITE = """
import sys
import pytest

@pytest.fixture(autouse=True, scope="session")
def expensive():
    raise AssertionError("set up")

@pytest.mark.vlm("org/wide")
def test_wide(vlm): pass
@pytest.mark.vlm("org/a", dtype="float16")
def test_a(vlm): pass
@pytest.mark.vlm_requires(gpus=4)
def test_few(): pass
@pytest.mark.vlm_requires(vram_gib=20)
def test_memory(): pass
@pytest.mark.vlm_requires
def test_any(): pass
@pytest.mark.vlm("org/nothing")
def test_unreadable(vlm): pass
@pytest.mark.vlm("org/wide")
def test_wide_too(vlm): pass
@pytest.mark.vlm_requires
@pytest.mark.skip(reason="not today")
def test_marked(): pass
def test_free(): raise AssertionError("ran")
"""


@pytest.mark.parametrize("workers", [[], ["-n2"]])
def test_a_plan_names_gpus_peaks_loads_and_reasons(suite: Any, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")

    result = suite.run(*workers, "--vlm-plan", "--vlm-report=out.json", test_x=SUITE)

    assert result.ret == 0
    lines = plan_lines(result)
    lines, who = (lines[:-2], lines[-2:]) if workers else (lines, [])
    assert [line.partition(":")[0] for line in who] == (
        ["worker 0 with GPU 0, 1", "worker 1 with no GPU"] if workers else []
    )
    # Versions of pytest differ in the order of what loads nothing.
    assert lines[:9] + sorted(lines[9:12]) + lines[12:] == [
        "2 GPUs; free: GPU 0 22.0 GiB, GPU 1 22.0 GiB",
        "5 gated tests would run, 2 would skip, 1 error; 2 loads",
        "1. load org/wide on GPU 0 (15.0 GiB peak predicted), GPU 1 (15.0 GiB peak predicted)",
        "     test_x.py::test_wide",
        "     test_x.py::test_wide_too",
        "2. load org/a (float16) on GPU 0 (4.0 GiB peak predicted)",
        "     test_x.py::test_a",
        "without a load: test_x.py::test_memory on GPU 0, 1 (20.0 GiB asked for)",
        "without a load: test_x.py::test_any on GPU 0, 1",
        "error: test_x.py::test_unreadable: VLM713: org/nothing: no such model.",
        "skip: test_x.py::test_few: VLM702: 4 GPUs are wanted, 2 can be used.",
        "skip: test_x.py::test_marked: not today",
        "1 other test not concerned",
        "how long loads take is not known yet: none has ended on these GPUs",
    ]
    assert suite.log() == ["MACHINE"]
    report = json.loads((suite.folder / "out.json").read_text())
    tests = {test["nodeid"].partition("::")[2]: test for test in report["tests"]}
    assert (report["mode"], report["state"], report["exit_status"]) == ("plan", "finished", 0)
    assert (tests["test_wide"]["outcome"], len(tests["test_wide"]["gpus"]), tests["test_wide"]["need_gib"]) == (
        "not_run",
        2,
        30.0,
    )
    assert (tests["test_few"]["outcome"], tests["test_few"]["code"]) == ("skipped", "VLM702")
    assert not any(test["is_executed"] for test in tests.values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-n2"], ["worker 0 with GPU 0: org/a (2 tests)", "worker 1 with GPU 1: org/b (1 test)"]),
        (
            ["-n3"],
            ["worker 0 with GPU 0: org/a (2 tests)", "worker 1 with GPU 1: org/b (1 test)", "worker 2 with no GPU: *"],
        ),
        (["-n2", "--vlm-gpus=1"], ["worker 0 with GPU 0: org/a (2 tests), org/b (1 test)", "worker 1 with no GPU: *"]),
        (["-n2", "--dist=loadfile"], []),
        (["-n2", "--vlm-gpus=none"], []),
        (["-n1"], []),
    ],
)
def test_a_plan_for_workers_says_who_would_run_what(suite: Any, options: list[str], told: list[str]) -> None:
    pytest.importorskip("xdist")
    source = """
import pytest
@pytest.mark.vlm("org/a")
@pytest.mark.parametrize("n", range(2))
def test_a(vlm, n): pass
@pytest.mark.vlm("org/b")
def test_b(vlm): pass
"""

    result = suite.run("--vlm-plan", *options, test_x=source)

    found = [line for line in result.outlines if line.startswith("worker")]
    assert len(found) == len(told)
    assert all(fnmatch.fnmatchcase(line, wanted) for line, wanted in zip(found, told, strict=True)), found


def test_a_plan_for_another_machine_sees_who_holds_memory(suite: Any) -> None:
    suite.configure(without="vlm_machine")

    result = suite.run("--vlm-plan", "--vlm-machine=2xL4:free=3GiB", test_x=SUITE)

    result.stdout.fnmatch_lines(
        [
            "2xL4:free=3GiB; free: GPU 0 3.0 GiB, GPU 1 3.0 GiB",
            "error: test_x.py::test_wide: VLM711: org/wide needs 30 GiB. *",
        ]
    )


def test_a_plan_of_a_suite_with_a_wrong_marker_is_an_error(suite: Any) -> None:
    result = suite.run("--vlm-plan", test_x="import pytest\n@pytest.mark.vlm_requires(count=2)\ndef test_x(): pass")

    assert result.ret == pytest.ExitCode.INTERRUPTED


def test_a_plan_imports_no_torch(suite: Any) -> None:
    suite.folder.joinpath("conftest.py").write_text(
        "import sys\ndef pytest_unconfigure(config): print('torch:', 'torch' in sys.modules, 'psutil' in sys.modules)"
    )
    suite.pytester.makepyfile(test_x="import pytest\n@pytest.mark.vlm('llava-hf/llava-1.5-7b-hf')\ndef test_x(vlm): pass")

    result = suite.pytester.runpytest_subprocess("--vlm-plan", "--vlm-machine=L4", "-s", "-p", "no:hypothesispytest")

    result.stdout.fnmatch_lines(["1. load llava-hf/llava-1.5-7b-hf on GPU 0 (* GiB peak predicted)", "torch: False False"])


FAKE = """
import pytest

@pytest.mark.vlm("org/a")
def test_a(vlm): assert vlm.name == "org/a"
@pytest.mark.vlm_requires(gpus=2)
def test_two(vlm_gpus): assert len(vlm_gpus) == 2
@pytest.mark.vlm_requires(gpus=4)
def test_four(): pass
"""


def test_fake_gpus_run_what_needs_no_real_one(suite: Any) -> None:
    suite.configure(without="vlm_machine")

    result = suite.run("--vlm-fake-gpus=24GiB,1x80GB", "--vlm-report=out.json", test_x=FAKE)

    result.assert_outcomes(passed=2, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "vlmgpu: --vlm-fake-gpus=24GiB,1x80GB, --vlm-report=out.json",
            "2 ran; 1 skipped (VLM702 too few GPUs: 1)",
            "NO TEST RAN ON A GPU (3 gated tests; the GPUs of --vlm-fake-gpus=24GiB,1x80GB are made up).",
        ]
    )
    assert suite.loads() == ["LOAD org/a", "UNLOAD org/a"]
    report = json.loads((suite.folder / "out.json").read_text())
    assert report["machine"]["origin"] == "synthetic"
    assert not any(test["gpus"] for test in report["tests"])


def test_fake_gpus_never_load_a_real_model(suite: Any) -> None:
    suite.folder.joinpath("conftest.py").unlink()

    result = suite.run(
        "--vlm-fake-gpus=L4",
        "-rs",
        test_x="import pytest\n@pytest.mark.vlm('llava-hf/llava-1.5-7b-hf')\ndef test_x(vlm): pass",
    )

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED *llava-hf/llava-1.5-7b-hf is not loaded on made-up GPUs; a vlm_loader *"])


def test_fake_gpus_that_make_no_sense(suite: Any) -> None:
    result = suite.run("--vlm-fake-gpus=2xNothing", test_x=FAKE)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: VLM720: --vlm-fake-gpus: *"])


def test_fake_gpus_where_proof_is_no_longer_demanded(suite: Any) -> None:
    (suite.folder / "pytest.ini").write_text("[pytest]\nvlm_strict = gpu\n")
    source = "import pytest\n@pytest.mark.vlm_requires\ndef test_x(): pass\n"

    refused = suite.run("--vlm-fake-gpus=L4", test_x=source)
    result = suite.run("--vlm-fake-gpus=L4", "--vlm-strict=off")

    refused.stderr.fnmatch_lines(["ERROR: VLM720: --vlm-fake-gpus: no GPU that is made up can satisfy vlm_strict; *"])
    result.assert_outcomes(passed=1)
