"""Findings about the keys of a map: unknown, missing, nested, and those that take more than they say."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..data.families import ROTARY
from ..data.joins import NAMED_ELSEWHERE, ROTARY_NOT_MOVED, TOWER_ENTRY, TOWER_ROTARY
from ..findings import Finding, Severity
from ..units import format_gib
from .map_devices import shown
from .map_layout import Layout
from .map_names import outermost, trapped
from .map_question import Question, finding
from .wording import listed

_WEIGHTLESS = ("rotary", "rope", "pos_emb", "act", "drop", "pool", "loss", "position_ids", "inv_freq", "identity")
"""Parts of names of modules and buffers that hold no weights, so that a checkpoint cannot tell whether they exist."""
_MAX_UNKNOWN = 20
_NUMBERS = re.compile(r"\d+")
_FIRST_5 = (5, 0)


def about_keys(question: Question, layout: Layout) -> Iterator[Finding]:
    """All findings about keys."""
    yield from unknown_modules(question, layout)
    yield from missing_modules(question, layout)
    yield from missing_tower_rotary(question, layout)
    yield from nested_keys(question, layout)
    yield from prefix_traps(question, layout)


def unknown_modules(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM610: keys that name nothing. Loaders accept them without a word."""
    names = layout.anatomy.names
    unknown = [key for key in layout.device_map if not names.is_known(key) and not _may_be_weightless(layout, key)]
    alike: dict[str, list[str]] = {}
    for key in unknown:
        alike.setdefault(_NUMBERS.sub("*", key), []).append(key)
    groups = list(alike.values())
    for key, *others in groups[:_MAX_UNKNOWN]:
        meant, why = names.proposal(key, question.profile.model_type)
        hint = f"; {why}" if why and not meant else ""
        more = f", and {len(others):,} more are named like it" if others else ""
        yield finding(
            question,
            "VLM610",
            "warning",
            f"{question.profile.name} has no module {key!r}{more}{hint}.",
            cause="Loaders accept such a key without a word, and place nothing by it.",
            fix=f"Write {meant!r}: {why}." if meant else "Leave it out, or write the name of a module of this model.",
            seen=[(key, layout.device_map[key])],
        )
    left = sum(map(len, groups[_MAX_UNKNOWN:]))
    if left:
        yield finding(
            question,
            "VLM610",
            "warning",
            f"{left:,} more keys name no module of {question.profile.name}.",
            fix="Check that the map belongs to this model.",
        )


def _may_be_weightless(layout: Layout, key: str) -> bool:
    """True for a key below a known module that is named like a module without weights, as accelerate's own maps have."""
    above, _, last = key.rpartition(".")
    return layout.anatomy.names.is_known(above) and any(word in last for word in _WEIGHTLESS)


