"""From the tensors of a unit to its figures. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.families import FamilyRules
from ..model import Role, Unit
from .checkpoint import StoredTensor
from .linear_layers import linear_weights
from .shapes_from_tensors import FLOATS

Named = tuple[str, StoredTensor]
"""A tensor with its parameter name."""
MOST_SMALL_ELEMENTS = 2**19
"""1 MiB in a 16-bit type; source: kSmallSize of torch's CUDACachingAllocator."""


def unit_of(
    key: str,
    role: Role,
    contents: Sequence[Named],
    rules: FamilyRules,
    *,
    layer: int | None = None,
    parts: tuple[Unit, ...] = (),
) -> Unit:
    """Describe a unit, or a part of one.

    Args:
        key: Its key in the ``device_map``.
        role: Of the unit.
        contents: Its tensors; none for a module that has buffers only.
        rules: Of the family.
        layer: Number of the text layer, or of the tower's block.
        parts: What it may be broken into.
    """
    parameters: dict[str, int] = {}
    kept = 0
    for _, tensor in contents:
        parameters[tensor.dtype] = parameters.get(tensor.dtype, 0) + tensor.elements
        if tensor.dtype not in FLOATS:
            kept += tensor.stored_bytes if tensor.loaded_bytes is None else tensor.loaded_bytes
    linear, of_experts = linear_weights(role, contents, rules)
    return Unit(
        key=key,
        role=role,
        layer=layer,
        parameters=parameters,
        stored_bytes=sum(tensor.stored_bytes for _, tensor in contents),
        largest_tensor_elements=max((tensor.elements for _, tensor in contents), default=0),
        small_elements=sum(tensor.elements for _, tensor in contents if tensor.elements <= MOST_SMALL_ELEMENTS),
        linear=linear,
        expert_linear=of_experts,
        kept_bytes=kept,
        packed_bytes=sum(tensor.packed_bytes for _, tensor in contents),
        parts=parts,
    )
