"""Frames on a Unix socket: four bytes of length, then msgpack. Whatever comes is judged before it is used."""

from __future__ import annotations

import os
import socket
import struct
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")
MAX_REQUEST_BYTES = 2**16
"""A request has some hundred bytes."""
MAX_REPLY_BYTES = 2**28
"""The skeleton of a model of 700 modules has about 1 MiB."""
_LENGTH = struct.Struct(">I")
_CREDENTIALS = struct.Struct("3i")
"""``struct ucred``: pid, uid, gid. Source: unix(7), SO_PEERCRED."""
_CHUNK = 2**20
_PAUSE_S = 0.05


class WireError(Exception):
    """What came is no frame of ours, or nothing came any more."""


class Peer(NamedTuple):
    """Who is at the other end, as the kernel says."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> Peer:
    """Who has opened (or, seen from there, bound) a socket."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return Peer(pid, uid)


def connect(path: Any, timeout_s: float) -> socket.socket | None:
    """A connection to a host of this user; ``None`` where none listens.

    Raises:
        WireError: Somebody else listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    until = time.monotonic() + timeout_s
    while True:
        try:
            connection.connect(str(path))
            break
        except BlockingIOError:
            # Many others have just asked; a Unix socket does not queue those beyond its backlog.
            if time.monotonic() < until:
                time.sleep(_PAUSE_S)
                continue
            connection.close()
            return None
        except OSError:
            connection.close()
            return None
    _OPEN.add(connection)
    if peer_of(connection).uid != os.getuid():
        connection.close()
        raise WireError("the process that listens there is another user's")
    return connection


def send(connection: socket.socket, record: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
    """Write one frame; descriptors go with its first bytes."""
    body = msgspec.msgpack.encode(record)
    head = _LENGTH.pack(len(body))
    if descriptors:
        socket.send_fds(connection, [head], list(descriptors))
    else:
        connection.sendall(head)
    connection.sendall(body)


def receive(connection: socket.socket, kind: Any) -> tuple[Any, list[int]]:
    """Read one frame; returns the record, and descriptors that came with it.

    Raises:
        WireError: It is none, or the other end is gone.
        TimeoutError: Nothing came within the connection's timeout.
    """
    head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    for descriptor in descriptors:
        # Python lets a program that a test starts have it, which would keep a model's memory as long as that runs.
        os.set_inheritable(descriptor, False)
    try:
        if not head:
            raise WireError("the connection was closed")
        head += _read(connection, _LENGTH.size - len(head))
        (length,) = _LENGTH.unpack(head)
        if length > MAX_REPLY_BYTES:
            raise WireError(f"a frame of {length} bytes is none of ours")
        return _decode(_read(connection, length), kind), list(descriptors)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


class Inbox:
    """Puts requests together from what arrives, at most :data:`MAX_REQUEST_BYTES` at a time."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes, kind: Any) -> list[Any]:
        """The requests that are complete now.

        Raises:
            WireError: What came is none.
        """
        self._data += data
        found = []
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            if length > MAX_REQUEST_BYTES:
                raise WireError(f"a request of {length} bytes is none of ours")
            end = _LENGTH.size + length
            if len(self._data) < end:
                break
            found.append(_decode(bytes(self._data[_LENGTH.size : end]), kind))
            del self._data[:end]
        return found


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(_CHUNK, size - len(data)))
        if not part:
            raise WireError("the connection was closed in the middle of a frame")
        data += part
    return bytes(data)


def _decode(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise WireError(f"what came is no frame of ours ({error})") from None


def _close_in_child() -> None:
    """A child that a test forks, and forgets, must not keep a model lent."""
    for connection in list(_OPEN):
        connection.close()


_OPEN: weakref.WeakSet[socket.socket] = weakref.WeakSet()
os.register_at_fork(after_in_child=_close_in_child)
