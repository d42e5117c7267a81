"""What each GPU of an ``auto`` map needs, and the longest prompt it takes: judged as the plan is, wherever that can be.

Where a map gives every GPU a run of the chain, as a plan does, the plan's own judge decides. Otherwise each GPU is priced
by the formulas for what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..model import Registered
from .auto_replay import Device, Placed
from .budget import Budget
from .map_devices import main_device
from .memory import Footprint, Holding, unit_bytes
from .order import Split
from .place import largest
from .problem import Problem

QUESTIONS = 3
"""Times the allocator is asked: each halves what is not known."""


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU's part of an ``auto`` map."""

    ordinal: int
    """As torch numbers it."""
    budget: Budget
    footprint: Footprint
    holding: Holding
    run: tuple[int, int]
    """Atoms of a stage with as many layers, which lends its fragmentation."""
    is_stage: bool
    """True when it holds exactly those atoms, as a stage of a plan would."""

    def need_bytes(self, text_tokens: int) -> int:
        """Weights, KV cache, activations and fragmentation; 0 for a GPU that gets nothing."""
        if not self.holding.weights_bytes:
            return 0
        if self.is_stage:
            return self.footprint.needs(text_tokens)(*self.run, self.holding.is_main)
        # A head alone loses nothing, but in a training step beside the loss.
        loses = self._has_work or self.footprint.workload.training is not None
        lost = self.footprint.lost_of(self.holding, self.run, text_tokens) if loses else 0
        return self.footprint.need_of(self.holding, text_tokens).total_bytes + lost

    @property
    def _has_work(self) -> bool:
        return bool(self.holding.layers or self.holding.has_tower or self.holding.has_embedding)


def shares_of(problem: Problem, items: Sequence[Registered], placed: Placed, budgets: Sequence[Budget]) -> list[Share]:
    """Add up what a map puts on each GPU, in the order of torch's ordinals."""
    own: list[list[Registered]] = [[] for _ in budgets]
    layers: list[set[str]] = [set() for _ in budgets]
    begun: set[str] = set()
    holders: dict[str, set[Device]] = {}
    for item in items:
        device = placed.devices[item.unit.key]
        if item.unit.elements:
            holders.setdefault(item.owner, set()).add(device)
        is_new_layer = item.unit.role == "layer" and item.owner not in begun
        begun.add(item.owner)
        if isinstance(device, int):
            own[device].append(item)
            if is_new_layer:
                layers[device].add(item.owner)
    # Where the units of each atom are that have weights.
    atoms = [set[Device]().union(*(holders.get(unit.key, ()) for unit in atom.units)) for atom in problem.atoms]
    shares = [
        _share(problem, own[ordinal], len(layers[ordinal]), (ordinal, budget), atoms)
        for ordinal, budget in enumerate(budgets)
    ]
    main = main_device(placed.device_map.values())
    if any(share.holding.has_embedding for share in shares if share.ordinal != main):
        return [_beside_main(share, is_main=share.ordinal == main) for share in shares]
    return shares


def _beside_main(share: Share, *, is_main: bool) -> Share:
    return msgspec.structs.replace(share, holding=msgspec.structs.replace(share.holding, is_main=is_main))


def _share(
    problem: Problem,
    own: Sequence[Registered],
    layers: int,
    place: tuple[int, Budget],
    atoms: Sequence[set[Device]],
) -> Share:
    ordinal, budget = place
    roles = {item.unit.role for item in own if item.unit.elements}
    holding = Holding(
        weights_bytes=sum(unit_bytes(item.unit, problem.profile, problem.workload) for item in own),
        layers=layers,
        has_tower="vision" in roles,
        has_embedding="embedding" in roles,
        has_head=any(item.unit.role == "head" for item in own),
    )
    touched = [position for position, devices in enumerate(atoms) if ordinal in devices]
    is_stage = bool(touched) and all(atoms[position] == {ordinal} for position in touched)
    if is_stage and touched[-1] - touched[0] + 1 == len(touched):
        run = (touched[0], touched[-1] + 1)
    else:
        is_stage = False
        first = 0 if holding.has_tower or holding.has_embedding else min(1, len(atoms) - 1)
        run = (first, min(max(first + 1, first + layers), len(atoms)))
    return Share(ordinal=ordinal, budget=budget, footprint=problem.footprint, holding=holding, run=run, is_stage=is_stage)


def as_split(problem: Problem, shares: Sequence[Share]) -> Split | None:
    """The map as a split of the chain, where it is one; ``None`` otherwise, or where pins would forbid it."""
    used = sorted((share for share in shares if share.holding.weights_bytes), key=lambda share: share.run)
    ends = [share.run[1] for share in used]
    is_chain = [share.run[0] for share in used] == [0, *ends[:-1]] and ends[-1:] == [len(problem.atoms)]
    if not is_chain or not all(share.is_stage for share in used) or problem.policy.pins:
        return None
    positions = {budget.gpu.index: position for position, budget in enumerate(problem.budgets)}
    return Split(tuple(positions[share.budget.gpu.index] for share in used), tuple(ends))


def longest_text_tokens(problem: Problem, shares: Sequence[Share], split: Split | None) -> int | None:
    """Most text tokens of one prompt that all of them can take; ``None`` when the workload itself does not fit.

    Where the map is a split and the allocator can be asked, it is asked a few times, between what the formulas promise and
    what lives at once: a side remark must not take longer than the plan.
    """
    low, most = problem.workload.text_tokens, max(problem.workload.text_tokens, problem.most_text_tokens)

    def holds(text_tokens: int) -> bool:
        return all(share.need_bytes(text_tokens) <= share.budget.available_bytes for share in shares)

    sure = largest(low, most, holds) if holds(low) else None
    if split is None or problem.replay is None or sure == most:
        return sure
    bound = problem.bare.longest_text_tokens(split)
    if bound is None:
        return sure
    if sure is None:
        if not problem.takes(split, low):
            return None
        sure = low
    for _ in range(QUESTIONS):
        middle = (sure + bound + 1) // 2
        if problem.takes(split, middle):
            sure = middle
        else:
            bound = middle - 1
    return sure
