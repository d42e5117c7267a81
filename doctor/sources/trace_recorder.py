"""Tensors without data on a GPU that is not there, and the mode that notes which of them live when.

Used by the child program :mod:`.trace_child` only. A :class:`Ghost` says that it is on ``cuda:0``, so that torch's own
code and a model's take the branches they take on a GPU (fused half-to-float softmax, addmm with bias, fused norms), but
every operation on it is only shaped, on the meta device. What a model may read back (token numbers, grids, cumulative
lengths, position tables) is small and computed for real on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
META = torch.device("meta")
CPU = torch.device("cpu")
MAX_REAL_ELEMENTS = 2**20
"""Results of more elements have no data. A model reads back what describes its input, never the input itself."""
_aten = torch.ops.aten


class Ghost(torch.Tensor):
    """A tensor that claims to be on a device and keeps only what ``inner`` keeps: nothing (meta), or small data (CPU)."""

    inner: torch.Tensor
    claimed: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device = CUDA) -> Ghost:
        ghost: Ghost = torch.Tensor._make_subclass(
            cls, inner, require_grad=False, dispatch_device=True, device_for_backend_keys=device
        )
        ghost.inner = inner
        ghost.claimed = device
        return ghost

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Ghost({tuple(self.inner.shape)}, {self.inner.dtype}, {self.claimed}, {self.inner.device.type})"

    @property
    def is_real(self) -> bool:
        """Whether there is data."""
        return self.inner.device.type == "cpu"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].claimed
        return run(func, args, kwargs or {}, Silent())


class Silent:
    """Hears of new tensors, and notes nothing."""

    def born(self, tensor: torch.Tensor) -> None:
        """A tensor was made."""

    def read(self, tensor: torch.Tensor) -> None:
        """A tensor is an operand."""

    def temporary(self, *sizes_bytes: int) -> None:
        """A kernel holds scratch memory while it runs."""


class Recorder(TorchDispatchMode, Silent):
    """Runs operations on ghosts and writes down every storage that comes and goes.

    ``events`` holds ``[number, size_bytes, place, module]``: a size above 0 is an allocation, 0 the end of that number; a
    negative size says that so many bytes of it are read, for the first time, at a place other than its own.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.events: list[list[int]] = []
        self.place = 0
        self.module = 0
        self._numbers: dict[int, int] = {}
        self._places: dict[int, set[int]] = {}
        self._next = 1
        self._is_listening = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare the import of torch's compiler, a second of time."""
        return False

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these: weights."""
        for tensor in tensors:
            self._numbers[_storage(tensor)._cdata] = 0

    def listen(self) -> None:
        """Count from now on."""
        self._is_listening = True

    def born(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is known or empty."""
        storage = _storage(tensor)
        key = storage._cdata
        if not self._is_listening or key in self._numbers or not storage.nbytes():
            return
        number = self._allocate(storage.nbytes())
        self._numbers[key] = number
        self._places[number] = {self.place}
        weakref.finalize(storage, self._end, key, number)

    def read(self, tensor: torch.Tensor) -> None:
        """Note the first use of a storage at a place other than its own: on another GPU it would be a copy."""
        number = self._numbers.get(_storage(tensor)._cdata, 0)
        if number and self.place not in self._places[number]:
            self._places[number].add(self.place)
            self.events.append([number, -tensor.numel() * tensor.element_size() or -1, self.place, self.module])

    def temporary(self, *sizes_bytes: int) -> None:
        """Scratch memory that a kernel allocates, all of it at once, and gives back when it has run."""
        if self._is_listening:
            numbers = [self._allocate(size) for size in sizes_bytes if size]
            self.events.extend([number, 0, self.place, self.module] for number in reversed(numbers))

    def _allocate(self, size_bytes: int) -> int:
        number, self._next = self._next, self._next + 1
        self.events.append([number, size_bytes, self.place, self.module])
        return number

    def _end(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self._places.pop(number, None)
        self.events.append([number, 0, self.place, self.module])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].claimed
        return run(func, args, kwargs or {}, self)


def _storage(tensor: torch.Tensor) -> Any:
    inner = tensor.inner if isinstance(tensor, Ghost) else tensor
    return inner.untyped_storage()


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to whatever is in lists, tuples and dicts; torch's own is several times slower."""
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([_map(change, one) for one in value])
    if kind is dict:
        return {key: _map(change, one) for key, one in value.items()}
    if isinstance(value, tuple):  # named ones
        return kind([_map(change, one) for one in value])
    return change(value)


def _tensors(value: Any, found: list[torch.Tensor]) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _tensors(one, found)
    elif isinstance(value, dict):
        for one in value.values():
            _tensors(one, found)
    return found


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


def run(func: Any, args: Any, kwargs: dict[str, Any], notes: Silent) -> Any:
    """Run one operation of ATen: shaped only, or for real where all operands are real and the result is small."""
    tensors = _tensors(kwargs, _tensors(args, []))
    ghosts = [tensor for tensor in tensors if isinstance(tensor, Ghost)]
    device = _device(ghosts, kwargs)
    if not ghosts and device.type != "cuda":
        return func(*args, **kwargs)
    on_gpu = device.type == "cuda"
    for ghost in ghosts:
        if ghost.claimed.type == "cuda":
            notes.read(ghost)
    special = _SPECIAL.get(func.overloadpacket)
    result = special(func, args, kwargs, notes) if special else NotImplemented
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

    return _map(wrap, result)


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
                func(*_map(_real, args), **_map(_real, kwargs))
            return args[place]
    if is_real and (schema.is_view or _is_small(func, args, kwargs, tensors)):
        return func(*_map(_real, args), **_map(_real, kwargs))
    return _shaped(func, args, kwargs)


