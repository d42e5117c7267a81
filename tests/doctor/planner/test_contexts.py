from __future__ import annotations

import pytest

from vlm_doctor.data.contexts import overhead_of
from vlm_doctor.machine import Machine
from vlm_doctor.planner.budget import budgets
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Policy

from .profiles import gpu


@pytest.mark.parametrize(
    ("capability", "context_mib", "workspace_bytes"),
    [
        ((7, 0), 698, 8_519_680),
        ((8, 9), 698, 8_519_680),
        ((9, 0), 698, 32 * MIB),
        ((10, 0), 896, 32 * MIB),
        ((12, 0), 896, 32 * MIB),
        (None, 698, 32 * MIB),
    ],
)
def test_overhead_by_compute_capability(capability: tuple[int, int] | None, context_mib: int, workspace_bytes: int) -> None:
    overhead = overhead_of(capability)
    assert (overhead.context_bytes, overhead.workspace_bytes) == (context_mib * MIB, workspace_bytes)
    card = gpu(0, 8 * GIB, 8 * GIB, compute_capability=capability)
    (budget,) = budgets(Machine(origin="synthetic", description="", gpus=(card,)), Policy()).usable
    assert (budget.context_bytes, budget.workspace_bytes) == (context_mib * MIB, workspace_bytes)
    assert (budget.context_source, budget.workspace_source) == (overhead.context_source, overhead.workspace_source)
