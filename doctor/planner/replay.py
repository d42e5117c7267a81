"""Whether a stage really runs in the memory it has: its allocation script, replayed through torch's allocator.

What lives at once tells when a stage cannot run; it does not tell when it can. The replay does, and it also knows that
memory fails in gaps: a prompt of 11,496 tokens may run where one of 11,054 does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import msgspec

from ..allocation import ENTRY, INPUT, KEYS, VALUES, AllocationScript, Event, LayerScript, Made, TowerScript
from ..model import ModelProfile
from .allocator import SMALL_BYTES, SMALL_SEGMENT_BYTES, Allocator, Block, OutOfMemoryError
from .image_tokens import ImageLoad

MASK_ALIGNMENT = 8
"""Elements of a row of a mask; source: preprocess_mask of aten/src/ATen/native/transformers/attention.cpp."""
MOST_SUMMED_WIDTH = 128
"""Of a head, for which the memory-efficient kernel sums up in registers.
Source: kNeedsOutputAccumulatorBuffer of ``kernel_forward.h``."""
_GOES = -(2**20)
"""A tensor that goes, in a list of sizes: this less its number."""


class Held(msgspec.Struct, frozen=True):
    """What a stage has to replay."""

    kinds: tuple[str, ...]
    """Of its layers, in order."""
    weights_bytes: int
    is_first: bool
    """The prompt is embedded here, images included."""
    has_head: bool
    has_inputs: bool = False
    """Token numbers, mask and positions of the prompt are here, where its first module is or where the caller put them."""
    small_weights_bytes: int = 0
    """Of the weights, those of tensors of at most 1 MiB."""
    more_pixels_bytes: int = 0
    """Pixels that are here beside those that the tower's script tells of."""
    gets_logits: bool = False
    """Logits of the prompt come back here though it is embedded elsewhere. Heeded by traces: scripts are of ``generate``,
    which has those of one token."""


class Replayed(ABC):
    """What torch's allocator is made to serve, by whatever tells what a stage allocates."""

    has_movable_inputs = False
    """Where ``Held.has_inputs`` is heeded."""

    def runs(self, held: Held, tokens: int, capacity_bytes: int) -> bool:
        """Whether a stage survives a prompt of so many tokens, image tokens counted, in so much memory."""
        try:
            self.peaks(held, tokens, capacity_bytes)
        except OutOfMemoryError:
            return False
        return True

    def peaks(self, held: Held, tokens: int, capacity_bytes: int | None = None) -> tuple[int, int]:
        """Most bytes allocated, without weights and workspace, and most bytes reserved.

        Raises:
            OutOfMemoryError: It does not run in so much memory.
        """
        allocator = Allocator(capacity_bytes, *_weights(held))
        if held.more_pixels_bytes:
            allocator.make(held.more_pixels_bytes)
        self._play(held, tokens, allocator)
        return allocator.peak_allocated_bytes, allocator.peak_reserved_bytes

    @abstractmethod
    def _play(self, held: Held, tokens: int, allocator: Allocator) -> None:
        """Ask the allocator for everything, in order."""