def missing_modules(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM611: what has no key, neither its own nor that of a module around it."""
    weightless = {unit.key for unit in question.profile.units if not unit.elements and unit.role != "head"}
    missing = [name for name in layout.missing if name not in weightless]
    if missing:
        modules = _joined_modules(layout, missing)
        yield finding(
            question,
            "VLM611",
            "warning" if question.profile.model_type in NAMED_ELSEWHERE else "error",
            f"The map gives no device to {listed(modules)}.",
            cause="transformers refuses the map after loading all of it (ValueError; KeyError in 4.57)."
            if layout.dispatches
            else "With one device in the map, transformers 5 leaves them on the CPU without a word and the first call "
            "fails; 4.57 refuses the map.",
            fix=f"Add {listed([repr(module) for module in modules])}.",
        )
    for key in layout.missing:
        if key in weightless:
            severity, cause = _without_rotary(question)
            yield finding(
                question,
                "VLM611",
                severity,
                f"The map gives no device to {key}, whose buffers then stay on the CPU.",
                cause=cause,
                fix=f"Add {key!r}, with the device of the embedding.",
            )


def missing_tower_rotary(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM611 for the positions of a tower in parts, which hold no weights and are easily forgotten."""
    release = question.release
    if question.profile.model_type not in TOWER_ENTRY or not layout.dispatches or (release and release >= _FIRST_5):
        return
    for unit in question.profile.units:
        key = f"{unit.key}.{TOWER_ROTARY}"
        if unit.role == "vision" and not layout.is_hooked(unit.key) and key not in layout.device_map:
            yield finding(
                question,
                "VLM611",
                "warning" if release is None else "error",
                f"{unit.key} is in parts, and the map gives no device to {key}, whose buffer then stays on the CPU.",
                cause='transformers 4.57 uses it where it is: "Expected all tensors to be on the same device, but found at '
                'least two devices, cpu and cuda:0!"; 5.x moves it.',
                fix=f"Add {key!r}, with the device of the inputs.",
            )


def _without_rotary(question: Question) -> tuple[Severity, str]:
    family, release = question.profile.model_type, question.release
    if family in ROTARY:
        return "warning", "The checkpoint's own code uses it where it is, together with position ids on a GPU."
    if family in ROTARY_NOT_MOVED and (release is None or release < _FIRST_5):
        said = '"Expected all tensors to be on the same device, but found at least two devices, cpu and cuda:0!"'
        if release is None:
            return "warning", f"transformers 4.57 uses it where it is and says {said}; 5.x moves it at each call."
        return "error", f"transformers {release[0]}.{release[1]} uses it where it is and says {said}"
    return "info", "The class moves it at each call, which costs a copy."


def _joined_modules(layout: Layout, names: list[str]) -> list[str]:
    """The outermost modules that hold nothing but missing tensors."""
    lost = set(names)
    modules: dict[str, None] = {}
    for unit, tensors in layout.anatomy.tensors_of.items():
        gone = [name for name in tensors if name in lost]
        if len(gone) == len(tensors):
            modules[unit] = None
        else:
            modules.update(dict.fromkeys(name.rpartition(".")[0] for name in gone))
    return list(modules)


def nested_keys(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM612: keys inside keys, and what becomes of them."""
    groups: dict[tuple[str, Severity, str], list[str]] = {}
    for key in layout.device_map:
        above = outermost([k for k in _around(key) if k in layout.device_map], key) if key else None
        if above is None:
            continue
        groups.setdefault((above, *_nested(layout, above, key)), []).append(key)
    for (above, severity, cause), keys in groups.items():
        around = f"{above!r}" if above else "'' (the whole model)"
        yield finding(
            question,
            "VLM612",
            severity,
            f"The map has {around} on {shown(layout.device_map[above])} and, inside it, {_with_devices(layout, keys)}.",
            cause=cause,
            fix=f"Replace {around} by one key for each of its units, and keep no key inside another.",
            seen=[(key, layout.device_map[key]) for key in (above, *keys[:3])],
            devices=[layout.device_map[key] for key in (above, *keys)],
        )


def _around(key: str) -> Iterator[str]:
    while key:
        key = key.rpartition(".")[0]
        yield key


def _nested(layout: Layout, above: str, key: str) -> tuple[Severity, str]:
    """How bad a key inside another is, and why."""
    if layout.device_map[above] == layout.device_map[key]:
        return "info", "Both say the same, so the inner key does nothing."
    if not layout.anatomy.names.is_module(key):
        return "warning", "The inner key has no effect: accelerate moves a bare parameter with the module around it."
    if has_inner_conflict(layout, key):
        return "error", (
            "accelerate moves the weights to the inner device but leaves the hooks below on the outer one, so that the "
            'first call says "Expected all tensors to be on the same device".'
        )
    return "info", "It works in accelerate, which lets the inner key win for a module without modules in it."


def has_inner_conflict(layout: Layout, key: str) -> bool:
    """True for a module inside a key of another device that has modules with tensors below it."""
    above = outermost([k for k in _around(key) if k in layout.module_keys], key)
    if above is None or layout.runs(layout.device_map[above]) == layout.runs(layout.device_map[key]):
        return False
    owners = {name.rpartition(".")[0] for name in layout.anatomy.tensors_under(key)}
    return bool(owners - {key} - layout.module_keys)


def _with_devices(layout: Layout, keys: list[str]) -> str:
    return listed([f"{key!r} on {shown(layout.device_map[key])}" for key in keys])


def prefix_traps(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM613: ``layers.1`` takes ``layers.10`` while loading."""
    if not layout.dispatches:
        return
    for key, names in trapped(layout.device_map, layout.anatomy.elements).items():
        wrong = [name for name in names if layout.device_of.get(name, layout.device_map[key]) != layout.device_map[key]]
        if not wrong:
            continue
        size = layout.anatomy.size_of(wrong)
        modules = list(dict.fromkeys(_numbered_like(key, name) for name in wrong))
        yield finding(
            question,
            "VLM613",
            "warning",
            f"While loading, the key {key!r} also takes {listed(modules)}: {format_gib(size)} that belong on "
            f"{listed(sorted({shown(layout.device_of[name]) for name in wrong}))} pass through "
            f"{shown(layout.device_map[key])}.",
            cause="transformers matches keys as beginnings of names, without a border; accelerate moves the weights later.",
            fix=f"Give {listed(modules)} keys of their own.",
            seen=[(key, layout.device_map[key])],
            devices=[layout.device_map[key]],
        )


def _numbered_like(key: str, name: str) -> str:
    """The module of a tensor at the depth of a key: ``layers.10`` for ``layers.1``."""
    return ".".join(name.split(".")[: key.count(".") + 1])
