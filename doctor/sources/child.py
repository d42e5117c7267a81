"""A child process that may crash, hang, babble or fork, and can harm nobody.

Drivers and big libraries are only ever touched in children: a wrong NVML call has segfaulted its caller on a real H200
machine, and a broken torch takes nearly every other tool down with it. The child answers in JSON lines on a pipe of its
own (see :mod:`.child_entry`); the last line survives whatever happens next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

MAX_ANSWER_BYTES = 4 * 2**20
"""More than this is not an answer of ours: a 16-GPU machine needs about 0.1 MB."""
STDERR_TAIL_BYTES = 4096
_FOLDER = Path(__file__).parent
_REAP_S = 0.5
"""How long a killed child may take to vanish. One that waits inside a hung driver cannot be killed at all: it is left."""
_Ended = Literal["answered", "babbled", "exited", "late", "idle"]
_PIPE_BYTES = 2**19
"""Room for what a child says before it is listened to: of eight GPUs 0.1 MB in all, and a pipe usually holds 64 KiB."""
_SET_PIPE_SIZE = 1031
"""``F_SETPIPE_SZ``. Source: linux/fcntl.h; in a number, since other systems lack the name in :mod:`fcntl`."""
_TICK_S = 0.1
"""How often a child is looked at whose answer pipe a process it started keeps open."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a child."""

    stage: str
    answer: dict[str, Any]
    is_final: bool = False
    error: str | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a child ended, and the last thing it said."""

    state: Literal["ok", "failed", "crashed", "timed_out"]
    """``failed``: the program raised; ``crashed``: it died, was cut off for babbling, or could not be started."""
    answer: dict[str, Any] = {}
    """The last answer said, complete only when ``state`` is ``ok``; empty when there was none."""
    stage: str | None = None
    """What that last answer had reached."""
    message: str | None = None
    """One phrase, such as ``SIGSEGV`` or ``no answer within 5 s``; ``None`` when ``state`` is ``ok``."""
    seconds: float = 0.0


class Child:
    """A program running in a process group of its own until :meth:`outcome` is asked for.

    Args:
        program: Name of a module in ``folder``; its ``main(say, **arguments)`` is called.
        arguments: JSON-able keyword arguments for it.
        environment: All of the child's environment variables.
        deadline_s: Seconds, from now, after which the whole process group is killed.
        idle_s: Seconds without any work, before the first answer, after which it counts as hung: a slow disk still gives
            it something to do now and then. ``None`` waits for the deadline.
        folder: Where the program is.
    """

    def __init__(
        self,
        program: str,
        arguments: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        deadline_s: float,
        idle_s: float | None = None,
        folder: Path = _FOLDER,
    ) -> None:
        self._deadline_s = deadline_s
        self._idle_s = idle_s
        self._started = time.monotonic()
        self._outcome: Outcome | None = None
        try:
            reader, writer = os.pipe()
        except OSError as error:
            self._outcome = Outcome(state="crashed", message=f"could not be started: {error}")
            return
        _widen(writer)
        words = [str(writer), str(folder), program, str(deadline_s), msgspec.json.encode(arguments).decode()]
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(_FOLDER / "child_entry.py"), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=dict(environment),
                pass_fds=(writer,),
                start_new_session=True,
            )
        except (OSError, ValueError, TypeError) as error:
            os.close(reader)
            self._outcome = Outcome(state="crashed", message=f"could not be started: {error}")
            return
        finally:
            os.close(writer)
        self._reader = reader
        # Also at interpreter exit: nobody has to remember to close a child.
        self._finalizer = weakref.finalize(self, _end, self._process, reader)

    def outcome(self) -> Outcome:
        """Wait for the final answer, the end of the child, or the deadline; then leave no process behind."""
        if self._outcome is None:
            try:
                ended, heard, errors = self._listen()
            finally:
                self._finalizer()
            self._outcome = self._judge(ended, heard, errors)
        return self._outcome

    def close(self) -> None:
        """Kill the child if it is still there. Its outcome is lost unless it was asked for before."""
        if self._outcome is None:
            self._outcome = Outcome(state="crashed", message="was stopped before it answered")
            self._finalizer()

    def _listen(self) -> tuple[_Ended, bytes, bytes]:
        """Read until there is a reason to stop; gives that reason, the answers, and the tail of stderr."""
        heard, errors = bytearray(), bytearray()
        idleness = _Idleness(self._process.pid)
        assert self._process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ, heard)
            selector.register(self._process.stderr, selectors.EVENT_READ, errors)
            while True:
                left_s = self._started + self._deadline_s - time.monotonic()
                has_exited = self._has_exited()
                ready = selector.select(0.0 if has_exited else max(0.0, min(left_s, _TICK_S)))
                for key, _ in ready:
                    data = os.read(key.fd, 65536)
                    key.data.extend(data)
                    if not data:
                        selector.unregister(key.fileobj)
                del errors[:-STDERR_TAIL_BYTES]
                if heard.endswith(b"\n") and b'"is_final": true' in heard[heard.rfind(b"\n", 0, -1) + 1 :]:
                    return "answered", bytes(heard), bytes(errors)
                if len(heard) > MAX_ANSWER_BYTES:
                    return "babbled", b"", bytes(errors)
                if has_exited and not ready:
                    return "exited", bytes(heard), bytes(errors)
                # An answer that lay in the pipe before a late reader came still counts.
                is_talking = any(key.data is heard for key, _ in ready) and left_s > -_REAP_S
                if left_s <= 0 and not is_talking:
                    return "late", bytes(heard), bytes(errors)
                if self._idle_s is not None and not heard and idleness.seconds() > self._idle_s:
                    return "idle", b"", bytes(errors)

    def _has_exited(self) -> bool:
        """Whether the child is a zombie; it stays one, so that its process group cannot become anybody else's yet."""
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # the program that uses us ignores SIGCHLD
            return True

    def _judge(self, ended: _Ended, heard: bytes, errors: bytes) -> Outcome:
        seconds = time.monotonic() - self._started
        if ended == "babbled":
            return Outcome(state="crashed", message=f"more than {MAX_ANSWER_BYTES:,} bytes of answer", seconds=seconds)
        try:
            complete, _, _ = heard.rpartition(b"\n")
            line = msgspec.json.decode(complete.rpartition(b"\n")[2], type=Line) if complete else None
        except msgspec.MsgspecError as error:
            return Outcome(state="crashed", message=f"an unreadable answer ({error})", seconds=seconds)
        answer, stage = (line.answer, line.stage) if line else ({}, None)
        if line is not None and line.is_final:
            state: Literal["ok", "failed"] = "failed" if line.error else "ok"
            return Outcome(state=state, answer=answer, stage=stage, message=line.error, seconds=seconds)
        if ended == "idle":
            message = f"no answer, and nothing done for {self._idle_s:g} s"
            return Outcome(state="timed_out", message=message, seconds=seconds)
        if ended == "late":
            message = f"no answer within {self._deadline_s:g} s"
            return Outcome(state="timed_out", answer=answer, stage=stage, message=message, seconds=seconds)
        message = _how_it_died(self._process, errors)
        return Outcome(state="crashed", answer=answer, stage=stage, message=message, seconds=seconds)


