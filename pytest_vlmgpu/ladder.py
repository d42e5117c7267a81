"""What the fixtures ``vlm_planner`` and ``vlm_loader`` give where no conftest overrides them."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan
    from vlm_doctor.workload import Policy, Workload

    from .gate import Gate, Loader, Planner
    from .requirements import VlmSpec


def make_planner(workload: Workload, policy: Policy) -> Planner:
    """Place a model on the GPUs that its tests may use, with the planner of vlm-doctor."""
    from msgspec.structs import replace

    from vlm_doctor.planner import plan
    from vlm_doctor.sources.model_files import load_profile

    profile_of = cache(load_profile)

    def place(spec: VlmSpec, machine: Machine, gpus: tuple[int, ...]) -> Plan:
        allowed = gpus if policy.gpus is None else tuple(index for index in gpus if index in policy.gpus)
        stricter = replace(policy, gpus=allowed, min_gpus=max(policy.min_gpus, spec.min_gpus))
        return plan(profile_of(spec.name), machine, replace(workload, dtype=spec.dtype or workload.dtype), stricter)

    return place


def make_loader(gate: Gate) -> Loader:
    """Load a model with transformers, and note what is still in memory after it was unloaded."""

    @contextmanager
    def load(spec: VlmSpec, plan: Plan | None) -> Iterator[Any]:
        from . import loading
        from .gate import ordinals_by_uuid
        from .referrers import Watch

        if plan is None and gate.uses_gpus:
            raise pytest.UsageError("vlm_planner returned no plan: override vlm_loader too, to place the model yourself.")
        # The machine that the plan was just made for.
        ordinals = ordinals_by_uuid(gate.machine_used) if gate.uses_gpus and gate.machine_used is not None else None
        loaded = loading.load(
            spec.name, plan, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code, ordinals=ordinals
        )
        watch = Watch(getattr(loaded, "model", None))
        try:
            yield loaded
        finally:
            left_bytes = loading.unload(loaded)
            for load in [load for load in gate.loads if load.model == spec.label][-1:]:
                load.left_bytes, load.held_by = left_bytes, watch.holders() if left_bytes else []

    return load
