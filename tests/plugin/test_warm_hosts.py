"""A warm host is found, asked, lends, gives way, and ends; whatever is killed, nothing stays in anybody's way."""

from __future__ import annotations

import fcntl
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_vlmgpu.leasing.holders import pid_namespace
from pytest_vlmgpu.leasing.leases import Leases
from pytest_vlmgpu.warm import wire
from pytest_vlmgpu.warm.attaching import Loan, NotAttached, borrow
from pytest_vlmgpu.warm.hosts import Borrowed, Hosts
from pytest_vlmgpu.warm.places import Place, PlaceError, folder_for, records
from pytest_vlmgpu.warm.records import Ask, Attach, Order, Reply, Request, Status
from pytest_vlmgpu.warm.serving import BUSY
from pytest_vlmgpu.warm.starting import start
from vlm_doctor.machine import GpuProcess
from vlm_doctor.units import GIB

from ..until import LIMIT_S, is_running, until
from .nobody import NOBODY, as_nobody, as_root
from .projects import is_held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GPU = "GPU-1"
STUB = Path(__file__).with_name("warm_stub.py")
ATTACH = """
import sys, time
from pathlib import Path
from pytest_vlmgpu.leasing.holders import pid_namespace
from pytest_vlmgpu.warm.attaching import borrow
from pytest_vlmgpu.warm.places import Place
from pytest_vlmgpu.warm.records import Attach
loan = borrow(Place(Path(sys.argv[1]), "d"), Attach("d", pid_namespace(), 60.0), print, lambda: None)
print("attached", flush=True)
time.sleep(60)
"""
KEPT: list[socket.socket] = []


