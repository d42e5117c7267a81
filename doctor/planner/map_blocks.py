"""Findings about blocks that a map cuts, and about blocks that nothing brings to their device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from ..data.joins import FED_IN_TURN
from ..findings import Finding
from .map_devices import shown
from .map_keys import has_inner_conflict
from .map_layout import Device, Layout
from .map_names import owner
from .map_pieces import Piece
from .map_question import Question, finding, mismatch
from .wording import listed

_MAX_BLOCKS = 6
_OUTPUT = "output"
_NORMS_BEHIND = frozenset({"cogagent", "cogvlm", "chatglm"})
"""Families whose vision blocks (EVA2-CLIP) have their norms behind attention and MLP. Source: their visual.py. Text bodies
that have some there (Gemma 2 and 3, GLM-4 and 4.1V) name them ``post_..._layernorm``."""


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
            towers.setdefault(("" if is_text else piece.unit, piece.list_key), []).append(piece)
    for (unit, _), blocks in towers.items():
        if not unit:
            yield blocks, layout.role_device("embedding")
            continue
        before = [piece for piece in pieces if piece.unit == unit and not piece.is_block]
        entry = next((piece for piece in before if "embed" in piece.key or "patch" in piece.key), None)
        yield blocks, _only(layout.runs_on(entry.key)) if entry else None


def _only(devices: set[Device]) -> Device | None:
    return next(iter(devices)) if len(devices) == 1 else None


def _either(device: Device | None, otherwise: Device | None) -> Device | None:
    """The device, unless it is not known; 0 is one."""
    return otherwise if device is None else device


def _walk(question: Question, layout: Layout, blocks: Sequence[Piece], stream: Device | None) -> Iterator[Finding]:
    """Follow the hidden states through a list of blocks."""
    for block in blocks:
        hook = layout.hook_device(block.key)
        stream = _either(hook, stream)
        if layout.runs_on(block.key) == {hook}:
            continue
        parts = _parts(layout, block.key)
        if not any(parts.values()) or _has_conflict(layout, block.key):
            continue
        if stream is None:
            stream = Counter(device for devices in parts.values() for device in devices).most_common(1)[0][0]
        devices = set().union(*parts.values())
        if _strays(question, layout, parts, block, stream):
            is_cut = len(devices) > 1 or layout.is_hooked(block.key)
            yield (_cut if is_cut else _unhooked)(question, layout, block, parts, stream)
            work = [found for name, found in parts.items() if "norm" not in name.lower()]
            stream = stream if layout.is_hooked(block.key) or not work else _either(_only(work[-1]), stream)
        elif _loses_positions(layout, block, parts, stream):
            home = layout.role_device("embedding")
            yield _unhooked(question, layout, block, parts, stream if home is None else home)
        elif devices - {stream}:
            yield _needless(question, layout, block, parts, stream)
            if _adds_inside(parts):
                stream = _only(next(found for name, found in parts.items() if name.startswith(_OUTPUT))) or stream


def _strays(question: Question, layout: Layout, parts: dict[str, set[Device]], block: Piece, stream: Device) -> bool:
    """True when a result that is added to the input is not where the input is.

    Norms before attention or MLP may be anywhere, since what follows moves their result on; where a norm comes behind, it
    decides where the result is.
    """
    if _adds_inside(parts):
        return any(len(devices) > 1 and _is_torn(layout, f"{block.key}.{name}") for name, devices in parts.items())
    behind = _norms_behind(question, block, parts)
    for name, devices in parts.items():
        if "norm" in name.lower():
            continue
        norm = behind[0] if "att" in name.lower() else behind[1]
        if len(devices) > 1 or parts.get(norm, devices) != {stream}:
            return True
    return False


def _is_torn(layout: Layout, part: str) -> bool:
    """True for a part of such a block that is on two devices other than by its modules ``self`` and ``output``."""
    inner = [name for name in layout.anatomy.names.children(part) if len(layout.runs_on(name)) > 1]
    names = {name.rpartition(".")[2] for name in layout.anatomy.names.children(part)}
    return bool(inner) or not {"self", "output"} <= names


def _adds_inside(parts: Collection[str]) -> bool:
    """True for a block as BERT has it: what is added is given to its module ``output``, whose hook brings both together."""
    return any(name.startswith(_OUTPUT) for name in parts) and any(name.startswith("intermediate") for name in parts)


def _loses_positions(layout: Layout, block: Piece, parts: dict[str, set[Device]], stream: Device) -> bool:
    """True for a text layer whose attention has keys only inside it, so that nothing moves mask and positions there."""
    attention = next(
        (f"{block.key}.{name}" for name in parts if "att" in name.lower() and "norm" not in name.lower()), None
    )
    is_text = block.unit == block.key
    return (
        is_text and attention is not None and not layout.is_hooked(attention) and stream != layout.role_device("embedding")
    )


def _norms_behind(question: Question, block: Piece, parts: dict[str, set[Device]]) -> tuple[str, str]:
    """The norms that come behind attention and behind the MLP; names that are not there mean none."""
    if question.profile.model_type in _NORMS_BEHIND and block.unit != block.key:
        return "input_layernorm", "post_attention_layernorm"
    attention = "post_attention_layernorm" if "pre_feedforward_layernorm" in parts else "post_self_attn_layernorm"
    return attention, "post_feedforward_layernorm" if "post_feedforward_layernorm" in parts else "post_mlp_layernorm"


def _parts(layout: Layout, block: str) -> dict[str, set[Device]]:
    """Names directly below a block, with the devices on which their tensors are used."""
    below = {name.rpartition(".")[2]: layout.runs_on(name) for name in layout.anatomy.names.children(block)}
    return {name: devices for name, devices in below.items() if devices}


def _has_conflict(layout: Layout, block: str) -> bool:
    """True where VLM612 tells the cause already: of a key inside the block, or of the key that the block follows."""
    around = owner(layout.module_keys, block)
    if around is not None and has_inner_conflict(layout, around):
        return True
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


def _needless(question: Question, layout: Layout, block: Piece, parts: dict[str, set[Device]], stream: Device) -> Finding:
    return finding(
        question,
        "VLM614",
        "warning",
        f"Block {block.key} is cut: it is on {_by_device(parts)}. It runs, since "
        + (
            "what it adds is given to its parts."
            if _adds_inside(parts)
            else f"its norms bring the results back to {shown(stream)}."
        ),
        cause="At each new token the hidden states go there and back.",
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
        f"The parts of block {block.key} have keys, on {_by_device(parts)}, and the block itself has none: what goes in "
        f"stays on {shown(stream)}, and the first call says {mismatch(devices)}",
        cause="Only a module with a key (or inside one) has a hook that moves what goes in.",
        fix=_fix(layout, block.key),
        seen=_seen(layout, block.key),
        devices=devices,
    )


def _parts_a_product(layout: Layout, module: str) -> bool:
    """True where a gate and what it multiplies are on two devices; an activation with a key takes the gate along."""
    gate, up = (layout.runs_on(f"{module}.{name}") for name in ("gate_proj", "up_proj"))
    key = next((f"{module}.{name}" for name in ("act_fn", "act") if f"{module}.{name}" in layout.device_map), None)
    moved = None if key is None else layout.runs(layout.device_map[key])
    return bool(gate and up) and (gate if moved is None else {moved}) != up


def _cut_module(question: Question, layout: Layout, piece: Piece) -> Iterator[Finding]:
    """Parts of a module that is no block, such as the patch embedding or a projector."""
    devices = layout.runs_on(piece.key)
    if len(devices) < 2 or _has_conflict(layout, piece.key):
        return
    last = piece.key.rpartition(".")[2]
    is_fed_in_turn = last == FED_IN_TURN.get(question.profile.model_type)
    is_sum = ("embed" in last and not is_fed_in_turn) or _parts_a_product(layout, piece.key)
    yield finding(
        question,
        "VLM614",
        "error" if is_sum else "warning",
        f"{piece.key} is cut: it is on {_by_device(_parts(layout, piece.key) or {piece.key: devices})}."
        + (f" The first call says {mismatch(devices)}" if is_sum else ""),
        cause="It combines its parts, and nothing moves them together."
        if is_sum
        else f"It works only if its parts run one after another; where it adds them, torch says {mismatch(devices)}",
        fix=_fix(layout, piece.key).replace("the block", "it"),
        seen=_seen(layout, piece.key),
        devices=devices,
    )
