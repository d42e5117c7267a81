"""Allocations of a model's real forward, in the order of the program: what the traced tier of the planner prices.

Recorded by ``sources/trace.py`` without a GPU. A *place* is where in the chain of stages something happens: the tower that
reads images, before the first layer, a layer, or behind the last.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

TOWER = -2
"""Place of the modules that read images (vision tower, projector)."""
BEFORE = -1
"""Place of what happens before the first layer."""
ROUNDING_BYTES = 512
"""torch's caching allocator hands out whole multiples. Source: kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp."""


class Event(msgspec.Struct, frozen=True, array_like=True):
    """A tensor's memory comes to life, is read elsewhere, or ends."""

    tensor: int
    size_bytes: int
    """Above 0: allocated. 0: the end of this tensor. Below 0: so many bytes of it are read, for the first time, at a place
    other than its own; on another device they would have to be copied."""
    place: int
    """``TOWER``, ``BEFORE``, the number of the layer at work, or the number of layers behind the last."""
    module: int
    """Index into the names of modules: the innermost at work."""


class LiveTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that is alive at some moment."""

    size_bytes: int
    """As the allocator rounds it."""
    place: int
    module: str
    """Path of the module that made it; empty for what ``generate`` and the caller make."""


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """The moment with the most memory alive, of one device's part of the work."""

    size_bytes: int = 0
    event: int = 0
    """Index of the event that reaches it."""
    place: int = BEFORE
    module: str = ""
    largest: tuple[LiveTensor, ...] = ()
    """What is alive then, largest first."""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """All events of one run: a prompt, and decode steps when ``passes`` has more than one number."""

    tokens: int
    """Of one prompt, image tokens included."""
    batch: int = 1
    layers: int
    modules: tuple[str, ...]
    events: tuple[Event, ...]
    passes: tuple[int, ...]
    """Index of the event with which each forward pass begins; before the first, the inputs are made."""

    def decode_begin(self) -> int:
        """Index of the first event behind the prompt."""
        return self.passes[1] if len(self.passes) > 1 else len(self.events)

    def held(self, first: int = TOWER, end: int | None = None, *, has_tower: bool | None = None) -> frozenset[int]:
        """The places from ``first`` up to, not including, ``end``; with or without the tower, whatever ``first`` is."""
        places = set(range(first, self.layers + 1 if end is None else end))
        if has_tower is not None:
            places = places | {TOWER} if has_tower else places - {TOWER}
        return frozenset(places)

    def returned(self) -> frozenset[int]:
        """Indices of the events with which logits of the prompt are read where it was embedded."""
        behind = next((index for index, event in enumerate(self.events) if event.place == self.layers), len(self.events))
        return frozenset(index for index in range(behind, self.decode_begin()) if self.events[index].place == BEFORE)

    def of_device(self, places: frozenset[int], more: frozenset[int] = frozenset()) -> Iterator[tuple[int, int, int]]:
        """What the allocator of a device with these places sees: ``(tensor, size_bytes, event)``, a size of 0 for an end.

        A tensor made elsewhere is copied when it is first read at a place here, as accelerate's hooks do for a layer, and
        the copy goes when that place has done its work. Copies have negative tensor numbers.

        Args:
            places: Of the device.
            more: Events that are here, too, whatever their place.
        """
        mine: set[int] = set()
        copies: list[int] = []
        last = BEFORE
        for index, event in enumerate(self.events):
            if event.place != last:
                yield from ((copy, 0, index) for copy in copies)
                copies, last = [], event.place
            if event.size_bytes == 0:
                if event.tensor in mine:
                    mine.remove(event.tensor)
                    yield event.tensor, 0, index
            elif event.place in places or index in more:
                if event.size_bytes > 0:
                    mine.add(event.tensor)
                    yield event.tensor, event.size_bytes, index
                elif event.tensor not in mine:
                    copies.append(-event.tensor)
                    yield -event.tensor, -event.size_bytes, index

    def peak(
        self, places: frozenset[int] | None = None, *, begin: int = 0, stop: int | None = None, count: int = 10
    ) -> Peak:
        """The highest moment of a device's part among the events from ``begin`` up to, not including, ``stop``.

        Args:
            places: What the device holds, from :meth:`held`; ``None`` is everything.
            begin: First event that counts; what happened before is alive all the same.
            stop: End of the events that count; ``None`` is the end.
            count: How many of the largest tensors to name.
        """
        places = self.held() if places is None else places
        stop = len(self.events) if stop is None else stop
        alive: dict[int, int] = {}
        now = most = at = 0
        for tensor, size_bytes, index in self.of_device(places):
            if index >= stop:
                break
            if size_bytes:
                alive[tensor] = rounded_bytes(size_bytes)
                now += alive[tensor]
            else:
                now -= alive.pop(tensor)
            if now > most and index >= begin:
                most, at = now, index
        return Peak(
            size_bytes=most,
            event=at,
            place=self.events[at].place if most else BEFORE,
            module=self._module(self.events[at].module) if most else "",
            largest=self._alive(places, at)[:count] if most else (),
        )

    def _alive(self, places: frozenset[int], at: int) -> tuple[LiveTensor, ...]:
        alive: dict[int, tuple[int, Event]] = {}
        for tensor, size_bytes, index in self.of_device(places):
            if index > at:
                break
            if size_bytes:
                alive[tensor] = (size_bytes, self.events[index])
            else:
                del alive[tensor]
        found = sorted(alive.values(), key=lambda pair: (-pair[0], pair[1].tensor))
        return tuple(
            LiveTensor(size_bytes=rounded_bytes(size), place=event.place, module=self._module(event.module))
            for size, event in found
        )

    def _module(self, number: int) -> str:
        return self.modules[number]


