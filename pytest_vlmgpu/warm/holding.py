"""The leases of a warm host: it has its GPUs whenever no run does, and gives way to whoever asks while it is idle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..leasing.leases import LeaseError, Leases

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .records import Order

_UNNAMED_S = 2.0
"""How long a lease may be held by nobody known: its file is emptied a moment before the lock goes."""


class Evicted(Exception):  # noqa: N818 - how a host ends, as it should
    """The GPUs are somebody else's now; the text says why."""


class Holding:
    """Takes leases back when a run has ended, and notices when another run wants them.

    Args:
        order: Of the host.
    """

    def __init__(self, order: Order) -> None:
        self._gpus = order.gpus
        self._runs = set(order.runs)
        self._leases: Leases | None = None
        self._about: dict[str, object] = {}
        self._strange_since: float | None = None
        if order.gpus:
            self._about = {"warm": order.label}
            self._leases = Leases(Path(order.lease_dir), self._about)

    def know(self, runs: Iterable[int]) -> None:
        """Note processes of runs that may hold the leases while they have the model."""
        self._runs.update(runs)

    def give(self) -> None:
        """Let go of the leases: a run takes them now."""
        if self._leases is not None:
            self._leases.release()

    def check(self, weights: Mapping[str, int], *, is_idle: bool) -> None:
        """Take the leases if no run has them; called again and again.

        Args:
            weights: GPU UUID to bytes that are given back when the host ends.
            is_idle: No run has the model, nor is about to.

        Raises:
            Evicted: Somebody else has them, or wants them.
        """
        if self._leases is None:
            return
        if self._leases.held:
            if is_idle and self._leases.are_asked_for():
                raise Evicted("another run wants the GPUs")
            return
        if not is_idle:
            return
        self._about["warm_bytes"] = dict(weights)
        try:
            taken = self._leases.take(self._gpus)
        except LeaseError as error:
            raise Evicted(str(error)) from None
        if not taken:
            self._strange_since = None
            return
        self._leases.release()
        pids = [self._leases.holder_pid(name) for name in taken]
        if all(pid in self._runs for pid in pids):
            self._strange_since = None
            return
        now = time.monotonic()
        self._strange_since = self._strange_since or now
        if any(pid is not None and pid not in self._runs for pid in pids) or now - self._strange_since > _UNNAMED_S:
            raise Evicted(f"another run has {', '.join(taken)}")
