"""What one run knows while it decides: the machine, which tests share a model, what was loaded and what failed.

Every decision is :mod:`selection`'s. Nothing is read and nothing heavy is imported before the first gated test is set up.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from . import verdicts
from .faults import Losses
from .own_share import OwnShare
from .requirements import Estimate, GatedTest, Requirements, VlmSpec
from .residents import Resident, Residents, empty_cache, free_before
from .selection import judge_without_gpus, keep_from_acting
from .state import GATED_TEST, POSITION, VERDICT
from .verdicts import Verdict
from .waiting import GRACE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.placement import Plan

    from .options import Settings

    Planner = Callable[[VlmSpec, Machine, tuple[int, ...]], Plan | None]
    Loader = Callable[[VlmSpec, Plan | None], AbstractContextManager[Any]]

T = TypeVar("T")
MEMORY_AGE_S = 5.0
"""How old a reading of free memory may be for a test that loads no model: one costs some tenths of a second."""
HEALTH_AGE_S = 30.0
"""The same for a test that asks for no memory: a GPU can be lost while tests run."""


@dataclass
class Load:
    """One model that was loaded, for the summary. Sizes are bytes, over all its GPUs."""

    model: str
    where: str
    seconds: float
    weights_bytes: int = 0
    predicted_peak_bytes: int = 0
    measured_peak_bytes: int = 0
    """Of torch's allocator; 0 when it was not used."""
    left_bytes: int = 0
    """Weights that something still referred to after the model was unloaded."""
    held_by: list[str] = field(default_factory=list)
    """What refers to them, in words."""
    missing_bytes: int = 0
    """Memory that was free before the model was loaded and not again after it was unloaded."""


