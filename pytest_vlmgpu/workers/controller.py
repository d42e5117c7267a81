"""The controller of pytest-xdist: it leases GPUs for the run, and gives each worker its own."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..collection.groups import Groups
from ..leasing.sets import Demand, demands_of, divide, owners_of
from ..leasing.shares import Share, Shares, lease_folder, teller
from ..leasing.waiting import GRACE_S
from ..requirements import Requirements, VlmSpec
from ..state import CONTROLLER, SETTINGS, WORKER_INPUT, gate_of
from ..wording import plural
from .worker import warn, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

_LEFT_OPEN = ("load", "loadgroup", "worksteal")
"""Values of ``--dist`` that leave the plugin free to choose a worker for each test."""


class Controller:
    """Leases GPUs and gives each worker its own.

    Args:
        config: Of the controller.
        specs: execnet's, one a worker. A worker that crashes is replaced by one with the same spec.
    """

    def __init__(self, config: pytest.Config, specs: Sequence[Any]) -> None:
        self._config = config
        self._specs = list(specs)
        self._share: Share | None = None
        self._sets: list[tuple[str, ...]] = []

    @property
    def share(self) -> Share | None:
        """What the run has leased; ``None`` before that."""
        return self._share

    def owners(self) -> list[str]:
        """``worker 1 has GPU 0``, as CUDA counts within the run's own GPUs."""
        if self._share is None:
            return []
        return [
            f"worker {slot} has {' and '.join(_short(name) for name in names)}"
            for slot, names in enumerate(self._sets)
            if names
        ]

    @property
    def is_local(self) -> bool:
        """False when a worker runs on another computer, whose GPUs and files are not ours."""
        return all(spec.popen for spec in self._specs)

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._specs)

    def lease_early(self) -> None:
        """Lease what ``--vlm-gpus`` names before any worker starts, if it can be had at once.

        Each worker then begins with an equal part; the parts follow the needs as soon as these are known.
        """
        settings = self._config.stash.get(SETTINGS, None)
        if settings is None or settings.gpus.kind == "none" or not settings.is_gpus_given or not self.is_local:
            return
        if settings.lease == "off":
            return
        machine = gate_of(self._config).machine()
        if machine.origin != "live":
            return
        self._share = self._shares.take(machine, None, self.workers, may_wait=False)
        if self._share is not None and self._share.gpus:
            from ..leasing.masks import mask_for

            for spec in self._specs:
                # All of the run's: which part, is known when the tests are collected.
                spec.env.update(mask_for(self._share.gpus))

    def configure(self, node: Any) -> None:
        """Tell a worker where files go, and which of the workers it is."""
        slot = next((number for number, spec in enumerate(self._specs) if spec is node.gateway.spec), None)
        if slot is not None and self.is_local:
            node.workerinput[WORKER_INPUT] = {"folder": str(self._folder), "slot": slot, "controller": os.getpid()}

    def slot_of(self, node: Any) -> int:
        """Which of the workers a node is; its replacement is the same one."""
        return next((number for number, spec in enumerate(self._specs) if spec is node.gateway.spec), 0)

    def groups(self) -> Groups | None:
        """What the workers wrote; ``None`` when no gated test was collected."""
        for path in sorted(self._folder.glob("needs-*.json")):
            return Groups.from_json(json.loads(path.read_text(encoding="utf-8")))
        return None

    @property
    def hides_gpus(self) -> bool:
        """True when tests that are no concern of the plugin are to run where no gated test does, as long as that can be."""
        gate = gate_of(self._config)
        return gate.settings.hide_gpu_from_cpu_tests and gate.uses_gpus

    def assign(self, groups: Groups) -> dict[int, int]:
        """Settle who has which GPUs, before any test runs; returns number of a group to the worker that owns it."""
        gate = gate_of(self._config)
        tests = {number: need.tests for number, need in enumerate(groups.needs)}
        if not gate.uses_gpus or gate.settings.lease == "off":
            # Each worker may use every GPU: only loads are kept apart.
            return owners_of(dict.fromkeys(tests, ()), tests, [()] * self.workers)
        machine = gate.machine()
        if machine.origin != "live":
            return dict.fromkeys(tests, 0)
        plan_of = _Planner(may_offload=gate.settings.allow_offload)
        # Groups that need the same share one object.
        needs = {id(need): need for need in groups.needs}
        seen = self._shares.when_given_way(machine)
        demands_by_need = {key: demands_of(need, seen, gate.settings.gpus, plan_of) for key, need in needs.items()}
        by_group = {number: demands_by_need[id(need)] for number, need in enumerate(groups.needs)}
        demands = [_largest(wanted) for wanted in by_group.values() if wanted]
        if not demands:
            # Nothing to run on the GPUs seen from here: one worker says why, or knows better (a machine of its conftest).
            return dict.fromkeys(tests, 0)
        everything = [demand for wanted in by_group.values() for demand in wanted]
        if self._share is None:
            models = {spec.label for need in groups.needs for spec in need.specs}
            self._share = self._shares.take(machine, everything, self.workers, models=models)
        elif gate.settings.gpus.kind == "auto" or self._share.is_of_slices:
            self._share = self._shares.shrink(self._share, everything, self.workers, machine)
        if self._share is None:
            return dict.fromkeys(tests, 0)
        sets = self._divide(self._share, demands)
        indices = {gpu.uuid: gpu.index for gpu in machine.gpus}
        return owners_of(by_group, tests, [[indices[uuid] for uuid in uuids] for uuids in sets])

    def share_out_evenly(self) -> None:
        """Give each worker an equal part, where another scheduler decides who runs what."""
        if self._share is not None:
            self._divide(self._share, [Demand(1)] * self.workers)

    def report_not_run(self, nodeid: str, node: Any) -> None:
        """Let a test fail that no worker is left to run, as pytest-xdist does for one in which a worker crashed."""
        why = f"not run: worker {node.gateway.id} replaces one that crashed, and collected other tests than that."
        path = nodeid.partition("::")[0]
        report: Any = pytest.TestReport(nodeid, (path, None, path), {}, "failed", why, "???")  # type: ignore[arg-type]
        report.node = node
        self._config.hook.pytest_runtest_logreport(report=report)

    def close(self) -> None:
        """Give the leases back."""
        if "_shares" in self.__dict__:
            self._shares.close()

    @cached_property
    def _shares(self) -> Shares:
        gate = gate_of(self._config)
        return Shares(gate.settings, gate.own.waiting, teller(self._config), lease_folder(self._config, gate.settings))

    @cached_property
    def _folder(self) -> Path:
        factory: Any = getattr(self._config, "_tmp_path_factory", None)
        if factory is not None:  # pytest-xdist does the same for the workers' own folders
            return Path(factory.getbasetemp()) / "vlmgpu"
        import tempfile

        folder = tempfile.TemporaryDirectory(prefix="vlmgpu-")
        self._config.add_cleanup(folder.cleanup)
        return Path(folder.name)

    def _divide(self, share: Share, demands: Sequence[Demand]) -> list[tuple[str, ...]]:
        """Write down each worker's part."""
        most = 1 if share.is_of_slices else None
        self._sets = sets = divide(share.gpus, [demand.gpus for demand in demands], self.workers, most=most)
        try:
            self._write_parts(share, sets)
        except OSError as error:
            warn(f"{self._folder} cannot be written ({error.strerror}), so each worker leases GPUs for itself")
            for part in self._folder.glob("share-*.json"):
                part.unlink(missing_ok=True)
            self._shares.close()
        return sets

    def _write_parts(self, share: Share, sets: Sequence[tuple[str, ...]]) -> None:
        from ..leasing.masks import mask_for

        for slot, (gpus, spec) in enumerate(zip(sets, self._specs, strict=True)):
            part = share.part(gpus, self.workers)
            write(self._folder / f"share-{slot}.json", part._asdict())
            if gpus:  # for the worker's replacement, should it crash
                spec.env.update(mask_for(gpus))


