"""The call that a trial makes: images of noise and a text of the planned length. Used by :mod:`.try_child` only."""

from __future__ import annotations

import inspect
from typing import Any

from ..trace import Pictures
from .loading import load_processor, prompt_text

_QUESTION = "Describe what you see."
_FILLER = " the"
"""One token in most tokenizers, as often as it is repeated."""
_NOTED_TOKENS = 8
"""A prompt is cut to length by whole words, and not every tokenizer makes one token of a word."""
_MEASURED = 64
"""Repetitions by which the tokens of one are told."""


def make_prompt(
    transformers: Any, model: Any, work: dict[str, Any], *, name: str, revision: str | None, trust_remote_code: bool
) -> tuple[dict[str, Any], int, Any, list[str]]:
    """Inputs of the call, where the first stage is; its tokens; the processor that made it; what has to be said of it.

    Args:
        transformers: The module.
        model: Loaded.
        work: ``batch``, ``pictures`` (the fields of :class:`.Pictures`, or ``None``), ``image_tokens``, ``prompt_tokens``.
        name: Folder or hub id of the checkpoint.
        revision: Of the hub id.
        trust_remote_code: Allow Python code of the checkpoint to run.
    """
    import torch

    torch.manual_seed(0)
    work = {**work, "pictures": Pictures(**work["pictures"]) if work["pictures"] else None}
    notes: list[str] = []
    processor = None
    try:
        processor = load_processor(transformers, name, revision, model.config, trust_remote_code=trust_remote_code)
        inputs = _by_processor(processor, work)
    except Exception as error:  # noqa: BLE001 - foreign code: that it cannot write a prompt is told, and is no verdict
        notes.append(
            f"Its processor makes no prompt here ({type(error).__name__}: {' '.join(str(error).split())[:200]}): the model "
            "was called with token numbers and pixels of the planned shape instead."
        )
        processor, inputs = None, _by_shape(model, work, name)
    length = _length(inputs, model, work)
    if abs(length - work["prompt_tokens"]) > _NOTED_TOKENS:
        notes.append(f"The prompt has {length:,} tokens; {work['prompt_tokens']:,} were planned.")
    return {key: _placed(value, model) for key, value in inputs.items()}, length, processor, notes


def _length(inputs: dict[str, Any], model: Any, work: dict[str, Any]) -> int:
    """Tokens of a prompt, those counted that a GLM-4V-9B puts in the place of three."""
    if "input_ids" not in inputs:
        return 1  # the decoder behind an encoder of images alone begins by itself
    length = int(inputs["input_ids"].shape[1])
    begin = getattr(model.config, "boi_token_id", None)
    is_short = "images" in inputs and begin is not None and int(inputs["input_ids"][0, 0]) == begin
    return length + work["image_tokens"] - 3 if is_short else length


def _by_processor(processor: Any, work: dict[str, Any]) -> dict[str, Any]:
    """As a user makes it: chat template, tokenizer, image processor. The text is as long as the prompt is to be."""
    if work["pictures"] and not hasattr(processor, "image_processor"):
        raise ValueError("it takes no images")
    tokenizer = getattr(processor, "tokenizer", processor)
    bare = _processed(processor, work, _QUESTION)["input_ids"].shape[1]
    each = len(tokenizer(_FILLER * _MEASURED, add_special_tokens=False)["input_ids"]) / _MEASURED
    count = max(0, int((work["prompt_tokens"] - bare) / each))
    return dict(_processed(processor, work, _FILLER * count + " " + _QUESTION if count else _QUESTION))


def _processed(processor: Any, work: dict[str, Any], text: str) -> Any:
    pictures = work["pictures"]
    prompts = [prompt_text(processor, pictures.images if pictures else 0, text)] * work["batch"]
    if pictures is None:
        return processor(text=prompts, return_tensors="pt")
    images = [_noise(pictures.width, pictures.height, seed) for seed in range(pictures.images)]
    return processor(text=prompts, images=[images] * work["batch"], return_tensors="pt")


def _noise(width: int, height: int, seed: int) -> Any:
    import torch
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height * width * 3,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (width, height), bytes(pixels.untyped_storage()))


def _by_shape(model: Any, work: dict[str, Any], name: str) -> dict[str, Any]:
    """Token numbers that mean nothing, and noise in the place of pixels."""
    import torch

    from ..sources.trace_inputs import prompt_inputs, square_inputs
    from ..sources.trace_pictures import count_features, encoder_of, image_inputs, names_taken

    accepted = inspect.signature(type(model).forward).parameters
    tokens, batch, pictures = work["prompt_tokens"], work["batch"], work["pictures"]
    if pictures is None:
        return prompt_inputs(model.config, accepted, tokens, batch)
    if "images" in accepted:
        pixels = torch.randn(batch * pictures.images, 3, pictures.height, pictures.width)
        return square_inputs(model.config, accepted, pixels, tokens=tokens, batch=batch, places=work["image_tokens"])
    encode = encoder_of(model)
    images = image_inputs(model.config, names_taken(accepted, encode), name, pictures, batch)
    # Flattened patches have their places in front of their pixels: what is no pixel stays as it is.
    images = {key: _noise_like(value) if "pixel_values" in key else value for key, value in images.items()}
    with torch.no_grad():
        placed = {key: _placed(value, model) for key, value in images.items()}
        # Kosmos-2.5 has no method that encodes images alone, and one image in each prompt.
        told = getattr(model.config, "latent_query_num", work["image_tokens"])
        features = count_features(encode, placed) // batch if encode else told
    places = [features // pictures.images] * pictures.images
    # A word stands behind each image, also where less text was planned.
    tokens = max(tokens, sum(places) + pictures.images)
    return prompt_inputs(model.config, accepted, tokens, batch, images=images, places=places)


def _noise_like(value: Any) -> Any:
    """Noise in the shape of pixels, which image processors may give as a list; whole numbers stay."""
    import torch

    if isinstance(value, (list, tuple)):
        return [_noise_like(item) for item in value]
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return torch.randn_like(value) if is_real else value


def _placed(value: Any, model: Any) -> Any:
    """A tensor where the embedding is, in the model's dtype; anything else, such as lists of them, likewise or as it is."""
    import torch

    if isinstance(value, (list, tuple)):
        return [_placed(item, model) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    device = _input_device(model)
    return value.to(device, model.dtype) if value.is_floating_point() else value.to(device)


def _input_device(model: Any) -> Any:
    """Where the input embedding is; of one that is offloaded (meta) the first GPU, where it is computed."""
    import torch

    device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cuda", 0) if device.type == "meta" else device
