"""Waiting ends when it should, whatever the wall clock does, and says what it waits for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from pytest_vlmgpu.leasing.waiting import GRACE_S, Waiting
from pytest_vlmgpu.output import Line


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self._log, self._writer = os.pipe()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    @property
    def lines(self) -> list[str]:
        """What a log got since the last time."""
        os.write(self._writer, b"END")
        text = b""
        while not text.endswith(b"END"):
            text += os.read(self._log, 65536)
        return [line for line in text.decode().removesuffix("END").splitlines() if line]

    def waiting(self, seconds: float) -> Waiting:
        return Waiting(seconds, lambda: Line(self._writer, clock=self), clock=self, sleep=self.sleep)

    def close(self) -> None:
        os.close(self._log)
        os.close(self._writer)


@pytest.fixture
def clock() -> Iterator[Clock]:
    made = Clock()
    yield made
    made.close()


def test_what_is_there_is_not_waited_for(clock: Clock) -> None:
    assert clock.waiting(60).until(lambda: True, str)
    assert clock.now == 100
    assert clock.lines == []


def test_waiting_ends_with_the_time_and_spends_it_once(clock: Clock) -> None:
    waiting = clock.waiting(60)

    assert not waiting.until(lambda: False, lambda: "GPU 0 is leased by pid 7")
    assert clock.now == pytest.approx(160)
    assert waiting.left_s == 0
    first, *_, last = lines = clock.lines
    assert first.endswith("of 60 s: GPU 0 is leased by pid 7")
    assert last == "vlmgpu: waited 60 s"
    assert len(lines) == 3, "a log is written to twice a minute"
    assert not waiting.until(lambda: False, str)
    assert clock.now == pytest.approx(160 + GRACE_S)


def test_what_comes_is_noticed_within_a_second(clock: Clock) -> None:
    waiting = clock.waiting(600)

    assert waiting.until(lambda: clock.now >= 150, str)
    assert clock.now < 151.1
    assert waiting.left_s == pytest.approx(550, abs=1.1)


def test_without_time_a_moment_is_given_in_silence(clock: Clock) -> None:
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
    assert not Waiting(0.3, lambda: Line(None)).until(never, str, grace_s=0.3)
    assert 0.3 <= time.monotonic() - started < 60
    assert asked
