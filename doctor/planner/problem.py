"""One question to the planner, as a record: changing a field asks the same of another workload or machine."""

from __future__ import annotations

from typing import Any

import msgspec

from ..model import ModelProfile
from ..workload import Policy, Workload
from .budget import Budget
from .constraints import Chain
from .image_tokens import image_load
from .memory import Footprint
from .order import Split, no_preference
from .place import rounded, smallest_count
from .search import closest, longest_text_tokens
from .validate import MAX_TOKENS


class Problem(msgspec.Struct, frozen=True):
    """A model that is to be placed."""

    profile: ModelProfile
    chain: Chain
    workload: Workload
    policy: Policy
    budgets: tuple[Budget, ...]
    """GPUs that can be used."""

    @property
    def footprint(self) -> Footprint:
        """Prices of the model for the workload."""
        return Footprint(self.profile, self.workload, image_load(self.profile, self.workload), self.chain.atoms)

    @property
    def capacities(self) -> list[int]:
        """Bytes that each GPU can give to the model."""
        return [budget.available_bytes for budget in self.budgets]

    @property
    def counts(self) -> range:
        """Numbers of stages that are allowed and possible; empty when the policy asks for more than there can be."""
        most = min(len(self.budgets), len(self.chain.atoms), self.policy.max_gpus or len(self.budgets))
        return range(self.policy.min_gpus, most + 1)

    @property
    def most_text_tokens(self) -> int:
        """Text tokens beyond which the model has no positions."""
        positions = self.profile.text.max_positions
        if positions is None:
            return MAX_TOKENS
        return positions - self.workload.new_tokens - self.footprint.images.tokens

    def changed(self, **fields: Any) -> Problem:
        """The same question with other fields of the workload."""
        return msgspec.structs.replace(self, workload=msgspec.structs.replace(self.workload, **fields))

    def with_gpus(self, count: int) -> Problem:
        """The same question with exactly so many GPUs."""
        return msgspec.structs.replace(self, policy=msgspec.structs.replace(self.policy, min_gpus=count, max_gpus=count))

    def longest_text_tokens(self, split: Split) -> int | None:
        """Most text tokens of one prompt that a split can take; ``None`` when the workload itself does not fit."""
        return longest_text_tokens(self.footprint, self.capacities, split, self.most_text_tokens)

    def margin_bytes(self) -> int | None:
        """Margin in the tightest GPU of the best split; negative when nothing fits, ``None`` when there is no split."""
        found = closest(self.footprint, self.capacities, self.counts, no_preference)
        return found[0] if found else None

    def fits(self) -> bool:
        """Whether some split fits."""
        footprint = self.footprint
        need = footprint.needs(self.workload.text_tokens)
        return smallest_count(len(footprint.atoms), need, rounded(self.capacities), self.counts) is not None
