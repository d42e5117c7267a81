"""Dimensions that a config leaves out and the stored tensors tell. Pure.

CogVLM2's config.json does not name its key and value heads, and GLM-4.1V's calls the width of the projector
``intermediate_size`` of the tower: both would mislead a plan.
"""

from __future__ import annotations

from collections.abc import Mapping

from .checkpoint import StoredTensor

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types whose shape is that of the weight; quantized checkpoints store packed matrices."""

_FUSED = ("query_key_value", "qkv_proj", "wqkv", "Wqkv", "qkv")
_MLP_INPUTS = ("fc1", "up_proj", "gate_proj", "linear_fc1", "c_fc", "w1", "dense_h_to_4h")


def kv_heads(tensors: Mapping[str, StoredTensor], layer: str, heads: int, head_dim: int) -> int | None:
    """Heads of keys and values, from the rows of a text layer's projections.

    Args:
        tensors: By module name.
        layer: Key of any text layer.
        heads: Query heads.
        head_dim: Elements of a head.

    Returns:
        ``None`` when the layer has no matrix of that kind.
    """
    for name, tensor in tensors.items():
        if not name.startswith(f"{layer}.") or not _is_matrix(name, tensor):
            continue
        module = name.split(".")[-2]
        if module == "k_proj" and tensor.shape[0] % head_dim == 0:
            return max(1, tensor.shape[0] // head_dim)
        if module.endswith(_FUSED):
            of_keys, rest = divmod(tensor.shape[0] - heads * head_dim, 2 * head_dim)
            return of_keys if of_keys > 0 and rest == 0 else None
    return None


def mlp_width(tensors: Mapping[str, StoredTensor], tower: str) -> int | None:
    """Width of the MLP in a tower's blocks, or ``None`` when no block has one by a known name.

    Args:
        tensors: By module name.
        tower: Key of the vision unit.
    """
    for name, tensor in tensors.items():
        parts = name.split(".")
        is_in_block = any(part.isdecimal() for part in parts[:-2])
        if name.startswith(f"{tower}.") and is_in_block and _is_matrix(name, tensor) and parts[-2] in _MLP_INPUTS:
            return tensor.shape[0]
    return None


def _is_matrix(name: str, tensor: StoredTensor) -> bool:
    return name.endswith(".weight") and len(tensor.shape) == 2 and tensor.shape[0] > 0 and tensor.dtype in FLOATS
