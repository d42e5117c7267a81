"""Does anything stay locked after SIGKILL? `python benchmarks/kill_rounds.py [--rounds 50] [--fake] [--seed 0]`.

Each round starts a run of pytest, kills its worker, its controller, or the one process of a run without pytest-xdist, and
then asks three things: is every lease free, are the processes of the run gone, and does a run that wants all GPUs at once
start and pass. A run whose worker was killed must also end by itself, with that test as its only failure at most.

With --fake the machine is made up (two L4) and models take no memory. Otherwise the GPUs of this machine are used, and each
model takes SHARE of a GPU, so that a next run cannot start beside what a killed one has left. No torch and no network are
needed.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from pytest_command import pytest_command, pytest_environment

from pytest_vlmgpu.leasing.leases import Leases
from vlm_doctor.codec import to_json
from vlm_doctor.machine import Driver, Gpu, Machine
from vlm_doctor.units import GIB

VICTIMS = ("worker", "controller", "holder")
HERE = Path(__file__).parent
PROJECTS = HERE.parent / "tests" / "plugin"
SHARE = 0.6
LIMIT_S = 180.0
"""After this a run counts as stuck."""
FREE_LIMIT_S = 5.0
"""Leases are the kernel's to give back, and it does so while the process dies."""
_WORKER = "sys.stdin.readline"
"""In the command line of a worker, which is a program that reads its program. Source: execnet.gateway_io."""
TESTS = """
import time
import pytest

@pytest.mark.vlm("org/a")
@pytest.mark.parametrize("n", range(6))
def test_first(vlm, n): time.sleep(0.1)
@pytest.mark.vlm("org/b")
@pytest.mark.parametrize("n", range(6))
def test_second(vlm, n): time.sleep(0.1)
@pytest.mark.parametrize("n", range(6))
def test_free(n): time.sleep(0.05)
"""
CHECK = """
import pytest

@pytest.mark.vlm("org/wide")
@pytest.mark.vlm_requires(gpus={gpus})
def test_all(vlm, vlm_gpus): assert len(vlm_gpus) == len(vlm.gpus) == {gpus}
"""


