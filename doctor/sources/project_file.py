"""Reads ``[tool.vlm-doctor]`` of the project that the doctor is run in."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError
from ..expectations import ProjectSettings, read_settings

_FILE = "pyproject.toml"
_MAX_BYTES = 4 * 2**20


class ProjectFile(NamedTuple):
    """What a project says, and where."""

    settings: ProjectSettings
    path: Path | None
    """``None`` when no file has the table."""


def read_project(folder: Path | None = None) -> ProjectFile:
    """Read the nearest ``pyproject.toml``, from ``folder`` upwards, as other tools do.

    Args:
        folder: ``None`` is the working folder.

    Raises:
        UsageError: The file has the table, and it cannot be read; one sentence says why.
    """
    try:
        start = Path.cwd() if folder is None else folder
    except OSError:
        # The working folder was removed.
        return ProjectFile(ProjectSettings(), None)
    for parent in (start, *start.parents):
        path = parent / _FILE
        try:
            if not path.is_file():
                # A pipe of that name would be waited for.
                continue
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES)
        except OSError:
            continue
        if b"vlm-doctor" not in data:
            # Most projects; a TOML reader takes longer to load than this search.
            return ProjectFile(ProjectSettings(), None)
        table = _table(data, str(path))
        if table is None:
            return ProjectFile(ProjectSettings(), None)
        return ProjectFile(read_settings(table, where=str(path)), path)
    return ProjectFile(ProjectSettings(), None)


def _table(data: bytes, where: str) -> dict[str, Any] | None:
    # Before Python 3.11 the reader is tomli, which pytest brings.
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        whole = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{where} is not TOML ({str(error).rstrip('.')[:200]}); correct it, or leave it aside with --no-project."
        ) from error
    tool = whole.get("tool")
    table = tool.get("vlm-doctor") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, dict):
        raise UsageError(f"{where}: tool.vlm-doctor is not a table; write [tool.vlm-doctor].")
    return table
