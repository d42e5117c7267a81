"""What the fixtures ``vlm_planner`` and ``vlm_loader`` give where no conftest overrides them."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from ..overridden import check_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan
    from vlm_doctor.workload import Policy, Workload

    from ..gating.gate import Gate, Loader, Planner
    from ..requirements import VlmSpec
    from .loaded import LoadedVlm


_PLACING_RULES = ("gpus", "exclude", "pins", "max_memory", "min_gpus", "max_gpus")
"""Fields of a policy that say what may be where."""


class VlmFactory(Protocol):
    """Value of the fixture ``vlm_factory``."""

    def __call__(
        self,
        name: str,
        *,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        gpus: int = 1,
        device_map: str | None = None,
    ) -> AbstractContextManager[Any]:
        """Load a model and let it go at the end of the ``with`` block; arguments as those of the markers."""
        ...


def make_planner(
    workload: Workload,
    policy: Policy,
    *,
    may_offload: bool = False,
    asking: Callable[[], pytest.FixtureRequest | None] = lambda: None,
) -> Planner:
    """Place a model on the GPUs that its tests may use, with the planner of vlm-doctor.

    Args:
        workload: The largest call.
        policy: How careful to be.
        may_offload: Leave the last layers of a model in host memory where the GPUs cannot take it, however empty they are.
            What is short because others hold memory is waited for, and never made up for in this way.
        asking: The test for which a model is placed: its folder or file may override workload and policy, and a fixture
            of the session has only those of the first test.
    """
    from msgspec.structs import replace

    from vlm_doctor.planner import plan
    from vlm_doctor.sources.model_files import load_profile

    profile_of = cache(load_profile)

    def place(spec: VlmSpec, machine: Machine, gpus: tuple[int, ...]) -> Plan:
        from vlm_doctor import workload as asked

        from ..gating.slices import has_slices
        from .offloading import with_host_memory

        call, care = workload, policy
        request = asking()
        if request is not None:
            call, care = request.getfixturevalue("vlm_workload"), request.getfixturevalue("vlm_policy")
        check_value(call, asked.Workload, origin="fixture vlm_workload", wanted="a vlm_doctor.Workload")
        check_value(care, asked.Policy, origin="fixture vlm_policy", wanted="a vlm_doctor.Policy")
        if spec.is_placed_by_transformers:
            _refuse_rules_for(spec, care)
        allowed = gpus if care.gpus is None else tuple(index for index in gpus if index in care.gpus)
        rules = replace(
            care,
            gpus=allowed,
            min_gpus=max(care.min_gpus, spec.min_gpus),
            max_gpus=1 if spec.device_map == "single" or has_slices(machine, gpus) else care.max_gpus,
            offload=care.offload and not may_offload,
        )
        work = replace(call, dtype=spec.dtype or call.dtype)

        def ask(machine: Machine, *, offload: bool = rules.offload) -> Plan:
            return plan(profile_of(spec.name), machine, work, replace(rules, offload=offload))

        found = ask(machine)
        is_hopeless = not found.fits and found.shortage is not None and found.shortage.is_permanent
        return with_host_memory(found, machine, ask) if may_offload and is_hopeless else found

    return place


def _refuse_rules_for(spec: VlmSpec, policy: Policy) -> None:
    """Refuse rules of a policy that transformers would not keep to where it places a model itself.

    What is left of a policy (headroom, context, preference) counts for whether the model fits.
    """
    from vlm_doctor.errors import UsageError
    from vlm_doctor.workload import Policy as Default

    usual = Default()
    broken = [name for name in _PLACING_RULES if getattr(policy, name) != getattr(usual, name)]
    if broken:
        raise UsageError(
            f'device_map="{spec.device_map}" lets transformers place {spec.name}, which keeps to no '
            f"{' and no '.join(broken)} of vlm_policy: leave that out, choose GPUs with --vlm-gpus, or let the planner "
            'place it (device_map="doctor").'
        )


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
        by_index = {gpu.index: gpu for gpu in gate.machine_used.gpus} if gate.machine_used is not None else {}

        def load_here() -> LoadedVlm:
            with progress.shown(config, spec.label, plan, ordinals, is_planned=not spec.is_placed_by_transformers):
                return loading.load(
                    spec.name,
                    plan,
                    dtype=spec.dtype,
                    trust_remote_code=spec.trust_remote_code,
                    ordinals=ordinals,
                    device_map=spec.device_map if spec.is_placed_by_transformers else None,
                    gpus=[by_index[index] for index in gate.fitting.open_to.get(spec, ()) if index in by_index],
                    may_offload=not gate.why_no_offload(),
                )

        if gate.warmth is None:
            loaded = load_here()
        else:
            with progress.told(config, spec.label, plan) as tell:
                loaded = gate.warmth.load(spec, plan, ordinals=ordinals, plain=load_here, told=tell)
        loaded.spec = spec
        try:
            yield loaded
        finally:
            left_bytes = loading.unload(loaded)
            if gate.warmth is not None and loaded.warm is not None:
                loaded.warm.close()
            for record in reversed(gate.loads):
                if record.model == spec.label:
                    record.left_bytes, record.held_by = left_bytes, [loaded.held_by] if loaded.held_by else []
                    break

    return load


def make_factory(gate: Gate, request: pytest.FixtureRequest) -> VlmFactory:
    """Load models that are chosen at run time as the fixture ``vlm`` loads those that markers name."""

    @contextmanager
    def make(
        name: str,
        *,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        gpus: int = 1,
        device_map: str | None = None,
    ) -> Iterator[Any]:
        from ..collection.rules import as_seen_by
        from ..markers import chosen

        spec = chosen(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            gpus=gpus,
            device_map=device_map,
            where="vlm_factory",
        )
        # This fixture is one for all tests, and the folder of the one that runs may have a loader of its own.
        item: Any = next(reversed(request.session._setupstate.stack))
        is_test = isinstance(item, pytest.Function)
        asking = item._request if is_test else request
        named = gate.completed(spec)
        loader = asking.getfixturevalue("vlm_loader")
        with gate.loaded(as_seen_by(item, named) if is_test else named, asking, loader) as loaded:
            yield loaded

    return make
