"""A trace, replayed through torch's allocator: what ``replay.Program`` is for scripts, for any model that can be traced."""

from __future__ import annotations

from collections.abc import Sequence

from ..trace import BEFORE, TOWER
from .allocator import SMALL_BYTES, Allocator, Block
from .replay import Held, Replayed
from .traced import Growth, Regimes, visits_of


class TracedProgram(Replayed):
    """The events of a model's real code, at any length of the prompt.

    Args:
        regimes: Traces, fitted.
        layer_kinds: Kind of each layer of the model, in order, in the words of ``Held.kinds``; empty where they are alike.
        new_tokens: Tokens that are made.
    """

    def __init__(self, regimes: Regimes, layer_kinds: Sequence[str] = (), *, new_tokens: int = 0) -> None:
        self._regimes = regimes
        self._kinds = tuple(layer_kinds)
        self._later = max(0, new_tokens - 2)
        self._tokens = -1
        self._sizes: list[int] = []
        self._programs: dict[tuple[int, frozenset[int], bool], list[tuple[int, int, bool]]] = {}

    def places_of(self, held: Held, tokens: int) -> frozenset[int]:
        """Places of a stage that is told by its kinds of layers: the first run of layers that has them."""
        layers = self._growth(tokens).shape.layers
        count = len(held.kinds)
        first = 0
        if not held.is_first:
            first = layers - count if held.has_head else self._find(held.kinds, layers)
        places = set(range(first, first + count))
        places.update([TOWER, BEFORE] * held.is_first + [layers] * held.has_head)
        return frozenset(places)

    def _find(self, kinds: tuple[str, ...], layers: int) -> int:
        starts = range(1, max(2, layers - len(kinds) + 1))
        return next((start for start in starts if self._kinds[start : start + len(kinds)] == kinds), 1)

    def _growth(self, tokens: int) -> Growth:
        return self._regimes.growth(tokens + self._later)

    def _program(self, growth: Growth, places: frozenset[int], *, gets_logits: bool) -> list[tuple[int, int, bool]]:
        """What a device with these places does: ``(tensor, event, is brief)``; an event of -1 is the end of a tensor.

        A tensor is brief that goes before the program is at another place, or with it, as copies do. Keys and values are
        not, though they go when the next token has them joined with its own.
        """
        key = growth.shape.tokens, places, gets_logits
        if key not in self._programs:
            events = list(growth.shape.of_device(places, growth.shape.returned() if gets_logits else frozenset()))
            visits = visits_of(growth.shape)
            begun = {tensor: visits[index] for tensor, size, index in events if size}
            brief = {
                tensor for tensor, size, index in events if not size and (tensor < 0 or visits[index] == begun[tensor])
            }
            self._programs[key] = [(tensor, index if size else -1, tensor in brief) for tensor, size, index in events]
        return self._programs[key]

    def _play(self, held: Held, tokens: int, allocator: Allocator) -> None:
        """Small tensors that are brief are left out, as in ``replay``: they share one segment."""
        growth = self._growth(tokens)
        if tokens != self._tokens:
            self._tokens, self._sizes = tokens, growth.sizes(tokens, new_tokens=self._later)
        blocks: dict[int, Block] = {}
        for tensor, index, is_brief in self._program(growth, self.places_of(held, tokens), gets_logits=held.gets_logits):
            if index < 0:
                block = blocks.pop(tensor, None)
                if block is not None:
                    allocator.free(block)
                continue
            size = abs(self._sizes[index])
            if size > SMALL_BYTES or not is_brief:
                blocks[tensor] = allocator.make(size)
