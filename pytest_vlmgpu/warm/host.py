"""The process that keeps a model between runs.

It answers on a socket, loads in a thread, holds the leases of its GPUs while no run does, and ends when nobody has asked
for so long, when somebody else wants its GPUs, when its model was changed, or when it is told to. Nothing of it has to be
cleaned up after SIGKILL: locks are the kernel's, and a socket that nobody answers is replaced.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..leasing.holders import is_running, pid_namespace
from . import wire
from .holding import Evicted, Holding
from .records import Ask, Attach, Done, End, Progress, Refused, Request, Status, TakeLeases

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from .places import Place
    from .records import Order
    from .stock import Stock

TICK_S = 0.1
PROGRESS_S = 0.5
_SEND_S = 30.0
"""A run that takes no answer for so long is let go."""
_MOST_CONNECTIONS = 64
_UNTOLD_S = 30.0
"""How long a host that has no model stays to say why."""


class Client:
    """A connection, and what it was opened for."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.peer = wire.peer_of(connection)
        self.inbox = wire.Inbox()
        self.waits: Attach | None = None
        """It has asked for the model, which is not loaded yet."""
        self.has_model = False
        self.has_leases = False


class Host:
    """Answers, until it is time to end.

    Args:
        order: What to keep.
        place: Its files.
        listener: Bound and listening.
        load: Gives the model.
    """

    def __init__(self, order: Order, place: Place, listener: socket.socket, load: Callable[[Order], Stock]) -> None:
        self._order = order
        self._place = place
        self._listener = listener
        self._load = load
        self._clients: list[Client] = []
        self._selector = selectors.DefaultSelector()
        self._holding = Holding(order)
        self._stock: Stock | None = None
        self._refusal: Refused | None = None
        self._is_refusal_told = False
        self._ttl_s = order.ttl_s
        self._started = self._idle_since = self._told_at = time.monotonic()
        self._last_user = 0
        self._end = ""
        """Why it is to end; empty while it is not."""
        self._socket_id = _identity(place.socket)

    def run(self) -> str:
        """Load and serve; returns why it ended."""
        threading.Thread(target=self._load_now, name="load", daemon=True).start()
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        while not self._end:
            for key, _ in self._selector.select(TICK_S):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            self._tick()
        for client in list(self._clients):
            self._drop(client)
        if self._stock is not None:
            self._stock.close()
        return self._end

    @property
    def has_its_socket(self) -> bool:
        """False once somebody has removed it, or put another in its place: nobody would find this host."""
        return _identity(self._place.socket) == self._socket_id

    def _load_now(self) -> None:
        from .facts import NotKept

        try:
            self._stock = self._load(self._order)
            log(f"{self._order.label} is loaded")
        except NotKept as reason:
            self._refusal = Refused(str(reason), reason.is_for_good)
            if reason.is_for_good:
                self._place.refuse(str(reason))
        except BaseException as error:  # noqa: BLE001 - a run waits for an answer, and loads the model itself then
            traceback.print_exc()
            self._refusal = Refused(f"its warm host could not load it ({_first_line(error)})")
        self._idle_since = time.monotonic()

    def _accept(self) -> None:
        with suppress(OSError):  # nobody is left to be accepted
            while True:
                connection, _ = self._listener.accept()
                client = Client(connection)
                if client.peer.uid != os.getuid() or len(self._clients) >= _MOST_CONNECTIONS:
                    connection.close()
                    continue
                connection.setblocking(False)
                self._clients.append(client)
                self._selector.register(connection, selectors.EVENT_READ, client)

    def _read(self, client: Client) -> None:
        try:
            data = client.connection.recv(wire.MAX_REQUEST_BYTES)
            requests = client.inbox.feed(data, Request) if data else None
            if requests is None:
                self._drop(client)
                return
            for request in requests:
                self._answer(client, request)
        except (BlockingIOError, InterruptedError):
            return
        except (wire.WireError, OSError) as error:
            log(f"pid {client.peer.pid} is let go: {error}")
            self._drop(client)

    def _answer(self, client: Client, request: Request) -> None:
        if isinstance(request, Attach):
            self._ttl_s = request.ttl_s
            self._holding.know(request.runs)
            client.waits = request
            self._lend_where_possible(client)
        elif isinstance(request, TakeLeases):
            if self._stock is None or self._users():
                self._send(client, Refused("a run has its model"))
                return
            self._holding.know(request.runs)
            self._holding.give()
            client.has_leases = True
            self._send(client, Done())
        elif isinstance(request, Ask):
            self._send(client, self._status())
        else:
            assert isinstance(request, End)
            users = self._users()
            if users:
                # Whoever asks may be the one that has it: tests still use it there.
                self._send(client, Refused(f"the run with pid {users[0]} has its model"))
                return
            self._end = f"pid {client.peer.pid} asked it to"
            self._send(client, Done())

    def _lend_where_possible(self, client: Client) -> None:
        attach = client.waits
        assert attach is not None
        refusal = self._refusal or self._why_not(client, attach)
        if refusal is not None:
            client.waits = None
            self._is_refusal_told = self._is_refusal_told or refusal is self._refusal
            self._send(client, refusal)
            return
        if self._stock is None:
            return
        client.waits = None
        if not self._stock.is_intact():
            self._send(client, Refused("a run before has changed its weights", is_ending=True))
            self._end = "a run has changed the weights"
            return
        try:
            lent, descriptors = self._stock.lend()
        except Exception as error:  # noqa: BLE001 - whatever torch and CUDA raise where they cannot share memory
            traceback.print_exc()
            reason = f"its memory cannot be given to another process ({_first_line(error)}); --vlm-cold tries again"
            self._place.refuse(reason)
            self._send(client, Refused(reason, is_for_good=True, is_ending=True))
            self._end = reason
            return
        client.has_model = True
        self._last_user = client.peer.pid
        self._send(client, lent, descriptors)
        log(f"lent to pid {client.peer.pid}")

    def _why_not(self, client: Client, attach: Attach) -> Refused | None:
        if attach.digest != self._order.digest:
            return Refused("the warm host has another model")
        if attach.pid_namespace != pid_namespace():
            return Refused("the warm host is in another container (PID namespace)")
        if self._stock is None or not self._stock.is_for_one:
            return None
        others = [pid for pid in self._users() if pid != client.peer.pid]
        if others:
            return Refused(f"the run with pid {others[0]} has it")
        before = self._last_user
        if before not in (0, client.peer.pid) and is_running(before):
            return Refused(f"the run with pid {before}, which had it, has not ended yet")
        return None

    def _tick(self) -> None:
        now = time.monotonic()
        waiting = [client for client in self._clients if client.waits is not None]
        is_loading = self._stock is None and self._refusal is None
        if is_loading:
            if now - self._told_at > PROGRESS_S:
                self._told_at = now
                for client in waiting:
                    self._send(client, self._progress())
        else:
            for client in waiting:
                self._lend_where_possible(client)
        if self._users() or waiting or is_loading:
            self._idle_since = now
        if self._refusal is not None:
            # Whoever started this host may only be about to ask.
            if self._is_refusal_told or now - self._idle_since > _UNTOLD_S:
                self._end = self._end or self._refusal.reason
        elif now - self._idle_since >= self._ttl_s:
            self._end = self._end or f"nobody has asked for {self._ttl_s:.0f} s"
        if not self.has_its_socket:
            self._end = self._end or "its socket is gone"
        is_borrowed = any(client.has_leases for client in self._clients)
        try:
            weights = self._stock.weights if self._stock is not None else {}
            self._holding.check(weights, is_idle=not (self._users() or waiting or is_loading or is_borrowed))
        except Evicted as reason:
            self._end = self._end or str(reason)

    def _users(self) -> list[int]:
        return [client.peer.pid for client in self._clients if client.has_model]

    def _status(self) -> Status:
        stock, users = self._stock, self._users()
        return Status(
            pid=os.getpid(),
            label=self._order.label,
            digest=self._order.digest,
            is_loaded=stock is not None,
            age_s=stock.age_s if stock is not None else 0.0,
            idle_s=0.0 if users or stock is None else time.monotonic() - self._idle_since,
            users=tuple(users),
            weights=stock.weights if stock is not None else {},
        )

    def _progress(self) -> Progress:
        import psutil

        from ..watching.meter import allocated_bytes

        by_ordinal: dict[int, int] = {}
        with suppress(AttributeError, RuntimeError):  # the other thread may be in the middle of importing torch
            by_ordinal = allocated_bytes() if self._order.gpus else {}
        uuids = {ordinal: uuid for uuid, ordinal in self._order.ordinals.items()}
        loaded = {uuids[ordinal]: size for ordinal, size in by_ordinal.items() if ordinal in uuids}
        return Progress(time.monotonic() - self._started, loaded, int(psutil.Process().memory_info().rss))

    def _send(self, client: Client, record: msgspec.Struct, descriptors: Any = ()) -> None:
        try:
            client.connection.settimeout(_SEND_S)
            wire.send(client.connection, record, descriptors)
            client.connection.setblocking(False)
        except OSError as error:
            log(f"pid {client.peer.pid} is let go: {error}")
            self._drop(client)

    def _drop(self, client: Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            self._selector.unregister(client.connection)
            if client.has_model:
                log(f"given back by pid {client.peer.pid}")
                self._idle_since = time.monotonic()
            client.connection.close()


def log(text: str) -> None:
    """Write a line to the host's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)  # noqa: T201 - standard output is the log


def _first_line(error: BaseException) -> str:
    return (next(iter(str(error).splitlines()), "") or type(error).__name__)[:300]


def _identity(path: Any) -> tuple[int, int] | None:
    try:
        info = path.lstat()
    except OSError:
        return None
    return info.st_dev, info.st_ino
