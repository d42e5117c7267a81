"""After a lease was waited for, the machine is read again: until then others had the memory of its GPUs."""

from __future__ import annotations

from threading import Timer
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu.leasing.leases import Leases

from .projects import UUIDS, with_workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from .projects import Project

SEEN = """
import time
TAKEN = []

def pytest_vlmgpu_lease(config, event, gpus, reason):
    if event == "taken": TAKEN.append(time.monotonic())

def pytest_vlmgpu_inventory(config):
    from msgspec.structs import replace
    machine = from_json((FOLDER / "machine.json").read_bytes(), Machine, where="machine.json")
    is_free = TAKEN and time.monotonic() - TAKEN[0] > 0.3  # as a driver gives memory back
    free_bytes = (22 if is_free else 1) * 2**30
    return replace(machine, gpus=tuple(replace(gpu, memory_free_bytes=free_bytes) for gpu in machine.gpus))
"""


@pytest.mark.parametrize("is_marked", [True, False], ids=["marker", "model"])
def test_memory_of_who_had_the_gpu_before_is_not_held_against_a_test(
    suite: Any, gpu: Callable[..., Any], machine: Callable[..., Any], is_marked: bool
) -> None:
    suite.has(machine(gpu(0)))
    suite.configure(SEEN, without="vlm_machine")
    others = Leases(suite.folder / "leases")
    assert others.take(UUIDS[:1]) == {}
    release = Timer(0.4, others.release)
    release.start()
    marked = "@pytest.mark.vlm_requires(vram_gib=10)\ndef test_x(): pass"
    model = "@pytest.mark.vlm('org/a')\ndef test_x(vlm): pass"

    try:
        result = suite.run(test_x=f"import pytest\n{marked if is_marked else model}")
    finally:
        release.join()
        others.release()

    result.assert_outcomes(passed=1)


@with_workers
@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["alone", "worker"])
def test_a_run_that_ended_just_before_has_time_to_give_its_memory_back(
    make: Callable[..., Project], workers: list[str]
) -> None:
    project = make(gpus=1)
    project.conftest = """
_all_of_it = pytest_vlmgpu_inventory
READ = []
def pytest_vlmgpu_inventory(config):
    READ.append(time.monotonic())
    machine = _all_of_it(config)
    free_bytes = (20 if time.monotonic() - READ[0] > 0.3 else 1) * 2**30
    return replace(machine, gpus=tuple(replace(gpu, memory_free_bytes=free_bytes) for gpu in machine.gpus))
"""

    text, counts = project.run(
        *workers, test_x="import pytest\n@pytest.mark.vlm_requires(vram_gib=10)\ndef test_x(): pass\n"
    )

    assert counts == {"passed": 1}, text
