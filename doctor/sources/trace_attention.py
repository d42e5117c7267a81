"""Fused attention on ghosts: what its CUDA kernels hold, without the kernels. Used by :mod:`.trace_child` only.

Which kernel torch takes, and what it allocates: aten/native/transformers/cuda/sdp_utils.cpp (choice),
aten/native/transformers/attention.cpp (masks), attention.cu and flash_attn/flash_api.cpp (outputs, row statistics).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .trace_ghost import Ghost

MAX_FUSED_HEAD_DIM = 256
_SINGLE_PASS_HEAD_DIM = 128
"""Above, the memory-efficient kernel sums up in a float32 buffer (kNeedsOutputAccumulatorBuffer of kernel_forward.h)."""
_ALIGNMENT = 8
"""Elements to which a mask's rows and a head are padded (16-bit types)."""
_SCORES = torch.nn.functional.scaled_dot_product_attention


class OnGpu(TorchFunctionMode):  # type: ignore[misc]
    """Replaces fused attention, and reading back what has no data.

    Args:
        cudnn_width: The widest head for which torch takes cuDNN's attention; 0 where it never does.
    """

    def __init__(self, *, cudnn_width: int = 0) -> None:
        super().__init__()
        self._cudnn_width = cudnn_width

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SCORES:
            return attention(*args, **kwargs, cudnn_width=self._cudnn_width)
        if func is torch.tensor:
            return func(_numbers(args[0]), *args[1:], **kwargs)
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], Ghost):
            ghost = args[0]
            inner = ghost.inner if ghost.is_real else torch.zeros(ghost.shape, dtype=ghost.dtype)
            return func(inner, *args[1:], **kwargs)
        return func(*args, **kwargs)


def _numbers(data: Any) -> Any:
    """Nested lists with numbers in the place of ghosts, whose data torch would read past any mode."""
    if isinstance(data, (list, tuple)):
        return [_numbers(one) for one in data]
    if isinstance(data, Ghost):
        return data.inner if data.is_real else torch.zeros(data.shape, dtype=data.dtype)
    return data


def attention(  # noqa: PLR0917 - torch's signature
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    cudnn_width: int = 0,
) -> Any:
    """What ``scaled_dot_product_attention`` allocates, by the kernel that CUDA would take."""
    kernel = choose(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, cudnn_width=cudnn_width)
    if kernel == "math":
        return _math(query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    batch, heads, tokens, head_dim = query.shape
    width = value.shape[-1]
    options = {"device": query.device, "dtype": query.dtype}
    if kernel == "cudnn":
        held = _mask(attn_mask, query, is_padded=False)
        return _like(query, width)
    if kernel == "flash":
        padded = -(-head_dim // _ALIGNMENT) * _ALIGNMENT
        if padded != head_dim:
            query, key, value = (torch.nn.functional.pad(one, (0, padded - head_dim)) for one in (query, key, value))
        statistics = torch.empty(batch, heads, tokens, device=query.device, dtype=torch.float32)
        output = torch.empty(batch, tokens, heads, padded, **options).transpose(1, 2)
        del statistics
        return output[..., :head_dim] if padded != head_dim else output
    held = _mask(attn_mask, query, is_padded=True)
    output = torch.empty(batch, tokens, heads, width, **options)
    if width > _SINGLE_PASS_HEAD_DIM and query.dtype != torch.float32:
        held.append(torch.empty(batch, tokens, heads, width, device=query.device, dtype=torch.float32))
    return output.transpose(1, 2)


def _like(query: Any, width: int) -> Any:
    """An output whose dimensions lie in memory as those of the query do (alloc_with_matching_layout of MHA.cpp)."""
    order = sorted(range(query.dim()), key=lambda dim: (-query.stride(dim), dim))
    shape = [*query.shape[:-1], width]
    output = torch.empty([shape[dim] for dim in order], device=query.device, dtype=query.dtype)
    return output.permute([order.index(dim) for dim in range(query.dim())])


def choose(query: Any, key: Any, value: Any, mask: Any, *, is_causal: bool, enable_gqa: bool, cudnn_width: int = 0) -> str:
    """``cudnn``, ``flash``, ``efficient`` or ``math``, in torch's order on Ampere and newer."""
    dims = {one.shape[-1] for one in (query, key, value)}
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    is_dense = query.dim() == 4 and is_half
    is_vectors = all(dim % _ALIGNMENT == 0 for dim in dims) and key.shape[-2] > 1
    if cudnn_width and is_dense and is_vectors and (max(dims) <= cudnn_width or dims == {192, 128}):
        return "cudnn"
    is_square = not is_causal or query.shape[-2] == key.shape[-2]
    if is_dense and mask is None and len(dims) == 1 and max(dims) <= MAX_FUSED_HEAD_DIM and is_square:
        return "flash"
    alignment = _ALIGNMENT if is_half else _ALIGNMENT // 2
    is_aligned = query.shape[-1] == key.shape[-1] and all(dim % alignment == 0 for dim in dims)
    has_same_heads = query.dim() == 4 and query.shape[1] == key.shape[1] == value.shape[1]
    return "efficient" if has_same_heads and is_aligned and not enable_gqa else "math"


def _mask(mask: Any, query: Any, *, is_padded: bool) -> list[Any]:
    """Copies of a mask that the kernel wants: additive instead of boolean, rows padded to whole vectors."""
    held: list[Any] = []
    if mask is None:
        return held
    if mask.dtype == torch.bool:
        held.append(torch.empty(mask.shape, device=query.device, dtype=query.dtype))
    if is_padded and mask.shape[-1] % _ALIGNMENT:
        padded = -(-mask.shape[-1] // _ALIGNMENT) * _ALIGNMENT
        held.append(torch.empty(*mask.shape[:-1], padded, device=query.device, dtype=query.dtype))
    return held


def _math(query: Any, key: Any, value: Any, mask: Any, *, is_causal: bool, scale: float | None, enable_gqa: bool) -> Any:
    """The plain kernel. Source: _scaled_dot_product_attention_math; 16-bit inputs are computed in float32."""
    dtype = query.dtype
    factor = math.sqrt(scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.empty(mask.shape, device=query.device, dtype=dtype)
    if dtype != torch.float32:
        query, key, value = query.float(), key.float(), value.float()
    query = query * factor
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ (key.transpose(-2, -1) * factor)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value).to(dtype)
