"""``--vlm-report``: complete whatever becomes of the run, and of one published schema; and what GitHub is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pytest_vlmgpu.results.evidence import GatedRecord, schema
from pytest_vlmgpu.results.github import commands, table
from pytest_vlmgpu.results.recorder import Recorder

PUBLISHED = Path(__file__).parents[2] / "docs" / "run-report.schema.json"
SUITE = """
import pytest

@pytest.mark.vlm("org/wide")
def test_wide(vlm): pass
@pytest.mark.vlm("org/a", dtype="float16")
def test_a(vlm): assert False, "wrong answer"
@pytest.mark.vlm_requires(gpus=4)
def test_few(): pass
@pytest.mark.vlm_requires(vram_gib=20)
def test_memory(): pytest.skip("no font")
@pytest.mark.vlm("org/oom")
def test_oom(vlm): pass
@pytest.fixture
def breaks_after():
    yield
    raise RuntimeError("not stopped")
@pytest.mark.vlm_requires
def test_teardown(breaks_after): pass
@pytest.mark.vlm_requires
@pytest.mark.xfail(reason="known")
def test_known(): assert False
def test_free(): pass
"""


def read(suite: Any, name: str = "out.json") -> dict[str, Any]:
    """The report, which must be of the published schema."""
    report: dict[str, Any] = json.loads((suite.folder / name).read_text())
    jsonschema.validate(report, json.loads(PUBLISHED.read_text()))
    return report


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {test["nodeid"].partition("::")[2]: test for test in report["tests"]}


def test_the_published_schema_is_that_of_the_records() -> None:
    wanted = json.dumps(schema(), indent=2) + "\n"
    if os.environ.get("VLM_UPDATE_GOLDEN"):
        PUBLISHED.write_text(wanted)

    assert PUBLISHED.read_text() == wanted, "run VLM_UPDATE_GOLDEN=1 pytest tests/plugin/test_report.py"
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("workers", [[], ["-n2"]])
def test_every_gated_test_is_there_with_its_reason(suite: Any, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")

    result = suite.run(*workers, "--vlm-report=out.json", "--vlm-min-tests=9", test_x=SUITE)

    report = read(suite)
    assert (report["mode"], report["state"], report["exit_status"]) == ("run", "finished", int(result.ret))
    assert report["settings"] == ["--vlm-min-tests=9", "--vlm-report=out.json"]
    assert [one["code"] for one in report["broken"]] == ["VLM741"]
    assert report["machine"]["gpus"][1]["free_gib"] == 22.0
    assert {load["model"] for load in report["loads"]} == {"org/wide", "org/a (float16)"}
    tests = by_name(report)
    found = {name: (test["outcome"], test["verdict"], test["code"], test["is_executed"]) for name, test in tests.items()}
    assert found == {
        "test_wide": ("passed", "run", None, True),
        "test_a": ("failed", "run", None, True),
        "test_few": ("skipped", "skip", "VLM702", False),
        "test_memory": ("skipped", "run", None, False),
        "test_oom": ("error", "error", "VLM715", False),
        "test_teardown": ("error", "run", None, True),
        "test_known": ("xfailed", "run", None, True),
    }
    assert tests["test_a"]["reason"].startswith("AssertionError: wrong answer")
    assert tests["test_few"]["reason"] == "VLM702: 4 GPUs are wanted, 2 can be used."
    assert tests["test_memory"]["reason"] == "no font"
    assert tests["test_oom"]["reason"] == "VLM715: org/oom ran out of memory."
    assert tests["test_teardown"]["reason"] == "RuntimeError: not stopped"
    assert (tests["test_wide"]["need_gib"], len(tests["test_wide"]["gpus"])) == (30.0, 2)
    assert tests["test_memory"]["need_gib"] == 20.0
    assert (tests["test_wide"]["file"], tests["test_wide"]["line"]) == ("test_x.py", 3)
    assert all((test["worker"] in ("gw0", "gw1")) is bool(workers) for test in tests.values())


def test_a_test_with_a_failed_subtest_has_failed(suite: Any) -> None:
    source = """
    import unittest
    import pytest

    @pytest.mark.vlm("org/a")
    @pytest.mark.usefixtures("vlm_cls")
    class TestCases(unittest.TestCase):
        def test_fails(self):
            for number in range(3):
                with self.subTest(number=number):
                    self.assertNotEqual(number, 1, "one is wrong")
        def test_skips_one(self):
            with self.subTest():
                self.skipTest("not here")
        def test_skips_after(self):
            with self.subTest():
                self.fail("two is wrong")
            self.skipTest("not here")
    """

    result = suite.run("--vlm-report=out.json", test_x=source)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    tests = by_name(read(suite))
    assert {name: (test["outcome"], test["is_executed"]) for name, test in tests.items()} == {
        "TestCases::test_fails": ("failed", True),
        "TestCases::test_skips_one": ("passed" if hasattr(pytest, "Subtests") else "skipped", hasattr(pytest, "Subtests")),
        "TestCases::test_skips_after": ("failed", True),
    }
    assert "one is wrong" in tests["TestCases::test_fails"]["reason"]
    assert "two is wrong" in tests["TestCases::test_skips_after"]["reason"]
    result.stdout.fnmatch_lines(["3 ran" if hasattr(pytest, "Subtests") else "2 ran; 1 skipped"])


def test_a_report_of_a_run_without_gated_tests(suite: Any) -> None:
    suite.run("--vlm-report=deep/er/out.json", test_x="def test_x(): pass")

    report = read(suite, "deep/er/out.json")
    assert (report["state"], report["exit_status"], report["tests"], report["machine"]) == ("finished", 0, [], None)


def test_what_helpers_of_the_plugin_and_the_project_add(suite: Any) -> None:
    suite.configure(
        """
