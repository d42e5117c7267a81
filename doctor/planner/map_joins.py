"""Findings about tensors that meet: joined features, tied weights, logits and inputs; and about needless hops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from ..data.joins import (
    JOINED_BLOCKS,
    JOINS,
    LOGITS_MOVED,
    MASKED_AT_INPUTS,
    PAIRED_LAYERS,
    TOWER_AT_INPUTS,
    TOWER_ENTRY,
    TOWER_ROTARY,
    TOWER_TABLES,
    TOWER_WINDOWED,
    AtInputs,
    Join,
    is_moved,
)
from ..findings import Finding, Severity
from .map_devices import shown
from .map_layout import Device, Layout
from .map_names import owner
from .map_question import Question, finding, mismatch
from .wording import listed


def about_joins(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM615, VLM616, VLM621 and VLM623."""
    yield from parted_joins(question, layout)
    yield from parted_blocks(question, layout)
    yield from parted_pairs(question, layout)
    yield from parted_mask(question, layout)
    yield from parted_parameters(question, layout)
    yield from parted_positions(question, layout)
    yield from parted_from_inputs(question, layout)
    yield from parted_ties(question, layout)
    yield from parted_logits(question, layout)
    yield from hops(question, layout)


def broken_joins(question: Question, layout: Layout) -> list[tuple[Join, set[Device]]]:
    """Joins of the family whose two sides are on different devices, with those devices."""
    found = []
    for join in JOINS.get(question.profile.model_type, ()):
        one, other = _joined_on(layout, join.result or join.moves), layout.runs_on(join.meets)
        if one and other and one != other and not is_moved(join, question.profile.moved_joins):
            found.append((join, one | other))
    return found


def _joined_on(layout: Layout, key: str) -> set[Device]:
    """Where it is when it is joined: a bare parameter of the model itself goes to the inputs with the model's own hook."""
    is_of_root = "." not in key and key in layout.anatomy.elements
    return {layout.main} if is_of_root and layout.dispatches and layout.main is not None else layout.runs_on(key)


def parted_joins(question: Question, layout: Layout) -> Iterator[Finding]:
    """What the family's code joins without moving it."""
    for join, devices in broken_joins(question, layout):
        sides = _joined_on(layout, join.result or join.moves), layout.runs_on(join.meets)
        one, other = (listed(sorted(map(shown, side))) for side in sides)
        says = f"{join.where} says {mismatch(devices)}"
        # Where its code was searched and lacks the newer lines, it is one of the older revisions.
        may_be_newer = join.is_patched and question.profile.moved_joins is None
        yield finding(
            question,
            "VLM615",
            "warning" if may_be_newer or join.when else "error",
            f"{join.moves} is on {one}, and what it is joined with, {join.meets}, on {other}: "
            + (f"in older revisions of the checkpoint's code {says}" if may_be_newer else f"{join.when}{says}"),
            cause="Hooks move what goes into a module, never a bare parameter or two results that are joined.",
            fix=f"Put {join.moves} where {join.meets} is.",
            seen=[(key, layout.device_map[key]) for key in (join.moves, join.meets) if key in layout.device_map],
            devices=devices,
            links=(),
        )


def tower_of_joined_blocks(question: Question, layout: Layout) -> list[str]:
    """The blocks of a tower whose outputs the family's code joins, where they are on several devices."""
    if question.profile.model_type not in JOINED_BLOCKS:
        return []
    roles = {unit.key: unit.role for unit in question.profile.units}
    blocks = [piece.key for piece in layout.anatomy.pieces if piece.is_block and roles[piece.unit] == "vision"]
    return blocks if len(set().union(*(layout.runs_on(block) for block in blocks))) > 1 else []


