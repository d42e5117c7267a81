"""The conftest of the projects that the plugin is run on: it is copied there, not imported here.

The machine comes from machine.json, plans from a table of sizes, and the loader only writes down what it does.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from made_up_plans import place

from pytest_vlmgpu import LoadFailure
from vlm_doctor.codec import from_json
from vlm_doctor.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_vlmgpu import VlmSpec
    from vlm_doctor.placement import Plan

FOLDER = Path(__file__).parent


def log(line: str) -> None:
    with (FOLDER / "log.txt").open("a") as file:
        file.write(f"{line}\n")


@pytest.fixture(scope="session")
def vlm_machine() -> Machine:
    log("MACHINE")
    return from_json((FOLDER / "machine.json").read_bytes(), Machine, where="machine.json")


@pytest.fixture(scope="session")
def vlm_planner() -> Callable[[VlmSpec, Machine, tuple[int, ...]], Plan]:
    planner: Callable[[VlmSpec, Machine, tuple[int, ...]], Plan] = place
    return planner


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
    device_map = {
        key: wrong or (plan.stages[at].gpu if isinstance(at, int) else at)
        for key, at in positions.items()
        if plan is not None
    }
    log(f"LOAD {spec.label}")
    yield SimpleNamespace(
        name=spec.name,
        plan=plan,
        model=f"model {spec.name}",
        processor=f"processor {spec.name}",
        device_map=device_map,
    )
    log(f"UNLOAD {spec.label}")
