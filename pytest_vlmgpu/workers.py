"""Controller and workers of pytest-xdist: what the tests need goes up, which GPUs a worker has comes down.

Both travel as files in the run's own temporary folder, since the protocol of pytest-xdist has no room for them. Nothing is
written before a gated test was collected.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from .requirements import Requirements, VlmSpec
from .sets import Demand, Need, demands_of, divide, owners_of
from .shares import Share, Shares
from .state import GATED_TEST, SETTINGS, gate_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.placement import Plan

    from .requirements import GatedTest

INPUT = "vlmgpu"
"""Key of what a worker is told (``config.workerinput``)."""
CONTROLLER: pytest.StashKey[Controller] = pytest.StashKey()
"""Of the controller's config."""
_LEFT_OPEN = ("load", "loadgroup", "worksteal")
"""Values of ``--dist`` that leave the plugin free to choose a worker for each test."""


_TAKES_ALL = frozenset({"vlm_gpus", "vlm_factory"})
"""Fixtures whose tests may use every GPU of the run."""
_SET_PARENT_DEATH_SIGNAL = 1
"""``PR_SET_PDEATHSIG``. Source: sys/prctl.h."""


class Groups(NamedTuple):
    """What all tests of a run need; equal in all workers."""

    needs: list[Need]
    group_of: dict[int, int]
    """Position of a gated test in the collection to its need."""
    bound: dict[int, str]
    """Position of another test to its ``xdist_group``, whose tests stay together."""


def group_tests(items: Sequence[pytest.Item]) -> Groups:
    """Group gated tests by the model that they share; each that loads nothing is a group of its own."""
    needs: list[Need] = []
    group_of: dict[int, int] = {}
    bound: dict[int, str] = {}
    shared: dict[VlmSpec, int] = {}
    for position, item in enumerate(items):
        test = item.stash.get(GATED_TEST, None)
        if test is None:
            mark = item.get_closest_marker("xdist_group")
            if mark is not None:
                bound[position] = str(mark.args[0] if mark.args else mark.kwargs.get("name", "default"))
            continue
        # Which models a test with vlm_factory loads is not known before it runs.
        takes_all = not _TAKES_ALL.isdisjoint(getattr(item, "fixturenames", ()))
        asked = _with_estimates(item, test)
        number = shared.get(test.specs[0]) if test.loads and test.specs else None
        if number is None:
            number = len(needs)
            needs.append(Need(test.specs, (asked,), takes_all))
            if test.loads and test.specs:
                shared[test.specs[0]] = number
        else:
            known = needs[number]
            joined = tuple(dict.fromkeys([*known.requirements, asked]))
            needs[number] = Need(known.specs, joined, known.takes_all or takes_all, known.tests + 1)
        group_of[position] = number
    return Groups(needs, group_of, bound)


