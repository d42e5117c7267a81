"""From names in a checkpoint to names in the installed class. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from ..data.families import RENAMES, Rename
from ..errors import ModelFileError
from .checkpoint import StoredTensor


def by_module_name(tensors: Mapping[str, StoredTensor], model_type: str) -> dict[str, StoredTensor]:
    """Give the tensors of a checkpoint the names they have in the class.

    Args:
        tensors: By name as stored.
        model_type: ``config.model_type``; a family without an entry in ``RENAMES`` keeps its names.

    Returns:
        Tensors by parameter name in the class of transformers 4.52 or later. Names that a new transformers has saved
        pass through unchanged.

    Raises:
        ModelFileError: A name cannot be a parameter's, or two become the same.
    """
    renames = RENAMES.get(model_type, ())
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        # An empty component would make an empty key, which a device_map takes for the whole model.
        if not all(name.split(".")):
            raise ModelFileError(f"tensor {name[:120]!r} is not named like a parameter of a model; convert the checkpoint.")
        new = _rename(name, renames)
        if new in renamed:
            raise ModelFileError(
                f"tensor {name[:120]!r} is stored under its old and its new name; save the checkpoint again."
            )
        renamed[new] = tensor
    return renamed


def _rename(name: str, renames: tuple[Rename, ...]) -> str:
    for old, new in renames:
        # By whole components: "model" must not match "model_x".
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name
