"""Runs and workers on the real GPUs of this machine: `python benchmarks/share_gpus.py [--rounds 50]`. Two GPUs or more.

Makes two tiny models (torch, transformers and pytest-xdist must be installed; no network is used) and looks at six things:
two workers with a model each, one load each and GPUs of their own; two runs at once; a third that is told who has the GPUs;
a GPU that ballast takes in mid-run; two models side by side with --vlm-slots=fit; and what `kill_rounds.py` looks at.
Prints one line each, ending in ok or FAILED, and on a failure what pytest printed. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_command import pytest_command, pytest_environment

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_S = 300
CONFTEST = """
import json, os
from pathlib import Path
import pytest

def pytest_vlmgpu_loaded(config, spec, loaded):
    import torch
    fields = {
        "model": spec.name.rpartition("/")[2],
        "worker": os.environ.get("PYTEST_XDIST_WORKER", "main"),
        "sees": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "torch_counts": torch.cuda.device_count(),
        "gpus": [stage.uuid for stage in loaded.gpus],
        "torch_uuids": [f"GPU-{torch.cuda.get_device_properties(o).uuid}" for o in sorted(set(loaded.device_map.values()))],
        "devices": sorted({str(tensor.device) for tensor in loaded.model.parameters()}),
    }
    with open(os.environ["SHARE_LOG"], "a") as file:
        file.write(json.dumps(fields) + "\\n")
"""
HEADER = "import os, pathlib, subprocess, sys, time\nimport pytest\nfrom pytest_vlmgpu.testing import tiny_image\n"
ONE = """
@pytest.mark.vlm({model!r})
@pytest.mark.parametrize("n", range(3))
def test_{name}(vlm, n): assert len(vlm.generate(tiny_image(64, 48), "What is this?", max_new_tokens=4)) == 4
"""
FREE = """
@pytest.mark.parametrize("n", range(8))
def test_free(n): pass
"""
SLOW = """
@pytest.mark.vlm({model!r})
def test_slow(vlm):
    pathlib.Path({started!r}).touch()
    for _ in range(1200):
        if pathlib.Path({go!r}).exists(): break
        time.sleep(0.1)
