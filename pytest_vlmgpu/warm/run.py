"""What one run does with warm models: attach to them, have them kept, end them, and say what came of it."""

from __future__ import annotations

import gc
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..leasing.holders import pid_namespace
from ..leasing.leases import DEFAULT_FOLDER
from ..models.residents import CONTEXT_BYTES
from ..watching.meter import empty_cache
from . import facts
from .attaching import Loan, NotAttached, assembled, borrow, import_libraries
from .facts import NotKept
from .hosts import Hosts
from .places import Place, PlaceError, folder_for
from .records import Attach, Order, Progress
from .starting import start

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

    from ..models.loaded import LoadedVlm
    from ..options import Settings
    from ..requirements import VlmSpec
    from .records import HostRecord

_ROOM_S = 10.0
"""For the driver to take back the memory of a host that has ended: 2 s were enough after SIGKILL of 140 GiB."""
_PAUSE_S = 0.2
_UNSHARED = {
    "expandable_segments:true": "expandable_segments on, and such memory cannot be given to another process everywhere",
    "backend:cudamallocasync": "cudaMallocAsync, whose memory torch gives to no other process",
}
"""What the allocator is told, without spaces and in small letters. Source: CUDAMallocAsyncAllocator::shareIpcHandle."""


@dataclass(frozen=True)
class Warm:
    """What became of one load, for the summary; and the loan, where there is one."""

    text: str
    """``attached to a model loaded 12 min ago``, or why not."""
    age_s: float | None = None
    """Of the model that was attached; ``None`` where it was loaded."""
    saved_s: float = 0.0
    """What loading it took, less what attaching took."""
    loan: Loan | None = None

    @property
    def is_lost(self) -> bool:
        """True where the memory of the model was on GPUs, and its host has ended."""
        return self.loan is not None and self.loan.is_on_gpus and not self.loan.is_alive

    @property
    def log(self) -> str:
        """Where its host has written what happened; empty where none has the model."""
        return str(self.loan.log) if self.loan is not None else ""

    def close(self) -> None:
        """Give a borrowed model back."""
        if self.loan is not None:
            self.loan.close()


class Key:
    """A model as its host is asked for."""

    def __init__(self, place: Place, name: str, found: dict[str, str]) -> None:
        self.place = place
        self.name = name
        self.facts = found
        self.has_room: Callable[[], bool] = lambda: True
        """Tells whether another process can have its CUDA context beside what a run needs of the GPUs."""


