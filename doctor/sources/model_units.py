"""Cut a checkpoint into the units that a ``device_map`` can place. Pure.

The parts are recognized by the dotted names alone, so a family nobody has listed gets a map as well. Names are matched by
whole components: ``layers.1`` is not a prefix of ``layers.10``. No key is ever a parent of another key, since the loaders
disagree about which of the two wins (transformers 5.23 matches keys as unescaped prefixes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..data.families import FamilyRules
from ..model import Role, Unit
from .checkpoint import StoredTensor
from .tower_parts import tower_parts
from .unit_contents import Named, unit_of

_VISION = ("vis", "vit", "vpm", "image_tower", "image_encoder", "image_embed", "img_", "video_tower", "vqmodel", "sam_")
"""Beginnings of components that hold a vision tower: ``visual``, ``vision_tower``, ``vpm`` (MiniCPM-V) and so on."""

_PROJECTOR = ("proj", "connector", "resampler", "aligner", "merger", "qformer", "query_tokens", "image_newline", "view_sep")
"""Parts of names of components that lie between tower and text."""

_PROJECTOR_EXACT = frozenset({"mlp1", "mlp_AR", "embed_vision", "perceiver"})
"""``mlp1``: InternVL-Chat; ``mlp_AR``: PaddleOCR-VL; ``embed_vision``: Gemma 3n."""

_AUDIO = ("audio", "sound", "apm")
"""Beginnings of components that hold an audio tower (``apm``: MiniCPM-o)."""

_EMBEDDING = frozenset({"embed_tokens", "word_embeddings", "tok_embeddings", "wte", "embed_in", "embed_tokens_per_layer"})

_HEAD = frozenset({"lm_head", "output_layer", "embed_out", "unembed", "output"})
"""``output_layer``: ChatGLM; ``output``: InternLM2."""

_LAYER_LISTS = frozenset({"layers", "layer", "blocks", "block", "h"})
"""Names of the lists of repeated text layers."""

_ORDER: dict[Role, int] = {"vision": 0, "projector": 1, "other": 2, "embedding": 3, "layer": 4, "norm": 5, "head": 6}
"""Execution order. ``other`` comes early: what is not recognized (audio towers, position buffers) feeds the layers."""


_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,6})(?=\.|\Z)")
"""A component that numbers a list's items (up to six digits, so that it is one)."""


class _Place(NamedTuple):
    """Where one tensor belongs."""

    key: str
    role: Role
    layer: int | None = None


class Cut(NamedTuple):
    """The units of a checkpoint."""

    units: tuple[Unit, ...]
    """In execution order; their stored bytes add up to the checkpoint's exactly."""
    body: str
    """Module that holds the text layers' list, such as ``model.language_model``; empty when there is none."""

    def first(self, role: Role) -> str:
        """Key of the first unit of that role, or nothing."""
        return next((unit.key for unit in self.units if unit.role == role), "")


def cut_into_units(tensors: Mapping[str, StoredTensor], rules: FamilyRules = FamilyRules()) -> Cut:  # noqa: B008
    """Cut a checkpoint into units.

    Args:
        tensors: By parameter name in the class.
        rules: Of the family.
    """
    stack = rules.layers or _text_stack(tensors, rules)
    body = stack.rpartition(".")[0]
    lists: dict[str, _Place | None] = {}
    places = {name: _recognize(name, stack, body, rules, lists) for name in tensors}
    taken = _ancestors(place.key for place in places.values() if place)
    complete = {name: place or _Place(_free_prefix(name, taken), "other") for name, place in places.items()}
    merged = _merge_nested(complete)
    members: dict[_Place, list[Named]] = {}
    for name, tensor in tensors.items():
        members.setdefault(merged[name], []).append((name, tensor))
    units = [
        unit_of(place.key, place.role, contents, rules, layer=place.layer, parts=_parts(place, contents, rules))
        for place, contents in members.items()
    ]
    units.sort(key=lambda unit: (_ORDER[unit.role], -1 if unit.layer is None else unit.layer))
    return Cut(tuple(units), body)


