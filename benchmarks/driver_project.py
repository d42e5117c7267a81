"""The conftest of projects whose models are plain memory of the driver: it is copied there, not imported here.

The machine is the real one; a load is a context and an allocation of CUDA's driver API on the planned GPUs. The memory is
as real as that of torch, and a run starts in a second. Each model takes KILL_ROUNDS_SHARE of a GPU, ``org/wide`` of all.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from made_up_plans import SIZES_GIB, place

from vlm_doctor.units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_vlmgpu import VlmSpec
    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

SHARE = float(os.environ["KILL_ROUNDS_SHARE"])


@pytest.fixture(scope="session")
def vlm_planner() -> Callable[[VlmSpec, Machine, tuple[int, ...]], Plan]:
    def plan(spec: VlmSpec, machine: Machine, indices: tuple[int, ...]) -> Plan:
        sizes = [gpu.memory_total_bytes or 0 for gpu in machine.gpus if gpu.index in indices]
        one = int(SHARE * min(sizes) / GIB)
        SIZES_GIB.update(a=one, b=one, wide=one * len(sizes))
        return place(spec, machine, indices)

    return plan


@pytest.fixture(scope="session")
def vlm_loader() -> Callable[..., Any]:
    return load


@contextmanager
def load(spec: VlmSpec, plan: Plan | None) -> Iterator[Any]:
    """Hold the memory of the plan while the model is there."""
    cuda = ctypes.CDLL("libcuda.so.1")
    stages = plan.stages if plan is not None else ()
    held = [(device, allocate(cuda, device, stage.total_bytes)) for stage in stages for device in [find(cuda, stage.uuid)]]
    yield SimpleNamespace(name=spec.name, plan=plan, gpus=stages)
    for device, address in held:
        context = retain(cuda, device)
        check(cuda.cuMemFree_v2(address), f"cuMemFree in {context}")
        for _ in range(2):
            check(cuda.cuDevicePrimaryCtxRelease_v2(device), "cuDevicePrimaryCtxRelease")


def check(status: int, call: str) -> None:
    if status:
        raise OSError(f"{call} ended with CUDA error {status}")


def find(cuda: Any, uuid: str) -> int:
    """The driver's handle of a GPU."""
    check(cuda.cuInit(0), "cuInit")
    count, device = ctypes.c_int(), ctypes.c_int()
    check(cuda.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    for ordinal in range(count.value):
        check(cuda.cuDeviceGet(ctypes.byref(device), ordinal), "cuDeviceGet")
        found = (ctypes.c_ubyte * 16)()
        check(cuda.cuDeviceGetUuid_v2(ctypes.byref(found), device), "cuDeviceGetUuid")
        if f"GPU-{UUID(bytes=bytes(found))}" == uuid:
            return device.value
    raise OSError(f"CUDA does not show {uuid}, only {count.value} other GPUs")


def retain(cuda: Any, device: int) -> ctypes.c_void_p:
    """Make the primary context of a GPU the current one."""
    context = ctypes.c_void_p()
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    check(cuda.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    return context


def allocate(cuda: Any, device: int, size_bytes: int) -> ctypes.c_uint64:
    """Take memory; returns its address on the GPU."""
    retain(cuda, device)
    address = ctypes.c_uint64()
    check(cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size_bytes)), f"cuMemAlloc of {size_bytes} bytes")
    return address
