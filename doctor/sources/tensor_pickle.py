"""Read which tensors a torch pickle describes, without running anything that it names. Pure.

``data.pkl`` of a file of ``torch.save`` is a program for a small stack machine; Python's own unpickler would call whatever
the program names. Here each instruction is followed on values of our own: a name is a word to compare with the few that a
plain checkpoint has, and a call of any other is refused. What is built are dicts, lists, tuples, numbers and descriptions
of tensors, each instruction adding one value, so that memory stays in proportion to the file.

Source: ``torch/serialization.py`` (``_save``, ``persistent_id``), ``torch/_utils.py`` (``_rebuild_tensor_v2`` and its like)
of torch 2.13; ``pickletools`` for the instructions.
"""

from __future__ import annotations

import math
import pickletools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import ModelFileError

MAX_INSTRUCTIONS = 4_000_000
"""About 50 a tensor; bounds the time of a hostile file to a few seconds."""

MAX_DIMENSIONS = 64
"""torch's own limit."""

MAX_NAME = 1024
"""Letters of a tensor's name; real ones have about 120."""

_NATURALS_END = 2**63

_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}
"""Class of the storage to safetensors' word."""

_DTYPES: Mapping[str, str] = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
"""Types without a class of their own: ``_rebuild_tensor_v3`` names them beside an untyped storage."""


class Storage(NamedTuple):
    """Memory that tensors are views of."""

    key: str
    """Name of its file in the archive, below ``data/``."""
    dtype: str
    elements: int


class PickledTensor(NamedTuple):
    """One tensor as the pickle describes it."""

    storage: Storage
    dtype: str
    offset: int
    """Elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(NamedTuple):
    """``module.name``, which is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:120]


class _DamagedError(ValueError):
    """The program makes no sense."""


class _Mark:
    """Where a list of arguments begins on the stack."""


_MARK = _Mark()
_ORDERED_DICT = _Name("collections", "OrderedDict")
_SIZE = _Name("torch", "Size")
_TYPED_CALL = _Name("torch._tensor", "_rebuild_from_type_v2")
_REBUILD = _Name("torch._utils", "_rebuild_tensor_v2")
_REBUILD_WITH_DTYPE = _Name("torch._utils", "_rebuild_tensor_v3")
_PARAMETERS = frozenset(
    {_Name("torch._utils", "_rebuild_parameter"), _Name("torch._utils", "_rebuild_parameter_with_state")}
)
_WORDS = {"torch": {*_STORAGES, *_DTYPES, "Size"}, "torch.storage": {"UntypedStorage"}}
_CALLED = {_ORDERED_DICT, _TYPED_CALL, _REBUILD, _REBUILD_WITH_DTYPE, *_PARAMETERS}
_TYPES = {_Name("torch.nn.parameter", "Parameter"), _Name("torch.nn.parameter", "Buffer"), _Name("torch", "Tensor")}


def tensors_of_pickle(data: bytes, *, where: str) -> dict[str, PickledTensor]:
    """Names and descriptions of the tensors of a state dict.

    Args:
        data: The pickle.
        where: File name, for the message of the error.

    Raises:
        ModelFileError: It names anything but tensors, is damaged, or is no state dict.
    """
    machine = _Machine(where)
    try:
        with warnings.catch_warnings():
            # Python warns of odd escapes in texts that no checkpoint has, and that are refused right after.
            warnings.simplefilter("ignore")
            result = machine.run(data)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, UnicodeError) as error:
        raise ModelFileError(f"{where}: its pickle is damaged ({str(error)[:120]}); download it again.") from error
    items = result.items() if isinstance(result, dict) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, PickledTensor)}
    if not tensors:
        raise ModelFileError(
            f"{where}: is no state dict, a mapping from names to tensors; save the model with save_pretrained."
        )
    odd = next((name for name in tensors if len(name) > MAX_NAME or not name.isprintable()), None)
    if odd is not None:
        raise ModelFileError(f"{where}: tensor {odd[:40]!a} has no name of a parameter; convert the checkpoint.")
    return tensors


