"""Runs that are broken off, and file systems that refuse: nothing stays locked or loaded, nothing is silent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu.leasing.leases import Leases

from ..until import LIMIT_S, is_running, until
from .projects import ONE_MODEL, SLOW, UUIDS, finish, with_workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from .projects import Project


def free_leases(project: Project) -> bool:
    """True when every GPU can be leased right now."""
    probe = Leases(project.shared / "leases")
    taken = probe.take(UUIDS[:2])
    probe.release()
    return not taken


def report(project: Project) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project.folder / "out.json").read_text())
    return found


def did(project: Project) -> list[str]:
    return [" ".join(line.split()[:2]) for line in (project.shared / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize("options", [[], pytest.param(["-n2"], marks=with_workers)])
def test_a_run_that_is_terminated_leaves_nothing_locked_and_no_process(
    make: Callable[..., Project], options: list[str]
) -> None:
    killed, after = make("killed"), make("after")
    run = killed.start(*options, "--vlm-gpus=2", "--vlm-report=out.json", test_x=SLOW)
    until((killed.folder / "started").exists)
    holders = [int(path.suffix[1:]) for path in (killed.shared / "memory").iterdir()]
    assert not free_leases(killed)

    run.terminate()
    run.communicate(timeout=LIMIT_S)
    text, counts = after.run("--vlm-gpus=2", test_x=ONE_MODEL)

    assert run.returncode == -signal.SIGTERM
    assert counts == {"passed": 2}, text
    assert [pid for pid in holders if is_running(pid)] == []
    assert report(killed)["state"] == "running", "a run that was killed must not look finished"


@pytest.mark.parametrize(
    ("body", "options", "status", "state"),
    [
        ("assert False", ["--maxfail=1"], 1, "finished"),
        ("assert False", ["-x"], 1, "finished"),
        ("raise KeyboardInterrupt", [], 2, "interrupted"),
        ("pytest.exit('enough', returncode=9)", [], 9, "interrupted"),
    ],
)
@pytest.mark.parametrize("slots", ["1", "fit"])
def test_a_run_that_ends_early_unloads_its_models(
    make: Callable[..., Project], body: str, options: list[str], status: int, state: str, slots: str
) -> None:
    project = make()
    suite = f"""
import pytest
@pytest.mark.vlm("org/b")
def test_b(vlm): pass
@pytest.mark.vlm("org/a")
def test_ends(vlm): {body}
@pytest.mark.vlm("org/a")
def test_never(vlm): pass
"""
    run = project.start(*options, f"--vlm-slots={slots}", "--vlm-report=out.json", test_x=suite)
    text, _ = finish(run)

    assert run.returncode == status, text
    assert sorted(did(project)) == ["LOAD org/a", "LOAD org/b", "UNLOAD org/a", "UNLOAD org/b"]
    assert free_leases(project)
    assert ("org/a: loaded in" in text) == (status <= pytest.ExitCode.INTERRUPTED), "pytest prints no summary otherwise"
    found = report(project)
    assert (found["state"], found["exit_status"]) == (state, status)
    assert [test["outcome"] for test in found["tests"]][-1] == "not_run"


@with_workers
def test_a_worker_that_dies_while_it_loads_is_replaced_on_the_same_gpus(make: Callable[..., Project]) -> None:
    project = make()
    conftest = """
import os
from pathlib import Path
plain = load
@contextmanager
def load(spec, plan):
    with plain(spec, plan) as loaded:
        if spec.name == "org/c" and not Path("died").exists():
            Path("died").touch()
            os._exit(1)
        yield loaded
"""
    project.conftest = conftest
    suite = """
import pytest
@pytest.mark.vlm("org/c")
@pytest.mark.parametrize("n", range(3))
def test_c(vlm, n): pass
@pytest.mark.vlm("org/a")
@pytest.mark.parametrize("n", range(3))
def test_a(vlm, n): pass
"""

    text, counts = project.run("-n2", "--vlm-report=out.json", test_x=suite)

    # The test for which it was loaded fails, as pytest-xdist has it; the others run where it would have run.
    assert counts == {"passed": 5, "failed": 1}, text
    loads = [load for load in project.loads() if load["model"] == "org/c"]
    assert len(loads) == 2
    assert loads[0]["sees"] == loads[1]["sees"]
    assert loads[0]["worker"] != loads[1]["worker"]
    assert [load["model"] for load in project.loads()].count("org/a") == 1
    outcomes = sorted(test["outcome"] for test in report(project)["tests"])
    assert outcomes == ["failed", *["passed"] * 5]
    assert free_leases(project)


@with_workers
def test_a_worker_that_dies_at_each_load_does_not_go_on_for_ever(make: Callable[..., Project]) -> None:
    project = make()
    project.conftest = """
import os
plain = load
@contextmanager
def load(spec, plan):
    if spec.name == "org/c": os._exit(1)
    with plain(spec, plan) as loaded: yield loaded
"""
    suite = """
import pytest
@pytest.mark.vlm("org/c")
@pytest.mark.parametrize("n", range(3))
def test_c(vlm, n): pass
@pytest.mark.vlm("org/a")
def test_a(vlm): pass
"""

    text, counts = project.run("-n2", test_x=suite)

    assert counts == {"passed": 1, "failed": 3}, text
    assert free_leases(project)


def test_a_child_of_a_test_that_outlives_the_run_holds_no_lease(make: Callable[..., Project], tmp_path: Path) -> None:
    project, after = make("first"), make("after")
    suite = """
