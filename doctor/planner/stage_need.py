"""What a stage holds and what it needs: records."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Price(Protocol):
    """Bytes that a run of atoms needs."""

    def __call__(self, first: int, end: int, is_main: bool | None = None) -> int:
        """Of the atoms from ``first`` up to, not including, ``end``; ``is_main`` as in ``Holding``."""


class StageNeed(msgspec.Struct, frozen=True):
    """What one stage needs of its GPU, at its worst moment."""

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    """On top of the KV cache, the copy of an offloaded module included. The vision tower runs, and weights are loaded,
    before the cache exists, so only what exceeds the cache counts."""
    fragmentation_bytes: int
    moment: str
    """What happens when the activations are largest."""
    training_bytes: int = 0
    """Adapters, gradients and states of the optimizer, as far as they are there then."""
    reserved_bytes: int | None = None
    """What torch's allocator is seen to take from the driver, workspace not counted, where that is replayed. It takes more
    than it needs as long as there is some."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        work = self.kv_cache_bytes + self.activations_bytes + self.training_bytes
        return self.weights_bytes + work + self.fragmentation_bytes


class Holding(msgspec.Struct, frozen=True):
    """What a device holds of a model, as far as its memory goes; of any map, not of contiguous stages alone."""

    weights_bytes: int
    layers: int
    has_tower: bool
    """Any part of the vision tower: its work, and the pixels, are here."""
    has_embedding: bool
    """The prompt is embedded here and joined with the image features."""
    has_head: bool
    layer_keys: tuple[str, ...] = ()
    """Keys of its layers; where they are not given, the neediest ``layers`` stand for them."""
    loading_bytes: int = 0
    """Needed beside the weights while they are loaded."""
    is_main: bool | None = None
    """Of several devices the main one, to which accelerate's hook around the whole model takes what it is called with; the
    caller's tensors may be there or where the prompt is embedded. ``None``: the two are the same device.
    Source: ``main_device`` of dispatch_model, the first of a set of numbers: mostly the lowest."""

    @property
    def has_more_pixels(self) -> bool:
        """Pixels are here once more: as the caller or that hook has them, beside those that the tower is given."""
        return self.is_main is not None and self.is_main != self.has_embedding

    @property
    def may_get_logits(self) -> bool:
        """Logits made elsewhere come back here: to where the caller's tensors may be."""
        return (self.has_embedding or bool(self.is_main)) and not self.has_head
