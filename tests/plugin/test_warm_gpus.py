"""Runs on a machine whose GPUs hold warm models: these give way, count as free, and are in nobody's way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from pytest_vlmgpu.leasing.leases import Leases
from pytest_vlmgpu.warm.hosts import Hosts
from pytest_vlmgpu.warm.places import Place, folder_for, records
from pytest_vlmgpu.warm.records import Order

from ..until import is_running, until
from .projects import ONE_MODEL, UUIDS, is_held, with_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .projects import Project

MEMORY = """
import pytest
@pytest.mark.vlm_requires(vram_gib=20)
def test_needs_memory(): pass
"""
SMALL = """
import pytest
@pytest.mark.vlm_requires(gpus=1)
def test_needs_a_gpu(): pass
"""


class Host:
    """A warm host with 20 of the 22 GiB of the first GPU, of a model that nobody can attach to."""

    def __init__(self, shared: Path, label: str, gpus: int = 1) -> None:
        self.gpus = UUIDS[:gpus]
        self.leases = shared / "leases"
        self.place = Place(folder_for(str(self.leases)), "d")
        order = Order(
            digest="d",
            facts={},
            label=label,
            name=label,
            dtype=None,
            plan=None,
            gpus=tuple(self.gpus),
            lease_dir=str(self.leases),
            ttl_s=300.0,
        )
        (shared / "order").write_bytes(msgspec.json.encode(order))
        with (shared / "order").open("rb") as file, (shared / "log of host").open("wb") as log:
            command = [sys.executable, str(Path(__file__).with_name("warm_stub.py")), str(shared)]
            environment = {**os.environ, "SHARED_PROJECT": str(shared)}
            subprocess.run(command, stdin=file, stdout=log, stderr=log, env=environment, start_new_session=True, check=True)
        self.pid = records(self.place.folder)[0].pid
        self.until_it_has_its_lease()

    def until_it_has_its_lease(self) -> None:
        leases = Leases(self.leases)
        until(lambda: is_held(leases, *self.gpus, by="warm host"))

    @property
    def is_alive(self) -> bool:
        return bool(Hosts(self.place.folder).alive())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def host(label: str = "org/other", **options: int) -> Host:
        made.append(Host(tmp_path, label, **options))
        return made[-1]

    yield host
    for each in made:
        if is_running(each.pid):
            os.kill(each.pid, signal.SIGKILL)
        shutil.rmtree(each.place.folder, ignore_errors=True)


@pytest.mark.parametrize("test", [ONE_MODEL, MEMORY, SMALL], ids=["model", "memory", "small"])
def test_an_idle_host_gives_way_to_a_run_that_knows_nothing_of_it(
    make: Callable[..., Project], start: Callable[..., Host], test: str
) -> None:
    project = make(gpus=1)
    host = start()

    text, counts = project.run(test_x=test)

    assert set(counts) == {"passed"}, text
    assert not host.is_alive
    assert host.place.why_ended() == "another run wants the GPUs"


@pytest.mark.parametrize("lease", ["off", "run"])
@pytest.mark.parametrize("test", [ONE_MODEL, MEMORY], ids=["model", "memory"])
def test_an_idle_host_gives_way_to_a_run_that_leases_nothing(
    make: Callable[..., Project], start: Callable[..., Host], test: str, lease: str
) -> None:
    project = make(gpus=1)
    host = start()

    text, counts = project.run(f"--vlm-lease={lease}", test_x=test)

    assert set(counts) == {"passed"}, text
    assert not host.is_alive


def test_a_free_gpu_is_taken_before_one_with_a_warm_model(make: Callable[..., Project], start: Callable[..., Host]) -> None:
    project = make(gpus=2)
    host = start()

    for options in ([], ["--vlm-warm"]):
        text, counts = project.run(*options, test_x=ONE_MODEL)
        assert counts == {"passed": 2}, text
        host.until_it_has_its_lease()

    assert [load["gpus"] for load in project.loads()] == ["1", "1"]
    assert host.is_alive


def test_the_gpu_of_the_wanted_model_is_taken_first(make: Callable[..., Project], start: Callable[..., Host]) -> None:
    project = make(gpus=2)
    host = start("org/a")

    text, counts = project.run("--vlm-warm", test_x=ONE_MODEL)

    assert counts == {"passed": 2}, text
    assert [load["gpus"] for load in project.loads()] == ["0"]
    # This project loads its models itself, so that there was no room for both.
    assert "not kept: it is loaded by a loader of the project's own" in text
    assert not host.is_alive


def test_a_model_that_fits_beside_a_warm_one_leaves_it_alone(
    make: Callable[..., Project], start: Callable[..., Host]
) -> None:
    project = make(gpus=1)
    host = start()
    (project.shared / "memory" / f"{UUIDS[0]}.{host.pid}").write_text(str(2**30))

    text, counts = project.run("--vlm-warm", test_x=ONE_MODEL)

    assert counts == {"passed": 2}, text
    assert host.is_alive
    host.until_it_has_its_lease()


@pytest.mark.parametrize("options", [[], ["--vlm-warm"]], ids=["cold", "warm"])
def test_memory_of_warm_models_counts_when_a_wide_model_asks_how_many_gpus_it_needs(
    make: Callable[..., Project], start: Callable[..., Host], options: list[str]
) -> None:
    project = make(gpus=2)
    host = start(gpus=2)

    text, counts = project.run(*options, test_x=ONE_MODEL.replace("org/a", "org/wide"))

    assert counts == {"passed": 2}, text
    assert [load["gpus"] for load in project.loads()] == ["0,1"]
    assert not host.is_alive


@pytest.mark.parametrize("test", [ONE_MODEL, MEMORY], ids=["model", "memory"])
def test_a_warm_model_ends_where_its_memory_is_needed(
    make: Callable[..., Project], start: Callable[..., Host], test: str
) -> None:
    project = make(gpus=1)
    host = start()

    text, counts = project.run("--vlm-warm", test_x=test)

    assert set(counts) == {"passed"}, text
    assert not host.is_alive


def test_a_test_that_needs_no_memory_leaves_it_alone(make: Callable[..., Project], start: Callable[..., Host]) -> None:
    project = make(gpus=1)
    host = start()

    text, counts = project.run("--vlm-warm", test_x=SMALL)

    assert counts == {"passed": 1}, text
    assert host.is_alive


@with_workers
def test_the_controller_takes_the_leases_for_its_workers(make: Callable[..., Project], start: Callable[..., Host]) -> None:
    project = make(gpus=2)
    host = start("org/a")
    two = ONE_MODEL + "@pytest.mark.vlm('org/b')\ndef test_b(vlm): pass\n"

    text, counts = project.run("-n2", "--vlm-warm", test_x=two)

    assert counts == {"passed": 3}, text
    assert sorted(load["gpus"] for load in project.loads()) == ["0", "1"]
    assert not host.is_alive


def test_a_run_that_is_killed_leaves_the_leases_to_the_host(
    make: Callable[..., Project], start: Callable[..., Host]
) -> None:
    project = make(gpus=1)
    host = start()
    slow = SMALL.replace("pass", "open('started', 'w').close(); __import__('time').sleep(300)")
    run = project.start("--vlm-warm", test_x=slow)
    until((project.folder / "started").exists)

    run.kill()
    run.communicate()

    host.until_it_has_its_lease()
    assert host.is_alive