@pytest.fixture
def measured(request):
    yield
    request.node.user_properties.append(("vlmgpu.peak_gib", 9.5))
    request.node.user_properties.append(("vlmgpu.wait_s", 1.25))

def pytest_vlmgpu_report(config, report, extra):
    extra["runner"] = f"{len(report.tests)} on rack 7"
"""
    )

    result = suite.run(
        "--vlm-report=out.json", test_x="import pytest\n@pytest.mark.vlm_requires\ndef test_x(measured): pass"
    )

    report = read(suite)
    assert (report["tests"][0]["peak_gib"], report["tests"][0]["wait_s"]) == (9.5, 1.25)
    assert report["extra"] == {"runner": "1 on rack 7"}
    result.stdout.fnmatch_lines(["1 ran; waited 1.2 s"])


def test_a_run_that_is_interrupted_leaves_a_complete_report(suite: Any) -> None:
    suite.pytester.makepyfile(
        test_x="""
        import pytest
        @pytest.mark.vlm_requires
        def test_1(): pass
        @pytest.mark.vlm_requires
        def test_2(): raise KeyboardInterrupt
        @pytest.mark.vlm("org/a")
        def test_3(vlm): pass
        """
    )

    suite.pytester.runpytest_subprocess("--vlm-report=out.json", "-p", "no:hypothesispytest")

    report = read(suite)
    assert (report["state"], report["exit_status"]) == ("interrupted", 2)
    assert [test["outcome"] for test in report["tests"]] == ["passed", "not_run", "not_run"]


def test_a_run_that_is_killed_leaves_a_report_that_says_so(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.configure(
        """
