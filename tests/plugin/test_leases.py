"""A lease is held by one process of the machine, whoever they are and however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vlmgpu.leasing import holders, leases
from pytest_vlmgpu.leasing.leases import LeaseError, Leases

from .other_user import Nobody, as_root

if TYPE_CHECKING:
    from collections.abc import Callable

GPU = "GPU-1"
TAKE = """
import sys, time
from pathlib import Path
from pytest_vlmgpu.leasing.leases import Leases
leases = Leases(Path(sys.argv[1]))
print(leases.take(sys.argv[2:]), flush=True)
sys.stdin.read()
"""


def other(folder: Path, *names: str, **options: object) -> subprocess.Popen[str]:
    """A process that takes leases and holds them until its standard input ends."""
    command = [sys.executable, "-c", TAKE, str(folder), *names]
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", **options
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("")


def test_a_lease_is_held_once_and_its_holder_is_named(tmp_path: Path) -> None:
    mine, theirs = Leases(tmp_path / "leases"), Leases(tmp_path / "leases")

    assert mine.take([GPU, "GPU-2"]) == {}
    taken = theirs.take([GPU, "GPU-3"])

    assert set(taken) == {GPU}
    assert taken[GPU].startswith(f"pid {os.getpid()} (")
    assert " since 20" in taken[GPU]
    assert theirs.held == ("GPU-3",)
    mine.release()
    assert theirs.take([GPU]) == {}
    theirs.release()


def test_folder_and_files_are_open_to_all_users(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    mine = Leases(folder)
    old = os.umask(0o077)
    try:
        mine.take([GPU])
    finally:
        os.umask(old)

    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert (folder / f"{GPU}.lock").stat().st_mode & 0o777 == 0o666
    mine.release()
    assert (folder / f"{GPU}.lock").read_bytes() == b"", "a record outlived its lease"


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    holder = other(tmp_path, GPU)
    assert said(holder) == "{}"
    mine = Leases(tmp_path)
    assert GPU in mine.take([GPU])

    holder.send_signal(signal.SIGKILL)
    holder.communicate()

    assert mine.take([GPU]) == {}
    mine.release()


def test_children_keep_no_lease_alive(tmp_path: Path) -> None:
    mine, again = Leases(tmp_path), Leases(tmp_path)
    mine.take([GPU])
    reading, writing = os.pipe()
    forked_reads, forked_writes = os.pipe()
    forked = os.fork()
    if not forked:
        os.close(writing)
        os.write(forked_writes, b"1")
        os.read(reading, 1)
        os._exit(0)
    os.read(forked_reads, 1)  # the child has closed what it must not keep
    started = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    try:
        # Not released but closed, as the kernel does when a process dies.
        for file in mine._files.values():
            os.close(file)
        mine._files.clear()
        assert again.take([GPU]) == {}
    finally:
        for end in (writing, reading, forked_reads, forked_writes):
            os.close(end)
        os.waitpid(forked, 0)
        started.communicate()
        again.release()


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_a_trap_in_the_shared_folder_is_refused(tmp_path: Path, kind: str) -> None:
    folder, precious = tmp_path / "leases", tmp_path / "precious"
    precious.write_text("keep")
    folder.mkdir(mode=0o700)
    trap = folder / f"{GPU}.lock"
    if kind == "link":
        trap.symlink_to(precious)
    elif kind == "hard link":
        trap.hardlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(trap)
    else:
        trap.mkdir()
    mine = Leases(folder)

    with pytest.raises(LeaseError) as caught:
        mine.take(["GPU-0", GPU])

    assert str(trap) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert mine.held == (), "something was kept although not all could be had"
    assert precious.read_text() == "keep"


def test_the_usual_folder_must_not_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").mkdir()
    link = tmp_path / "leases"
    link.symlink_to(tmp_path / "target")
    Leases(link).take([])
    monkeypatch.setattr(leases, "DEFAULT_FOLDER", str(link))

    with pytest.raises(LeaseError, match="symbolic link"):
        Leases(link).take([GPU])


def test_a_folder_in_which_anyone_may_delete_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)

    with pytest.raises(LeaseError, match="chmod 1777"):
        Leases(tmp_path).take([GPU])


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "leases"
    place.write_text("")

    with pytest.raises(LeaseError, match=r"is no folder|Not a directory"):
        Leases(place).take([GPU])
    with pytest.raises(LeaseError, match="cannot be made or read"):
        Leases(place / "below").take([GPU])


def test_a_folder_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(LeaseError, match="cannot be made or read"):
        Leases(Path("/proc/vlmgpu-leases")).take([GPU])


def as_nobody(folder: Path, body: Callable[[], object]) -> str:
    """What another user gets, in a process of their own."""
    for parent in (folder, *folder.parents):
        if str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    return Nobody(body).answer()


@as_root
def test_users_share_the_folder(tmp_path: Path) -> None:
    mine = Leases(tmp_path / "leases")
    mine.take([GPU])

    assert f"pid {os.getpid()} (" in as_nobody(tmp_path, lambda: Leases(mine.folder).take([GPU]))
    assert as_nobody(tmp_path, lambda: Leases(mine.folder).take(["GPU-2"])) == "{}"
    mine.release()

    assert as_nobody(tmp_path, lambda: Leases(mine.folder).take([GPU])) == "{}", "a file of another user cannot be locked"
    assert mine.take([GPU, "GPU-2"]) == {}
    mine.release()


@as_root
def test_without_the_right_to_write_it_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    folder.mkdir(mode=0o755)
    (folder / "GPU-private.lock").touch(mode=0o600)
    (folder / "GPU-readable.lock").touch(mode=0o644)

    new = as_nobody(tmp_path, lambda: Leases(folder).take(["GPU-new"]))
    private = as_nobody(tmp_path, lambda: Leases(folder).take(["GPU-private"]))
    readable = as_nobody(tmp_path, lambda: Leases(folder).take(["GPU-readable"]))

    assert new == (
        f"LeaseError: {folder}/GPU-new.lock cannot be opened (Permission denied): make it writable for all who share these "
        "GPUs (chmod 1777), or name another folder with --vlm-lease-dir."
    )
    assert private.startswith(f"LeaseError: {folder}/GPU-private.lock cannot be opened (Permission denied)")
    assert readable == "{}", "a lock needs no right to write"


def test_a_full_disk_takes_the_name_and_not_the_lock(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", limit + TAKE, str(tmp_path), GPU], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert said(holder) == "{}"

    assert Leases(tmp_path).take([GPU]) == {GPU: "a process that left no name"}
    end(holder)


def test_a_file_that_is_deleted_before_it_is_locked_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = leases._flock
    calls: list[Path] = []

    def delete_first(path: Path, file: int) -> bool:
        if not calls:
            path.unlink()
        calls.append(path)
        return lock(path, file)

    monkeypatch.setattr(leases, "_flock", delete_first)
    mine = Leases(tmp_path)
    mine.take([GPU])

    assert len(calls) == 2
    assert GPU in Leases(tmp_path).take([GPU])
    mine.release()


def test_a_recycled_pid_is_not_blamed() -> None:
    record = json.loads(holders.describe_self())
    assert holders.describe(json.dumps(record).encode()).startswith(f"pid {os.getpid()} (")

    later = {**record, "started": record["started"] + 1}
    assert holders.describe(json.dumps(later).encode()) == "a process that left no name"
    elsewhere = {**record, "boot": "x", "host": "node7"}
    assert holders.describe(json.dumps(elsewhere).encode()).endswith(" on node7")
    container = {**record, "pid_namespace": "pid:[1]"}
    assert "another container" in holders.describe(json.dumps(container).encode())


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_whatever_is_in_the_file_a_sentence_comes_out(raw: bytes) -> None:
    assert holders.describe(raw).isprintable()


@given(
    st.fixed_dictionaries({"pid": st.integers(1, 2**31 - 1), "user": st.text(), "command": st.text(), "since": st.text()})
)
def test_texts_of_others_cannot_write_to_the_terminal(record: dict[str, object]) -> None:
    assert holders.describe(json.dumps(record).encode()).isprintable()
