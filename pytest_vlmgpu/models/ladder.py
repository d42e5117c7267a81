"""What the fixtures ``vlm_planner`` and ``vlm_loader`` give where no conftest overrides them."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan
    from vlm_doctor.workload import Policy, Workload

    from ..gating.gate import Gate, Loader, Planner
    from ..requirements import VlmSpec


class VlmFactory(Protocol):
    """Value of the fixture ``vlm_factory``."""

    def __call__(
        self, name: str, *, dtype: str | None = None, trust_remote_code: bool = False, gpus: int = 1
    ) -> AbstractContextManager[Any]:
        """Load a model and let it go at the end of the ``with`` block; arguments as those of the markers."""
        ...


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


def make_loader(gate: Gate, config: pytest.Config) -> Loader:
    """Load a model with transformers, and note what is still in memory after it was unloaded."""

    @contextmanager
    def load(spec: VlmSpec, plan: Plan | None) -> Iterator[Any]:
        from ..gating.machine_reader import ordinals_by_uuid
        from . import loading, progress

        if gate.settings.fake_gpus:
            pytest.skip(f"{spec.label} is not loaded on made-up GPUs; a vlm_loader of your own would be asked.")
        if plan is None and gate.uses_gpus:
            raise pytest.UsageError("vlm_planner returned no plan: override vlm_loader too, to place the model yourself.")
        # The machine that the plan was just made for.
        ordinals = ordinals_by_uuid(gate.machine_used) if gate.uses_gpus and gate.machine_used is not None else None
        with progress.shown(config, spec.label, plan, ordinals):
            loaded = loading.load(
                spec.name, plan, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code, ordinals=ordinals
            )
        try:
            yield loaded
        finally:
            left_bytes = loading.unload(loaded)
            for record in reversed(gate.loads):
                if record.model == spec.label:
                    record.left_bytes, record.held_by = left_bytes, [loaded.held_by] if loaded.held_by else []
                    break

    return load


def make_factory(gate: Gate, request: pytest.FixtureRequest, loader: Loader) -> VlmFactory:
    """Load models that are chosen at run time as the fixture ``vlm`` loads those that markers name."""

    @contextmanager
    def make(name: str, *, dtype: str | None = None, trust_remote_code: bool = False, gpus: int = 1) -> Iterator[Any]:
        from ..requirements import VlmSpec

        spec = VlmSpec(name, dtype=dtype or gate.settings.dtype, trust_remote_code=trust_remote_code, min_gpus=gpus)
        with gate.loaded(spec, request, loader) as loaded:
            yield loaded

    return make
