"""The smallest change that makes a map load, run and fit: what was right stays where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..data.joins import TOWER_ENTRY, TOWER_ROTARY
from ..placement import Plan
from .map_devices import OFF_GPU, main_device, shown
from .map_joins import (
    broken_joins,
    entry_of_broken_tower,
    part_at_inputs,
    parts_at_inputs,
    tower_of_joined_blocks,
)
from .map_layout import Device, Layout
from .map_pieces import Anatomy, Piece
from .map_question import Question
from .place import Need
from .quantized_rules import refusal
from .wording import listed

Place = dict[str, Device]
"""Piece to device."""
_MOST_CHANGES = 12


def amended(question: Question, layout: Layout) -> tuple[dict[str, Device], list[str]]:
    """The map with the keys it must have meant: unknown ones renamed, or left out. And what was changed."""
    names, changes = layout.anatomy.names, []
    result: dict[str, Device] = {}
    for key, device in layout.device_map.items():
        if names.is_known(key):
            result[key] = device
            continue
        meant, _ = names.proposal(key, question.profile.model_type)
        if meant and meant not in layout.device_map:
            result.setdefault(meant, device)
            changes.append(f"{key!r} is written {meant!r}.")
        else:
            changes.append(f"{key!r} is left out.")
    return result, changes


def moved_pieces(question: Question, layout: Layout) -> Place:
    """Every piece on one device: its own where it has one that can be used, otherwise its neighbor's."""
    usable = _usable(question)
    place: Place = {}
    pieces = layout.anatomy.pieces
    known: dict[str, Device] = {}
    for piece in pieces:
        device = layout.main_share(layout.anatomy.tensors_under(piece.key))
        if device is not None and usable(device):
            known[piece.key] = device
    fallback = next(iter(known.values()), 0)
    for piece in pieces:
        fallback = known.get(piece.key, fallback)
        place[piece.key] = fallback
    _join(question, layout, place)
    return place


def _usable(question: Question) -> Callable[[Device], bool]:
    usable = {budget.gpu.index for budget in question.budgets.usable}

    def check(device: Device) -> bool:
        if device in OFF_GPU:
            return refusal(question.profile, question.workload, str(device), is_alone=False) is None
        return question.gpu_of(device) in usable

    return check


def _join(question: Question, layout: Layout, place: Place) -> None:
    """Bring together what the family's code joins, what is tied, and what an inner ``generate`` wants at the inputs."""
    profile, anatomy = question.profile, layout.anatomy
    for join, _ in broken_joins(question, layout):
        target = next(place[piece.key] for piece in anatomy.pieces if _touches(piece, join.meets))
        place.update({piece.key: target for piece in anatomy.pieces if _touches(piece, join.moves)})
    joined = tower_of_joined_blocks(question, layout)
    place.update(dict.fromkeys(joined, place[joined[0]]) if joined else {})
    first = next((unit.key for unit in profile.units if unit.role == "embedding"), None)
    together = list(profile.tied)
    if profile.runs_inner_generate and first is not None:
        layers = [unit.key for unit in profile.units if unit.role == "layer"]
        ends = [unit.key for unit in profile.units if unit.role in ("norm", "head")]
        together.append((first, *ends, *layers[-1:]))
    for group in together:
        place.update(dict.fromkeys(group, place[group[0]]))
    broken = entry_of_broken_tower(question, layout)
    if broken is not None:
        # The positions of the patches stay at the inputs.
        parts = {broken[1], *parts_at_inputs(question, layout, *broken)} & place.keys()
        place.update(dict.fromkeys(parts, main_device(place.values())))
    met = part_at_inputs(question, layout)
    if met is not None and met[0] in place:
        place[met[0]] = main_device(place.values()) if not layout.is_hooked(met[0].rpartition(".")[0]) else met[1]
    weightless = [unit.key for unit in profile.units if not unit.elements and unit.role == "other"]
    place.update({key: place[first] for key in weightless if first is not None and key not in layout.device_of})


def _touches(piece: Piece, key: str) -> bool:
    """True for a piece that is the module, holds it or lies in it."""
    return f"{piece.key}.".startswith(f"{key}.") or key.startswith(f"{piece.key}.")


def keys_of(anatomy: Anatomy, place: Place) -> dict[str, Device]:
    """A map of the fewest keys: the whole model, a unit, or where a tower is broken its pieces."""
    takes_positions = anatomy.profile.model_type in TOWER_ENTRY
    if len(set(place.values())) == 1:
        return {"": next(iter(place.values()))}
    result: dict[str, Device] = {}
    for unit in anatomy.units:
        pieces = anatomy.pieces_of(unit)
        devices = {place[piece.key] for piece in pieces}
        if len(devices) == 1:
            result[unit] = devices.pop()
        else:
            result.update({piece.key: place[piece.key] for piece in pieces})
            if takes_positions and anatomy.units[unit].role == "vision":
                result[f"{unit}.{TOWER_ROTARY}"] = main_device(place.values())
    return result


