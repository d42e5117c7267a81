"""Runs with ``--vlm-warm`` on the CPU: one loads, the next one attaches, and nothing that changed is taken for the same."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Imported for good: pytester forgets what is first imported inside a run, and torch does not survive a second import.
import pytest_vlmgpu.gating.gate
import pytest_vlmgpu.models.ladder
import pytest_vlmgpu.models.loading
import pytest_vlmgpu.warm.run
import pytest_vlmgpu.warm.sharing
import pytest_vlmgpu.watching.watch  # noqa: F401
import vlm_doctor.sources.collection  # noqa: F401
from pytest_vlmgpu.leasing.holders import pid_namespace
from pytest_vlmgpu.warm.attaching import borrow
from pytest_vlmgpu.warm.hosts import Hosts
from pytest_vlmgpu.warm.places import Place, folder_for
from pytest_vlmgpu.warm.records import Attach

from ..until import until

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.models

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ASKS = """
def test_asks(vlm, vlm_images):
    assert len(vlm.generate(vlm_images[0], "What is this?", max_new_tokens=4)) == 4
"""
ATTACHED = "*: attached in * s to a model loaded * ago on the CPU*; 1 test"


class Project:
    """A project with a tiny model, whose hosts it shares with the tests before: to start one takes seconds."""

    def __init__(self, pytester: pytest.Pytester, shared: Path) -> None:
        self.pytester = pytester
        self.model = shared / "model"
        self.leases = shared / "leases"
        self.folder = folder_for(str(self.leases))

    def run(self, *arguments: str, test: str = ASKS, warm: str = "--vlm-warm") -> pytest.RunResult:
        self.pytester.makepyfile(test_x=test)
        plugins = [word for name in ("cacheprovider", "hypothesispytest", "randomly") for word in ("-p", f"no:{name}")]
        return self.pytester.runpytest_inprocess(*plugins, *self.options(warm), *arguments)

    def options(self, warm: str = "--vlm-warm") -> list[str]:
        return ["--vlm-gpus=none", f"--vlm-model={self.model}", f"--vlm-lease-dir={self.leases}", *([warm] if warm else [])]

    def keep(self, *arguments: str) -> None:
        """Have a host of the model, if a test before has left none."""
        self.run(*arguments).assert_outcomes(passed=1)

    def hosts(self) -> list[int]:
        hosts = Hosts(self.folder)
        return [status.pid for record in hosts.alive() if (status := hosts.status(record)) is not None]

    def end(self) -> None:
        for record in (hosts := Hosts(self.folder)).alive():
            assert hosts.end(record) == ""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_vlms: Mapping[str, Path]) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(tiny_vlms["llava"], folder / "model")
    yield folder
    place = folder_for(str(folder / "leases"))
    for record in Hosts(place).alive():
        os.kill(record.pid, signal.SIGKILL)
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def project(pytester: pytest.Pytester, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    for name in list(os.environ):
        if name.startswith(("PYTEST_", "VLMGPU_")) or name == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(name)
    return Project(pytester, shared)


def test_the_next_run_attaches_until_something_changes(project: Project) -> None:
    project.end()
    first = project.run()
    first.assert_outcomes(passed=1)
    first.stdout.fnmatch_lines([
        "vlmgpu: --vlm-gpus=none*--vlm-warm*",
        "*: loaded in * s on the CPU (kept for 15 min from its last use; cold this time: there was no warm model); 1 test",
    ])  # fmt: skip
    hosts = project.hosts()
    assert len(hosts) == 1

    again = project.run("--vlm-report=report.json")
    again.assert_outcomes(passed=1)
    again.stdout.fnmatch_lines([ATTACHED])
    assert '"warm": "attached"' in (project.pytester.path / "report.json").read_text()
    assert project.hosts() == hosts

    other = project.run("--vlm-dtype=bfloat16")
    other.assert_outcomes(passed=1)
    other.stdout.fnmatch_lines(["*loaded in * (kept for 15 min from its last use; cold this time: dtype changed); 1 test"])
    assert len(project.hosts()) == 2


def test_what_tests_do_to_a_model_is_gone_with_their_run(project: Project) -> None:
    test = """
import pytest, torch
SEEN = []
def look(vlm): return [parameter.sum().item() for parameter in vlm.model.parameters()]
def test_reads(vlm): SEEN.append(look(vlm))
def test_zeroes(vlm):
    with torch.no_grad(): next(vlm.model.parameters()).zero_()
def test_finds_it_whole(vlm): assert look(vlm) == SEEN[0] and not vlm.model.training
@pytest.mark.vlm_mutates
def test_trains(vlm):
    optimizer = torch.optim.SGD(vlm.model.parameters(), lr=1.0)
    sum(parameter.sum() for parameter in vlm.model.parameters()).backward()
    optimizer.step()
@pytest.mark.vlm_mutates
def test_finds_it_whole_again(vlm): assert look(vlm) == SEEN[0]
"""
    sums = """