def _parts(place: _Place, contents: list[Named], rules: FamilyRules) -> tuple[Unit, ...]:
    return tower_parts(place.key, contents, rules) if place.role == "vision" else ()


def _text_stack(tensors: Mapping[str, StoredTensor], rules: FamilyRules) -> str:
    """Find the list of text layers: of the numbered lists outside towers the one with the most bytes, usual names first."""
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        number = _NUMBER.search(name)
        if number and number.start():
            stack = name[: number.start()]
            sizes[stack] = sizes.get(stack, 0) + tensor.stored_bytes
    stacks = [stack for stack in sizes if _tower(stack.split("."), rules) is None]
    usual = [stack for stack in stacks if stack.rpartition(".")[2] in _LAYER_LISTS]
    return max(usual or stacks, key=lambda stack: sizes[stack], default="")


def _recognize(name: str, stack: str, body: str, rules: FamilyRules, lists: dict[str, _Place | None]) -> _Place | None:
    """Tell a tensor's unit by its name; ``None`` when the name says nothing.

    ``lists`` remembers what was told of a list: hundreds of tensors are in the same one.
    """
    number = _NUMBER.search(name)
    if number is None:
        parts = name.split(".")
        return _by_words(parts, parts[:-1], body, rules)
    above = name[: number.start()]
    if stack and above == stack:
        return _Place(name[: number.end()], "layer", int(number[1]))
    if above not in lists:
        parts = above.split(".")
        lists[above] = _by_words(parts, parts, body, rules)
    return lists[above]


def _by_words(parts: list[str], modules: list[str], body: str, rules: FamilyRules) -> _Place | None:
    """Tell a unit by components of a name; ``modules`` are those that are not the parameter itself."""
    tower = _tower(parts, rules)
    if tower is not None:
        return _Place(".".join(parts[: tower[0] + 1]), tower[1])
    for index, part in enumerate(modules):
        key = ".".join(parts[: index + 1])
        if part in _EMBEDDING or part in rules.embedding:
            return _Place(key, "embedding")
        if part in _HEAD or part in rules.head:
            return _Place(key, "head")
        if key.rpartition(".")[0] == body:
            if part == "embeddings":
                return _Place(key, "embedding")
            if "norm" in part or part == "ln_f":
                return _Place(key, "norm")
    return None


def _tower(parts: list[str], rules: FamilyRules) -> tuple[int, Role] | None:
    """The first component that names a projector, a vision tower or an audio tower, and which."""
    for index, part in enumerate(parts):
        if rules.projector and part.startswith(rules.projector):
            return index, "projector"
        if rules.vision and part.startswith(rules.vision):
            return index, "vision"
        if part.startswith(_AUDIO):
            return index, "other"
        if part in _PROJECTOR_EXACT or any(word in part for word in _PROJECTOR):
            return index, "projector"
        if part.startswith(_VISION) or "vision" in part:
            return index, "vision"
    return None


def _ancestors(keys: Iterable[str]) -> set[str]:
    """All dotted prefixes of all keys, the keys themselves left out."""
    found: set[str] = set()
    for key in set(keys):
        while key := key.rpartition(".")[0]:
            found.add(key)
    return found


def _free_prefix(name: str, taken: set[str]) -> str:
    """The shortest dotted prefix that is no parent of a recognized unit: a whole module, or a bare parameter."""
    parts = name.split(".")
    prefixes = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return next((prefix for prefix in prefixes if prefix not in taken), name)


def _merge_nested(places: Mapping[str, _Place]) -> dict[str, _Place]:
    """Let a unit swallow the units below it, so that no key is the parent of another."""
    by_key: dict[str, _Place] = {}
    for place in places.values():
        by_key.setdefault(place.key, place)
    tops = {key: _top(place, by_key) for key, place in by_key.items()}
    return {name: tops[place.key] for name, place in places.items()}


def _top(place: _Place, by_key: Mapping[str, _Place]) -> _Place:
    """The unit highest above a unit, or itself."""
    key, top = place.key, place
    while key := key.rpartition(".")[0]:
        top = by_key.get(key, top)
    return top
