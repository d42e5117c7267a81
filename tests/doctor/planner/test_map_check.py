"""Judging maps: each fault with its sentence, no false alarm, and a corrected map that is free of faults."""

from __future__ import annotations

import random
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_doctor.device_map import MapCheck
from vlm_doctor.errors import MapError, UsageError
from vlm_doctor.machine import Libraries, Link, Machine, Package
from vlm_doctor.model import ModelProfile
from vlm_doctor.planner import map_names as names_module
from vlm_doctor.planner import plan
from vlm_doctor.planner.map_check import MAX_KEYS, check_map, check_placed
from vlm_doctor.planner.map_devices import main_device, spelled
from vlm_doctor.planner.map_names import Names, loaded_by, outermost, owner, trapped
from vlm_doctor.planner.map_repair import fewest_moves
from vlm_doctor.sources.catalogue import catalogue
from vlm_doctor.sources.installed_transformers import has_flat_towers
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.units import GIB
from vlm_doctor.workload import Policy, Training, Workload

from .examples import examples
from .profiles import BODY, glm41v_9b, gpu, machine

Map = dict[str, int | str]
TOWER = "model.vision_tower" if has_flat_towers() else "model.vision_tower.vision_model"
LLAVA = load_profile("llava-hf/llava-1.5-7b-hf", allow_network=False)
QWEN = load_profile("Qwen/Qwen2.5-VL-7B-Instruct", allow_network=False)
GLM = load_profile("zai-org/GLM-4.1V-9B-Thinking", allow_network=False)
COG = load_profile("THUDM/cogvlm2-llama3-chat-19B", allow_network=False)
GLM4V = load_profile("THUDM/glm-4v-9b", allow_network=False)
CHAT = load_profile("OpenGVLab/InternVL3-8B", allow_network=False)
ROOM = machine([48, 48, 48, 48])
LAYERS = "model.language_model.layers"
KINDS = ("weights", "kv_cache", "activations", "training", "fragmentation")
"""Lines of a ledger that are what a stage needs."""


def split(profile: ModelProfile, *ends: int) -> Map:
    """Contiguous stages: layers up to each end on the next device; what is behind them on the last."""
    device_map: Map = {}
    for unit in profile.units:
        before = unit.role in ("vision", "projector", "embedding", "other")
        number = 0 if before else (unit.layer if unit.layer is not None else profile.text.layers)
        device_map[unit.key] = sum(number >= end for end in ends)
    return device_map


def codes(checked: MapCheck, *severities: str) -> list[str]:
    return [f.code for f in checked.findings if f.severity in (severities or ("error", "warning", "info"))]


def said(checked: MapCheck, code: str) -> str:
    return next(finding.message for finding in checked.findings if finding.code == code)


def judged(device_map: Map, profile: ModelProfile = LLAVA, where: Machine = ROOM, **fields: Any) -> MapCheck:
    """The judgement; a map that fails has a corrected one that does not."""
    checked = check_map(device_map, profile, where, **fields)
    if checked.corrected is not None:
        again = check_map(checked.corrected, profile, where, **fields)
        assert again.is_clean, again.findings
        assert checked.changes
    return checked


def installed(version: str) -> Machine:
    packages = (Package(name="transformers", version=version),)
    return msgspec.structs.replace(ROOM, libraries=Libraries(python="3.11", executable="python", packages=packages))


def cog_report_10() -> Map:
    """The map of CogVLM2#10: infer_auto_device_map with 12 GiB for each of 4 GPUs and no TransformerLayer in its list."""
    tower = "model.vision.transformer.layers"
    device_map: Map = {"model.embed_tokens": 0, "model.norm": 2, "lm_head": 3}
    device_map.update({f"model.layers.{n}": 0 if n < 9 else 1 if n < 20 else 2 for n in range(32)})
    device_map.update({"model.vision.boi": 2, "model.vision.eoi": 2, "model.vision.patch_embedding": 2})
    device_map.update({f"{tower}.{n}": 2 if n < 56 else 3 for n in range(63) if n != 56})
    parts = {"input_layernorm": 2, "attention": 3, "mlp": 3, "post_attention_layernorm": 3}
    device_map.update({f"{tower}.56.{part}": device for part, device in parts.items()})
    return device_map | {"model.vision.linear_proj": 3, "model.vision.conv": 3}


def test_report_10_of_cogvlm2_is_predicted_with_its_block_and_devices() -> None:
    checked = judged(cog_report_10(), COG)

    assert codes(checked, "error") == ["VLM614", "VLM615", "VLM615"]
    assert said(checked, "VLM614") == (
        "Block model.vision.transformer.layers.56 is cut: it is on cuda:2 (input_layernorm) and cuda:3 (attention, mlp, "
        'post_attention_layernorm). The first call says "Expected all tensors to be on the same device, but found at least '
        'two devices, cuda:2 and cuda:3!"'
    )
    assert checked.findings[0].gpus == (2, 3)
    assert checked.corrected is not None
    changed = {key: device for key, device in checked.corrected.items() if cog_report_10().get(key) != device}
    assert changed == {"model.vision.transformer.layers.56": 3, "model.vision.boi": 3, "model.vision.eoi": 3}