class Warm:
    """Hosts of one folder of leases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.leases = folder / "leases"
        self.place = Place(folder_for(str(self.leases)), "d")
        self.loans: list[Loan] = []

    def order(self, **fields: Any) -> Order:
        values: dict[str, Any] = {"digest": "d", "facts": {"dtype": "x"}, "label": "org/a", "name": "org/a@main"}
        values |= {"dtype": None, "plan": None, "lease_dir": str(self.leases), "ttl_s": 60.0}
        return Order(**{**values, **fields})

    def launch(self, **fields: Any) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log, (self.folder / "order").open("w+b") as order:
            order.write(msgspec.json.encode(self.order(**fields)))
            order.seek(0)
            command = [sys.executable, str(STUB), str(self.folder)]
            return subprocess.Popen(command, stdin=order, stdout=log, stderr=log, start_new_session=True)

    def start(self, **fields: Any) -> int:
        """Start a host; returns its pid."""
        assert self.launch(**fields).wait(LIMIT_S) == 0
        return self.status().pid

    def answer(self) -> Status | None:
        """None where the host answers nothing."""
        return Hosts(self.place.folder).status(records(self.place.folder)[0])

    def status(self) -> Status:
        status = self.answer()
        assert status is not None
        return status

    def attach(self, **fields: Any) -> Loan:
        values = {"digest": "d", "pid_namespace": pid_namespace(), "ttl_s": 60.0, "runs": (os.getpid(),)}
        self.loans.append(borrow(self.place, Attach(**{**values, **fields}), lambda progress: None, lambda: None))
        return self.loans[-1]

    def loads(self) -> int:
        file = self.folder / "loads"
        return len(file.read_text()) if file.exists() else 0

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Warm]:
    made = Warm(tmp_path)
    yield made
    for loan in made.loans:
        loan.close()
    for record in records(made.place.folder):
        if is_running(record.pid):
            os.kill(record.pid, signal.SIGKILL)
    shutil.rmtree(made.place.folder, ignore_errors=True)


def test_a_host_lends_and_takes_back_and_is_nobodys_child(warm: Warm) -> None:
    pid = warm.start()
    until(lambda: warm.status().is_loaded)

    loan = warm.attach()

    assert loan.lent.skeleton == b"skeleton"
    assert loan.memory is not None
    assert os.pread(loan.memory, 7, 0) == b"weights"
    assert warm.status().users == (os.getpid(),)
    assert warm.status().idle_s == 0
    assert os.getsid(pid) != os.getsid(0)
    loan.close()
    until(lambda: not warm.status().users)
    assert Hosts(warm.place.folder).end(records(warm.place.folder)[0]) == ""
    assert not is_running(pid)
    assert [path.suffix for path in sorted(warm.place.folder.iterdir())] == [".ended", ".lock"]
    assert warm.place.why_ended() == f"pid {os.getpid()} asked it to"


def test_it_ends_when_nobody_has_asked_for_so_long(warm: Warm) -> None:
    pid = warm.start()
    loan = warm.attach(ttl_s=0.5)
    time.sleep(1.0)
    assert is_running(pid)  # it is lent

    loan.close()

    until(lambda: not is_running(pid))
    assert "nobody has asked for" in warm.place.why_ended()
    with pytest.raises(NotAttached, match="there was no warm model"):
        warm.attach()


def test_folder_and_socket_are_this_users_alone(warm: Warm) -> None:
    warm.start()

    assert stat.S_IMODE(warm.place.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in warm.place.folder.iterdir()} == {0o600}


@as_root
def test_another_user_is_kept_out_and_a_folder_of_his_is_refused(warm: Warm) -> None:
    warm.start()
    with as_nobody(lambda: socket.socket(socket.AF_UNIX).connect(str(warm.place.socket))) as answer:
        assert answer.startswith("PermissionError: ")
    # The folder above is that of all warm hosts of this user, some of which may be starting just now: it stays closed, and
    # the socket gets a second name.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        found = Path(folder, "socket")
        found.hardlink_to(warm.place.socket)
        found.chmod(0o777)
        with as_nobody(lambda: wire.connect(found, 5)) as answer:
            assert answer == "WireError: the process that listens there is another user's"

        def ask() -> int:
            """Bytes of the answer, from a host that anybody could reach."""
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(found))
            return len(connection.recv(100))

        with as_nobody(ask) as answer:
            assert answer.partition(":")[0] in ("0", "ConnectionResetError")
    warm.place.folder.chmod(0o755)
    with pytest.raises(PlaceError, match="is not one that is this user's alone"):
        folder_for(str(warm.leases))
    warm.place.folder.chmod(0o700)
    os.chown(warm.place.folder, NOBODY, NOBODY)
    with pytest.raises(PlaceError, match="is not one that is this user's alone"):
        folder_for(str(warm.leases))
    os.chown(warm.place.folder, 0, 0)


@as_root
def test_a_socket_of_another_user_is_not_talked_to(warm: Warm) -> None:
    place = Path(f"/tmp/vlmgpu-test-{os.getpid()}.sock")

    def listen() -> str:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place))
        listener.listen()
        KEPT.append(listener)
        return "listens"

    with as_nobody(listen) as answer:
        assert answer == "listens"
        with pytest.raises(wire.WireError, match="another user's"):
            wire.connect(place, 5)
    place.unlink()


def hostile(warm: Warm, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(warm.place.socket))
        connection.settimeout(5)
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except OSError:
            pass


def test_a_host_inherits_nothing_that_is_the_runs_own(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[bytes]:
        found.append(env)
        return subprocess.CompletedProcess(command, 0)

    for name in ("PYTEST_CURRENT_TEST", "COV_CORE_SOURCE", "COVERAGE_PROCESS_CONFIG", "HF_HOME"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr("pytest_vlmgpu.warm.starting.subprocess.run", run)

    start(warm.order(), warm.place)

    assert [name for name in found[0] if name.startswith(("PYTEST_", "COV", "HF_HOME"))] == ["HF_HOME"]


def test_whatever_bytes_come_the_host_goes_on(warm: Warm) -> None:
    pid = warm.start()
    until(lambda: warm.status().is_loaded)
    asking = msgspec.msgpack.encode(Ask())

    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(
        st.binary(max_size=200)
        | st.binary(max_size=100).map(lambda body: struct.pack(">I", len(body)) + body)
        | st.integers(0, 2**32 - 1).map(lambda size: struct.pack(">I", size))
        | st.recursive(st.none() | st.integers(-(2**63), 2**63) | st.text(), st.lists).map(
            lambda thing: struct.pack(">I", len(data := msgspec.msgpack.encode(thing))) + data
        )
    )
    def throw(data: bytes) -> None:
        hostile(warm, data)

    throw()
    hostile(warm, struct.pack(">I", 100) + b"\x91" * 100)
    hostile(warm, (struct.pack(">I", len(asking)) + asking) * 100)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(100)]
    for connection in silent:
        connection.connect(str(warm.place.socket))
    with pytest.raises(NotAttached, match="its warm host has ended"):
        warm.attach()  # beyond what a host puts up with
    for connection in silent:
        connection.close()
    until(lambda: warm.answer() is not None)  # it lets them go one by one

    assert warm.status().pid == pid
    assert warm.loads() == 1
    warm.attach().close()


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reading_of_requests(data: bytes) -> None:
    inbox = wire.Inbox()
    try:
        for request in inbox.feed(data, Request):
            assert isinstance(request, msgspec.Struct)
    except wire.WireError:
        pass


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reading_of_replies(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.close()
        try:
            reply, _ = wire.receive(ours, Reply)
            assert isinstance(reply, msgspec.Struct)
        except wire.WireError:
            pass


def test_requests_that_come_in_pieces_are_put_together() -> None:
    inbox, body = wire.Inbox(), msgspec.msgpack.encode(Attach("d", "n", 1.5))
    stream = (struct.pack(">I", len(body)) + body) * 2

    found = [request for byte in stream for request in inbox.feed(bytes([byte]), Request)]

    assert found == [Attach("d", "n", 1.5)] * 2


def test_a_killed_host_leaves_nothing_in_the_way(warm: Warm) -> None:
    pid = warm.start()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_running(pid))
    assert warm.place.socket.exists()

    with pytest.raises(NotAttached, match="its warm host was killed"):
        warm.attach()
    assert Hosts(warm.place.folder).alive() == []
    assert warm.start() != pid
    warm.attach().close()


def test_what_a_killed_host_has_left_goes_when_somebody_looks(warm: Warm) -> None:
    hosts = Hosts(warm.place.folder)
    record = records(warm.place.folder)[0] if warm.start() else None
    assert warm.place.clear() is False, "it lives"
    assert hosts.alive() == [record]
    os.kill(warm.status().pid, signal.SIGKILL)
    assert record is not None
    until(lambda: not is_running(record.pid))

    assert hosts.alive() == []

    assert not warm.place.record.exists()
    assert not warm.place.socket.exists()
    assert warm.place.why_ended() == "it was killed"
    assert hosts.record_of("d") == record, "whoever waits for its memory still knows it"
    warm.start()
    assert warm.place.why_ended() == ""


def test_a_killed_host_is_known_to_a_run_whose_neighbour_takes_away_what_it_has_left(warm: Warm) -> None:
    pid = warm.start()
    (record,) = records(warm.place.folder)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_running(pid))
    hosts = Hosts(warm.place.folder)

    with warm.place.lock.open("r+") as neighbour:
        fcntl.flock(neighbour, fcntl.LOCK_EX)
        assert hosts.alive() == []
        warm.place.record.unlink()

    assert hosts.record_of("d") == record


def test_a_host_that_has_said_why_it_ended_was_not_killed(warm: Warm) -> None:
    pid = warm.start()
    (record,) = records(warm.place.folder)
    assert Hosts(warm.place.folder).end(record) == ""
    until(lambda: not is_running(pid))

    assert warm.place.clear()

    assert warm.place.why_ended() == f"pid {os.getpid()} asked it to"


def test_a_host_that_hangs_is_asked_once(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(warm.start(), signal.SIGSTOP)
    monkeypatch.setattr("pytest_vlmgpu.warm.hosts._ANSWER_S", 0.2)
    hosts, borrowed = Hosts(warm.place.folder), Borrowed(warm.place.folder)
    (record,) = hosts.alive()
    monkeypatch.setattr("pytest_vlmgpu.warm.hosts.records", lambda folder: [msgspec.structs.replace(record, gpus=(GPU,))])

    assert hosts.status(record) is None
    assert borrowed.ask() == []

    with monkeypatch.context() as patch:
        patch.setattr(wire, "connect", lambda *_: pytest.fail("it was asked again"))
        assert hosts.status(record) is None
        assert hosts.alive() == []
        assert hosts.end(record) == "it does not answer"
        assert borrowed.ask() == []
    assert warm.place.socket.exists(), "it lives, and may go on"


def test_of_two_that_start_at_once_one_stays(warm: Warm) -> None:
    starting = [warm.launch() for _ in range(3)]

    assert sorted(process.wait(LIMIT_S) for process in starting) == [0, BUSY, BUSY]
    warm.attach().close()
    assert warm.loads() == 1


def test_a_run_that_is_killed_gives_the_model_back(warm: Warm) -> None:
    warm.start(gpus=(GPU,))
    until(lambda: warm.status().is_loaded)
    command = [sys.executable, "-c", ATTACH, str(warm.place.folder)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    while "attached" not in run.stdout.readline():
        pass
    with pytest.raises(NotAttached, match=rf"the run with pid {run.pid} has it"):
        warm.attach()

    run.kill()
    run.communicate()

    until(lambda: not warm.status().users)
    warm.attach().close()


def test_a_child_that_a_run_has_forgotten_keeps_nothing_lent(warm: Warm) -> None:
    warm.start(gpus=(GPU,))
    until(lambda: warm.status().is_loaded)
    loan = warm.attach()
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)

    loan.close()

    until(lambda: not warm.status().users)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_program_that_a_test_starts_gets_no_model(warm: Warm) -> None:
    warm.start()
    memory = warm.attach().memory
    assert memory is not None
    assert warm.loans[0].log == warm.place.log

    status = subprocess.run([sys.executable, "-c", f"import os; os.fstat({memory})"], close_fds=False, check=False)

    assert status.returncode != 0


def test_a_process_with_many_open_files_learns_that_the_host_has_ended(warm: Warm) -> None:
    pid = warm.start()
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 1200:
        pytest.skip("a process may not open so many files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(few, 1200), most))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        loan = warm.attach()
        assert loan.is_alive
        os.kill(pid, signal.SIGKILL)
        until(lambda: not loan.is_alive)
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))


def test_a_model_without_gpus_is_for_many(warm: Warm) -> None:
    warm.start()
    loans = [warm.attach() for _ in range(3)]

    assert warm.status().users == (os.getpid(),) * 3
    for loan in loans:
        loan.close()


def test_progress_comes_while_it_loads(warm: Warm) -> None:
    (warm.folder / "loading").touch()
    warm.start()
    seen = []

    def told(progress: Any) -> None:
        seen.append(progress.seconds)
        if len(seen) == 2:
            (warm.folder / "loading").unlink()

    request = Attach("d", pid_namespace(), 60.0)
    borrow(warm.place, request, told, lambda: None).close()

    assert len(seen) >= 2
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("file", "reason", "known"),
    [("broken", "its warm host could not load it .a disk was full.", ""), ("odd", "it is odd", "it is odd")],
)
def test_what_cannot_be_loaded_or_kept_is_said_and_the_host_ends(warm: Warm, file: str, reason: str, known: str) -> None:
    (warm.folder / file).touch()
    (warm.folder / "loading").touch()
    pid = warm.start()
    (warm.folder / "loading").unlink()

    try:
        with pytest.raises(NotAttached, match=reason):
            warm.attach()
    finally:
        until(lambda: not is_running(pid))
    assert warm.place.why_refused() == known


def test_memory_that_cannot_be_given_away_is_said_and_not_tried_again(warm: Warm) -> None:
    pid = warm.start(gpus=(GPU,))
    (warm.folder / "unlendable").touch()
    reason = "its memory cannot be given to another process (CUDA error: operation not supported)"

    with pytest.raises(NotAttached, match=re.escape(reason)):
        warm.attach()

    until(lambda: not is_running(pid))
    assert warm.place.why_refused() == f"{reason}; --vlm-cold tries again"
    assert "Traceback" in warm.log()
    assert (warm.folder / "closed").exists()


def test_a_host_that_is_about_to_end_is_waited_for(warm: Warm) -> None:
    pid = warm.start(gpus=(GPU,))
    hosts = Hosts(warm.place.folder)
    record = hosts.record_of("d")
    assert record is not None
    assert record.pid == pid
    assert not hosts.await_end(record)  # it goes on
    assert hosts.record_of("e") is None
    assert not hosts.await_end(None)

    (warm.folder / "changed").touch()
    with pytest.raises(NotAttached) as caught:
        warm.attach()
    assert caught.value.is_ending
    assert hosts.await_end(record, is_ending=True)

    assert not is_running(pid)
    assert hosts.await_end(record)


def test_a_model_that_is_in_use_is_ended_by_nobody_and_its_memory_is_not_free(
    warm: Warm, gpu: Callable[..., Any], machine: Callable[..., Any]
) -> None:
    pid = warm.start(gpus=(GPU,))
    hosts = Hosts(warm.place.folder)
    loan = warm.attach()
    (record,) = hosts.alive()
    here = msgspec.structs.replace(
        machine(gpu(0, uuid=GPU, free_gib=2, processes=(GpuProcess(pid=pid, kind="compute"),))), origin="live"
    )

    # Not by this process either: its own tests use the model.
    assert hosts.end(record) == f"the run with pid {os.getpid()} has its model"
    used = hosts.as_free(here, (GPU,)).gpus[0]
    assert used.memory_free_bytes == 2 * GIB
    assert used.processes == ()
    assert hosts.as_ours(here, (GPU,)).gpus[0] == used
    assert hosts.as_ours(here, ("GPU-2",)) is here

    loan.close()
    idle = hosts.as_free(here, (GPU,)).gpus[0]
    assert idle.memory_free_bytes == 22 * GIB
    assert hosts.as_ours(here, (GPU,)).gpus[0] == used
    assert hosts.end(record) == ""


def test_changed_weights_are_lent_to_nobody(warm: Warm) -> None:
    pid = warm.start(gpus=(GPU,))
    warm.attach().close()
    (warm.folder / "changed").touch()

    with pytest.raises(NotAttached, match="a run before has changed its weights"):
        warm.attach()

    until(lambda: not is_running(pid))
    assert warm.place.why_ended() == "a run has changed the weights"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"digest": "e"}, "has another model"), ({"pid_namespace": "pid:[1]"}, "in another container .PID namespace")],
)
def test_a_run_that_is_not_meant_is_refused(warm: Warm, fields: dict[str, Any], reason: str) -> None:
    warm.start()

    with pytest.raises(NotAttached, match=reason):
        warm.attach(**fields)


def test_it_ends_when_its_folder_is_removed(warm: Warm) -> None:
    pid = warm.start()

    shutil.rmtree(warm.place.folder)

    until(lambda: not is_running(pid))


def test_it_has_its_leases_while_no_run_does_and_gives_way_when_it_is_asked(warm: Warm) -> None:
    run = Leases(warm.leases)
    run.take([GPU])
    pid = warm.start(gpus=(GPU,), runs=(os.getpid(),))
    until(lambda: warm.status().is_loaded)
    run.release()
    mine = Leases(warm.leases)
    until(lambda: is_held(mine, GPU, by="warm host of org/a"))
    assert f"pid {pid} (" in mine.take([GPU])[GPU]
    time.sleep(0.5)
    assert is_running(pid)

    mine.ask_for([GPU, "GPU-2"], most=1)

    until(lambda: not mine.take([GPU]))
    until(lambda: not is_running(pid))
    assert warm.place.why_ended() == "another run wants the GPUs"


def test_a_lent_model_does_not_give_way(warm: Warm) -> None:
    pid = warm.start(gpus=(GPU,))
    until(lambda: warm.status().is_loaded)
    borrowed = Borrowed(warm.place.folder)
    assert [record.gpus for record in borrowed.ask()] == [(GPU,)]
    run = Leases(warm.leases)
    assert run.take([GPU]) == {}
    loan = warm.attach()
    other = Leases(warm.leases)

    for _ in range(5):
        other.ask_for([GPU], most=1)
        time.sleep(0.1)
        assert GPU in other.take([GPU])

    assert warm.status().users == (os.getpid(),)
    loan.close()
    run.release()
    borrowed.keep()
    until(lambda: is_held(other, GPU, by="warm host"))
    assert is_running(pid)


def test_it_ends_when_another_run_was_quicker(warm: Warm) -> None:
    run = Leases(warm.leases)
    run.take([GPU])
    warm.launch(gpus=(GPU,), runs=(1,)).wait(LIMIT_S)

    until(lambda: warm.place.why_ended() and not Hosts(warm.place.folder).alive())

    assert warm.place.why_ended() == f"another run has {GPU}"


def test_a_host_of_two_gpus_waits_for_both(warm: Warm) -> None:
    run = Leases(warm.leases)
    run.take([GPU, "GPU-2"])
    warm.start(gpus=(GPU, "GPU-2"), runs=(os.getpid(),))
    until(lambda: warm.status().is_loaded)

    run.release(["GPU-2"])
    time.sleep(0.5)
    assert warm.status().is_loaded
    run.release()

    other = Leases(warm.leases)
    until(lambda: is_held(other, GPU, "GPU-2"))


def test_rounds_of_sigkill_at_random_moments(warm: Warm) -> None:
    """Host or run is killed; the next run attaches, or finds nobody and may start a host, and the GPU can be leased."""
    chance = random.Random(7)
    command = [sys.executable, "-c", ATTACH, str(warm.place.folder)]
    for _ in range(8):
        if not Hosts(warm.place.folder).alive():
            assert warm.launch(gpus=(GPU,), runs=(os.getpid(),)).wait(LIMIT_S) in (0, BUSY)
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0, 0.6))
        for record in records(warm.place.folder):
            if chance.random() < 0.5:
                os.kill(record.pid, signal.SIGKILL)
                until(lambda record=record: not is_running(record.pid))  # type: ignore[misc]
        run.kill()
        run.wait()
        alive = Hosts(warm.place.folder).alive()
        if alive:
            until(lambda: not warm.status().users)
            warm.attach().close()
        else:
            leases = Leases(warm.leases)
            assert leases.take([GPU]) == {}
            leases.release()
    until(lambda: Hosts(warm.place.folder).alive() or warm.launch(gpus=(GPU,)).wait(LIMIT_S) == 0)
    warm.attach().close()
