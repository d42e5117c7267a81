"""Leases of GPUs that hold for the whole machine: one file a UUID, locked with flock.

The kernel frees a lock when its holder ends, however it ends. Files stay, are never deleted, and what is in them serves
messages only. Several users share the folder: it is made like /tmp (mode 1777), its files for everybody (0666).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from . import holders

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DEFAULT_FOLDER = "/tmp/pytest-vlmgpu-leases"  # not tempfile's: TMPDIR often differs from user to user
_SHARED = 0o1777
_FOR_ALL = 0o666
_ATTEMPTS = 20
"""A file that is deleted and made anew while it is opened; more than once is already odd."""
_ADVICE = "make it writable for all who share these GPUs (chmod 1777), or name another folder with --vlm-lease-dir"


class LeaseError(Exception):
    """The folder cannot be used, so that nobody can be kept away from a GPU; the text is one sentence."""


class Leases:
    """The leases that this process holds.

    Args:
        folder: Where the files are; made when it is first used.
        about: Written beside this process' own name; of one that gives way to whoever asks ``warm`` (a model) and
            ``warm_bytes`` (name to size).
    """

    def __init__(self, folder: Path, about: Mapping[str, object] | None = None) -> None:
        self.folder = folder
        self._about = about or {}
        self._files: dict[str, int] = {}
        """Name to open file."""
        self._written: dict[str, int] = {}
        """Name to when we last wrote the file, as the file system has it."""
        _ALL.add(self)

    @property
    def held(self) -> tuple[str, ...]:
        """Names, in the order they were taken."""
        return tuple(self._files)

    def take(self, names: Iterable[str]) -> dict[str, str]:
        """Take what is free of these leases, without waiting.

        Args:
            names: UUIDs of GPUs or MIG slices.

        Returns:
            Name to holder, in words, of each that somebody else has.

        Raises:
            LeaseError: The folder or a file cannot be used. Nothing that was taken here is kept then.
        """
        before = set(self._files)
        taken: dict[str, str] = {}
        try:
            _prepare(self.folder)
            for name in names:
                if name not in self._files and not self._lock(name):
                    taken[name] = self._holder(name)
        except LeaseError:
            self.release(set(self._files) - before)
            raise
        return taken

    def release(self, names: Iterable[str] | None = None) -> None:
        """Give leases back; all of them, if none is named."""
        for name in list(self._files if names is None else names):
            file = self._files.pop(name, None)
            if file is not None:
                with suppress(OSError):
                    os.ftruncate(file, 0)
                os.close(file)

    def ask_for(self, names: Iterable[str], most: int) -> bool:
        """Have so many warm hosts that hold one of these leases, and are idle, give it back: its file is touched.

        Returns:
            False where there is none.
        """
        found = [name for name in names if holders.gives_way(self._record(name))][:most]
        for name in found:
            with suppress(OSError):
                os.utime(self.folder / f"{name}.lock", follow_symlinks=False)
        return bool(found)

    def warm_bytes(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Of leases that idle warm hosts hold: the host's pid, and bytes of the GPU that it gives back when it is asked."""
        found = {}
        for name in names:
            record = self._record(name)
            pid, size = holders.pid_of(record), holders.warm_bytes(record, name)
            if pid is not None and size and holders.is_here(record):
                found[name] = pid, size
        return found

    def are_asked_for(self) -> bool:
        """True when somebody has touched one of ours (:meth:`ask_for`), or it is no longer the file that others look at."""
        return any(
            os.fstat(file).st_mtime_ns != self._written[name] or not _is_same(self.folder / f"{name}.lock", file)
            for name, file in self._files.items()
        )

    def holder_pid(self, name: str) -> int | None:
        """Process that holds a lease, as it says itself; ``None`` where nobody says anything."""
        return holders.pid_of(self._record(name))

    def _lock(self, name: str) -> bool:
        path = self.folder / f"{name}.lock"
        for _ in range(_ATTEMPTS):
            file = _open(path)
            try:
                _check(path, file)
                if not _flock(path, file):
                    os.close(file)
                    return False
                is_current = _is_same(path, file)
            except LeaseError:
                os.close(file)
                raise
            if is_current:
                self._files[name] = file
                # A full disk takes nothing from the lock: only the name of its holder is missing.
                with suppress(OSError):
                    os.ftruncate(file, 0)
                    os.pwrite(file, holders.describe_self(self._about), 0)
                self._written[name] = os.fstat(file).st_mtime_ns
                return True
            os.close(file)
        raise LeaseError(f"{path} is replaced again and again by somebody else: {_ADVICE}.")

    def _holder(self, name: str) -> str:
        return holders.describe(self._record(name))

    def _record(self, name: str) -> bytes:
        try:
            file = os.open(self.folder / f"{name}.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return b""
        try:
            return os.pread(file, holders.MAX_BYTES, 0)
        finally:
            os.close(file)


def _prepare(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(_SHARED)
        # Of a folder that a user names, a link is the user's own choice.
        info = folder.lstat() if str(folder) == DEFAULT_FOLDER else folder.stat()
    except OSError as error:
        raise LeaseError(f"the folder for leases {folder} cannot be made or read ({_why(error)}): {_ADVICE}.") from None
    if stat.S_ISLNK(info.st_mode):
        raise LeaseError(
            f"the folder for leases {folder} is a symbolic link, which somebody else may have made: remove it."
        )
    if not stat.S_ISDIR(info.st_mode):
        raise LeaseError(f"{folder}, where the folder for leases should be, is no folder: remove it, or {_ADVICE}.")
    is_open_to_all = info.st_mode & stat.S_IWOTH
    if is_open_to_all and not info.st_mode & stat.S_ISVTX:
        raise LeaseError(
            f"in the folder for leases {folder} every user may delete the files of the others: chmod 1777 {folder}."
        )


def _open(path: Path) -> int:
    """Open the file of a lease, and make it if need be."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    problem: OSError | None = None
    for attempt in range(_ATTEMPTS):
        for mode in (os.O_RDWR, os.O_RDONLY):  # a lock needs no right to write, only the name of its holder does
            try:
                return os.open(path, flags | mode)
            except OSError as error:
                problem = error
            if problem.errno == errno.ENOENT:
                break
        if problem is None or problem.errno != errno.ENOENT:
            break
        try:
            # O_CREAT only with O_EXCL: the kernel refuses it for existing files of others (fs.protected_regular).
            file = os.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL, _FOR_ALL)
        except FileExistsError:
            continue
        except OSError as error:
            problem = error
            if error.errno == errno.EACCES and not attempt:
                time.sleep(0.05)  # another user may just have made the folder and not yet opened it to all
                continue
            break
        with suppress(OSError):
            os.fchmod(file, _FOR_ALL)
        return file
    assert problem is not None
    if problem.errno == errno.ELOOP:
        raise LeaseError(f"{path} is a symbolic link, which somebody else may have made: remove it.")
    raise LeaseError(f"{path} cannot be opened ({_why(problem)}): {_ADVICE}.")


def _check(path: Path, file: int) -> None:
    info = os.fstat(file)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        raise LeaseError(f"{path} is no plain file of its own, somebody else may have put it there: remove it.")


def _flock(path: Path, file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise LeaseError(
            f"{path} cannot be locked ({_why(error)}): name a folder on a local disk with --vlm-lease-dir."
        ) from None
    return True


def _is_same(path: Path, file: int) -> bool:
    """True unless the file was deleted, or another put in its place, before it was locked."""
    try:
        there, ours = path.lstat(), os.fstat(file)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise LeaseError(f"{path} cannot be read ({_why(error)}): {_ADVICE}.") from None
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _forget_in_child() -> None:
    """A forked child must not keep a lock of its parent alive."""
    for leases in _ALL:
        for file in leases._files.values():
            with suppress(OSError):
                os.close(file)
        leases._files.clear()


_ALL: weakref.WeakSet[Leases] = weakref.WeakSet()
os.register_at_fork(after_in_child=_forget_in_child)