def test_on_the_gpus_of_the_report_memory_is_short_as_well() -> None:
    checked = judged(cog_report_10(), COG, machine([12, 12, 12, 12]))

    assert "VLM620" in codes(checked, "error")
    assert checked.changes == ("No small change repairs the map: this is the planner's own.",)


def test_on_smaller_gpus_than_those_of_the_report_no_map_would_do() -> None:
    checked = judged(cog_report_10(), COG, machine([11, 11, 11, 11]))

    assert "VLM620" in codes(checked, "error")
    assert checked.corrected is None
    assert checked.changes == ("No map would do for this workload on these GPUs; 'vlm-doctor plan' says what is missing.",)


def test_a_sound_map_is_clean_and_says_what_is_where() -> None:
    checked = judged(split(LLAVA, 16))

    assert checked.is_clean
    assert codes(checked) == ["VLM625"]
    assert checked.corrected is None
    assert [(use.device, use.gpu, use.layers) for use in checked.devices] == [("cuda:0", 0, 16), ("cuda:1", 1, 16)]
    assert checked.devices[0].parts == ("vision tower", "projector", "embedding", "other")
    assert sum(use.weights_bytes for use in checked.devices) == LLAVA.stored_bytes
    assert checked.best is not None
    assert checked.best.fits


@pytest.mark.parametrize("name", catalogue())
@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_the_planners_own_maps_are_clean(name: str, gpus: int) -> None:
    profile, where = load_profile(name, allow_network=False), machine([150] * 3)
    planned = plan(profile, where, Workload(), Policy(min_gpus=gpus))

    checked = check_map(planned.device_map, profile, where)

    assert planned.fits
    assert codes(checked, "error", "warning") == []


@settings(max_examples=examples(16), deadline=None)
@given(
    free=st.lists(st.integers(8, 60), min_size=1, max_size=4),
    text=st.integers(1, 20_000),
    profile=st.sampled_from([LLAVA, QWEN, GLM, CHAT, glm41v_9b(), glm41v_9b(tied=((f"{BODY}.embed_tokens", "lm_head"),))]),
)
def test_every_plan_checks_clean_and_tight_ones_too(free: list[int], text: int, profile: ModelProfile) -> None:
    where, work = machine(free), Workload(text_tokens=text)
    planned = plan(profile, where, work)
    if planned.fits:
        # As a plan is written: the GPU of its first stage is torch's first.
        numbers = ",".join(str(stage.gpu) for stage in planned.stages)
        theirs = msgspec.structs.replace(where, environment={"CUDA_VISIBLE_DEVICES": numbers})
        checked = check_map(planned.device_map, profile, theirs, work)
        assert codes(checked, "error", "warning") == []


@settings(max_examples=examples(16), deadline=None)
@given(seed=st.integers(0, 10_000), profile=st.sampled_from([LLAVA, QWEN, CHAT, COG]))
def test_whatever_the_map_the_corrected_one_is_clean(seed: int, profile: ModelProfile) -> None:
    dice = random.Random(seed)
    keys = [unit.key for unit in profile.units] + dice.sample(list(profile.tensors), 5) + ["", "nothing.here", "lm_head.x"]
    values: list[int | str] = [0, 1, 2, 3, 4, "cuda:1", "2", "cpu", "gpu"]
    judged({key: dice.choice(values) for key in dice.sample(keys, dice.randint(1, len(keys)))}, profile)


@pytest.mark.parametrize("inner", ["model.visual", "model.visual.blocks", "model.visual.blocks.3"])
def test_blocks_that_an_inner_key_moves_are_told_once(inner: str) -> None:
    checked = judged({"": 0, inner: 1}, QWEN)
    assert codes(checked, "error") == ["VLM612"]
    assert f"inside it, {inner!r} on cuda:1" in said(checked, "VLM612")


def test_a_block_that_is_cut_for_another_reason_is_told_beside_the_inner_key() -> None:
    device_map = split(QWEN, 14)
    parts: dict[str, int] = {"self_attn": 1, "mlp": 0, "input_layernorm": 1, "post_attention_layernorm": 1}
    checked = judged({**cut(QWEN, f"{LAYERS}.3", device_map, **parts), "model.visual.blocks": 1}, QWEN)
    assert codes(checked, "error") == ["VLM612", "VLM614"]
    assert said(checked, "VLM614").startswith(f"Block {LAYERS}.3 is cut: it is on cuda:0 (mlp) and cuda:1 (")


def test_a_tower_inside_the_whole_model_stays_where_the_inner_key_says() -> None:
    checked = judged({"": 0, "model.visual": 1}, QWEN)
    assert checked.corrected is not None
    assert checked.corrected["model.visual"] == 1
    assert {device for key, device in checked.corrected.items() if key != "model.visual"} == {0}


