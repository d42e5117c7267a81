"""Rules of families that users add: a TOML file, or an entry point of an installed package."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ..data.families import FamilyChanges
from ..data.image_rules import ImageConstants
from ..errors import UsageError
from .regular_file import read_given

VARIABLE = "VLM_DOCTOR_FAMILIES"
"""Environment variable that names a TOML file."""

GROUP = "vlm_doctor.families"
"""Entry points: the name is a ``model_type`` or the name of a class, the object a mapping like a table of the file."""

MAX_BYTES = 1_000_000
_HELP = "docs/models.md shows one"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
_Multiple = Annotated[float, msgspec.Meta(gt=0, le=1000)]


class _Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As ``ImageConstants``."""

    kind: Literal["fixed", "merge", "tiles"]
    extra_tokens: _Count = 0
    extra_patches: _Count = 0
    max_tiles: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    has_thumbnail: bool = False
    min_pixels: _Count | None = None
    max_pixels: _Count | None = None
    frames: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    view_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    row_tokens: _Count = 0
    tile_tokens: _Count = 0


class _Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """As ``FamilyRules``; what is left out stays as it is built in."""

    renames: list[tuple[_Name, _Name]] | msgspec.UnsetType = msgspec.UNSET
    vision: tuple[_Name, ...] | msgspec.UnsetType = msgspec.UNSET
    projector: tuple[_Name, ...] | msgspec.UnsetType = msgspec.UNSET
    embedding: tuple[_Name, ...] | msgspec.UnsetType = msgspec.UNSET
    head: tuple[_Name, ...] | msgspec.UnsetType = msgspec.UNSET
    layers: _Name | msgspec.UnsetType = msgspec.UNSET
    rotary: tuple[_Name, ...] | msgspec.UnsetType = msgspec.UNSET
    is_tower_whole: bool | msgspec.UnsetType = msgspec.UNSET
    tower_buffers: tuple[_Name, ...] | msgspec.UnsetType = msgspec.UNSET
    runs_inner_generate: bool | msgspec.UnsetType = msgspec.UNSET
    image: _Image | msgspec.UnsetType = msgspec.UNSET
    text_multiples: tuple[_Multiple, _Multiple] | msgspec.UnsetType = msgspec.UNSET
    vision_multiples: tuple[_Multiple, _Multiple] | msgspec.UnsetType = msgspec.UNSET
    unquantized: tuple[_Name, ...] | msgspec.UnsetType = msgspec.UNSET
    quantized: tuple[_Name, ...] | msgspec.UnsetType = msgspec.UNSET


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    families: dict[_Name, dict[str, Any]]


def families_of_user(file: str | os.PathLike[str] | None = None) -> dict[str, FamilyChanges]:
    """Rules from a file, by ``model_type`` or name of the class.

    Args:
        file: TOML; without it the one that ``VLM_DOCTOR_FAMILIES`` names, if it is set.

    Raises:
        UsageError: It cannot be read, or is nonsense.
    """
    named = file if file is not None else os.environ.get(VARIABLE)
    if not named:
        return {}
    path = Path(named)
    content = _parsed(_read(path), path)
    try:
        families = msgspec.convert(content, type=_File).families
    except (msgspec.ValidationError, RecursionError) as error:
        raise UsageError(f"{path}: {_one_line(error)}; {_HELP}.") from error
    return {name: _changes(family, where=f"{path}: families.{name}") for name, family in families.items()}


def family_of_package(*names: str) -> dict[str, FamilyChanges]:
    """Rules from an entry point of one of these names.

    Raises:
        UsageError: It cannot be loaded, or is nonsense.
    """
    # Late: it costs more than the rest of a plan.
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP):
        if point.name not in names:
            continue
        where = f"entry point {point.name} = {point.value}"
        try:
            content: Any = point.load()
        except Exception as error:
            # Code of a stranger: whatever it raises ends in one sentence.
            reason = f"{type(error).__name__}: {_one_line(error)}"
            raise UsageError(f"{where}: cannot be loaded ({reason}); repair or uninstall its package.") from error
        return {point.name: _changes(content, where=where)}
    return {}


def _read(path: Path) -> str:
    data = read_given(
        path, MAX_BYTES, where=str(path), what="a file of families", advice=f"correct --families or {VARIABLE}"
    )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text (byte {error.start:,}); save it as UTF-8.") from error


def _parsed(text: str, path: Path) -> Mapping[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise UsageError(f"{path}: Python 3.10 needs the package tomli to read it; install tomli.") from error
    try:
        content: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not TOML ({_one_line(error)}); {_HELP}.") from error
    return content


def _changes(content: Any, *, where: str) -> FamilyChanges:
    """The fields that were given, as ``FamilyRules`` has them."""
    try:
        family = msgspec.convert(content, type=_Family)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UsageError(f"{where}: {_one_line(error)}; {_HELP}.") from error
    for old, new in () if family.renames is msgspec.UNSET else family.renames:
        if not all(old.split(".")) or not all(new.split(".")) or old.count("#") > 1 or ("#" in new and "#" not in old):
            raise UsageError(
                f"{where}: renames has {old[:60]!r} to {new[:60]!r}, which are not dotted names with at most one #; "
                f"{_HELP}."
            )
    given: dict[str, Any] = {
        field: value for field in family.__struct_fields__ if (value := getattr(family, field)) is not msgspec.UNSET
    }
    if "renames" in given:
        given["renames"] = tuple(given["renames"])
    if isinstance(family.image, _Image):
        given["image"] = ImageConstants(**msgspec.structs.asdict(family.image))
    return given


def _one_line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