class Traces(msgspec.Struct, frozen=True, kw_only=True):
    """Runs of one model with prompts of different lengths, otherwise alike."""

    architecture: str
    attention: str
    torch: str
    """Version."""
    transformers: str
    """Version."""
    weights_bytes: int
    """Of all parameters and buffers of the class that was built, rounded one by one as the allocator does."""
    runs: tuple[Trace, ...]
    """By length, shortest first."""
    seconds: float = 0.0
    is_cached: bool = False


def rounded_bytes(size_bytes: int) -> int:
    """What the allocator takes for a request."""
    return -(-size_bytes // ROUNDING_BYTES) * ROUNDING_BYTES


class Pictures(msgspec.Struct, frozen=True, kw_only=True):
    """The images of one prompt, as the vision tower is to see them."""

    images: int
    height: int
    """Pixels of each image, before it is resized or cut."""
    width: int
    sequences: int
    """Runs of patches that attend to each other, of all images: one an image, or one a tile."""
    run_height: int
    """Pixels of each run."""
    run_width: int
    patches: int
    """Of each run, class tokens and padding included."""
    patch: int
    """Pixels along a patch's edge."""
    merge: int
    """Patches along each edge of what becomes one token."""


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be traced; made by the planner, run by ``sources/trace.py``."""

    architecture: str
    """Name of the class in transformers, or in the code of the checkpoint."""
    dtype: str
    """torch's word for the type of the weights."""
    attention: str
    """transformers' ``attn_implementation``."""
    cudnn_width: int
    """The widest head for which fused attention is cuDNN's; 0 where it never is."""
    layers: tuple[str, ...]
    """Module paths of the text layers, in order."""
    tower: tuple[str, ...]
    """Module paths of what reads images."""
    lengths: tuple[int, ...]
    """Tokens of the prompts to trace, image tokens included."""
    steps: int
    """Tokens to generate, the first of them by the prompt itself; 0 is one plain forward pass."""
    batch: int = 1
    pictures: Pictures | None = None
    """``None``: text alone."""
    image_tokens: int = 0
    """Places for image features in one prompt; 0: as many as the tower gives."""
    is_remote_code: bool = False
    """Its class is code of the checkpoint, which its user has allowed to run."""
