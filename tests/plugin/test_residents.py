"""Which model goes when the next one needs room, whether its memory came back."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from pytest_vlmgpu.models.loads import Load
from pytest_vlmgpu.models.residents import CONTEXT_BYTES, Resident, Residents, free_before
from pytest_vlmgpu.requirements import VlmSpec
from pytest_vlmgpu.watching.meter import Meter
from vlm_doctor.machine import Gpu, GpuProcess, Machine
from vlm_doctor.units import GIB

A, B, C = (VlmSpec(f"org/{name}") for name in "abc")


def resident(spec: VlmSpec, log: list[str] | None = None, before: dict[str, int] | None = None) -> Resident:
    stack = ExitStack()
    stack.callback((log if log is not None else []).append, spec.name)
    return Resident(spec, None, object(), Load(spec.label, "GPU 0", 1.0), stack, Meter(), before or {})


def machine(free_gib: float, *processes: GpuProcess) -> Machine:
    gpu = Gpu(index=0, uuid="GPU-0", name="L4", memory_free_bytes=int(free_gib * GIB), processes=processes)
    return Machine(origin="live", description="", gpus=(gpu,))


def loaded(*specs: VlmSpec) -> tuple[Residents, list[str]]:
    residents, log = Residents(), []  # type: tuple[Residents, list[str]]
    for spec in specs:
        residents.add(resident(spec, log))
    return residents, log


def test_the_model_that_is_needed_last_goes_first() -> None:
    residents, log = loaded(A, B, C)
    residents.uses, residents.now = {A: [0, 9], B: [1, 5], C: [2, 7]}, 3

    while residents.remove_least_useful():
        pass

    assert log == ["org/a", "org/c", "org/b"]
    assert len(residents) == 0
    assert not residents.remove_least_useful()


def test_the_model_that_nobody_needs_goes_before_all() -> None:
    residents, log = loaded(A, B)
    residents.uses, residents.now = {A: [0, 9], B: [1]}, 1

    residents.remove_least_useful()

    assert log == ["org/b"]
    assert residents.get(A) is not None
    assert residents.next_use(B) == math.inf


@given(st.lists(st.sampled_from([A, B, C])), st.integers(-1, 20))
def test_the_next_use_is_the_first_that_is_still_to_come(order: list[VlmSpec], now: int) -> None:
    residents = Residents()
    residents.uses = {spec: [at for at, used in enumerate(order) if used == spec] for spec in order}
    residents.now = now

    for spec in (A, B, C):
        position = residents.next_use(spec)
        assert position == math.inf or (position > now and order[int(position)] == spec)
        assert spec not in order[now + 1 : len(order) if position == math.inf else int(position)]


def test_memory_that_is_missing_is_that_of_the_last_model() -> None:
    residents = Residents()
    gone = resident(A, before={"GPU-0": 20 * GIB})
    residents.add(gone)
    residents.remove(gone)

    assert residents.missing(machine(12)) == 8 * GIB - CONTEXT_BYTES
    assert gone.load.missing_bytes == 7 * GIB
    assert residents.missing(machine(19.5)) == 0, "a CUDA context stays, and is no leak"
    assert gone.load.missing_bytes == 0, "what came back late is not missing"
    residents.settle()
    assert residents.missing(machine(0)) == 0


def test_memory_that_others_took_meanwhile_is_not_missing() -> None:
    residents = Residents()
    gone = resident(A, before={"GPU-0": 20 * GIB})
    residents.add(gone)
    residents.remove(gone)

    assert residents.missing(machine(5, GpuProcess(pid=1, kind="compute", used_bytes=15 * GIB))) == 0
    assert residents.missing(machine(5, GpuProcess(pid=os.getpid(), kind="compute", used_bytes=15 * GIB))) == 14 * GIB


def test_beside_another_model_nobody_can_tell() -> None:
    residents = Residents()
    gone = resident(A, before={"GPU-0": 20 * GIB})
    residents.add(gone)
    residents.add(resident(B))
    residents.remove(gone)

    assert residents.missing(machine(0)) == 0


def test_without_a_plan_no_memory_is_expected() -> None:
    assert free_before(None, machine(3)) == {}
