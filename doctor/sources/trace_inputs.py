"""Inputs of a true-size model without an image and without a tokenizer. Used by :mod:`.trace_child` only.

Images: from the checkpoint's own image processor where its files are at hand; else by what is known of the family.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

WORD = 5
"""A token number that means nothing special to any of the families."""
OTHER_WORD = 6
TAKE_SQUARES = ("cogvlm", "chatglm")
"""Types of models whose own code takes what :func:`square_inputs` makes."""
_MARKERS = ("image_token_id", "image_token_index", "img_context_token_id", "media_placeholder_token_id")
"""Names of the token that stands for an image feature; the last two of InternVL-Chat and Kimi-VL."""


def text_inputs(config: Any, tokens: int, batch: int) -> dict[str, Any]:
    """Token numbers that mean nothing, and a mask that hides nothing."""
    ids = torch.full((batch, tokens), WORD if marker_of(config) != WORD else OTHER_WORD)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type == "gemma3":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def marker_of(config: Any) -> int | None:
    """Number of the token that stands for an image feature; ``None`` where the config has none."""
    return next((number for name in _MARKERS if (number := getattr(config, name, None)) is not None), None)


def image_inputs(
    config: Any, folder: str | None, *, images: int, height: int, width: int, batch: int, sequences: int
) -> dict[str, Any]:
    """What the vision tower takes for ``images`` images in each of ``batch`` prompts; pixels in the default dtype."""
    made = _processed(folder, images, height, width, batch) if folder else None
    return made or _by_family(config, images=images, height=height, width=width, batch=batch, sequences=sequences)


def _processed(folder: str, images: int, height: int, width: int, batch: int) -> dict[str, Any] | None:
    """Inputs by the checkpoint's own processor; ``None`` when it has none that works here."""
    try:
        from PIL import Image
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        pictures = [[Image.new("RGB", (width, height)) for _ in range(images)] for _ in range(batch)]
        try:
            made = processor(images=pictures, return_tensors="pt")
        except (ValueError, TypeError):
            made = processor(images=[one for row in pictures for one in row], return_tensors="pt")
    except (ImportError, OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    dtype = torch.get_default_dtype()
    names = {
        "pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "aspect_ratio_ids", "aspect_ratio_mask",
        "pixel_position_ids", "image_position_ids", "spatial_shapes", "batch_num_images", "grid_hw",
    }  # fmt: skip
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in made.items()
        if name in names and isinstance(value, torch.Tensor)
    }


def _by_family(config: Any, *, images: int, height: int, width: int, batch: int, sequences: int) -> dict[str, Any]:
    """By model type: stacks of patches with their grid, or squares of the tower's own size."""
    vision, kind = config.vision_config, config.model_type
    count = batch * images
    if kind == "kimi_vl":
        # Patches in a row, and how many there are along each edge. Source: its image_processing_kimi_vl.py.
        cell = vision.merge_kernel_size[0] * vision.patch_size
        rows, columns = (max(1, round(edge / cell)) * vision.merge_kernel_size[0] for edge in (height, width))
        patches = torch.empty(count * rows * columns, 3, vision.patch_size, vision.patch_size)
        return {"pixel_values": patches, "image_grid_hws": torch.tensor([[rows, columns]] * count)}
    merge: int = getattr(vision, "spatial_merge_size", 0)
    temporal: int = getattr(vision, "temporal_patch_size", 0)
    if merge and temporal:
        rows, columns = (max(1, round(edge / vision.patch_size / merge)) * merge for edge in (height, width))
        channels: int = getattr(vision, "in_channels", 0) or getattr(vision, "in_chans", 3)
        elements = channels * temporal * vision.patch_size**2
        grid = torch.tensor([[1, rows, columns]] * count)
        return {"pixel_values": torch.empty(count * rows * columns, elements), "image_grid_thw": grid}
    if vision.model_type == "pixtral":
        edges = [max(1, round(edge / vision.patch_size)) * vision.patch_size for edge in (height, width)]
        return {"pixel_values": torch.empty(count, 3, *edges), "image_sizes": torch.tensor([edges] * count)}
    size = vision.image_size
    side = size[0] if isinstance(size, (list, tuple)) else size
    squares = torch.empty(batch, sequences, 3, side, side)
    if kind == "mllama":
        tiles = sequences // images
        return {
            "pixel_values": squares.reshape(batch, images, tiles, 3, side, side),
            "aspect_ratio_ids": torch.full((batch, images), 6 if tiles == 4 else 1),
            "aspect_ratio_mask": torch.ones(batch, images, tiles, dtype=torch.long),
        }
    if kind in ("idefics2", "idefics3", "smolvlm"):
        mask = torch.ones(batch, sequences, side, side, dtype=torch.bool)
        return {"pixel_values": squares, "pixel_attention_mask": mask}
    if kind.startswith("llava_") and "video" not in kind:
        tiles = squares.reshape(count, sequences // images, 3, side, side)
        return {"pixel_values": tiles, "image_sizes": torch.tensor([[height, width]] * count)}
    return {"pixel_values": squares.flatten(0, 1)}


def prompt_inputs(config: Any, tokens: int, batch: int, images: dict[str, Any], marked: int) -> dict[str, Any]:
    """A prompt of ``tokens`` tokens that begins with ``marked`` places for image features, and its images."""
    inputs = text_inputs(config, tokens, batch)
    if not images:
        return inputs
    marker = WORD if (found := marker_of(config)) is None else found
    inputs["input_ids"][:, :marked] = marker
    kinds = (inputs["input_ids"] == marker).long()
    if "image_grid_thw" in images:
        inputs["mm_token_type_ids"] = kinds.int()
    if config.model_type in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = kinds
    if config.model_type == "mllama":
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
