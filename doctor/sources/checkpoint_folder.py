"""Read a checkpoint from a folder: config.json and what describes its tensors, never a weight."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelFileError, ModelNotFoundError
from .checkpoint import Checkpoint, StoredTensor
from .image_files import processor_settings
from .regular_file import instead, read_text, unreadable
from .safetensors_headers import read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
ADAPTER = "adapter_config.json"
"""Of PEFT."""
TORCH = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a character beyond the first 65,536, or of a pair of halves, as JSON escapes it."""

_AGAIN = "download it again"
_OTHER_WEIGHTS = frozenset({".gguf", ".pt", ".pth", ".ckpt", ".bin", ".h5", ".msgpack", ".onnx", ".npz"})
"""Endings of weights in formats of other libraries."""

MAX_JSON_BYTES = 100_000_000
"""The largest index in use (hundreds of thousands of experts) has about 20 MB."""

MAX_VALUES = 2_000_000
"""Of a JSON file; such an index has one a tensor. Counted before it is decoded, it bounds the memory of a hostile one."""


def read_folder(folder: Path) -> Checkpoint:
    """Read config and headers.

    Args:
        folder: Holds config.json and model.safetensors, or shards with model.safetensors.index.json; or, as older ones do,
            pytorch_model.bin or shards of it, whose pickles are read without running them.

    Raises:
        ModelNotFoundError: There is no such folder.
        ModelFileError: A file is missing, damaged, unreadable or contradicts another.
    """
    try:
        checkpoint = _read(folder)
        return _with_code(checkpoint, folder) if checkpoint.config.get("auto_map") else checkpoint
    except OSError as error:
        # Where a folder on the way may not be entered, or a name is too long, even looking for a file raises.
        raise ModelFileError(f"{folder}: {unreadable(error, again=_AGAIN)}.") from error


def _read(folder: Path) -> Checkpoint:
    if not folder.exists():
        raise ModelNotFoundError(f"{folder}: there is no such folder; correct the path, or give a hub id (org/name).")
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: is a file; name the folder that holds config.json and the safetensors files.")
    if not (folder / CONFIG).is_file():
        if os.path.lexists(folder / CONFIG):
            raise ModelFileError(f"{folder / CONFIG}: not a regular file, nor a link to one; {_AGAIN}.")
        raise ModelFileError(f"{folder}: {_without_config(folder)}.")
    config = parse_object(_read_text(folder / CONFIG), where=CONFIG)
    shards, notes = _shards(folder)
    if not shards:
        return _read_torch_files(folder, config)
    tensors = join_shards({shard: read_header(folder / shard) for shard in shards})
    images, prompts = _processors(folder, notes)
    return Checkpoint(config, tensors, tuple(shards), images, tuple(notes), prompts=prompts)


def _without_config(folder: Path) -> str:
    """What a folder is that has no config.json, and what to do."""
    text = read_text(folder / ADAPTER, MAX_JSON_BYTES)
    if text is None:
        return "has no config.json; name the folder of a checkpoint"
    try:
        base = parse_object(text.encode(), where=ADAPTER).get("base_model_name_or_path")
    except ModelFileError:
        base = None
    named = f" of {base[:120]}" if isinstance(base, str) and base.strip() and base.isprintable() else ""
    return f"holds an adapter{named} and no model; name the model that it belongs to"