class _Idleness:
    """Tells for how long a process has done nothing: no CPU time, no page read."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        self._work: list[str] = []
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Seconds without work; 0 where that cannot be told."""
        try:
            # Page faults and CPU ticks, fields 10 to 15 of proc(5); the name before them may hold anything.
            work = self._stat.read_text(errors="replace").rpartition(")")[2].split()[7:13]
        except OSError:
            return 0.0
        now = time.monotonic()
        if work != self._work:
            self._work, self._since = work, now
        return now - self._since


def _widen(pipe: int) -> None:
    """Give a pipe room for all that a child says: it shall not wait for a reader that has other things to do meanwhile."""
    with contextlib.suppress(OSError):  # the user has too many wide pipes already: then it waits
        fcntl.fcntl(pipe, _SET_PIPE_SIZE, _PIPE_BYTES)


def _how_it_died(process: subprocess.Popen[bytes], errors: bytes) -> str:
    """``SIGSEGV`` or ``exit status 3``, with the last line that it printed to stderr."""
    status = process.returncode or 0
    try:
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    except ValueError:
        how = f"signal {-status}"
    lines = errors.decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{how}: {last[:300]}" if last else how


def _end(process: subprocess.Popen[bytes], reader: int) -> None:
    """Kill the process group, reap the child and close the pipes. Runs once."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_REAP_S)
    os.close(reader)
    if process.stderr is not None:
        process.stderr.close()
