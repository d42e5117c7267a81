"""A scheduler for pytest-xdist in which every model has one worker that loads it.

It implements the protocol ``xdist.scheduler.Scheduling`` and rests on nothing else of pytest-xdist: until it is known that
gated tests were collected, and in a run without any, the scheduler that ``--dist`` names does everything.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from ..state import CONTROLLER
from .controller import takes_over

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pytest

    from ..collection.groups import Groups
    from .controller import Controller

_LOW_WATER = 2
"""A worker starts a test when it knows the next one, so it needs two. Source: xdist.remote."""
_CHUNKS = 4
"""What is free is sent out in parts of a fourth of each worker's share, as ``--dist load`` does."""


def make(config: pytest.Config, log: Any) -> VlmScheduling | None:
    """The scheduler of this run; ``None`` leaves the choice to pytest-xdist."""
    controller = config.stash.get(CONTROLLER, None)
    if controller is None or not controller.is_local or not takes_over(config):
        if controller is not None:
            controller.share_out_evenly()
        return None
    from xdist import scheduler

    inner = {
        "load": scheduler.LoadScheduling,
        "loadgroup": scheduler.LoadGroupScheduling,
        "worksteal": scheduler.WorkStealingScheduling,
    }[config.getoption("dist")]
    return VlmScheduling(controller, inner(config, log))