class _Machine:
    """The stack machine."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], None]] = {
            "MARK": lambda _: self._stack.append(_MARK),
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True),
            "NEWFALSE": lambda _: self._stack.append(False),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "TUPLE": lambda _: self._stack.append(tuple(self._arguments())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "PUT": self._put,
            "GET": lambda number: self._stack.append(self._memo[number]),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "GLOBAL": lambda words: self._name(*words.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._name(*self._take(2)),
            "BINPERSID": lambda _: self._stack.append(self._storage(self._stack.pop())),
            "REDUCE": lambda _: self._stack.append(self._call(*self._take(2))),
            "BUILD": self._ignore,
            "SETITEM": lambda _: self._set(self._take(2)),
            "SETITEMS": lambda _: self._set(self._arguments()),
            "APPEND": lambda _: self._extend(self._take(1)),
            "APPENDS": lambda _: self._extend(self._arguments()),
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
        }
        for opcode in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            self._steps[opcode] = self._stack.append
        for opcode in ("BINPUT", "LONG_BINPUT"):
            self._steps[opcode] = self._put
        for opcode in ("BINGET", "LONG_BINGET"):
            self._steps[opcode] = self._steps["GET"]

    def run(self, data: bytes) -> Any:
        """Follow all instructions; return what the last leaves."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return self._stack.pop()
            if count > MAX_INSTRUCTIONS:
                raise ModelFileError(
                    f"{self._where}: its pickle has more than {MAX_INSTRUCTIONS:,} instructions; do not trust it."
                )
            step = self._steps.get(opcode.name)
            if step is None:
                raise ModelFileError(
                    f"{self._where}: its pickle uses {opcode.name}, which no plain checkpoint does; do not trust it, or "
                    "convert it to safetensors."
                )
            step(argument)
        raise _DamagedError("it does not end")

    def _take(self, count: int) -> list[Any]:
        taken = self._stack[-count:]
        if len(taken) < count or _MARK in taken:
            raise _DamagedError("its stack is empty")
        del self._stack[-count:]
        return taken

    def _arguments(self) -> list[Any]:
        """Everything above the last mark."""
        taken: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            taken.append(value)
        return taken[::-1]

    def _ignore(self, _: Any) -> None:
        """Leave out the state that a dict is given (``_metadata`` of a module's state)."""
        self._take(1)

    def _tuple(self, count: int) -> None:
        self._stack.append(tuple(self._take(count)))

    def _put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise _DamagedError("it fills what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise _DamagedError("a key is no text")
            target[key] = value

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise _DamagedError("it fills what is no list")
        self._stack[-1].extend(values)

    def _name(self, module: str, name: str) -> None:
        found = _Name(module, name)
        if found not in _CALLED and found not in _TYPES and name not in _WORDS.get(module, ()):
            raise ModelFileError(
                f"{self._where}: its pickle calls for {str(found)!r}, which no plain checkpoint does; do not load it "
                "unless you trust its origin, and then convert it to safetensors."
            )
        self._stack.append(found)

    @staticmethod
    def _storage(identity: Any) -> Storage:
        kind, storage, key, _, elements = identity
        if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str) or not _is_natural(elements):
            raise _DamagedError("it describes no storage")
        return Storage(key, _STORAGES[storage.name], elements)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise _DamagedError("it calls what is no name")
        if function == _ORDERED_DICT:
            return {}
        if function == _SIZE:
            return tuple(arguments[0][:MAX_DIMENSIONS])
        if function in _PARAMETERS:
            return arguments[0]
        if function == _TYPED_CALL:
            # Written for subclasses of tensors; the arguments of the inner call are those of a plain one.
            return self._call(arguments[0], arguments[2]) if arguments[0] != _TYPED_CALL else None
        if function == _REBUILD:
            return _tensor(arguments, arguments[0].dtype)
        if function == _REBUILD_WITH_DTYPE:
            return _tensor(arguments, _DTYPES[arguments[6].name])
        raise _DamagedError(f"it calls {function}")


def _tensor(arguments: tuple[Any, ...], dtype: str) -> PickledTensor:
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage) or not _is_natural(offset):
        raise _DamagedError("a tensor has no storage")
    if not len(shape) == len(strides) <= MAX_DIMENSIONS or not all(map(_is_natural, (*shape, *strides))):
        raise _DamagedError("a tensor has no valid shape")
    return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < _NATURALS_END


def last_element(tensor: PickledTensor) -> int:
    """Elements of the storage up to the last one that the tensor shows; 0 for a tensor without elements."""
    if math.prod(tensor.shape) == 0:
        return 0
    return tensor.offset + 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
