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
    if family in _NO_TEXT:
        return pictures
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
    for keys in (("vision_config",), ("encoder", "vision_config"), ("encoder",)):
        found = config
        for key in keys:
            found = getattr(found, key, None)
        if found is not None:
            return found
    return config


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


def _placed_patches(model: Any) -> Inputs:
    """Gemma 4: flat patches with their places."""
    vision = _vision(model)
    edge = _first(vision, "patch_size", default=16) * (
        1 if hasattr(vision, "num_hidden_layers") else vision.pooling_kernel_size
    )
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    return {"pixel_values": torch.rand(1, 16, 3 * edge**2), "image_position_ids": places}


def _packed(model: Any) -> Inputs:
    """MiniCPM-V: all patches side by side in one row."""
    patch = _first(_vision(model), "patch_size", default=14)
    return {"pixel_values": torch.randn(1, 3, patch, 16 * patch), "target_sizes": torch.tensor([[4, 4]])}


def _padded_patches(model: Any) -> Inputs:
    """LFM2-VL (SigLIP2 NaFlex): flat patches, padded."""
    patch = _first(_vision(model), "patch_size", default=16)
    return {
        "pixel_values": torch.randn(1, 16, 3 * patch**2),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


def _grid_of_patches(model: Any) -> Inputs:
    """Nemotron: flat patches of RADIO."""
    patch = _first(_vision(model), "patch_size", default=16)
    return {"pixel_values": torch.randn(16, 3 * patch**2), "image_grid_hw": torch.tensor([[4, 4]])}


def _kosmos(model: Any) -> Inputs:
    places = model.config.latent_query_num
    mask = torch.zeros(1, 12, dtype=torch.long)
    mask[:, 1 : 1 + places] = 1
    pictures = _flat_patches(model) if "2.5" in model.config.model_type else _squares(model, ())
    return {**pictures, "image_embeds_position_mask": mask}


def _robot(model: Any) -> Inputs:
    """PI0: where the arm is, noise to be made into actions, and one camera."""
    config = model.config
    vision = config.vlm_config.vision_config
    edge = _edge(vision)
    places = torch.full(((edge // vision.patch_size) ** 2,), config.vlm_config.image_token_id)
    ids = torch.cat((places, torch.arange(WORD, WORD + 4)))[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "state": torch.randn(1, config.max_state_dim),
        "noise": torch.randn(1, config.chunk_size, config.max_action_dim),
        "timestep": torch.tensor([0.5]),
        "pixel_values": torch.randn(1, 1, 3, edge, edge),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    }


def _idefics(model: Any) -> Inputs:
    return {**_tiles(model), "image_attention_mask": torch.ones(1, 12, 1, dtype=torch.long)}


def _stacks(model: Any) -> Inputs:
    """VideoLLaMA 3: Qwen2-VL's way, each image with a merge size."""
    return {**_patches(model), "image_merge_sizes": torch.tensor([2])}


def _stacked_patches(model: Any) -> Inputs:
    """Kimi-K2.5 and PaddleOCR-VL: a stack of square patches."""
    patch = _first(_vision(model), "patch_size", default=14)
    return {"pixel_values": torch.randn(16, 3, patch, patch), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _merged_patches(model: Any) -> Inputs:
    """Inkling 2: squares of merged patches, colours last."""
    vision = _vision(model)
    merge = _first(vision, "merge_size", "spatial_merge_size", default=2)
    edge = vision.patch_size * merge
    return {"pixel_values": torch.randn(4, edge, edge, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}


def _tiles_with_mask(model: Any) -> Inputs:
    return {**_tiles(model, 2), "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool)}


def _pooled(model: Any) -> Inputs:
    """Molmo 2: patches of crops, and which of them are pooled to one token."""
    patch = _first(_vision(model), "patch_size", default=14)
    return {
        "pixel_values": torch.randn(1, 16, 3 * patch**2),
        "image_token_pooling": torch.arange(16).reshape(4, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


def _sized(_: Any) -> Inputs:
    edge = 64
    return {"pixel_values": torch.randn(1, 3, edge, edge), "image_sizes": torch.tensor([[edge, edge]])}


def _two_resolutions(model: Any) -> Inputs:
    edge = _first(model.config.high_res_vision_config, "image_size", default=64)
    return {**_squares(model, ()), "high_res_pixel_values": torch.randn(1, 3, edge, edge)}


def _raw_patches(model: Any) -> Inputs:
    return {"pixel_values": torch.randn(1, 16, 3 * model.config.patch_size**2)}


def _named_images(model: Any) -> Inputs:
    return {"pixel_values_images": _squares(model, ())["pixel_values"]}


def _to_decode(model: Any) -> Inputs:
    """Encoder and decoder: an image in, words out."""
    return {**_squares(model, ()), "decoder_input_ids": torch.arange(WORD, WORD + 4)[None]}


def _words_to_decode(_: Any, inputs: Inputs) -> Inputs:
    return {"decoder_input_ids": inputs["input_ids"][:, :4]}


def _boxes(_: Any, inputs: Inputs) -> Inputs:
    return {"bbox": torch.zeros(*inputs["input_ids"].shape, 4), **_words_to_decode(_, inputs)}


_TEXT_EXTRA: dict[str, Callable[[Any, Inputs], Inputs]] = {"t5gemma2": _words_to_decode, "udop": _boxes}
_OWN: dict[str, Callable[[Any], Inputs]] = {
    **dict.fromkeys(("llava_next", "llava_onevision", "granite4_vision", "llava_next_video"), _any_resolution),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _with_mask),
    **dict.fromkeys(("instructblip", "instructblipvideo"), _question),
    **dict.fromkeys(("gemma4", "gemma4_unified"), _placed_patches),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _packed),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), _kosmos),
    **dict.fromkeys(("pp_formulanet", "vision-encoder-decoder"), _to_decode),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), _stacked_patches),
    "deepseek_vl_hybrid": _two_resolutions,
    "emu3": _sized,
    "fuyu": _raw_patches,
    "granite_docling": _tiles_with_mask,
    "inkling2": _merged_patches,
    "mllama": _mllama,
    "molmo2": _pooled,
    "pi0": _robot,
    "pix2struct": lambda model: {**_flat_patches(model), "decoder_input_ids": torch.arange(WORD, WORD + 4)[None]},
    "lfm2_vl": _padded_patches,
    "nemotron_h_omni": _grid_of_patches,
    "idefics": _idefics,
    "video_llama_3": _stacks,
    "video_llava": _named_images,
}
_PLACES: dict[str, Callable[[Any], int]] = {"instructblipvideo": lambda model: 4 * model.config.num_query_tokens}
"""Families whose tower cannot be asked for its features alone."""
_NO_TEXT = frozenset({"pp_formulanet", "vision-encoder-decoder", "pix2struct"})
"""They read no prompt."""
_WHOLE_INPUTS = frozenset({"mllama", "blip", "git", "idefics", "kosmos-2", "kosmos-2.5", "pi0", "udop"})
"""Families whose prompt has no places for image features."""
NO_IMAGES: dict[str, str] = {"mistral4": "a text model", "evolla": "reads proteins"}


def _prompt(model: Any, pictures: Inputs, taken: Any) -> Inputs:
    """Places for the features of an image, between words."""
    marker = next(
        (
            number
            for name in (
                "image_token_id",
                "image_token_index",
                "image_patch_id",
                "video_token_index",
                "media_placeholder_token_id",
            )
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
    places = _PLACES.get(model.config.model_type)
    if places is not None:
        return places(model)
    encode = getattr(model, "get_image_features", None) or model.model.get_image_features
    taken = inspect.signature(encode).parameters
    own = {name.removesuffix("_images"): value for name, value in pictures.items()}
    if "pixel_values" in taken:
        own = {name: value for name, value in own.items() if name in taken or name == "image_merge_sizes"}
    with torch.no_grad():
        answer = encode(**own)
    found = getattr(answer, "pooler_output", answer)
    if found is None:
        found = answer.last_hidden_state if answer.last_hidden_state is not None else answer.deepstack_features[0][1]
    parts = list(found) if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts if isinstance(part, torch.Tensor))


__all__ = ["HEADS", "NO_IMAGES", "features", "image_inputs", "text_inputs"]
