"""The warm hosts of this user, seen from a run: which are alive, what they hold, and how to end them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..leasing.holders import is_running
from . import wire
from .places import Place, records
from .records import Ask, Done, End, Refused, Reply, Status, TakeLeases

if TYPE_CHECKING:
    import socket
    from collections.abc import Collection, Mapping

    from vlm_doctor.machine import Gpu, Machine

    from .records import HostRecord

_ANSWER_S = 20.0
"""A host answers at once, unless it adds up the bytes of a model just then."""
_END_S = 30.0
"""For the process to be gone: a driver takes some seconds to tear down the contexts of eight GPUs."""


class Hosts:
    """Asks hosts.

    Args:
        folder: Of this user; ``None`` where it cannot be used, and nobody is found.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._silent: set[str] = set()
        """Digests of those that have let this process wait for nothing: it does so once."""
        self._gone: dict[str, HostRecord] = {}
        """What killed hosts had left, by digest."""

    def alive(self) -> list[HostRecord]:
        """Those that can be asked; what killed ones have left is taken away."""
        if self._folder is None:
            return []
        found = []
        for record in records(self._folder):
            if self._is_alive(record):
                found.append(record)
            elif not is_running(record.pid):
                # Another run may be taking it away just now.
                self._gone[record.digest] = record
                Place(self._folder, record.digest).clear()
        return found

    def is_silent(self, digest: str) -> bool:
        """True for the host of a model that this process has asked in vain."""
        return digest in self._silent

    def note_silence(self, digest: str) -> None:
        """Ask this one no more."""
        self._silent.add(digest)

    def status(self, record: HostRecord) -> Status | None:
        """What a host says of itself; ``None`` where it does not."""
        reply = self._request(record.digest, Ask())
        return reply if isinstance(reply, Status) else None

    def end(self, record: HostRecord) -> str:
        """End a host, and wait until its memory is given back; returns why it does not end, or nothing."""
        return self.end_digest(record.digest)

    def end_digest(self, digest: str) -> str:
        """The same for the model of that name."""
        status = self._request(digest, Ask())
        reply = self._request(digest, End())
        if isinstance(reply, Refused):
            return reply.reason
        if self.is_silent(digest):
            return "it does not answer"
        if isinstance(status, Status):
            _await(status.pid)
        return ""

    def record_of(self, digest: str) -> HostRecord | None:
        """What the host of a model has left, alive or not; ``None`` where there is none."""
        found = [] if self._folder is None else records(self._folder)
        return next((record for record in found if record.digest == digest), self._gone.get(digest))

    def await_end(self, record: HostRecord | None, *, is_ending: bool = False) -> bool:
        """Wait for the end of a host that answers nobody any more, or has said that it ends; False if it goes on."""
        if record is None or (not is_ending and self._is_alive(record)):
            return False
        _await(record.pid)
        return True

    def as_free(self, machine: Machine, gpus: tuple[str, ...]) -> Machine:
        """A machine with the weights that idle hosts hold on these GPUs counted as free, and our hosts not as users."""
        ours = self._ours_on(machine, gpus)
        if not ours:
            return machine
        from msgspec.structs import replace

        pids = {status.pid for status in ours}
        weights: dict[str, int] = {}
        for status in ours:
            # What this process has is in use, as any model that it has loaded.
            for uuid, size in status.weights.items() if not status.users else ():
                weights[uuid] = weights.get(uuid, 0) + size
        seen = tuple(_without(gpu, weights, pids) if gpu.uuid in gpus else gpu for gpu in machine.gpus)
        return replace(machine, gpus=seen)

    def as_ours(self, machine: Machine, gpus: tuple[str, ...]) -> Machine:
        """A machine without the hosts on these GPUs that are idle or serve this process alone: they compute for nobody."""
        pids = {status.pid for status in self._ours_on(machine, gpus)}
        if not pids:
            return machine
        from msgspec.structs import replace

        return replace(machine, gpus=tuple(_without(gpu, {}, pids) if gpu.uuid in gpus else gpu for gpu in machine.gpus))

    def _ours_on(self, machine: Machine, gpus: tuple[str, ...]) -> list[Status]:
        if machine.origin != "live" or not gpus:
            return []
        statuses = [self.status(record) for record in self.alive() if set(record.gpus).intersection(gpus)]
        return [status for status in statuses if status is not None and set(status.users) <= {os.getpid()}]

    def _is_alive(self, record: HostRecord) -> bool:
        return self._request(record.digest, None) is not None

    def _request(self, digest: str, request: Any) -> Any:
        """The answer; ``True`` where only the connection was asked for, ``None`` where nobody answers."""
        if self._folder is None or self.is_silent(digest):
            return None
        try:
            connection = wire.connect(Place(self._folder, digest).socket, _ANSWER_S)
            if connection is None:
                return None
            with connection:
                if request is None:
                    return True
                wire.send(connection, request)
                reply, descriptors = wire.receive(connection, Reply)
        except (OSError, wire.WireError) as error:
            if isinstance(error, TimeoutError):
                self.note_silence(digest)
            return None
        for descriptor in descriptors:
            os.close(descriptor)
        return reply


class Borrowed:
    """Leases that hosts have let go of for this run; they take them back when this is closed.

    Args:
        folder: Of this user's hosts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._connections: dict[str, tuple[HostRecord, socket.socket]] = {}
        self._silent: set[str] = set()

    def ask(self) -> list[HostRecord]:
        """Have idle hosts let go of their leases; returns those that did."""
        for record in records(self._folder):
            if record.gpus and record.digest not in self._connections and record.digest not in self._silent:
                self._take(record)
        return [record for record, _ in self._connections.values()]

    def keep(self, gpus: Collection[str] = ()) -> None:
        """Let hosts have their leases again, but for those whose GPUs are all among these UUIDs; ours must be free then."""
        for digest, (record, connection) in list(self._connections.items()):
            if not set(record.gpus).issubset(gpus):
                connection.close()
                del self._connections[digest]

    def _take(self, record: HostRecord) -> None:
        connection, reply = None, None
        try:
            connection = wire.connect(Place(self._folder, record.digest).socket, _ANSWER_S)
            if connection is not None:
                wire.send(connection, TakeLeases(runs=(os.getpid(),)))
                reply, _ = wire.receive(connection, Reply)
        except (OSError, wire.WireError) as error:
            if isinstance(error, TimeoutError):
                self._silent.add(record.digest)
        if connection is not None and isinstance(reply, Done):
            self._connections[record.digest] = record, connection
        elif connection is not None:
            connection.close()


def _without(gpu: Gpu, weights: Mapping[str, int], pids: set[int]) -> Gpu:
    from msgspec.structs import replace

    free = gpu.memory_free_bytes
    more = weights.get(gpu.uuid, 0)
    total = gpu.memory_total_bytes
    seen = None if free is None else free + more if total is None else min(free + more, total)
    return replace(
        gpu, memory_free_bytes=seen, processes=tuple(process for process in gpu.processes if process.pid not in pids)
    )


def _await(pid: int) -> None:
    until = time.monotonic() + _END_S
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.02)