def parted_blocks(question: Question, layout: Layout) -> Iterator[Finding]:
    """Blocks of a tower whose outputs are joined."""
    blocks = tower_of_joined_blocks(question, layout)
    if blocks:
        devices = set().union(*(layout.runs_on(block) for block in blocks))
        tower = next(piece.unit for piece in layout.anatomy.pieces if piece.key == blocks[0])
        yield finding(
            question,
            "VLM615",
            "error",
            f"The blocks of {tower} are on {listed(sorted(map(shown, devices)))}, and their outputs are joined: "
            f"{JOINED_BLOCKS[question.profile.model_type]} says {mismatch(devices)}",
            cause="Each output stays where its block is; nothing moves them together.",
            fix=f"Put all of {tower} on one device.",
            seen=[(key, layout.device_map[key]) for key in blocks if key in layout.device_map][:6],
            devices=devices,
        )


def parted_pairs(question: Question, layout: Layout) -> Iterator[Finding]:
    """Layers of two bodies that are on two devices."""
    one, other, where = PAIRED_LAYERS.get(question.profile.model_type, ("", "", ""))
    for number in range(question.profile.text.layers if one else 0):
        pair = [owner(layout.device_map, f"{body}.{number}") for body in (one, other)]
        found = (layout.runs(layout.device_map[key]) for key in pair if key is not None)
        devices = {device for device in found if device is not None}
        if len(devices) > 1:
            yield finding(
                question,
                "VLM615",
                "error",
                f"{one}.{number} and {other}.{number} are on {listed(sorted(map(shown, devices)))}: {where} says "
                f"{mismatch(devices)}",
                cause="The second reads the cache of the first, and nothing moves it.",
                fix="Keep the model on one device.",
                seen=[(key, layout.device_map[key]) for key in pair if key is not None],
                devices=devices,
            )
            return


def parted_mask(question: Question, layout: Layout) -> Iterator[Finding]:
    """A mask of images that is made of tensors at the inputs and at the embedding."""
    rule, first = MASKED_AT_INPUTS.get(question.profile.model_type), layout.role_device("embedding")
    is_older = rule is not None and question.release is not None and question.release < rule.since
    if rule is None or first is None or not layout.dispatches or is_older:
        return
    hooked = layout.hook_device(rule.module) if rule.module else None
    home = layout.main if hooked is None else hooked
    if first == home:
        return
    embedding = next(unit.key for unit in question.profile.units if unit.role == "embedding")
    given = "in any case" if rule.in_text else "with an image"
    yield finding(
        question,
        "VLM615",
        "error",
        f"{embedding} is on {shown(first)} and the inputs are on {shown(home)}: {given} {rule.where} says "
        f"{mismatch({first, home})}",
        cause="What marks the places of the image stays with the inputs, and nothing moves it to the embedding.",
        fix=f"Put the token embedding on {shown(home)}.",
        devices={first, home},
    )


def parted_parameters(question: Question, layout: Layout) -> Iterator[Finding]:
    """Bare parameters of a tower that share a device with none of the modules beside them."""
    named = {join.moves for join in JOINS.get(question.profile.model_type, ())}
    blocks = tuple(f"{piece.key}." for piece in layout.anatomy.pieces if piece.is_block)
    for unit, names in layout.anatomy.tensors_of.items():
        for name in names:
            module, _, last = name.rpartition(".")
            is_bare = last not in ("weight", "bias") and name != unit and name not in named
            if not is_bare or name.startswith(blocks) or layout.is_hooked(module):
                continue
            beside = [child for child in layout.anatomy.names.children(module) if layout.anatomy.names.is_module(child)]
            there, around = layout.runs_on(name), set().union(*(layout.runs_on(child) for child in beside), set())
            if there and around and not there & around:
                yield finding(
                    question,
                    "VLM615",
                    "warning",
                    f"The bare parameter {name} is on {listed(sorted(map(shown, there)))}, and every module beside it on "
                    f"{listed(sorted(map(shown, around)))}.",
                    cause=f"No hook moves a parameter: where it meets their results, torch says {mismatch(there | around)}",
                    fix=f"Put {name} where the module is whose result it is joined with.",
                    seen=[(name, layout.device_map[name])] if name in layout.device_map else (),
                    devices=there | around,
                )


