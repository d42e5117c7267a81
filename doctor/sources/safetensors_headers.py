"""Read the headers of safetensors files: names, types, shapes and sizes of all tensors without one byte of weights.

Format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes little-endian length, that many bytes of JSON, then the
data. ``data_offsets`` count from the end of the header; the tensors cover the data without holes or overlaps.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec

from ..errors import ModelFileError
from .checkpoint import DTYPE_BITS, StoredTensor
from .regular_file import HEAD_BYTES, instead, open_regular

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library reads (``MAX_HEADER_SIZE`` in ``safetensors/src/tensor.rs``)."""

PREFIX_BYTES = 8
"""The length field in front of the header."""

MAX_DIMENSIONS = 64
"""torch's own limit; it also bounds the time that a hostile shape can cost."""

MAX_TENSORS = 250_000
"""Of one file; the largest mixtures of experts have about 210,000 in all their files. Bounds the time of a hostile one."""

MAX_VALUES = 16 * MAX_TENSORS
"""Of the header's JSON; real ones have about 7 a tensor. Counted before it is decoded, it bounds the memory of a hostile
one to a few hundred MB."""

_NATURALS_END = 2**63
"""No file is as long, and no tensor has as many elements."""

MAX_NAME = 1024
"""Letters of a tensor's name; real ones have about 120. Bounds the time that hostile names can cost."""

_AGAIN = "download it again"

_Natural = Annotated[int, msgspec.Meta(ge=0, lt=_NATURALS_END - 1)]


class _Entry(msgspec.Struct):
    """One tensor. ``__metadata__``, whose values are texts, fits as well, since every field may be missing."""

    dtype: str = ""
    shape: Annotated[tuple[_Natural, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)] | None = None
    data_offsets: tuple[_Natural, _Natural] | None = None


