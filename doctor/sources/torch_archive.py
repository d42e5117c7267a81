"""Read names, types and sizes of the tensors in a file of ``torch.save``, never a weight, and never running its pickle.

Since torch 1.6 such a file is a zip archive without compression: ``NAME/data.pkl`` describes the tensors, ``NAME/data/0``
and so on are the storages (``torch/serialization.py``, ``caffe2/serialize/inline_container.cc``).
"""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import ModelFileError
from .checkpoint import DTYPE_BITS, StoredTensor
from .regular_file import HEAD_BYTES, instead, open_regular
from .tensor_pickle import PickledTensor, last_element, tensors_of_pickle

MAX_PICKLE_BYTES = 32_000_000
"""Real ones have about 250 bytes a tensor."""

MAX_DIRECTORY_BYTES = 16_000_000
"""Of the archive's list of contents: about 90 bytes a tensor."""

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""How files begin that torch wrote before 1.6, or writes when asked to (``MAGIC_NUMBER`` as a pickle)."""

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
"""The zip format's end of central directory, and its large form (APPNOTE.TXT, 4.3.14 and 4.3.16)."""
_AGAIN = "download it again"


class TorchFile(NamedTuple):
    """What a file describes."""

    tensors: dict[str, StoredTensor]
    shared: dict[str, str]
    """Name of a tensor that is another one under a second name, to the first."""


def read_torch_file(path: Path) -> TorchFile:
    """Read the description of the tensors.

    Raises:
        ModelFileError: No file of ``torch.save``, damaged, in the old format, or one whose pickle names anything else.
    """
    where = path.name
    try:
        with open_regular(path, again=_AGAIN) as (file, file_bytes):
            _check_kind(file, file_bytes, where)
            return _read(file, file_bytes, where)
    except (zipfile.BadZipFile, struct.error, ValueError, RuntimeError, EOFError, LookupError, OverflowError) as error:
        raise ModelFileError(f"{where}: its archive is damaged ({str(error)[:120]}); {_AGAIN}.") from error


def _check_kind(file: BinaryIO, file_bytes: int, where: str) -> None:
    """Refuse what is no archive, or has a list of contents that no checkpoint has."""
    begin = file.read(HEAD_BYTES)
    if begin.startswith(_LEGACY):
        raise ModelFileError(
            f"{where}: is in the format of torch before 1.6, which is not read; load it with torch where you trust its "
            "origin, and save it with save_pretrained."
        )
    if not begin.startswith(b"PK\3\4"):
        raise ModelFileError(f"{where}: {instead(begin) or f'is no file of torch.save; {_AGAIN}'}.")
    file.seek(max(0, file_bytes - 65_536 - _END.size))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise ModelFileError(f"{where}: truncated, the list of its contents is not there; {_AGAIN}.")
    directory_bytes = _END.unpack_from(tail, at)[5]
    large = tail.rfind(b"PK\6\6", 0, at)
    if large >= 0 and at - large >= _END_64.size:
        directory_bytes = max(_END_64.unpack_from(tail, large)[8], directory_bytes if directory_bytes < 2**32 - 1 else 0)
    if directory_bytes > min(MAX_DIRECTORY_BYTES, file_bytes):
        raise ModelFileError(f"{where}: the list of its contents would have {directory_bytes:,} bytes; {_AGAIN}.")


def _read(file: BinaryIO, file_bytes: int, where: str) -> TorchFile:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ModelFileError(f"{where}: its archive has two entries of one name; do not trust it.")
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ModelFileError(f"{where}: is an archive without data.pkl, so no file of torch.save; {_AGAIN}.")
        program = entries[pickles[0]]
        if program.file_size > MAX_PICKLE_BYTES or program.compress_type != zipfile.ZIP_STORED:
            raise ModelFileError(
                f"{where}: its data.pkl is compressed or has more than {MAX_PICKLE_BYTES:,} bytes; do not trust it."
            )
        found = tensors_of_pickle(archive.read(program), where=where)
    root = pickles[0].partition("/")[0]
    sizes = {
        name.removeprefix(f"{root}/data/"): entry.file_size
        for name, entry in entries.items()
        if entry.compress_type == zipfile.ZIP_STORED and entry.header_offset + entry.file_size <= file_bytes
    }
    return _described(found, sizes, where)


def _described(found: dict[str, PickledTensor], sizes: dict[str, int], where: str) -> TorchFile:
    tensors: dict[str, StoredTensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in found.items():
        storage = tensor.storage
        label = f"{where}: tensor {name[:120]!r}"
        held = sizes.get(storage.key)
        if held is None or held * 8 != storage.elements * DTYPE_BITS[storage.dtype]:
            raise ModelFileError(f"{label} has no storage of its size in the archive; {_AGAIN}.")
        bits = DTYPE_BITS[tensor.dtype]
        if last_element(tensor) * bits > held * 8:
            raise ModelFileError(f"{label} does not lie inside its storage; {_AGAIN}.")
        stored = StoredTensor(tensor.dtype, tensor.shape, math.prod(tensor.shape) * bits // 8)
        # A stride of 0 repeats elements: more of them than the storage has would be no checkpoint's.
        if stored.stored_bytes > held:
            raise ModelFileError(f"{label} shows more than its storage holds; save the checkpoint again.")
        tensors[name] = stored
        if stored.elements:
            same = first.setdefault((storage.key, tensor.offset, tensor.shape, tensor.strides), name)
            if same != name:
                shared[name] = same
    return TorchFile(tensors, shared)
