"""Which tensors come and go while a model reads a prompt: the program that torch's allocator serves.

Written down once for each text body by ``tools/make_scripts.py`` from the real code of transformers; sizes are products of
dimensions, so that one script holds for every size of a family and every length of a prompt.
"""

from __future__ import annotations

from typing import Literal

import msgspec

INPUT = -1
"""Stands for the hidden states that a place was given."""
KEYS = -2
VALUES = -3
"""Stand for the keys and values that a layer has kept so far."""
ENTRY = -32
"""Stands for the first tensor of a tower's entry, ``ENTRY - 1`` for the second, and so on."""


class Made(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that comes to life."""

    elements: float
    symbols: str
    """Names of the dimensions that multiply ``elements``, such as ``hidden tokens``: those of ``planner/replay.py``."""
    item_bytes: int = 0
    """Of one element; 0 is that of the type the weights are loaded in."""
    kind: Literal["", "flash", "cudnn", "padding"] = ""
    """What only one kernel of attention makes. ``flash``: its row statistics. ``cudnn``: a copy of the output, which cuDNN
    lays out as the query is. ``padding``: a copy of the mask with rows of whole vectors, which cuDNN does without."""


Event = Made | int
"""A tensor that comes, or the number (in the order of coming, at this place) of one that goes."""


class LayerScript(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of one kind."""

    arrivals: tuple[Event, ...]
    """What accelerate's hooks copy to the layer's GPU where it is another one than the first: masks, rotary tables."""
    prefill: tuple[Event, ...]
    decode: tuple[Event, ...]
    """One more token, tensors that grow with the prompt alone."""


class AllocationScript(msgspec.Struct, frozen=True, kw_only=True):
    """A text body, from its embedding to the logits of the last token."""

    position_rows: int = 1
    """Positions of each token: those of multimodal rotary embeddings are several."""
    before: tuple[Event, ...]
    layers: dict[str, LayerScript]
    """By kind of layer, in the words of ``layer_types`` of config.json."""
    behind: tuple[Event, ...]


class TowerScript(msgspec.Struct, frozen=True, kw_only=True):
    """A vision tower with its projector, from the pixels to the embeddings that hold image features; it stands in for
    ``before`` of the text body where a prompt has images.
    """

    entry: tuple[Event, ...]
    block: tuple[Event, ...]
    exit: tuple[Event, ...]
