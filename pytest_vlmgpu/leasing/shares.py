"""The GPUs that this run may use: leased for the whole machine by the one process that decides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import verdicts
from ..gating.selection import judge
from ..gating.slices import PREFIX, has_slices
from ..options import GpuChoice
from ..requirements import Requirements
from ..state import WORKER_INPUT
from .leases import DEFAULT_FOLDER, LeaseError, Leases
from .masks import VARIABLE
from .sets import by_preference, cover, total_demand
from .waiting import GRACE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import pytest

    from vlm_doctor.machine import Gpu, Machine

    from ..options import Settings
    from ..warm.hosts import Borrowed
    from .sets import Demand
    from .waiting import Waiting


class Share(NamedTuple):
    """GPUs of one process of this run. Travels as JSON."""

    gpus: tuple[str, ...]
    """UUIDs, in the order in which CUDA counts them; of MIG slices their own."""
    run_gpus: tuple[str, ...]
    """UUIDs of all GPUs that this run has leased."""
    outer: str | None
    """CUDA_VISIBLE_DEVICES as the run found it."""
    code: str = ""
    """With ``problem``: why GPUs are missing, VLM730 or VLM731."""
    problem: str = ""
    workers: int = 1
    """Among how many processes the run's GPUs are shared."""

    def choice(self, given: GpuChoice) -> GpuChoice:
        """``--vlm-gpus`` for this process."""
        return GpuChoice(kind="uuids", uuids=self.gpus, text=given.text)

    @property
    def is_of_slices(self) -> bool:
        """True when these are MIG slices, of which a process can use one."""
        return any(uuid.startswith(PREFIX) for uuid in self.run_gpus)

    def part(self, gpus: Sequence[str], workers: int) -> Share:
        """The share of one of so many workers."""
        return self._replace(gpus=tuple(gpus), workers=workers)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Share:
        """What ``_asdict`` gave, after a way through a file."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


def teller(config: pytest.Config) -> Callable[[str, tuple[str, ...], str], None]:
    """Function that calls the hook ``pytest_vlmgpu_lease`` of a run."""

    def tell(event: str, gpus: tuple[str, ...], reason: str) -> None:
        config.hook.pytest_vlmgpu_lease(config=config, event=event, gpus=gpus, reason=reason)

    return tell


def lease_folder(config: pytest.Config, settings: Settings) -> Path | None:
    """Where a process leases GPUs, which says whom it keeps off them; ``None`` where nobody else is to be kept off.

    With ``--vlm-lease=run`` the workers of one run meet in the folder of that run, as long as they are on its computer.
    """
    if settings.lease == "off":
        return None
    if settings.lease == "run":
        if not hasattr(config, "workerinput"):
            return None
        told = config.workerinput.get(WORKER_INPUT)
        if told is not None:
            return Path(told["folder"]) / "leases"
    return Path(settings.lease_dir or DEFAULT_FOLDER)


class Shares:
    """Takes and keeps the leases of one run.

    Args:
        settings: Resolved.
        waiting: The time that may be spent.
        tell: Calls the hook ``pytest_vlmgpu_lease``: event, UUIDs of GPUs, reason.
        folder: Of the leases, from :func:`lease_folder`; ``None`` chooses GPUs and locks nothing.
    """

    def __init__(
        self,
        settings: Settings,
        waiting: Waiting,
        tell: Callable[[str, tuple[str, ...], str], None],
        folder: Path | None,
    ) -> None:
        self._settings = settings
        self._waiting = waiting
        self._tell = tell
        self._told: tuple[str, ...] = ()
        """GPUs that were told to be taken, and not yet to be given back."""
        self._borrowed: Borrowed | None = None
        self._leases = Leases(folder) if folder is not None else None

    def take(
        self,
        machine: Machine,
        demands: Sequence[Demand] | None,
        workers: int,
        *,
        may_wait: bool = True,
        models: Collection[str] = (),
    ) -> Share | None:
        """Lease GPUs, all at once or none, so that two runs never wait for each other.

        Args:
            machine: As last read.
            demands: Of all groups of tests; ``None`` when they are not known yet: then all that ``--vlm-gpus`` allows.
            workers: Processes that will use the GPUs.
            may_wait: False asks only as long as another run may need to make up its mind.
            models: Labels of the models that will be loaded: where one is warm, its GPUs are taken first.

        Returns:
            ``None`` where there is nothing to lease: no GPU may be used, or, without waiting, none was to be had.
        """
        usable = self._usable(machine)
        if not usable:
            return None
        uuids = {gpu.index: gpu.uuid for gpu in machine.gpus}
        choice = self._settings.gpus
        # Of slices a run takes as many as its processes can use, which is one each.
        is_open = choice.kind == "auto" or has_slices(machine, usable)
        wish = Wish(choice.number if choice.kind == "count" else len(usable), is_open, demands, workers)
        ranked = by_preference(usable, demands or (), machine) if choice.kind == "auto" else usable
        warm = self._warm_gpus(models)
        ranked = sorted(ranked, key=lambda index: warm.get(uuids[index], 1))
        chosen: list[int] = []
        holders: dict[str, str] = {}

        def attempt(*, is_last: bool = False) -> bool:
            chosen[:], taken = self._attempt([uuids[index] for index in ranked], ranked, wish, is_last=is_last)
            holders.clear()
            holders.update(taken)
            if not chosen and self._leases is not None:
                self._leases.ask_for(taken, max(1, wish.least - len(ranked) + len(taken)))
            return bool(chosen)

        def reason() -> str:
            labels = {gpu.uuid: gpu.label for gpu in machine.gpus}
            return "; ".join(f"{labels[name]} is leased by {holder}" for name, holder in holders.items())

        code, problem = "", ""
        try:
            if not self._waiting.until(attempt, reason, may_wait=may_wait) and may_wait:
                code, problem = verdicts.LEASED, self._problem(wish, reason())
                attempt(is_last=True)
        except LeaseError as error:
            chosen.clear()
            code, problem = verdicts.NO_LEASES, f"{str(error)[0].upper()}{str(error)[1:]}"
        if not chosen and not may_wait:
            return None
        kept = [index for index in usable if index in chosen]
        gpus = tuple(uuids[index] for index in kept)
        outer = machine.environment.get(VARIABLE)
        if self._borrowed is not None:
            self._borrowed.keep(gpus)
        if gpus:
            self._told = gpus
            self._tell("taken", gpus, "")
        if problem:
            self._tell("refused", (), f"{code}: {problem}")
        return Share(gpus, gpus, outer, code, problem)

    def when_given_way(self, machine: Machine) -> Machine:
        """The machine without the idle warm hosts on it, for whoever needs to know how many GPUs will do."""
        held = self._leases.warm_bytes(gpu.uuid for gpu in machine.gpus) if self._leases is not None else {}
        if not held:
            return machine
        from msgspec.structs import replace

        def seen(gpu: Gpu) -> Gpu:
            pid, size = held.get(gpu.uuid, (0, 0))
            free = gpu.memory_free_bytes
            others = tuple(process for process in gpu.processes if process.pid != pid)
            return replace(gpu, memory_free_bytes=None if free is None else free + size, processes=others)

        return replace(machine, gpus=tuple(map(seen, machine.gpus)))

    def shrink(self, share: Share, demands: Sequence[Demand], workers: int, machine: Machine) -> Share:
        """Give back the GPUs that turn out not to be needed."""
        indices = {gpu.uuid: gpu.index for gpu in machine.gpus}
        ranked = by_preference([indices[uuid] for uuid in share.gpus], demands, machine)
        wanted = Wish(len(ranked), True, demands, workers).pick(ranked, is_last=True)
        gpus = tuple(uuid for uuid in share.gpus if indices[uuid] in wanted)
        if self._leases is not None:
            self._leases.release([name for name in self._leases.held if name not in gpus])
        if self._borrowed is not None:
            self._borrowed.keep(gpus)
        self._tell_given_back(gpus)
        return share._replace(gpus=gpus, run_gpus=gpus)

    def close(self) -> None:
        """Give all leases back."""
        if self._leases is not None:
            self._leases.release()
        if self._borrowed is not None:
            self._borrowed.keep()
        self._tell_given_back(())

    def _warm_gpus(self, models: Collection[str]) -> dict[str, int]:
        """GPU UUID to 0 where one of these models is warm, to 2 where another one is; their hosts let go of the leases."""
        if not self._settings.keeps_warm or self._leases is None or self._settings.lease != "machine":
            return {}
        from ..warm.hosts import Borrowed
        from ..warm.places import PlaceError, folder_for

        try:
            self._borrowed = self._borrowed or Borrowed(folder_for(self._settings.lease_dir or DEFAULT_FOLDER))
        except PlaceError:
            return {}  # said where a model is loaded
        hosts = self._borrowed.ask()
        return {uuid: 0 if record.label in models else 2 for record in hosts for uuid in record.gpus}

    def _tell_given_back(self, kept: tuple[str, ...]) -> None:
        gone = tuple(uuid for uuid in self._told if uuid not in kept)
        self._told = kept
        if gone:
            self._tell("given_back", gone, "")

    def _usable(self, machine: Machine) -> tuple[int, ...]:
        """GPU indices that ``--vlm-gpus`` allows, in CUDA order; of a count, all from which it may be taken."""
        choice = self._settings.gpus
        verdict = judge(Requirements(), machine, choice, is_busy_decided_later=True)
        if verdict.action == "run" and choice.kind == "count":
            verdict = judge(Requirements(), machine, GpuChoice(), is_busy_decided_later=True)
        return verdict.gpus if verdict.action == "run" else ()

    def _attempt(
        self, names: Sequence[str], ranked: Sequence[int], wish: Wish, *, is_last: bool
    ) -> tuple[list[int], dict[str, str]]:
        """The GPUs that were had, none if they are too few, and the holders of the others."""
        if self._leases is None:
            return wish.pick(ranked, is_last=is_last), {}
        before = set(self._leases.held)
        taken = self._leases.take(names)
        had = [index for index, name in zip(ranked, names, strict=True) if name not in taken]
        chosen = wish.pick(had, is_last=is_last)
        kept = {name for index, name in zip(ranked, names, strict=True) if index in chosen} or before
        self._leases.release([name for name in self._leases.held if name not in kept])
        return chosen, taken

    def _problem(self, wish: Wish, reason: str) -> str:
        count = f"{wish.least} GPUs are wanted" if wish.least > 1 else "1 GPU is wanted"
        waited = f" after {self._waiting.waited_s:.0f} s" if self._waiting.waited_s > GRACE_S + 1 else ""
        return (
            f"{count}, and other runs have leased those that may be used{waited}: {reason}. Wait (--vlm-wait=10m), "
            "choose other GPUs with --vlm-gpus, or end those runs if they are yours."
        )


class Wish(NamedTuple):
    """Which GPUs to lease, of those that can be had."""

    number: int
    """As ``--vlm-gpus`` says; the most, where fewer will do."""
    is_auto: bool
    """True where fewer will do."""
    demands: Sequence[Demand] | None
    workers: int

    @property
    def least(self) -> int:
        """Fewer are not enough, for messages."""
        if not self.is_auto:
            return self.number
        return max((demand.gpus for demand in self.demands or ()), default=1)

    def pick(self, had: Sequence[int], *, is_last: bool) -> list[int]:
        """The GPUs to keep; none, when it is better to wait for others.

        Args:
            had: GPU indices, best first.
            is_last: True when the time to wait is over: then some tests may run with what there is.
        """
        if not self.is_auto:
            return list(had[: self.number]) if len(had) >= self.number else []
        if self.demands is None:
            return list(had[: self.number])
        needed = cover(had, self.demands)
        if not is_last and not all(demand.is_met_by(needed) for demand in self.demands):
            return []
        most = max(1, len(needed), min(total_demand(self.demands, self.workers), len(had), self.number))
        spare = [index for index in had if index not in needed][: most - len(needed)]
        return [index for index in had if index in needed or index in spare]
