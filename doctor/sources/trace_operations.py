"""Operations of ATen on ghosts: shaped on the meta device, or computed where the operands are real and small.

Used by the child program :mod:`.trace_child` only. What a model may read back (token numbers, grids, cumulative lengths,
position tables) is small and has data; where an answer would depend on data that is not there, the careful one is given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from .trace_ghost import CPU, CUDA, META, Ghost, Notes, map_nested, tensors_in

MAX_REAL_ELEMENTS = 2**22
"""Results of more elements have no data. A model reads back what describes its input, never the input itself."""
SHORT_ROW = 4096
"""Keys that are sorted without scratch memory. Source: should_use_small_sort of aten/native/cuda/Sort.h."""
NEXT_TOKEN = 5
"""What an unknown greatest logit chooses: a number that means nothing special to any of the families."""
_aten = torch.ops.aten


class Call(NamedTuple):
    """One operation with its operands."""

    func: Any
    args: Any
    kwargs: dict[str, Any]
    notes: Notes


class _Schema(NamedTuple):
    """What matters of an operation's signature."""

    written: tuple[int, ...]
    """Positions of operands that are written to."""
    is_view: bool


@functools.cache
def _schema(func: Any) -> _Schema:
    arguments = [argument.alias_info for argument in func._schema.arguments]
    written = tuple(place for place, alias in enumerate(arguments) if alias is not None and alias.is_write)
    return _Schema(written, any(alias is not None and not alias.is_write for alias in arguments))


def run(func: Any, args: Any, kwargs: dict[str, Any], notes: Notes) -> Any:
    """Run one operation of ATen: shaped only, or for real where all operands are real and the result is small."""
    tensors = tensors_in(kwargs, tensors_in(args, []))
    ghosts = [tensor for tensor in tensors if isinstance(tensor, Ghost)]
    device = _device(ghosts, kwargs)
    if not ghosts and device.type != "cuda":
        return func(*args, **kwargs)
    on_gpu = device.type == "cuda"
    for ghost in ghosts:
        if ghost.claimed.type == "cuda":
            notes.read(ghost)
    special = _SPECIAL.get(func.overloadpacket)
    result = special(Call(func, args, kwargs, notes)) if special else NotImplemented
    if result is NotImplemented:
        result = _plain(func, args, kwargs, tensors)
    if any(result is tensor for tensor in tensors):
        return result

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Ghost):
            return value
        if on_gpu:
            notes.born(value)
        elif value.device.type == "cpu":
            return value
        return Ghost(value, device)

    return map_nested(wrap, result)


def _device(ghosts: list[Ghost], kwargs: dict[str, Any]) -> torch.device:
    asked = kwargs.get("device")
    if asked is not None:
        device = torch.device(asked)
        return CUDA if device.type in ("cuda", "meta") else device
    first = CPU
    for ghost in ghosts:
        if ghost.claimed.type == "cuda":
            return ghost.claimed
        first = ghost.claimed
    return first


