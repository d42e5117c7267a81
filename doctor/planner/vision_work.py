"""What the vision tower needs: pixels, work on patches, and what stays of it until the prompt has been read."""

from __future__ import annotations

import math

import msgspec

from ..data.activations import PIXEL_MASK_BYTES, VisionCoefficient, vision_coefficient
from ..model import MOST_FRAMES, ModelProfile
from ..workload import Workload
from .image_tokens import ImageLoad
from .weights import score_bytes

_CHANNELS = 3
_QUERY_STATES = 2
"""Hidden states of a patch that eager attention has beside those of its MLP. Measured on two H200s, with SigLIP."""


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


def pixels_bytes(profile: ModelProfile, images: ImageLoad, item_bytes: int) -> int:
    """Bytes of the pixels of one prompt as they are given to the model, and of the mask beside them."""
    frames = MOST_FRAMES if profile.vision is None else profile.vision.frames
    each = _CHANNELS * frames * item_bytes + PIXEL_MASK_BYTES.get(profile.model_type, 0)
    return images.sequences * images.patches * images.patch**2 * each


def vision_bytes(profile: ModelProfile, workload: Workload, images: ImageLoad, item_bytes: int) -> tuple[int, int, int]:
    """Bytes of the pixels, of the vision tower at work with them, and of what stays of its work until the answer."""
    vision, batch = profile.vision, workload.batch
    patches = images.sequences * images.patches * batch
    pixels = pixels_bytes(profile, images, item_bytes) * batch
    coefficient = tower_coefficient(profile)
    if vision is None:
        seen = images.sequences * images.run_height * images.run_width * batch
        return pixels, pixels + seen * coefficient.pixel_elements * item_bytes, 0
    elements = coefficient.elements(intermediate=vision.intermediate, hidden=vision.hidden, layers=vision.layers)
    work = math.ceil(patches * elements * item_bytes)
    work += math.ceil(coefficient.pair_elements * patches**2 * item_bytes)
    joined = images.sequences // max(1, workload.images) if coefficient.joins_runs else 1
    pairs = vision.heads * images.sequences * batch * images.patches**2 * joined
    busiest = work + math.ceil(pairs * coefficient.score_bytes)
    if workload.attention == "eager":
        # The MLP works when the scores are gone.
        less = coefficient.intermediate_multiple * vision.intermediate
        more = _QUERY_STATES * vision.hidden if less else 0
        without = work + math.ceil(patches * (more - less) * item_bytes)
        scores = pairs * (coefficient.eager_scores * item_bytes or score_bytes(profile, workload))
        busiest = max(busiest, without + math.ceil(scores))
    features = images.features * batch * profile.text.hidden * item_bytes
    # A training step holds what the projector read, too.
    if vision.lets_go and workload.training is None:
        return pixels, pixels + busiest, features
    states = float(max(1, coefficient.kept_of_taken * vision.taken))
    if vision.keeps_states and not vision.lets_go:
        states += coefficient.second_states or vision.layers
    kept = coefficient.kept_features * features + math.ceil(patches * vision.hidden * item_bytes * states)
    return pixels, pixels + busiest, kept
