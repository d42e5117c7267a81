"""How a warm host begins and ends: alone, detached, with a socket that can be asked."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from vlm_doctor.sources.cache_files import store_record

from .host import Host, log
from .places import Place, folder_for
from .records import HostRecord, Order

if TYPE_CHECKING:
    from collections.abc import Callable

    from .stock import Stock

BUSY = 3
"""Exit status: another host has this model."""
_FAILED = 1
_START_S = 2.0
"""How long a host tries to be the only one of its model: the one before may just be ending."""
_BACKLOG = 64


def serve(order: Order, load: Callable[[Order], Stock] | None = None) -> int:
    """Be the host of a model. The process that was started ends when the one that it has left behind can be asked.

    Args:
        order: What to keep.
        load: Gives the model; for tests.

    Returns:
        Exit status of that process; the other one never returns.
    """
    place = Place(folder_for(order.lease_dir), order.digest)
    lock = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if not _is_ours(lock):
        return BUSY
    reading, writing = os.pipe()
    # Whoever started it waits for this process alone, and has no child then that it could forget.
    if os.fork():
        os.close(writing)
        return 0 if os.read(reading, 1) else _FAILED
    os.close(reading)
    status = _FAILED
    try:
        status = _be_the_host(order, place, writing, load)
    except BaseException:  # noqa: BLE001 - the log is all there is
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: no thread that still loads, and no library's own end, is waited for. The kernel takes back the rest.
        os._exit(status)


def main() -> int:
    """Read an order from standard input and keep the model."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    os.chdir("/")
    return serve(order)


def _is_ours(lock: int) -> bool:
    """Lock the file of a model; False where another host has it."""
    until = time.monotonic() + _START_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        else:
            return True


def _be_the_host(order: Order, place: Place, ready: int, load: Callable[[Order], Stock] | None) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    place.socket.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    listener.bind(str(place.socket))
    os.umask(before)
    listener.listen(_BACKLOG)
    place.ending.unlink(missing_ok=True)
    record = HostRecord(
        pid=os.getpid(),
        label=order.label,
        name=order.name,
        digest=order.digest,
        facts=order.facts,
        gpus=order.gpus,
        started_at=time.time(),
    )
    store_record(place.record, record)
    log(f"pid {os.getpid()} keeps {order.label} for {order.ttl_s:.0f} s")
    os.write(ready, b"x")
    os.close(ready)
    from .stock import load as load_model

    host = Host(order, place, listener, load or load_model)
    try:
        reason = host.run()
        log(f"ends: {reason}")
        place.note_end(reason)
    finally:
        if host.has_its_socket:
            with suppress(OSError):
                place.socket.unlink(missing_ok=True)
                place.record.unlink(missing_ok=True)
    return 0