def _with_estimates(item: pytest.Item, test: GatedTest) -> Requirements:
    """What a test asks for, and what an engine that places its model itself needs (``pytest_vlmgpu_estimate``)."""
    asked = [item.config.hook.pytest_vlmgpu_estimate(config=item.config, spec=spec) for spec in test.specs]
    needs = [Requirements(gpus=one.gpus, vram_bytes=one.vram_bytes) for one in asked if one is not None]
    return Requirements.strictest([test.requirements, *needs]) if needs else test.requirements


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
        machine = gate_of(self._config).machine()
        if machine.origin != "live":
            return
        self._share = self._shares.take(machine, None, self.workers, may_wait=False)
        if self._share is not None and self._share.gpus:
            from .masks import mask_for

            for spec in self._specs:
                # All of the run's: which part, is known when the tests are collected.
                spec.env.update(mask_for(self._share.names))

    def configure(self, node: Any) -> None:
        """Tell a worker where files go, and which of the workers it is."""
        slot = next((number for number, spec in enumerate(self._specs) if spec is node.gateway.spec), None)
        if slot is not None and self.is_local:
            node.workerinput[INPUT] = {"folder": str(self._folder), "slot": slot}

    def slot_of(self, node: Any) -> int:
        """Which of the workers a node is; its replacement is the same one."""
        return next((number for number, spec in enumerate(self._specs) if spec is node.gateway.spec), 0)

    def groups(self) -> Groups | None:
        """What the workers wrote; ``None`` when no gated test was collected."""
        for path in sorted(self._folder.glob("needs-*.json")):
            fields = json.loads(path.read_text(encoding="utf-8"))
            return Groups(
                [_need_from(need) for need in fields["needs"]],
                {int(position): number for position, number in fields["group_of"].items()},
                {int(position): name for position, name in fields["bound"].items()},
            )
        return None

    def assign(self, groups: Groups) -> dict[int, int]:
        """Settle who has which GPUs, before any test runs; returns number of a group to the worker that owns it."""
        gate = gate_of(self._config)
        tests = {number: need.tests for number, need in enumerate(groups.needs)}
        if not gate.uses_gpus:
            return owners_of(dict.fromkeys(tests, ()), tests, [()] * self.workers)
        machine = gate.machine()
        if machine.origin != "live":
            return dict.fromkeys(tests, 0)
        plan_of = _Planner()
        by_group = {
            number: demands_of(need, machine, gate.settings.gpus, plan_of) for number, need in enumerate(groups.needs)
        }
        demands = [_largest(wanted) for wanted in by_group.values() if wanted]
        if not demands:
            # Nothing to run on the GPUs seen from here: one worker says why, or knows better (a machine of its conftest).
            return dict.fromkeys(tests, 0)
        everything = [demand for wanted in by_group.values() for demand in wanted]
        if self._share is None:
            self._share = self._shares.take(machine, everything, self.workers)
        elif gate.settings.gpus.kind == "auto":
            self._share = self._shares.shrink(self._share, everything, self.workers, machine)
        if self._share is None:
            return dict.fromkeys(tests, 0)
        sets = self._divide(self._share, demands)
        indices = {name: gpu.index for name, gpu in zip(self._share.names, self._gpus_of(machine), strict=True)}
        return owners_of(by_group, tests, [[indices[name] for name in names] for names in sets])

    def share_out_evenly(self) -> None:
        """Give each worker an equal part, where another scheduler decides who runs what."""
        if self._share is not None:
            self._divide(self._share, [Demand(1)] * self.workers)

    def close(self) -> None:
        """Give the leases back."""
        if "_shares" in self.__dict__:
            self._shares.close()

    @cached_property
    def _shares(self) -> Shares:
        gate = gate_of(self._config)
        return Shares(gate.settings, gate.own.waiting)

    @cached_property
    def _folder(self) -> Path:
        factory: Any = getattr(self._config, "_tmp_path_factory", None)
        if factory is not None:  # pytest-xdist does the same for the workers' own folders
            return Path(factory.getbasetemp()) / "vlmgpu"
        import tempfile

        folder = tempfile.TemporaryDirectory(prefix="vlmgpu-")
        self._config.add_cleanup(folder.cleanup)
        return Path(folder.name)

    def _gpus_of(self, machine: Machine) -> list[Gpu]:
        by_uuid = {gpu.uuid: gpu for gpu in machine.gpus}
        return [by_uuid[uuid] for uuid in self._share.gpus] if self._share is not None else []

    def _divide(self, share: Share, demands: Sequence[Demand]) -> list[tuple[str, ...]]:
        """Write down each worker's part."""
        self._sets = sets = divide(share.names, [demand.gpus for demand in demands], self.workers)
        try:
            self._write_parts(share, sets)
        except OSError as error:
            _warn(f"{self._folder} cannot be written ({error.strerror}), so each worker leases GPUs for itself")
            for part in self._folder.glob("share-*.json"):
                part.unlink(missing_ok=True)
            self._shares.close()
        return sets

    def _write_parts(self, share: Share, sets: Sequence[tuple[str, ...]]) -> None:
        from .masks import mask_for

        for slot, (names, spec) in enumerate(zip(sets, self._specs, strict=True)):
            part = share.part(names, self.workers)
            _write(self._folder / f"share-{slot}.json", part._asdict())
            if names:  # for the worker's replacement, should it crash
                spec.env.update(mask_for(names))


def start_controller(config: pytest.Config, specs: Sequence[Any]) -> None:
    """Make the state of the controller, before any worker is started."""
    config.stash[CONTROLLER] = controller = Controller(config, specs)
    config.add_cleanup(controller.close)
    controller.lease_early()


