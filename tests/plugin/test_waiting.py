"""Waiting ends when it should, whatever the wall clock does, and says what it waits for."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vlmgpu.leasing.waiting import GRACE_S, Progress, Waiting


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[str] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    def show(self, line: str, *, is_last: bool = False) -> None:
        self.lines.append(line)

    def waiting(self, seconds: float) -> Waiting:
        return Waiting(seconds, self.show, clock=self, sleep=self.sleep)


def test_what_is_there_is_not_waited_for() -> None:
    clock = Clock()

    assert clock.waiting(60).until(lambda: True, str)
    assert clock.now == 100
    assert clock.lines == []


def test_waiting_ends_with_the_time_and_spends_it_once() -> None:
    clock = Clock()
    waiting = clock.waiting(60)

    assert not waiting.until(lambda: False, lambda: "GPU 0 is leased by pid 7")
    assert clock.now == pytest.approx(160)
    assert waiting.left_s == 0
    assert clock.lines[0].endswith("of 60 s: GPU 0 is leased by pid 7")
    assert clock.lines[-1] == "vlmgpu: waited 60 s"
    assert len(clock.lines) == 2, "a log is written to once a minute"
    assert not waiting.until(lambda: False, str)
    assert clock.now == pytest.approx(160 + GRACE_S)


def test_what_comes_is_noticed_within_a_second() -> None:
    clock = Clock()
    waiting = clock.waiting(600)

    assert waiting.until(lambda: clock.now >= 150, str)
    assert clock.now < 151.1
    assert waiting.left_s == pytest.approx(550, abs=1.1)


def test_without_time_a_moment_is_given_in_silence() -> None:
    clock = Clock()

    assert not clock.waiting(0).until(lambda: False, str)
    assert clock.now == pytest.approx(100 + GRACE_S)
    assert clock.lines == []
    assert not clock.waiting(600).until(lambda: False, str, may_wait=False)
    assert clock.now == pytest.approx(100 + 2 * GRACE_S)


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter([0.0, 10**9, -(10**9)] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    asked: list[float] = []
    started = time.monotonic()

    def never() -> bool:
        asked.append(time.time())
        return False

    # The upper bound is for a wall clock that counts: 10**9 s.
    assert not Waiting(0.3, lambda line, is_last=False: None).until(never, str, grace_s=0.3)
    assert 0.3 <= time.monotonic() - started < 60
    assert asked


class Terminal(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def progress(stream: Terminal, verbosity: int = 0) -> Progress:
    reporter = SimpleNamespace(_tw=SimpleNamespace(_file=stream))
    plugins: dict[str, Any] = {"terminalreporter": reporter}
    manager = SimpleNamespace(getplugin=plugins.get)
    return Progress(SimpleNamespace(pluginmanager=manager, get_verbosity=lambda: verbosity))  # type: ignore[arg-type]


def test_a_terminal_is_written_over_and_a_log_is_not() -> None:
    terminal, log, quiet = Terminal(is_terminal=True), Terminal(is_terminal=False), Terminal(is_terminal=False)
    for stream, verbosity in ((terminal, 0), (log, 0), (quiet, -1)):
        show = progress(stream, verbosity)
        show("waiting")
        show("waited", is_last=True)

    assert terminal.getvalue() == "\r\x1b[Kwaiting\r\x1b[Kwaited\n"
    assert log.getvalue() == "\nwaiting\nwaited\n"
    assert quiet.getvalue() == ""
