"""What the vision tower needs: pixels, work on patches, and what stays of it until the prompt has been read."""

from __future__ import annotations

import math

from ..data.activations import vision_coefficient
from ..model import ModelProfile
from ..workload import Workload
from .image_tokens import ImageLoad
from .weights import score_bytes

_PIXEL_ELEMENTS = 3 * 2
"""Channels of a pixel, and the two frames that Qwen2-VL and GLM-4.1V stack even for a still image; others have one."""


def vision_bytes(profile: ModelProfile, workload: Workload, images: ImageLoad, item_bytes: int) -> tuple[int, int, int]:
    """Bytes of the pixels, of the vision tower at work with them, and of what stays of its work until the answer."""
    vision, batch = profile.vision, workload.batch
    patches = images.sequences * images.patches * batch
    pixels = patches * _PIXEL_ELEMENTS * images.patch**2 * item_bytes
    if vision is None:
        return pixels, pixels, 0
    coefficient = vision_coefficient(profile.model_type)
    elements = coefficient.elements(intermediate=vision.intermediate, hidden=vision.hidden, layers=vision.layers)
    work = math.ceil(patches * elements * item_bytes)
    work += math.ceil(coefficient.pair_elements * patches**2 * item_bytes)
    if workload.attention == "eager":
        work += vision.heads * images.sequences * batch * images.patches**2 * score_bytes(profile, workload)
    features = images.features * batch * profile.text.hidden * item_bytes
    return pixels, pixels + work, coefficient.kept_features * features + patches * vision.hidden * item_bytes