def auto_workers(config: pytest.Config) -> int | None:
    """How many workers ``-n auto`` means: one for each GPU that ``--vlm-gpus`` allows.

    Raises:
        pytest.UsageError: A setting is wrong.
    """
    from .options import resolve
    from .selection import judge

    settings = config.stash.setdefault(SETTINGS, resolve(config))
    is_told = not settings.is_gpus_given or settings.gpus.kind == "none" or os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS")
    if is_told:
        return None
    verdict = judge(Requirements(), gate_of(config).machine(), settings.gpus, is_busy_decided_later=True)
    return len(verdict.gpus) or None


class Worker:
    """Applies a worker's share before its first test; registered when gated tests were collected."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._is_done = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> None:
        """Show CUDA this worker's GPUs alone, before any test, gated or not, can start it."""
        if not self._is_done:
            self._is_done = True
            share = share_of_worker(self._config)
            if share is not None and share.gpus:
                gate_of(self._config).own.accept(share)


def hand_in(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Write down what the tests of a worker need, where the controller looks."""
    told = getattr(config, "workerinput", {}).get(INPUT)
    if told is None:
        return
    groups = group_tests(items)
    name = f"needs-{getattr(config, 'workerinput', {}).get('workerid', os.getpid())}.json"
    fields = {"needs": [asdict(need) for need in groups.needs], "group_of": groups.group_of, "bound": groups.bound}
    try:
        _write(Path(told["folder"]) / name, fields)
    except OSError as error:
        _warn(f"{told['folder']} cannot be written ({error.strerror}), so this worker leases GPUs for itself")
    _end_with_parent()
    config.pluginmanager.register(Worker(config), "vlmgpu-worker")


def share_of_worker(config: pytest.Config) -> Share | None:
    """What the controller gave this worker; ``None`` when it gave nothing, or this is no worker."""
    told = getattr(config, "workerinput", {}).get(INPUT)
    if told is None:
        return None
    try:
        text = (Path(told["folder"]) / f"share-{told['slot']}.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return Share.from_json(json.loads(text))


def _end_with_parent() -> None:
    """Let the kernel end this worker as soon as the controller, which holds the leases, is gone: memory goes with it.

    By itself a worker notices when its test has ended, which may be minutes later.
    """
    import ctypes
    import signal

    with suppress(AttributeError, OSError):  # Linux alone has it
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def takes_over(config: pytest.Config) -> bool:
    """True when ``--dist`` leaves it open which worker runs a test."""
    return config.getoption("dist", "no") in _LEFT_OPEN


def remark(config: pytest.Config) -> str:
    """What to know about this run's workers, where ``--dist`` keeps the plugin from choosing them."""
    dist = config.getoption("dist", "no")
    if dist in ("no", *_LEFT_OPEN) or not config.getoption("tx", None) or hasattr(config, "workerinput"):
        return ""
    return f"--dist={dist} decides which worker runs a test, so several workers may load one model"


def account(config: pytest.Config) -> list[str]:
    """Lines of the summary: which GPUs were leased, who had them, and how long they were waited for."""
    gate = gate_of(config)
    controller = config.stash.get(CONTROLLER, None)
    share = controller.share if controller is not None else gate.own.share
    lines = [text for text in (remark(config),) if text]
    if share is not None and share.run_gpus:
        count = len(share.run_gpus)
        owners = controller.owners() if controller is not None else []
        whose = f": {'; '.join(owners)}" if owners else ""
        lines.append(f"{count} GPU{'s' if count > 1 else ''} leased{whose}")
    if gate.own.waiting.waited_s >= 1:
        lines.append(f"waited {gate.own.waiting.waited_s:.0f} s for GPUs")
    return lines


class _Planner:
    """Places models with the planner's defaults: a conftest's own planner lives in the workers only."""

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

        from .ladder import make_planner

        return make_planner(Workload(), Policy())


def _warn(sentence: str) -> None:
    warnings.warn(pytest.PytestWarning(f"vlmgpu: {sentence}: a model may be loaded by several workers."), stacklevel=2)


def _short(name: str) -> str:
    """The beginning of a UUID, as nvidia-smi users read it."""
    return name[:12]


def _largest(demands: Sequence[Demand]) -> Demand:
    return max(demands, key=lambda demand: demand.gpus)


def _need_from(fields: dict[str, Any]) -> Need:
    specs = tuple(VlmSpec(**spec) for spec in fields["specs"])
    requirements = []
    for required in fields["requirements"]:
        capability = required["capability"]
        requirements.append(Requirements(**{**required, "capability": tuple(capability) if capability else None}))
    return Need(specs, tuple(requirements), fields["takes_all"], fields["tests"])


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)
