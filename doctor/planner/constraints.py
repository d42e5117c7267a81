"""From units to the chain that is cut: what must share a device, in the order of execution."""

from __future__ import annotations

from itertools import pairwise

import msgspec

from ..data.joins import WHOLE
from ..errors import ModelFileError
from ..model import ModelProfile, Unit
from .quantized_rules import why_on_one_gpu


class Atom(msgspec.Struct, frozen=True):
    """Units that no cut may part."""

    units: tuple[Unit, ...]
    has_tower: bool = False
    """Holds the vision tower, or a part of it: pixels are encoded where it is."""
    has_embedding: bool = False
    """The prompt is embedded here, and the image features are written into it."""

    @property
    def layers(self) -> int:
        """Text layers in it."""
        return sum(unit.role == "layer" for unit in self.units)

    @property
    def has_head(self) -> bool:
        """True when the logits are computed here."""
        return any(unit.role == "head" for unit in self.units)


class Chain(msgspec.Struct, frozen=True):
    """The atoms of a model in execution order; stages are runs of them."""

    atoms: tuple[Atom, ...]
    """First, as one atom or a few, the anchor: whatever the prompt meets before the first layer."""
    constraints: tuple[str, ...]
    """What acted, one sentence each."""
    is_tower_broken: bool = False
    """True when cuts between the blocks of the vision tower are allowed."""


def can_break_tower(profile: ModelProfile) -> bool:
    """Whether the vision tower has parts that a cut may separate."""
    is_whole = profile.model_type in WHOLE or why_on_one_gpu(profile) is not None
    return not is_whole and any(part.layer is not None for unit in profile.units for part in unit.parts)


def chain(profile: ModelProfile, *, breaks_tower: bool = False) -> Chain:
    """Join the units that must share a device.

    - The anchor holds the vision tower, projector, bare parameters, embedding and rotary tables: image features are
      written into the embeddings, and no hook moves a bare parameter.
    - Tied units share a device, at the earliest of them.
    - A class that runs an inner ``generate`` wants its logits on the device of the inputs: norm, head and last layer join
      the anchor.
    - A family that no cut suits (``WHOLE``) is one atom, and so is a checkpoint whose quantizer takes one GPU alone.
    - Otherwise the head stays with the norm, behind the layers; a norm without its head stays with the last layer.

    Args:
        profile: The model.
        breaks_tower: Allow cuts between the blocks of a vision tower that has parts. What is before the blocks is one
            atom with the first of them; what is behind them, bare parameters included, stays with the embedding.

    Raises:
        ModelFileError: The profile has no layers, or ties a unit that it does not have.
    """
    layers = [unit.key for unit in profile.units if unit.role == "layer"]
    if not layers:
        raise ModelFileError(f"{profile.name}: no text layers were found in the checkpoint, so there is nothing to place.")
    whole = WHOLE.get(profile.model_type) or why_on_one_gpu(profile)
    if whole:
        why = f"All of the model stays on one GPU: {whole}."
        return Chain((Atom(profile.units, has_tower=True, has_embedding=True),), (why,))
    is_broken = breaks_tower and can_break_tower(profile)
    tail = len(layers) + 1
    place = {unit.key: tail if unit.role in ("norm", "head") else 0 for unit in profile.units}
    place.update({key: position for position, key in enumerate(layers, start=1)})
    constraints = []
    if is_broken:
        constraints.append(
            "The vision tower is cut between its blocks, since it fits on no GPU as a whole; what is behind its blocks "
            "stays with the projector and the token embedding."
        )
    elif any(unit.role in ("vision", "projector") for unit in profile.units):
        constraints.append(
            "Vision tower, projector and token embedding stay on one GPU: image features are written into the embeddings."
        )
    if profile.runs_inner_generate:
        place.update({unit.key: 0 for unit in profile.units if unit.role in ("norm", "head")})
        place[layers[-1]] = 0
        constraints.append(
            f"Norm, head and last layer stay on the first GPU: {profile.architecture} runs an inner generate, "
            "which leaves the logits where the head is."
        )
    for group in profile.tied:
        unknown = [key for key in group if key not in place]
        if unknown:
            raise ModelFileError(f"{profile.name}: {unknown[0]} is tied, but no such unit was found in the checkpoint.")
        place.update(dict.fromkeys(group, min(place[key] for key in group)))
        constraints.append(f"Tied weights share a GPU: {', '.join(group)}.")
    atoms = [Atom(tuple(unit for unit in profile.units if place[unit.key] == position)) for position in range(tail + 1)]
    if not atoms[tail].has_head:
        atoms[tail - 1 :] = [Atom(atoms[tail - 1].units + atoms[tail].units)]
    first, *rest = (atom for atom in atoms if atom.units)
    anchor = _broken(first) if is_broken else [msgspec.structs.replace(first, has_tower=True, has_embedding=True)]
    return Chain((*anchor, *rest), tuple(constraints), is_tower_broken=is_broken)


def _broken(anchor: Atom) -> list[Atom]:
    """The anchor with its vision towers cut between their blocks; the last atom is where the prompt is embedded."""
    result: list[Atom] = []
    remaining: list[Unit] = []
    for unit in anchor.units:
        blocks = [number for number, part in enumerate(unit.parts) if part.layer is not None]
        if not blocks:
            remaining.append(unit)
            continue
        # The first run has what is before the blocks, too, and each later one what stands between it and its block.
        borders = [0, *(number + 1 for number in blocks)]
        result += [Atom(unit.parts[a:b], has_tower=True) for a, b in pairwise(borders)]
        remaining += unit.parts[blocks[-1] + 1 :]
    if not remaining:
        # A tower that is all blocks, and no embedding: the last block is where its output is met.
        return [*result[:-1], msgspec.structs.replace(result[-1], has_embedding=True)]
    has_tower = any(unit.role == "vision" for unit in remaining)
    return [*result, Atom(tuple(remaining), has_tower=has_tower, has_embedding=True)]
