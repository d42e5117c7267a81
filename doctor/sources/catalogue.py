"""Models that are described without their files: the catalogue in ``doctor/data/models``.

An entry holds a config and the tensors of the real checkpoint, repeated names folded into ranges such as
``model.layers.{0..31}.mlp.up_proj.weight``; expanded, it takes the same path as headers that were read.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from .checkpoint import DTYPE_BITS, Checkpoint, StoredTensor
from .data_files import read_all_data

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Published(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model's authors or the hub say about its size."""

    source: str
    parameters: int | None = None
    total_size: int | None = None
    """Bytes: ``metadata.total_size`` of model.safetensors.index.json."""


class CatalogueEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the catalogue."""

    name: str
    """Hub id."""
    aliases: tuple[str, ...] = ()
    config: dict[str, Any]
    """The fields of config.json that matter here."""
    dtype: str
    """Stored type, safetensors' word."""
    tensors: dict[str, list[int]]
    """Pattern of names to shape."""
    published: Published
    source: str
    """Where names, shapes and config come from, and what was verified how."""

    def checkpoint(self) -> Checkpoint:
        """Expand the patterns."""
        tensors: dict[str, StoredTensor] = {}
        for pattern, shape in self.tensors.items():
            tensor = StoredTensor(self.dtype, tuple(shape), math.prod(shape) * DTYPE_BITS[self.dtype] // 8)
            tensors.update((name, tensor) for name in expand(pattern))
        return Checkpoint(self.config, tensors)


def expand(pattern: str) -> Iterator[str]:
    """All names of a pattern: ``a.{0..2}`` is ``a.0``, ``a.1``, ``a.2``."""
    pieces = _RANGE.split(pattern)
    ranges = [range(int(first), int(last) + 1) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    for numbers in itertools.product(*ranges):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(pieces[0::3], map(str, numbers), fillvalue="")))


@functools.cache
def catalogue() -> Mapping[str, CatalogueEntry]:
    """All entries by hub id, in alphabetical order."""
    entries = (msgspec.json.decode(text, type=CatalogueEntry) for text in read_all_data("models", ".json"))
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name.lower())}


def find_entry(name: str) -> CatalogueEntry | None:
    """The entry of that hub id or alias; case does not matter."""
    wanted = name.lower()
    return next(
        (entry for entry in catalogue().values() if wanted in {entry.name.lower(), *map(str.lower, entry.aliases)}), None
    )