from pytest_vlmgpu.results import report_file
report_file.INTERVAL_S = -1
"""
    )
    suite.pytester.makepyfile(
        test_x="""
        import os, signal
        import pytest
        @pytest.mark.vlm_requires
        def test_1(): pass
        @pytest.mark.vlm_requires
        def test_2(): os.kill(os.getpid(), signal.SIGKILL)
        """
    )

    suite.pytester.runpytest_subprocess("--vlm-report=out.json", "-p", "no:hypothesispytest")

    report = read(suite)
    assert (report["state"], report["exit_status"]) == ("running", None)
    assert [test["outcome"] for test in report["tests"]] == ["passed", "not_run"]


def test_a_worker_that_crashes_is_in_the_report(suite: Any) -> None:
    pytest.importorskip("xdist")
    suite.pytester.makepyfile(test_x="import os\nimport pytest\n@pytest.mark.vlm_requires\ndef test_x(): os._exit(1)\n")

    suite.pytester.runpytest_subprocess("-n1", "--vlm-report=out.json", "-p", "no:hypothesispytest")

    (test,) = read(suite)["tests"]
    assert (test["outcome"], test["is_executed"]) == ("failed", False)
    assert "crashed" in test["reason"]


@pytest.mark.parametrize("is_expected", [False, True])
def test_a_worker_that_dies_before_a_test_says_anything(is_expected: bool) -> None:
    crash = pytest.TestReport("x.py::test_x", ("x.py", None, "x.py"), {}, "failed", "worker 'gw0' crashed", "???")  # type: ignore[arg-type]
    recorder = Recorder()
    if is_expected:  # by another worker, which has ended by then
        recorder.expect(["x.py::test_x", "x.py::test_y"])

    recorder.add(crash)
    recorder.expect(["x.py::test_x", "x.py::test_y"])

    assert [(record.outcome, record.reason, record.is_executed) for record in recorder.tests.values()] == [
        ("failed", "worker 'gw0' crashed", False),
        ("not_run", None, False),
    ]


def test_a_test_that_runs_again_where_a_worker_died_counts_for_what_it_became() -> None:
    crash = pytest.TestReport("x.py::test_x", ("x.py", None, "x.py"), {}, "failed", "crashed", "???")  # type: ignore[arg-type]
    recorder = Recorder()
    recorder.add(crash)
    for when in ("setup", "call"):
        report = pytest.TestReport("x.py::test_x", ("x.py", 3, "test_x"), {}, "passed", None, when)
        report.user_properties = [("vlmgpu.verdict", "run")]
        recorder.add(report)

    recorder.expect(["x.py::test_x"])

    assert [(record.outcome, record.attempts) for record in recorder.tests.values()] == [("passed", 1)]


@pytest.mark.parametrize("workers", [[], ["-n2"]])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/dev/full", "cannot be written: No space left on device; make room, or name a file elsewhere"),
        ("test_x.py/out.json", "its folder cannot be made: *"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_first_test(suite: Any, name: str, why: str, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")

    result = suite.run(*workers, f"--vlm-report={name}", test_x=SUITE)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: VLM744: --vlm-report *{name}: {why}."])
    assert suite.log() == []


FILLS_UP = """
import vlm_doctor.delivery
from vlm_doctor.errors import UsageError
real, calls = vlm_doctor.delivery.write_file, []
def write_file(path, text, *, option):
    calls.append(path)
    if len(calls) > 1:
        raise UsageError(f"{option} {path}: cannot be written: No space left on device.")
    real(path, text, option=option)