def test_where_nothing_says_what_a_block_is_given_it_is_taken_to_come_from_where_most_of_the_block_is() -> None:
    block = "model.visual.blocks.0"
    parts = {"norm1": 0, "attn.qkv.weight": 0, "attn.proj.weight": 0, "norm2.weight": 0, "mlp.up_proj.weight": 1}
    checked = judged({f"{block}.{name}": device for name, device in parts.items()}, QWEN)
    (cut,) = [finding for finding in checked.findings if finding.code == "VLM614"]
    assert f"Block {block} is cut: it is on cuda:0 (norm1, norm2, attn) and cuda:1 (mlp)." in cut.message
    assert cut.cause is not None
    assert cut.cause.startswith("A block adds what goes in, which is on cuda:0,")


def test_the_positions_of_a_tower_are_no_change_where_its_key_covers_them() -> None:
    device_map: Map = {unit.key: 0 for unit in GLM.units if unit.role != "head"}
    checked = judged(device_map, GLM)
    assert codes(checked, "error") == ["VLM611"]
    assert checked.changes == ("lm_head is on cuda:0; it had no device.",)


def test_unknown_names_are_answered_with_those_of_this_version() -> None:
    old: Map = {"visual": 0, "model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    old.update({f"model.layers.{n}": n // 14 for n in range(28)})

    checked = judged(old, QWEN)

    assert codes(checked, "error") == ["VLM611"]
    assert said(checked, "VLM610") == f"{QWEN.name} has no module 'visual'."
    fixes = [finding.fix.text for finding in checked.findings if finding.code == "VLM610" and finding.fix]
    assert "Write 'model.visual': that is its name in the class of transformers 4.52 and later." in fixes
    assert checked.corrected is not None
    assert {checked.corrected[f"{LAYERS}.{n}"] for n in range(14)} == {0}
    assert checked.changes[0] == "'visual' is written 'model.visual'."


@pytest.mark.parametrize(
    ("key", "message", "fix"),
    [
        ("model.languag_model.norm", "has no module 'model.languag_model.norm'.",
         "Write 'model.language_model.norm': the nearest name."),
        (f"{LAYERS}.32", f"has no module '{LAYERS}.32'; {LAYERS} has the numbers 0 to 31.", "Leave it out"),
        ("encoder.layers.3", "has no module 'encoder.layers.3'.", "Write"),
        ("xyz.abc", "has no module 'xyz.abc'.", "Leave it out, or write the name of a module of this model."),
        ("modle.languag_model", "has no module 'modle.languag_model'.", "Leave it out"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named_with_what_it_may_have_meant(key: str, message: str, fix: str) -> None:
    checked = judged({**split(LLAVA, 16), key: 0})

    found = next(finding for finding in checked.findings if finding.code == "VLM610")
    assert found.message == f"{LLAVA.name} {message}"
    assert found.fix is not None
    assert found.fix.text.startswith(fix)
    assert checked.is_clean
    assert key not in (checked.corrected or {})


def test_many_wrong_keys_end_in_one_sentence_and_weightless_ones_are_let_pass() -> None:
    many: Map = {f"wrong{chr(97 + n)}{chr(97 + n)}": 0 for n in range(26)}
    many |= {f"wrong{letter}": 0 for letter in "abcd"}
    many[f"{TOWER}.embeddings.position_ids"] = 0

    checked = judged({**split(LLAVA, 16), **many})

    assert codes(checked).count("VLM610") == 21
    assert checked.findings[20].message == "10 more keys name no module of llava-hf/llava-1.5-7b-hf."


def test_keys_that_differ_in_a_number_are_one_finding() -> None:
    checked = judged({**split(LLAVA, 16), **{f"wrong.{n}": 0 for n in range(30)}})

    assert codes(checked).count("VLM610") == 1
    assert checked.findings[0].message.startswith(f"{LLAVA.name} has no module 'wrong.0', and 29 more are named like it")


@pytest.mark.parametrize(("gone", "named"), [("lm_head", "lm_head"), (f"{LAYERS}.7", f"{LAYERS}.7")])
def test_what_is_forgotten_is_named(gone: str, named: str) -> None:
    device_map = split(LLAVA, 16)
    del device_map[gone]

    checked = judged(device_map)

    assert codes(checked, "error") == ["VLM611"]
    assert said(checked, "VLM611") == f"The map gives no device to {named}."
    assert checked.corrected == split(LLAVA, 16)


def test_what_is_forgotten_of_a_map_with_one_device_stays_on_the_cpu() -> None:
    checked = judged({"model": 0})

    assert codes(checked, "error") == ["VLM611"]
    assert "leaves them on the CPU without a word" in str(checked.findings[0].cause)
    assert checked.corrected == {"": 0}


def test_of_a_unit_that_is_half_there_the_modules_are_named() -> None:
    device_map = split(LLAVA, 16)
    del device_map[f"{LAYERS}.3"]
    device_map[f"{LAYERS}.3.self_attn"] = 0

    message = said(judged(device_map), "VLM611")

    assert f"{LAYERS}.3.mlp.gate_proj" in message
    assert message.endswith("and 1 more.")


@pytest.mark.parametrize(
    ("version", "severity"), [(None, "warning"), ("4.57.6", "error"), ("5.2.0", "info"), ("what", "warning")]
)
def test_a_forgotten_rotary_table_matters_to_old_transformers(version: str | None, severity: str) -> None:
    device_map = split(QWEN, 14)
    del device_map["model.language_model.rotary_emb"]

    checked = judged(device_map, QWEN, ROOM if version is None else installed(version))

    found = next(finding for finding in checked.findings if finding.code == "VLM611")
    assert found.severity == severity
    assert found.message.endswith("rotary_emb, whose buffers then stay on the CPU.")


def test_a_forgotten_rotary_table_of_remote_code_is_a_warning() -> None:
    device_map = split(QWEN, 14)
    del device_map["model.language_model.rotary_emb"]

    checked = judged(device_map, msgspec.structs.replace(QWEN, model_type="minicpmv"))

    assert "VLM611" in codes(checked, "warning")


def test_a_key_in_a_key_mixes_devices_unless_it_is_a_leaf() -> None:
    inner = judged({"": 0, f"{LAYERS}.1": 1})
    leaf = judged({"": 0, "lm_head": 1})
    same = judged({"model.language_model": 1, f"{LAYERS}.1": 1, "model.vision_tower": 0,
                   "model.multi_modal_projector": 0, "lm_head": 1})  # fmt: skip

    assert codes(inner, "error") == ["VLM612"]
    assert said(inner, "VLM612") == f"The map has '' (the whole model) on cuda:0 and, inside it, '{LAYERS}.1' on cuda:1."
    assert inner.corrected == {**split(LLAVA, 99), f"{LAYERS}.1": 1, "model.language_model.norm": 0, "lm_head": 0}
    assert leaf.is_clean
    assert "lets the inner key win" in str(next(f.cause for f in leaf.findings if f.code == "VLM612"))
    assert same.is_clean
    assert "Both say the same" in str(next(f.cause for f in same.findings if f.code == "VLM612"))


def test_a_bare_parameter_inside_a_key_has_no_effect() -> None:
    device_map = {**split(COG, 16), "model.vision.boi": 1}

    checked = judged(device_map, COG)

    assert codes(checked, "error") == []
    assert "moves a bare parameter with the module around it" in str(
        next(f.cause for f in checked.findings if f.code == "VLM612")
    )


def test_a_key_takes_numbers_that_begin_alike_while_loading() -> None:
    device_map: Map = {"model.vision_tower": 0, "model.multi_modal_projector": 0, "lm_head": 1,
                       "model.language_model": 1, f"{LAYERS}.1": 0}  # fmt: skip

    checked = judged(device_map)

    message = said(checked, "VLM613")
    assert message.startswith(f"While loading, the key '{LAYERS}.1' also takes {LAYERS}.10, {LAYERS}.11, ")
    assert message.endswith("and 6 more: 3.8 GiB that belong on cuda:1 pass through cuda:0.")


def cut(profile: ModelProfile, block: str, base: Map, **parts: int) -> Map:
    """A map with one block in parts."""
    return {key: device for key, device in base.items() if key != block} | {f"{block}.{p}": d for p, d in parts.items()}


def test_a_cut_text_layer_is_an_error_and_parted_norms_are_a_detour() -> None:
    base, block = split(LLAVA, 16), f"{LAYERS}.3"
    norms = {"input_layernorm": 1, "post_attention_layernorm": 1}

    wrong = judged(cut(LLAVA, block, base, self_attn=0, mlp=1, input_layernorm=0, post_attention_layernorm=0))
    detour = judged(cut(LLAVA, block, base, self_attn=0, mlp=0, **norms))

    assert codes(wrong, "error") == ["VLM614"]
    assert said(wrong, "VLM614").startswith(
        f"Block {block} is cut: it is on cuda:0 (self_attn, input_layernorm, post_attention_layernorm) and cuda:1 (mlp)."
    )
    assert wrong.corrected == {**base, block: 1}
    assert detour.is_clean
    assert "It runs, since its norms" in said(detour, "VLM614")


def test_norms_behind_decide_where_a_result_is() -> None:
    base, block = split(GLM, 20), f"{LAYERS}.3"
    on_0 = dict.fromkeys(
        (
            "self_attn",
            "mlp",
            "input_layernorm",
            "post_attention_layernorm",
            "post_self_attn_layernorm",
            "post_mlp_layernorm",
        ),
        0,
    )

    assert codes(judged(cut(GLM, block, base, **{**on_0, "post_mlp_layernorm": 1}), GLM), "error") == ["VLM614"]
    assert judged(cut(GLM, block, base, **{**on_0, "mlp": 1}), GLM).is_clean


def test_a_block_in_parts_where_the_device_changes_keeps_its_input_behind() -> None:
    base, block = split(LLAVA, 16), f"{LAYERS}.16"
    parts = dict.fromkeys(("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"), 1)

    checked = judged(cut(LLAVA, block, base, **parts))
    inside = judged(cut(LLAVA, f"{LAYERS}.3", base, **dict.fromkeys(parts, 0)))

    assert codes(checked, "error") == ["VLM624"]
    assert "what goes in stays on cuda:0" in said(checked, "VLM624")
    assert checked.corrected == base
    assert codes(inside, "error", "warning") == []


def test_attention_in_parts_loses_mask_and_positions() -> None:
    base, block = split(LLAVA, 16), f"{LAYERS}.20"
    parts = dict.fromkeys(("mlp", "input_layernorm", "post_attention_layernorm"), 1)
    attention = {f"self_attn.{name}_proj": 1 for name in "qkvo"}

    checked = judged(cut(LLAVA, block, base, **parts, **attention))

    assert codes(checked, "error") == ["VLM624"]
    assert "what goes in stays on cuda:0" in said(checked, "VLM624")


def test_many_cut_blocks_end_in_one_sentence() -> None:
    device_map = split(LLAVA, 16)
    for number in range(10):
        device_map = cut(LLAVA, f"{LAYERS}.{number}", device_map, self_attn=0, mlp=1, input_layernorm=0,
                         post_attention_layernorm=0)  # fmt: skip

    checked = judged(device_map)

    assert codes(checked, "error") == ["VLM614"] * 7
    assert checked.findings[6].message == f"4 more blocks beside {LAYERS}.0 are placed so."


def test_modules_that_add_their_parts_must_be_whole() -> None:
    tower = TOWER
    base = {key: device for key, device in split(LLAVA, 16).items() if key != "model.vision_tower"}
    base.update({f"{tower}.{name}": 0 for name in ("pre_layrnorm", "encoder", "post_layernorm")})
    embeddings = f"{tower}.embeddings"

    checked = judged({**base, f"{embeddings}.class_embedding": 0, f"{embeddings}.patch_embedding": 0,
                      f"{embeddings}.position_embedding": 1})  # fmt: skip
    parted = judged({**base, f"{embeddings}.class_embedding": 1, f"{embeddings}.patch_embedding": 0,
                     f"{embeddings}.position_embedding": 0})  # fmt: skip
    projector = {key: device for key, device in split(LLAVA, 16).items() if key != "model.multi_modal_projector"}
    in_turn = judged({**projector, "model.multi_modal_projector.linear_1": 0, "model.multi_modal_projector.linear_2": 1})

    assert codes(checked, "error") == ["VLM614"]
    assert said(checked, "VLM614").startswith(f"{embeddings} is cut: it is on cuda:0 (")
    assert "The bare parameter" in said(parted, "VLM615")
    assert codes(in_turn, "error") == []
    assert "VLM614" in codes(in_turn, "warning")


def test_code_that_was_searched_says_whether_it_is_an_older_revision() -> None:
    apart: Map = {**split(GLM4V, 20), "transformer.embedding.word_embeddings": 1}
    older, newer = (msgspec.structs.replace(GLM4V, moved_joins=moved) for moved in ((), ("transformer.vision",)))

    assert "in older revisions" in said(judged(apart, GLM4V), "VLM615")
    assert codes(judged(apart, GLM4V), "error") == []
    assert "VLM615" in codes(judged(apart, older), "error")
    assert "older revisions" not in said(judged(apart, older), "VLM615")
    assert "VLM615" not in codes(judged(apart, newer))


def test_joined_tensors_are_judged_by_the_familys_code() -> None:
    apart: Map = {**split(GLM4V, 20), "transformer.embedding.word_embeddings": 1}

    checked = judged(apart, GLM4V)

    assert codes(checked, "error") == []
    assert "in older revisions of the checkpoint's code torch.cat" in said(checked, "VLM615")
    assert checked.corrected is not None
    assert checked.corrected["transformer.vision"] == 1


def test_a_tower_that_takes_positions_must_begin_at_the_inputs_or_name_its_rotary_table() -> None:
    pieces = [f"model.visual.{name}" for name in ("patch_embed", "blocks", "merger")]
    base = {key: device for key, device in split(QWEN, 14).items() if key != "model.visual"}

    wrong = judged({**base, **dict.fromkeys(pieces, 1)}, QWEN)
    named = judged({**base, **dict.fromkeys(pieces, 1), "model.visual.rotary_pos_emb": 1}, QWEN)
    old = judged({**base, **dict.fromkeys(pieces, 0)}, QWEN, installed("4.57.6"))
    new = judged({**base, **dict.fromkeys(pieces, 0)}, QWEN, installed("5.23.0"))

    assert codes(wrong, "error") == ["VLM615"]
    assert codes(named, "error") == []
    assert codes(old, "error") == ["VLM611"]
    assert codes(new, "error") == []
    windows: Map = {**base, **dict.fromkeys(pieces, 0), "model.visual.rotary_pos_emb": 0, "model.visual.merger": 1}
    for where, count in ((installed("4.57.6"), 1), (installed("5.23.0"), 0), (ROOM, 0)):
        assert codes(judged(windows, QWEN, where), "error") == ["VLM615"] * count


def test_a_tower_that_uses_a_table_directly_needs_it_at_the_inputs() -> None:
    names = ("patch_embed", "post_conv_layernorm", "blocks", "post_layernorm", "downsample", "merger", "rotary_pos_emb")
    base: Map = {key: device for key, device in split(GLM, 20).items() if key != "model.visual"}
    base.update({f"model.visual.{name}": 0 for name in names})

    assert codes(judged({**base, "model.visual.embeddings.position_embedding": 1}, GLM), "error") == ["VLM615"]
    assert codes(judged({**base, "model.visual.embeddings": 1}, GLM), "error") == []


def test_tied_weights_must_share_a_device() -> None:
    profile = glm41v_9b(tied=((f"{BODY}.embed_tokens", "lm_head"),))

    checked = judged(split(profile, 20), profile)

    assert codes(checked, "error") == ["VLM616"]
    assert f"{BODY}.embed_tokens on cuda:0 and lm_head on cuda:1" in said(checked, "VLM616")
    assert (checked.corrected or {})["lm_head"] == 0


@pytest.mark.parametrize(
    ("version", "severity"), [(None, "warning"), ("4.37.2", "error"), ("4.57.6", "info"), ("5.23.0", "info")]
)
def test_an_inner_generate_wants_its_logits_at_the_inputs(version: str | None, severity: str) -> None:
    checked = judged(split(CHAT, 14), CHAT, ROOM if version is None else installed(version))

    found = next(finding for finding in checked.findings if finding.code == "VLM623")
    assert found.severity == severity
    if severity == "error":
        assert (checked.corrected or {})["language_model.lm_head"] == 0


def test_devices_that_are_not_there_are_named_with_those_that_are() -> None:
    device_map = {**split(LLAVA, 16), "lm_head": 7, "model.language_model.norm": "gpu1", f"{LAYERS}.31": -1}

    checked = judged(device_map, where=machine([48, 48]))

    messages = [finding.message for finding in checked.findings if finding.code == "VLM617"]
    assert messages == [
        f"'-1' is no device: torch has no device with a negative number; the map puts '{LAYERS}.31' there.",
        "'gpu1': that is no device: write the number of a GPU, cpu or disk; "
        "the map puts 'model.language_model.norm' there.",
        "cuda:7 does not exist: this process sees GPU 0 as cuda:0 and GPU 1 as cuda:1; the map puts 'lm_head' there.",
    ]
    assert checked.corrected == split(LLAVA, 16)


def test_numbers_follow_cuda_visible_devices_or_the_gpus_that_are_named() -> None:
    hidden = machine([48, 48, 48], environment={"CUDA_VISIBLE_DEVICES": "2,0"})

    masked = judged(split(LLAVA, 11, 22), where=hidden)
    named = judged(split(LLAVA, 16), policy=Policy(gpus=(3, 1)))

    assert masked.gpus == (2, 0)
    assert "cuda:2 does not exist: this process sees GPU 2 as cuda:0 and GPU 0 as cuda:1" in said(masked, "VLM617")
    assert [use.gpu for use in named.devices] == [3, 1]


def test_a_gpu_that_cannot_be_used_and_a_machine_without_any_are_errors() -> None:
    broken = msgspec.structs.replace(ROOM, gpus=(*machine([48]).gpus, gpu(1, 48 * GIB, 49 * GIB, mig_enabled=True)))

    assert "cuda:1 is GPU 1, which cannot be used: MIG is enabled" in said(judged(split(LLAVA, 16), where=broken), "VLM617")
    none = judged({"": 0}, where=machine([]))
    assert "cuda:0 does not exist: this process sees no GPU" in said(none, "VLM617")
    assert none.corrected is None


def test_devices_written_as_texts_are_understood_and_explained() -> None:
    texts: Map = {key: f"cuda:{device}" for key, device in split(LLAVA, 16).items()}

    all_texts = judged(texts)
    mixed = judged({**texts, "lm_head": 1})
    digits = judged({**split(LLAVA, 16), "lm_head": "1"})
    one = judged({"": "cuda"})

    assert "changes from run to run" in str(all_texts.findings[0].cause)
    assert all_texts.is_clean
    assert "mixes texts" in said(mixed, "VLM618")
    assert codes(digits, "error") == ["VLM618"]
    assert digits.corrected == split(LLAVA, 16)
    assert codes(one) == []


def test_weights_off_the_gpus_are_counted_and_bitsandbytes_refuses_them() -> None:
    device_map: Map = {**split(LLAVA, 16), f"{LAYERS}.31": "cpu", f"{LAYERS}.30": "disk"}

    slow = judged(device_map)
    refused = judged(device_map, workload=Workload(quantization="nf4"))
    alone = judged({"": "cpu"})

    assert codes(slow, "error") == []
    assert said(slow, "VLM619").startswith(f"386 MiB of weights are on the cpu: '{LAYERS}.31'. Every new token copies")
    assert [use.device for use in slow.devices] == ["cuda:0", "cuda:1", "disk", "cpu"]
    assert codes(refused, "error") == ["VLM619", "VLM619"]
    assert refused.corrected == split(LLAVA, 16)
    assert codes(alone) == ["VLM619"]
    assert alone.is_clean
    assert codes(judged({"": "disk"}), "warning") == ["VLM619"]


def test_a_gpu_that_is_too_small_is_relieved_by_the_fewest_layers() -> None:
    where = machine([8, 16])

    checked = judged(split(LLAVA, 24), where=where)

    assert codes(checked, "error") == ["VLM620"]
    assert said(checked, "VLM620").startswith("GPU 0 (cuda:0) runs out of memory while it loads: the map needs ")
    assert checked.corrected is not None
    moved = [key for key, device in split(LLAVA, 24).items() if checked.corrected[key] != device]
    assert moved == [f"{LAYERS}.{number}" for number in range(int(moved[0].rpartition(".")[2]), 24)]


def test_a_workload_can_be_what_does_not_fit() -> None:
    long = Workload(text_tokens=3_000, batch=8)

    assert "at this workload" in said(judged(split(LLAVA, 16), where=machine([16, 16]), workload=long), "VLM620")


def test_what_loading_takes_is_counted_of_any_map() -> None:
    workload = Workload(images=0, text_tokens=1, new_tokens=1, quantization="int8")
    for device_map in (split(LLAVA, 16), {key: number % 2 for number, key in enumerate(split(LLAVA, 16))}):
        for use in check_map(device_map, LLAVA, ROOM, workload).devices:
            assert use.need_bytes is not None
            assert use.need_bytes >= use.weights_bytes + 4 * 4096 * 11008, "a weight in bfloat16, a copy in float16"


def test_a_gpu_pays_for_the_layers_that_it_executes_from_host_memory() -> None:
    workload = Workload(images=0, text_tokens=3000, batch=4)
    planned = plan(LLAVA, machine([17]), workload, Policy(offload=True))
    assert planned.offloaded is not None
    own = sum(line.size_bytes for line in planned.stages[0].ledger if line.kind in KINDS)

    checked = check_map(planned.device_map, LLAVA, machine([12]), workload)

    assert checked.devices[0].need_bytes == pytest.approx(own, rel=0.02)
    assert "VLM620" in codes(checked, "error")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_step_is_judged_as_the_plan_prices_it(method: Literal["full", "lora"]) -> None:
    workload, where = Workload(training=Training(method=method)), machine([24, 24])
    planned = plan(LLAVA, where, workload, Policy(min_gpus=2))
    device_map: Map = {key: number for number, stage in enumerate(planned.stages) for key in stage.keys}

    checked = check_map(device_map, LLAVA, where, workload)

    own = [sum(line.size_bytes for line in stage.ledger if line.kind in KINDS) for stage in planned.stages]
    assert [use.need_bytes for use in checked.devices] == own
    assert planned.fits is ("VLM620" not in codes(checked, "error"))
    # A map that is no split of the chain: every second part elsewhere.
    mixed: Map = {key: number % 2 for number, key in enumerate(device_map)}
    assert sum(use.need_bytes or 0 for use in check_map(mixed, LLAVA, where, workload).devices) > 0.9 * sum(own)


def test_a_map_may_eat_into_the_headroom_with_a_warning() -> None:
    careful = Policy(headroom_fraction=0.9)

    checked = judged(split(LLAVA, 16), policy=careful)

    assert codes(checked, "error") == []
    assert "keeps only" in said(checked, "VLM620")


def test_when_only_the_planners_map_would_do_it_is_given() -> None:
    checked = judged({"": 0}, GLM, machine([8, 24]))

    assert codes(checked, "error") == ["VLM620"]
    assert checked.changes == ("No small change repairs the map: this is the planner's own.",)
    assert checked.corrected == {"": 1}


def test_layers_back_and_forth_are_a_warning_and_features_that_come_back_an_info() -> None:
    zigzag = {**split(LLAVA, 16), f"{LAYERS}.4": 1}
    behind = {**split(LLAVA, 16), "model.vision_tower": 1}

    assert said(judged(zigzag), "VLM621").startswith("The prompt goes cuda:0 -> cuda:1 -> cuda:0 -> cuda:1: 2 changes of")
    assert "VLM621" in codes(judged(zigzag), "warning")
    assert "VLM621" in codes(judged(behind), "info")
    rounds: Map = {key: number % 2 for number, key in enumerate(split(LLAVA, 16))}
    assert " ...: " in said(judged(rounds), "VLM621")


def test_the_order_of_the_gpus_may_follow_the_links() -> None:
    fast = [Link(a=a, b=b, nvlinks=18) for a, b in ((0, 1), (2, 3), (1, 2))]
    slow = [Link(a=a, b=b, nvlinks=0, path="SYS") for a, b in ((0, 2), (0, 3), (1, 3))]
    where = machine([48] * 4, links=[*fast, *slow])
    straight = split(LLAVA, 8, 16, 24)
    crossed: Map = {key: (0, 2, 1, 3)[int(device)] for key, device in straight.items()}

    assert "VLM622" not in codes(judged(straight, where=where))
    assert said(judged(crossed, where=where), "VLM622") == (
        "The stages run on GPUs 0, 2, 1, 3; in the order 0, 1, 2, 3 the links between them are faster."
    )


def test_a_profile_without_names_of_tensors_is_judged_by_its_units() -> None:
    checked = judged(split(glm41v_9b(), 20), glm41v_9b())

    assert codes(checked, "error", "warning") == []
    assert sum(use.weights_bytes for use in checked.devices) == sum(unit.stored_bytes for unit in glm41v_9b().units)


def test_parts_of_a_unit_are_its_pieces() -> None:
    whole = glm41v_9b()
    tower = whole.units[0]
    half = msgspec.structs.replace(tower, key="model.visual.blocks.0", parameters={"BF16": tower.elements // 2}, layer=0)
    rest = msgspec.structs.replace(
        tower, key="model.visual.patch", parameters={"BF16": tower.elements - tower.elements // 2}
    )
    profile = msgspec.structs.replace(
        whole, units=(msgspec.structs.replace(tower, parts=(rest, half)), *whole.units[1:]), model_type="other"
    )
    device_map = {key: device for key, device in split(profile, 20).items() if key != "model.visual"}

    checked = judged({**device_map, "model.visual.patch": 0, "model.visual.blocks.0": 1}, profile)

    assert codes(checked, "error", "warning") == []
    assert checked.devices[1].weights_bytes > tower.elements


@pytest.mark.parametrize("size", [0, MAX_KEYS + 1])
def test_an_empty_and_an_endless_map_are_refused(size: int) -> None:
    with pytest.raises(MapError, match="keys; give one with 1 to 20,000"):
        check_map({f"k{n}": 0 for n in range(size)}, LLAVA, ROOM)


def test_a_workload_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError):
        check_map({"": 0}, LLAVA, ROOM, Workload(batch=0))


def test_the_judgement_does_not_depend_on_the_order_of_the_keys() -> None:
    device_map = cog_report_10()
    backwards = dict(reversed(list(device_map.items())))

    assert [f.message for f in judged(device_map, COG).findings] == [f.message for f in judged(backwards, COG).findings]


def test_names_are_walked_by_whole_components() -> None:
    names = Names(["a.b.0.w", "a.b.1.w", "a.c"], ["a.rotary"])

    assert (owner({"a.b", "a"}, "a.b.0.w"), owner({"a.b"}, "a.bc"), owner({""}, "x")) == ("a.b", None, "")
    assert (outermost({"a.b", "a"}, "a.b.0.w"), outermost(set(), "a")) == ("a", None)
    assert (names.is_module("a.rotary"), names.is_module("a.c"), names.is_module(""), names.is_known("a.c")) == (
        True, False, True, True,
    )  # fmt: skip
    assert names.children("a.b") == ["a.b.0", "a.b.1"]
    assert names.proposal("rotary", "") == ("a.rotary", "the only module that ends so")
    assert names_module.renamed("a", "llava") == "a"


def test_loaders_differ_only_where_keys_are_no_prefixes_of_each_other() -> None:
    keys = {"a.1": 0, "a": 1, "a.1.b": 2}

    assert loaded_by(keys, "a.10.w", is_old=False) == loaded_by(keys, "a.10.w", is_old=True) == "a.1"
    assert loaded_by(keys, "a.1.bc", is_old=True) == "a.1.b"
    assert loaded_by(keys, "x", is_old=True) is None
    assert loaded_by({"": 0}, "x", is_old=False) == ""
    assert trapped(keys, ["a.10.w", "a.1.w"]) == {"a.1": ["a.10.w"]}


@pytest.mark.parametrize(("value", "device"), [(3, 3), ("cuda:3", 3), (" cpu ", "cpu"), ("cuda", 0), ("7", 7), ("x", "x")])
def test_devices_are_read_in_all_spellings(value: int | str, device: int | str) -> None:
    assert spelled(value).device == device


def test_a_loaded_model_may_be_given_its_inputs_elsewhere_than_a_map_alone_says() -> None:
    """InternVL uses beside its embedding what stays where the inputs are."""
    there = machine([80, 80])
    planned = plan(CHAT, there, policy=Policy(min_gpus=2))
    turned = {key: 1 - device for key, device in planned.device_map.items() if isinstance(device, int)}
    codes = [
        [found.code for found in check_placed(turned, CHAT, there, Workload(), Policy(), main=main).findings]
        for main in (None, 1)
    ]
    assert codes == [["VLM615"], ["VLM625"]]


def test_the_main_device_is_the_first_of_a_set() -> None:
    assert main_device(["cpu", 8, 1]) == next(iter({8, 1}))
    assert main_device(["cpu"]) == "cpu"


def test_the_fewest_atoms_are_moved() -> None:
    def need(first: int, end: int) -> int:
        return end - first

    assert fewest_moves(need, [3, 3], [0, 0, 0, 0, 1]) == [3, 5]
    assert fewest_moves(need, [3, 1], [0, 0, 0, 0, 1]) is None
    assert fewest_moves(need, [4, 4], [0, 0, 1, 1, 1]) == [2, 5]
