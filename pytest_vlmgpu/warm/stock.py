"""What a warm host keeps: a model taken apart, ready to be lent, and whether it still is what was loaded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..watching.meter import empty_cache
from . import facts
from .facts import NotKept, revision_of
from .records import Lent
from .sharing import Taken, into_shared_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .records import Block, Order


class Stock:
    """One model.

    Args:
        taken: The model, on the CPU or on GPUs.
        label: For the name of its memory.
        uuids: CUDA ordinal to UUID; empty on the CPU.
        load_seconds: How long it took to load.

    Raises:
        NotKept: There is no room for it.
    """

    def __init__(self, taken: Taken, label: str, uuids: dict[int, str], load_seconds: float) -> None:
        self._taken = taken
        self._uuids = uuids
        self._load_seconds = load_seconds
        self._loaded_at = time.monotonic()
        self._records = taken.records()
        self._memory: int | None = None
        self._blocks: tuple[Block, ...] = ()
        self._storages: list[Any] = []
        self._sums: list[int] = []
        self._counters: set[bytes] = set()
        """Names of torch's files of counters."""
        self.weights: dict[str, int] = {}
        """GPU UUID to bytes there."""
        if uuids:
            from .cuda_sharing import checksum

            self._storages = [taken.storage(group) for group in range(len(taken.groups))]
            self._sums = [checksum(storage) for storage in self._storages]
            for storage in self._storages:
                uuid = uuids[storage.device.index]
                self.weights[uuid] = self.weights.get(uuid, 0) + storage.numel()
            empty_cache()  # what loading has left is free for whoever attaches
        else:
            self._memory, self._blocks = into_shared_memory(taken, label)

    @property
    def is_for_one(self) -> bool:
        """True where those who have it can change it."""
        return bool(self._uuids)

    @property
    def age_s(self) -> float:
        """Since it was loaded."""
        return time.monotonic() - self._loaded_at

    def is_intact(self) -> bool:
        """True while no byte differs from what was loaded; on the CPU the kernel sees to that."""
        if not self._storages:
            return True
        from .cuda_sharing import checksum

        is_same = [checksum(storage) for storage in self._storages] == self._sums
        empty_cache()
        return is_same

    def close(self) -> None:
        """Remove what would outlive this process."""
        if self._counters:
            from .cuda_sharing import remove_counters

            remove_counters(self._counters)

    def lend(self) -> tuple[Lent, Sequence[int]]:
        """The model for another process, and the descriptors that go with it."""
        blocks, descriptors, size = self._blocks, [], 0
        if self._memory is None:
            from .cuda_sharing import exported

            blocks = exported(self._storages, self._uuids)
            self._counters.update(block.cuda.counter for block in blocks if block.cuda is not None)
        else:
            descriptors = [self._memory]
            size = max((block.offset + block.size_bytes for block in blocks), default=0)
        lent = Lent(
            skeleton=self._taken.skeleton,
            tensors=self._records,
            blocks=blocks,
            shared_bytes=max(size, 1),
            is_dispatched=self._taken.is_dispatched,
            load_seconds=self._load_seconds,
            age_s=self.age_s,
        )
        return lent, descriptors


def load(order: Order) -> Stock:
    """Load a model as a run does, and take it apart.

    Raises:
        NotKept: It cannot be kept; the text is the end of a sentence.
        LoadFailure: It cannot be loaded.
    """
    import torch

    from vlm_doctor.codec import from_json
    from vlm_doctor.placement import Plan

    from ..models.loading import load as load_model
    from ..models.loading import torch_ordinals
    from ..models.source import find_source

    plan = from_json(order.plan, Plan, where="the order of a warm host") if order.plan is not None else None
    source = find_source(order.name)
    here = facts.facts_of(source.name, revision_of(source), plan, order.dtype)
    changed = facts.difference(order.facts, here)
    if changed:
        raise NotKept(f"the host that was to keep it sees another {changed[0]}")
    loaded = load_model(order.name, plan, dtype=order.dtype, ordinals=order.ordinals)
    if loaded.model is None or loaded.offloaded_bytes:
        raise NotKept("part of it is in host memory")
    taken = Taken(loaded.model, is_on_gpus=plan is not None)
    uuids: dict[int, str] = {}
    if plan is not None:
        uuids = {ordinal: uuid for uuid, ordinal in torch_ordinals(order.ordinals).items()}
        if any(not taken.storage(group).is_cuda for group in range(len(taken.groups))):
            raise NotKept("some of its tensors are not on a GPU", is_for_good=True)
    seconds = loaded.load_seconds
    loaded.model = loaded.processor = None
    torch.set_grad_enabled(False)
    return Stock(taken, order.label, uuids, seconds)