def rebalanced(question: Question, layout: Layout, place: Place) -> Place | None:
    """Contiguous stages on the same GPUs in the same order, each within its memory, with the fewest atoms moved.

    Returns:
        ``None`` when there are none, or when the map keeps weights off the GPUs.
    """
    footprint = question.problem.footprint
    atoms = footprint.atoms
    own = [_most(layout, place, [unit.key for unit in atom.units]) for atom in atoms]
    order = list(dict.fromkeys(own))
    rooms = {budget.gpu.index: budget.available_bytes for budget in question.budgets.usable}
    gpus = [question.gpu_of(device) for device in order]
    if any(gpu is None or gpu not in rooms for gpu in gpus):
        return None
    capacities = [rooms[gpu] for gpu in gpus if gpu is not None]
    ends = fewest_moves(footprint.needs(question.workload.text_tokens), capacities, [order.index(device) for device in own])
    if ends is None:
        return None
    result = dict(place)
    for device, first, end in zip(order, (0, *ends), ends, strict=False):
        units = {unit.key for atom in atoms[first:end] for unit in atom.units}
        result.update({piece.key: device for piece in layout.anatomy.pieces if piece.unit in units})
    return result


def _most(layout: Layout, place: Place, units: Sequence[str]) -> Device:
    """The device that holds most of some units."""
    sizes: dict[Device, int] = {}
    for piece in layout.anatomy.pieces:
        if piece.unit in units:
            size = sum(layout.anatomy.elements.get(name, 0) for name in layout.anatomy.tensors_under(piece.key))
            sizes[place[piece.key]] = sizes.get(place[piece.key], 0) + size
    return max(sizes, key=lambda device: sizes[device])


def fewest_moves(need: Need, capacities: Sequence[int], own: Sequence[int]) -> list[int] | None:
    """Ends of contiguous stages, one for each capacity in the order given, that move the fewest atoms.

    Args:
        need: Bytes of a run of atoms; grows with every atom.
        capacities: Bytes of each stage.
        own: Stage on which each atom is now.

    Returns:
        ``None`` when no split holds.
    """
    atoms = len(own)
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for stage, capacity in enumerate(capacities):
        reached: dict[int, tuple[int, list[int]]] = {}
        for first, (cost, ends) in best.items():
            moved = cost
            for end in range(first + 1, atoms + 1):
                if need(first, end) > capacity:
                    break
                moved += own[end - 1] != stage
                if end not in reached or moved < reached[end][0]:
                    reached[end] = (moved, [*ends, end])
        best = reached
    return best[atoms][1] if atoms in best else None


def changes_between(layout: Layout, place: Place) -> list[str]:
    """What a placement does differently, one sentence a unit, neighbors that move alike together."""
    found: list[tuple[str, list[str]]] = []
    for piece in layout.anatomy.pieces:
        # Positions of a tower hold no tensors: they stand for themselves.
        names = layout.anatomy.tensors_under(piece.key) or [piece.key]
        before = sorted({shown(device) for name in names if (device := layout.device_for(name)) is not None})
        after = shown(place[piece.key])
        if before == [after]:
            continue
        how = f"on {after}, not on {listed(before)}" if before else f"on {after}; it had no device"
        if found and found[-1][0] == how:
            found[-1][1].append(piece.key)
        else:
            found.append((how, [piece.key]))
    sentences = [f"{_span(keys)} {'is' if len(keys) == 1 else 'are'} {how}." for how, keys in found]
    more = len(sentences) - _MOST_CHANGES
    return [*sentences[:_MOST_CHANGES], f"And {more} more changes."] if more > 0 else sentences


def _span(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {keys[1]}" if len(keys) == 2 else f"{keys[0]} to {keys[-1]}"


def in_numbers_of(question: Question, plan: Plan) -> dict[str, Device] | None:
    """The planner's map in the numbers of the map that was judged; ``None`` when it uses a GPU that has no number."""
    numbers: Mapping[int, int] = {gpu: number for number, gpu in enumerate(question.gpus)}
    gpus = [stage.gpu for stage in plan.stages]
    if not plan.fits or any(gpu not in numbers for gpu in gpus):
        return None
    return {
        key: numbers[gpus[position]] if isinstance(position, int) else position for key, position in plan.device_map.items()
    }