class Warmth:
    """The warm models of one process.

    Args:
        settings: Resolved; ``--vlm-warm`` or ``--vlm-cold`` is given.
        gpus: Gives the UUIDs that this process has leased.
    """

    def __init__(self, settings: Settings, gpus: Callable[[], tuple[str, ...]]) -> None:
        self._settings = settings
        self._gpus = gpus
        self._lease_dir = settings.lease_dir or DEFAULT_FOLDER
        self._keys: dict[VlmSpec, Key | str] = {}
        """Of models that are about to be loaded; a text says why one is not kept."""
        self._cooled: set[str] = set()
        """Models whose hosts ``--vlm-cold`` has ended."""
        self._problem = "" if sys.platform == "linux" else "it needs memory that the kernel seals, which Linux alone has"
        try:
            self._folder: Path | None = folder_for(self._lease_dir)
        except PlaceError as error:
            self._folder, self._problem = None, str(error).rstrip(".")
        self._hosts = Hosts(self._folder)

    def as_free(self, machine: Machine) -> Machine:
        """The machine with what warm hosts hold of our GPUs counted as free: they are attached to, or end.

        Their CUDA contexts are not: whoever attaches has them beside his own.
        """
        gpus = tuple(gpu.uuid for gpu in machine.gpus) if self._settings.plan else self._gpus()
        return self._hosts.as_free(machine, gpus)

    def as_ours(self, machine: Machine) -> Machine:
        """The machine without our warm hosts among the processes on its GPUs; their memory is taken."""
        return self._hosts.as_ours(machine, self._gpus())

    def prepare(
        self, spec: VlmSpec, plan: Plan | None, *, is_ours: bool, gpus: tuple[str, ...], look: Callable[[], Machine]
    ) -> None:
        """Before a model is loaded: settle whether it can be kept, and end the hosts that are in its way.

        Args:
            spec: The model.
            plan: Where it goes; ``None`` on the CPU, and where an engine places it.
            is_ours: False where the project loads it itself.
            gpus: UUIDs of the GPUs that it may use.
            look: Reads the machine now.
        """
        key: Key | str = "it is loaded by a loader of the project's own"
        if is_ours:
            key = self._key(spec, plan, is_on_cpu=not gpus)
        self._keys[spec] = key
        ended = False
        for record in self._hosts.alive():
            is_mine = isinstance(key, Key) and record.digest == key.place.digest
            is_in_the_way = not is_mine and bool(set(record.gpus).intersection(gpus))
            if self._is_past(record, key) or (is_in_the_way and not _has_room(plan, look(), CONTEXT_BYTES)):
                why = self._hosts.end(record)
                if is_mine and why:
                    self._keys[spec] = f"its warm host cannot be ended: {why}"
                ended = ended or not why
        if isinstance(key, Key) and self._keys[spec] is key:
            self._cooled.add(key.name)
        if plan is None:
            return
        if ended:
            _becomes(lambda: _has_room(plan, look(), 0), _ROOM_S)
        if isinstance(key, Key):
            # Asked when a host is to be started: until then one may have all of it, and end.
            key.has_room = lambda: _has_room(plan, look(), CONTEXT_BYTES)

    def _is_past(self, record: HostRecord, key: Key | str) -> bool:
        """True of a host of this model that nobody is to use any more."""
        if not isinstance(key, Key) or record.name != key.name:
            return False
        is_stale = facts.is_stale(record.facts, key.facts)
        return is_stale or (self._settings.cold and key.name not in self._cooled)

    def load(
        self,
        spec: VlmSpec,
        plan: Plan | None,
        *,
        ordinals: Mapping[str, int] | None,
        plain: Callable[[], LoadedVlm],
        told: Callable[[Progress], None],
    ) -> LoadedVlm:
        """Attach to a warm model, or have one loaded and attach to that; load as always where neither is possible.

        Args:
            spec: The model, which was prepared.
            plan: ``None`` on the CPU.
            ordinals: GPU UUID to CUDA ordinal.
            plain: Loads it.
            told: Called while a host loads it.

        Raises:
            LoadFailure: It cannot be loaded.
        """
        from ..models.failures import LoadFailure

        key = self._keys.pop(spec, "it was not prepared")
        if isinstance(key, str):
            return _with(plain(), Warm(f"not kept: {key}"))
        if not self._settings.keeps_warm:
            return plain()
        if self._hosts.is_silent(key.place.digest):
            return _with(plain(), Warm("not kept: its warm host does not answer"))
        started = time.perf_counter()
        before = self._hosts.record_of(key.place.digest)
        is_ending = is_silent = has_arrived = False
        try:
            reason = self._why_cold(key)
            loan = None if reason else self._borrow(key, told)
        except NotAttached as error:
            reason, loan, is_ending, is_silent = str(error), None, error.is_ending, error.is_silent
        if is_silent:
            self._hosts.note_silence(key.place.digest)
            return _with(plain(), Warm(f"not kept: {reason}"))
        try:
            if loan is None:
                has_ended = self._hosts.await_end(before, is_ending=is_ending)
                if not _becomes(key.has_room, _ROOM_S if has_ended else 0.0):
                    raise NotKept("beside it there is no room on its GPUs for the CUDA context of another process")
                self._start(key, spec, plan, ordinals)
                loan = self._borrow(key, told)
                has_arrived = True
            return self._attached(loan, spec, plan, ordinals=ordinals, started=started, reason=reason)
        except (NotKept, NotAttached, LoadFailure) as error:
            refusal = str(error)
            is_refused = has_arrived and isinstance(error, NotAttached) and "OutOfMemory" not in refusal
            is_unshared = is_refused and loan is not None and loan.is_alive
        # Outside of the handler, whose frames would keep half a model: what was borrowed is let go of before its host ends.
        gc.collect()
        empty_cache()
        if loan is not None:
            loan.close()
        self._hosts.end_digest(key.place.digest)
        if is_unshared:
            # What a host has just loaded cannot be had: each run would load it twice.
            refusal += "; --vlm-cold tries again"
            key.place.refuse(refusal)
        return _with(plain(), Warm(f"not kept: {refusal}"))

    def end_idle(self, gpus: tuple[str, ...]) -> bool:
        """End the hosts on these GPUs, for a test that loads nothing and needs their memory; False if there are none."""
        found = [record for record in self._hosts.alive() if set(record.gpus).intersection(gpus)]
        # All of them: any() would stop at the first.
        ended = [record for record in found if not self._hosts.end(record)]
        return bool(ended)

    def _attached(
        self,
        loan: Loan,
        spec: VlmSpec,
        plan: Plan | None,
        *,
        ordinals: Mapping[str, int] | None,
        started: float,
        reason: str,
    ) -> LoadedVlm:
        from ..models.source import find_source

        source = find_source(spec.name)
        loaded = assembled(loan, spec.name, source, plan, ordinals=ordinals, started=started)
        if reason:
            kept = f"kept for {duration(self._settings.warm or 0)} from its last use; cold this time: {reason}"
            return _with(loaded, Warm(kept, loan=loan))
        lent = loan.lent
        saved = max(0.0, lent.load_seconds - loaded.load_seconds)
        return _with(loaded, Warm("attached", lent.age_s, saved, loan))

    def _borrow(self, key: Key, told: Callable[[Progress], None]) -> Loan:
        request = Attach(key.place.digest, pid_namespace(), self._settings.warm or 0.0, runs=(os.getpid(), os.getppid()))
        return borrow(key.place, request, told, import_libraries)

    def _start(self, key: Key, spec: VlmSpec, plan: Plan | None, ordinals: Mapping[str, int] | None) -> None:
        from vlm_doctor.codec import to_json

        order = Order(
            digest=key.place.digest,
            facts=key.facts,
            label=spec.label,
            name=key.name,
            dtype=spec.dtype,
            plan=None if plan is None else to_json(plan, indent=0).encode(),
            ordinals=dict(ordinals or {}),
            gpus=() if plan is None else tuple(stage.uuid for stage in plan.stages),
            lease_dir=self._lease_dir,
            ttl_s=self._settings.warm or 0.0,
            runs=(os.getpid(), os.getppid()),
        )
        start(order, key.place)

    def _why_cold(self, key: Key) -> str:
        """Why there is no use in asking a host; empty where there is one."""
        if key.place.socket.exists():
            return ""
        if self._settings.cold:
            return "--vlm-cold"
        alive = [record for record in self._hosts.alive() if record.name == key.name]
        if alive:
            differing = min((facts.difference(record.facts, key.facts) for record in alive), key=len)
            return f"{' and '.join(differing[:3])} changed"
        ended = key.place.why_ended()
        return f"its warm host had ended ({ended})" if ended else "there was no warm model"

    def _key(self, spec: VlmSpec, plan: Plan | None, *, is_on_cpu: bool) -> Key | str:
        """The model as its host is asked for, or why it is not kept."""
        import_libraries()
        refusal = self._problem or _refusal(spec, plan, self._settings.lease, is_on_cpu=is_on_cpu)
        if refusal or self._folder is None:
            return refusal
        from ..models.failures import LoadFailure
        from ..models.source import find_source

        with suppress(LoadFailure, OSError, ValueError):  # the load that follows says it better
            try:
                source = find_source(spec.name)
                is_folder = Path(source.name).is_dir()
                name = str(Path(source.name).resolve()) if is_folder else f"{source.name}@{source.revision}"
                resolved = name if is_folder else source.name
                if facts.is_quantized(resolved, None if is_folder else source.revision):
                    return "it is quantized"
                found = facts.facts_of(resolved, None if is_folder else source.revision, plan, spec.dtype)
            except NotKept as reason:
                return str(reason)
            place = Place(self._folder, facts.digest_of(found))
            return ("" if self._settings.cold else place.why_refused()) or Key(place, name, found)
        return "its checkpoint cannot be read"