def start_controller(config: pytest.Config, specs: Sequence[Any]) -> None:
    """Make the state of the controller, before any worker is started."""
    from ..output import keep_output

    keep_output(config)
    config.stash[CONTROLLER] = controller = Controller(config, specs)
    config.add_cleanup(controller.close)
    controller.lease_early()


def auto_workers(config: pytest.Config) -> int | None:
    """How many workers ``-n auto`` means: one for each GPU that ``--vlm-gpus`` allows, unless a conftest knows better.

    Raises:
        pytest.UsageError: A setting is wrong.
    """
    import xdist.plugin

    from .. import plugin
    from ..gating.selection import judge
    from ..options import resolve

    settings = config.stash.setdefault(SETTINGS, resolve(config))
    is_told = not settings.is_gpus_given or settings.gpus.kind == "none" or os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS")
    if is_told:
        return None
    name = "pytest_xdist_auto_num_workers"
    others = config.pluginmanager.subset_hook_caller(name, remove_plugins=[plugin, xdist.plugin])
    said: int | None = others(config=config)
    if said is not None:
        return said
    verdict = judge(Requirements(), gate_of(config).machine(), settings.gpus, is_busy_decided_later=True)
    return len(verdict.gpus) or None


def takes_over(config: pytest.Config) -> bool:
    """True when ``--dist`` leaves it open which worker runs a test."""
    return config.getoption("dist", "no") in _LEFT_OPEN


