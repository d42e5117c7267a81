"""Green means it ran: strict levels, expectations, the floor, the baseline, and the exit status of each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu.gating.expecting import judge_expectation
from pytest_vlmgpu.options import Settings
from pytest_vlmgpu.results.evidence import GatedRecord
from pytest_vlmgpu.results.promises import did_not_run, too_few_ran

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlm_doctor.machine import Gpu, Machine

GATED = """
import pytest

@pytest.mark.vlm("org/a")
def test_a(vlm): pass
@pytest.mark.vlm_requires(gpus=4)
def test_few(): pass
@pytest.mark.vlm_requires
def test_own_skip(): pytest.skip("no font")
@pytest.mark.vlm_requires
@pytest.mark.skip(reason="not today")
def test_marked(): pass
@pytest.mark.vlm_requires
@pytest.mark.xfail(reason="known")
def test_known(): assert False
def test_free(): pytest.skip("not ours")
"""


def test_strict_gpu_leaves_skips_of_the_test_alone(suite: Any) -> None:
    suite.run("--vlm-strict=gpu", test_x=GATED).assert_outcomes(passed=1, errors=1, skipped=3, xfailed=1)


def test_strict_all_allows_no_skip_of_a_gated_test(suite: Any) -> None:
    result = suite.run("--vlm-strict=all", "--junitxml=out.xml", test_x=GATED)

    result.assert_outcomes(passed=1, errors=2, failed=1, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines(
        [
            "VLM743: the test skipped itself: no font (An error because of --vlm-strict=all.)",
            "2 ran; 3 error* (VLM702 too few GPUs: 1, VLM743 skipped itself under --vlm-strict=all: 2)",
        ]
    )
    assert (suite.folder / "out.xml").read_text().count('name="vlmgpu.code" value="VLM743"') == 2


def test_strict_all_sees_the_skips_of_unittest(suite: Any) -> None:
    result = suite.run(
        "--vlm-strict=all",
        test_x="""
        import unittest
        import pytest
        @pytest.mark.vlm_requires
        class TestX(unittest.TestCase):
            def test_1(self): self.skipTest("no font")
            @unittest.skip("not today")
            def test_2(self): pass
            def test_3(self): pass
        """,
    )

    result.assert_outcomes(passed=1, failed=2)


@pytest.mark.parametrize(
    ("options", "is_strict"), [([], True), (["--vlm-gpus=none"], False), (["--vlm-gpus=none", "--vlm-min-tests=1"], True)]
)
def test_strict_auto_on_a_machine_with_gpus(suite: Any, options: list[str], is_strict: bool) -> None:
    result = suite.run(
        "--vlm-strict=auto", *options, test_x="import pytest\n@pytest.mark.vlm_requires(gpus=4)\ndef test_x(): pass"
    )

    result.assert_outcomes(errors=int(is_strict), skipped=int(not is_strict))


def test_strict_auto_on_a_machine_without(suite: Any) -> None:
    suite.has_none()

    suite.run("--vlm-strict=auto", test_x="import pytest\n@pytest.mark.vlm_requires\ndef test(): pass").assert_outcomes(
        skipped=1
    )


@pytest.mark.parametrize("workers", [[], ["-n2"]])
@pytest.mark.parametrize(("floor", "status"), [("2", 0), ("3", 1)])
def test_the_floor_counts_tests_that_ran(suite: Any, workers: list[str], floor: str, status: int) -> None:
    if workers:
        pytest.importorskip("xdist")

    result = suite.run(*workers, f"--vlm-min-tests={floor}", test_x=GATED)

    assert result.ret == status
    told = "VLM741: 2 gated tests ran, --vlm-min-tests=3: 2 skipped, 1 skipped (VLM702)."
    assert (told in result.outlines) is bool(status)


@pytest.mark.parametrize(
    "source",
    [
        "import pytest\npytest.skip('no torch', allow_module_level=True)",
        "def test_x(): pass",
        "",
    ],
    ids=["module skip", "nothing gated", "nothing at all"],
)
def test_the_floor_sees_what_left_no_test_behind(suite: Any, source: str) -> None:
    result = suite.run("--vlm-min-tests=1", test_x=source)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["VLM741: 0 gated tests ran, --vlm-min-tests=1; no other one was collected."])


def test_all_deselected_does_not_pass_the_floor(suite: Any) -> None:
    assert suite.run("-k", "nothing", "--vlm-min-tests=1", test_x=GATED).ret == pytest.ExitCode.TESTS_FAILED


def test_statuses_of_pytest_keep_their_meaning(suite: Any) -> None:
    assert suite.run(test_x="").ret == pytest.ExitCode.NO_TESTS_COLLECTED
    suite.pytester.makepyfile(test_x="def test_x(): raise KeyboardInterrupt")
    interrupted = suite.pytester.runpytest_subprocess("--vlm-min-tests=9", "-p", "no:hypothesispytest")
    assert interrupted.ret == pytest.ExitCode.INTERRUPTED
    assert "VLM741" not in interrupted.stdout.str()
    assert suite.run("--no-such-option").ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize("workers", [[], ["-n2"]])
def test_a_baseline_is_written_and_held_to(suite: Any, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")
    first = suite.run(*workers, "--vlm-baseline=b.json", "--vlm-update-baseline", test_x=GATED)
    assert first.ret == 0
    first.stdout.fnmatch_lines(["*b.json: 2 tests noted as run"])
    assert json.loads((suite.folder / "b.json").read_text())["tests"] == ["test_x.py::test_a", "test_x.py::test_known"]

    assert suite.run(*workers, "--vlm-baseline=b.json").ret == 0
    suite.has_none()
    skipped = suite.run(*workers, "--vlm-baseline=b.json")
    (suite.folder / "test_x.py").unlink()
    vanished = suite.run(*workers, "--vlm-baseline=b.json", test_y="def test_y(): pass")

    assert (skipped.ret, vanished.ret) == (1, 1)
    skipped.stdout.fnmatch_lines(
        ["VLM742: 2 of 2 tests of b.json did not run again: test_x.py::test_a was skipped (VLM701: this machine has no *"]
    )
    vanished.stdout.fnmatch_lines(["VLM742: 2 of 2 tests*test_x.py::test_a was not collected as a gated test (gone, *"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "*b.json: there is no such baseline; write it with --vlm-update-baseline."),
        ("{", "*b.json: the baseline cannot be read: it is not JSON; write it anew with --vlm-update-baseline."),
        ("[1]", "*b.json: this is no baseline of schema 1; write it anew with --vlm-update-baseline."),
        ('{"schema": 2, "tests": []}', "*b.json: this is no baseline of schema 1; write it anew with *"),
        ('{"schema": 1, "tests": [1]}', "*b.json: this is no baseline of schema 1; write it anew with *"),
    ],
)
def test_a_baseline_that_cannot_be_read(suite: Any, content: str | None, message: str) -> None:
    if content is not None:
        (suite.folder / "b.json").write_text(content)

    result = suite.run("--vlm-baseline=b.json", test_x=GATED)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: VLM720: {message}"])
    assert suite.log() == []


@pytest.mark.parametrize("name", ["endless", "pipe"])
@pytest.mark.parametrize("option", ["--vlm-baseline", "--vlm-fleet"])
def test_a_file_that_never_ends_is_not_read(suite: Any, option: str, name: str) -> None:
    (suite.folder / "endless").symlink_to("/dev/zero")
    os.mkfifo(suite.folder / "pipe")

    result = suite.run("--vlm-plan" if option == "--vlm-fleet" else "-q", f"{option}={name}", test_x=GATED)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: VLM720: *{name}: *cannot be read: it is not a regular file*"])


@pytest.mark.parametrize("workers", [[], ["-n2"]])
def test_an_expectation_ends_the_run_before_anything_is_collected(suite: Any, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")

    result = suite.run(*workers, "--vlm-machine=L4", "--vlm-expect-gpus=2", test_x="raise AssertionError('collected')")

    assert result.ret == 69
    result.stderr.fnmatch_lines(
        [
            "Exit: VLM740: --vlm-expect-gpus: VLM702: 2 GPUs are wanted, 1 can be used.",
            "  vlm-doctor finds nothing wrong with this machine: it is another one than expected.",
        ]
    )
    assert "collected'" not in result.stdout.str()


def test_an_expectation_of_memory_is_about_free_memory(suite: Any) -> None:
    free = suite.run("--vlm-machine=2xL4", "--vlm-expect-gpus=2", "--vlm-expect-vram=20GiB", test_x="def test_x(): pass")
    taken = suite.run("--vlm-machine=2xL4:free=5GiB", "--vlm-expect-vram=20", test_x="def test_x(): pass")

    waits = suite.run("--vlm-machine=2xL4:free=5GiB", "--vlm-expect-vram=20", "--vlm-wait=1", test_x="def test_x(): pass")

    assert (free.ret, taken.ret, waits.ret) == (0, 69, 0)
    taken.stderr.fnmatch_lines(["Exit: VLM740: --vlm-expect-vram: VLM711: 20.0 GiB free is wanted on one GPU: *"])


def test_the_findings_of_the_doctor_are_told(suite: Any) -> None:
    machine = Path(__file__).parents[1] / "machines" / "driver-mismatch.json"

    result = suite.run(f"--vlm-machine={machine}", "--vlm-expect-gpus=1", test_x="def test_x(): pass")

    assert result.ret == 69
    result.stderr.fnmatch_lines(["Exit: VLM740: --vlm-expect-gpus: VLM712: *", "  VLM1?? error: * Fix: *"])


def test_many_findings_are_cut(suite: Any, machine: Callable[..., Machine], gpu: Callable[..., Gpu]) -> None:
    settings = Settings(expect_gpus=9, origins={"expect_gpus": "--vlm-expect-gpus"})
    broken = machine(*(gpu(index, error="GPU is lost") for index in range(8)))

    told = judge_expectation(settings, broken)

    assert told is not None
    assert "more: run vlm-doctor." in told.message.splitlines()[-1]
    assert len(told.message.splitlines()) == 7


def test_listing_tests_expects_nothing(suite: Any) -> None:
    for option in ("--collect-only", "--fixtures", "--markers"):
        assert suite.run(option, "--vlm-machine=L4", "--vlm-expect-gpus=2", test_x="def test_x(): pass").ret == 0


def test_expecting_gpus_on_a_run_without_is_a_usage_error(suite: Any) -> None:
    result = suite.run("--vlm-gpus=none", "--vlm-expect-gpus=1", test_x="def test_x(): pass")

    result.stderr.fnmatch_lines(["ERROR: VLM720: --vlm-expect-gpus: --vlm-gpus=none allows no GPU; leave out one of them."])


def test_long_lists_are_cut() -> None:
    tests = {f"t{n}": GatedRecord(nodeid=f"t{n}", outcome="error", code="VLM711") for n in range(12)}

    (broken,) = did_not_run(tests, [*tests, "gone"], "b.json")

    assert broken.message.startswith("13 of 13 tests of b.json did not run again: t0 had an error; t1 had an error;")
    assert broken.message.endswith("t9 had an error; and 3 more.")
    assert did_not_run(tests, None, "") == too_few_ran(tests, None, "") == []
    assert did_not_run({"t": GatedRecord(nodeid="t")}, ["t"], "b")[0].message.endswith("t was not reached.")
    assert did_not_run({"t": GatedRecord(nodeid="t", outcome="xfailed")}, ["t"], "b")[0].message.endswith("t did not run.")


def test_a_test_with_part_of_its_model_off_the_gpus_proves_nothing() -> None:
    off = GatedRecord(nodeid="test_x.py::test_off", outcome="passed", is_executed=True, offloaded_gib=3.0)
    ran = GatedRecord(nodeid="test_x.py::test_ran", outcome="passed", is_executed=True)
    tests = {record.nodeid: record for record in (off, ran)}

    assert too_few_ran(tests, 1, "--vlm-min-tests") == []
    (few,) = too_few_ran(tests, 2, "--vlm-min-tests")
    (missing,) = did_not_run(tests, list(tests), "base.json")

    assert few.message == "1 gated test ran, --vlm-min-tests=2: 1 with part of its model in host memory."
    assert missing.message == (
        "1 of 2 tests of base.json did not run again: test_x.py::test_off ran with 3.0 GiB of its model in host memory."
    )
