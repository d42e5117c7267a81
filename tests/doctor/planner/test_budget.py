from __future__ import annotations

import msgspec
import pytest

from vlm_doctor.machine import Gpu, GpuProcess, Host, Machine
from vlm_doctor.planner.budget import CONTEXT_BYTES, WORKSPACE_BYTES, Exclusion, budgets
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Policy

from .profiles import gpu, machine


def only(*gpus: Gpu, **fields: object) -> Machine:
    return msgspec.structs.replace(machine([]), gpus=gpus, **fields)


def test_a_partly_taken_gpu_is_accounted_to_the_byte() -> None:
    (budget,) = budgets(machine([12], total_gib=24), Policy(headroom_fraction=0.05)).usable
    assert budget.total_bytes == 24 * GIB
    assert budget.driver_bytes == 200 * MIB
    assert budget.others_bytes == 12 * GIB - 200 * MIB
    assert budget.free_bytes == 12 * GIB
    assert budget.headroom_bytes == -(-12 * GIB // 20)
    assert budget.headroom_source == "policy: 5% of the free memory"
    assert budget.context_source == "measured on an H200"
    assert budget.available_bytes == 12 * GIB - CONTEXT_BYTES - WORKSPACE_BYTES - budget.headroom_bytes
    assert budget.without_others().free_bytes == 24 * GIB - 200 * MIB


def test_without_others_the_headroom_is_that_of_an_empty_gpu() -> None:
    (budget,) = budgets(machine([12], total_gib=24), Policy(headroom_fraction=0.05)).usable

    assert budget.without_others().headroom_bytes == -(-(24 * GIB - 200 * MIB) // 20)


def test_the_policy_sets_context_and_least_headroom() -> None:
    (budget,) = budgets(machine([8]), Policy(context_bytes=7 * MIB, headroom_min_bytes=GIB)).usable
    assert (budget.context_bytes, budget.context_source) == (7 * MIB, "policy")
    assert (budget.headroom_bytes, budget.headroom_source) == (GIB, "policy: least headroom")


def test_a_driver_share_that_is_unknown_counts_with_the_others() -> None:
    (budget,) = budgets(only(gpu(0, 20 * GIB, 24 * GIB, memory_reserved_bytes=None)), Policy()).usable
    assert (budget.driver_bytes, budget.others_bytes) == (0, 4 * GIB)


@pytest.mark.parametrize(("free", "reserved"), [(24 * GIB, 200 * MIB), (30 * GIB, 0)])
def test_figures_that_contradict_each_other_never_make_others_negative(free: int, reserved: int) -> None:
    (budget,) = budgets(only(gpu(0, free, 24 * GIB, memory_reserved_bytes=reserved)), Policy()).usable
    assert (budget.driver_bytes, budget.others_bytes, budget.free_bytes) == (0, 0, 24 * GIB)


PROCESS = GpuProcess(pid=7, kind="compute")


@pytest.mark.parametrize(
    ("fields", "reason", "is_permanent"),
    [
        ({"error": "GPU is lost"}, "fails when asked (GPU is lost)", False),
        ({"mig_enabled": True}, "MIG is enabled, and a slice cannot be joined with other GPUs", True),
        ({"compute_mode": "prohibited"}, "its compute mode is prohibited", True),
        (
            {"compute_mode": "exclusive_process", "processes": (PROCESS,)},
            "its compute mode is exclusive_process and a process uses it",
            False,
        ),
        ({"memory_free_bytes": None}, "its free memory is unknown", False),
        ({"memory_total_bytes": None}, "its free memory is unknown", False),
        ({"has_unified_memory": True}, "its free memory is unknown", False),
    ],
)
def test_a_gpu_that_cannot_be_used_is_left_out_with_its_reason(
    fields: dict[str, object], reason: str, is_permanent: bool
) -> None:
    found = budgets(only(gpu(0, GIB, GIB), gpu(1, GIB, GIB, **fields)), Policy())
    assert [budget.gpu.index for budget in found.usable] == [0]
    assert found.excluded == (Exclusion(1, reason, is_permanent),)


def test_an_exclusive_gpu_that_nobody_uses_is_usable() -> None:
    found = budgets(only(gpu(0, GIB, GIB, compute_mode="exclusive_process")), Policy())
    assert len(found.usable) == 1


def test_hidden_gpus_are_left_out_and_those_not_asked_for_are_not_mentioned() -> None:
    hidden = machine([8, 8, 8], environment={"CUDA_VISIBLE_DEVICES": "2,1"})
    found = budgets(hidden, Policy(gpus=(0, 2)))
    assert [budget.gpu.index for budget in found.usable] == [2]
    assert found.excluded == (Exclusion(0, "hidden by CUDA_VISIBLE_DEVICES", True),)


def test_a_gpu_without_memory_of_its_own_takes_the_hosts_once() -> None:
    host = Host(os="Linux", kernel="6", memory_total_bytes=128 * GIB, memory_available_bytes=100 * GIB)
    shared = [gpu(index, None, None, has_unified_memory=True) for index in (0, 1)]
    found = budgets(only(*shared, host=host), Policy())
    (budget,) = found.usable
    assert (budget.total_bytes, budget.free_bytes, budget.driver_bytes) == (128 * GIB, 100 * GIB, 0)
    assert budget.total_source == "host memory (the GPU has none of its own)"
    assert found.excluded == (Exclusion(1, "a GPU that is used already has the host's memory", True),)


def test_a_limit_for_our_process_is_headroom_beyond_it() -> None:
    policy = Policy(max_memory=((0, 5 * GIB), (1, 50 * GIB)), headroom_fraction=0.02)
    capped, roomy = budgets(machine([8, 8]), policy).usable
    assert capped.available_bytes == 5 * GIB - CONTEXT_BYTES - WORKSPACE_BYTES
    assert (capped.headroom_bytes, capped.headroom_source) == (3 * GIB, "policy: at most 5.0 GiB for this process")
    assert roomy.headroom_source == "policy: least headroom"
    assert roomy.available_bytes == budgets(machine([8]), Policy()).usable[0].available_bytes


def test_gpus_that_are_excluded_are_not_spoken_of() -> None:
    found = budgets(machine([8, 8, 8]), Policy(exclude=(1,)))
    assert [budget.gpu.index for budget in found.usable] == [0, 2]
    assert found.excluded == ()


def test_gpus_with_a_fault_can_be_spared() -> None:
    there = machine([8, 8, 8])
    gpus = tuple(msgspec.structs.replace(each, remap_pending=each.index != 1) for each in there.gpus)
    found = budgets(msgspec.structs.replace(there, gpus=gpus), Policy())
    assert [budget.fault for budget in found.usable] == ["row remapping is pending", None, "row remapping is pending"]
    spared = found.sparing({2})
    assert [budget.gpu.index for budget in spared.usable] == [1, 2]
    assert spared.excluded == (Exclusion(0, "row remapping is pending, and the others suffice", is_permanent=False),)
    whole = budgets(machine([8]), Policy())
    assert whole.sparing() == whole