_DECODER = msgspec.json.Decoder(dict[str, _Entry])


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one file.

    Raises:
        ModelFileError: No regular file, not readable, truncated, or not a valid safetensors header.
    """
    where = path.name
    with open_regular(path, again=_AGAIN) as (file, file_bytes):
        return _read_open(file, file_bytes, where)


def _read_open(file: BinaryIO, file_bytes: int, where: str) -> dict[str, StoredTensor]:
    length = header_length(file.read(HEAD_BYTES), file_bytes, where=where)
    file.seek(PREFIX_BYTES)
    return parse_header(file.read(length), file_bytes, length=length, where=where)


def header_length(prefix: bytes, file_bytes: int | None, *, where: str) -> int:
    """Read the length field and judge it.

    Args:
        prefix: The first 8 bytes of the file, or more.
        file_bytes: Size of the whole file, ``None`` when unknown.
        where: File name, for the message of the error.

    Returns:
        Bytes of the JSON header.

    Raises:
        ModelFileError: Fewer than 8 bytes, a length no header has, or a file shorter than its header.
    """
    if len(prefix) < PREFIX_BYTES:
        raise ModelFileError(f"{where}: {len(prefix)} bytes are too few for a safetensors file; {_AGAIN}.")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        other = instead(prefix)
        if other is not None:
            raise ModelFileError(f"{where}: {other}.")
        raise ModelFileError(f"{where}: not a safetensors file, its header would have {length:,} bytes; {_AGAIN}.")
    if file_bytes is not None and PREFIX_BYTES + length > file_bytes:
        raise ModelFileError(
            f"{where}: truncated, its header alone ends at byte {PREFIX_BYTES + length:,} of {file_bytes:,}; {_AGAIN}."
        )
    return length


def parse_header(header: bytes, file_bytes: int | None, *, length: int, where: str) -> dict[str, StoredTensor]:
    """Read a header's JSON, and hold it against the size of the file.

    Args:
        header: The JSON, after the length field.
        file_bytes: Size of the whole file, ``None`` when unknown.
        length: Bytes the JSON should have.
        where: File name, for the message of the error.

    Returns:
        Tensors by name, in the order of the header.

    Raises:
        ModelFileError: Damaged in any way that the safetensors library would refuse, or truncated.
    """
    if len(header) < length:
        raise ModelFileError(f"{where}: truncated inside its header; {_AGAIN}.")
    if header.count(b",") > MAX_VALUES:
        raise ModelFileError(f"{where}: its header has more than {MAX_VALUES:,} values, as no checkpoint; {_AGAIN}.")
    quick = _quick(header)
    if quick is not None:
        tensors, spans = quick
    else:
        tensors, spans = _slow(header, where)
    data_bytes = _check_cover(spans, where)
    expected = PREFIX_BYTES + length + data_bytes
    if file_bytes is not None and file_bytes < expected:
        raise ModelFileError(f"{where}: truncated, {file_bytes:,} of {expected:,} bytes are there; {_AGAIN}.")
    if file_bytes is not None and file_bytes > expected:
        raise ModelFileError(f"{where}: {file_bytes - expected:,} bytes follow the last tensor; {_AGAIN}.")
    return tensors


def _quick(header: bytes) -> tuple[dict[str, StoredTensor], list[tuple[int, int, str]]] | None:
    """Tensors and spans of a header without faults; ``None`` when it has one, which the slow way names."""
    try:
        entries = _DECODER.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError):
        return None
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS or max(map(len, entries), default=0) > MAX_NAME:
        return None
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        bits = DTYPE_BITS.get(entry.dtype)
        if bits is None or entry.shape is None or entry.data_offsets is None:
            return None
        begin, end = entry.data_offsets
        if prod(entry.shape) * bits != 8 * (end - begin):
            return None
        tensors[name] = StoredTensor(entry.dtype, entry.shape, end - begin)
        spans.append((begin, end, name))
    return tensors, spans


def _slow(header: bytes, where: str) -> tuple[dict[str, StoredTensor], list[tuple[int, int, str]]]:
    """The same, entry by entry.

    Raises:
        ModelFileError: What is wrong with the header.
    """
    try:
        entries = msgspec.json.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ModelFileError(f"{where}: its header is not JSON ({error}); {_AGAIN}.") from error
    if not isinstance(entries, dict):
        raise ModelFileError(f"{where}: its header is not a JSON object; {_AGAIN}.")
    if len(entries) > MAX_TENSORS:
        raise ModelFileError(f"{where}: {len(entries):,} tensors are no checkpoint (at most {MAX_TENSORS:,}); {_AGAIN}.")
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        begin, tensor = _tensor(name, entry, where)
        spans.append((begin, begin + tensor.stored_bytes, name))
        tensors[name] = tensor
    return tensors, spans


def _tensor(name: str, entry: Any, where: str) -> tuple[int, StoredTensor]:
    """Check one entry; return where its data begins, and the tensor."""
    label = f"{where}: tensor {name[:MAX_NAME]!r}"
    if len(name) > MAX_NAME:
        raise ModelFileError(f"{label} and so on: no parameter has a name of {len(name):,} letters; {_AGAIN}.")
    if not isinstance(entry, dict):
        raise ModelFileError(f"{label} is not described by a JSON object; {_AGAIN}.")
    dtype = entry.get("dtype")
    shape, offsets = _naturals(entry.get("shape")), _naturals(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelFileError(
            f"{label} has the unknown dtype {str(dtype)[:40]!r}; update vlm-doctor or convert the checkpoint."
        )
    if shape is None or len(shape) > MAX_DIMENSIONS:
        raise ModelFileError(f"{label} has no valid shape; {_AGAIN}.")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFileError(f"{label} has no valid data_offsets; {_AGAIN}.")
    tensor = StoredTensor(dtype, shape, offsets[1] - offsets[0])
    if tensor.elements * DTYPE_BITS[dtype] != tensor.stored_bytes * 8:
        raise ModelFileError(
            f"{label} has {tensor.stored_bytes:,} bytes, not what {dtype} of shape {list(shape[:8])} takes; {_AGAIN}."
        )
    return offsets[0], tensor


def _naturals(value: Any) -> tuple[int, ...] | None:
    """A list of integers from 0 to 2**63 as a tuple, ``None`` for anything else; JSON's ``true`` is no integer."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < _NATURALS_END for item in value):
        return None
    return tuple(value)


def _check_cover(spans: list[tuple[int, int, str]], where: str) -> int:
    """Refuse holes and overlaps; return the bytes of all data."""
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            what = "overlaps another tensor" if begin < end else "leaves a hole before it"
            raise ModelFileError(f"{where}: tensor {name!r} {what}; {_AGAIN}.")
        end = stop
    return end
