"""Does a model fit the GPUs of this process? All tests that share it, an engine's estimate or the planner have a say."""

from __future__ import annotations

from dataclasses import replace
from types import NoneType
from typing import TYPE_CHECKING

from .. import verdicts
from ..overridden import check_function, check_value, estimate_of
from ..requirements import Requirements, VlmSpec
from ..verdicts import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pytest

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

    from ..leasing.own_share import OwnShare
    from .faults import Losses
    from .gate import Planner


class Fitting:
    """Places models, and remembers where.

    Args:
        own: The GPUs of this process.
        losses: GPUs that were lost while tests ran.
        sharing: Requirements of the tests that share each load.
        why_no_offload: Says why nothing may stay in host memory; empty where it may.
    """

    def __init__(
        self,
        own: OwnShare,
        losses: Losses,
        sharing: Mapping[VlmSpec, Sequence[Requirements]],
        why_no_offload: Callable[[], str],
    ) -> None:
        self._own = own
        self._losses = losses
        self._sharing = sharing
        self._why_no_offload = why_no_offload
        self.plans: dict[VlmSpec, Plan] = {}
        """Where each model was last placed."""
        self.estimated: dict[VlmSpec, tuple[int, ...]] = {}
        """GPUs of models that an engine places itself."""
        self.open_to: dict[VlmSpec, tuple[int, ...]] = {}
        """GPUs among which transformers may choose for a model that it places itself."""
        self.asking: pytest.FixtureRequest | None = None
        """For which test a planner is asked right now."""

    def judge(
        self, needs: Requirements, machine: Machine, plan: Plan | None = None, *, loads: bool, at_load: bool
    ) -> Verdict:
        """Decide by requirements and, where there is one, the plan; a GPU that was lost in mid-run is said to be lost."""
        verdict = self._own.judge(needs, machine, plan, loads=loads, at_load=at_load)
        return self._losses.explain(verdict, machine)

    def place_shared(
        self, spec: VlmSpec, machine: Machine, request: pytest.FixtureRequest, *, at_load: bool
    ) -> tuple[Verdict, Plan | None]:
        """Place a model on GPUs that meet the strictest requirements of all tests that share it and can run here."""
        runnable = [
            needs
            for needs in self._sharing.get(spec, ())
            if self.judge(needs, machine, loads=True, at_load=False).action == "run"
        ]
        shared = Requirements.strictest(runnable)
        verdict = self.judge(shared, machine, loads=True, at_load=at_load)
        if verdict.action == "skip":
            reason = f"tests that share {spec.label} ask together for what no GPU here offers: {verdict.reason}"
            return Verdict("error", verdicts.WRONG, reason), None
        return self.place(spec, shared, machine, verdict, request, loads=True, at_load=at_load)

    def place(
        self,
        spec: VlmSpec,
        needs: Requirements,
        machine: Machine,
        verdict: Verdict,
        request: pytest.FixtureRequest,
        *,
        loads: bool,
        at_load: bool,
    ) -> tuple[Verdict, Plan | None]:
        """Place a model for a test, on the GPUs of the verdict about its requirements."""
        from vlm_doctor.errors import ModelError, VlmDoctorError
        from vlm_doctor.placement import Plan

        from ..models.failures import needs_remote_code

        if verdict.action != "run":
            return verdict, None
        try:
            estimate = estimate_of(request.config, spec)
        except VlmDoctorError as error:
            return Verdict("error", verdicts.WRONG, str(error)), None
        if estimate is not None:
            own = Requirements(gpus=max(estimate.gpus, spec.min_gpus), vram_bytes=estimate.vram_bytes)
            verdict = self.judge(Requirements.strictest([needs, own]), machine, loads=loads, at_load=at_load)
            self.estimated[spec] = verdict.gpus[: own.gpus]
            return verdict, None
        planner = self.planner_for(request)
        try:
            check_function(planner, origin="fixture vlm_planner", arguments="spec, machine, gpus")
            plan = planner(spec, machine, verdict.gpus)
            origin = "fixture vlm_planner(spec, machine, gpus)"
            check_value(plan, (Plan, NoneType), origin=origin, wanted="a vlm_doctor.Plan or None")
        except VlmDoctorError as error:
            # What is not about the model is about workload or policy, which the project wrote.
            code = verdicts.UNREADABLE if isinstance(error, ModelError) else verdicts.WRONG
            return Verdict("error", code, str(error)), None
        if plan is not None:
            self.plans[spec] = plan
        verdict = self.judge(needs, machine, plan, loads=loads, at_load=at_load)
        if verdict.code == verdicts.DOES_NOT_FIT and verdict.action == "skip":
            return self._fits_elsewhere(spec, needs, machine, verdict, planner), None
        if plan is None or verdict.action != "run":
            return verdict, plan
        if plan.is_remote_code and not spec.trust_remote_code:
            return Verdict("error", verdicts.UNREADABLE, needs_remote_code(spec.name).message), None
        # What transformers would do beside a model that is unloaded first says nothing.
        left = offloaded(spec, plan) if at_load or not spec.is_placed_by_transformers else ""
        why = self._why_no_offload() if left else ""
        if why:
            return Verdict("error", verdicts.OFFLOADED, f"{left} {why}"), None
        if spec.is_placed_by_transformers:
            self.open_to[spec] = verdict.gpus
            return verdict, plan
        return replace(verdict, gpus=tuple(stage.gpu for stage in plan.stages)), plan

    def planner_for(self, request: pytest.FixtureRequest) -> Planner:
        """The planner that a test sees; it places models by the workload and policy that this test sees."""
        planner: Planner = request.getfixturevalue("vlm_planner")
        if not callable(planner):
            return planner

        def place(spec: VlmSpec, machine: Machine, gpus: tuple[int, ...]) -> Plan | None:
            outer, self.asking = self.asking, request
            try:
                return planner(spec, machine, gpus)
            finally:
                self.asking = outer

        return place

    def _fits_elsewhere(
        self, spec: VlmSpec, needs: Requirements, machine: Machine, verdict: Verdict, planner: Planner
    ) -> Verdict:
        """Keep a skip only where the model fits no set of GPUs, however they are shared out."""
        facts = self._own.judge_facts(needs, machine, loads=False)
        if facts.action == "run" and self._own.lacks_any(facts, machine):
            plan = planner(spec, self._own.unmasked(machine), facts.gpus)
            if plan is not None and (plan.fits or (plan.shortage is not None and not plan.shortage.is_permanent)):
                return self._own.too_small(verdict)
        return verdict


def offloaded(spec: VlmSpec, plan: Plan) -> str:
    """What of a model would stay in host memory, one sentence; empty when nothing does, or nobody can tell before."""
    from vlm_doctor.units import format_gib

    if spec.is_placed_by_transformers:
        auto = plan.auto
        left_bytes = auto.cpu_bytes + auto.disk_bytes if auto is not None else 0
        where = (
            f'device_map="{spec.device_map}" would leave {format_gib(left_bytes)} of {spec.name} in host memory or on disk'
        )
        return f"{where}." if left_bytes else ""
    off = plan.offloaded
    return (
        f"{format_gib(off.weights_bytes)} of {spec.name} would stay in host memory: {off.reason}" if off is not None else ""
    )