vlm_doctor.delivery.write_file = write_file
"""


def test_a_disk_that_fills_up_fails_the_run_and_loses_nothing(
    suite: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite.configure(FILLS_UP)
    suite.pytester.makepyfile(test_x="import pytest\n@pytest.mark.vlm_requires\ndef test_x(): pass")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    result = suite.pytester.runpytest_subprocess("--vlm-report=out.json", "-p", "no:hypothesispytest")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["VLM744: --vlm-report *out.json: cannot be written: No space left on device. It was kept as *out-*.json."]
    )
    assert read(suite)["state"] == "running"
    (kept,) = tmp_path.glob("out-*.json")
    assert json.loads(kept.read_text())["tests"][0]["outcome"] == "passed"


def test_a_clock_that_is_set_back_changes_no_duration(suite: Any) -> None:
    suite.pytester.makepyfile(
        test_x="""
        import time
        import pytest
        @pytest.mark.vlm("org/a")
        def test_1(vlm, monkeypatch): monkeypatch.setattr(time, "time", lambda: 0.0)
        @pytest.fixture(autouse=True)
        def back(monkeypatch):
            monkeypatch.setattr(time, "time", lambda: -1e9)
            yield
        """
    )

    suite.pytester.runpytest_subprocess("--vlm-report=out.json", "-p", "no:hypothesispytest")

    report = read(suite)
    durations = [report["duration_s"], report["tests"][0]["duration_s"], report["loads"][0]["seconds"]]
    assert all(0 <= duration < 60 for duration in durations)


def test_an_unmet_expectation_leaves_a_report(suite: Any) -> None:
    machine = Path(__file__).parents[1] / "machines" / "gpu-lost.json"

    result = suite.run(
        f"--vlm-machine={machine}", "--vlm-expect-gpus=9", "--vlm-report=out.json", test_x="def test_x(): pass"
    )

    report = read(suite)
    assert (result.ret, report["exit_status"], report["state"]) == (69, 69, "finished")
    assert [one["code"] for one in report["broken"]] == ["VLM740"]
    assert "error" in {finding["severity"] for finding in report["findings"]}


def test_github_is_told_only_where_it_is(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "::error" not in suite.run("--vlm-min-tests=9", test_x=SUITE).stdout.str()
    page = suite.folder / "page.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))

    result = suite.run("--vlm-min-tests=9", test_x=SUITE)

    result.stdout.fnmatch_lines(
        [
            "::error title=VLM741::4 gated tests ran, --vlm-min-tests=9: *",
            "::error file=test_x.py,line=11,title=VLM715::VLM715: org/oom ran out of memory.",
        ]
    )
    assert "| `test_x.py::test_wide` | passed |  | org/wide | 2 | 30.0 GiB |" in page.read_text()
    ended = suite.run("--vlm-machine=L4", "--vlm-expect-gpus=2", test_x=SUITE)
    ended.stdout.fnmatch_lines(["::error title=VLM740::--vlm-expect-gpus: VLM702: 2 GPUs are wanted, 1 can be used.%0A*"])


def test_a_summary_page_that_cannot_be_written_is_no_failure(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/dev/null/page.md")

    result = suite.run(test_x="import pytest\n@pytest.mark.vlm_requires\ndef test_x(): pass")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["vlmgpu: GITHUB_STEP_SUMMARY cannot be written: Not a directory."])


def test_what_github_cannot_take_is_escaped_or_cut() -> None:
    tests = {
        f"t{n}": GatedRecord(nodeid=f"t[a|{n}]", file="a,b.py", outcome="error", code="VLM711", reason="90%\nbusy")
        for n in range(250)
    }

    assert commands(tests, ())[0] == "::error file=a%2Cb.py,line=1,title=VLM711::90%25%0Abusy"
    assert len(commands(tests, ())) == 10
    assert "`t[a\\|0]`" in table(tests, ())
    assert "50 more are in the report." in table(tests, ())


def test_an_expected_failure_that_is_not_to_run_is_no_error_of_the_gate(suite: Any) -> None:
    source = """
    import pytest

    @pytest.mark.vlm_requires
    @pytest.mark.xfail(run=False, reason="hangs")
    def test_hangs(): pass
    """

    suite.run("--vlm-report=out.json", test_x=source).assert_outcomes(xfailed=1)

    test = by_name(read(suite))["test_hangs"]
    assert (test["outcome"], test["verdict"], test["is_executed"]) == ("xfailed", "skip", False)


def test_a_call_that_is_made_again_without_a_new_setup_counts_for_what_it_became() -> None:
    """So does pytest-retry, with an outcome of its own for the first one."""
    recorder = Recorder()

    def outcome_after(when: str, outcome: str) -> str:
        fields: dict[str, Any] = {"when": when, "outcome": outcome, "user_properties": [("vlmgpu.verdict", "run")]}
        recorder.add(pytest.TestReport("test_x", ("test_x.py", 0, "test_x"), {}, longrepr=None, **fields))
        return recorder.tests["test_x"].outcome

    outcome_after("setup", "passed")
    assert outcome_after("call", "retried") == "failed"
    assert outcome_after("call", "passed") == "passed"
    assert outcome_after("teardown", "passed") == "passed"