class VlmScheduling:
    """Tests of one model go to one worker, in order; all others to whoever has time.

    Args:
        controller: Knows what the tests need, and which GPUs a worker has.
        inner: The scheduler of pytest-xdist that ``--dist`` names.
    """

    def __init__(self, controller: Controller, inner: Any) -> None:
        self._controller = controller
        self._inner = inner
        self._is_ours: bool | None = None
        """``None`` until all tests were collected."""
        self._collections: dict[Any, list[str]] = {}
        self._pending: dict[Any, list[int]] = {}
        """Worker to positions of tests that were sent and have not ended, in order."""
        self._bound: list[deque[int]] = []
        """Of each worker: tests that only it may run."""
        self._free: deque[list[int]] = deque()
        """Tests that any worker may run; those of one ``xdist_group`` together."""
        self._group_of: dict[int, int] = {}
        self._owners: dict[int, int] = {}
        self._with_gpus: set[int] = set()
        """Workers that leave the tests of nobody to the others (``vlm_hide_gpu_from_cpu_tests``)."""

    @property
    def nodes(self) -> list[Any]:
        """All active workers."""
        return list(self._pending) if self._is_ours else self._inner.nodes

    @property
    def collection_is_completed(self) -> bool:
        """True when every worker has said what it collected."""
        return bool(self._is_ours or self._inner.collection_is_completed)

    @property
    def tests_finished(self) -> bool:
        """True when no worker needs to be told about another test."""
        if not self._is_ours:
            return bool(self._inner.tests_finished)
        return not self._is_queued() and all(len(pending) < _LOW_WATER for pending in self._pending.values())

    @property
    def has_pending(self) -> bool:
        """True while tests have not ended."""
        if not self._is_ours:
            return bool(self._inner.has_pending)
        return self._is_queued() or any(self._pending.values())

    def add_node(self, node: Any) -> None:
        """Take in a worker that is ready to collect."""
        self._pending[node] = []
        if not self._is_ours:
            self._inner.add_node(node)

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        """Take in what a worker collected. A replacement that collected other tests gets none and goes home."""
        if not self._is_ours:
            self._inner.add_node_collection(node, collection)
        elif list(collection) != self._collection:
            self._replace(node)
            return
        self._collections[node] = list(collection)

    def schedule(self) -> None:
        """Send the first tests, or make use of a worker that replaced another."""
        if self._is_ours is None:
            groups = self._controller.groups()
            is_same = len({tuple(collection) for collection in self._collections.values()}) == 1
            # Where the workers differ, pytest-xdist says how.
            self._is_ours = groups is not None and is_same
            if groups is not None and is_same:
                self._start(groups)
        if not self._is_ours:
            self._inner.schedule()
            return
        for node in self.nodes:
            self._top_up(node)

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        """Note that a test has ended."""
        if not self._is_ours:
            self._inner.mark_test_complete(node, item_index, duration)
            return
        self._pending[node].remove(item_index)
        self._top_up(node)

    def mark_test_pending(self, item: str) -> None:
        """Run a test again in which a worker crashed (pytest-rerunfailures)."""
        if not self._is_ours:
            self._inner.mark_test_pending(item)
            return
        self._put_back([self._collection.index(item)])
        for node in self.nodes:
            self._top_up(node)

    def remove_pending_tests_from_node(self, node: Any, indices: Sequence[int]) -> None:
        """Only of ``--dist worksteal``: here nothing is stolen."""
        self._inner.remove_pending_tests_from_node(node, indices)

    def remove_node(self, node: Any) -> str | None:
        """Let a worker go; of one that crashed, return the test that it was running and keep the others."""
        if not self._is_ours:
            self._pending.pop(node, None)
            self._collections.pop(node, None)
            crashed: str | None = self._inner.remove_node(node)
            return crashed
        pending = self._pending.pop(node)
        if not pending:
            return None
        self._put_back(pending[1:])
        for other in self.nodes:
            self._top_up(other)
        return self._collection[pending[0]]

    @property
    def _collection(self) -> list[str]:
        return next(iter(self._collections.values()), [])

    def _is_queued(self) -> bool:
        return bool(self._free) or any(self._bound)

    def _start(self, groups: Groups) -> None:
        self._group_of = groups.group_of
        self._owners = self._controller.assign(groups)
        self._with_gpus = set(self._owners.values()) if self._controller.hides_gpus else set()
        self._bound = [deque() for _ in range(self._controller.workers)]
        together: dict[str, list[int]] = {}
        for position in range(len(self._collection)):
            if position in groups.group_of:
                self._bound[self._owners[groups.group_of[position]]].append(position)
            elif position not in groups.bound:
                self._free.append([position])
            elif groups.bound[position] in together:
                together[groups.bound[position]].append(position)
            else:
                together[groups.bound[position]] = [position]
                self._free.append(together[groups.bound[position]])

    def _put_back(self, positions: Iterable[int]) -> None:
        """Queue tests again, before all others."""
        for position in sorted(positions, reverse=True):
            if position in self._group_of:
                self._bound[self._owners[self._group_of[position]]].appendleft(position)
            else:
                self._free.appendleft([position])

    def _replace(self, node: Any) -> None:
        """Let another worker do what is left of a node's tests; where there is none, they fail."""
        node.shutdown()
        slot = self._controller.slot_of(node)
        others = [other for other in self.nodes if not other.shutting_down]
        able = [other for other in others if other in self._collections]
        if not able:
            left = [*self._bound[slot], *(position for part in self._free for position in part if not others)]
            self._bound[slot].clear()
            if not others:
                self._free.clear()
            for position in left:
                self._controller.report_not_run(self._collection[position], node)
            return
        heir = self._controller.slot_of(able[0])
        self._owners = {number: heir if owner == slot else owner for number, owner in self._owners.items()}
        self._bound[heir] += self._bound[slot]
        self._bound[slot].clear()
        self._top_up(able[0])

    def _top_up(self, node: Any) -> None:
        """Send a worker its own tests, then some of those that are free, or home."""
        if node.shutting_down or node not in self._collections:
            return
        pending, bound = self._pending[node], self._bound[self._controller.slot_of(node)]
        chosen = list(bound)
        bound.clear()
        leaves_free = self._leaves_free(node)
        if not leaves_free and len(pending) + len(chosen) <= _LOW_WATER:
            wanted = max(_LOW_WATER, len(self._free) // (_CHUNKS * len(self._pending)))
            while self._free and len(chosen) < wanted:
                chosen += self._free.popleft()
        if chosen:
            pending += chosen
            node.send_runtest_some(chosen)
        if leaves_free or not self._free:
            # It begins its last test only when it knows that this is the last one.
            node.shutdown()

    def _leaves_free(self, node: Any) -> bool:
        """True for a worker with gated tests, as long as there is one without."""
        slots = {other: self._controller.slot_of(other) for other in self.nodes}
        return slots[node] in self._with_gpus and any(
            slot not in self._with_gpus and not other.shutting_down for other, slot in slots.items()
        )
