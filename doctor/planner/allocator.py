"""torch's caching allocator, replayed: what a GPU has to give so that a program of allocations runs.

Torch asks the driver for segments and cuts tensors out of them; a segment goes back only when no tensor is left in it. So a
program can run out of memory although the tensors that live at once would fit, and whether it does depends on the order of
things, not on a share of anything. The rules, for one stream and the default settings (source:
``c10/cuda/CUDACachingAllocator.cpp`` of torch 2.6 to 2.13):

- Sizes are rounded up to 512 bytes. Up to 1 MiB they come from segments of 2 MiB, below 10 MiB from segments of 20 MiB, and
  others from a segment of their own, rounded up to 2 MiB. The two pools do not share.
- The smallest free block that is large enough serves, the lowest address among equals; what is left of it stays free,
  unless it is at most 1 MiB (in the pool of small ones, 0).
- A freed block is joined with free neighbors in its segment.
- Where no block serves and the driver has nothing left, all segments that are free as a whole are given back; then the
  driver is asked once more.

The driver hands out falling addresses, as was seen in the memory histories of H100 cards. Replayed against those, segments
and failures are the same to the byte (tests/doctor/planner/test_allocator.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import itemgetter

from ..units import MIB

ROUND_BYTES = 512
SMALL_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB
SEGMENT_ROUND_BYTES = 2 * MIB
_ADDRESSES = 2**44
"""Further apart than any two addresses in one segment."""


class OutOfMemoryError(Exception):
    """The driver has too little left for a segment, with everything that is free given back."""


class Block:
    """A piece of a segment, in use or free."""

    __slots__ = ("address", "before", "behind", "is_free", "is_small", "size")

    def __init__(self, size: int, address: int, before: Block | None, behind: Block | None, *, is_small: bool) -> None:
        self.size = size
        self.address = address
        self.before = before
        self.behind = behind
        self.is_small = is_small
        self.is_free = False


_Free = list[tuple[int, int, Block]]
_place = itemgetter(0, 1)


class Allocator:
    """One GPU's allocator.

    Args:
        capacity_bytes: What the driver can give in all; ``None`` is without end.
        reserved_bytes: Of segments that are there from the beginning: weights.
        hole_bytes: Of these, what is free in the segment of large tensors.
    """

    def __init__(self, capacity_bytes: int | None = None, reserved_bytes: int = 0, hole_bytes: int = 0) -> None:
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = self.peak_reserved_bytes = reserved_bytes
        self.allocated_bytes = self.peak_allocated_bytes = 0
        """Of tensors made here, weights not counted."""
        self._large: _Free = []
        self._small: _Free = []
        self._segments = 0
        if hole_bytes:
            weights = Block(0, 0, None, None, is_small=False)
            weights.behind = hole = Block(hole_bytes, 0, weights, None, is_small=False)
            hole.is_free = True
            self._large.append((hole.size, hole.address, hole))

    def make(self, size_bytes: int) -> Block:
        """Find room for a tensor.

        Raises:
            OutOfMemoryError: There is none.
        """
        size = -(-size_bytes // ROUND_BYTES) * ROUND_BYTES or ROUND_BYTES
        is_small = size <= SMALL_BYTES
        free = self._small if is_small else self._large
        at = bisect_left(free, (size,))
        block = free.pop(at)[2] if at < len(free) else self._segment(size, is_small=is_small)
        rest = block.size - size
        if rest > (0 if is_small else SMALL_BYTES):
            behind = Block(rest, block.address + size, block, block.behind, is_small=is_small)
            if block.behind is not None:
                block.behind.before = behind
            block.behind = behind
            block.size = size
            behind.is_free = True
            insort(free, (rest, behind.address, behind))
        block.is_free = False
        self.allocated_bytes += block.size
        # Not max(): this is called a hundred thousand times.
        if self.allocated_bytes > self.peak_allocated_bytes:  # noqa: PLR1730
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Let a tensor go.

        Raises:
            ValueError: It is gone already: whoever wrote the program counts a tensor twice.
        """
        if block.is_free:
            raise ValueError(f"a block of {block.size} bytes is freed twice")
        block.is_free = True  # also where it is joined with the one before it, which then stands for both
        free = self._small if block.is_small else self._large
        self.allocated_bytes -= block.size
        before, behind = block.before, block.behind
        if before is not None and before.is_free:
            del free[bisect_left(free, (before.size, before.address))]
            before.size += block.size
            before.behind = behind
            if behind is not None:
                behind.before = before
            block = before
        if behind is not None and behind.is_free:
            del free[bisect_left(free, (behind.size, behind.address))]
            block.size += behind.size
            block.behind = behind.behind
            if behind.behind is not None:
                behind.behind.before = block
        insort(free, (block.size, block.address, block))

    def state(self) -> object:
        """Free blocks and reserved bytes: from equal states with equal tensors in use, equal requests do the same."""
        return tuple(map(_place, self._large)), tuple(map(_place, self._small)), self.reserved_bytes

    def _segment(self, size: int, *, is_small: bool) -> Block:
        if is_small:
            total = SMALL_SEGMENT_BYTES
        elif size < OWN_SEGMENT_BYTES:
            total = LARGE_SEGMENT_BYTES
        else:
            total = -(-size // SEGMENT_ROUND_BYTES) * SEGMENT_ROUND_BYTES
        if self.capacity_bytes is not None and self.reserved_bytes + total > self.capacity_bytes:
            self._give_back(self._large)
            self._give_back(self._small)
            if self.reserved_bytes + total > self.capacity_bytes:
                raise OutOfMemoryError
        self.reserved_bytes += total
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._segments += 1
        return Block(total, -self._segments * _ADDRESSES, None, None, is_small=is_small)

    def _give_back(self, free: _Free) -> None:
        """Give whole segments back to the driver."""
        kept = [entry for entry in free if entry[2].before is not None or entry[2].behind is not None]
        self.reserved_bytes -= sum(entry[0] for entry in free) - sum(entry[0] for entry in kept)
        free[:] = kept
