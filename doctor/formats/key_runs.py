"""Runs of numbered keys, so that 40 layers of a ``device_map`` read as one line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class KeyRun(NamedTuple):
    """Keys ``prefix + str(n)`` for ``first <= n <= last``; or one key, with ``first`` and ``last`` ``None``."""

    prefix: str
    first: int | None = None
    last: int | None = None

    @property
    def label(self) -> str:
        """``model.layers.0-19``, or the key itself."""
        return self.prefix if self.first is None or self.last is None else f"{self.prefix}{self.first}-{self.last}"


def runs(keys: Iterable[str], *, shortest: int = 3) -> tuple[KeyRun, ...]:
    """Join neighbors that count up by one.

    Args:
        keys: Module paths in order.
        shortest: Fewer keys than this stay single.

    Returns:
        Runs that name exactly ``keys``, in the same order.
    """
    found: list[KeyRun] = []
    for key in keys:
        prefix, number = _split(key)
        last = found[-1] if found else None
        if number is not None and last is not None and last.prefix == prefix and last.last == number - 1:
            found[-1] = last._replace(last=number)
        else:
            found.append(KeyRun(prefix, number, number) if number is not None else KeyRun(key))
    return tuple(part for run in found for part in _unless_short(run, shortest))


def _split(key: str) -> tuple[str, int | None]:
    """``model.layers.7`` into ``model.layers.`` and 7; a key that does not end in a plainly written number stays whole."""
    head, dot, tail = key.rpartition(".")
    if dot and tail.isascii() and tail.isdigit() and len(tail) < 10 and str(int(tail)) == tail:
        return head + dot, int(tail)
    return key, None


def _unless_short(run: KeyRun, shortest: int) -> tuple[KeyRun, ...]:
    if run.first is None or run.last is None or run.last - run.first + 1 >= shortest:
        return (run,)
    return tuple(KeyRun(f"{run.prefix}{number}") for number in range(run.first, run.last + 1))