def entry_of_broken_tower(question: Question, layout: Layout) -> tuple[str, str] | None:
    """The tower that takes positions and has no key of its own, and its part that meets them."""
    entry = TOWER_ENTRY.get(question.profile.model_type)
    for unit in question.profile.units:
        if entry and unit.role == "vision" and layout.dispatches and not layout.is_hooked(unit.key):
            return unit.key, f"{unit.key}.{entry}"
    return None


def parts_at_inputs(question: Question, layout: Layout, tower: str, entry: str) -> dict[str, Severity]:
    """Parts of a broken tower that must be where the inputs are, and how bad it is when they are not."""
    family, release = question.profile.model_type, question.release
    table = f"{tower}.{TOWER_TABLES.get(family, 'no table')}"
    parts: dict[str, Severity] = {} if layout.is_hooked(table) else {table: "error"}
    if not layout.is_hooked(f"{tower}.{TOWER_ROTARY}"):
        # Its hook would bring hidden states and positions together.
        parts[entry] = "error"
    if family in TOWER_WINDOWED and (release is None or release < (5, 0)):
        severity: Severity = "warning" if release is None else "error"
        parts = {entry: severity, f"{tower}.merger": severity, **parts}
    return parts


def parted_positions(question: Question, layout: Layout) -> Iterator[Finding]:
    """A tower in parts some of which are not where the inputs are."""
    broken = entry_of_broken_tower(question, layout)
    if broken is None:
        return
    for part, severity in parts_at_inputs(question, layout, *broken).items():
        there = layout.runs_on(part)
        if there and there != {layout.main}:
            says = mismatch(there | {layout.main})
            yield finding(
                question,
                "VLM615",
                severity,
                f"{broken[0]} is in parts, and {part} is on {listed(sorted(map(shown, there)))} while the positions of the "
                f"patches stay with the inputs on {shown(layout.main)}: "
                + (f"the first image says {says}" if severity == "error" else f"transformers 4.57 says {says}"),
                cause="Only a tower with a key of its own has a hook that moves all its inputs.",
                fix=f"Put {part} on {shown(layout.main)}, or give the tower one key.",
                seen=[(part, layout.device_map[part])] if part in layout.device_map else (),
                devices=there | {layout.main},
            )


def part_at_inputs(question: Question, layout: Layout) -> tuple[str, Device, AtInputs] | None:
    """A part of the tower, and where its result is joined with what is made of the inputs of the module around it."""
    rule = TOWER_AT_INPUTS.get(question.profile.model_type)
    tower = next((unit.key for unit in question.profile.units if unit.role == "vision"), None)
    if rule is None or tower is None or not layout.dispatches:
        return None
    if question.release is not None and question.release < rule.since:
        return None
    part = f"{tower}.{rule.part}"
    around = layout.hook_device(part.rpartition(".")[0])
    return part, layout.main if around is None else around, rule


def parted_from_inputs(question: Question, layout: Layout) -> Iterator[Finding]:
    """A part of the tower on another device than what its result is joined with."""
    found = part_at_inputs(question, layout)
    there = layout.runs_on(found[0]) if found else set()
    if found is None or not there or there == {found[1]}:
        return
    part, home, rule = found
    tower = part.removesuffix(f".{rule.part}")
    yield finding(
        question,
        "VLM615",
        "error",
        f"{tower} is in parts, and {part} is on {listed(sorted(map(shown, there)))} while {rule.what} with "
        f"the inputs on {shown(home)}: "
        f"{rule.where} says {mismatch(there | {home})}",
        cause="Only a tower with a key of its own has a hook that moves all its inputs.",
        fix=f"Put {part} on {shown(home)}, or give the tower one key.",
        seen=[(part, layout.device_map[part])] if part in layout.device_map else (),
        devices=there | {home},
    )


