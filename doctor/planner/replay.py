"""Whether a stage really runs in the memory it has: its allocation script, replayed through torch's allocator.

What lives at once tells when a stage cannot run; it does not tell when it can. The replay does, and it also knows that memory
fails in gaps: a prompt of 11,496 tokens may run where one of 11,054 does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ..allocation import INPUT, KEYS, AllocationScript, Event, LayerScript, Made
from ..model import TextShape
from ..units import MIB
from .allocator import Allocator, Block, OutOfMemoryError

CUDNN_SINCE = (9, 0)
"""From this compute capability torch prefers cuDNN's fused attention, which keeps no row statistics and leaves its output in
an order that is copied at once; before, flash attention keeps them and needs no copy. Source: ``sdp_utils.cpp`` of torch 2.6
and later (check_prefer_cudnn_attention); seen in memory histories of H100 cards."""
WORKSPACE_SEGMENTS_BYTES = 34 * MIB
"""Reserved after the first matrix product: cuBLAS's workspace in a segment of its own and one small segment. Measured on
H100 and H200 (32 MiB of workspace; it is less on older GPUs)."""

_Sized = list[int]
"""Events as numbers: a size in bytes (at least 0) for a tensor that comes, ``-1 - number`` shifted by ``_GOES`` for one that
goes."""
_GOES = -16


class Held(msgspec.Struct, frozen=True):
    """What a stage has to replay."""

    kinds: tuple[str, ...]
    """Of its layers, in order."""
    weights_bytes: int
    is_first: bool
    """The prompt is embedded here."""
    has_head: bool
    encode_bytes: int = 0
    """Most bytes of the vision tower at work, its input included."""
    image_bytes: int = 0
    """Of pixels and image features that stay until the answer."""


class Program:
    """A script bound to a model: sizes as functions of the prompt alone.

    Args:
        script: Of the text body.
        text: Its dimensions.
        item_bytes: Bytes of an element of the loaded type.
        batch: Prompts at once.
        new_tokens: Tokens that are made.
        capability: Compute capability of the GPUs, which decides the kernel of attention.
    """

    def __init__(
        self,
        script: AllocationScript,
        text: TextShape,
        *,
        item_bytes: int,
        batch: int,
        new_tokens: int,
        capability: tuple[int, int],
    ) -> None:
        self._script = script
        self._values = dimensions(text)
        self._item_bytes = item_bytes
        self._batch = batch
        self._new_tokens = new_tokens
        self._is_cudnn = capability >= CUDNN_SINCE
        self._tokens = -1
        self._sized: dict[int, _Sized] = {}

    def runs(self, held: Held, tokens: int, capacity_bytes: int) -> bool:
        """Whether a stage survives a prompt of so many tokens, image tokens counted, in so much memory."""
        try:
            self._play(held, tokens, Allocator(capacity_bytes, _reserved(held)))
        except OutOfMemoryError:
            return False
        return True

    def peaks(self, held: Held, tokens: int) -> tuple[int, int]:
        """Most bytes allocated, without weights and workspace, and most bytes reserved, where memory has no end."""
        allocator = Allocator(None, _reserved(held))
        self._play(held, tokens, allocator)
        return allocator.peak_allocated_bytes, allocator.peak_reserved_bytes

    def _play(self, held: Held, tokens: int, allocator: Allocator) -> None:
        if tokens != self._tokens:
            self._tokens, self._sized = tokens, {}
        stay: list[Block] = []
        if held.encode_bytes:
            allocator.free(allocator.make(held.encode_bytes))
        if held.image_bytes:
            stay.append(allocator.make(held.image_bytes))
        carried: Block | None = None
        if held.is_first:
            stay += self._run(self._script.before, None, allocator, [])[0]
        caches: list[tuple[Block, ...]] = []
        for number, kind in enumerate(held.kinds):
            layer = self._layer(kind)
            arrived: list[Block] = []
            if not held.is_first:
                if not number:
                    carried = allocator.make(tokens * self._batch * self._values["hidden"] * self._item_bytes)
                arrived = self._run(layer.arrivals, None, allocator, [])[0]
            kept, _ = self._run(layer.prefill, carried, allocator, [])
            *cache, carried = kept
            caches.append(tuple(cache))
            for block in arrived:
                allocator.free(block)
        if held.has_head:
            self._run(self._script.behind, carried, allocator, [])
        elif carried is not None:
            allocator.free(carried)
        for kind, cache in zip(held.kinds, caches, strict=True):
            self._run(self._layer(kind).decode, None, allocator, list(cache), more=self._new_tokens)

    def _layer(self, kind: str) -> LayerScript:
        layers = self._script.layers
        return layers[kind] if kind in layers else next(iter(layers.values()))

    def _run(
        self, events: Sequence[Event], given: Block | None, allocator: Allocator, caches: list[Block], *, more: int = 0
    ) -> tuple[list[Block], None]:
        """Replay one list; return what is left of its own, in the order of coming."""
        blocks: list[Block | None] = []
        for event in self._sizes(events, more):
            if event >= 0:
                blocks.append(allocator.make(event))
            elif event == INPUT:
                if given is not None:
                    allocator.free(given)
                    given = None
            elif event > _GOES:
                allocator.free(caches[KEYS - event])
            else:
                number = _GOES - event
                block = blocks[number]
                assert block is not None
                allocator.free(block)
                blocks[number] = None
        return [block for block in blocks if block is not None], None

    def _sizes(self, events: Sequence[Event], more: int) -> _Sized:
        key = id(events)
        if key not in self._sized:
            tokens = self._tokens + more
            self._sized[key] = [
                self._size(event, tokens) if isinstance(event, Made) else event if event < 0 else _GOES - event
                for event in events
            ]
        return self._sized[key]

    def _size(self, made: Made, tokens: int) -> int:
        symbols = made.symbols.split()
        elements = made.elements
        item_bytes = made.item_bytes or self._item_bytes
        if made.kind == "statistic" and self._is_cudnn:
            symbols, item_bytes = ["heads", "head_dim", "tokens"], self._item_bytes
        is_of_prompt = False
        for symbol in symbols:
            if symbol == "tokens":
                elements *= tokens
                is_of_prompt = True
            else:
                elements *= self._values[symbol]
                is_of_prompt = is_of_prompt or symbol == "vocabulary"
        return int(elements * item_bytes) * (self._batch if is_of_prompt else 1)


def dimensions(text: TextShape) -> Mapping[str, int]:
    """Values of the symbols of a script, ``tokens`` left out."""
    return {
        "hidden": text.hidden,
        "width": text.intermediate,
        "heads": text.heads,
        "kv_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "vocabulary": text.vocabulary,
        "experts": text.experts,
        "active": text.active_experts,
        "expert_width": text.expert_width,
    }


def _reserved(held: Held) -> int:
    """Segments that are there before the prompt: transformers loads weights into one, rounded up to 2 MiB."""
    return -(-held.weights_bytes // (2 * MIB)) * 2 * MIB + WORKSPACE_SEGMENTS_BYTES