def _plain(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    """Run an operation that needs no care, and give tensors that are no ghosts yet, or one of the operands."""
    schema = _schema(func)
    is_real = all(not isinstance(tensor, Ghost) or tensor.is_real for tensor in tensors)
    for place in schema.written:
        if place < len(args) and isinstance(args[place], torch.Tensor):
            if is_real:
                func(*map_nested(_real, args), **map_nested(_real, kwargs))
            return args[place]
    if is_real and (schema.is_view or _is_small(func, args, kwargs, tensors)):
        return func(*map_nested(_real, args), **map_nested(_real, kwargs))
    return _shaped(func, args, kwargs)


def _is_small(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> bool:
    """Whether a result is small enough to be computed; what cannot be shaped depends on data, and is."""
    if tensors and math.prod(max(1, tensor.numel()) for tensor in tensors) <= MAX_REAL_ELEMENTS:
        return True
    try:
        shapes = _shaped(func, args, kwargs)
    except (RuntimeError, NotImplementedError):
        return True
    return all(value.numel() <= MAX_REAL_ELEMENTS for value in tensors_in(shapes, []))


def _real(value: Any) -> Any:
    if isinstance(value, torch.device):
        return CPU
    return value.inner if isinstance(value, Ghost) else value


def _shape(value: Any) -> Any:
    if isinstance(value, torch.device):
        return META
    if not isinstance(value, torch.Tensor):
        return value
    inner = value.inner if isinstance(value, Ghost) else value
    if inner.device.type == "meta" or (not isinstance(value, Ghost) and inner.dim() == 0):
        return inner
    return torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device=META)


_shapes: dict[Any, Any] = {}
"""What became of operations on such operands before: most layers of a model do the same, and torch shapes slowly."""
_aliasing: set[Any] = set()
"""Operations whose results may share memory with their operands, whether they say so or not."""


class _Shape(NamedTuple):
    """All of a tensor but its memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _key(value: Any) -> Any:
    kind = type(value)
    if kind is list or kind is tuple:
        return tuple([_key(one) for one in value])
    if kind is dict:
        return tuple([(name, _key(one)) for name, one in value.items()])
    if isinstance(value, torch.Tensor):
        inner = value.inner if isinstance(value, Ghost) else value
        return tuple(inner.size()), inner.stride(), inner.dtype, inner.dim() == 0 and not isinstance(value, Ghost)
    return kind, value


def _shaped(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the meta device. Views keep the storage of their meta operand."""
    if _schema(func).is_view or func in _aliasing:
        return func(*map_nested(_shape, args), **map_nested(_shape, kwargs))
    key = (func, _key(args), _key(kwargs))
    known = _shapes.get(key)
    if known is not None:
        return _rebuilt(known)
    operands = map_nested(_shape, args), map_nested(_shape, kwargs)
    result = func(*operands[0], **operands[1])
    storages = {tensor.untyped_storage()._cdata for tensor in tensors_in(operands, [])}
    if any(tensor.untyped_storage()._cdata in storages for tensor in tensors_in(result, [])):
        _aliasing.add(func)
    else:
        _shapes[key] = map_nested(_noted, result)
    return result


def _noted(value: Any) -> Any:
    return _Shape(tuple(value.size()), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, _Shape):
        return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=META)
    if isinstance(value, (list, tuple)):
        return type(value)([_rebuilt(one) for one in value])
    return value


def _scalar(call: Call) -> Any:
    """``item()``: of what is unknown, zero."""
    inner = call.args[0].inner
    if call.args[0].is_real:
        return call.func(inner)
    return torch.zeros((), dtype=inner.dtype).item()


def _indices(indices: Iterable[Any], notes: Notes) -> list[Any]:
    """Boolean masks as the numbers of what they choose, which the CUDA kernel allocates; unknown masks choose all."""
    result: list[Any] = []
    for index in indices:
        if not isinstance(index, torch.Tensor) or index.dtype not in (torch.bool, torch.uint8):
            result.append(index)
            continue
        inner = index.inner if isinstance(index, Ghost) else index
        if inner.device.type == "cpu":
            found = inner.nonzero()
        else:
            found = torch.empty(inner.numel(), inner.dim(), dtype=torch.int64, device=META)
        notes.born(found)
        result.extend(found.select(1, column) for column in range(inner.dim()))
    return result


def _index(call: Call) -> Any:
    tensors = [call.args[0], *(index for index in call.args[1] if index is not None)]
    if all(not isinstance(tensor, Ghost) or tensor.is_real for tensor in tensors):
        return NotImplemented
    return _shaped(call.func, (call.args[0], _indices(call.args[1], call.notes), *call.args[2:]), call.kwargs)


def _index_put_(call: Call) -> Any:
    """In place; masks become numbers first. Source: aten/native/TensorAdvancedIndexing.cpp."""
    held = _indices(call.args[1], call.notes)
    del held
    return NotImplemented


def _index_put(call: Call) -> Any:
    held = _indices(call.args[1], call.notes)
    del held
    return _copy(call.args[0])


def _nonzero(call: Call) -> Any:
    if call.args[0].is_real:
        return NotImplemented
    inner = call.args[0].inner
    return torch.empty(inner.numel(), inner.dim(), dtype=torch.int64, device=META)


