"""What one run knows while it decides: the machine, which tests share a model, what was loaded and what failed.

Every decision is :mod:`selection`'s. Nothing is read and nothing heavy is imported before the first gated test is set up.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from .. import verdicts
from ..leasing.hiding import hider_of
from ..leasing.own_share import OwnShare
from ..leasing.waiting import GRACE_S
from ..models.lending import Lending
from ..models.loads import Load
from ..models.residents import Residents
from ..overridden import check_value
from ..requirements import GatedTest, Requirements, VlmSpec
from ..state import GATED_TEST, POSITION, VERDICT
from ..verdicts import Verdict
from .faults import fault
from .fitting import Fitting
from .machine_reader import MachineReader, ordinals_by_uuid
from .selection import judge_without_gpus, keep_from_acting
from .slices import is_slice, unfold

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.placement import Plan

    from ..models.residents import Resident
    from ..options import Settings
    from ..warm.run import Warmth

    Planner = Callable[[VlmSpec, Machine, tuple[int, ...]], Plan | None]
    Loader = Callable[[VlmSpec, Plan | None], AbstractContextManager[Any]]

T = TypeVar("T")
MEMORY_AGE_S = 5.0
"""How old a reading of free memory may be for a test that loads no model: one costs some tenths of a second."""
HEALTH_AGE_S = 30.0
"""The same for a test that asks for no memory: a GPU can be lost while tests run."""


class Gate:
    """The state of one run; kept in ``config.stash``.

    Args:
        settings: Resolved.
        config: Of this run.
        recorded: The machine of ``--vlm-machine`` or ``--vlm-fake-gpus``; ``None`` is this one, read when first needed.
    """

    def __init__(self, settings: Settings, config: pytest.Config, recorded: Machine | None = None) -> None:
        self.settings = settings
        self._config = config
        self.own = OwnShare(config, settings)
        """The GPUs of this process."""
        self.sharing: dict[VlmSpec, list[Requirements]] = {}
        """Requirements of the tests that share each load."""
        self.loads: list[Load] = []
        self.refusals: dict[VlmSpec, Verdict] = {}
        """Models that could not be loaded: each is tried once."""
        self.reader = MachineReader(config, recorded)
        self.fitting = Fitting(self.own, self.reader.losses, self.sharing, self.why_no_offload)
        self.residents = Residents()
        self._lending = Lending(self)
        self._fits: dict[VlmSpec, Verdict] = {}

    @cached_property
    def warmth(self) -> Warmth | None:
        """Models that outlive runs; ``None`` where nobody asked for any."""
        is_asked_for = self.settings.keeps_warm or self.settings.cold
        if not is_asked_for or self.settings.fake_gpus or self.settings.machine != "live":
            return None
        from ..warm.run import Warmth

        return Warmth(self.settings, lambda: self.own.share.gpus if self.own.share is not None else ())

    def on(self, machine: Machine) -> Gate:
        """The same tests on another machine."""
        other = Gate(self.settings, self._config, machine)
        other.sharing.update(self.sharing)
        other.own.needs, other.residents.uses = self.own.needs, self.residents.uses
        return other

    @property
    def machine_used(self) -> Machine | None:
        """As last read; ``None`` until a gated test was decided about."""
        return self.reader.used

    @machine_used.setter
    def machine_used(self, machine: Machine) -> None:
        self.reader.used = machine

    def machine(self) -> Machine:
        """The machine that decides: this one, read once, or that of ``--vlm-machine``."""
        return self.reader.first()

    def latest_machine(self) -> Machine | None:
        """The machine as it is right now, where it is this one and can be asked; else as last read."""
        return self.reader.now()

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
        return self.completed(VlmSpec(name)) if name else None

    def spec_asked_for(self, request: pytest.FixtureRequest) -> VlmSpec | None:
        """The model that a test loads or asks for at run time; one that names several has to load them."""
        parameter = getattr(request, "param", None)
        if isinstance(parameter, tuple):
            pytest.fail(
                f"{verdicts.WRONG}: @pytest.mark.vlm names {len(parameter)} models, and the test asks for one at run time: "
                "let the test itself take the fixture vlm, so that it runs with each.",
                pytrace=False,
            )
        return self.spec_from(parameter)

    def completed(self, spec: VlmSpec) -> VlmSpec:
        """A model with the settings of the run, where nothing else is said of it."""
        return spec.completed(gpus=spec.min_gpus, dtype=self.settings.dtype, device_map=self.settings.device_map)

    def why_no_offload(self) -> str:
        """Why no part of a model may stay in host memory, as advice; empty where it may."""
        if not self.settings.allow_offload:
            return (
                "A test on GPUs must not run there unless you say so (--vlm-allow-offload): use more GPUs or larger ones, "
                "or a smaller workload."
            )
        if self.is_strict:
            origin = self.settings.origins.get("strict", "--vlm-strict")
            return (
                f"{self.settings.origins['allow_offload']} allows that, and {origin} wants proof of GPUs: use more GPUs or "
                "larger ones, or leave out one of the two."
            )
        return ""

    def usable_gpus(self, machine: Machine, request: pytest.FixtureRequest) -> tuple[Gpu, ...]:
        """GPUs that tests may use, in CUDA order; without any, the test that asks is skipped or fails."""
        machine = unfold(machine)
        if self.uses_gpus:
            verdict = self.fitting.judge(Requirements(), machine, loads=False, at_load=False)
            refuse(self._as_wanted(verdict))
            refuse(self._as_wanted(self.settle(machine, request)))
            verdict = self.fitting.judge(Requirements(), machine, loads=False, at_load=False)
        else:
            verdict = judge_without_gpus(self.settings.gpus, wants_gpus=True)
        refuse(self._as_wanted(verdict))
        by_index = {gpu.index: gpu for gpu in machine.gpus}
        usable = tuple(by_index[index] for index in verdict.gpus)
        return usable[:1] if any(map(is_slice, usable)) else usable

    def decide(self, request: pytest.FixtureRequest) -> None:
        """Decide about the test that is set up, let the project have its say, and end the setup unless it is to run."""
        item = request.node
        # Of an attempt before, where a plugin runs tests again.
        item.user_properties[:] = [pair for pair in item.user_properties if not pair[0].startswith("vlmgpu.")]
        self.residents.now = item.stash.get(POSITION, -1)
        verdict = self.judge_test(item.stash[GATED_TEST], request)
        verdict = self._as_said(item.ihook.pytest_vlmgpu_verdict(item=item, verdict=verdict) or verdict)
        item.stash[VERDICT] = self._as_wanted(verdict)
        if self.settings.plan:
            pytest.skip("it was only asked what would become of the test")
        refuse(item.stash[VERDICT])

    @staticmethod
    def _as_said(verdict: Verdict) -> Verdict:
        """A verdict that a hook may have given."""
        from vlm_doctor.errors import UsageError

        try:
            check_value(verdict, Verdict, origin="hook pytest_vlmgpu_verdict", wanted="a Verdict or None")
        except UsageError as error:
            return Verdict("error", verdicts.WRONG, str(error))
        return verdict

    def judge_test(self, test: GatedTest, request: pytest.FixtureRequest) -> Verdict:
        """Decide about a test before any of its fixtures is set up, as far as that can be told without loading."""
        from vlm_doctor.errors import UsageError

        try:
            if not self.uses_gpus:
                verdict = judge_without_gpus(self.settings.gpus, wants_gpus=test.wants_gpus)
            else:
                verdict = self._judge_on_gpus(test, request)
        except UsageError as error:
            return Verdict("error", verdicts.WRONG, str(error))
        if verdict.action == "run" and test.loads and not test.specs:
            advice = 'add @pytest.mark.vlm("org/model"), or give --vlm-model'
            return Verdict("error", verdicts.WRONG, f"the test uses the fixture vlm and names no model; {advice}.")
        return self.keep_from_acting(verdict, request)

    def plan_of(self, test: GatedTest) -> Plan | None:
        """Where the model of a test was last placed."""
        return next((self.fitting.plans[spec] for spec in test.specs if spec in self.fitting.plans), None)

    def need_bytes(self, test: GatedTest) -> int | None:
        """Memory that a test is expected to use over all its GPUs: the peak predicted of its models, else its markers."""
        plans = [self.fitting.plans[spec] for spec in test.specs if spec in self.fitting.plans]
        if plans:
            return sum(stage.peak_bytes for plan in plans for stage in plan.stages)
        needs = test.requirements
        return max((needs.vram_bytes or 0) * needs.gpus, needs.total_vram_bytes or 0) or None

    def _judge_on_gpus(self, test: GatedTest, request: pytest.FixtureRequest) -> Verdict:
        hider = hider_of(self._config)
        if hider is not None and hider.started_by and (refusal := hider.refusal()):
            return refusal
        needs = test.requirements
        needs_memory = not test.loads and (needs.needs_memory or needs.exclusive or bool(test.specs))
        max_age_s = MEMORY_AGE_S if needs_memory else HEALTH_AGE_S
        at_load = not test.loads or self.settings.plan

        def judge_now(max_age_s: float) -> Verdict:
            machine = self.reader.current(request, max_age_s=max_age_s)
            if self.warmth is not None:
                machine = self.warmth.as_free(machine) if self.settings.plan else self.warmth.as_ours(machine)
            verdict = self.fitting.judge(test.requirements, machine, loads=test.loads, at_load=at_load)
            for spec in test.specs:
                if verdict.action == "run":
                    verdict = self._judge_model(spec, test, machine, verdict, request)
            return verdict

        machine = self.reader.current(request, max_age_s=math.inf)
        verdict = self.fitting.judge(test.requirements, machine, loads=test.loads, at_load=False)
        if verdict.action != "run":
            return verdict
        if self.settings.plan:
            return judge_now(max_age_s)
        # What no machine of this kind could run takes nothing from others: GPUs are leased from here on.
        waited_s = self.own.waiting.waited_s
        refusal = self.settle(machine, request)
        if refusal.action != "run":
            return refusal
        # What was read before a lease was waited for shows the memory of whoever had the GPUs until then.
        first = judge_now(0 if self.own.waiting.waited_s > waited_s else max_age_s)
        # Unlike a model, this test cannot do with what a warm one leaves.
        has_ended = first.code == verdicts.BUSY and self.end_warm()
        grace_s = GRACE_S if has_ended else self.own.grace_s
        return self.when_free(judge_now, first, lambda verdict: verdict, grace_s=grace_s)

    def end_warm(self) -> bool:
        """Have idle warm hosts give back the GPUs of this process; False where there is none."""
        share = self.own.share
        if self.warmth is not None and share is not None:
            return self.warmth.end_idle(share.gpus)
        return self.own.ask_warm_hosts(self.reader.first())

    def settle(self, machine: Machine, request: pytest.FixtureRequest) -> Verdict:
        """Take this process' GPUs, if that was not done; the refusal where there are none for it, or none any more."""
        refusal = self.own.settle(machine, self._planner_of(request))
        hider = hider_of(self._config)
        if refusal is None and hider is not None:
            refusal = hider.refusal()
        return refusal or Verdict("run")

    def when_free(
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
            if verdict_of(answer[0]).code == verdicts.BUSY and self.reader.is_reread:
                answer[0] = ask(0)
            return verdict_of(answer[0]).code != verdicts.BUSY

        if verdict_of(answer[0]).code == verdicts.BUSY and self.reader.is_reread:
            self.own.waiting.until(is_free, lambda: verdict_of(answer[0]).reason, grace_s=grace_s)
        return answer[0]

    def gpu_uuids(self, test: GatedTest, verdict: Verdict) -> list[str]:
        """GPUs a test ran on: those of its model if it loads one, else those that meet its requirements."""
        resident = self.resident_of(test)
        if resident is not None:
            return list(resident.uuids)
        machine = self.machine_used
        return [gpu.uuid for gpu in machine.gpus if gpu.index in verdict.gpus] if machine is not None else []

    def resident_of(self, test: GatedTest) -> Resident | None:
        """The loaded model that a test shares."""
        return self.residents.get(test.specs[0]) if test.loads and test.specs else None

    def loaded(self, spec: VlmSpec | None, request: pytest.FixtureRequest, loader: Loader) -> AbstractContextManager[Any]:
        """Load a model for as long as tests need it. A refusal ends the setup of the test and is remembered."""
        return self._lending.loaded(spec, request, loader)

    def let_go(self, spec: VlmSpec) -> None:
        """Unload a model that is kept for later tests: a test has spoilt it."""
        self._lending.let_go(spec)

    def first_device(self, request: pytest.FixtureRequest) -> str:
        """The first usable GPU in torch's words; without any, the test that asks is skipped or fails."""
        if not self.uses_gpus:
            return "cpu"
        machine: Machine = request.getfixturevalue("vlm_machine")
        first = self.usable_gpus(machine, request)[0]
        return f"cuda:{0 if is_slice(first) else ordinals_by_uuid(self.own.as_shown(machine)).get(first.uuid, 0)}"

    def _judge_model(
        self, spec: VlmSpec, test: GatedTest, machine: Machine, own: Verdict, request: pytest.FixtureRequest
    ) -> Verdict:
        """Does the model fit? Whether its memory is taken right now is asked when the test or the fixture loads it."""
        if not test.loads:
            return self.fitting.place(spec, test.requirements, machine, own, request, loads=False, at_load=True)[0]
        if self.residents.get(spec) is not None:
            return own
        if spec in self.refusals:
            return self.refusals[spec]
        if spec not in self._fits:
            self._fits[spec] = self.fitting.place_shared(spec, machine, request, at_load=self.settings.plan)[0]
        return self._fits[spec]

    def _planner_of(self, request: pytest.FixtureRequest) -> Planner:
        """The planner, made only if a model is placed; ``None`` for one that it cannot place: its test says why."""
        from vlm_doctor.errors import VlmDoctorError

        def place(spec: VlmSpec, machine: Machine, gpus: tuple[int, ...]) -> Plan | None:
            try:
                return self.fitting.planner_for(request)(spec, machine, gpus)
            except VlmDoctorError:
                return None

        return place

    def keep_from_acting(self, verdict: Verdict, request: pytest.FixtureRequest) -> Verdict:
        """Nothing runs for a machine that is not this one."""
        if self.settings.plan or self.settings.fake_gpus or (not self.uses_gpus and self.settings.machine == "live"):
            return verdict
        return keep_from_acting(verdict, self.reader.current(request, max_age_s=math.inf))

    def refuse_unless_run(self, spec: VlmSpec, verdict: Verdict) -> None:
        """Remember that a model cannot be loaded, and end the setup of the test that asked for it."""
        if verdict.action == "run":
            return
        self.refusals[spec] = self._as_wanted(verdict)
        refuse(self.refusals[spec])

    def _as_wanted(self, verdict: Verdict) -> Verdict:
        """As ``--vlm-busy`` and ``--vlm-strict`` want it; the latter has the last word."""
        if self.settings.busy == "skip" and verdict.code in (verdicts.BUSY, verdicts.LEASED) and verdict.action == "error":
            verdict = self._skipped(verdict)
        return verdict.made_strict() if self.is_strict else verdict

    def _skipped(self, verdict: Verdict) -> Verdict:
        """A skip, unless a GPU is broken or lost on which the test might have run instead."""
        machine = self.machine_used or self.machine()
        broken = fault(machine)
        if broken:
            return Verdict("error", verdicts.FAULT, f"{verdict.reason} {broken}")
        return self.reader.losses.explain(replace(verdict, action="skip"), machine)


def refuse(verdict: Verdict) -> None:
    """End the setup of a test as the verdict says; return for ``run``."""
    if verdict.action == "skip":
        pytest.skip(verdict.text)
    if verdict.action == "error":
        pytest.fail(verdict.text, pytrace=False)