def test_writes(vlm):
    from pathlib import Path
    Path("sums").write_text(repr([parameter.sum().item() for parameter in vlm.model.parameters()]))
"""
    project.keep()
    project.run(test=sums).assert_outcomes(passed=1)
    before = (project.pytester.path / "sums").read_text()

    result = project.run(test=test)
    result.assert_outcomes(passed=5, errors=1)
    result.stdout.fnmatch_lines(["VLM750: this test changed */model, which other tests share*It is loaded again *"])
    assert str(result.stdout).count(": attached in") == 3

    after = project.run(test=sums)
    after.stdout.fnmatch_lines([ATTACHED])
    assert (project.pytester.path / "sums").read_text() == before


@pytest.mark.parametrize(
    ("conftest", "reason"),
    [
        (
            "from contextlib import contextmanager\nimport pytest\n@pytest.fixture(scope='session')\ndef vlm_loader():\n"
            "    from pytest_vlmgpu.models.loading import load\n"
            "    return contextmanager(lambda spec, plan: iter([load(spec.name, plan)]))\n",
            "it is loaded by a loader of the project's own",
        ),
        ("import torch\ntorch.set_default_dtype(torch.float64)\n", "sees another torch's default dtype"),
    ],
)
def test_what_cannot_be_kept_is_loaded_as_ever(project: Project, conftest: str, reason: str) -> None:
    import torch

    project.pytester.makeconftest(conftest)
    try:
        result = project.run(test="def test_x(vlm): assert vlm.model is not None")
    finally:
        torch.set_default_dtype(torch.float32)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [f"*loaded in * s on the CPU (not kept: *{reason}*" if reason else "*loaded in *(kept for *"]
    )


@pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_workers_attach_to_the_models_they_own(project: Project) -> None:
    two = f"""
import pytest
@pytest.mark.vlm({str(project.model)!r})
@pytest.mark.parametrize("n", range(2))
def test_a(vlm, n): pass
@pytest.mark.vlm({str(project.model)!r}, dtype="bfloat16")
@pytest.mark.parametrize("n", range(2))
def test_b(vlm, n): pass
"""
    project.keep()
    project.keep("--vlm-dtype=bfloat16")
    assert len(project.hosts()) == 2
    project.pytester.makepyfile(test_x=two)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n2", *project.options()]

    run = subprocess.run(command, cwd=project.pytester.path, capture_output=True, text=True, check=True)

    assert len(re.findall(": attached in", run.stdout)) == 2, run.stdout
    assert ": loaded in" not in run.stdout


def test_a_killed_host_and_a_killed_run_leave_the_next_run_a_model(project: Project) -> None:
    project.keep()
    for host in project.hosts():
        os.kill(host, signal.SIGKILL)
    after = project.run()
    after.assert_outcomes(passed=1)
    after.stdout.fnmatch_lines(["*loaded in * cold this time: its warm host had ended (it was killed)); 1 test"])

    waits = "def test_x(vlm):\n    import pathlib, time\n    pathlib.Path('has').touch()\n    time.sleep(600)\n"
    project.pytester.makepyfile(test_x=waits)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *project.options()]
    run = subprocess.Popen(command, cwd=project.pytester.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until((project.pytester.path / "has").exists)
    run.kill()
    run.wait()

    last = project.run()
    last.assert_outcomes(passed=1)
    last.stdout.fnmatch_lines([ATTACHED])


def test_a_run_that_wants_none_ends_them(project: Project) -> None:
    project.keep()

    without = project.run("--vlm-cold", warm="")

    without.assert_outcomes(passed=1)
    without.stdout.fnmatch_lines(["*loaded in * s on the CPU; 1 test"])
    assert project.hosts() == []


def test_a_run_that_wants_none_takes_none_that_cannot_be_ended(project: Project) -> None:
    project.keep()
    (record,) = Hosts(project.folder).alive()
    request = Attach(record.digest, pid_namespace(), 60.0)
    loan = borrow(Place(project.folder, record.digest), request, lambda progress: None, lambda: None)
    twice = """
import pytest
@pytest.mark.vlm_mutates
@pytest.mark.parametrize("n", [1, 2])
def test_changes(vlm, n): pass
"""

    result = project.run("--vlm-cold", test=twice)

    loan.close()
    result.assert_outcomes(passed=2)
    lines = [line for line in result.outlines if "its warm host cannot be ended: the run with pid" in line]
    assert len(lines) == 2
    result.stdout.no_fnmatch_line("*: attached in *")


def test_a_host_that_hangs_is_named_and_waited_for_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.keep()
    (pid,) = project.hosts()
    monkeypatch.setattr("pytest_vlmgpu.warm.attaching.SILENCE_S", 1)
    started: list[object] = []
    monkeypatch.setattr("pytest_vlmgpu.warm.run.start", lambda *order: started.append(order))
    os.kill(pid, signal.SIGSTOP)
    try:
        result = project.run()
    finally:
        os.kill(pid, signal.SIGCONT)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*not kept: its warm host has said nothing for 1 s; end it with kill -9 {pid})*"])
    assert not started
