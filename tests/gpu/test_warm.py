"""Warm models on real GPUs, with a tiny model or the one that VLMGPU_MODEL names. Run by hand, and look at the times:

``pytest -m gpu tests/gpu/test_warm.py -rA``
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from pytest_vlmgpu.testing import make_tiny_vlm  # noqa: E402
from pytest_vlmgpu.warm.hosts import Hosts  # noqa: E402
from pytest_vlmgpu.warm.places import folder_for  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

if torch.cuda.device_count() < 1:
    pytest.skip("needs a GPU", allow_module_level=True)

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
def test_zeroes(vlm):
    with torch.no_grad(): next(vlm.model.parameters()).zero_()
def test_finds_it_whole(vlm): assert next(vlm.model.parameters()).abs().sum() > 0
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
MUTATES = """
import pytest, torch
@pytest.mark.vlm_mutates
def test_trains(vlm):
    with torch.no_grad():
        for parameter in vlm.model.parameters(): parameter.mul_(0.5)
"""


class Project:
    """Runs in one folder, with leases and warm hosts of its own."""

    def __init__(self, folder: Path, model: str, config: pytest.Config) -> None:
        self.folder = folder
        self.model = model
        self.leases = folder / "leases"
        self.hosts = Hosts(folder_for(str(self.leases)))
        # The project need not be installed.
        plugin = [] if config.pluginmanager.has_plugin("vlmgpu") else ["-p", "pytest_vlmgpu.plugin"]
        self.command = [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", f"--vlm-model={model}"]

    def start(self, suite: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        (self.folder / "test_x.py").write_text(suite)
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "VLMGPU_"))}
        return subprocess.Popen(
            [*self.command, *(arguments or ["--vlm-warm"])],
            cwd=self.folder,
            env={**outer, "VLMGPU_LEASE_DIR": str(self.leases), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, suite: str, *arguments: str, **environment: str) -> str:
        started = time.perf_counter()
        text, _ = self.start(suite, *arguments, **environment).communicate()
        sys.stdout.write(f"{text}\n{time.perf_counter() - started:.1f} s for the whole run\n")
        return text

    def read(self) -> str:
        return (self.folder / "read.txt").read_text()

    def pids(self) -> list[int]:
        return [status.pid for record in self.hosts.alive() if (status := self.hosts.status(record)) is not None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    named = os.environ.get("VLMGPU_MODEL") or os.environ.get("PYTEST_VLMGPU_MODEL")
    return named or str(make_tiny_vlm(tmp_path_factory.mktemp("model"), "llava"))


@pytest.fixture
def project(tmp_path: Path, model: str, request: pytest.FixtureRequest) -> Iterator[Project]:
    made = Project(tmp_path, model, request.config)
    yield made
    for record in made.hosts.alive():
        made.hosts.end(record)
    shutil.rmtree(folder_for(str(made.leases)))


def until_there(path: Path, run: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)


def test_the_next_run_attaches_and_answers_the_same(project: Project) -> None:
    free = torch.cuda.mem_get_info(0)[0]
    plain = project.run(READS, "-q")
    assert "1 passed" in plain
    wanted = project.read()

    first = project.run(READS)
    assert "cold this time: there was no warm model" in first
    assert project.read() == wanted
    for _ in range(3):
        again = project.run(READS)
        assert "1 passed" in again
        assert ": attached in" in again
        assert project.read() == wanted
    assert project.run(READS, "--vlm-warm", "--vlm-cold").count("cold this time: --vlm-cold") == 1

    for record in project.hosts.alive():
        assert project.hosts.end(record) == ""
    assert torch.cuda.mem_get_info(0)[0] > free - 2**29


def test_changed_weights_are_never_lent(project: Project) -> None:
    project.run(READS)
    wanted = project.read()

    text = project.run(WRITES)
    assert "VLM750" in text
    assert "2 passed, 1 error" in text
    assert "cold this time: a run before has changed its weights" in text
    project.run(READS)
    assert project.read() == wanted

    assert "1 passed" in project.run(MUTATES)
    text = project.run(READS)
    assert "cold this time" in text
    assert project.read() == wanted


def test_a_run_that_is_killed_after_it_has_written(project: Project) -> None:
    project.run(READS)
    wanted = project.read()
    (project.folder / "zero").touch()
    run = project.start(HANGS)
    until_there(project.folder / "has", run)

    run.kill()
    run.communicate()

    text = project.run(READS)
    assert "cold this time: a run before has changed its weights" in text
    assert project.read() == wanted


def test_a_run_that_is_killed_and_has_only_read(project: Project) -> None:
    project.run(READS)
    wanted = project.read()
    for _ in range(5):
        (project.folder / "has").unlink(missing_ok=True)
        run = project.start(HANGS)
        until_there(project.folder / "has", run)
        run.kill()
        run.communicate()

    assert ": attached in" in project.run(READS)
    assert project.read() == wanted


def test_a_host_that_is_killed_under_a_run_is_said(project: Project) -> None:
    project.run(READS)
    run = project.start(HANGS)
    until_there(project.folder / "has", run)

    os.kill(project.pids()[0], signal.SIGKILL)
    (project.folder / "go").touch()
    text, _ = run.communicate()

    sys.stdout.write(text)
    assert "VLM712: the warm host of" in text
    assert "1 passed" in project.run(READS)


def test_a_run_without_the_option_gets_the_gpu(project: Project) -> None:
    project.run(READS)

    text = project.run(READS, "--vlm-strict")

    assert "1 passed" in text
    assert project.pids() == []


def test_expandable_segments_are_refused(project: Project) -> None:
    text = project.run(READS, "--vlm-warm", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")

    assert "1 passed" in text
    assert "not kept: PYTORCH_CUDA_ALLOC_CONF has expandable_segments on" in text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_sharded_model_has_its_hooks_again(project: Project) -> None:
    sharded = READS.replace("def test", "import pytest\n@pytest.mark.vlm_requires(gpus=2)\ndef test")
    sharded += "    assert len(vlm.ordinals) == 2 and len({p.device for p in vlm.model.parameters()}) == 2\n"
    plain = project.run(sharded, "-q")
    assert "1 passed" in plain
    wanted = project.read()

    project.run(sharded)
    text = project.run(sharded)

    assert ": attached in" in text
    assert project.read() == wanted


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_numbering_of_the_gpus_is_no_other_gpu(project: Project) -> None:
    uuids = [f"GPU-{torch.cuda.get_device_properties(ordinal).uuid}" for ordinal in range(2)]
    first = project.run(READS, "--vlm-warm", CUDA_VISIBLE_DEVICES=",".join(uuids))
    assert "1 passed" in first

    second = project.run(READS, "--vlm-warm", CUDA_VISIBLE_DEVICES=",".join(reversed(uuids)))

    assert ": attached in" in second
