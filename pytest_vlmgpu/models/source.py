"""From the name of a model to what ``from_pretrained`` takes: a folder, or a hub id and a revision."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vlm_doctor.errors import ModelNotFoundError
from vlm_doctor.sources.model_files import find_model

from .failures import LoadFailure


class Source(NamedTuple):
    """Where a model is loaded from."""

    name: str
    """Folder, or hub id ``org/name``."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""


def find_source(name: str) -> Source:
    """Read a name with the doctor's own rule, so that what was planned is loaded.

    Args:
        name: Folder, catalogue name (``glm-4v-9b``), hub id, or ``org/name@revision``.

    Raises:
        LoadFailure: VLM713, when it is none of these.
    """
    try:
        place = find_model(name)
    except ModelNotFoundError as error:
        # With a cause, it was the file system that refused: the sentence has its reason.
        nothing = f"{name[:200]!r} is no folder, catalogue name or hub id (org/name): check the name."
        raise LoadFailure("VLM713", str(error) if error.__cause__ else nothing) from None
    if not isinstance(place, Path):
        return Source(*place)
    if not place.is_dir():
        # What can only be a folder is not looked for on a hub.
        raise LoadFailure("VLM713", f"there is no folder {place}: check the path of the checkpoint.")
    return Source(str(place))
