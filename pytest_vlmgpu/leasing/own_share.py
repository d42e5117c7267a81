"""What this process may use of the GPUs, and every judgement in that light.

A worker of pytest-xdist is told its share by the controller; any other process leases its own when the first test that
needs a GPU is about to run. What the whole machine cannot do is a skip; what only this share cannot do is an error.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING

from .. import verdicts
from ..gating.selection import judge
from ..options import GpuChoice
from ..output import open_line
from ..verdicts import Verdict
from . import masks
from .sets import demands_of
from .shares import Share, Shares, lease_folder, teller
from .waiting import Waiting

if TYPE_CHECKING:
    import pytest

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

    from ..options import Settings
    from ..requirements import Requirements
    from .sets import Need, PlanOf


class OwnShare:
    """The GPUs of this process, from the first test that needs one.

    Args:
        config: Of this run.
        settings: Resolved.
    """

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self._config = config
        self._settings = settings
        self._given = settings.gpus
        self._share: Share | None = None
        self._is_settled = False
        self.needs: list[Need] = []
        """Of all tests that were collected and will run, one a group."""

    @cached_property
    def waiting(self) -> Waiting:
        """The time that this process may wait."""
        return Waiting(self._settings.wait_s, lambda: open_line(self._config, first_s=0.0, in_log_of_worker=True))

    @property
    def share(self) -> Share | None:
        """``None`` before the first test that needs a GPU, and where there is nothing to lease."""
        return self._share

    def settle(self, machine: Machine, plan_of: PlanOf) -> Verdict | None:
        """Take this process' GPUs, once; returns why there are none, if there should be some.

        Args:
            machine: As last read. Only of a live one anything is leased.
            plan_of: Places a model, to tell how many GPUs are needed.
        """
        if not self._is_settled and machine.origin == "live":
            self._is_settled = True
            from ..workers.worker import share_of_worker

            self._share = share_of_worker(self._config) or self._lease(machine, plan_of)
        share = self._share
        if share is None or share.gpus:
            return None
        if share.problem:
            return Verdict("error", share.code, share.problem)
        return Verdict("error", verdicts.NOT_SHARED, f"this test needs a GPU. {_why_so_few(share)}")

    def accept(self, share: Share) -> None:
        """Take the share that the controller gave, before any test of this worker runs."""
        self._share, self._is_settled = share, True
        if share.gpus:
            _show_only(share, self._config)

    def unmasked(self, machine: Machine) -> Machine:
        """The machine as the run found it, before this process was shown its share alone."""
        if self._share is None or machine.environment.get(masks.VARIABLE) == self._share.outer:
            return machine
        from msgspec.structs import replace as replaced

        environment = {name: value for name, value in machine.environment.items() if name != masks.VARIABLE}
        if self._share.outer is not None:
            environment[masks.VARIABLE] = self._share.outer
        return replaced(machine, environment=environment)

    def judge(
        self, needs: Requirements, machine: Machine, plan: Plan | None = None, *, loads: bool, at_load: bool
    ) -> Verdict:
        """Decide as :func:`pytest_vlmgpu.gating.selection.judge`, on the GPUs of this process."""
        share = self._share
        if share is None:
            return judge(
                needs,
                machine,
                self._given,
                plan=plan,
                needs_torch=loads,
                is_busy_decided_later=not at_load,
                own_pid=os.getpid(),
            )
        facts = self.judge_facts(needs, machine, loads=loads)
        if facts.action != "run" or not share.gpus:
            return facts
        here = {gpu.uuid for gpu in machine.gpus}
        left = tuple(uuid for uuid in share.gpus if uuid in here)
        if not left:
            gone = ", ".join(share.gpus)
            return Verdict(
                "error", verdicts.FAULT, f"the GPUs of this process are gone ({gone}): see dmesg for Xid messages."
            )
        # One that was lost since it was leased is missed by the tests that need it, and by no other.
        choice = share.choice(self._given)._replace(uuids=left)
        verdict = judge(
            needs,
            machine,
            choice,
            plan=plan,
            needs_torch=loads,
            is_busy_decided_later=not at_load,
            own_pid=os.getpid(),
        )
        # Whether a model that does not fit here fits elsewhere, only a plan can tell.
        if verdict.action == "skip" and verdict.code != verdicts.DOES_NOT_FIT:
            return self.too_small(verdict)
        return verdict

    def judge_facts(self, needs: Requirements, machine: Machine, *, loads: bool) -> Verdict:
        """Decide whether the run's GPUs can ever meet the requirements, whoever uses them now."""
        choice = self._given
        if self._share is not None and self._share.run_gpus and choice.kind != "auto":
            choice = GpuChoice(kind="uuids", uuids=self._share.run_gpus, text=choice.text)
        return judge(needs, self.unmasked(machine), choice, needs_torch=loads, is_busy_decided_later=True)

    def lacks_any(self, facts: Verdict, machine: Machine) -> bool:
        """True when GPUs that can do it are not this process'."""
        uuids = {gpu.index: gpu.uuid for gpu in machine.gpus}
        return self._share is not None and not {uuids[index] for index in facts.gpus}.issubset(self._share.gpus)

    def too_small(self, verdict: Verdict) -> Verdict:
        """The error for what only this share cannot do."""
        share = self._share
        assert share is not None
        if share.problem:
            return Verdict("error", share.code, f"{verdict.reason} {share.problem}")
        return Verdict("error", verdicts.NOT_SHARED, f"{verdict.reason} {_why_so_few(share)}")

    def _lease(self, machine: Machine, plan_of: PlanOf) -> Share | None:
        if self._settings.lease == "off":
            return None
        shares = Shares(self._settings, self.waiting, teller(self._config), lease_folder(self._config, self._settings))
        self._config.add_cleanup(shares.close)
        seen = shares.when_given_way(machine)
        demands = [each for need in self.needs for each in demands_of(need, seen, self._given, plan_of)]
        models = {spec.label for need in self.needs for spec in need.specs}
        share = shares.take(machine, demands or None, workers=1, models=models)
        from vlm_doctor.visibility import visible_gpus

        uuids = {gpu.index: gpu.uuid for gpu in machine.gpus}
        if share is not None and share.gpus and share.gpus != tuple(uuids[index] for index in visible_gpus(machine).gpus):
            _show_only(share, self._config)
        return share


def _show_only(share: Share, config: pytest.Config) -> None:
    """Show CUDA these GPUs alone. Where it has counted them already, only the plans keep to the share."""
    if not masks.is_cuda_started():
        config.add_cleanup(masks.apply(masks.mask_for(share.gpus)))


def _why_so_few(share: Share) -> str:
    whole = f"{len(share.run_gpus)} that this run has leased"
    if share.workers > 1:
        return (
            f"This worker has {len(share.gpus)} of the {whole}, which {share.workers} workers share: use fewer workers "
            "(-n), leave --dist away, or say vlm_requires(gpus=N) on the tests that need more, so that they get more."
        )
    return f"As their markers asked, the tests have {whole}: say vlm_requires(gpus=N) on the tests that need more."
