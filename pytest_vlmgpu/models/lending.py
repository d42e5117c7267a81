"""Models in memory: loaded when a test or a fixture asks, lent to it, and let go."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from .. import verdicts
from ..leasing.hiding import hider_of
from ..overridden import check_function, check_value
from ..verdicts import Verdict
from ..watching.meter import empty_cache
from .loads import check_landing, describe, stages_used
from .residents import Resident, free_before

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlm_doctor.machine import Gpu
    from vlm_doctor.placement import Plan

    from ..gating.gate import Gate, Loader
    from ..requirements import VlmSpec
    from .failures import LoadFailure


class Lending:
    """Loads each model once, and lends it.

    Args:
        gate: Whose decisions count.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._in_use: list[VlmSpec] = []
        """Models that a fixture or a test holds right now."""

    @contextmanager
    def loaded(self, spec: VlmSpec | None, request: pytest.FixtureRequest, loader: Loader) -> Iterator[Any]:
        """Load a model for as long as tests need it. A refusal ends the setup of the test and is remembered."""
        if spec is None:
            advice = 'mark the test @pytest.mark.vlm("org/model"), or give --vlm-model'
            pytest.fail(f"{verdicts.WRONG}: the fixture vlm needs a model; {advice}.", pytrace=False)
        known = self._gate.residents.get(spec)
        resident = known or self._load(spec, request, loader)
        self._in_use.append(spec)
        try:
            yield resident.value
        finally:
            self._in_use.remove(spec)
            # A test may ask at run time for the model that its fixture holds.
            if known is None and not self._gate.settings.keeps_models:
                self._unload(resident)

    def let_go(self, spec: VlmSpec) -> None:
        """Unload a model that is kept for later tests: a test has spoilt it."""
        resident = self._gate.residents.get(spec)
        if resident is not None and spec not in self._in_use:
            self._unload(resident)

    def _load(self, spec: VlmSpec, request: pytest.FixtureRequest, loader: Loader) -> Resident:
        from ..watching.meter import Meter
        from .failures import LoadFailure

        self._gate.refuse_unless_run(spec, self._gate.keep_from_acting(Verdict("run"), request))
        self._make_room()
        plan = self._plan_now(spec, request) if self._gate.uses_gpus else None
        self._prepare_warmth(spec, plan, request, loader)
        before = free_before(plan, self._gate.machine_used, is_open=spec.is_placed_by_transformers)
        meter = Meter()
        meter.start()
        started = time.perf_counter()
        with ExitStack() as stack:
            verdict, loaded = Verdict("run"), None
            try:
                loaded = stack.enter_context(self._open(spec, plan, request, loader))
                if plan is not None:
                    machine = self._gate.reader.current(request, max_age_s=math.inf)
                    check_landing(spec, plan, loaded, machine, may_offload=not self._gate.why_no_offload())
            except LoadFailure as failure:
                verdict = Verdict("error", failure.code, self._explained(failure, request), details=failure.details)
            # Not inside the handler: the report is one sentence, without the chain of errors behind it.
            self._gate.refuse_unless_run(spec, verdict)
            load = describe(spec, plan, loaded, time.perf_counter() - started)
            if self._gate.settings.keeps_warm and not load.warm:
                load.warm = "not kept: it is loaded by a loader of the project's own"
            self._gate.loads.append(load)
            stages = stages_used(plan, loaded)
            is_timed = load.attached_age_s is None and self._gate.reader.is_reread
            if is_timed and self._gate.reader.is_read_by_doctor:
                from . import load_times

                load_times.keep(load, stages)
            uuids = tuple(stage.uuid for stage in stages)
            before = {uuid: size for uuid, size in before.items() if uuid in uuids}
            resident = Resident(spec, plan, loaded, load, ExitStack(), meter, before, uuids)
            self._gate.residents.add(resident)
            try:
                request.config.hook.pytest_vlmgpu_loaded(config=request.config, spec=spec, loaded=loaded)
            except BaseException:
                self._gate.residents.forget(resident)
                raise
            resident.stack.push(stack.pop_all())
        return resident

    @staticmethod
    def _explained(failure: LoadFailure, request: pytest.FixtureRequest) -> str:
        """A failure's sentence, and why torch may see no GPU."""
        hider = hider_of(request.config)
        if hider is None or not hider.has_hidden or failure.code != verdicts.FAULT:
            return failure.message
        return (
            f"{failure.message} GPUs were hidden from tests before this one (vlm_hide_gpu_from_cpu_tests): one of them may "
            "have started CUDA then."
        )

    def _unload(self, resident: Resident) -> None:
        # Peaks of models that are loaded side by side cannot be told apart.
        peaks = {} if self._gate.settings.keeps_models else resident.meter.stop()
        resident.load.measured_peak_bytes = sum(peak.allocated for peak in peaks.values())
        self._gate.residents.remove(resident)

    @contextmanager
    def _open(self, spec: VlmSpec, plan: Plan | None, request: pytest.FixtureRequest, loader: Loader) -> Iterator[Any]:
        """Have a plugin load the model, or else the fixture ``vlm_loader``."""
        config = request.config
        gpus: tuple[Gpu, ...] = ()
        if self._gate.uses_gpus:
            indices = (
                tuple(stage.gpu for stage in plan.stages)
                if plan is not None
                else self._gate.fitting.estimated.get(spec, ())
            )
            by_index = {gpu.index: gpu for gpu in self._gate.reader.current(request, max_age_s=math.inf).gpus}
            gpus = tuple(by_index[index] for index in indices if index in by_index)
        loaded = config.hook.pytest_vlmgpu_load(config=config, spec=spec, plan=plan, gpus=gpus)
        with ExitStack() as stack:
            if loaded is None:
                loaded = stack.enter_context(_opened(loader, spec, plan))
            try:
                yield loaded
            finally:
                config.hook.pytest_vlmgpu_unload(config=config, spec=spec, loaded=loaded)

    def _prepare_warmth(self, spec: VlmSpec, plan: Plan | None, request: pytest.FixtureRequest, loader: Loader) -> None:
        """Settle whether a model is attached to, kept, or loaded as ever (``--vlm-warm``)."""
        warmth, hook = self._gate.warmth, request.config.hook.pytest_vlmgpu_load
        if warmth is None:
            return
        share = self._gate.own.share
        planned = tuple(stage.uuid for stage in plan.stages) if plan is not None else ()
        warmth.prepare(
            spec,
            plan,
            is_ours=loader.__module__ == f"{__package__}.ladder" and not hook.get_hookimpls(),
            gpus=planned or (share.gpus if share is not None else ()),
            look=lambda: self._gate.reader.current(request, max_age_s=0),
        )

    def _make_room(self) -> None:
        """Unload models until there is a slot for one more (``--vlm-slots``)."""
        slots = self._gate.settings.slots
        while slots is not None and len(self._gate.residents) >= slots:
            if not self._gate.residents.remove_least_useful(self._in_use):
                return  # a test asks for another one while it holds them

    def _plan_now(self, spec: VlmSpec, request: pytest.FixtureRequest) -> Plan | None:
        """Plan with the memory of this moment: beside models that stay, or in the place of those that go."""

        def place_now(max_age_s: float) -> tuple[Verdict, Plan | None]:
            machine, warmth = self._gate.reader.current(request, max_age_s=max_age_s), self._gate.warmth
            seen = warmth.as_free(machine) if warmth is not None else machine
            return self._gate.fitting.place_shared(spec, seen, request, at_load=True)

        refusal = self._gate.settle(self._gate.reader.current(request, max_age_s=math.inf), request)
        self._gate.refuse_unless_run(spec, refusal)
        # Beside a model that stays, the next one needs what torch keeps.
        empty_cache()
        self._await_memory(request)
        placed = place_now(math.inf)
        while _lacks_memory(placed) and self._gate.residents.remove_least_useful(self._in_use):
            placed = place_now(0)
        if _lacks_memory(placed):
            # A warm host has a CUDA context, too, which only its end gives back.
            self._gate.end_warm()
        verdict, plan = self._gate.when_free(place_now, placed, lambda placed: placed[0])
        self._gate.refuse_unless_run(spec, verdict)
        return plan

    def _await_memory(self, request: pytest.FixtureRequest) -> None:
        """Give the driver time to take back the memory of the model before; note what it does not get."""

        def is_back() -> bool:
            machine, warmth = self._gate.reader.current(request, max_age_s=0), self._gate.warmth
            # What a warm host keeps of it is not lost.
            return not self._gate.residents.missing(machine if warmth is None else warmth.as_free(machine))

        if not is_back() and self._gate.reader.is_reread:
            self._gate.own.waiting.until(
                is_back, lambda: "memory of a model that was unloaded is not back yet", may_wait=False
            )
        self._gate.residents.settle()


def _opened(loader: Loader, spec: VlmSpec, plan: Plan | None) -> AbstractContextManager[Any]:
    """What a loader gives, which may be a project's own.

    Raises:
        LoadFailure: VLM720, it is no function, or gives no context manager.
    """
    from vlm_doctor.errors import UsageError

    from .failures import LoadFailure

    try:
        check_function(loader, origin="fixture vlm_loader", arguments="spec, plan")
    except UsageError as error:
        raise LoadFailure(verdicts.WRONG, str(error)) from error
    opened = loader(spec, plan)
    try:
        check_value(opened, AbstractContextManager, origin="fixture vlm_loader(spec, plan)", wanted="a context manager")
    except UsageError as error:
        raise LoadFailure(verdicts.WRONG, str(error)) from error
    return opened


def _lacks_memory(placed: tuple[Verdict, Plan | None]) -> bool:
    """True where a model would have more room if another one went: a model in host memory is no reason to keep that."""
    verdict, plan = placed
    return verdict.code in (verdicts.BUSY, verdicts.OFFLOADED) or (plan is not None and plan.offloaded is not None)
