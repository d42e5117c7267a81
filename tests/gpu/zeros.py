"""A checkpoint of some size that costs no disk: weights of zeros in a sparse file, read as any other one."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

from pytest_vlmgpu.testing import make_tiny_vlm

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, INNER = 4096, 14336
"""As in language models of 8 billion parameters."""
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
"""In bfloat16."""


def make_model_of_zeros(folder: Path, layers: int, *, hidden: int = HIDDEN, inner: int = INNER) -> int:
    """Write a LLaVA with so many layers; returns the bytes of its weights."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForImageTextToText

    make_tiny_vlm(folder, "llava")
    config = json.loads((folder / "config.json").read_text())
    heads = max(1, hidden // 128)
    config["text_config"].update(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers)
    config["text_config"].update(num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads)
    config["text_config"].pop("layer_types", None)
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    header, size = {}, 0
    for name, parameter in model.named_parameters():
        end = size + parameter.numel() * 2
        header[_as_saved(name, names)] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    # The file before is not to be written to: it may be mapped.
    (folder / "model.safetensors").unlink()
    with (folder / "model.safetensors").open("wb") as written:
        written.write(struct.pack("<Q", len(text)) + text)
        written.truncate(8 + len(text) + size)
    return size


def _as_saved(name: str, saved: set[str]) -> str:
    """The name of a weight as the tiny checkpoint writes it: classes rename their modules from version to version."""
    parts = name.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts))]
    for end in ends:
        layerless = ".".join("0" if part.isdigit() else part for part in end.split("."))
        found = [each for each in saved if each == layerless or each.endswith(f".{layerless}")]
        if len(found) == 1:
            beginning = found[0].removesuffix(layerless)
            return beginning + end
    return name