def duration(seconds: float) -> str:
    """``12 min``, as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _with(loaded: LoadedVlm, warm: Warm) -> LoadedVlm:
    return replace(loaded, warm=warm)


def _refusal(spec: VlmSpec, plan: Plan | None, lease: str, *, is_on_cpu: bool) -> str:
    """Why a model like this is not kept; empty where it may be."""
    if spec.trust_remote_code:
        return "it runs code of its checkpoint"
    if spec.is_placed_by_transformers:
        return f'device_map="{spec.device_map}" places it anew by what is free'
    if is_on_cpu:
        return ""
    if plan is None:
        return "it has no plan"
    if plan.offloaded is not None:
        return "part of it is in host memory"
    if plan.workload.quantization is not None:
        return "it is quantized"
    if lease != "machine":
        return f"other runs do not learn who has the GPUs (--vlm-lease={lease})"
    if any(not stage.uuid.startswith("GPU-") for stage in plan.stages):
        return "its GPU is a MIG slice"
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        told = os.environ.get(variable, "").lower().replace(" ", "")
        for word, why in _UNSHARED.items():
            if word in told:
                return f"{variable} has {why}"
    return ""


def _becomes(condition: Callable[[], bool], seconds: float) -> bool:
    """Ask until it is so, for so long; a driver takes some time to take back what a process had."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(_PAUSE_S)
    return True


def _has_room(plan: Plan | None, machine: Machine, more_bytes: int) -> bool:
    """True when what is really free on the GPUs of a plan is enough for it."""
    if plan is None:
        return False
    free = {gpu.uuid: gpu.memory_free_bytes or 0 for gpu in machine.gpus}
    return all(free.get(stage.uuid, 0) >= stage.peak_bytes + more_bytes for stage in plan.stages)
