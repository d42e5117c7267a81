from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vlm_doctor.sources.checkpoint import DTYPE_BITS

Shapes = Mapping[str, tuple[str, list[int]]]

LLAVA_CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "vocab_size": 32,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}


def llava_tensors() -> dict[str, tuple[str, list[int]]]:
    tensors: dict[str, tuple[str, list[int]]] = {
        "language_model.model.embed_tokens.weight": ("F16", [32, 8]),
        "vision_tower.vision_model.embeddings.class_embedding": ("F16", [4]),
        "vision_tower.vision_model.embeddings.position_embedding.weight": ("F16", [5, 4]),
        "multi_modal_projector.linear_1.weight": ("F16", [8, 4]),
        "multi_modal_projector.linear_1.bias": ("F16", [8]),
        "language_model.model.norm.weight": ("F16", [8]),
        "language_model.lm_head.weight": ("F16", [32, 8]),
    }
    for layer in range(2):
        tensors[f"vision_tower.vision_model.encoder.layers.{layer}.mlp.fc1.weight"] = ("F16", [6, 4])
    for layer in range(12):
        stem = f"language_model.model.layers.{layer}"
        tensors[f"{stem}.self_attn.k_proj.weight"] = ("F16", [8, 8])
        tensors[f"{stem}.mlp.up_proj.weight"] = ("F16", [16, 8])
        tensors[f"{stem}.input_layernorm.weight"] = ("F16", [8])
    return tensors


def header_of(tensors: Shapes) -> tuple[bytes, int]:
    """Header in JSON, and bytes of the data it describes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return json.dumps(entries).encode(), end


def write_safetensors(path: Path, tensors: Shapes) -> None:
    """A file with a true header and, sparse, the right size."""
    header, data_bytes = header_of(tensors)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + data_bytes)


@pytest.fixture
def llava_config() -> dict[str, Any]:
    return json.loads(json.dumps(LLAVA_CONFIG))  # type: ignore[no-any-return]


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder: ``write_checkpoint(config, tensors, shards=3)``."""

    def write(config: Any = LLAVA_CONFIG, tensors: Shapes | None = None, shards: int = 1, folder: Path = tmp_path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
        contents = list((llava_tensors() if tensors is None else tensors).items())
        if shards == 1:
            write_safetensors(folder / "model.safetensors", dict(contents))
            return folder
        weight_map = {}
        for shard in range(shards):
            name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = dict(contents[shard::shards])
            write_safetensors(folder / name, part)
            weight_map.update(dict.fromkeys(part, name))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    return write
