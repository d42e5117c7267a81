"""Inputs for the tiny models: what each class's processor would hand it, made without a processor.

The number of places for image features in the prompt is asked of the tower itself (``get_image_features``), so that no
family needs a formula here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from tiny_architectures import HEADS

WORD = 20
"""A token that means nothing special; so do the next hundred."""
Inputs = dict[str, Any]


def text_inputs(model: Any, tokens: int = 12) -> Inputs:
    """A prompt without images."""
    ids = torch.arange(WORD, WORD + tokens)[None]
    inputs: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    extra = _TEXT_EXTRA.get(model.config.model_type)
    return inputs | (extra(model, inputs) if extra else {})


def image_inputs(model: Any) -> Inputs:
    """A prompt with one image; nothing where the class takes none.

    Raises:
        LookupError: The class takes images in a way that is not known here.
    """
    family = model.config.model_type
    if family in NO_IMAGES:
        return {}
    torch.manual_seed(1)
    taken = inspect.signature(model.forward).parameters
    pictures = _OWN[family](model) if family in _OWN else _usual(model, taken)
    if family in _WHOLE_INPUTS:
        return text_inputs(model) | pictures
    return _prompt(model, pictures, taken)


def _usual(model: Any, taken: Any) -> Inputs:
    if "image_grid_thw" in taken:
        return _patches(model)
    if "pixel_values" in taken:
        return _squares(model, taken)
    raise LookupError(f"how {model.config.model_type} takes images is not known here")


def _vision(model: Any) -> Any:
    config = model.config
    return next((getattr(config, key) for key in ("vision_config", "vision_encoder", "encoder") if hasattr(config, key)), config)


def _first(config: Any, *names: str, default: int) -> int:
    found = next((value for name in names if (value := getattr(config, name, None)) is not None), default)
    return int(found[0] if isinstance(found, (list, tuple)) else found)


def _patches(model: Any) -> Inputs:
    """Qwen2-VL's way: a stack of flat patches and their grid."""
    vision = _vision(model)
    patch = _first(vision, "patch_size", default=14)
    temporal = _first(vision, "temporal_patch_size", "patch_temporal", default=1)
    channels = _first(vision, "in_channels", "in_chans", "num_channels", default=3)
    grid = torch.tensor([[1, 4, 4]])
    return {"pixel_values": torch.randn(16, channels * temporal * patch**2), "image_grid_thw": grid}


def _edge(vision: Any) -> int:
    return _first(vision, "image_size", default=4 * _first(vision, "patch_size", default=14))


def _squares(model: Any, taken: Any) -> Inputs:
    """LLaVA's way: squares of the tower's size."""
    edge = _edge(_vision(model))
    pictures: Inputs = {"pixel_values": torch.randn(1, 3, edge, edge)}
    if "image_sizes" in taken and _vision(model).model_type in ("pixtral", "mistral_large4_vision"):
        pictures["image_sizes"] = torch.tensor([[edge, edge]])
    return pictures


def _tiles(model: Any, tiles: int = 1) -> Inputs:
    """Several squares of one image in a dimension of their own."""
    edge = _edge(_vision(model))
    return {"pixel_values": torch.randn(1, tiles, 3, edge, edge)}


def _with_mask(model: Any) -> Inputs:
    pictures = _tiles(model, 2)
    edge = pictures["pixel_values"].shape[-1]
    return {**pictures, "pixel_attention_mask": torch.ones(1, 2, edge, edge, dtype=torch.bool)}


def _any_resolution(model: Any) -> Inputs:
    """LLaVA-NeXT: the whole image and the tiles of the nearest grid."""
    edge = _edge(_vision(model))
    pinpoints = getattr(model.config, "image_grid_pinpoints", None)
    height, width = pinpoints[0] if pinpoints else (edge, edge)
    tiles = 1 + (height // edge) * (width // edge)
    return {"pixel_values": torch.randn(1, tiles, 3, edge, edge), "image_sizes": torch.tensor([[height, width]])}


def _mllama(model: Any) -> Inputs:
    edge = _edge(_vision(model))
    return {
        "pixel_values": torch.randn(1, 1, 4, 3, edge, edge),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 12, 1, 4, dtype=torch.long),
    }


def _question(model: Any) -> Inputs:
    """InstructBLIP reads the question twice."""
    edge = _edge(_vision(model))
    frames = (1, 4) if "video" in model.config.model_type else (1,)
    ids = torch.arange(WORD, WORD + 6)[None]
    return {
        "pixel_values": torch.randn(*frames, 3, edge, edge),
        "qformer_input_ids": ids,
        "qformer_attention_mask": torch.ones_like(ids),
    }


def _flat_patches(model: Any) -> Inputs:
    vision = _vision(model)
    patch = _first(vision, "patch_size", default=16)
    rows = torch.arange(1, 17).reshape(1, 16, 1).float()
    return {"flattened_patches": torch.cat((rows, rows, torch.randn(1, 16, 3 * patch**2)), dim=2)}


_TEXT_EXTRA: dict[str, Callable[[Any, Inputs], Inputs]] = {}
_OWN: dict[str, Callable[[Any], Inputs]] = {
    **dict.fromkeys(("llava_next", "llava_onevision", "granite4_vision"), _any_resolution),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _with_mask),
    **dict.fromkeys(("instructblip", "instructblipvideo"), _question),
    "mllama": _mllama,
    "pix2struct": _flat_patches,
}
_WHOLE_INPUTS = frozenset({"mllama", "blip", "git", "pix2struct", "idefics"})
"""Families whose prompt has no places for image features."""
NO_IMAGES: dict[str, str] = {"mistral4": "a text model", "evolla": "reads proteins"}


def _prompt(model: Any, pictures: Inputs, taken: Any) -> Inputs:
    """Places for the features of an image, between words."""
    marker = next(
        (
            number
            for name in ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id")
            if (number := getattr(model.config, name, None)) is not None
        ),
        None,
    )
    if marker is None:
        raise LookupError(f"which token stands for an image of {model.config.model_type} is not known here")
    places = features(model, pictures)
    words = torch.arange(WORD, WORD + 4)
    ids = torch.cat((words, torch.full((places,), marker), words + 4))[None]
    inputs: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = (ids == marker).int()
    if "mm_token_type_ids" in taken:
        inputs["mm_token_type_ids"] = kinds
    if "token_type_ids" in taken:
        inputs["token_type_ids"] = kinds.long()
    return inputs | pictures


def features(model: Any, pictures: Inputs) -> int:
    """Places that the tower's answer takes in the prompt."""
    taken = inspect.signature(model.get_image_features).parameters
    with torch.no_grad():
        found = model.get_image_features(**{name: value for name, value in pictures.items() if name in taken})
    found = getattr(found, "pooler_output", found)
    if found is None:
        found = found.last_hidden_state
    parts = list(found) if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts if isinstance(part, torch.Tensor))


__all__ = ["HEADS", "NO_IMAGES", "features", "image_inputs", "text_inputs"]
