"""Warm models on real GPUs, with a tiny model or the one that VLMGPU_MODEL names, and the figures with one of zeros.

``pytest -m gpu tests/gpu/test_warm.py -rA`` takes a minute or two, and prints the times and the memory. What goes on at the
same time is apart: each story has a folder of leases, and so warm hosts, of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from .nested import start_suite
from .zeros import LAYER_BYTES, make_model_of_zeros

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from pytest_vlmgpu.testing import make_tiny_vlm  # noqa: E402
from pytest_vlmgpu.warm.hosts import Hosts  # noqa: E402
from pytest_vlmgpu.warm.places import folder_for  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

if torch.cuda.device_count() < 1:
    pytest.skip("needs a GPU", allow_module_level=True)

GIB = 2**30
LIMIT_S = 150
"""Of one run inside of this one: some seconds, unless something hangs."""
MOST_LAYERS = 16
"""Of zeros: 7.2 GiB."""
CONTEXT_BYTES = 2**30
READS = """
import torch
from pathlib import Path
def test_reads(vlm, vlm_vram):
    assert all(parameter.is_cuda for parameter in vlm.model.parameters())
    answer = vlm.generate(None, "Say yes.", max_new_tokens=4)
    with torch.no_grad():
        sums = [parameter.double().sum().item() for parameter in vlm.model.parameters()]
    Path("read.txt").write_text(repr((answer, sums)))
    weights = sum(parameter.nbytes for parameter in vlm.model.parameters())
    assert vlm_vram.used_gib >= 0.99 * weights / 2**30
"""
WRITES = """
import pytest, torch
SEEN = []
def look(vlm):
    with torch.no_grad(): return [parameter.double().sum().item() for parameter in vlm.model.parameters()]
def test_looks(vlm): SEEN.append(look(vlm))
def test_zeroes(vlm):
    with torch.no_grad(): next(vlm.model.parameters()).zero_()
def test_finds_it_whole(vlm): assert look(vlm) == SEEN[0]
@pytest.mark.vlm_mutates
def test_trains(vlm):
    with torch.no_grad():
        for parameter in vlm.model.parameters(): parameter.mul_(0.5)
@pytest.mark.vlm_mutates
def test_finds_it_whole_again(vlm): assert look(vlm) == SEEN[0]
"""
HANGS = """
import torch, time
from pathlib import Path
def test_hangs(vlm):
    if Path("zero").exists():
        with torch.no_grad(): next(vlm.model.parameters()).zero_()
        torch.cuda.synchronize()
    Path("has").touch()
    while not Path("go").exists(): time.sleep(0.05)
"""
FIGURES = """
import json, time, torch
from pathlib import Path
def test_figures(vlm):
    started = time.perf_counter()
    vlm.generate(None, "Say yes.", max_new_tokens=4)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    figures = {"used": total - free, "reserved": torch.cuda.memory_reserved(), "call_s": time.perf_counter() - started}
    Path("figures.json").write_text(json.dumps(figures))
