"""``--vlm-fleet``: which tests can run on which kinds of runner, and a failure for those that can run nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_vlmgpu.results.fleet import read_fleet
from vlm_doctor.codec import to_json
from vlm_doctor.sources import load_machine

from .projects import plan_lines

SUITE = """
import pytest
@pytest.fixture(autouse=True, scope="session")
def expensive(): raise AssertionError("set up")
@pytest.mark.vlm("llava-hf/llava-1.5-7b-hf")
def test_model(vlm): pass
@pytest.mark.vlm_requires
def test_any(): pass
@pytest.mark.vlm_requires(vram_gib="80GB")
def test_large(): pass
@pytest.mark.vlm_requires
@pytest.mark.skip(reason="not today")
def test_skips(): pass
def test_free(): pass
"""
NOWHERE = """
@pytest.mark.vlm_requires(gpus=16)
def test_sixteen(): pass
"""
FLEET = """
[runners]
laptop = "none"
l4 = "2xL4"
busy = "busy.json"
h100 = "8xH100:nvswitch"
"""


@pytest.fixture
def fleet(suite: Any) -> Any:
    suite.folder.joinpath("conftest.py").unlink()
    suite.folder.joinpath("runners").mkdir()
    suite.folder.joinpath("runners", "fleet.toml").write_text(FLEET)
    suite.folder.joinpath("runners", "busy.json").write_text(to_json(load_machine("L4:free=3GiB")))
    return suite


def plan(suite: Any, source: str, *arguments: str) -> tuple[Any, list[str]]:
    result = suite.run("--vlm-plan", "--vlm-fleet=runners/fleet.toml", *arguments, test_x=source)
    return result, plan_lines(result)


@pytest.mark.parametrize("workers", [[], ["-n2"]])
def test_tests_by_where_they_can_run(fleet: Any, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")

    result, lines = plan(fleet, SUITE, *workers, "--vlm-report=out.json")

    assert result.ret == 0
    order = sorted(lines[5:8])  # versions of pytest differ in the order of what loads nothing
    assert [*lines[:5], *order, *lines[8:]] == [
        "laptop (no GPU): 0 of 4 gated tests can run",
        "l4 (2xL4): 2 of 4 gated tests can run",
        "busy (L4:free=3GiB): 2 of 4 gated tests can run",
        "h100 (8xH100:nvswitch): 3 of 4 gated tests can run",
        "on l4, busy, h100:",
        "     test_x.py::test_any",
        "     test_x.py::test_model (on busy once others free its memory)",
        "on h100 alone:",
        "     test_x.py::test_large",
        "decided elsewhere: test_x.py::test_skips: not today.",
        "1 other test not concerned",
    ]
    report = json.loads((fleet.folder / "out.json").read_text())
    assert (report["mode"], report["exit_status"], report["machine"]) == ("plan", 0, None)
    assert [(runner["name"], len(runner["machine"]["gpus"])) for runner in report["fleet"]] == [
        ("laptop", 0),
        ("l4", 2),
        ("busy", 1),
        ("h100", 8),
    ]
    runners = {test["nodeid"].partition("::")[2]: test["runners"] for test in report["tests"]}
    assert runners == {
        "test_model": ["l4", "busy", "h100"],
        "test_any": ["l4", "busy", "h100"],
        "test_large": ["h100"],
        "test_skips": [],
    }


def test_a_test_that_can_run_nowhere_fails_the_plan(fleet: Any) -> None:
    result, lines = plan(fleet, SUITE + NOWHERE, "--vlm-report=out.json")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    reason = (
        "laptop: VLM701: this machine has no NVIDIA GPU; l4: VLM702: 16 GPUs are wanted, 2 can be used; busy: VLM702: 16 "
        "GPUs are wanted, 1 can be used; h100: VLM702: 16 GPUs are wanted, 8 can be used."
    )
    assert f"nowhere: test_x.py::test_sixteen: {reason}" in lines
    assert lines[-1] == "VLM745: 1 gated test can run on no runner of fleet.toml: test_x.py::test_sixteen."
    report = json.loads((fleet.folder / "out.json").read_text())
    test = next(test for test in report["tests"] if test["nodeid"].endswith("sixteen"))
    assert (test["code"], test["reason"], test["outcome"]) == ("VLM745", reason, "not_run")
    assert [one["code"] for one in report["broken"]] == ["VLM745"]


def test_many_tests_that_can_run_nowhere_are_counted(fleet: Any) -> None:
    many = SUITE + "@pytest.mark.vlm_requires(gpus=16)\n@pytest.mark.parametrize('n', range(12))\ndef test_many(n): pass"

    _, lines = plan(fleet, many)

    assert lines[-1].startswith("VLM745: 12 gated tests can run on no runner of fleet.toml: test_x.py::test_many[0], ")
    assert lines[-1].endswith(", and 2 more.")


def test_a_plan_for_one_machine_is_what_it_was(fleet: Any) -> None:
    result = fleet.run("--vlm-plan", "--vlm-machine=L4", test_x=SUITE + NOWHERE)

    assert result.ret == 0
    result.stdout.no_fnmatch_line("*VLM745*")


def test_a_conftest_that_decides_by_a_machine_of_its_own_hides_the_runners(suite: Any) -> None:
    suite.folder.joinpath("fleet.toml").write_text('[runners]\nl4 = "2xL4"')

    result = suite.run("--vlm-plan", "--vlm-fleet=fleet.toml", test_x=SUITE)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: VLM720: --vlm-fleet: a conftest overrides the fixture vlm_machine, *"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.toml", None, "it cannot be read: No such file or directory."),
        ("f.toml", "x = [", "it is not TOML: *"),
        ("f.toml", b"\xff", "it is not TOML: *"),
        ("f.json", "[" * 100_000, "it is not JSON: *"),
        ("f.json", "{", "it is not JSON: *"),
        ("f.json", "[]", 'it names no runners; write {"runners": {"l4": "2xL4"}}.'),
        ("f.toml", "", 'it names no runners; write [[]runners] and lines such as l4 = "2xL4".'),
        ("f.toml", "runners = 3", "it names no runners; *"),
        ("f.toml", "[runners]", "it names no runners; *"),
        ("f.toml", "[runners]\na = 3", 'a = 3 is no machine; write a spec such as "2xL4", a recorded file, or "none".'),
        ("f.toml", '[runners]\na = "live"', "a = 'live' is no machine; *"),
        ("f.toml", '[runners]\n" " = "L4"', "' ' is no name of a runner."),
        ("f.toml", '[runners]\n"\\u001b[2J" = "L4"', "'*x1b[[]2J' is no name of a runner."),
        ("f.toml", '[runners]\na = "2xNothing"', "a: *'Nothing' is not a GPU of the catalogue*"),
        ("f.toml", '[runners]\na = "gone/x.json"', "a: *gone/x.json: no such file; record one with vlm-doctor collect."),
        ("f.toml", "#" * (2**20 + 1), "it has more than 1 MiB; that is no list of runners."),
    ],
)
def test_a_file_that_is_none(suite: Any, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (suite.folder / name).write_bytes(data)

    result = suite.run("--vlm-plan", f"--vlm-fleet={name}", test_x=SUITE)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: VLM720: --vlm-fleet: *{name}: {message}"])


def test_json_and_absolute_names(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(to_json(load_machine("L4")))
    (tmp_path / "f.json").write_text(json.dumps({"runners": {"a": "m.json", "b": str(tmp_path / "m.json"), "c": "24GiB"}}))

    assert [len(runner.machine.gpus) for runner in read_fleet(tmp_path / "f.json")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vlm-fleet=f.toml"], "--vlm-fleet: it is what a plan is made for; give --vlm-plan too."),
        (["--vlm-plan", "--vlm-fleet=f.toml", "--vlm-machine=L4"], "--vlm-fleet: --vlm-machine names a machine too; *"),
        (["--vlm-plan", "--vlm-fleet=f.toml", "--vlm-fake-gpus=L4"], "--vlm-fleet: --vlm-fake-gpus names a machine too; *"),
    ],
)
def test_what_contradicts_it(suite: Any, arguments: list[str], message: str) -> None:
    result = suite.run(*arguments, test_x=SUITE)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: VLM720: {message}"])