import os, pathlib, stat, subprocess, sys, time, pytest
def sleep(): time.sleep(600)
@pytest.mark.vlm("org/a")
def test_a(vlm):
    forked = os.fork()
    if not forked:
        os.setsid()
        for name in os.listdir("/proc/self/fd"):  # whoever reads the output waits for its end
            try:
                if stat.S_ISFIFO(os.fstat(int(name)).st_mode): os.close(int(name))
            except OSError: pass
        try: sleep()
        finally: os._exit(0)
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False,
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pathlib.Path("pids").write_text(f"{forked} {started.pid}")
    started.returncode = 0
"""
    try:
        text, counts = project.run("--vlm-gpus=2", "-p", "no:unraisableexception", test_x=suite)
        children = [int(pid) for pid in (project.folder / "pids").read_text().split()]
        assert counts == {"passed": 1}, text
        assert all(map(is_running, children)), "they should have outlived the run"

        text, counts = after.run("--vlm-gpus=2", test_x=ONE_MODEL)

        assert counts == {"passed": 2}, text
    finally:
        for pid in (project.folder / "pids").read_text().split():
            os.kill(int(pid), signal.SIGKILL)


def can_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(folder)]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


@pytest.fixture
def on_tmpfs(tmp_path: Path, make: Callable[..., Project]) -> Callable[..., tuple[str, int]]:
    """Runs a project in a mount namespace of its own, where the leases' folder is on a file system with these options."""
    place = tmp_path / "mounted"
    place.mkdir()
    if not can_mount(place):
        pytest.skip("no right to mount a file system")
    project = make()

    def run(options: str, before: str, *arguments: str) -> tuple[str, int]:
        project.start("--version").communicate()  # writes the files
        (project.folder / "test_x.py").write_text(ONE_MODEL)
        leases = place / "leases"
        is_read_only = options == "ro"
        script = f"set -e; mount -t tmpfs -o {'rw' if is_read_only else options} none {place}; {before}"
        script += f"; mount -o remount,ro {place}" if is_read_only else ""
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *arguments]
        environment = {**os.environ, **project.environment, "PYTEST_VLMGPU_LEASE_DIR": str(leases)}
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f'{script}; exec "$@"', "sh", *command],
            cwd=project.folder,
            env=environment,
            text=True,
            capture_output=True,
            check=False,
            timeout=LIMIT_S,
        )
        return done.stdout + done.stderr, done.returncode

    return run


def test_nothing_is_executed_where_leases_are(on_tmpfs: Any, tmp_path: Path) -> None:
    place = tmp_path / "mounted"

    text, status = on_tmpfs("noexec", f"mkdir {place}/tmp; export TMPDIR={place}/tmp", f"--basetemp={place}/base")

    assert status == 0, text
    assert "1 GPU leased" in text


@pytest.mark.parametrize(("options", "why"), [("ro", "Read-only file system"), ("nr_inodes=2", "No space left on device")])
def test_a_place_where_no_lease_can_be_made_is_an_error_of_gpu_tests_alone(
    on_tmpfs: Any, tmp_path: Path, options: str, why: str
) -> None:
    text, status = on_tmpfs(options, f"mkdir -m 1777 {tmp_path}/mounted/leases")

    assert status == 1, text
    assert "1 passed, 1 error" in text
    assert "VLM731: " in text
    assert f"({why}): make it writable for all who share these GPUs" in text
    assert "Traceback" not in text


def test_a_full_disk_takes_the_holders_name_and_nothing_else(on_tmpfs: Any, tmp_path: Path) -> None:
    fill = f"mkdir -m 1777 {tmp_path}/mounted/leases; head -c 1M /dev/zero > {tmp_path}/mounted/zero || true"

    text, status = on_tmpfs("size=64k", fill)

    assert status == 0, text
    assert "1 GPU leased" in text


def test_a_clock_that_jumps_ahead_ends_no_waiting(make: Callable[..., Project]) -> None:
    """Ten years from now, by the clock of the machine, while a run waits for a GPU that another one has."""
    first, second = make("first", gpus=1), make("second", gpus=1)
    holder = first.start(test_x=SLOW)
    try:
        until((first.folder / "started").exists)
        second.conftest = """
import time
real, ahead = time.time, [0.0]
time.time = lambda: real() + ahead[0]
from pytest_vlmgpu.leasing import waiting
class Jumping(waiting.Waiting):
    def __init__(self, seconds, show): super().__init__(seconds, show, sleep=self._jump)
    def _jump(self, seconds):
        ahead[0] += 3e8
        time.sleep(seconds)
        if ahead[0] > 1e9: Path("../first/go").touch()
import pytest_vlmgpu.leasing.own_share
pytest_vlmgpu.leasing.own_share.Waiting = Jumping
"""
        started = time.monotonic()
        text, counts = second.run("--vlm-wait=300", test_x=ONE_MODEL)
        assert counts == {"passed": 2}, text
        assert time.monotonic() - started < LIMIT_S
    finally:
        (first.folder / "go").touch()
        assert finish(holder)[1] == {"passed": 1}