"""


class Project:
    """Runs in one folder, with leases and warm hosts of its own, and all that they have said."""

    def __init__(self, folder: Path, model: str, config: pytest.Config) -> None:
        self.folder = folder
        self.model = model
        self._config = config
        self.place = folder_for(str(folder / "leases"))
        self.hosts = Hosts(self.place)
        self._said: list[str] = []

    def start(self, suite: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "VLMGPU_"))}
        options = [f"--vlm-model={self.model}", *(arguments or ["--vlm-warm"])]
        return start_suite(self.folder, suite, self._config, *options, environment={**outer, **environment})

    def finish(self, run: subprocess.Popen[str], what: str) -> str:
        started = time.perf_counter()
        try:
            text, _ = run.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            run.kill()
            text = f"{run.communicate()[0]}\nKILLED after {LIMIT_S} s"
        self._said.append(f"---- {what}: {time.perf_counter() - started:.1f} s, status {run.returncode}\n{text}")
        return text

    def run(self, suite: str, *arguments: str, **environment: str) -> str:
        name = re.findall(r"def (test_\w+)", suite)[0]
        return self.finish(self.start(suite, *arguments, **environment), f"{name} {' '.join(arguments) or '--vlm-warm'}")

    def hang(self) -> subprocess.Popen[str]:
        """A run that has the model, and does not go on."""
        (self.folder / "has").unlink(missing_ok=True)
        run, until = self.start(HANGS), time.monotonic() + LIMIT_S
        while not (self.folder / "has").exists():
            if run.poll() is not None or time.monotonic() > until:
                run.kill()
                self.finish(run, "hangs")
                self.fail("the run that should have had the model")
            time.sleep(0.05)
        return run

    def kill(self, run: subprocess.Popen[str]) -> None:
        run.kill()
        self.finish(run, "was killed while it had the model")

    def read(self) -> str:
        path = self.folder / "read.txt"
        return path.read_text() if path.exists() else "nothing was read"

    def pids(self) -> list[int]:
        return [status.pid for record in self.hosts.alive() if (status := self.hosts.status(record)) is not None]

    def expect(self, text: str, *wanted: str) -> None:
        for each in wanted:
            if each not in text:
                self.fail(f"the last run should have said: {each}")

    def expect_same(self, wanted: str) -> None:
        if self.read() != wanted:
            self.fail(f"read {self.read()[:500]}\nand not {wanted[:500]}")

    def fail(self, why: str) -> NoReturn:
        pytest.fail(f"{why}\n\n{self.said()}\n\n{why}", pytrace=False)

    def said(self) -> str:
        """What the runs have said, and the hosts."""
        logs = [f"---- log of host {path.name}\n{path.read_text(errors='replace')}" for path in self.place.glob("*.log")]
        notes = [f"---- {path.name}: {path.read_text(errors='replace')}" for path in self.place.glob("*.ended")]
        notes += [f"---- {path.name}: {path.read_text(errors='replace')}" for path in self.place.glob("*.refused")]
        return "\n".join([*self._said, *logs, *notes])

    def end(self) -> None:
        for record in self.hosts.alive():
            self.hosts.end(record)
        shutil.rmtree(self.place, ignore_errors=True)


def reads_the_same_whoever_was_killed(project: Project) -> None:
    project.expect(project.run(READS, "-q"), "1 passed")
    wanted = project.read()
    project.expect(project.run(READS), "1 passed", "cold this time: there was no warm model")
    project.expect_same(wanted)
    hosts = project.pids()

    project.kill(project.hang())
    project.expect(project.run(READS), "1 passed", ": attached in")
    project.expect_same(wanted)
    project.kill(project.hang())
    project.expect(project.run(READS), "1 passed", ": attached in")
    if project.pids() != hosts:
        project.fail(f"the host was {hosts} and is {project.pids()}")


def never_lends_changed_weights(project: Project) -> None:
    project.expect(project.run(READS), "1 passed")
    wanted = project.read()

    text = project.run(WRITES)
    project.expect(text, "VLM750", "5 passed, 1 error", ": attached in")
    if text.count("cold this time: a run before has changed its weights") != 2:
        project.fail("both loads after a change should have been cold")
    project.expect(project.run(READS), "1 passed", ": attached in")
    project.expect_same(wanted)
    project.expect(project.run(READS, "--vlm-warm", "--vlm-cold"), "1 passed", "cold this time: --vlm-cold")
    project.expect_same(wanted)


def survives_a_killed_writer_and_a_killed_host(project: Project) -> None:
    project.expect(project.run(READS), "1 passed")
    wanted = project.read()
    (project.folder / "zero").touch()
    project.kill(project.hang())
    (project.folder / "zero").unlink()
    project.expect(project.run(READS), "1 passed", "cold this time: a run before has changed its weights")
    project.expect_same(wanted)

    run = project.hang()
    for pid in project.pids():
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    (project.folder / "go").touch()
    project.expect(project.finish(run, "has lost its host"), "VLM712: the warm host of")
    project.expect(project.run(READS), "1 passed", "cold this time: its warm host was killed")
    project.expect_same(wanted)


def refuses_expandable_segments(project: Project) -> None:
    text = project.run(READS, "--vlm-warm", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    project.expect(text, "1 passed", "not kept: PYTORCH_CUDA_ALLOC_CONF has expandable_segments on")


def has_the_hooks_of_a_sharded_model_again(project: Project) -> None:
    sharded = READS.replace("def test", "import pytest\n@pytest.mark.vlm_requires(gpus=2)\ndef test")
    sharded += "    assert len(vlm.ordinals) == 2 and len({p.device for p in vlm.model.parameters()}) == 2\n"
    project.expect(project.run(sharded, "-q"), "1 passed")
    wanted = project.read()
    project.expect(project.run(sharded), "1 passed", "cold this time")
    project.expect(project.run(sharded), "1 passed", ": attached in")
    project.expect_same(wanted)


def knows_a_gpu_by_any_number(project: Project) -> None:
    uuids = [f"GPU-{torch.cuda.get_device_properties(ordinal).uuid}" for ordinal in range(2)]
    project.expect(project.run(READS, "--vlm-warm", CUDA_VISIBLE_DEVICES=",".join(uuids)), "1 passed")
    text = project.run(READS, "--vlm-warm", CUDA_VISIBLE_DEVICES=",".join(reversed(uuids)))
    project.expect(text, "1 passed", ": attached in")


STORIES: list[Callable[[Project], None]] = [
    reads_the_same_whoever_was_killed,
    never_lends_changed_weights,
    survives_a_killed_writer_and_a_killed_host,
    refuses_expandable_segments,
]
if torch.cuda.device_count() > 1:
    STORIES += [has_the_hooks_of_a_sharded_model_again, knows_a_gpu_by_any_number]


def told(story: Callable[[Project], None], project: Project) -> str:
    """All that was said in a story, once it has ended."""
    try:
        story(project)
        return project.said()
    except Exception as error:  # noqa: BLE001 - shown with what was said
        project.fail(repr(error))
    finally:
        project.end()


@pytest.fixture(scope="module")
def told_stories(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[dict[Any, Any]]:
    """All of them at once: most of a run is imports."""
    named = os.environ.get("VLMGPU_MODEL") or os.environ.get("PYTEST_VLMGPU_MODEL")
    model = named or str(make_tiny_vlm(tmp_path_factory.mktemp("model"), "llava"))
    # Of a model that has a size there may be room for one at a time.
    with ThreadPoolExecutor(1 if named else len(STORIES)) as pool:
        futures: dict[Any, Future[str]] = {
            story: pool.submit(told, story, Project(tmp_path_factory.mktemp(story.__name__[:20]), model, request.config))
            for story in STORIES
        }
        yield futures


def used_bytes() -> int:
    """Of the first GPU, as the driver counts."""
    free, total = torch.cuda.mem_get_info(0)
    return int(total - free)


def seconds_in(text: str, how: str) -> float:
    found = re.findall(rf": {how} in ([\d.]+) s", text)
    return float(found[0]) if found else float("nan")


def test_a_model_of_some_size_and_the_figures(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    before = used_bytes()  # with this process' own context
    layers = max(1, min(MOST_LAYERS, (torch.cuda.mem_get_info(0)[0] - 4 * GIB) // 2 // LAYER_BYTES))
    first = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    weights = make_model_of_zeros(tmp_path / "model", layers)
    project = Project(tmp_path, str(tmp_path / "model"), request.config)
    lines, runs = [f"weights {weights / GIB:.2f} GiB, {layers} layers"], {}
    try:
        for name, options in (("cold", ()), ("warm", ()), ("again", ()), ("without the option", ("--vlm-strict",))):
            started = time.perf_counter()
            runs[name] = project.run(FIGURES, *options, CUDA_VISIBLE_DEVICES=first)
            project.expect(runs[name], "1 passed")
            figures = json.loads((tmp_path / "figures.json").read_text())
            load_s = min(seconds_in(runs[name], "loaded"), seconds_in(runs[name], "attached"), key=lambda s: (s != s, s))
            idle = used_bytes() - before
            in_use, reserved = (figures["used"] - before) / GIB, figures["reserved"] / GIB
            lines.append(
                f"{name}: model there in {load_s:.2f} s, first call {figures['call_s']:.2f} s, whole run "
                f"{time.perf_counter() - started:.1f} s; GPU memory in use during the run {in_use:.2f} GiB, of which this "
                f"run's allocator {reserved:.2f}; left after the run (warm host) {idle / GIB:.2f} GiB"
            )
            if name == "cold":
                pids = project.pids()
            if name != "without the option" and not weights <= idle <= weights + 2 * CONTEXT_BYTES:
                project.fail(f"an idle host should hold the weights and a context: {idle / GIB:.2f} GiB")
        project.expect(runs["cold"], "cold this time: there was no warm model")
        project.expect(runs["warm"], ": attached in")
        project.expect(runs["again"], ": attached in")
        if project.pids() or not idle < CONTEXT_BYTES // 2:
            project.fail(f"hosts {project.pids()} still hold {idle / GIB:.2f} GiB")
        left = [path.name for pid in pids for path in Path("/dev/shm").glob(f"torch_{pid}_*")]
        if left:
            project.fail(f"files of counters stay in /dev/shm: {left}")
    finally:
        sys.stdout.write("\n".join(["FIGURES", *lines, "", project.said(), ""]))
        project.end()


@pytest.mark.parametrize("story", STORIES, ids=lambda story: str(story.__name__))
def test_story(story: Callable[[Project], None], told_stories: dict[Any, Future[str]]) -> None:
    sys.stdout.write(told_stories[story].result())
