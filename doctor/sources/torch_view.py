"""The question to torch: absent, remembered, or asked in a child process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..machine import TorchDevice, TorchView
from .cache_files import default_folder
from .child import Child, Outcome
from .driver import device_files, read_driver_files
from .torch_build import find_torch
from .torch_cache import TorchCache, key_parts

_IDLE_S = 5.0
"""An import that does nothing for so long hangs; one from a slow disk always has a page to read or a line to run."""


class TorchAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of the program in :mod:`.torch_child`; fields it had not reached are missing."""

    version: str | None = None
    cuda: str | None = None
    is_available: bool | None = None
    device_count: int | None = None
    devices: tuple[TorchDevice, ...] = ()
    warnings: tuple[str, ...] = ()


class TorchQuestion:
    """Finds out what torch says, starting at once.

    Args:
        search_path: Folders that an import searches.
        environment: Environment variables of the child.
        root: Where the file system begins.
        deadline_s: Seconds after which the child is killed.
        is_fresh: Ask, even when there is an answer from the last ten minutes.
        cache_folder: Where answers are kept; ``None`` for the user's cache folder.
    """

    def __init__(
        self,
        search_path: Sequence[str],
        environment: Mapping[str, str],
        *,
        root: Path,
        deadline_s: float,
        is_fresh: bool,
        cache_folder: Path | None,
    ) -> None:
        self._child: Child | None = None
        self._cache: TorchCache | None = None
        self._view: TorchView | None = None
        location = find_torch(search_path)
        if location is None:
            self._view = TorchView(state="absent", message="torch is not installed")
            return
        folder = cache_folder or default_folder()
        if folder is not None:
            self._cache = TorchCache(
                folder,
                key_parts(
                    torch_location=str(location),
                    executable=sys.executable,
                    environment=environment,
                    kernel_module_version=read_driver_files(root)["kernel_module_version"],
                    device_files=device_files(root),
                    root=root,
                ),
            )
            self._view = None if is_fresh else self._cache.load()
        if self._view is None:
            self._child = Child("torch_child", {}, environment=environment, deadline_s=deadline_s, idle_s=_IDLE_S)

    def known(self) -> TorchView | None:
        """The answer, if it is there without waiting."""
        return self._view

    def view(self) -> TorchView:
        """The answer; waits for the child."""
        if self._view is None:
            assert self._child is not None
            self._view = understand(self._child.outcome())
            if self._cache is not None:
                self._cache.store(self._view)
        return self._view

    def close(self) -> None:
        """Kill the child if it is still there."""
        if self._child is not None:
            self._child.close()


def understand(outcome: Outcome) -> TorchView:
    """Turn the outcome of the torch child into a record; what it said before it died is kept."""
    try:
        answer = msgspec.convert(outcome.answer, TorchAnswer)
    except msgspec.ValidationError as error:
        return TorchView(state="crashed", message=f"unreadable answer: {error}", seconds=outcome.seconds)
    message = outcome.message
    if outcome.state != "ok" and outcome.answer:
        message = f"{message}, after {outcome.stage}"
    elif outcome.state == "ok" and answer.is_available is False and answer.warnings:
        message = answer.warnings[0]
    fields: dict[str, Any] = {name: getattr(answer, name) for name in answer.__struct_fields__ if name != "warnings"}
    return TorchView(state=outcome.state, message=message, seconds=round(outcome.seconds, 3), **fields)


def search_path(environment: Mapping[str, str]) -> list[str]:
    """Folders that an import searches in a child with this environment: PYTHONPATH, then those of this process."""
    first = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    return [*first, *(folder for folder in sys.path if folder and folder not in first)]