def _with_code(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with what its own code does, where that is beside it."""
    # Late: few checkpoints bring code.
    from .own_code import broken_calls, moved_joins, tells_head

    calls = broken_calls(folder)
    if calls is None:
        return checkpoint
    return checkpoint._replace(broken_calls=calls, moved_joins=moved_joins(folder), tells_head=tells_head(folder))


def _read_torch_files(folder: Path, config: dict[str, Any]) -> Checkpoint:
    # Late: the tools for zip and pickle cost 10 ms.
    from .torch_archive import read_torch_file

    shards = [TORCH] if (folder / TORCH).exists() else _listed(folder, TORCH_INDEX)
    files = {shard: read_torch_file(folder / shard) for shard in shards}
    tensors = join_shards({shard: file.tensors for shard, file in files.items()})
    shared = {name: first for file in files.values() for name, first in file.shared.items()}
    notes: list[str] = []
    images, prompts = _processors(folder, notes)
    return Checkpoint(config, tensors, tuple(shards), images, tuple(notes), shared=shared, prompts=prompts)


def parse_object(text: bytes, *, where: str) -> dict[str, Any]:
    """Read a JSON object. Python's own parser, because config.json files hold ``Infinity`` and ``NaN`` as it writes them.

    Raises:
        ModelFileError: Not JSON, or not an object.
    """
    if text.count(b",") > MAX_VALUES:
        raise ModelFileError(f"{where}: more than {MAX_VALUES:,} values are no {where}; download it again.")
    try:
        value = json.loads(text.decode("utf-8-sig"))
        if _SURROGATE.search(text):
            # Without its other half it cannot be written into any report.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        other = instead(text) or f"is not JSON ({_flaw(error)}); {_AGAIN}"
        raise ModelFileError(f"{where}: {other}.") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{where}: is not a JSON object; download it again.")
    return value


def _flaw(error: ValueError | RecursionError) -> str:
    """What Python's parser says, where it speaks of the text and not of Python's own limits."""
    if isinstance(error, (json.JSONDecodeError, UnicodeError)):
        return str(error)[:200]
    return "it is nested too deeply" if isinstance(error, RecursionError) else "a number in it is too long"


def shards_of_index(text: bytes, *, where: str = INDEX) -> list[str]:
    """Names of the shards that an index lists, sorted.

    Args:
        text: The index.
        where: Its name, for the message of the error.

    Raises:
        ModelFileError: No valid index, or a name that leads out of the folder.
    """
    weight_map = parse_object(text, where=where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFileError(f"{where}: has no weight_map from tensors to files; download it again.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not _stays_inside(shard):
            raise ModelFileError(
                f"{where}: lists the file {shard[:120]!r}, which is not a name inside the folder; do not trust it."
            )
    return shards


def _stays_inside(name: str) -> bool:
    parts = name.split("/")
    return (
        name.isprintable() and "\\" not in name and ":" not in name and not any(part in ("", ".", "..") for part in parts)
    )


def join_shards(headers: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """All tensors of all shards.

    Raises:
        ModelFileError: Two shards hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    origin: dict[str, str] = {}
    for shard, header in headers.items():
        for name, tensor in header.items():
            if name in tensors:
                raise ModelFileError(
                    f"{shard}: holds tensor {name[:120]!r}, which {origin[name]} holds too; download both again."
                )
            tensors[name] = tensor
            origin[name] = shard
    return tensors


def _shards(folder: Path) -> tuple[list[str], list[str]]:
    """The safetensors files of the checkpoint, chosen as transformers does, and notes; none where it takes a torch file."""
    if (folder / SINGLE).exists():
        return [SINGLE], []
    if (folder / INDEX).exists():
        return _listed(folder, INDEX), []
    if (folder / TORCH).exists() or (folder / TORCH_INDEX).exists():
        return [], []
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(loose) == 1 and "-of-" not in loose[0]:
        return loose, [f"{loose[0]} is read as the checkpoint; transformers looks for {SINGLE}."]
    if loose:
        raise ModelFileError(f"{folder}: has {len(loose)} safetensors files and no {INDEX}; complete the download.")
    other = next((path.name for path in sorted(folder.iterdir()) if path.suffix in _OTHER_WEIGHTS), None)
    if other is not None:
        raise ModelFileError(
            f"{folder}: has {other[:120]!r} but no safetensors file, nor {TORCH}; name a checkpoint of transformers."
        )
    raise ModelFileError(f"{folder}: has config.json but no safetensors file; complete the download.")


def _listed(folder: Path, index: str) -> list[str]:
    """The shards of an index, all of them there."""
    shards = shards_of_index(_read_text(folder / index), where=index)
    for shard in shards:
        if not (folder / shard).exists():
            raise ModelFileError(f"{folder / shard}: is missing, though {index} lists it; complete the download.")
    return shards


def _processors(folder: Path, notes: list[str]) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Settings of the processors. A plan does without them, so a broken file is as good as none; a note then says so."""
    found: list[dict[str, Any] | None] = []
    for name in PROCESSORS:
        settings = None
        if os.path.lexists(folder / name):
            try:
                settings = parse_object(_read_text(folder / name), where=name)
            except ModelFileError as error:
                reason = str(error).removeprefix(f"{folder / name}: ").removeprefix(f"{name}: ")
                notes.append(f"{name} is left out, so the sizes of images are assumed: {reason}")
        found.append(settings)
    return processor_settings(*found)


def _read_text(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ModelFileError(f"{path}: not a regular file; {_AGAIN}.")
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelFileError(f"{path}: {unreadable(error, again=_AGAIN)}.") from error
    if len(text) > MAX_JSON_BYTES:
        raise ModelFileError(f"{path}: more than {MAX_JSON_BYTES:,} bytes are no {path.name}; download it again.")
    return text
