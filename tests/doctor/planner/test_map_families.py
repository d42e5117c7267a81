"""What single families' code joins, and what their blocks add: maps of accelerate that crash are named, others let pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from vlm_doctor.device_map import MapCheck
from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile
from vlm_doctor.workload import Workload

from .profiles import machine

ROOM = machine([48, 48])
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 56,
}


def profile(model_type: str, tower: list[str], body: str = "model.language_model") -> ModelProfile:
    """A model with a text body of two layers, and these modules besides."""
    names = [f"{body}.embed_tokens.weight", f"{body}.norm.weight", "lm_head.weight", *tower]
    names += [f"{body}.layers.{n}.{part}.weight" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")]
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": ["SomeForConditionalGeneration"],
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": VISION,
    }
    tensors = {name: StoredTensor("BF16", (256, 64), 256 * 64 * 2) for name in names}
    return build_profile(Checkpoint(config, tensors), name="tiny", origin="checkpoint")


def checked(model: ModelProfile, **second: Any) -> MapCheck:
    """A map that has everything on the first device but what is named."""
    return check_map(one_key_each(model, second), model, ROOM, Workload(images=0))


def one_key_each(model: ModelProfile, second: Mapping[str, Any]) -> dict[str, int | str]:
    device_map: dict[str, int | str] = {}
    moved = second["moved"]
    for unit in model.units:
        inside = [key for key in moved if key.startswith(f"{unit.key}.")]
        if not inside:
            device_map[unit.key] = int(unit.key in moved)
            continue
        depth = max(key.count(".") for key in inside)
        for name in (tensor for tensor in model.tensors if tensor.startswith(f"{unit.key}.")):
            key = ".".join(name.split(".")[: depth + 1])
            device_map[key] = int(key in moved)
    return device_map


def errors(found: MapCheck) -> list[str]:
    return [finding.code for finding in found.findings if finding.severity == "error"]


CLIP = [f"model.vision_model.layers.{n}.{part}.weight" for n in range(3) for part in ("self_attn", "mlp")]


@pytest.mark.parametrize("family", ["mllama", "vipllava", "molmo2"])
def test_blocks_whose_outputs_are_joined_must_share_a_device(family: str) -> None:
    model = profile(family, CLIP)
    found = checked(model, moved=["model.vision_model.layers.2"])

    assert errors(found) == ["VLM615"]
    message = found.findings[0].message
    assert message.startswith("The blocks of model.vision_model are on cuda:0 and cuda:1, and their outputs are joined: ")
    assert found.corrected is not None
    assert errors(check_map(found.corrected, model, ROOM, Workload(images=0))) == []
    assert errors(checked(model, moved=["model.vision_model"])) == []
    assert errors(checked(profile("llava", CLIP), moved=["model.vision_model.layers.2"])) == []


@pytest.mark.parametrize(
    ("family", "tower", "moved"),
    [
        (
            "deepseek_ocr2",
            ["model.vision_tower.sam_encoder.proj.conv1.weight", "model.vision_tower.query_768_resolution.weight"],
            "model.vision_tower.query_768_resolution",
        ),
        (
            "unlimited_ocr",
            ["model.vision_tower.sam_encoder.proj.conv1.weight", "model.vision_tower.vision_encoder.encoder.weight"],
            "model.vision_tower.vision_encoder",
        ),
        (
            "deepseek_vl_hybrid",
            ["model.high_res_vision_proj.conv1.weight", "model.high_res_vision_alpha"],
            "model.high_res_vision_alpha",
        ),
    ],
)
def test_what_a_familys_code_joins_is_named_with_its_line(family: str, tower: list[str], moved: str) -> None:
    model = profile(family, tower)
    found = checked(model, moved=[moved])

    assert errors(found) == ["VLM615"]
    assert moved in found.findings[0].message
    assert f"modeling_{family}.py" in found.findings[0].message
    assert errors(checked(model, moved=[])) == []


BERT = [
    f"qformer.encoder.layer.{n}.{part}.weight"
    for n in (0, 1)
    for part in (
        "attention.self.query",
        "attention.self.key",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
]


def test_a_block_that_adds_inside_its_output_may_be_cut_between_its_parts() -> None:
    model = profile("blip-2", BERT)
    block = "qformer.encoder.layer.0"
    found = checked(model, moved=[f"{block}.output", f"{block}.intermediate", "qformer.encoder.layer.1"])

    assert errors(found) == []
    assert "It runs, since what it adds is given to its parts." in found.findings[0].message
    assert errors(checked(model, moved=[f"{block}.attention.output.dense", f"{block}.attention.output"])) == []


def test_the_inside_of_its_attention_must_be_whole() -> None:
    model = profile("blip-2", BERT)
    assert errors(checked(model, moved=["qformer.encoder.layer.0.attention.self.key"])) == ["VLM614"]
    fused = [name.replace("attention.self", "attention.core") for name in BERT]
    assert errors(checked(profile("blip-2", fused), moved=["qformer.encoder.layer.0.attention.core.key"])) == ["VLM614"]


NESTED = {
    "model.vqmodel.encoder.down.4.block": "model.vqmodel.encoder.down.4.block.{}",
    "model.vision_tower.blocks": "model.vision_tower.blocks.2.{}",
}


@pytest.mark.parametrize("pattern", NESTED.values(), ids=NESTED)
def test_of_lists_in_lists_the_inner_items_are_blocks(pattern: str) -> None:
    parts = [f"{pattern.format(n)}.{part}.weight" for n in (0, 1) for part in ("conv1", "conv2")]
    model = profile("chameleon", parts)

    assert errors(checked(model, moved=[pattern.format(1)])) == []
    assert errors(checked(model, moved=[f"{pattern.format(1)}.conv2"])) == ["VLM614"]


def test_parts_called_blocks_are_blocks() -> None:
    stage = "model.vision_tower.blocks.0"
    parts = [f"{stage}.{half}_block.{part}.weight" for half in ("spatial", "channel") for part in ("attn", "ffn")]
    model = profile("florence2", parts)

    assert errors(checked(model, moved=[f"{stage}.channel_block"])) == []
    assert errors(checked(model, moved=[f"{stage}.channel_block.ffn"])) == ["VLM614"]
