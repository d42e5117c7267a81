"""Prompts of a true-size model without a tokenizer. Used by the child programs only; images: :mod:`.trace_pictures`."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch

WORD = 5
"""A token number that means nothing special to any of the families."""
OTHER_WORD = 6
TAKE_SQUARES = ("cogvlm", "chatglm")
"""Types of models whose own code takes what :func:`square_inputs` makes."""
_MARKERS = (
    "image_token_id", "image_token_index", "image_patch_id", "video_token_index", "img_context_token_id",
    "media_placeholder_token_id",
)  # fmt: skip
"""Names of the token that stands for an image feature."""


def text_inputs(config: Any, taken: Container[str], tokens: int, batch: int) -> dict[str, Any]:
    """Token numbers that mean nothing, and what the class asks for beside them.

    Args:
        config: Of the model.
        taken: Arguments that its ``forward`` takes.
        tokens: Of one prompt.
        batch: Prompts.
    """
    ids = torch.full((batch, tokens), WORD if marker_of(config) != WORD else OTHER_WORD)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type == "gemma3":
        # The others' processors give kinds of tokens with images alone, and their masks differ with them.
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if "bbox" in taken:
        inputs["bbox"] = torch.zeros(batch, tokens, 4)
    # Some classes, and some releases of one, take no mask or no kinds of tokens.
    return {name: value for name, value in inputs.items() if name in taken}


def marker_of(config: Any) -> int | None:
    """Number of the token that stands for an image feature; ``None`` where the config has none."""
    return next((number for name in _MARKERS if (number := getattr(config, name, None)) is not None), None)


def prompt_inputs(
    config: Any,
    taken: Container[str],
    tokens: int,
    batch: int,
    *,
    images: dict[str, Any] | None = None,
    places: Sequence[int] = (),
) -> dict[str, Any]:
    """A prompt of ``tokens`` tokens that begins with its images, a word behind each.

    Args:
        config: Of the model.
        taken: Arguments that its ``forward`` takes.
        tokens: Of one prompt.
        batch: Prompts.
        images: What the tower takes for them.
        places: Features of each image of a prompt.

    Raises:
        ValueError: The prompt has no room for them.
    """
    if "input_ids" not in taken:
        return images or {}  # an encoder of images alone: its decoder begins by itself
    inputs = text_inputs(config, taken, tokens, batch)
    if not images:
        return inputs
    ids, marker = inputs["input_ids"], marker_of(config)
    is_image = torch.zeros_like(ids)
    begin = 0
    for count in places:
        is_image[:, begin : begin + count] = 1
        begin += count + 1
    if begin > tokens:
        raise ValueError(f"a prompt of {tokens} tokens has no room for {sum(places)} image features and text")
    ids[is_image == 1] = WORD if marker is None else marker
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in taken:
            inputs[name] = is_image
    if "image_embeds_position_mask" in taken:
        inputs["image_embeds_position_mask"] = is_image
    if "image_attention_mask" in taken:
        inputs["image_attention_mask"] = torch.ones(batch, tokens, images["pixel_values"].shape[1], dtype=torch.long)
    if "cross_attention_mask" in taken and "aspect_ratio_mask" in images:
        batch, count, tiles = images["aspect_ratio_mask"].shape
        inputs["cross_attention_mask"] = torch.ones(batch, tokens, count, tiles, dtype=torch.long)
    return inputs | images


def square_inputs(
    config: Any, accepted: Container[str], pixels: torch.Tensor, *, tokens: int, batch: int, places: int
) -> dict[str, Any]:
    """For code of checkpoints that takes ``images``: squares of pixels for places at the beginning of the prompt.

    CogVLM and CogVLM2 tell these places by ``token_type_ids`` and take a list of images for each prompt; GLM-4V-9B takes a
    tensor and three tokens (begin, any, end) that it replaces. Source: their modeling_cogvlm.py, modeling_chatglm.py.

    Args:
        config: Of the model.
        accepted: Arguments that its ``forward`` takes.
        pixels: Of all images.
        tokens: Of one prompt, image features included.
        batch: Prompts.
        places: Image features of one prompt.
    """
    begin = getattr(config, "boi_token_id", None)
    if "token_type_ids" in accepted:
        kinds = torch.zeros(batch, tokens, dtype=torch.long)
        # A checkpoint of this kind puts one token before the image.
        kinds[:, 1 : 1 + places] = 1
        ids = torch.full((batch, tokens), WORD)
        images: Any = [list(row) for row in pixels.split(len(pixels) // batch)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds, "images": images}
    if begin is not None and "position_ids" in accepted:
        ids = torch.full((batch, tokens - places + 3), WORD)
        ids[:, 0], ids[:, 2] = begin, config.eoi_token_id
        position_ids = torch.arange(ids.shape[1]).expand(batch, -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": position_ids, "images": pixels}
    ids = torch.full((batch, tokens), WORD)
    # A mask that hides nothing is refused by a class that takes none.
    mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in accepted else {}
    return {"input_ids": ids, "images": pixels, **mask}
