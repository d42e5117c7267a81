"""From the name of a model to what ``from_pretrained`` takes: a folder, or a hub id and a revision."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vlm_doctor.sources.catalogue import find_entry
from vlm_doctor.sources.hub_cache import parse_hub_id

from .failures import LoadFailure


class Source(NamedTuple):
    """Where a model is loaded from."""

    name: str
    """Folder, or hub id ``org/name``."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""


def find_source(name: str) -> Source:
    """Read a name as :func:`vlm_doctor.sources.model_files.load_profile` does, so that what was planned is loaded.

    Args:
        name: Folder, catalogue name (``glm-4v-9b``), hub id, or ``org/name@revision``.

    Raises:
        LoadFailure: VLM713, when it is none of these.
    """
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return Source(str(folder))
        is_path = folder.exists() or name.startswith((".", "/", "~")) or name.endswith("/")
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoadFailure("VLM713", f"{name[:200]!r} cannot be looked up ({reason}): write a folder or a hub id.") from None
    if is_path:
        # What can only be a folder is not looked for on a hub.
        raise LoadFailure("VLM713", f"there is no folder {folder}: check the path of the checkpoint.")
    entry = find_entry(name)
    model = parse_hub_id(entry.name if entry is not None else name)
    if model is None:
        raise LoadFailure("VLM713", f"{name[:200]!r} is no folder, catalogue name or hub id (org/name): check the name.")
    return Source(*model)
