"""Find a model by name: a folder, a hub id in the local cache, a catalogue entry, or a hub id over the network."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from ..data.config_defaults import ARCHITECTURES
from ..data.families import REMOTE_TYPES, FamilyChanges
from ..errors import ModelFileError, ModelNotFoundError
from ..likeness import nearest
from ..model import ModelProfile
from .catalogue import catalogue, find_entry
from .checkpoint import Checkpoint
from .checkpoint_folder import read_folder
from .hub_cache import DEFAULT_REVISION, HubId, find_snapshot, hub_settings, parse_hub_id
from .installed_transformers import families_with_stored_names, has_flat_towers
from .model_profile import build_profile, class_of
from .user_families import families_of_user, family_of_package

_FILE = re.compile(r"[\w.\-/]{1,200}\.(?:json|safetensors|bin)\b", re.ASCII)
"""A name of a file in a checkpoint, at the beginning of a message."""


def load_profile(name: str, *, allow_network: bool = True, families: str | os.PathLike[str] | None = None) -> ModelProfile:
    """Describe a model from config.json and safetensors headers, without torch and without its weights.

    Args:
        name: A folder, a catalogue name, or a hub id ``org/name``, optionally ``org/name@revision``. A copy in the hub's
            local cache is preferred to the catalogue, and both to the network.
        allow_network: May ask the hub when nothing local answers; ``HF_HUB_OFFLINE=1`` forbids it as well.
        families: TOML file with rules for families of models that are not built in (docs/models.md); the environment
            variable ``VLM_DOCTOR_FAMILIES`` names one as well.

    Raises:
        UsageError: The file of families cannot be read, or is nonsense.
        ModelNotFoundError: No such folder, catalogue name or hub id.
        ModelFileError: A file is damaged or lacks what a plan needs.
    """
    own = families_of_user(families)
    place = find_model(name)
    if isinstance(place, Path):
        # transformers does not know "~".
        shown = str(place) if name.startswith("~") else name
        with _named(shown):
            return _describe(read_folder(place), shown, "checkpoint", own)
    with _named(place.repo):
        profile = _load_hub_model(name, place, own, allow_network=allow_network)
    revision = None if place.revision == DEFAULT_REVISION else place.revision
    return msgspec.structs.replace(profile, name=place.repo, revision=revision)


@contextlib.contextmanager
def _named(model: str) -> Iterator[None]:
    """Say of which model a file is damaged: whoever asks about several models could not tell from the file's name."""
    try:
        yield
    except ModelFileError as error:
        message = str(error)
        if message.startswith("/") or model.rstrip("/") in message:
            raise
        joint = "/" if _FILE.match(message) else ": "
        raise ModelFileError(f"{model.rstrip('/')}{joint}{message}") from error


def find_model(name: str) -> Path | HubId:
    """Tell what a name means, without reading the model: a folder (or what was meant as one), or a hub id.

    Raises:
        ModelNotFoundError: It is neither, nor a name of the catalogue.
    """
    folder = _as_folder(name)
    if folder is not None:
        return folder
    entry = find_entry(name)
    model = HubId(entry.name) if entry else parse_hub_id(name)
    if model is None:
        raise ModelNotFoundError(f"{name[:200]!r}: no folder, catalogue name or hub id (org/name) of that name{_end(name)}")
    return model


def _describe(
    checkpoint: Checkpoint,
    name: str,
    origin: Literal["checkpoint", "hub", "catalogue"],
    own: Mapping[str, FamilyChanges],
) -> ModelProfile:
    names = class_of(checkpoint.config)
    # Packages are asked about families that nobody here knows, so that the others need not wait for it.
    if not own.keys() & set(names) and names[0] not in ARCHITECTURES and names[0] not in REMOTE_TYPES.values():
        own = family_of_package(*names)
    return build_profile(
        checkpoint,
        name=name,
        origin=origin,
        families=own,
        are_towers_flat=has_flat_towers(),
        stored_names=families_with_stored_names(),
    )


def _as_folder(name: str) -> Path | None:
    """The path that is meant, or ``None`` when the name may be a hub id or a catalogue name."""
    if not name.strip():
        raise ModelNotFoundError("The name of the model is empty; give a folder, a catalogue name or a hub id (org/name).")
    try:
        path = Path(name).expanduser()
        is_path = path.exists() or name.startswith(("/", "./", "../", "~")) or name.endswith("/")
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFoundError(
            f"{name[:200]!r}: cannot be looked up ({reason}); give a folder or a hub id (org/name)."
        ) from error
    return path if is_path else None


def _load_hub_model(name: str, model: HubId, own: Mapping[str, FamilyChanges], *, allow_network: bool) -> ModelProfile:
    entry = find_entry(model.repo) if model.revision == DEFAULT_REVISION else None
    settings = hub_settings(os.environ)
    snapshot = find_snapshot(model, settings.cache)
    problem: ModelFileError | None = None
    if snapshot is not None:
        try:
            return _describe(read_folder(snapshot), name, "hub", own)
        except ModelFileError as error:
            problem = error
    if entry is not None:
        profile = _describe(entry.checkpoint(), name, "catalogue", own)
    elif not allow_network or settings.is_offline:
        raise problem or ModelNotFoundError(
            f"{name}: no such folder, not in the catalogue nor in {settings.cache}, and the network may not be used "
            f"({'HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set' if settings.is_offline else '--offline'}); "
            f"download it, or allow that{_end(name)}"
        )
    else:
        # Late: http costs more than everything else here, and local models do without.
        from .hub import read_hub

        profile = _describe(read_hub(model, settings), name, "hub", own)
    if problem is None:
        return profile
    return msgspec.structs.replace(profile, notes=(*profile.notes, f"The copy in the hub cache was not used: {problem}"))


def _end(name: str) -> str:
    """How to end a sentence about an unknown name: with a question about the catalogue's that look alike, if any."""
    known = [alias for entry in catalogue().values() for alias in (entry.name, *entry.aliases)]
    close = nearest(name[:200], known, most=2, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else "."
