"""What the vision tower needs: pixels, work on patches, and what stays of it until the prompt has been read."""

from __future__ import annotations

import math

import msgspec

from ..data.activations import VisionCoefficient, vision_coefficient
from ..model import ModelProfile
from ..workload import Workload
from .image_tokens import ImageLoad
from .weights import score_bytes

_PIXEL_ELEMENTS = 3 * 2
"""Channels of a pixel, and the two frames that Qwen2-VL and GLM-4.1V stack even for a still image; others have one."""


def tower_coefficient(profile: ModelProfile) -> VisionCoefficient:
    """The coefficient of a model's vision tower."""
    vision = profile.vision
    known = vision_coefficient(profile.model_type, profile.architecture, vision.kind if vision is not None else "")
    if vision is not None and vision.keeps_states:
        source = f"{known.source}; this transformers keeps the hidden states of all layers"
        known = msgspec.structs.replace(known, keeps_hidden_states=True, source=source)
    if profile.vision_multiples is None:
        return known
    of_mlp, of_hidden = profile.vision_multiples
    return msgspec.structs.replace(
        known, intermediate_multiple=of_mlp, hidden_multiple=of_hidden, source="your own rules for this family"
    )


def pixels_bytes(images: ImageLoad, item_bytes: int) -> int:
    """Bytes of the pixels of one prompt, as they are given to the model."""
    return images.sequences * images.patches * _PIXEL_ELEMENTS * images.patch**2 * item_bytes


def vision_bytes(profile: ModelProfile, workload: Workload, images: ImageLoad, item_bytes: int) -> tuple[int, int, int]:
    """Bytes of the pixels, of the vision tower at work with them, and of what stays of its work until the answer."""
    vision, batch = profile.vision, workload.batch
    patches = images.sequences * images.patches * batch
    pixels = pixels_bytes(images, item_bytes) * batch
    coefficient = tower_coefficient(profile)
    if vision is None:
        seen = images.sequences * images.run_height * images.run_width * batch
        return pixels, pixels + seen * coefficient.pixel_elements * item_bytes, 0
    elements = coefficient.elements(intermediate=vision.intermediate, hidden=vision.hidden, layers=vision.layers)
    work = math.ceil(patches * elements * item_bytes)
    work += math.ceil(coefficient.pair_elements * patches**2 * item_bytes)
    eager = score_bytes(profile, workload) if workload.attention == "eager" else 0
    joined = images.sequences // max(1, workload.images) if coefficient.joins_runs else 1
    pairs = images.sequences * batch * images.patches**2 * joined
    work += math.ceil(vision.heads * pairs * max(eager, coefficient.score_bytes))
    features = images.features * batch * profile.text.hidden * item_bytes
    states = patches * vision.hidden * item_bytes * max(1, coefficient.kept_of_taken * vision.taken)
    return pixels, pixels + work, coefficient.kept_features * features + states
