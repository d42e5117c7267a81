"""From units to the chain that is cut: what must share a device, in the order of execution."""

from __future__ import annotations

import msgspec

from ..errors import ModelFileError
from ..model import ModelProfile, Unit


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
    """The first is the anchor: whatever the prompt meets before the first layer."""
    constraints: tuple[str, ...]
    """What acted, one sentence each."""


def chain(profile: ModelProfile) -> Chain:
    """Join the units that must share a device.

    - The anchor holds the vision tower, projector, bare parameters, embedding and rotary tables: image features are
      written into the embeddings, and no hook moves a bare parameter.
    - Tied units share a device, at the earliest of them.
    - A class that runs an inner ``generate`` wants its logits on the device of the inputs: norm, head and last layer join
      the anchor.
    - Otherwise the head stays with the norm, behind the layers; a norm without its head stays with the last layer.

    Raises:
        ModelFileError: The profile has no layers, or ties a unit that it does not have.
    """
    layers = [unit.key for unit in profile.units if unit.role == "layer"]
    if not layers:
        raise ModelFileError(f"{profile.name}: no text layers were found in the checkpoint, so there is nothing to place.")
    tail = len(layers) + 1
    place = {unit.key: tail if unit.role in ("norm", "head") else 0 for unit in profile.units}
    place.update({key: position for position, key in enumerate(layers, start=1)})
    constraints = []
    if any(unit.role in ("vision", "projector") for unit in profile.units):
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
    return Chain((msgspec.structs.replace(first, has_tower=True, has_embedding=True), *rest), tuple(constraints))