def parted_ties(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM616: accelerate ties weights again after placing them, so that one of two modules finds its weight elsewhere."""
    for group in question.profile.tied:
        devices = {key: layout.runs(layout.unit_device[key]) for key in group if key in layout.unit_device}
        places = {device for device in devices.values() if device is not None}
        parted = [f"{key} on {shown(device)}" for key, device in devices.items() if device is not None]
        if len(places) > 1:
            yield finding(
                question,
                "VLM616",
                "error",
                f"Tied weights are parted: {listed(parted)}. The first call says {mismatch(places)}",
                cause="They are one tensor: accelerate ties them again after placing them, and the last of them is used on "
                "a device where its weight is not.",
                fix=f"Put {listed(list(group))} on one device.",
                seen=[(key, layout.device_map[key]) for key in group if key in layout.device_map],
                devices=places,
            )


def parted_logits(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM623: an inner ``generate`` leaves the logits where the head is."""
    head, first = layout.role_device("head"), layout.role_device("embedding")
    if not question.profile.runs_inner_generate or head is None or first is None or head == first:
        return
    release = question.release
    severity: Severity = "warning"
    says = f"before transformers 4.46 the first token says {mismatch({head, first})}"
    if release is not None:
        severity = "info" if release >= LOGITS_MOVED else "error"
    yield finding(
        question,
        "VLM623",
        severity,
        f"The head is on {shown(head)} and the inputs are on {shown(first)}: {says}",
        cause=f"{question.profile.architecture} calls generate of its text model, and only the outermost module brings its "
        "result back to the device of the inputs.",
        fix=f"Put norm, head and the last layer on {shown(first)}.",
        devices=(head, first),
    )


def path(question: Question, layout: Layout) -> list[Device]:
    """Devices that a prompt visits, tower first, without repetitions next to each other.

    Left out: bare parameters, rotary tables, and a head that is tied to the embedding or brought to the inputs on purpose,
    with its norm and last layer.
    """
    returning = {key for group in question.profile.tied for key in group[1:]}
    if question.profile.runs_inner_generate:
        units = question.profile.units
        layers = [unit.key for unit in units if unit.role == "layer"]
        returning |= {unit.key for unit in units if unit.role in ("norm", "head")} | set(layers[-1:])
    seen: list[Device] = []
    for piece in layout.anatomy.pieces:
        if piece.unit in returning:
            continue
        unit = layout.anatomy.units[piece.unit]
        if (unit.role == "other" and not unit.elements) or piece.key in layout.anatomy.elements:
            continue
        device = layout.main_share(layout.anatomy.tensors_under(piece.key))
        runs = None if device is None else layout.runs(device)
        if runs is not None:
            seen.append(runs)
    return [device for device, _ in groupby(seen)]


def hops(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM621: more changes of device than there are devices to change to."""
    visited = path(question, layout)
    needless = len(visited) - len(set(visited))
    if needless <= 0:
        return
    layers = [unit.key for unit in question.profile.units if unit.role == "layer"]
    text = [device for device, _ in groupby(layout.unit_device[key] for key in layers if key in layout.unit_device)]
    in_text = len(text) > len(set(text)) and not question.profile.runs_inner_generate
    way = " -> ".join(shown(device) for device in visited[:8]) + (" ..." if len(visited) > 8 else "")
    yield finding(
        question,
        "VLM621",
        "warning" if in_text else "info",
        f"The prompt goes {way}: {needless} {'change' if needless == 1 else 'changes'} of device more than "
        f"{len(set(visited))} devices need.",
        cause="Every change copies the hidden states, at each new token again."
        if in_text
        else "It happens once for each prompt; vision tower and embedding on one device would save it.",
        fix="Place modules in the order in which they run.",
        devices=set(visited),
    )
