"""What single families' code joins, and what their blocks add: maps of accelerate that crash are named, others let pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from vlm_doctor.data.joins import MASKED_AT_INPUTS, WHOLE
from vlm_doctor.device_map import MapCheck
from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.constraints import can_break_tower, chain
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.planner.planning import plan
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile
from vlm_doctor.workload import Policy, Workload

from .profiles import machine, with_transformers

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


PROJECTOR = [f"model.visual.merger.{part}_proj.weight" for part in ("gate", "up", "down")]


def test_a_gate_and_what_it_multiplies_must_share_a_device() -> None:
    blocks = [f"model.visual.blocks.{n}.{part}.weight" for n in range(2) for part in ("attn", "mlp")]
    model = profile("exaone4_5", [*blocks, *PROJECTOR])
    split: dict[str, int | str] = {unit.key: 0 for unit in model.units if not unit.key.startswith("model.visual")}
    split["model.visual.blocks"] = 0
    parts: dict[str, int | str] = {name.removesuffix(".weight"): 0 for name in PROJECTOR}
    down: dict[str, int | str] = {"model.visual.merger.down_proj": 1}

    def codes(**more: int) -> list[str]:
        own = {f"model.visual.merger.{name}": device for name, device in more.items()}
        return errors(check_map({**split, **parts, **down, **own}, model, ROOM, Workload(images=0)))

    assert codes() == []
    assert codes(act_fn=0) == []
    assert codes(act_fn=1) == ["VLM614"]
    assert codes(up_proj=1) == ["VLM614"]


def test_masks_made_at_the_inputs_want_the_embedding_there() -> None:
    model = profile("paligemma", CLIP)
    text = [unit.key for unit in model.units if unit.key != "model.vision_model"]
    found = checked(model, moved=text)

    assert errors(found) == ["VLM615"]
    assert "block_sequence_ids" in found.findings[0].message
    assert errors(checked(profile("llava", CLIP), moved=text)) == []
    assert errors(checked(model, moved=["model.language_model.layers.1"])) == []
    old = check_map(one_key_each(model, {"moved": text}), model, with_transformers(ROOM, "4.57.6"), Workload(images=0))
    assert errors(old) == []
    whole: dict[str, int | str] = {"model": 1, "lm_head": 0}
    assert errors(check_map(whole, model, ROOM, Workload(images=0))) == []


@pytest.mark.parametrize("family", sorted(MASKED_AT_INPUTS))
def test_the_tower_of_a_family_with_such_a_mask_is_never_cut(family: str) -> None:
    tower = [f"model.vision_tower.encoder.layers.{n}.{part}.weight" for n in range(3) for part in ("self_attn", "mlp")]

    assert can_break_tower(profile("llava", tower))
    assert not can_break_tower(profile(family, tower))


def test_a_tower_whose_result_is_sorted_at_the_inputs_ends_there() -> None:
    tower = [f"model.vision_tower.layers.{n}.{part}.weight" for n in range(2) for part in ("self_attn", "mlp")]
    model = profile("kimi_k25", [*tower, "model.vision_tower.final_layernorm.weight"])
    found = checked(model, moved=["model.vision_tower.final_layernorm", "model.vision_tower.layers"])

    assert "VLM615" in errors(found)
    assert "merge_index" in " ".join(finding.message for finding in found.findings)
    assert found.corrected is not None
    assert errors(check_map(found.corrected, model, ROOM, Workload(images=0))) == []
    assert errors(checked(model, moved=["model.vision_tower"])) == []


POSITIONS = ("model.visual.patch_embed.proj", "model.visual.pos_embed", "model.visual.merger.linear_fc1")
BLOCKS = [f"model.visual.blocks.{n}.{part}.weight" for n in range(2) for part in ("attn", "mlp")]


@pytest.mark.parametrize(("release", "is_error"), [("5.17.0", True), ("5.23.0", True), ("4.57.6", False)])
def test_a_table_of_positions_is_weighed_where_the_inputs_of_the_tower_are(release: str, is_error: bool) -> None:
    model = profile("qwen3_vl_moe", [*BLOCKS, *(f"{part}.weight" for part in POSITIONS)])
    where = with_transformers(ROOM, release)
    text: dict[str, int | str] = {unit.key: 0 for unit in model.units if unit.key != "model.visual"}
    rest: dict[str, int | str] = {"model.visual.blocks": 1, "model.visual.merger": 1, "model.visual.rotary_pos_emb": 1}
    parts = {**text, **rest, "model.visual.patch_embed": 1, "model.visual.pos_embed": 1}

    found = check_map(parts, model, where, Workload(images=0))

    assert errors(found) == (["VLM615"] if is_error else [])
    if is_error:
        assert "model.visual.pos_embed is on cuda:1 while the weights of its positions stay" in found.findings[0].message
        assert found.corrected is not None
        assert errors(check_map(found.corrected, model, where, Workload(images=0))) == []
    assert errors(check_map({**parts, "model.visual.pos_embed": 0}, model, where, Workload(images=0))) == []
    assert errors(check_map({**text, "model.visual": 1}, model, where, Workload(images=0))) == []
    cut = {**text, "model.visual": 1, "model.visual.pos_embed": 0}
    assert ("VLM615" in errors(check_map(cut, model, where, Workload(images=0)))) == is_error


def test_a_map_of_texts_is_judged_wherever_accelerate_may_send_the_inputs() -> None:
    model = profile("git", CLIP)
    numbers = one_key_each(model, {"moved": ["model.language_model.norm", "lm_head", "model.language_model.layers.1"]})
    texts = {key: f"cuda:{device}" for key, device in numbers.items()}
    harmless = profile("llava", CLIP)

    found = check_map(texts, model, ROOM, Workload(images=0))

    assert errors(check_map(numbers, model, ROOM, Workload(images=0))) == []
    assert errors(found) == ["VLM618"]
    assert "In some runs model.language_model.embed_tokens is on cuda:0 and the inputs are on cuda:1" in (
        found.findings[0].message
    )
    assert found.corrected == numbers
    assert errors(check_map(texts, harmless, ROOM, Workload(images=0))) == []
    turned = {key: f"cuda:{1 - int(device)}" for key, device in numbers.items()}
    assert "VLM615" in errors(check_map(turned, model, ROOM, Workload(images=0)))


@pytest.mark.parametrize(
    ("family", "parts"),
    [("kimi_k25", ("patch_embed.proj", "patch_embed.pos_emb")), ("kosmos-2.5", ("embeddings.row", "embeddings.column"))],
)
def test_what_is_called_an_embedding_and_feeds_one_part_with_the_other_may_be_cut(
    family: str, parts: tuple[str, str]
) -> None:
    tower = "model.vision_tower"
    names = [f"{tower}.layers.{n}.{part}.weight" for n in range(2) for part in ("self_attn", "mlp")]

    def found(model_type: str) -> list[str]:
        model = profile(model_type, [*names, *(f"{tower}.{part}.weight" for part in parts)])
        device_map: dict[str, int | str] = {unit.key: 0 for unit in model.units if unit.key != tower}
        device_map |= {f"{tower}.layers": 0, f"{tower}.{parts[0]}": 1, f"{tower}.{parts[1]}": 0}
        return errors(check_map(device_map, model, ROOM, Workload(images=0)))

    assert found("llava") == ["VLM614"]
    assert found(family) == []


def test_layers_of_two_bodies_that_share_a_cache_are_in_pairs() -> None:
    model = profile("pi0", CLIP)
    together: dict[str, int | str] = {"model.vlm.vision_tower": 1, "model.vlm.language_model": 0, "model.dit": 0}
    found = check_map({**together, "model.dit": 1}, model, ROOM, Workload(images=0))

    assert errors(found) == ["VLM615"]
    assert "model.dit.layers.0" in found.findings[0].message
    assert errors(check_map(together, model, ROOM, Workload(images=0))) == []
    assert errors(check_map({"model.dit": 0, "model.vlm.vision_tower": 1}, model, ROOM, Workload(images=0))) == []


@pytest.mark.parametrize("family", sorted(WHOLE))
def test_a_family_that_no_cut_suits_stays_on_one_gpu(family: str) -> None:
    model = profile(family, CLIP)
    planned = plan(model, ROOM, Workload(images=0))

    assert planned.fits
    assert planned.device_map == {"": 0}
    assert not plan(model, ROOM, Workload(images=0), Policy(min_gpus=2)).fits
    assert chain(model).constraints == (f"All of the model stays on one GPU: {WHOLE[family]}.",)


def test_a_head_that_shares_its_table_is_placed_by_a_key_inside_it() -> None:
    model = profile("t5gemma2", ["lm_head.out_proj.weight"])
    assert [error for error in errors(checked(model, moved=[])) if error == "VLM611"] == []