class Program(Replayed):
    """The scripts of a model bound to its dimensions: sizes as functions of the prompt alone.

    Args:
        script: Of the text body.
        tower: Of the vision tower; ``None`` where the prompt has no images.
        values: Value of each symbol but ``tokens``, see :func:`dimensions`.
        item_bytes: Bytes of an element of the loaded type.
        batch: Prompts at once.
        new_tokens: Tokens that are made.
        cudnn_width: The widest head for which attention is cuDNN's, see :mod:`.kernels`.
        keeps_states: What each block of the tower gives stays until the tower is done;
        holds_states: and after that, until the answer.
    """

    has_movable_inputs = True

    def __init__(
        self,
        script: AllocationScript,
        tower: TowerScript | None,
        values: Mapping[str, int],
        *,
        item_bytes: int,
        batch: int,
        new_tokens: int,
        cudnn_width: int,
        keeps_states: bool = False,
        holds_states: bool = False,
    ) -> None:
        self._script = script
        self._tower = tower
        self._values = values
        self._item_bytes = item_bytes
        self._batch = batch
        self._new_tokens = new_tokens
        self._cudnn_width = cudnn_width
        self._keeps_states = keeps_states
        self._holds_states = holds_states
        self._tokens = -1
        self._sized: dict[tuple[int, int], list[int]] = {}

    def _play(self, held: Held, tokens: int, allocator: Allocator) -> None:
        if tokens != self._tokens:
            self._tokens, self._sized = tokens, {}
        carried: Block | None = None
        inputs = self._inputs(allocator, tokens) if held.has_inputs else []
        if held.is_first:
            self._embed(allocator)
        elif held.kinds:
            carried = allocator.make(tokens * self._batch * self._values["hidden"] * self._item_bytes)
        caches, carried = self._read(held, carried, allocator)
        if held.has_head:
            self._run(self._script.behind, allocator, {INPUT: carried})
        elif carried is not None:
            allocator.free(carried)
        inputs += self._inputs(allocator, tokens + 1) if held.has_inputs else []
        for kind, cache in zip(held.kinds, caches, strict=True):
            self._run(
                self._layer(kind).decode, allocator, dict(zip((KEYS, VALUES), cache, strict=False)), more=self._new_tokens
            )

    def _read(self, held: Held, carried: Block | None, allocator: Allocator) -> tuple[list[list[Block]], Block | None]:
        """The layers read the prompt.

        Returns:
            The keys and values that each keeps, and the hidden states behind the last.
        """
        # A later stage adds no features of a tower that taps blocks: where the first has fewer layers than are tapped, what
        # that allocates is less than what a layer does.
        taps = self._tower.taps if self._tower is not None and held.is_first else 0
        caches: list[list[Block]] = []
        spare: Block | None = None
        for number, kind in enumerate(held.kinds):
            layer = self._layer(kind)
            cache: list[Block] = []
            if layer.prefill:
                arrived = [] if held.is_first else self._run(layer.arrivals, allocator)
                given, carried = carried, None
                *cache, carried = self._run(layer.prefill, allocator)
                # The caller holds a layer's input until it returns, which is after what accelerate's hook holds; but the
                # first input on a later stage is the hook's own copy.
                own = [given] if given is not None else []
                for block in (*arrived, *own) if number else (*own, *arrived):
                    allocator.free(block)
            caches.append(cache)
            if spare is not None:
                allocator.free(spare)
                spare = None
            if self._tower is not None and number < taps:
                spare = carried
                *_, carried = self._run(self._tower.added, allocator)
        if spare is not None:
            allocator.free(spare)
        return caches, carried

    def _inputs(self, allocator: Allocator, tokens: int) -> list[Block]:
        """Token numbers, mask and positions, which ``generate`` makes anew, longer by one, for each further token."""
        each = 8 * tokens * self._batch
        return [allocator.make(size) for size in (each, each, self._script.position_rows * each)]

    def _embed(self, allocator: Allocator) -> None:
        """What comes before the layers; what is left of it stays."""
        if self._tower is None:
            self._run(self._script.before, allocator)
            return
        left: dict[int, Block | None] = {}
        self._run(self._tower.entry, allocator, left=left)
        # Some towers hold the first block's input themselves until the exit.
        carried = left.pop(self._tower.given, None)
        blocks, taps = self._values["vision_layers"], self._tower.taps
        seen: dict[object, int] = {}
        kept: list[Block] = []
        number = 0
        while number < blocks:
            if self._keeps_states and carried is not None:
                kept.append(carried)
                carried = None
            *_, carried = self._run(self._tower.block, allocator, {INPUT: carried})
            number += 1
            # Evenly, the last one before the last block: those of Qwen3-VL differ from that by a block.
            if number < blocks and number * taps // (blocks - 1) > (number - 1) * taps // (blocks - 1):
                self._run(self._tower.tap, allocator)
            # Blocks that are not tapped keep nothing but hidden states: from a state that was there before, all goes on as
            # it did then.
            state = allocator.state(), carried.address
            if not taps and not kept and state in seen:
                period = number - seen[state]
                number += (blocks - number) // period * period
            seen[state] = number
        self._run(self._tower.exit, allocator, {INPUT: carried, **left})
        for block in () if self._holds_states else kept:
            allocator.free(block)

    def _layer(self, kind: str) -> LayerScript:
        layers = self._tower.layers if self._tower is not None and self._tower.layers else self._script.layers
        return layers[kind] if kind in layers else next(iter(layers.values()))

    def _run(
        self,
        events: Sequence[Event],
        allocator: Allocator,
        given: dict[int, Block | None] | None = None,
        *,
        left: dict[int, Block | None] | None = None,
        more: int = 0,
    ) -> list[Block]:
        """Replay one list of events.

        Args:
            events: The list.
            allocator: Serves it.
            given: Tensors of other places that may go here, by their codes.
            left: Receives what is left, by the codes of a tower's entry.
            more: Tokens beyond the prompt.

        Returns:
            What is left, in the order of coming.
        """
        given = given or {}
        blocks: list[Block | None] = []
        for event in self._sizes(events, more):
            if event >= 0:
                blocks.append(allocator.make(event))
            elif event > _GOES:
                block = given.pop(event, None)
                if block is not None:
                    allocator.free(block)
            else:
                block = blocks[_GOES - event]
                assert block is not None
                allocator.free(block)
                blocks[_GOES - event] = None
        if left is not None:
            left.update(zip(_left_codes(events), (block for block in blocks if block is not None), strict=True))
        return [block for block in blocks if block is not None]

    def _sizes(self, events: Sequence[Event], more: int) -> list[int]:
        """Events as numbers: bytes of a tensor that comes; code of one of elsewhere that goes; ``_GOES`` less the number
        of one of this list that goes. Small tensors that do not outlive the list are left out: they share one segment.
        """
        key = id(events), more
        if key not in self._sized:
            tokens = self._tokens + more
            gone = {event for event in events if not isinstance(event, Made) and event >= 0}
            sizes: list[int] = []
            numbers: dict[int, int] = {}
            number = -1
            for event in events:
                if isinstance(event, Made):
                    number += 1
                    size = self._size(event, tokens)
                    if size > SMALL_BYTES or number not in gone:
                        numbers[number] = len(numbers)
                        sizes.append(size)
                elif event < 0:
                    sizes.append(event)
                elif event in numbers:
                    sizes.append(_GOES - numbers[event])
            self._sized[key] = sizes
        return self._sized[key]

    def _size(self, made: Made, tokens: int) -> int:
        symbols = made.symbols.split()
        width = "vision_head_dim" if "vision_heads" in symbols else "head_dim"
        if made.kind and not self._is_made(made.kind, tokens, width):
            return 0
        item_bytes = made.item_bytes or self._item_bytes
        elements = made.elements
        for symbol in symbols:
            elements *= tokens if symbol == "tokens" else self._values[symbol]
        if made.kind == "padding":
            elements = elements // tokens * (-(-tokens // MASK_ALIGNMENT) * MASK_ALIGNMENT)
        return int(elements * item_bytes) * (self._batch if _OF_PROMPT.intersection(symbols) else 1)

    def _is_made(self, kind: str, tokens: int, width: str) -> bool:
        """Whether the kernel that attention has here, with heads as wide as that symbol says, makes such a tensor."""
        is_cudnn = self._values[width] <= self._cudnn_width
        if kind == "padding":
            return not is_cudnn and bool(tokens % MASK_ALIGNMENT)
        if kind == "sums":
            return not is_cudnn and self._values[width] > MOST_SUMMED_WIDTH
        return is_cudnn == (kind == "cudnn")


