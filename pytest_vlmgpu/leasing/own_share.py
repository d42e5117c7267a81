"""What this process may use of the GPUs, and every judgement in that light.

A worker of pytest-xdist is told its share by the controller; any other process leases its own when the first test that
needs a GPU is about to run. What the whole machine cannot do is a skip; what only this share cannot do is an error.
"""

from __future__ import annotations

import math
import os
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .. import verdicts
from ..gating.selection import judge
from ..gating.slices import has_slices
from ..options import GpuChoice
from ..output import open_line
from ..requirements import Requirements
from ..verdicts import Verdict
from . import masks
from .hiding import lifted
from .leases import DEFAULT_FOLDER, Leases
from .sets import demands_of
from .shares import Share, Shares, lease_folder, teller
from .waiting import GRACE_S, Waiting

if TYPE_CHECKING:
    import pytest

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

    from ..options import Settings
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
        self._settled_at = -math.inf
        self._leases: Shares | None = None
        """What this process has leased itself; ``None`` in a worker with a share."""
        self._mask: str | None = None
        """CUDA_VISIBLE_DEVICES as this process set it for itself."""
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

    @property
    def grace_s(self) -> float:
        """Seconds in which memory may still be that of a run that had these GPUs before, and gave the lease back first."""
        return max(0.0, self._settled_at + GRACE_S - time.monotonic())

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
            self._settled_at = time.monotonic()
        if self._share is not None and self._share.is_of_slices:
            self._share = self._of_seen_slice(self._share, machine)
        share = self._share
        if share is None or share.gpus:
            return None
        if share.problem:
            return Verdict("error", share.code, share.problem)
        return Verdict("error", verdicts.NOT_SHARED, f"this test needs a GPU. {_why_so_few(share)}")

    def accept(self, share: Share) -> None:
        """Take the share that the controller gave, before any test of this worker runs."""
        self._share, self._is_settled, self._settled_at = share, True, time.monotonic()
        if share.gpus:
            self._show_only(share)

    def unmasked(self, machine: Machine) -> Machine:
        """The machine as the run found it, before this process was shown its share alone."""
        return machine if self._share is None else _masked(machine, self._share.outer)

    def as_shown(self, machine: Machine) -> Machine:
        """The machine as CUDA shows it to this process, which may have been read before it was shown its share alone."""
        return machine if self._mask is None else _masked(machine, self._mask)

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

    def ask_warm_hosts(self, machine: Machine) -> bool:
        """Have idle warm hosts end that hold memory of GPUs that may be used; False where there is none.

        Whoever leases GPUs for the machine has asked them already: this is for ``--vlm-lease=run`` and ``off``.
        """
        if self._settings.lease == "machine" or machine.origin != "live":
            return False
        allowed = judge(Requirements(), self.as_shown(machine), self._given, is_busy_decided_later=True).gpus
        names = [gpu.uuid for gpu in machine.gpus if gpu.index in allowed]
        return Leases(Path(self._settings.lease_dir or DEFAULT_FOLDER)).ask_for(names, len(names))

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
        # Of slices CUDA shows a process one, leased or not: it must be one that it may use.
        if self._settings.lease == "off" and not has_slices(machine, judge(Requirements(), machine, self._given).gpus):
            return None
        folder = lease_folder(self._config, self._settings)
        self._leases = shares = Shares(self._settings, self.waiting, teller(self._config), folder)
        self._config.add_cleanup(shares.close)
        seen = shares.when_given_way(machine)
        demands = [each for need in self.needs for each in demands_of(need, seen, self._given, plan_of)]
        models = {spec.label for need in self.needs for spec in need.specs}
        share = shares.take(machine, demands or None, workers=1, models=models)
        from vlm_doctor.visibility import visible_gpus

        uuids = {gpu.index: gpu.uuid for gpu in machine.gpus}
        if share is not None and share.gpus and share.gpus != tuple(uuids[index] for index in visible_gpus(machine).gpus):
            self._show_only(share)
        return share

    def _show_only(self, share: Share) -> None:
        """Show CUDA these GPUs alone. Where it has counted them already, only the plans keep to the share."""
        if masks.is_cuda_started():
            return
        mask = masks.mask_for(share.gpus)
        self._mask = mask[masks.VARIABLE]
        with lifted(self._config):
            self._config.add_cleanup(masks.apply(mask))

    def _of_seen_slice(self, share: Share, machine: Machine) -> Share:
        """The share, without a slice that this process cannot see: CUDA was started too early, and shows another one."""
        if not share.gpus or self._mask is not None:
            return share
        from vlm_doctor.visibility import visible_gpus

        uuids = {gpu.index: gpu.uuid for gpu in machine.gpus}
        seen = [uuids[index] for index in visible_gpus(machine).gpus[:1]]
        if seen == [share.gpus[0]]:
            return share
        problem = (
            f"CUDA was started in this process before its MIG slice was chosen ({share.gpus[0]}), so it sees another one: "
            "start no CUDA while modules are imported (torch.cuda.is_available() does, unless "
            "PYTORCH_NVML_BASED_CUDA_CHECK=1 is set), or set CUDA_VISIBLE_DEVICES to one slice before the run."
        )
        if self._leases is not None:
            self._leases.close()
        return share._replace(gpus=(), run_gpus=(), code=verdicts.FAULT, problem=problem)


def _masked(machine: Machine, value: str | None) -> Machine:
    """The same machine with this value of CUDA_VISIBLE_DEVICES, or none."""
    if machine.environment.get(masks.VARIABLE) == value:
        return machine
    from msgspec.structs import replace

    environment = {name: text for name, text in machine.environment.items() if name != masks.VARIABLE}
    if value is not None:
        environment[masks.VARIABLE] = value
    return replace(machine, environment=environment)


def _why_so_few(share: Share) -> str:
    whole = f"{len(share.run_gpus)} that this run has leased"
    if share.workers > 1:
        return (
            f"This worker has {len(share.gpus)} of the {whole}, which {share.workers} workers share: use fewer workers "
            "(-n), leave --dist away, or say vlm_requires(gpus=N) on the tests that need more, so that they get more."
        )
    return f"As their markers asked, the tests have {whole}: say vlm_requires(gpus=N) on the tests that need more."