def _masked_select(call: Call) -> Any:
    tensor, mask = call.args[0], call.args[1]
    if not isinstance(mask, Ghost) or (tensor.is_real and mask.is_real):
        return NotImplemented
    chosen = int(mask.inner.sum()) if mask.is_real else mask.numel()
    return torch.empty(chosen * (tensor.numel() // max(1, mask.numel())), dtype=tensor.dtype, device=META)


def _masked_scatter_(call: Call) -> Any:
    """The running count of the mask, and the mask in full where it is expanded.

    Source: masked_scatter__cuda of aten/native/cuda/IndexKernel.cu (``maskPrefixSum``, int64) and
    launch_masked_scatter_kernel (``mask.contiguous()``).
    """
    mask = call.args[1]
    count = call.args[0].numel()
    is_whole = mask.numel() == count and mask.inner.is_contiguous() if isinstance(mask, Ghost) else False
    call.notes.temporary(8 * count, 0 if is_whole else count)
    return call.args[0]


def _masked_scatter(call: Call) -> Any:
    result = _copy(call.args[0])
    call.notes.born(result)
    _masked_scatter_(call)
    return result


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)


def _routing(call: Call) -> Any:
    """Choices among values that are not known: ``topk`` takes turns, so that work is spread as a trained router does."""
    result = _shaped(call.func, call.args, call.kwargs) if not call.args[0].is_real else NotImplemented
    if result is NotImplemented or result[1].numel() > MAX_REAL_ELEMENTS:
        return result
    choices = call.args[0].shape[-1] if call.args[0].dim() else 1
    numbers = torch.arange(result[1].numel(), dtype=torch.int64).remainder_(max(1, choices))
    return type(result)((result[0], numbers.reshape(result[1].shape)))


def _argmax(call: Call) -> Any:
    """The next token is not known."""
    if call.args[0].is_real:
        return NotImplemented
    result = _shaped(call.func, call.args, call.kwargs)
    return torch.full(result.shape, NEXT_TOKEN, dtype=torch.int64) if result.numel() <= MAX_REAL_ELEMENTS else result


def _comparison(call: Call) -> Any:
    """Tests of values that are not known: different from anything, and no more than that."""
    if call.args[0].is_real and (len(call.args) < 2 or not isinstance(call.args[1], Ghost) or call.args[1].is_real):
        return NotImplemented
    result = _shaped(call.func, call.args, call.kwargs)
    if result.numel() > MAX_REAL_ELEMENTS:
        return result
    return torch.full(result.shape, call.func.overloadpacket is _aten.ne)


def _sort(call: Call) -> Any:
    """The kernel's scratch memory beside sorted keys and their numbers.

    Source: launch_stable_sort_kernel of aten/native/cuda/SortStable.cu: numbers of all keys, then buffers of CUB for keys
    and numbers; seen in memory histories of H100 cards. Short rows are sorted in place.
    """
    keys = call.args[0]
    result = _plain(call.func, call.args, call.kwargs, tensors_in(call.kwargs, tensors_in(call.args, [])))
    for tensor in tensors_in(result, []):
        call.notes.born(tensor)
    if keys.dim() and keys.shape[-1] > SHORT_ROW:
        call.notes.temporary(8 * keys.numel(), (keys.element_size() + 8) * keys.numel())
    return result


def _histc(call: Call) -> Any:
    """Counts of integers, which the CPU has no kernel for."""
    keys = call.args[0]
    if not keys.is_real or keys.is_floating_point():
        return NotImplemented
    return call.func(keys.inner.float(), *call.args[1:], **call.kwargs).to(keys.dtype)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    _aten.sort: _sort,
    _aten.histc: _histc,
    _aten._local_scalar_dense: _scalar,
    _aten.index: _index,
    _aten.index_put_: _index_put_,
    _aten._index_put_impl_: _index_put_,
    _aten.index_put: _index_put,
    _aten.nonzero: _nonzero,
    _aten.masked_select: _masked_select,
    _aten.masked_scatter_: _masked_scatter_,
    _aten.masked_scatter: _masked_scatter,
    _aten.topk: _routing,
    _aten.argmax: _argmax,
    _aten.isnan: _comparison,
    _aten.isinf: _comparison,
    _aten.any: _comparison,
    _aten.all: _comparison,
    _aten.eq: _comparison,
    _aten.ne: _comparison,
}
