"""What the code beside a checkpoint relies on and some releases of transformers lack. Its text is searched, never run."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from ..data.joins import JOINS
from ..data.removed_calls import BREAKS
from .regular_file import names_in, read_text

_CODE_BYTES = 512 * 1024
"""More than the code of any model: modeling_chatglm.py has 50 kB."""
_ALL_CODE_BYTES = 4 * _CODE_BYTES
_OWN_CLASS = re.compile(r"^class \w{1,200}\([^)]{0,500}PreTrainedModel\b", re.MULTILINE)
"""A class of which nothing but the code itself calls ``post_init``; heirs of whole models are seen to by those. Bounded:
the code is somebody else's, and no search of it may hold up the verdict."""


def broken_calls(folder: Path) -> tuple[str, ...] | None:
    """Names of :data:`BREAKS` that concern the code of a folder; ``None`` where there is no code."""
    texts = _texts(folder)
    if not any(name.startswith("modeling_") for name in texts):
        return None
    return tuple(sorted(name for name, found in BREAKS.items() if _concerns(name, texts, is_missing=found.is_missing)))


def moved_joins(folder: Path) -> tuple[str, ...]:
    """What the code of a folder moves itself before it is joined: ``Join.moves`` of :data:`JOINS`."""
    texts = _texts(folder).values()
    patched = {join.moves: join.patch for joins in JOINS.values() for join in joins if join.is_patched}
    return tuple(moves for moves, patch in patched.items() if any(re.search(patch, text) for text in texts))


def tells_head(folder: Path) -> bool:
    """Whether the code of a folder names its head to transformers, which then keeps it from bitsandbytes."""
    return any(re.search(r"def (?:get_output_embeddings|lm_head)\(", text) for text in _texts(folder).values())


def gone(transformers: Path) -> frozenset[str]:
    """Names of :data:`BREAKS` that the installed transformers breaks; read from its own files."""
    found = set()
    for name, entry in BREAKS.items():
        text = read_text(transformers / entry.file, _CODE_BYTES)
        if text is not None and (entry.mark in text) == entry.is_new:
            found.add(name)
    return frozenset(found)


def _texts(folder: Path) -> dict[str, str]:
    """Text of the Python files of a folder, those of models first, up to a bound for all of them."""
    texts: dict[str, str] = {}
    left = _ALL_CODE_BYTES
    for name in sorted(names_in(folder), key=lambda name: (not name.startswith("modeling_"), name)):
        if name.endswith(".py"):
            texts[name] = read_text(folder / name, min(left, _CODE_BYTES)) or ""
            left -= len(texts[name])
    return texts


def _concerns(name: str, texts: dict[str, str], *, is_missing: bool) -> bool:
    pattern = _pattern(name)
    if not is_missing:
        unless = BREAKS[name].unless
        cared = bool(unless) and any(re.search(unless, text) for text in texts.values())
        return not cared and any(pattern.search(text) for text in texts.values())
    models = [text for file, text in texts.items() if file.startswith("modeling_")]
    return any(_OWN_CLASS.search(text) for text in models) and not any(pattern.search(text) for text in models)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(BREAKS[name].code)


__all__ = ["broken_calls", "gone", "moved_joins", "tells_head"]
