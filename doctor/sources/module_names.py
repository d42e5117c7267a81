"""From names in a checkpoint to names in the installed class. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from ..data.families import Rename
from ..errors import ModelFileError
from .checkpoint import StoredTensor

_INNER = "vision_model"
"""The module inside a tower that 5.x has done away with (``FLAT_TOWERS``)."""


def by_module_name(tensors: Mapping[str, StoredTensor], renames: tuple[Rename, ...]) -> dict[str, StoredTensor]:
    """Give the tensors of a checkpoint the names they have in the class.

    Args:
        tensors: By name as stored.
        renames: Of the family; without any the names stay.

    Returns:
        Tensors by parameter name in the class of transformers 4.52 or later. Names that a new transformers has saved
        pass through unchanged. Tensors that the class merges (experts of one layer) keep names of their own below it.

    Raises:
        ModelFileError: A name cannot be a parameter's, or two become the same.
    """
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        # An empty component would make an empty key, which a device_map takes for the whole model.
        if not all(name.split(".")):
            raise ModelFileError(f"tensor {name[:120]!r} is not named like a parameter of a model; convert the checkpoint.")
        _add(renamed, _rename(name, renames), tensor, name)
    return renamed


def with_flat_tower(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Leave the ``vision_model`` inside the vision tower out of the names, which the class does not have.

    Raises:
        ModelFileError: Two names become the same.
    """
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        _add(renamed, _flat(name), tensor, name)
    return renamed


def _add(renamed: dict[str, StoredTensor], new: str, tensor: StoredTensor, old: str) -> None:
    if new in renamed:
        raise ModelFileError(f"tensor {old[:120]!r} is stored under its old and its new name; save the checkpoint again.")
    renamed[new] = tensor


def _rename(name: str, renames: tuple[Rename, ...]) -> str:
    for old, new in renames:
        if "#" in old:
            match = _pattern(old).match(name)
            if match:
                number = int(match[1])
                return new.replace("#+1", str(number + 1)).replace("#", match[1]) + name[match.end() :]
        # By whole components: "model" must not match "model_x".
        elif name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


@functools.cache
def _pattern(old: str) -> re.Pattern[str]:
    return re.compile("([0-9]{1,6})".join(map(re.escape, old.split("#"))) + r"(?=\.|$)")


def _flat(name: str) -> str:
    """Leave out the ``vision_model`` that follows the tower's own component."""
    tower, inner, rest = name.partition(f".{_INNER}.")
    is_tower = "layers" not in tower and (tower.endswith(("_tower", _INNER)))
    return f"{tower}.{rest}" if inner and is_tower else name
