"""Tiny vision-language checkpoints, images, and machines that are not there, for users' own suites (``docs/testing.md``).

Each checkpoint is the real class of its family with the real processor, only small (well below 1 MiB) and with random
weights: its answers mean nothing, everything else behaves as with the model of a hub. No network is used.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .fakes.fake_machines import fake_machine, machine_in_use
from .fakes.tiny_families import ASSISTANT, CHAT_TEMPLATE, END, FAMILIES, MAX_POSITIONS, PAD, PRINTABLE, USER, Family

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

__all__ = [
    "TINY_FAMILIES",
    "fake_machine",
    "machine_in_use",
    "make_tiny_vlm",
    "tiny_config",
    "tiny_image",
    "write_processor",
]

TINY_FAMILIES: tuple[str, ...] = tuple(FAMILIES)
"""What :func:`make_tiny_vlm` can build, in the words of ``model_type`` in config.json."""


def make_tiny_vlm(folder: Path, family: str, *, seed: int = 0) -> Path:
    """Write a tiny checkpoint with random weights: config, safetensors, tokenizer, processor and chat template.

    Args:
        folder: Where to write; created if need be. Existing files of the same names are overwritten.
        family: One of :data:`TINY_FAMILIES`.
        seed: The same seed gives the same weights, bit by bit. The random state of torch is left as it was.

    Returns:
        ``folder``, ready for ``from_pretrained``. The model answers in printable ASCII and never ends by itself:
        ``max_new_tokens=4`` gives four characters.

    Raises:
        ValueError: The family is unknown.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    token_ids = write_processor(folder, family)
    config = AutoConfig.for_model(**tiny_config(family, token_ids))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # Not torch.manual_seed: it would seed the GPUs too, which nothing here restores.
        torch.default_generator.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        # Again, because classes draw differently from one version of transformers to the next.
        torch.default_generator.manual_seed(seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                # The classes' own 0.02 would drown the prompt: wide enough that text and image change the answer.
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.generation_config.suppress_tokens = list(range(PRINTABLE, config.get_text_config().vocab_size))
    model.generation_config.pad_token_id = token_ids[PAD]
    model.generation_config.eos_token_id = token_ids[END]
    model.save_pretrained(folder)
    return folder


def tiny_config(family: str, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """What :func:`make_tiny_vlm` puts into config.json, ``model_type`` included.

    Args:
        family: One of :data:`TINY_FAMILIES`.
        token_ids: Token to id, from :func:`write_processor`.
    """
    chosen = _family(family)
    end_and_pad = {"bos_token_id": None, "eos_token_id": token_ids[END], "pad_token_id": token_ids[PAD]}
    text = {**chosen.config["text_config"], **end_and_pad, "vocab_size": len(token_ids)}
    ids = {key: token_ids[token] for key, token in chosen.token_ids.items()}
    return {"model_type": family, **chosen.config, **ids, "text_config": text}


def write_processor(folder: Path, family: str) -> dict[str, int]:
    """Write tokenizer, image processor, processor and chat template of a family, without a model.

    The tokenizer knows the 256 bytes and the special tokens of the family, so any text can be encoded.

    Args:
        folder: Where to write; created if need be.
        family: One of :data:`TINY_FAMILIES`.

    Returns:
        Token to id, for the ids that config.json must repeat.

    Raises:
        ValueError: The family is unknown.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    chosen = _family(family)
    special = dict.fromkeys([END, PAD, USER, ASSISTANT, *chosen.token_ids.values(), *chosen.named_tokens.values()])
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE % chosen.image_prompt, encoding="utf-8")
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": chosen.tokenizer_class,
            "eos_token": END,
            "pad_token": PAD,
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": MAX_POSITIONS,
            "extra_special_tokens": chosen.named_tokens,
        },
        "preprocessor_config.json": {**chosen.image_processor, "processor_class": chosen.processor_class},
        "processor_config.json": {**chosen.processor, "processor_class": chosen.processor_class},
    }
    if chosen.video_processor is not None:
        files["video_preprocessor_config.json"] = {
            **chosen.image_processor,
            "video_processor_type": chosen.video_processor,
            "processor_class": chosen.processor_class,
        }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def tiny_image(width: int = 64, height: int = 48, *, seed: int = 0) -> Image:
    """An RGB picture of colored rectangles: the same seed and size give the same pixels.

    Args:
        width: Pixels.
        height: Pixels.
        seed: Chooses places and colors.
    """
    from PIL import Image, ImageDraw

    chance = random.Random(seed)
    image = Image.new("RGB", (width, height), tuple(chance.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        left, right = sorted(chance.randrange(width) for _ in range(2))
        top, bottom = sorted(chance.randrange(height) for _ in range(2))
        draw.rectangle((left, top, right, bottom), fill=tuple(chance.randrange(256) for _ in range(3)))
    return image


def _family(name: str) -> Family:
    try:
        return FAMILIES[name]
    except KeyError:
        raise ValueError(f"no tiny model of family {name!r}; there are {', '.join(TINY_FAMILIES)}") from None
