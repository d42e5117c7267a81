"""Findings about blocks that a map cuts, and about blocks that nothing brings to their device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..findings import Finding
from .map_devices import shown
from .map_keys import has_inner_conflict
from .map_layout import Device, Layout
from .map_pieces import Piece
from .map_question import Question, finding, listed, mismatch

_MAX_BLOCKS = 6


def about_blocks(question: Question, layout: Layout) -> Iterator[Finding]:
    """VLM614 and VLM624 for the text layers and for every tower."""
    for stack, start in _stacks(layout):
        found = list(_walk(question, layout, stack, start))
        yield from found[:_MAX_BLOCKS]
        if len(found) > _MAX_BLOCKS:
            last = found[_MAX_BLOCKS]
            yield finding(
                question,
                last.code,
                last.severity,
                f"{len(found) - _MAX_BLOCKS} more blocks beside {stack[0].key} are placed so.",
                fix="Give each block one key.",
            )
    for piece in layout.anatomy.pieces:
        if not piece.is_block:
            yield from _cut_module(question, layout, piece)


def _stacks(layout: Layout) -> Iterator[tuple[Sequence[Piece], Device | None]]:
    """Lists of blocks in execution order, each with the device that its input comes from."""
    pieces = layout.anatomy.pieces
    towers: dict[tuple[str, str], list[Piece]] = {}
    for piece in pieces:
        if piece.is_block:
            is_text = piece.unit == piece.key
            towers.setdefault(("" if is_text else piece.unit, piece.key.rpartition(".")[0]), []).append(piece)
    for (unit, _), blocks in towers.items():
        if not unit:
            yield blocks, layout.role_device("embedding")
            continue
        before = [piece for piece in pieces if piece.unit == unit and not piece.is_block]
        entry = next((piece for piece in before if "embed" in piece.key or "patch" in piece.key), None)
        yield blocks, _only(layout.runs_on(entry.key)) if entry else None


def _only(devices: set[Device]) -> Device | None:
    return next(iter(devices)) if len(devices) == 1 else None


def _walk(question: Question, layout: Layout, blocks: Sequence[Piece], stream: Device | None) -> Iterator[Finding]:
    """Follow the hidden states through a list of blocks."""
    for block in blocks:
        if layout.runs_on(block.key) == {layout.hook_device(block.key)}:
            stream = layout.hook_device(block.key)
            continue
        parts = _parts(layout, block.key)
        if not any(parts.values()) or _has_conflict(layout, block.key):
            stream = layout.hook_device(block.key) or stream
            continue
        if layout.is_hooked(block.key):
            stream = layout.hook_device(block.key)
        if stream is None:
            stream = Counter(device for devices in parts.values() for device in devices).most_common(1)[0][0]
        work = {name: devices for name, devices in parts.items() if "norm" not in name.lower()}
        strays = {name: devices for name, devices in work.items() if devices - {stream}}
        devices = set().union(*parts.values())
        if strays and (len(devices) > 1 or layout.is_hooked(block.key)):
            yield _cut(question, layout, block, parts, stream)
        elif strays:
            yield _unhooked(question, layout, block, parts, stream)
        elif devices - {stream}:
            yield _cut_norms(question, layout, block, parts, stream)
        if strays and not layout.is_hooked(block.key):
            stream = _only(list(work.values())[-1]) or stream


def _parts(layout: Layout, block: str) -> dict[str, set[Device]]:
    """Names directly below a block, with the devices on which their tensors are used."""
    below = {name.rpartition(".")[2]: layout.runs_on(name) for name in layout.anatomy.names.children(block)}
    return {name: devices for name, devices in below.items() if devices}


def _has_conflict(layout: Layout, block: str) -> bool:
    """True where VLM612 tells the cause already."""
    return any(key.startswith(f"{block}.") and has_inner_conflict(layout, key) for key in layout.module_keys)


def _by_device(parts: dict[str, set[Device]]) -> str:
    """``cuda:2 (input_layernorm) and cuda:3 (attention, mlp)``."""
    grouped: dict[Device, list[str]] = {}
    for name, devices in parts.items():
        for device in sorted(devices, key=str):
            grouped.setdefault(device, []).append(name)
    return listed([f"{shown(device)} ({', '.join(grouped[device])})" for device in sorted(grouped, key=str)])


def _seen(layout: Layout, block: str) -> list[tuple[str, Device]]:
    return [(key, device) for key, device in layout.device_map.items() if key == block or key.startswith(f"{block}.")][:6]


def _fix(layout: Layout, block: str) -> str:
    device = layout.main_share(layout.anatomy.tensors_under(block))
    return f'Give the block one key: "{block}": {device!r}.'


def _cut(question: Question, layout: Layout, block: Piece, parts: dict[str, set[Device]], stream: Device) -> Finding:
    devices = set().union({stream}, *parts.values())
    return finding(
        question,
        "VLM614",
        "error",
        f"Block {block.key} is cut: it is on {_by_device(parts)}. The first call says {mismatch(devices)}",
        cause=f"A block adds what goes in, which is on {shown(stream)}, to what comes out; nothing moves them together.",
        fix=_fix(layout, block.key),
        seen=_seen(layout, block.key),
        devices=devices,
        links=("https://github.com/zai-org/CogVLM2/issues/10",),
    )


def _cut_norms(question: Question, layout: Layout, block: Piece, parts: dict[str, set[Device]], stream: Device) -> Finding:
    return finding(
        question,
        "VLM614",
        "warning",
        f"The norms of block {block.key} are elsewhere than the rest: it is on {_by_device(parts)}.",
        cause="Each token goes there and back; and where a norm comes behind attention or MLP, the first call says "
        f"{mismatch(set().union({stream}, *parts.values()))}",
        fix=_fix(layout, block.key),
        seen=_seen(layout, block.key),
        devices=set().union(*parts.values()),
    )


def _unhooked(question: Question, layout: Layout, block: Piece, parts: dict[str, set[Device]], stream: Device) -> Finding:
    devices = set().union({stream}, *parts.values())
    return finding(
        question,
        "VLM624",
        "error",
        f"The parts of block {block.key} have keys, on {_by_device(parts)}, and the block itself has none: its input "
        f"stays on {shown(stream)}, and the first call says {mismatch(devices)}",
        cause="Only a module with a key (or inside one) has a hook that moves its input, and a block adds its input to its "
        "result.",
        fix=_fix(layout, block.key),
        seen=_seen(layout, block.key),
        devices=devices,
    )


def _cut_module(question: Question, layout: Layout, piece: Piece) -> Iterator[Finding]:
    """Parts of a module that is no block, such as the patch embedding or a projector."""
    devices = layout.runs_on(piece.key)
    if len(devices) < 2 or _has_conflict(layout, piece.key):
        return
    is_sum = "embed" in piece.key.rpartition(".")[2]
    yield finding(
        question,
        "VLM614",
        "error" if is_sum else "warning",
        f"{piece.key} is cut: it is on {_by_device(_parts(layout, piece.key) or {piece.key: devices})}."
        + (f" The first call says {mismatch(devices)}" if is_sum else ""),
        cause="It adds its parts, and nothing moves them together."
        if is_sum
        else f"It works only if its parts run one after another; where it adds them, torch says {mismatch(devices)}",
        fix=_fix(layout, piece.key).replace("the block", "it"),
        seen=_seen(layout, piece.key),
        devices=devices,
    )
