"""Machines that are not there, for tests of conftests, plugins and CI wiring: see ``docs/testing.md``."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from vlm_doctor.machine import Gpu, Machine

GIB = 2**30
_PID, _USER, _COMMAND = 4242, "somebody", "python train.py"


def fake_machine(
    spec: str = "2xL4",
    *,
    taken_gib: Mapping[int, float] | None = None,
    lost: Collection[int] = (),
    origin: str = "live",
) -> Machine:
    """A machine record that the gate takes for this machine.

    Args:
        spec: As ``--machine`` of vlm-doctor takes it: ``2xL4``, ``8xH100:nvswitch``, ``24GiB,12GiB``, ``none``.
        taken_gib: GPU index to memory that another process holds there, in GiB: tests that need it meet VLM711.
        lost: Indices of GPUs that the driver lists and cannot reach: VLM712.
        origin: ``synthetic`` makes the gate decide and run nothing, as ``--vlm-machine`` does.

    Raises:
        UsageError: The spec cannot be read.
        ValueError: There is no such GPU, or it has less memory than is to be taken.
    """
    from msgspec.structs import replace

    from vlm_doctor.machine import Driver, Machine
    from vlm_doctor.sources import load_machine

    if spec == "none":
        driver = Driver(nvml_state="no_library")
        machine = Machine(origin="synthetic", description="no GPU", driver=driver, gpus=())
    else:
        machine = load_machine(spec)
    indices = {gpu.index for gpu in machine.gpus}
    unknown = {*(taken_gib or {}), *lost} - indices
    if unknown:
        raise ValueError(f"{spec} has no GPU {min(unknown)}: its GPUs are {sorted(indices)}.")
    gpus = tuple(_changed(gpu, (taken_gib or {}).get(gpu.index, 0.0), is_lost=gpu.index in lost) for gpu in machine.gpus)
    # By this order torch counts as the record does, so that no test depends on a guess.
    environment = {**machine.environment, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return replace(machine, origin=origin, gpus=gpus, environment=environment)


@contextmanager
def machine_in_use(machine: Machine) -> Iterator[Machine]:
    """While it is entered, the plugin and vlm-doctor read this machine in place of the real one, in this process."""
    from vlm_doctor import sources

    def collect(*_arguments: object, **_options: object) -> Machine:
        return machine

    real = sources.collect
    sources.collect = collect
    try:
        yield machine
    finally:
        sources.collect = real


def _changed(gpu: Gpu, taken_gib: float, *, is_lost: bool) -> Gpu:
    from msgspec.structs import replace

    from vlm_doctor.machine import GpuProcess

    if is_lost:
        return replace(gpu, error="GPU is lost", memory_free_bytes=None, processes=())
    taken_bytes = int(taken_gib * GIB)
    free_bytes = (gpu.memory_free_bytes or 0) - taken_bytes
    if free_bytes < 0:
        raise ValueError(f"GPU {gpu.index} ({gpu.name}) has less than {taken_gib:g} GiB free.")
    if not taken_bytes:
        return gpu
    holder = GpuProcess(pid=_PID, kind="compute", used_bytes=taken_bytes, user=_USER, command=_COMMAND)
    return replace(gpu, memory_free_bytes=free_bytes, processes=(*gpu.processes, holder))
