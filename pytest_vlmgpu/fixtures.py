"""The fixtures: a ladder of small session fixtures, each of which a conftest may override, up to the loaded model."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from .state import GATED_TEST, VERDICT, gate_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.placement import Plan
    from vlm_doctor.report import Report
    from vlm_doctor.workload import Policy, Workload

    from .gate import Loader, Planner
    from .requirements import VlmSpec


@pytest.fixture(scope="session")
def vlm_machine(request: pytest.FixtureRequest) -> Machine:
    """The machine that decides which tests run: this one, or that of --vlm-machine."""
    return gate_of(request.config).machine()


@pytest.fixture(scope="session")
def vlm_workload() -> Workload:
    """The largest call that tests make, for which every model is placed. Override it to say yours."""
    from vlm_doctor.workload import Workload

    return Workload()


@pytest.fixture(scope="session")
def vlm_policy() -> Policy:
    """How careful placements are, and what they prefer. Override it to change that."""
    from vlm_doctor.workload import Policy

    return Policy()


@pytest.fixture(scope="session")
def vlm_planner(vlm_workload: Workload, vlm_policy: Policy) -> Planner:
    """Function (spec, machine, GPU indices) -> Plan. Override it to place models by your own rules.

    It may return ``None`` (do not plan) together with a ``vlm_loader`` of your own.
    """
    from msgspec.structs import replace

    from vlm_doctor.planner import plan
    from vlm_doctor.sources.model_files import load_profile

    profile_of = cache(load_profile)

    def place(spec: VlmSpec, machine: Machine, gpus: tuple[int, ...]) -> Plan:
        allowed = gpus if vlm_policy.gpus is None else tuple(index for index in gpus if index in vlm_policy.gpus)
        policy = replace(vlm_policy, gpus=allowed, min_gpus=max(vlm_policy.min_gpus, spec.min_gpus))
        workload = replace(vlm_workload, dtype=spec.dtype or vlm_workload.dtype)
        return plan(profile_of(spec.name), machine, workload, policy)

    return place


@pytest.fixture(scope="session")
def vlm_loader(request: pytest.FixtureRequest) -> Loader:
    """Function (spec, plan) -> context manager that holds a loaded model. Override it to load with another engine.

    ``plan`` is ``None`` on a CPU run. The value of the context manager is that of the fixture ``vlm``; where it has a
    ``device_map`` (or a ``model`` with ``hf_device_map``), that is held against the plan.
    """
    gate = gate_of(request.config)

    @contextmanager
    def load(spec: VlmSpec, plan: Plan | None) -> Iterator[Any]:
        from . import loading
        from .gate import ordinals_by_uuid

        if plan is None and gate.uses_gpus:
            raise pytest.UsageError("vlm_planner returned no plan: override vlm_loader too, to place the model yourself.")
        # The machine that the plan was just made for.
        ordinals = ordinals_by_uuid(gate.machine_used) if gate.uses_gpus and gate.machine_used is not None else None
        loaded = loading.load(
            spec.name, plan, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code, ordinals=ordinals
        )
        try:
            yield loaded
        finally:
            left_bytes = loading.unload(loaded)
            if gate.loads:
                gate.loads[-1].left_bytes = left_bytes

    return load


@pytest.fixture(scope="session")
def vlm(request: pytest.FixtureRequest, vlm_loader: Loader) -> Iterator[Any]:
    """The model that @pytest.mark.vlm("org/model") or --vlm-model names, loaded once a session (LoadedVlm)."""
    gate = gate_of(request.config)
    with gate.loaded(gate.spec_from(getattr(request, "param", None)), request, vlm_loader) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def vlm_model(vlm: Any) -> Any:
    """The model of ``vlm``."""
    return vlm.model


@pytest.fixture(scope="session")
def vlm_processor(vlm: Any) -> Any:
    """The processor of ``vlm``."""
    return vlm.processor


@pytest.fixture(scope="session")
def vlm_device_map(vlm: Any) -> dict[str, int]:
    """Where the modules of ``vlm`` are: module path to CUDA ordinal; empty on the CPU."""
    device_map: dict[str, int] = vlm.device_map
    return device_map


@pytest.fixture(scope="session")
def vlm_gpus(request: pytest.FixtureRequest, vlm_machine: Machine) -> tuple[Gpu, ...]:
    """The GPUs that tests may use (CUDA_VISIBLE_DEVICES, --vlm-gpus), in CUDA order. Loads nothing."""
    from .gate import refuse
    from .requirements import Requirements
    from .selection import judge

    choice = gate_of(request.config).settings.gpus
    verdict = judge(Requirements(), vlm_machine, choice, is_busy_decided_later=True)
    refuse(verdict)
    by_index = {gpu.index: gpu for gpu in vlm_machine.gpus}
    return tuple(by_index[index] for index in verdict.gpus)


@pytest.fixture(scope="session")
def vlm_doctor(vlm_machine: Machine) -> Report:
    """What vlm-doctor says about the machine, except for what only torch could tell. It never skips a test."""
    from vlm_doctor.answer import check_report

    return check_report(vlm_machine)


@pytest.fixture
def _vlm_gate(request: pytest.FixtureRequest) -> None:
    """Decide about a gated test. It is put before all other fixtures of such a test when the test is collected."""
    from .gate import refuse

    item, gate = request.node, gate_of(request.config)
    verdict = gate.judge_test(item.stash[GATED_TEST], request)
    verdict = item.ihook.pytest_vlmgpu_verdict(item=item, verdict=verdict) or verdict
    item.stash[VERDICT] = verdict.made_strict() if gate.settings.is_strict else verdict
    refuse(item.stash[VERDICT])
