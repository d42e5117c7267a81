"""Checkpoints in the local cache of which something is to be said: half downloaded, or with code that no longer runs.

No code of a checkpoint is run or imported: its text is searched for what transformers has dropped.
"""

from __future__ import annotations

import time
from pathlib import Path

from ..machine import Checkpoint
from .own_code import broken_calls, gone
from .regular_file import names_in, read_text

_DEADLINE_S = 0.3
_MOST_REPOS = 300
_MAX_NAME_CHARS = 200


def read_checkpoints(cache: Path, transformers: Path | None) -> tuple[Checkpoint, ...]:
    """Look through the cache.

    Args:
        cache: The hub's cache folder.
        transformers: Folder of the installed package, or ``None``.

    Raises:
        TimeoutError: There are so many, or the disk is so slow, that not all could be looked at.
    """
    until = time.monotonic() + _DEADLINE_S
    broken: frozenset[str] | None = None
    found = []
    for folder in _repos(cache):
        if time.monotonic() > until:
            raise TimeoutError(f"not all checkpoints were looked at within {_DEADLINE_S:g} s")
        snapshot = _newest(folder)
        missing = _missing_files(folder, snapshot)
        calls = broken_calls(snapshot) if snapshot is not None and transformers is not None else None
        if calls and broken is None and transformers is not None:
            # Late: its files have 400 kB, and few checkpoints bring code.
            broken = gone(transformers)
        lost = tuple(name for name in calls or () if name in (broken or ()))
        if missing or lost:
            repo = folder.name.removeprefix("models--").replace("--", "/")[:_MAX_NAME_CHARS]
            found.append(Checkpoint(repo=repo, missing_files=missing, lost_calls=lost))
    return tuple(found)


def _repos(cache: Path) -> list[Path]:
    try:
        return sorted(path for path in cache.iterdir() if path.name.startswith("models--"))[:_MOST_REPOS]
    except OSError:
        return []


def _newest(folder: Path) -> Path | None:
    """The snapshot of ``main``, or the only one."""
    commit = (read_text(folder / "refs/main", 100) or "").strip()
    if commit and "/" not in commit and (folder / "snapshots" / commit).is_dir():
        return folder / "snapshots" / commit
    snapshots = names_in(folder / "snapshots")
    return folder / "snapshots" / snapshots[0] if len(snapshots) == 1 else None


def _missing_files(folder: Path, snapshot: Path | None) -> int:
    """Downloads that were cut off, and links of the snapshot to files that are gone."""
    missing = sum(name.endswith(".incomplete") for name in names_in(folder / "blobs"))
    if snapshot is not None:
        missing += sum((snapshot / name).is_symlink() and not (snapshot / name).exists() for name in names_in(snapshot))
    return missing