"""
BALLAST = """
@pytest.mark.vlm({first!r})
def test_before(vlm):
    run = subprocess.Popen([sys.executable, {ballast!r}, "0.2"], stdin=open({pipe!r}), stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline().startswith("ready")

@pytest.mark.vlm({second!r})
def test_after(vlm): pass
"""


class Failed(Exception):
    """A line that did not hold."""


class Bench:
    """Projects in one folder, with one lease folder; each look has a log of its own."""

    def __init__(self, folder: Path, models: list[str], log: str) -> None:
        self.folder, self.models = folder, models
        self.log = folder / log

    def start(self, name: str, body: str, *arguments: str) -> subprocess.Popen[str]:
        """Start pytest on a project of its own."""
        project = self.folder / name
        project.mkdir(exist_ok=True)
        (project / "conftest.py").write_text(CONFTEST)
        (project / "test_it.py").write_text(HEADER + body)
        return subprocess.Popen(
            pytest_command(*arguments),
            cwd=project,
            env=pytest_environment(SHARE_LOG=str(self.log), VLMGPU_LEASE_DIR=str(self.folder / "leases")),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def loads(self) -> list[dict[str, Any]]:
        """What was loaded since this was last asked."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


def end(run: subprocess.Popen[str], status: int = 0) -> str:
    text, _ = run.communicate(timeout=LIMIT_S)
    if run.returncode != status:
        raise Failed(f"pytest ended with {run.returncode}, not {status}:\n{text}")
    return text


def hold(condition: object, what: str) -> None:
    if not condition:
        raise Failed(what)


def wait_for(path: Path, run: subprocess.Popen[str]) -> None:
    until = time.monotonic() + LIMIT_S
    while not path.exists():
        if run.poll() is not None or time.monotonic() > until:
            raise Failed(f"{path.name} did not come:\n{run.communicate()[0]}")
        time.sleep(0.1)


def two_workers(bench: Bench) -> str:
    first, second = bench.models
    body = ONE.format(model=first, name="first") + FREE + ONE.format(model=second, name="second")
    seen = []
    for options in ([], ["--vlm-gpus=auto"]):
        text = end(bench.start("workers", body, "-n", "2", *options))
        loads = bench.loads()
        hold(
            sorted(load["model"] for load in loads) == sorted(Path(model).name for model in bench.models),
            f"{loads}\n{text}",
        )
        hold(len({load["worker"] for load in loads}) == 2, f"one worker loaded both: {loads}")
        gpus = [set(load["gpus"]) for load in loads]
        hold(gpus[0].isdisjoint(gpus[1]), f"one GPU has two masters: {loads}")
        for load in loads:
            hold(load["gpus"] == load["torch_uuids"], f"torch is elsewhere: {load}")
            hold(set(load["gpus"]) <= set((load["sees"] or "").split(",")), f"it is not masked: {load}")
            hold(load["torch_counts"] == len(load["sees"].split(",")), f"the mask came too late: {load}")
        seen.append(loads)
    return f"one load each: {[(load['worker'], load['model'], load['gpus']) for load in seen[0]]}"


def two_runs(bench: Bench) -> str:
    names = ("one", "two")
    runs = {}
    go = bench.folder / "go"
    try:
        for name, model in zip(names, bench.models, strict=True):
            started = bench.folder / f"{name}-started"
            runs[name] = bench.start(f"run-{name}", SLOW.format(model=model, started=str(started), go=str(go)))
            wait_for(started, runs[name])
        third = bench.start("run-three", ONE.format(model=bench.models[0], name="three"), f"--vlm-gpus={gpu_count()}")
        told = end(third, status=1)
        hold("VLM730" in told and f"pid {runs['one'].pid}" in told, told)
        hold("skipped" not in told.splitlines()[-1], told)
    finally:
        go.touch()
        texts = [end(run) for run in runs.values()]
    loads = bench.loads()
    hold(set(loads[0]["gpus"]).isdisjoint(loads[1]["gpus"]), f"both runs on one GPU: {loads}\n{texts}")
    return f"{[load['gpus'] for load in loads]}; a third run was told who has them"


def ballast(bench: Bench) -> str:
    pipe = bench.folder / "pipe"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    # Open for both, so that neither side waits; closing it ends the ballast.
    handle = os.open(pipe, os.O_RDWR)
    program = str(Path(__file__).with_name("ballast.py"))
    first, second = bench.models
    body = BALLAST.format(first=first, second=second, ballast=program, pipe=str(pipe))
    try:
        text = end(bench.start("ballast", body, "--vlm-gpus=1", "-rs"), status=1)
    finally:
        writer = os.open(pipe, os.O_WRONLY)
        os.close(writer)
        os.close(handle)
    hold("1 passed, 1 error" in text, text)
    hold("VLM711" in text, text)
    bench.loads()
    return next(line.strip() for line in text.splitlines() if "VLM711:" in line)[:200]


def side_by_side(bench: Bench) -> str:
    first, second = bench.models
    body = ONE.format(model=first, name="first") + ONE.format(model=second, name="second")
    text = end(bench.start("slots", body, "--vlm-slots=fit", "--vlm-gpus=1", "--vlm-wait=60"))
    hold(len(bench.loads()) == 2, text)
    hold("did not come back" not in text and "still held" not in text, text)
    return "two models on one GPU"


def gone_again(bench: Bench) -> str:
    first, second = bench.models
    body = ONE.format(model=first, name="first") + ONE.format(model=second, name="second")
    text = end(bench.start("return", body, "--vlm-gpus=1", "--vlm-wait=60"))
    hold("did not come back" not in text and "still held" not in text, text)
    kept = "KEPT = []\n" + ONE.format(model=first, name="first").replace("assert", "KEPT.append(vlm.model); assert")
    text = end(bench.start("kept", kept + ONE.format(model=second, name="second"), "--vlm-gpus=1", "--vlm-wait=60"))
    bench.loads()
    hold("still held by" in text and "KEPT" in text, text)
    return next(line for line in text.splitlines() if "still held by" in line)[-120:]


def gpu_count() -> int:
    from vlm_doctor.sources import collect
    from vlm_doctor.visibility import visible_gpus

    return len(visible_gpus(collect(with_torch=False)).gpus)


def line_of(look: Callable[[Bench], str], folder: Path, models: list[str]) -> tuple[str, bool]:
    """What to print of one look, and whether all held."""
    started = time.monotonic()
    try:
        result, is_ok = f"ok       {look(Bench(folder, models, f'{look.__name__}.log'))}", True
    except Exception as error:  # noqa: BLE001 - every other line is still wanted
        result, is_ok = f"FAILED   {type(error).__name__}: {error}", False
    return f"{look.__name__:<14}{time.monotonic() - started:6.1f} s  {result}", is_ok


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=50, help="of kill_rounds.py; 0 leaves it out")
    options = parser.parse_args()
    if gpu_count() < 2:
        print("needs two GPUs, not run")
        return 3
    from pytest_vlmgpu.testing import make_tiny_vlm

    failures, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        models = [str(make_tiny_vlm(folder / family, family)) for family in ("llava", "qwen2_vl")]
        # The last two want one GPU each, and wait for each other where there is only one.
        for together in ((two_workers,), (two_runs,), (ballast,), (side_by_side, gone_again)):
            with ThreadPoolExecutor() as pool:
                for line, is_ok in pool.map(partial(line_of, folder=folder, models=models), together):
                    failures += not is_ok
                    print(line, flush=True)
    if options.rounds:
        program = [sys.executable, str(Path(__file__).with_name("kill_rounds.py")), "--rounds", str(options.rounds)]
        failures += bool(subprocess.run(program, check=False).returncode)
    print(f"{failures} failed, {time.monotonic() - started:.0f} s in all")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
