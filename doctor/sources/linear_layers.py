"""Which tensors of a unit are weights of ``nn.Linear``. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..data.families import FamilyRules
from ..data.linear_weights import PATCHES, ROUTERS, TABLES
from ..model import LinearWeights, Role
from .checkpoint import StoredTensor
from .shapes_from_tensors import FLOATS

_EXPERTS = "experts"
"""Name of the list of experts, in every class of transformers and in the code of DeepSeek-VL2 and Kimi-VL."""


def linear_weights(
    role: Role, contents: Sequence[tuple[str, StoredTensor]], rules: FamilyRules
) -> tuple[LinearWeights, LinearWeights]:
    """Count the linear layers of a unit that bitsandbytes may replace.

    Args:
        role: Of the unit. Of a head the output layer itself stays as it is, what else is in it does not.
        contents: Its tensors.
        rules: Of the family.

    Returns:
        Those of single experts apart, in second place.
    """
    attentions = {name.rpartition(".")[0] for name, _ in contents if name.endswith(".in_proj_weight")}
    shared, of_experts = LinearWeights(), LinearWeights()
    table = _output_table(contents) if role == "head" else None
    for name, tensor in contents:
        if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
            continue
        path = name.split(".")
        # nn.MultiheadAttention reads the weight of its out_proj itself: a class of its own, which is left alone.
        looks = tensor is not table and ".".join(path[:-2]) not in attentions and _looks_linear(path)
        if not _is_linear(path, rules, looks=looks):
            continue
        one = LinearWeights(tensor.elements, tensor.shape[0], 1, tensor.elements)
        if _is_of_expert(path):
            of_experts += one
        else:
            shared += one
    return shared, of_experts


def _output_table(contents: Sequence[tuple[str, StoredTensor]]) -> StoredTensor | None:
    """The weight with the most rows: one for each token of the vocabulary."""
    matrices = (tensor for _, tensor in contents if len(tensor.shape) == 2)
    return max(matrices, key=lambda tensor: tensor.shape[0], default=None)


def _is_linear(path: Sequence[str], rules: FamilyRules, *, looks: bool) -> bool:
    """Apply the family's exceptions to what a tensor looks like."""
    if path[-1] in rules.quantized or (path[-1] == "weight" and path[-2:][0] in rules.quantized):
        return True
    whole = f".{'.'.join(path)}."
    return looks and not any(f".{part}." in whole for part in rules.unquantized)


def _looks_linear(path: Sequence[str]) -> bool:
    """Judge a matrix by its name."""
    module = path[-2] if len(path) > 1 else ""
    is_table = ("embed" in module or module in TABLES) and not module.startswith(PATCHES)
    return path[-1] == "weight" and not is_table and module not in ROUTERS and "norm" not in module


def _is_of_expert(path: Sequence[str]) -> bool:
    """True for a layer of one numbered expert."""
    return any(part == _EXPERTS and number.isdecimal() for part, number in pairwise(path))
