"""The conftest of the projects that the plugin is run on: it is copied there, not imported here.

The machine comes from machine.json, plans from a table of sizes, and the loader only writes down what it does.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu import LoadFailure
from vlm_doctor.codec import from_json
from vlm_doctor.errors import ModelNotFoundError
from vlm_doctor.machine import Gpu, Machine
from vlm_doctor.placement import LedgerLine, Plan, Shortage, Stage
from vlm_doctor.units import GIB
from vlm_doctor.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_vlmgpu import VlmSpec

FOLDER = Path(__file__).parent
# On cards of 22 GiB: all but two fit one, "wide" needs two, "huge" more than there are.
SIZES_GIB = {"a": 4, "b": 5, "c": 6, "wide": 30, "huge": 900, "oom": 1, "astray": 1, "offload": 1, "code": 1}


def log(line: str) -> None:
    with (FOLDER / "log.txt").open("a") as file:
        file.write(f"{line}\n")


@pytest.fixture(scope="session")
def vlm_machine() -> Machine:
    log("MACHINE")
    return from_json((FOLDER / "machine.json").read_bytes(), Machine, where="machine.json")


@pytest.fixture(scope="session")
def vlm_planner() -> Callable[[VlmSpec, Machine, tuple[int, ...]], Plan]:
    return place


def place(spec: VlmSpec, machine: Machine, indices: tuple[int, ...]) -> Plan:
    """Spread a model evenly over the first GPUs that have room for it."""
    if spec.name.removeprefix("org/") not in SIZES_GIB:
        raise ModelNotFoundError(f"{spec.name}: no such model.")
    size_gib = SIZES_GIB[spec.name.removeprefix("org/")]
    gpus = [gpu for gpu in machine.gpus if gpu.index in indices]
    counts = range(spec.min_gpus, len(gpus) + 1)
    fitting = [n for n in counts if sum(gpu.memory_free_bytes or 0 for gpu in gpus[:n]) >= size_gib * GIB]
    used = gpus[: fitting[0]] if fitting else gpus
    is_permanent = sum(gpu.memory_total_bytes or 0 for gpu in gpus) < size_gib * GIB
    shortage = Shortage(missing_bytes=1, message=f"{spec.name} needs {size_gib} GiB.", is_permanent=is_permanent)
    return Plan(
        model=spec.name,
        machine=machine.description,
        fits=bool(fitting),
        workload=Workload(),
        dtype="bfloat16",
        prompt_tokens=1,
        image_tokens=0,
        device_map={f"layers.{position}": position for position in range(len(used))},
        max_memory={},
        cuda_visible_devices=",".join(gpu.uuid for gpu in used),
        stages=tuple(stage(gpu, size_gib * GIB // len(used)) for gpu in used),
        shortage=None if fitting else shortage,
        is_remote_code=spec.name == "org/code",
    )


def stage(gpu: Gpu, weights_bytes: int) -> Stage:
    line = LedgerLine(kind="weights", label="weights", size_bytes=weights_bytes, source="table")
    return Stage(gpu=gpu.index, uuid=gpu.uuid, name=gpu.name, keys=(), ledger=(line,), total_bytes=weights_bytes)


@pytest.fixture(scope="session")
def vlm_loader() -> Callable[..., Any]:
    return load


@contextmanager
def load(spec: VlmSpec, plan: Plan | None) -> Iterator[Any]:
    """Say what is loaded and let go; some models do not go where they should."""
    if spec.name == "org/oom":
        failure = LoadFailure("VLM715", "org/oom ran out of memory.")
        failure.details = "Traceback of torch"
        raise failure
    wrong = {"org/astray": "cuda:1", "org/offload": "cpu"}.get(spec.name)
    positions = plan.device_map if plan is not None else {}
    device_map = {key: wrong or plan.stages[int(at)].gpu for key, at in positions.items() if plan is not None}
    log(f"LOAD {spec.label}")
    yield SimpleNamespace(
        name=spec.name,
        plan=plan,
        model=f"model {spec.name}",
        processor=f"processor {spec.name}",
        device_map=device_map,
    )
    log(f"UNLOAD {spec.label}")