_OF_PROMPT = frozenset({"tokens", "vocabulary", "patches", "features"})
"""Symbols of which each prompt of a batch has its own."""


def _left_codes(events: Sequence[Event]) -> list[int]:
    """Codes of the tensors of a tower's entry that outlive it, in the order of coming."""
    gone = {event for event in events if not isinstance(event, Made)}
    count = sum(isinstance(event, Made) for event in events)
    return [ENTRY - number for number in range(count) if number not in gone]


def dimensions(profile: ModelProfile, images: ImageLoad) -> dict[str, int]:
    """Values of the symbols of a script, ``tokens`` left out. Patches and features are those of all images of a prompt."""
    text, vision = profile.text, profile.vision
    values = {
        "hidden": text.hidden,
        "width": text.intermediate,
        "heads": text.heads,
        "kv_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "vocabulary": text.vocabulary,
        "experts": text.experts,
        "active": text.active_experts,
        "expert_width": text.expert_width,
        "patches": images.sequences * images.patches,
        "features": images.features,
    }
    if vision is not None:
        values.update(
            vision_layers=vision.layers,
            vision_hidden=vision.hidden,
            vision_width=vision.intermediate,
            vision_heads=vision.heads,
            vision_head_dim=vision.hidden // vision.heads,
        )
    return values


def _weights(held: Held) -> tuple[int, int]:
    """Segments that are there before the prompt, and what is free in the largest, in bytes.

    Transformers asks for one segment of all weights and gives it back to torch (caching_allocator_warmup); of the tensors
    that it then loads, the small ones go to segments of their own, so that there is a hole as large as they are. It decides
    about some of what comes first, and with that about where a prompt fails: GLM-4.1V on 12 + 23.5 GiB runs 36,863 tokens
    and no longer 37,051, on two H200s as in the replay; without the hole the replay says 37,656.
    cuBLAS's workspace has a segment of its own, which the budget counts.
    """
    segment = _round_up(held.weights_bytes)
    small = held.small_weights_bytes
    return segment + max(SMALL_SEGMENT_BYTES, _round_up(small)), segment - held.weights_bytes + small


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES
