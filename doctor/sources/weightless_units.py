"""Modules for which a checkpoint stores nothing, and which a ``device_map`` must name all the same. Pure."""

from __future__ import annotations

from typing import NamedTuple

from ..data.config_defaults import SHAPES
from ..data.families import NO_ROTARY
from ..model import Role, Unit
from .model_units import Cut


class Completed(NamedTuple):
    """All units of a model, and which of them share tensors."""

    units: tuple[Unit, ...]
    tied: tuple[tuple[str, ...], ...]


def complete_units(
    cut: Cut, *, body_type: str, ties_embeddings: bool | None, rotary: tuple[str, ...] | None = None
) -> Completed:
    """Add the tied head and the position buffers.

    Args:
        cut: What the checkpoint stores.
        body_type: ``model_type`` of its text body.
        ties_embeddings: ``tie_word_embeddings``, ``None`` when the config does not say.
        rotary: Modules with position buffers, ``None`` where the family says nothing.
    """
    units = list(cut.units)
    embedding = next((unit.key for unit in units if unit.role == "embedding"), None)
    head = next((unit.key for unit in units if unit.role == "head"), None)
    tied: tuple[tuple[str, ...], ...] = ()
    if embedding is not None and head is None:
        # No stored head is a tied one, whatever the config says: transformers would make up its weights otherwise.
        head = _free(_head_beside(cut.body), units)
        if head is not None:
            units.append(_weightless(head, "head"))
            tied = ((embedding, head),)
    elif embedding is not None and head is not None and ties_embeddings:
        tied = ((embedding, head),)
    for module in _rotary_modules(cut.body, body_type) if rotary is None else rotary:
        key = _free(module, units)
        if key is not None:
            first_layer = next((at for at, unit in enumerate(units) if unit.role in ("layer", "norm", "head")), len(units))
            units.insert(first_layer, _weightless(key, "other"))
    return Completed(tuple(units), tied)


def _weightless(key: str, role: Role) -> Unit:
    return Unit(key=key, role=role, parameters={}, stored_bytes=0)


def _head_beside(body: str) -> str | None:
    """Where ``lm_head`` stands: beside ``model`` (``llm.model.layers`` has ``llm.lm_head``) or GPT-2's ``transformer``."""
    parts = body.split(".")
    beside = next((at for at, part in enumerate(parts) if part in ("model", "transformer")), None)
    return None if beside is None else ".".join([*parts[:beside], "lm_head"])


def _rotary_modules(body: str, body_type: str) -> tuple[str, ...]:
    """Where the position buffers stand: beside the layers' list in every text body of transformers that has some."""
    return (f"{body}.rotary_emb",) if body and body_type in SHAPES and body_type not in NO_ROTARY else ()


def _free(key: str | None, units: list[Unit]) -> str | None:
    """The key, unless a stored unit is it, holds it or lies in it."""
    if key is None:
        return None
    clashes = any(f"{key}.".startswith(f"{unit.key}.") or unit.key.startswith(f"{key}.") for unit in units)
    return None if clashes else key
