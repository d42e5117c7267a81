"""Where warm hosts of this user are: a folder of its own for each folder of leases, closed to everybody else."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from vlm_doctor.sources.cache_files import load_record, store_record

from .records import HostRecord

_MAX_RECORD_BYTES = 2**20
_MAX_LOG_BYTES = 2**20
"""A log that is longer is begun anew."""


class PlaceError(Exception):
    """The folder cannot be used; the text is one sentence."""


class Note(msgspec.Struct, frozen=True):
    """Why a model is not kept, or not any more."""

    reason: str


class Place(NamedTuple):
    """The files of one host."""

    folder: Path
    digest: str

    @property
    def socket(self) -> Path:
        """Of a host that lives, or one that was killed."""
        return self.folder / f"{self.digest}.sock"

    @property
    def lock(self) -> Path:
        """Locked as long as the host lives."""
        return self.folder / f"{self.digest}.lock"

    @property
    def record(self) -> Path:
        """:class:`HostRecord`."""
        return self.folder / f"{self.digest}.json"

    @property
    def log(self) -> Path:
        """What the host, and the libraries in it, had to say."""
        return self.folder / f"{self.digest}.log"

    @property
    def refusal(self) -> Path:
        """:class:`Note`: this model cannot be kept, so that nobody tries it again and again."""
        return self.folder / f"{self.digest}.refused"

    @property
    def ending(self) -> Path:
        """:class:`Note`: why the last host of this model has ended."""
        return self.folder / f"{self.digest}.ended"

    def open_log(self) -> int:
        """A descriptor to append to."""
        with suppress(OSError):
            if self.log.lstat().st_size > _MAX_LOG_BYTES:
                self.log.unlink()
        return os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def why_refused(self) -> str:
        """Why this model cannot be kept; empty where nothing is known against it."""
        note = load_record(self.refusal, Note, most_bytes=_MAX_RECORD_BYTES)
        return note.reason if note is not None else ""

    def refuse(self, reason: str) -> None:
        """Note that this model cannot be kept."""
        store_record(self.refusal, Note(reason))

    def why_ended(self) -> str:
        """Why the last host of this model has ended; empty where there was none, or it was killed."""
        note = load_record(self.ending, Note, most_bytes=_MAX_RECORD_BYTES)
        return note.reason if note is not None else ""

    def clear(self) -> bool:
        """Take away what a host that was killed has left; False where one lives, or is about to."""
        try:
            lock = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.record.exists():  # one that ends by itself takes it away, and has said why
                self.note_end("it was killed")
            self.socket.unlink(missing_ok=True)
            self.record.unlink(missing_ok=True)
        except OSError:
            return False
        finally:
            os.close(lock)
        return True

    def note_end(self, reason: str) -> None:
        """Say why the host has ended, for the run that looks for it."""
        store_record(self.ending, Note(reason))


def folder_for(lease_dir: str) -> Path:
    """The folder of this user's hosts; made when it is first used.

    Args:
        lease_dir: Folder of the leases: runs that do not know of each other's GPUs do not share models.

    Raises:
        PlaceError: It is somebody else's, open to others, or cannot be made.
    """
    # Not tempfile's: TMPDIR often differs from run to run. A socket's path may have 107 bytes, so not below a home either.
    top = Path(f"/tmp/pytest-vlmgpu-warm-{os.getuid()}")
    place = top / hashlib.sha256(os.fsencode(lease_dir)).hexdigest()[:12]
    for folder in (top, place):
        try:
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            info = folder.lstat()
        except OSError as error:
            raise PlaceError(f"{folder}, the folder of warm hosts, cannot be made ({error.strerror}).") from None
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise PlaceError(
                f"{folder}, where the folder of this user's warm hosts should be, is not one that is this user's alone: "
                "remove it, or have its owner do so."
            )
    return place


def records(folder: Path) -> list[HostRecord]:
    """Hosts that were started here; each may have ended since."""
    found = (load_record(path, HostRecord, most_bytes=_MAX_RECORD_BYTES) for path in sorted(folder.glob("*.json")))
    return [record for record in found if record is not None]
