"""A long load shows how it goes, on a terminal and in a log; a quick one shows nothing."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vlmgpu.models import progress
from pytest_vlmgpu.models.progress import Share, line
from pytest_vlmgpu.output import Line, keep_output, open_line
from vlm_doctor.placement import LedgerLine, Stage

GIB = 2**30


def stage(gpu: int, weights: int) -> Stage:
    ledger = (LedgerLine(kind="weights", label="weights", size_bytes=weights, source="made up"),)
    return Stage(gpu=gpu, uuid=f"GPU-{gpu}", name="L4", keys=(), ledger=ledger, total_bytes=weights)


@pytest.mark.parametrize(
    ("shares", "host", "expected"),
    [
        ([Share("GPU 0", 0, 8 * GIB)], 0, "0 of 8.0 GiB, reading its files, 10 s"),
        ([Share("GPU 0", 5 * GIB, 8 * GIB)], 0, "5.0 of 8.0 GiB, 0.5 GB/s, 10 s"),
        (
            [Share("GPU 0", 3 * GIB, 8 * GIB), Share("GPU 3", 2 * GIB, 7 * GIB)],
            0,
            "5.0 of 15.0 GiB (GPU 0 3.0 of 8.0, GPU 3 2.0 of 7.0), 0.5 GB/s, 10 s",
        ),
        ([], 3 * GIB, "3.0 GiB in host memory, 10 s"),
        ([], 0, "reading its files, 10 s"),
    ],
)
def test_the_line(shares: list[Share], host: int, expected: str) -> None:
    assert line("org/a", 10.0, shares, host) == f"vlmgpu: loading org/a: {expected}"


def test_what_is_counted_are_the_weights_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = {0: 100, 1: 0}
    monkeypatch.setattr(progress, "allocated_bytes", lambda: dict(allocated))
    poll = progress._poller([stage(3, 50), stage(2, 60)], {"GPU-3": 1, "GPU-2": 0})
    allocated.update({0: 130, 1: 99})

    assert poll() == ([Share("GPU 3", 50, 50), Share("GPU 2", 30, 60)], 0)


def written(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, seconds: float) -> str:
    """What a load of that many made-up seconds writes."""
    reader, writer = pty.openpty() if is_terminal else os.pipe()
    clock = [0.0]

    class Event:
        def wait(self, timeout: float) -> bool:
            clock[0] += timeout
            return clock[0] >= seconds

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    polled = iter(range(1, 10**6))
    event: Any = Event()
    line_ = Line(writer, first_s=progress.LOG_FIRST_S, clock=lambda: clock[0])
    progress._run(line_, "org/a", lambda: ([Share("GPU 0", next(polled), 10**6)], 0), event)
    os.write(writer, b"END")
    text = b""
    while not text.endswith(b"END"):
        text += os.read(reader, 65536)
    os.close(reader)
    os.close(writer)
    return text.decode().removesuffix("END")


def test_a_terminal_has_one_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    text = written(monkeypatch, is_terminal=True, seconds=10)

    assert text.count("vlmgpu: loading org/a") == 16
    assert text.count("\x1b7") == text.count("\x1b8") == 17
    assert "\n" not in text
    assert text.endswith("\r\x1b[K\x1b8")


def test_a_log_has_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    text = written(monkeypatch, is_terminal=False, seconds=95)

    assert [part for part in text.splitlines() if part][-1] == "vlmgpu: loading org/a ended after 95 s"
    assert text.count("vlmgpu: loading org/a:") == 3
    assert "\x1b" not in text


@pytest.mark.parametrize(("is_terminal", "seconds"), [(True, 1.9), (False, 9.9)])
def test_a_quick_load_writes_nothing(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, seconds: float) -> None:
    assert written(monkeypatch, is_terminal=is_terminal, seconds=seconds) == ""


def test_an_output_that_is_gone_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(progress, "QUIET_S", 0)
    done = threading.Event()
    thread = threading.Thread(target=progress._run, args=(Line(writer), "org/a", lambda: ([], 0), done))
    thread.start()
    while thread.is_alive() and not done.wait(0.6):
        done.set()
    thread.join(timeout=60)
    os.close(writer)

    assert not thread.is_alive()


class Config:
    """What a line asks of a run."""

    def __init__(self, verbosity: int, *, is_worker: bool = False) -> None:
        self.stash = pytest.Stash()
        self.cleanup: list[Any] = []
        self.add_cleanup = self.cleanup.append
        self.get_verbosity = lambda: verbosity
        if is_worker:
            self.workerinput: dict[str, Any] = {}


@pytest.mark.parametrize(("verbosity", "is_shown"), [(0, True), (-1, True), (-2, False)])
def test_who_wants_quiet_gets_it(capfd: pytest.CaptureFixture[str], verbosity: int, is_shown: bool) -> None:
    config: Any = Config(verbosity)
    keep_output(config)

    line_ = open_line(config, first_s=0)
    line_.show(lambda: "waiting")
    line_.show(lambda: "waiting still")
    line_.end("waited")
    for cleanup in config.cleanup:
        cleanup()

    assert capfd.readouterr().out == ("\nwaiting\n\nwaited\n" if is_shown else "")


def test_a_worker_has_no_output_of_its_own(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vlmgpu.output._terminal_in_front", lambda: None)
    config: Any = Config(0, is_worker=True)
    keep_output(config)

    open_line(config, first_s=0).show(lambda: "a load")
    open_line(config, first_s=0, in_log_of_worker=True).show(lambda: "a wait")

    out, err = capfd.readouterr()
    assert (out, err) == ("", "\na wait\n")


def test_a_terminal_that_was_opened_for_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr("pytest_vlmgpu.output._terminal_in_front", lambda: writer)
    config: Any = Config(0, is_worker=True)

    line_ = open_line(config, first_s=0)
    line_.show(lambda: "a load")
    line_.end("ended")

    assert os.read(reader, 100) == b"\na load\n\nended\n"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writer)
    os.close(reader)


def test_it_shows_through_pytests_capture(suite: Any, pytester: pytest.Pytester) -> None:
    suite.configure("""
import time
from pytest_vlmgpu.models import progress
progress.QUIET_S = progress.LOG_FIRST_S = 0.1
plain = load
@contextmanager
def load(spec, plan):
    with progress.shown(CONFIG[0], spec.label, plan, {}):
        while "loading org/a" not in Path("out.txt").read_text(): time.sleep(0.05)
    with plain(spec, plan) as loaded: yield loaded
CONFIG = []
def pytest_configure(config): CONFIG.append(config)
""")  # fmt: skip
    pytester.makepyfile("import pytest\n@pytest.mark.vlm('org/a')\ndef test_x(vlm): print('hidden')")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--vlm-gpus=none"]

    output = pytester.path / "out.txt"
    with output.open("w") as file:
        run = subprocess.run(command, cwd=pytester.path, stdout=file, stderr=file, check=False, timeout=300)

    text = output.read_text()
    assert run.returncode == 0, text
    assert re.search(r"^vlmgpu: loading org/a: reading its files, \d+ s$", text, re.MULTILINE), text
    assert "hidden" not in text
