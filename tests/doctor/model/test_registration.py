"""The order in which a class registers its modules, put together from tables and a checkpoint's names."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_doctor.model import ModelProfile, Registered
from vlm_doctor.sources.catalogue import catalogue
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile

REMOTE = {"auto_map": {"AutoModel": "modeling.Model"}}


def profile(
    name: str, *, config: dict[str, Any] | None = None, more: dict[str, StoredTensor] | None = None
) -> ModelProfile:
    known = catalogue()[name].checkpoint()
    return build_profile(
        Checkpoint({**known.config, **(config or {})}, {**known.tensors, **(more or {})}), name=name, origin="catalogue"
    )


def keys(items: tuple[Registered, ...]) -> list[str]:
    return [item.unit.key for item in items]


@pytest.mark.parametrize("name", catalogue())
@pytest.mark.parametrize("version", ["4", "5"])
def test_every_model_of_the_catalogue_is_known_to_the_byte(name: str, version: str) -> None:
    found = profile(name)
    items = found.registered[version]

    stored = sum(item.unit.stored_bytes for item in items)
    buffers = sum(t.stored_bytes for tensor, t in catalogue()[name].checkpoint().tensors.items() if "inv_freq" in tensor)
    assert stored in (found.stored_bytes, found.stored_bytes - buffers)
    assert len(set(keys(items))) == len(items)
    assert {item.owner for item in items if item.unit.elements} <= {unit.key for unit in found.units}


def test_the_vision_tower_of_remote_code_comes_last() -> None:
    items = keys(profile("THUDM/glm-4v-9b").registered["5"])

    assert items[0] == "transformer.embedding.word_embeddings"
    assert items.index("transformer.output_layer") < items.index("transformer.vision.boi")
    assert items[-1] == "transformer.vision.conv"


def test_numbers_count_and_do_not_sort_as_text() -> None:
    items = keys(profile("Qwen/Qwen2.5-VL-7B-Instruct").registered["5"])

    layers = [key for key in items if ".layers." in key]
    assert layers == [f"model.language_model.layers.{number}" for number in range(28)]


def test_a_clip_tower_has_one_level_less_in_transformers_5() -> None:
    found = profile("llava-hf/llava-1.5-7b-hf").registered

    assert "model.vision_tower.vision_model.encoder.layers.0" in keys(found["4"])
    assert "model.vision_tower.encoder.layers.0" in keys(found["5"])


def test_blocks_parameters_and_buffers_are_told_apart() -> None:
    items = {item.unit.key: item for item in profile("THUDM/glm-4v-9b").registered["5"]}

    assert items["transformer.encoder.layers.0"].block == "GLMBlock"
    assert items["transformer.vision.boi"].is_parameter
    assert items["transformer.vision.transformer.layers.0.mlp.fc1"].block == ""
    rotary = {item.unit.key: item for item in profile("Qwen/Qwen2.5-VL-7B-Instruct").registered["5"]}
    assert rotary["model.language_model.rotary_emb"].buffer_bytes > 0


def test_the_text_part_may_be_of_another_family() -> None:
    llava = "llava-hf/llava-1.5-7b-hf"
    text = {**catalogue()[llava].config["text_config"], "model_type": "mistral"}

    items = profile(llava, config={"text_config": text}).registered["5"]
    assert {item.block for item in items if item.unit.role == "layer"} == {"MistralDecoderLayer"}


def test_a_text_part_that_nobody_knows_is_not_known() -> None:
    llava = "llava-hf/llava-1.5-7b-hf"
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
    text = {**catalogue()[llava].config["text_config"], **sizes, "vocab_size": 32064, "model_type": "nobody_knows"}

    assert profile(llava, config={"text_config": text}).registered == {}


def test_a_tensor_without_a_place_makes_it_unknown() -> None:
    more = {"model.visual.surprise.weight": StoredTensor("BF16", (2, 2), 8)}

    assert profile("Qwen/Qwen2.5-VL-7B-Instruct", more=more).registered == {}


def test_buffers_that_old_checkpoints_store_do_not() -> None:
    more = {"model.language_model.embed_positions.inv_freq": StoredTensor("F32", (64,), 256)}

    assert set(profile("Qwen/Qwen2.5-VL-7B-Instruct", more=more).registered) == {"4", "5"}


def test_an_unknown_class_is_not_known() -> None:
    glm = "THUDM/glm-4v-9b"

    assert profile(glm, config={"model_type": "other"}).registered == {}
    native = profile("Qwen/Qwen2.5-VL-7B-Instruct", config={**REMOTE, "architectures": ["Own"]})
    assert native.registered == {}, "a class of the checkpoint's own may register what it likes"
