"""Pins of the user: which GPU a part of the model must be on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import UsageError
from ..likeness import nearest
from ..model import ModelProfile, Unit
from ..workload import Policy
from .budget import Budgets
from .constraints import Chain

_SHOWN = 3
_CUTOFF = 0.6
"""Likeness of a name that is worth proposing; the default of difflib."""


def pinned(chain: Chain, policy: Policy) -> list[int | None]:
    """For each atom, the index of the GPU that it must be on; ``None`` where no pin says so."""
    return [next((gpu for _, gpu in _pins_of(atom.units, policy)), None) for atom in chain.atoms]


def _pins_of(units: Sequence[Unit], policy: Policy) -> Iterator[tuple[str, int]]:
    """Pins that cover one of the units."""
    return ((path, gpu) for path, gpu in policy.pins if any(_covers(path, unit.key) for unit in units))


def _covers(path: str, key: str) -> bool:
    """Whether a module path is the key or a parent of it."""
    return key == path or key.startswith(f"{path}.")


def validate_pins(policy: Policy, profile: ModelProfile, chain: Chain, budgets: Budgets) -> None:
    """Check that the pins name parts of the model and GPUs that can be used, and do not contradict each other.

    Raises:
        UsageError: They do not; one sentence says which, and what to do.
    """
    if not policy.pins:
        return
    for path, gpu in policy.pins:
        if not any(_covers(path, unit.key) for unit in profile.units):
            raise UsageError(f"Pin {path}={gpu}: {_no_such_part(path, profile)}")
        _refuse_unusable(path, gpu, budgets)
    for atom in chain.atoms:
        pins = list(_pins_of(atom.units, policy))
        other = next((pin for pin in pins if pin[1] != pins[0][1]), None)
        if other is not None:
            raise UsageError(
                f"Pins {_said(pins[0])} and {_said(other)} contradict each other: no cut may part "
                f"{_named([unit.key for unit in atom.units])}; pin them to one GPU."
            )
    _refuse_return(policy, chain)
    gpus = {gpu for _, gpu in policy.pins}
    if policy.max_gpus is not None and len(gpus) > policy.max_gpus:
        raise UsageError(f"The pins name {len(gpus)} GPUs, and at most {policy.max_gpus} may be used: allow more GPUs.")


def _no_such_part(path: str, profile: ModelProfile) -> str:
    """Why a path names nothing, and what it may have meant."""
    holder = next((unit.key for unit in profile.units if path.startswith(f"{unit.key}.")), None)
    if holder is not None:
        return f"it is inside {holder}, which is placed as a whole; pin {holder}."
    parents = {".".join(parts[:length]) for parts in _split(profile) for length in range(1, len(parts) + 1)}
    near = nearest(path, sorted(parents), most=_SHOWN, cutoff=_CUTOFF)
    ending = sorted(parent for parent in parents if parent.endswith(f".{path}"))[:_SHOWN]
    proposed = ending or near
    if proposed:
        return f"{profile.name} has no such module; did you mean {' or '.join(proposed)}?"
    roots = sorted({parts[0] for parts in _split(profile)})
    return f"{profile.name} has no such module; its parts are below {_named(roots)}."


def _split(profile: ModelProfile) -> Iterator[list[str]]:
    return (unit.key.split(".") for unit in profile.units)


def _refuse_unusable(path: str, gpu: int, budgets: Budgets) -> None:
    usable = [budget.gpu.index for budget in budgets.usable]
    if gpu in usable:
        return
    reason = next((left.reason for left in budgets.excluded if left.gpu == gpu), "it is not among the GPUs to use")
    can_be = f"GPU {', '.join(map(str, usable))}" if usable else "no GPU"
    raise UsageError(f"Pin {path}={gpu}: GPU {gpu} cannot be used ({reason}); {can_be} can.")


def _refuse_return(policy: Policy, chain: Chain) -> None:
    """Stages are contiguous: a chain that leaves a GPU does not come back to it."""
    left: list[int] = []
    for atom, gpu in zip(chain.atoms, pinned(chain, policy), strict=True):
        if gpu is None or (left and left[-1] == gpu):
            continue
        if gpu in left:
            pin = next(_pins_of(atom.units, policy))
            raise UsageError(
                f"Pin {_said(pin)}: parts before it are pinned to GPU {gpu} and then to GPU {left[-1]}, and a GPU takes "
                "one contiguous part of the model; pin in the order of execution."
            )
        left.append(gpu)


def _said(pin: tuple[str, int]) -> str:
    return f"{pin[0]}={pin[1]}"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
