"""One question to the planner, as a record: changing a field asks the same of another workload or machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import msgspec

from ..machine import Machine
from ..model import ModelProfile
from ..topology import hop_rank
from ..trace import Traces
from ..visibility import visible_gpus
from ..workload import Policy, Workload
from .budget import Budget, Budgets, budgets
from .constraints import Atom, Chain
from .fleet import Fleet, Room
from .image_tokens import image_load
from .map_devices import MOST_IN_ORDER, main_number
from .memory import Footprint, StageNeed
from .order import Split
from .pins import pinned
from .place import largest, smallest_count
from .release import release_for
from .search import Choice, choose, closest
from .settle import Replay, replay_of, settle, takes_anyway
from .validate import MAX_TOKENS

_UNKNOWN_HOP = 2_000
"""Rank of a link between GPUs that are not both of the machine: worse than any known one."""


class Problem(msgspec.Struct, frozen=True, dict=True):
    """A model that is to be placed."""

    profile: ModelProfile
    chain: Chain
    workload: Workload
    policy: Policy
    machine: Machine
    hops: Mapping[tuple[int, int], int | None]
    """Rank of the link from one GPU index to another; ``None`` when it must not be used."""
    budgets: tuple[Budget, ...]
    """GPUs that can be used."""
    offloaded: int = 0
    """Atoms at the end of the chain that stay in host memory."""
    alike: Problem | None = None
    """The same parts for another workload or on other GPUs: what is known of them is taken from there."""
    traces: Traces | None = None
    """Allocations that were traced for this workload; ``None`` prices by formulas."""
    is_replayed: bool = True
    """Ask the allocator where the model's allocations are known."""
    is_bare: bool = False
    """Leave out what the allocator wastes: what even a perfect one could not do."""

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """What is placed on GPUs."""
        return self.chain.atoms[: len(self.chain.atoms) - self.offloaded]

    @property
    def offloaded_atoms(self) -> tuple[Atom, ...]:
        """What stays in host memory."""
        return self.chain.atoms[len(self.chain.atoms) - self.offloaded :]

    @cached_property
    def footprint(self) -> Footprint:
        """Prices of the model for the workload."""
        images = image_load(self.profile, self.workload)
        if self.alike is not None:
            return self.alike.footprint.changed(self.workload, images, is_bare=self.is_bare)
        release = release_for(self.profile, self.machine)
        if self.traces is not None:
            from .traced_footprint import TracedFootprint  # most plans have no trace

            return TracedFootprint(
                self.profile,
                self.workload,
                images,
                self.atoms,
                self.offloaded_atoms,
                is_bare=self.is_bare,
                release=release,
                traces=self.traces,
            )
        return Footprint(
            self.profile, self.workload, images, self.atoms, self.offloaded_atoms, is_bare=self.is_bare, release=release
        )

    @cached_property
    def pins(self) -> list[int | None]:
        """For each atom of the chain, the index of the GPU that it is pinned to."""
        if self.alike is not None:
            return self.alike.pins
        return pinned(self.chain, self.policy)

    @cached_property
    def fleet(self) -> Fleet:
        """The GPUs as the search sees them."""
        if self.alike is not None and self.alike.budgets is self.budgets:
            return self.alike.fleet
        pins = [(atom, gpu) for atom, gpu in enumerate(self.pins[: len(self.atoms)]) if gpu is not None]
        indices = [budget.gpu.index for budget in self.budgets]
        rooms = [
            Room(budget.available_bytes, sum(1 << atom for atom, gpu in pins if gpu != budget.gpu.index))
            for budget in self.budgets
        ]
        return Fleet(rooms, lambda a, b: self.hops.get((indices[a], indices[b]), _UNKNOWN_HOP))

    @property
    def knows_host_memory(self) -> bool:
        """Whether it is known what the host can take."""
        return self.machine.host is not None and self.machine.host.memory_available_bytes is not None

    @property
    def counts(self) -> range:
        """Numbers of stages that are allowed and possible; empty when the policy asks for more than there can be."""
        most = min(len(self.budgets), len(self.atoms), self.policy.max_gpus or len(self.budgets))
        return range(self.policy.min_gpus, most + 1)

    @property
    def most_text_tokens(self) -> int:
        """Text tokens beyond which the model has no positions."""
        positions = self.profile.text.max_positions
        if positions is None:
            return MAX_TOKENS
        return positions - self.workload.answer_tokens - self.footprint.images.tokens

    def changed(self, **fields: Any) -> Problem:
        """The same question with other fields of the workload."""
        workload = msgspec.structs.replace(self.workload, **fields)
        return msgspec.structs.replace(self, workload=workload, alike=self)

    def with_offloaded(self, count: int) -> Problem:
        """The same question with so many atoms in host memory."""
        return msgspec.structs.replace(self, offloaded=count, alike=None)

    def with_policy(self, **fields: Any) -> Problem:
        """The same question with other fields of the policy."""
        policy = msgspec.structs.replace(self.policy, **fields)
        found = budgets(self.machine, policy)
        return ask(self.profile, self.workload, policy, self.machine, chain=self.chain, found=found, traces=self.traces)

    def with_gpus(self, count: int) -> Problem:
        """The same question with exactly so many GPUs."""
        policy = msgspec.structs.replace(self.policy, min_gpus=count, max_gpus=count)
        return msgspec.structs.replace(self, policy=policy, alike=self)

    @cached_property
    def bare(self) -> Problem:
        """The same question to a perfect allocator."""
        return msgspec.structs.replace(self, is_bare=True, alike=self)

    @cached_property
    def replay(self) -> Replay | None:
        """The allocator's own judgement; ``None`` where it is not known what the model allocates."""
        gpus = [budget.gpu for budget in self.budgets]
        return replay_of(self.footprint, gpus, self.machine.libraries) if self.is_replayed else None

    def choose(self) -> Choice | None:
        """The best split by the policy, or ``None`` when nothing fits."""
        if self.replay is not None:
            return settle(self)
        return self._by_formulas()

    def _by_formulas(self) -> Choice | None:
        """The best split that also holds what a model takes that begins on another GPU than the main one.

        The search does not know of that: where the workload then does not fit, it is asked again with so much less room.
        """
        for fleet in self._fleets():
            choice = choose(self.footprint, fleet, self.counts, self.most_text_tokens, self.policy.prefer)
            if choice is None and not self._is_led:
                # With less room there is none either.
                break
            longest = self.longest_text_tokens(choice.split) if choice else None
            if choice is not None and longest is not None:
                return msgspec.structs.replace(choice, text_tokens=min(longest, choice.text_tokens))
        return None

    @property
    def _is_led(self) -> bool:
        """Whether the model has to begin on the main GPU: that one computes what is offloaded, as the first stage does."""
        return bool(self.offloaded) and self.policy.keeps_numbers

    def _fleets(self) -> Iterator[Fleet]:
        """The GPUs as the search may see them, one after another until a split holds."""
        if not self._is_led:
            yield self.fleet
            yield self._less_room
        for leader in sorted(self._numbers) if self._is_led else ():
            # None has a lower number than the main one, and none of the others begins.
            yield self.fleet.with_rooms(
                [
                    Room(-1) if number < leader else room._replace(barred=room.barred | (number > leader))
                    for room, number in zip(self.fleet.rooms, self._numbers, strict=True)
                ]
            )

    @cached_property
    def _less_room(self) -> Fleet:
        """The GPUs without what any of them may have to take when the model begins on another than the main one.

        Where GPUs keep their numbers, the one with the highest is the main one of no split over several, as long as numbers
        are what a set has in rising order.
        """
        pixels, logits = self.footprint.copied(self.workload.text_tokens)
        highest = max(self._numbers)
        last = highest if self.policy.keeps_numbers and highest <= MOST_IN_ORDER else None
        more = [pixels + logits * (number != last) for number in self._numbers]
        return self.fleet.with_rooms(
            [
                room._replace(capacity_bytes=room.capacity_bytes - size)
                for room, size in zip(self.fleet.rooms, more, strict=True)
            ]
        )

    @cached_property
    def _numbers(self) -> list[int]:
        """Of each GPU, in a process that lets GPUs keep their numbers; those of no machine come behind the others."""
        order = self.policy.gpus or visible_gpus(self.machine).gpus
        indices = [budget.gpu.index for budget in self.budgets]
        return [order.index(index) if index in order else len(order) + position for position, index in enumerate(indices)]

    def main_stage(self, split: Split) -> int:
        """The stage on the main GPU of a split, where accelerate's hooks take what the model is called with."""
        if not self.policy.keeps_numbers:
            return 0
        numbers = [self._numbers[gpu] for gpu in split.gpus]
        return numbers.index(main_number(numbers))

    def is_main(self, split: Split, stage: int) -> bool | None:
        """As in ``Holding``. Blocks of a tower that is cut may run on other GPUs before the prompt is embedded."""
        main = self.main_stage(split)
        first, end = split.runs[main]
        return None if any(atom.has_embedding for atom in self.atoms[first:end]) else stage == main

    def choose_among(self, counts: range) -> Choice | None:
        """The best split over one of these numbers of GPUs, by the formulas."""
        return choose(self.footprint, self.fleet, counts, self.most_text_tokens, self.policy.prefer)

    def need(self, split: Split, stage: int) -> StageNeed:
        """What one stage of a split needs, item by item."""
        run, position = split.runs[stage], split.gpus[stage]
        if self.replay is None:
            return self.footprint.detail(*run, self.workload.text_tokens, is_main=self.is_main(split, stage))
        capacity_bytes = self.fleet.rooms[position].capacity_bytes
        return self.replay.need(run, position, capacity_bytes, is_main=self.is_main(split, stage))

    def closest_split(self) -> Split | None:
        """The split that lacks least; ``None`` when there is none with as many stages, pins and links as they are."""
        found = closest(self.footprint, self.fleet, self.counts)
        return found[1] if found else None

    def longest_text_tokens(self, split: Split) -> int | None:
        """Most text tokens of a prompt by the formulas; ``None`` when the workload itself does not fit."""
        low, most = self.workload.text_tokens, max(self.workload.text_tokens, self.most_text_tokens)
        return largest(low, most, lambda tokens: self._holds(split, tokens)) if self._holds(split, low) else None

    def takes(self, split: Split, text_tokens: int) -> bool:
        """Whether a split takes a prompt with so much text."""
        return self._holds(split, text_tokens) if self.replay is None else takes_anyway(self, split, text_tokens)

    def _holds(self, split: Split, text_tokens: int) -> bool:
        """The same by the formulas."""
        if self._is_led and self.main_stage(split):
            return False
        return min(self._margins(split, text_tokens)) >= 0

    def _margins(self, split: Split, text_tokens: int) -> list[int]:
        """What each GPU keeps, in bytes, by the formulas."""
        price, rooms = self.footprint.needs(text_tokens), self.fleet.rooms
        return [
            rooms[gpu].margin(partial(price, is_main=self.is_main(split, stage)), *run)
            for stage, (gpu, run) in enumerate(zip(split.gpus, split.runs, strict=True))
        ]

    def margin_bytes(self) -> int | None:
        """Margin in the tightest GPU of the best split; negative when nothing fits, ``None`` when there is no split."""
        found = closest(self.footprint, self.fleet.without_preference, self.counts)
        return found[0] - self._lost(found[1]) if found else None

    def _lost(self, split: Split) -> int:
        """How much less a split keeps where it does not begin on the main GPU."""
        tokens = self.workload.text_tokens
        return split.margin(self.footprint.needs(tokens), self.fleet.rooms) - min(self._margins(split, tokens))

    def fits(self) -> bool:
        """Whether some split fits."""
        need, atoms = self.footprint.needs(self.workload.text_tokens), len(self.atoms)
        if smallest_count(atoms, need, self.fleet.rounded(), self.counts) is None:
            return False
        if self._is_led:
            return self._by_formulas() is not None
        # Only where it is tight does it matter on which GPU the model begins.
        is_ample = smallest_count(atoms, need, self._less_room.rounded(), self.counts) is not None
        return is_ample or self._by_formulas() is not None

    def split_fits(self, split: Split) -> bool:
        """Whether one split fits."""
        return self.takes(split, self.workload.text_tokens)


def ask(
    profile: ModelProfile,
    workload: Workload,
    policy: Policy,
    machine: Machine,
    *,
    chain: Chain,
    found: Budgets,
    traces: Traces | None = None,
) -> Problem:
    """Put a question together; the links are looked at once."""
    indices = [budget.gpu.index for budget in found.usable]
    hops = {(a, b): hop_rank(machine, a, b) for a in indices for b in indices if a != b}
    return Problem(profile, chain, workload, policy, machine, hops, found.usable, traces=traces)