def _is_small(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> bool:
    """Whether a result is small enough to be computed; what cannot be shaped depends on data, and is."""
    if tensors and math.prod(max(1, tensor.numel()) for tensor in tensors) <= MAX_REAL_ELEMENTS:
        return True
    try:
        shapes = _shaped(func, args, kwargs)
    except (RuntimeError, NotImplementedError):
        return True
    return all(value.numel() <= MAX_REAL_ELEMENTS for value in _tensors(shapes, []))


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
        return func(*_map(_shape, args), **_map(_shape, kwargs))
    key = (func, _key(args), _key(kwargs))
    known = _shapes.get(key)
    if known is not None:
        return _rebuilt(known)
    operands = _map(_shape, args), _map(_shape, kwargs)
    result = func(*operands[0], **operands[1])
    storages = {tensor.untyped_storage()._cdata for tensor in _tensors(operands, [])}
    if any(tensor.untyped_storage()._cdata in storages for tensor in _tensors(result, [])):
        _aliasing.add(func)
    else:
        _shapes[key] = _map(_noted, result)
    return result


def _noted(value: Any) -> Any:
    return _Shape(tuple(value.size()), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, _Shape):
        return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=META)
    if isinstance(value, (list, tuple)):
        return type(value)([_rebuilt(one) for one in value])
    return value


def _scalar(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    """``item()``: of what is unknown, zero."""
    inner = args[0].inner
    if args[0].is_real:
        return func(inner)
    return torch.zeros((), dtype=inner.dtype).item()


def _indices(indices: Iterable[Any], notes: Silent) -> list[Any]:
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


def _index(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    tensors = [args[0], *(index for index in args[1] if index is not None)]
    if all(not isinstance(tensor, Ghost) or tensor.is_real for tensor in tensors):
        return NotImplemented
    return _shaped(func, (args[0], _indices(args[1], notes), *args[2:]), kwargs)


def _index_put_(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    """In place; masks become numbers first. Source: aten/native/TensorAdvancedIndexing.cpp."""
    held = _indices(args[1], notes)
    del held
    return NotImplemented


def _index_put(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    held = _indices(args[1], notes)
    del held
    return _copy(args[0])


def _nonzero(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    if args[0].is_real:
        return NotImplemented
    inner = args[0].inner
    return torch.empty(inner.numel(), inner.dim(), dtype=torch.int64, device=META)


def _masked_select(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    tensor, mask = args[0], args[1]
    if not isinstance(mask, Ghost) or (tensor.is_real and mask.is_real):
        return NotImplemented
    chosen = int(mask.inner.sum()) if mask.is_real else mask.numel()
    return torch.empty(chosen * (tensor.numel() // max(1, mask.numel())), dtype=tensor.dtype, device=META)


def _masked_scatter_(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    """The running count of the mask, and the mask in full where it is expanded.

    Source: masked_scatter__cuda of aten/native/cuda/IndexKernel.cu (``maskPrefixSum``, int64) and
    launch_masked_scatter_kernel (``mask.contiguous()``).
    """
    mask = args[1]
    count = args[0].numel()
    is_whole = mask.numel() == count and mask.inner.is_contiguous() if isinstance(mask, Ghost) else False
    notes.temporary(8 * count, 0 if is_whole else count)
    return args[0]


def _masked_scatter(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    result = _copy(args[0])
    notes.born(result)
    _masked_scatter_(func, args, kwargs, notes)
    return result


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)


def _routing(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    """Choices among values that are not known: ``topk`` takes turns, so that work is spread as a trained router does."""
    result = _shaped(func, args, kwargs) if not args[0].is_real else NotImplemented
    if result is NotImplemented or result[1].numel() > MAX_REAL_ELEMENTS:
        return result
    choices = args[0].shape[-1] if args[0].dim() else 1
    numbers = torch.arange(result[1].numel(), dtype=torch.int64).remainder_(max(1, choices))
    return type(result)((result[0], numbers.reshape(result[1].shape)))


def _argmax(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    """The next token is not known: number 5."""
    if args[0].is_real:
        return NotImplemented
    result = _shaped(func, args, kwargs)
    return torch.full(result.shape, 5, dtype=torch.int64) if result.numel() <= MAX_REAL_ELEMENTS else result


def _comparison(func: Any, args: Any, kwargs: Any, notes: Silent) -> Any:
    """Tests of values that are not known: different from anything, and no more than that."""
    if args[0].is_real and (len(args) < 2 or not isinstance(args[1], Ghost) or args[1].is_real):
        return NotImplemented
    result = _shaped(func, args, kwargs)
    if result.numel() > MAX_REAL_ELEMENTS:
        return result
    return torch.full(result.shape, func.overloadpacket is _aten.ne)


_SPECIAL: dict[Any, Callable[..., Any]] = {
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


def pretend_cuda() -> None:
    """Let tensors say that they are on a GPU in a process that must not touch one.

    Torch starts CUDA where a GPU is named, before a mode can answer, and selects that GPU around many operations. The
    selector of a torch built with CUDA is replaced by torch itself when it finds no GPU; a torch built without CUDA has none,
    and gets the one of the meta device, which does nothing. Source: c10/core/impl/DeviceGuardImplInterface.h.
    """
    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
    # torch.tensor(...) makes its tensor on the CPU and moves it where a mode can see that.
    torch._C._set_only_lift_cpu_tensors(True)
    torch._C._ensureCUDADeviceGuardSet()
    if torch.version.cuda is None:
        kinds = torch._C._autograd.DeviceType
        cuda, meta = int(kinds.CUDA.value), int(kinds.Meta.value)  # type: ignore[attr-defined]
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        selectors = (ctypes.c_void_p * (max(cuda, meta) + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        selectors[cuda] = selectors[cuda] or selectors[meta]