_REACH = {
    "run": "GPUs are shared out among the processes of this run and not leased: other runs may use them too",
    "off": "GPUs are not leased: whatever else runs may use them too",
}
"""What a run says of leases that do not hold for the whole machine."""


def remarks(config: pytest.Config) -> list[str]:
    """What to know about a run: leases that keep nobody off, and ``--dist`` where it, not the plugin, chooses workers."""
    settings = config.stash.get(SETTINGS, None)
    found = [_REACH[settings.lease]] if settings is not None and settings.lease in _REACH else []
    dist = config.getoption("dist", "no")
    if dist not in ("no", *_LEFT_OPEN) and config.getoption("tx", None) and not hasattr(config, "workerinput"):
        found.append(f"--dist={dist} decides which worker runs a test, so several workers may load one model")
    return found


def account(config: pytest.Config) -> list[str]:
    """Lines of the summary: which GPUs were leased, who had them, and how long they were waited for."""
    gate = gate_of(config)
    controller = config.stash.get(CONTROLLER, None)
    share = controller.share if controller is not None else gate.own.share
    lines = remarks(config)
    if share is not None and share.run_gpus:
        owners = controller.owners() if controller is not None else []
        whose = f": {'; '.join(owners)}" if owners else ""
        word = "leased" if gate.settings.lease == "machine" else "for this run"
        lines.append(f"{plural(len(share.run_gpus), 'GPU')} {word}{whose}")
    if gate.own.waiting.waited_s > GRACE_S + 1:
        lines.append(f"waited {gate.own.waiting.waited_s:.0f} s for GPUs")
    return lines


class _Planner:
    """Places models with the planner's defaults: a conftest's own planner lives in the workers only."""

    def __init__(self, *, may_offload: bool) -> None:
        self._may_offload = may_offload

    def __call__(self, spec: VlmSpec, machine: Machine, gpus: tuple[int, ...]) -> Plan | None:
        from vlm_doctor.errors import VlmDoctorError

        try:
            plan: Plan | None = self._place(spec, machine, gpus)
        except (VlmDoctorError, OSError):
            return None  # the worker that loads it says why
        return plan

    @cached_property
    def _place(self) -> Any:
        from vlm_doctor.workload import Policy, Workload

        from ..models.ladder import make_planner

        return make_planner(Workload(), Policy(), may_offload=self._may_offload)


def _short(name: str) -> str:
    """The beginning of a UUID, as nvidia-smi users read it."""
    return name[:12]


def _largest(demands: Sequence[Demand]) -> Demand:
    return max(demands, key=lambda demand: demand.gpus)