class Gate:
    """The state of one run; kept in ``config.stash``.

    Args:
        settings: Resolved.
        config: Of this run.
        recorded: The machine of ``--vlm-machine`` or ``--vlm-fake-gpus``; ``None`` is this one, read when first needed.
    """

    def __init__(self, settings: Settings, config: pytest.Config, recorded: Machine | None = None) -> None:
        self.settings = settings
        self.own = OwnShare(config, settings)
        """The GPUs of this process."""
        self.sharing: dict[VlmSpec, list[Requirements]] = {}
        """Requirements of the tests that share each load."""
        self.loads: list[Load] = []
        self.refusals: dict[VlmSpec, Verdict] = {}
        """Models that could not be loaded: each is tried once."""
        self.machine_used: Machine | None = None
        """As last read; ``None`` until a gated test was decided about."""
        self._config = config
        self._first = self._latest = recorded
        self._read_at = 0.0
        self._losses = Losses()
        self.residents = Residents()
        self._in_use: list[VlmSpec] = []
        """Models that a fixture or a test holds right now."""
        self._fits: dict[VlmSpec, Verdict] = {}
        self._estimated: dict[VlmSpec, tuple[int, ...]] = {}
        """GPUs of models that an engine places itself."""
        self._plans: dict[VlmSpec, Plan] = {}

    @property
    def uses_gpus(self) -> bool:
        """False with ``--vlm-gpus=none``."""
        return self.settings.gpus.kind != "none"

    @property
    def is_strict(self) -> bool:
        """True when the plugin's own skips are errors; ``--vlm-strict=auto`` asks the machine that was used last."""
        if self.settings.strict != "auto":
            return self.settings.strict != "off"
        machine = self.machine_used
        has_gpus = machine is not None and bool(machine.gpus or machine.driver.device_files or machine.pci_devices)
        return self.settings.is_anything_expected or (self.uses_gpus and has_gpus)

    @property
    def is_machine_real(self) -> bool:
        """False where the machine that decided is made up or recorded: nothing ran on its GPUs."""
        return self.machine_used is not None and self.machine_used.origin == "live"

    def spec_from(self, parameter: object) -> VlmSpec | None:
        """The model of a parameter of ``vlm``: a spec, a name (given by ``parametrize``), or that of ``--vlm-model``."""
        if isinstance(parameter, VlmSpec):
            return parameter
        name = parameter if isinstance(parameter, str) else self.settings.model
        return VlmSpec(name, dtype=self.settings.dtype) if name else None

    def machine(self) -> Machine:
        """The machine that decides: this one, read once, or that of ``--vlm-machine``."""
        if self._first is None:
            self._first = self._read()
        return self._first

    def usable_gpus(self, machine: Machine, request: pytest.FixtureRequest) -> tuple[Gpu, ...]:
        """GPUs that tests may use, in CUDA order; without any, the test that asks is skipped or fails."""
        if self.uses_gpus:
            verdict = self._judge(Requirements(), machine, loads=False, at_load=False)
            refuse(verdict)
            refuse(self._settle(machine, request))
            verdict = self._judge(Requirements(), machine, loads=False, at_load=False)
        else:
            verdict = judge_without_gpus(self.settings.gpus, wants_gpus=True)
        refuse(verdict)
        by_index = {gpu.index: gpu for gpu in machine.gpus}
        return tuple(by_index[index] for index in verdict.gpus)

    def decide(self, request: pytest.FixtureRequest) -> None:
        """Decide about the test that is set up, let the project have its say, and end the setup unless it is to run."""
        item = request.node
        # Of an attempt before, where a plugin runs tests again.
        item.user_properties[:] = [pair for pair in item.user_properties if not pair[0].startswith("vlmgpu.")]
        self.residents.now = item.stash.get(POSITION, -1)
        verdict = self.judge_test(item.stash[GATED_TEST], request)
        verdict = item.ihook.pytest_vlmgpu_verdict(item=item, verdict=verdict) or verdict
        item.stash[VERDICT] = self._as_strict_as_wanted(verdict)
        if self.settings.plan:
            pytest.skip("it was only asked what would become of the test")
        refuse(item.stash[VERDICT])

    def judge_test(self, test: GatedTest, request: pytest.FixtureRequest) -> Verdict:
        """Decide about a test before any of its fixtures is set up, as far as that can be told without loading."""
        if not self.uses_gpus:
            verdict = judge_without_gpus(self.settings.gpus, wants_gpus=test.wants_gpus)
        else:
            verdict = self._judge_on_gpus(test, request)
        if verdict.action == "run" and test.loads and not test.specs:
            advice = 'add @pytest.mark.vlm("org/model"), or give --vlm-model'
            return Verdict("error", verdicts.WRONG, f"the test uses the fixture vlm and names no model; {advice}.")
        return self._keep_from_acting(verdict, request)

    def plan_of(self, test: GatedTest) -> Plan | None:
        """Where the model of a test was last placed."""
        return next((self._plans[spec] for spec in test.specs if spec in self._plans), None)

    def need_bytes(self, test: GatedTest) -> int | None:
        """Memory that a test is expected to use over all its GPUs: the peak predicted of its models, else its markers."""
        plans = [self._plans[spec] for spec in test.specs if spec in self._plans]
        if plans:
            return sum(stage.peak_bytes for plan in plans for stage in plan.stages)
        needs = test.requirements
        return max((needs.vram_bytes or 0) * needs.gpus, needs.total_vram_bytes or 0) or None

    def _judge_on_gpus(self, test: GatedTest, request: pytest.FixtureRequest) -> Verdict:
        needs_memory = not test.loads and (test.requirements.needs_memory or bool(test.specs))
        max_age_s = MEMORY_AGE_S if needs_memory else HEALTH_AGE_S
        at_load = not test.loads or self.settings.plan

        def judge_now(max_age_s: float) -> Verdict:
            machine = self._machine(request, max_age_s=max_age_s)
            verdict = self._judge(test.requirements, machine, loads=test.loads, at_load=at_load)
            for spec in test.specs:
                if verdict.action == "run":
                    verdict = self._judge_model(spec, test, machine, verdict, request)
            return verdict

        machine = self._machine(request, max_age_s=math.inf)
        verdict = self._judge(test.requirements, machine, loads=test.loads, at_load=False)
        if verdict.action != "run":
            return verdict
        if self.settings.plan:
            return judge_now(max_age_s)
        # What no machine of this kind could run takes nothing from others: GPUs are leased from here on.
        refusal = self._settle(machine, request)
        if refusal.action != "run":
            return refusal
        return self._when_free(judge_now, judge_now(max_age_s), lambda verdict: verdict, grace_s=0)

    def _settle(self, machine: Machine, request: pytest.FixtureRequest) -> Verdict:
        """Take this process' GPUs, if that was not done; the refusal where there are none for it."""
        return self.own.settle(machine, _planner_of(request)) or Verdict("run")

    def _when_free(
        self, ask: Callable[[float], T], first: T, verdict_of: Callable[[T], Verdict], *, grace_s: float = GRACE_S
    ) -> T:
        """Ask until the answer is no longer that others hold the memory, or the time to wait is over.

        Args:
            ask: Takes how old a reading of the machine may be, in seconds.
            first: The answer so far.
            verdict_of: The verdict in an answer.
            grace_s: At least so long: a driver gives memory back some time after a process has ended.
        """
        answer = [first]

        def is_free() -> bool:
            if verdict_of(answer[0]).code == verdicts.BUSY and self._is_reread:
                answer[0] = ask(0)
            return verdict_of(answer[0]).code != verdicts.BUSY

        if verdict_of(answer[0]).code == verdicts.BUSY and self._is_reread:
            self.own.waiting.until(is_free, lambda: verdict_of(answer[0]).reason, grace_s=grace_s)
        return answer[0]

    def _await_memory(self, machine: Machine, request: pytest.FixtureRequest) -> None:
        """Give the driver time to take back the memory of the model before; note what it does not get."""
        if self.residents.missing(machine) and self._is_reread:

            def is_back() -> bool:
                return not self.residents.missing(self._machine(request, max_age_s=0))

            self.own.waiting.until(is_back, lambda: "memory of a model that was unloaded is not back yet", may_wait=False)
        self.residents.settle()

    @property
    def _is_reread(self) -> bool:
        """True when the machine in use is the one that this process reads: another one never changes."""
        return self.machine_used is not None and self.machine_used is self._latest and self.machine_used.origin == "live"

    def gpu_uuids(self, test: GatedTest, verdict: Verdict) -> list[str]:
        """GPUs a test ran on: those of its model if it loads one, else those that meet its requirements."""
        resident = self.residents.get(test.specs[0]) if test.loads and test.specs else None
        if resident is not None:
            return [stage.uuid for stage in resident.plan.stages] if resident.plan else []
        machine = self.machine_used
        return [gpu.uuid for gpu in machine.gpus if gpu.index in verdict.gpus] if machine is not None else []

    @contextmanager
    def loaded(self, spec: VlmSpec | None, request: pytest.FixtureRequest, loader: Loader) -> Iterator[Any]:
        """Load a model for as long as tests need it. A refusal ends the setup of the test and is remembered."""
        if spec is None:
            pytest.fail(f"{verdicts.WRONG}: the fixture vlm needs a model; give --vlm-model.", pytrace=False)
        known = self.residents.get(spec)
        resident = known or self._load(spec, request, loader)
        self._in_use.append(spec)
        try:
            yield resident.value
        finally:
            self._in_use.remove(spec)
            # A test may ask at run time for the model that its fixture holds.
            if known is None and not self.settings.keeps_models:
                self._unload(resident)

    def let_go(self, spec: VlmSpec) -> None:
        """Unload a model that is kept for later tests: a test has spoilt it."""
        resident = self.residents.get(spec)
        if resident is not None and spec not in self._in_use:
            self._unload(resident)

    def _load(self, spec: VlmSpec, request: pytest.FixtureRequest, loader: Loader) -> Resident:
        from .failures import LoadFailure
        from .meter import Meter

        self._refuse_unless_run(spec, self._keep_from_acting(Verdict("run"), request))
        plan = self._plan_now(spec, request) if self.uses_gpus else None
        before = free_before(plan, self.machine_used)
        meter = Meter()
        meter.start()
        started = time.perf_counter()
        with ExitStack() as stack:
            verdict, loaded = Verdict("run"), None
            try:
                loaded = stack.enter_context(self._open(spec, plan, request, loader))
                if plan is not None:
                    _check_landing(spec, plan, loaded, self._machine(request, max_age_s=math.inf))
            except LoadFailure as failure:
                verdict = Verdict("error", failure.code, failure.message, details=failure.details)
            # Not inside the handler: the report is one sentence, without the chain of errors behind it.
            self._refuse_unless_run(spec, verdict)
            load = _describe(spec, plan, time.perf_counter() - started)
            self.loads.append(load)
            resident = Resident(spec, plan, loaded, load, ExitStack(), meter, before)
            self.residents.add(resident)
            try:
                request.config.hook.pytest_vlmgpu_loaded(config=request.config, spec=spec, loaded=loaded)
            except BaseException:
                self.residents.forget(resident)
                raise
            resident.stack.push(stack.pop_all())
        return resident

    def _unload(self, resident: Resident) -> None:
        # Peaks of models that are loaded side by side cannot be told apart.
        peaks = {} if self.settings.keeps_models else resident.meter.stop()
        resident.load.measured_peak_bytes = sum(peak.allocated for peak in peaks.values())
        self.residents.remove(resident)

    @contextmanager
    def _open(self, spec: VlmSpec, plan: Plan | None, request: pytest.FixtureRequest, loader: Loader) -> Iterator[Any]:
        """Have a plugin load the model, or else the fixture ``vlm_loader``."""
        config = request.config
        gpus: tuple[Gpu, ...] = ()
        if self.uses_gpus:
            indices = tuple(stage.gpu for stage in plan.stages) if plan is not None else self._estimated.get(spec, ())
            by_index = {gpu.index: gpu for gpu in self._machine(request, max_age_s=math.inf).gpus}
            gpus = tuple(by_index[index] for index in indices if index in by_index)
        loaded = config.hook.pytest_vlmgpu_load(config=config, spec=spec, plan=plan, gpus=gpus)
        with ExitStack() as stack:
            if loaded is None:
                loaded = stack.enter_context(loader(spec, plan))
            try:
                yield loaded
            finally:
                config.hook.pytest_vlmgpu_unload(config=config, spec=spec, loaded=loaded)

    def first_device(self, request: pytest.FixtureRequest) -> str:
        """The first usable GPU in torch's words; without any, the test that asks is skipped or fails."""
        if not self.uses_gpus:
            return "cpu"
        machine: Machine = request.getfixturevalue("vlm_machine")
        first = self.usable_gpus(machine, request)[0]
        return f"cuda:{ordinals_by_uuid(machine).get(first.uuid, 0)}"

    def _judge_model(
        self, spec: VlmSpec, test: GatedTest, machine: Machine, own: Verdict, request: pytest.FixtureRequest
    ) -> Verdict:
        """Does the model fit? Whether its memory is taken right now is asked when the test or the fixture loads it."""
        if not test.loads:
            return self._place(spec, test.requirements, machine, own, request, loads=False, at_load=True)[0]
        if self.residents.get(spec) is not None:
            return own
        if spec in self.refusals:
            return self.refusals[spec]
        if spec not in self._fits:
            self._fits[spec] = self._place_shared(spec, machine, request, at_load=self.settings.plan)[0]
        return self._fits[spec]

    def _plan_now(self, spec: VlmSpec, request: pytest.FixtureRequest) -> Plan | None:
        """Plan with the memory of this moment: beside models that stay, or in the place of those that go."""

        def place_now(max_age_s: float) -> tuple[Verdict, Plan | None]:
            return self._place_shared(spec, self._machine(request, max_age_s=max_age_s), request, at_load=True)

        refusal = self._settle(self._machine(request, max_age_s=math.inf), request)
        self._refuse_unless_run(spec, refusal)
        empty_cache()
        self._await_memory(self._machine(request, max_age_s=0), request)
        placed = place_now(math.inf)
        while placed[0].code == verdicts.BUSY and self.residents.remove_least_useful(self._in_use):
            placed = place_now(0)
        verdict, plan = self._when_free(place_now, placed, lambda placed: placed[0])
        self._refuse_unless_run(spec, verdict)
        return plan

    def _place_shared(
        self, spec: VlmSpec, machine: Machine, request: pytest.FixtureRequest, *, at_load: bool
    ) -> tuple[Verdict, Plan | None]:
        """Place a model on GPUs that meet the strictest requirements of all tests that share it and can run here."""
        runnable = [
            needs
            for needs in self.sharing.get(spec, ())
            if self._judge(needs, machine, loads=True, at_load=False).action == "run"
        ]
        shared = Requirements.strictest(runnable)
        verdict = self._judge(shared, machine, loads=True, at_load=at_load)
        if verdict.action == "skip":
            reason = f"tests that share {spec.label} ask together for what no GPU here offers: {verdict.reason}"
            return Verdict("error", verdicts.WRONG, reason), None
        return self._place(spec, shared, machine, verdict, request, loads=True, at_load=at_load)

    def _place(
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
        from vlm_doctor.errors import ModelError, VlmDoctorError

        from .failures import needs_remote_code

        if verdict.action != "run":
            return verdict, None
        estimate: Estimate | None = request.config.hook.pytest_vlmgpu_estimate(config=request.config, spec=spec)
        if estimate is not None:
            own = Requirements(gpus=max(estimate.gpus, spec.min_gpus), vram_bytes=estimate.vram_bytes)
            verdict = self._judge(Requirements.strictest([needs, own]), machine, loads=loads, at_load=at_load)
            self._estimated[spec] = verdict.gpus[: own.gpus]
            return verdict, None
        planner: Planner = request.getfixturevalue("vlm_planner")
        try:
            plan = planner(spec, machine, verdict.gpus)
        except VlmDoctorError as error:
            # What is not about the model is about workload or policy, which the project wrote.
            code = verdicts.UNREADABLE if isinstance(error, ModelError) else verdicts.WRONG
            return Verdict("error", code, str(error)), None
        if plan is not None:
            self._plans[spec] = plan
        verdict = self._judge(needs, machine, plan, loads=loads, at_load=at_load)
        if verdict.code == verdicts.DOES_NOT_FIT and verdict.action == "skip":
            return self._fits_elsewhere(spec, needs, machine, verdict, planner), None
        if plan is None or verdict.action != "run":
            return verdict, plan
        if plan.is_remote_code and not spec.trust_remote_code:
            return Verdict("error", verdicts.UNREADABLE, needs_remote_code(spec.name).message), None
        return replace(verdict, gpus=tuple(stage.gpu for stage in plan.stages)), plan

    def _fits_elsewhere(
        self, spec: VlmSpec, needs: Requirements, machine: Machine, verdict: Verdict, planner: Planner
    ) -> Verdict:
        """Keep a skip only where the model fits no set of GPUs, however they are shared out."""
        facts = self.own.judge_facts(needs, machine, loads=False)
        if facts.action == "run" and self.own.lacks_any(facts, machine):
            plan = planner(spec, self.own.unmasked(machine), facts.gpus)
            if plan is not None and (plan.fits or (plan.shortage is not None and not plan.shortage.is_permanent)):
                return self.own.too_small(verdict)
        return verdict

    def _judge(
        self, needs: Requirements, machine: Machine, plan: Plan | None = None, *, loads: bool, at_load: bool
    ) -> Verdict:
        verdict = self.own.judge(needs, machine, plan, loads=loads, at_load=at_load)
        return self._losses.explain(verdict, machine)

    def _machine(self, request: pytest.FixtureRequest, *, max_age_s: float) -> Machine:
        """The value of the fixture ``vlm_machine``, read again if it is ours and live and older than ``max_age_s``."""
        machine: Machine = request.getfixturevalue("vlm_machine")
        if machine is self._first and machine.origin == "live":
            if time.monotonic() - self._read_at > max_age_s:
                self._latest = self._read()
            machine = self._latest or machine
        self.machine_used = machine
        return machine

    def _read(self) -> Machine:
        self._latest = self._config.hook.pytest_vlmgpu_inventory(config=self._config) or _collect()
        self._read_at = time.monotonic()
        self._losses.see(self._latest)
        return self._latest

    def latest_machine(self) -> Machine | None:
        """The machine as it is right now, where it is this one and can be asked; else as last read."""
        if self.machine_used is not None and self.machine_used.origin == "live" and self._latest is not None:
            try:
                self.machine_used = self._read()
            except Exception:  # noqa: BLE001 - only asked while a failure is reported, which must not be lost
                return self.machine_used
        return self.machine_used

    def _keep_from_acting(self, verdict: Verdict, request: pytest.FixtureRequest) -> Verdict:
        if self.settings.plan or self.settings.fake_gpus or (not self.uses_gpus and self.settings.machine == "live"):
            return verdict
        return keep_from_acting(verdict, self._machine(request, max_age_s=math.inf))

    def _refuse_unless_run(self, spec: VlmSpec, verdict: Verdict) -> None:
        if verdict.action == "run":
            return
        self.refusals[spec] = self._as_strict_as_wanted(verdict)
        refuse(self.refusals[spec])

    def _as_strict_as_wanted(self, verdict: Verdict) -> Verdict:
        return verdict.made_strict() if self.is_strict else verdict


def _collect() -> Machine:
    from vlm_doctor.sources import collect

    return collect(with_torch=False)


def _planner_of(request: pytest.FixtureRequest) -> Planner:
    """The planner, which is only made if a model is placed; ``None`` for one that it cannot place: its test says why."""
    from vlm_doctor.errors import VlmDoctorError

    def place(spec: VlmSpec, machine: Machine, gpus: tuple[int, ...]) -> Plan | None:
        try:
            planner: Planner = request.getfixturevalue("vlm_planner")
            return planner(spec, machine, gpus)
        except VlmDoctorError:
            return None

    return place


def refuse(verdict: Verdict) -> None:
    """End the setup of a test as the verdict says; return for ``run``."""
    if verdict.action == "skip":
        pytest.skip(verdict.text)
    if verdict.action == "error":
        pytest.fail(verdict.text, pytrace=False)


def ordinals_by_uuid(machine: Machine) -> dict[str, int]:
    """GPU UUID to CUDA ordinal, as far as the doctor can tell without torch."""
    from vlm_doctor.visibility import visible_gpus

    uuids = {gpu.index: gpu.uuid for gpu in machine.gpus}
    return {uuids[index]: ordinal for ordinal, index in enumerate(visible_gpus(machine).gpus)}


def _check_landing(spec: VlmSpec, plan: Plan, loaded: Any, machine: Machine) -> None:
    """Hold a loader of the user's own to the plan, if it tells a device_map; ours has checked every tensor itself."""
    from vlm_doctor.visibility import visible_gpus

    from .loading import LoadedVlm, device_map_for
    from .placing import Placed, check_placement

    device_map = getattr(loaded, "device_map", None) or getattr(getattr(loaded, "model", None), "hf_device_map", None)
    if isinstance(loaded, LoadedVlm) or not isinstance(device_map, dict):
        return
    devices = {str(key): f"cuda:{device}" if isinstance(device, int) else str(device) for key, device in device_map.items()}
    is_numbering_known = visible_gpus(machine).is_order_certain
    parts = [Placed(key, at) for key, at in devices.items() if is_numbering_known or not at.startswith("cuda")]
    check_placement(spec.name, parts, device_map_for(plan, ordinals_by_uuid(machine)))


def _describe(spec: VlmSpec, plan: Plan | None, seconds: float) -> Load:
    if plan is None:
        return Load(spec.label, "the CPU", seconds)
    lines = [line for stage in plan.stages for line in stage.ledger]
    return Load(
        spec.label,
        f"GPU {', '.join(str(stage.gpu) for stage in plan.stages)}",
        seconds,
        weights_bytes=sum(line.size_bytes for line in lines if line.kind == "weights"),
        predicted_peak_bytes=sum(stage.peak_bytes for stage in plan.stages),
    )
