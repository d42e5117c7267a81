"""A check that is slow is named, one that does not end is stopped, and nobody else's timer is touched."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from vlm_doctor import checks
from vlm_doctor.check_clock import CheckClock
from vlm_doctor.checks import Check, Facts, diagnose
from vlm_doctor.codec import machine_from_json
from vlm_doctor.findings import Finding

PATH = Path(__file__).parents[1] / "machines" / "small-shm.json"
MACHINE = machine_from_json(PATH.read_bytes(), where=PATH.name)
BROKEN = "VLM101"
"""The first check of all: whatever it does, the others come after it."""


def sleeps(_facts: Facts) -> tuple[Finding, ...]:
    time.sleep(30)
    return ()


def loops(_facts: Facts) -> tuple[Finding, ...]:
    while True:
        with contextlib.suppress(Exception):
            sum(range(1000))


def matches_for_ever(_facts: Facts) -> tuple[Finding, ...]:
    re.match(r"(a|aa)+$", "a" * 100 + "b")
    return ()


def dawdles(_facts: Facts) -> tuple[Finding, ...]:
    time.sleep(0.12)
    return ()


@pytest.fixture(autouse=True)
def free_timer() -> Iterator[None]:
    """The timer as a run of the command line finds it, whatever plugin keeps the time of these tests."""
    previous = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.signal(signal.SIGALRM, previous)
    signal.setitimer(signal.ITIMER_REAL, left_s, interval_s)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Facts], tuple[Finding, ...]]], None]:
    """Put something else into the first check."""

    def put(run: Callable[[Facts], tuple[Finding, ...]]) -> None:
        def exchanged(check: Check) -> Check:
            return msgspec.structs.replace(check, run=run, needs=()) if check.code == BROKEN else check

        changed = tuple(map(exchanged, checks.CHECKS))
        monkeypatch.setattr(checks, "CHECKS", changed)
        monkeypatch.setattr(checks, "_BY_CODE", {check.code: check for check in changed})

    return put


@pytest.mark.parametrize("run", [sleeps, loops, matches_for_ever])
def test_a_check_that_does_not_end_is_unknown_and_the_others_judge(
    broken: Callable[..., None], run: Callable[[Facts], tuple[Finding, ...]]
) -> None:
    before = diagnose(MACHINE)
    broken(run)
    # Far more than a check that ends is held up on a busy machine.
    clock = CheckClock(deadline_s=2, slow_s=1)
    after = diagnose(MACHINE, by=clock)

    assert (after.outcomes[0].code, after.outcomes[0].state) == (BROKEN, "unknown")
    assert after.outcomes[0].reason == "no verdict within 2 s; please report this"
    assert after.outcomes[1:] == before.outcomes[1:]
    (note,) = clock.notes()
    assert re.fullmatch(r"Slow to judge: VLM101 [0-9.]+ s\. This is a defect of vlm-doctor, please report it\.", note)


def test_what_was_stopped_once_is_not_waited_for_again(broken: Callable[..., None]) -> None:
    begun = []

    def counts(facts: Facts) -> tuple[Finding, ...]:
        begun.append(facts)
        return sleeps(facts)

    broken(counts)
    clock = CheckClock(deadline_s=2)
    assert [diagnose(MACHINE, by=clock).outcomes[0].state for _ in range(2)] == ["unknown", "unknown"]
    assert len(begun) == 1


def test_quick_checks_leave_no_note_no_timer_and_no_handler() -> None:
    def mine(_number: int, _frame: object) -> None:
        pytest.fail("nobody has set the timer")

    signal.signal(signal.SIGALRM, mine)
    clock = CheckClock(slow_s=20)  # so slow is no machine
    assert diagnose(MACHINE, by=clock) == diagnose(MACHINE)
    assert clock.notes() == ()
    assert signal.getsignal(signal.SIGALRM) is mine
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_a_check_is_only_measured(broken: Callable[..., None]) -> None:
    broken(dawdles)
    clock = CheckClock(deadline_s=0.05, slow_s=0.1)
    states = []
    thread = threading.Thread(target=lambda: states.append(diagnose(MACHINE, by=clock).outcomes[0].state))
    thread.start()
    thread.join()
    assert states == ["passed"]
    assert "VLM101 " in clock.notes()[0]


def test_the_timer_of_somebody_else_is_left_alone(broken: Callable[..., None]) -> None:
    broken(dawdles)
    signal.setitimer(signal.ITIMER_REAL, 60)
    assert diagnose(MACHINE, by=CheckClock(deadline_s=0.05)).outcomes[0].state == "passed"
    assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60


def test_the_command_line_names_a_check_that_hangs_and_still_has_a_verdict() -> None:
    # A process of its own: how the program is started must not matter to who keeps the time.
    program = f"""
import sys, time, msgspec
from vlm_doctor import check_clock, checks, cli
first, *others = checks.CHECKS
assert first.code == "{BROKEN}"
checks.CHECKS = (msgspec.structs.replace(first, run=lambda facts: time.sleep(60), needs=()), *others)
check_clock.CheckClock.__init__.__kwdefaults__.update(deadline_s=2, slow_s=1)
cli.main(["--machine", {str(PATH)!r}, "--no-project", "--verbose"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no NVIDIA GPU (VLM101): no verdict within 2 s; please report this" in done.stdout
    assert "VLM503" in done.stdout
    assert "Slow to judge: VLM101 " in done.stdout