@dataclass
class Outcome:
    """What was seen of one kind of victim."""

    rounds: int = 0
    hits: int = 0
    free_s: list[float] = field(default_factory=list)
    gone_s: list[float] = field(default_factory=list)
    next_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Bench:
    """A project, a lease folder and the runs on them."""

    def __init__(self, folder: Path, *, is_fake: bool) -> None:
        self.folder = folder
        self.environment = pytest_environment(VLMGPU_LEASE_DIR=str(folder / "leases"), KILL_ROUNDS_SHARE=str(SHARE))
        self.uuids = fake_machine(folder) if is_fake else real_machine(folder)
        (folder / "test_long.py").write_text(TESTS)
        (folder / "test_check.py").write_text(CHECK.format(gpus=len(self.uuids)))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start pytest on the project, in a session of its own."""
        return subprocess.Popen(
            pytest_command("-q", *arguments),
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def locked(self) -> dict[str, str]:
        """Leases that some process holds, and who it says it is."""
        probe = Leases(self.folder / "leases")
        taken = probe.take(self.uuids)
        probe.release()
        return taken


def fake_machine(folder: Path) -> list[str]:
    (folder / "conftest.py").write_text((PROJECTS / "shared_project.py").read_text())
    (folder / "made_up_plans.py").write_text((PROJECTS / "made_up_plans.py").read_text())
    gpus = tuple(
        Gpu(
            index=index,
            name="NVIDIA L4",
            uuid=f"GPU-{index:08d}-0000-0000-0000-000000000000",
            bus_id=f"0000:{index + 1:02x}:00.0",
            memory_total_bytes=22 * GIB,
            memory_free_bytes=22 * GIB,
            compute_capability=(8, 9),
        )
        for index in range(2)
    )
    machine = Machine(origin="live", description="2 GPUs", gpus=gpus, driver=Driver(nvml_state="ok"))
    (folder / "machine.json").write_text(to_json(machine))
    return [gpu.uuid for gpu in gpus]


def real_machine(folder: Path) -> list[str]:
    from vlm_doctor.sources import collect
    from vlm_doctor.visibility import visible_gpus

    machine = collect(with_torch=False)
    by_index = {gpu.index: gpu.uuid for gpu in machine.gpus}
    uuids = [by_index[index] for index in visible_gpus(machine).gpus]
    if not uuids:
        raise SystemExit("this machine has no GPU: try --fake")
    (folder / "made_up_plans.py").write_text((PROJECTS / "made_up_plans.py").read_text())
    (folder / "conftest.py").write_text((HERE / "driver_project.py").read_text())
    return uuids


def victim_of(run: subprocess.Popen[str], kind: str) -> psutil.Process | None:
    """The process to kill; ``None`` when it is not there (yet, or any more)."""
    try:
        controller = psutil.Process(run.pid)
        if kind != "worker":
            return controller
        workers = [child for child in controller.children() if _WORKER in " ".join(child.cmdline())]
        return random.choice(workers) if workers else None
    except psutil.Error:
        return None


def family(run: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(run.pid).children(recursive=True)
    except psutil.Error:
        return []


def one_round(bench: Bench, kind: str, seconds: float, outcome: Outcome) -> None:
    run = bench.start("test_long.py", "--vlm-wait=60", *(() if kind == "holder" else ("-n", "2")))
    # Not before there is something to kill.
    time.sleep(random.uniform(0.1, 1.0) * seconds)
    victim, others = victim_of(run, kind), family(run)
    outcome.rounds += 1
    if victim is not None and run.poll() is None:
        victim.send_signal(signal.SIGKILL)
        outcome.hits += 1
    killed_at = time.monotonic()
    if kind == "worker":
        wait_for_end(run, outcome)
    else:
        run.wait(LIMIT_S)
        watch(bench, others, killed_at, outcome)
    started = time.monotonic()
    check = bench.start("test_check.py", f"--vlm-gpus={len(bench.uuids)}", "--vlm-wait=20", "--vlm-strict")
    text, _ = check.communicate(timeout=LIMIT_S)
    outcome.next_s.append(time.monotonic() - started)
    if check.returncode:
        outcome.problems.append(f"the next run failed: {text[-1500:]}")


def wait_for_end(run: subprocess.Popen[str], outcome: Outcome) -> None:
    try:
        text, _ = run.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        run.kill()
        outcome.problems.append("the run hung after its worker was killed")
        return
    if "gateway_bootstrap" in text:
        return  # killed before it had said hello: pytest-xdist itself cannot go on then, and the next run has to
    failed = text.count("\nFAILED ") + text.count("\nERROR ")
    if run.returncode not in (0, 1) or failed > 1 or "INTERNALERROR" in text:
        outcome.problems.append(f"the run ended with {run.returncode} and {failed} failures: {text[-1500:]}")


def watch(bench: Bench, others: list[psutil.Process], killed_at: float, outcome: Outcome) -> None:
    """Time until the leases are free, and until the workers are gone."""
    while (locked := bench.locked()) and time.monotonic() - killed_at < FREE_LIMIT_S:
        time.sleep(0.01)
    outcome.free_s.append(time.monotonic() - killed_at)
    if locked:
        outcome.problems.append(f"still locked after {FREE_LIMIT_S:.0f} s: {locked}")
    _, alive = psutil.wait_procs(others, timeout=60)
    outcome.gone_s.append(time.monotonic() - killed_at)
    if alive:
        outcome.problems.append(f"still alive after 60 s: {[process.pid for process in alive]}")
        for process in alive:
            process.kill()


def row(kind: str, outcome: Outcome) -> str:
    def figures(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} / {max(values):.2f}" if values else "-"

    return (
        f"{kind:<12}{outcome.rounds:>7}{outcome.hits:>7}{figures(outcome.free_s):>16}{figures(outcome.gone_s):>16}"
        f"{figures(outcome.next_s):>16}{len(outcome.problems):>10}"
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    outcomes = {kind: Outcome() for kind in VICTIMS}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        bench = Bench(Path(name), is_fake=options.fake)
        spans = {}
        for kind in VICTIMS:
            started = time.monotonic()
            run = bench.start("test_long.py", *(() if kind == "holder" else ("-n", "2")))
            text, _ = run.communicate(timeout=LIMIT_S)
            spans[kind] = time.monotonic() - started
            if run.returncode:
                raise SystemExit(f"a run that nobody disturbs fails:\n{text}")
        for number in range(options.rounds):
            kind = VICTIMS[number % len(VICTIMS)]
            one_round(bench, kind, spans[kind], outcomes[kind])
            print(f"round {number + 1} of {options.rounds}: {kind}", file=sys.stderr, flush=True)
    print(
        f"{'killed':<12}{'rounds':>7}{'hit':>7}{'leases free s':>16}{'workers gone s':>16}{'next run s':>16}"
        f"{'problems':>10}   (median / max)"
    )
    for kind, outcome in outcomes.items():
        print(row(kind, outcome))
    problems = [problem for outcome in outcomes.values() for problem in outcome.problems]
    for problem in problems:
        print(f"PROBLEM {problem}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
