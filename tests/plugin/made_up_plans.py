"""Plans from a table of sizes, for the projects that the plugin is run on: it is copied there, beside their conftest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_doctor.errors import ModelNotFoundError
from vlm_doctor.placement import LedgerLine, Plan, Shortage, Stage
from vlm_doctor.units import GIB
from vlm_doctor.workload import Workload

if TYPE_CHECKING:
    from pytest_vlmgpu import VlmSpec
    from vlm_doctor.machine import Gpu, Machine

# On cards of 22 GiB: all but two fit one, "wide" needs two, "huge" more than there are.
SIZES_GIB = {"a": 4, "b": 5, "c": 6, "sticky": 8, "wide": 30, "huge": 900}
SIZES_GIB.update(oom=1, astray=1, offload=1, code=1)


def place(spec: VlmSpec, machine: Machine, indices: tuple[int, ...]) -> Plan:
    """Spread a model evenly over the fewest GPUs that have room for it, the freest first."""
    if spec.name.removeprefix("org/") not in SIZES_GIB:
        raise ModelNotFoundError(f"{spec.name}: no such model.")
    size_bytes = SIZES_GIB[spec.name.removeprefix("org/")] * GIB
    gpus = [gpu for gpu in machine.gpus if gpu.index in indices]
    gpus.sort(key=lambda gpu: (-(gpu.memory_free_bytes or 0), gpu.index))
    counts = range(spec.min_gpus, len(gpus) + 1)
    fitting = [n for n in counts if all((gpu.memory_free_bytes or 0) * n >= size_bytes for gpu in gpus[:n])]
    used = gpus[: fitting[0]] if fitting else gpus
    is_permanent = sum(gpu.memory_total_bytes or 0 for gpu in gpus) < size_bytes
    shortage = Shortage(missing_bytes=1, message=f"{spec.name} needs {size_bytes // GIB} GiB.", is_permanent=is_permanent)
    return plan(
        spec.name,
        fits=bool(fitting),
        machine=machine.description,
        device_map={f"layers.{position}": position for position in range(len(used))},
        cuda_visible_devices=",".join(gpu.uuid for gpu in used),
        stages=tuple(stage(gpu, size_bytes // len(used)) for gpu in used),
        shortage=None if fitting else shortage,
        is_remote_code=spec.name == "org/code",
    )


def plan(model: str = "org/a", *, fits: bool, **fields: Any) -> Plan:
    """A plan of nothing but what is said."""
    usual: dict[str, Any] = {"machine": "", "device_map": {}, "cuda_visible_devices": "", "stages": ()}
    return Plan(
        model=model,
        fits=fits,
        workload=Workload(),
        dtype="bfloat16",
        prompt_tokens=1,
        image_tokens=0,
        max_memory={},
        **{**usual, **fields},
    )


def stage(gpu: Gpu, weights_bytes: int) -> Stage:
    line = LedgerLine(kind="weights", label="weights", size_bytes=weights_bytes, source="table")
    return Stage(gpu=gpu.index, uuid=gpu.uuid, name=gpu.name, keys=(), ledger=(line,), total_bytes=weights_bytes)
