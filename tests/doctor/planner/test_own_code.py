"""Code that checkpoints bring: what it needs, where it joins, what it keeps."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from vlm_doctor import Machine, ModelProfile, Policy, Workload, load_machine, plan
from vlm_doctor.data.removed_calls import BREAKS, NATIVE, PUBLISHED, is_broken
from vlm_doctor.image_rule import ImageRule
from vlm_doctor.machine import Libraries, Package
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.planner.own_code import about_own_code, why_broken
from vlm_doctor.planner.release import release_for
from vlm_doctor.planner.weights import unit_bytes
from vlm_doctor.sources.catalogue import catalogue
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile
from vlm_doctor.workload import Quantization

GLM = build_profile(catalogue()["THUDM/glm-4v-9b"].checkpoint(), name="THUDM/glm-4v-9b", origin="catalogue")
INTERNVL = build_profile(catalogue()["OpenGVLab/InternVL3-8B"].checkpoint(), name="InternVL3-8B", origin="catalogue")
COGVLM2 = build_profile(
    catalogue()["THUDM/cogvlm2-llama3-chat-19B"].checkpoint(), name="THUDM/cogvlm2-llama3-chat-19B", origin="catalogue"
)
MACHINE = load_machine("24GiB,24GiB")


def with_transformers(version: str) -> Machine:
    packages = (Package(name="transformers", version=version),)
    return msgspec.structs.replace(MACHINE, libraries=Libraries(python="3", executable="python", packages=packages))


@pytest.mark.parametrize("version", ["4.49.0", "4.57.6", "5.23.0", None])
def test_what_is_gone_is_named_with_a_version_that_has_it_and_a_successor(version: str | None) -> None:
    (note,) = about_own_code(GLM, MACHINE if version is None else with_transformers(version))

    assert note.startswith("Its own code, as published, calls _extract_past_from_model_output: with transformers 4.49 ")
    assert "Use transformers<4.49 in an environment of its own" in note
    assert "zai-org/GLM-4.1V-9B-Thinking" in note
    assert "GLM-4 issue 716" in note


def test_nothing_is_said_where_nothing_is_missing() -> None:
    assert about_own_code(GLM, with_transformers("4.48.3")) == ()
    assert about_own_code(msgspec.structs.replace(GLM, broken_calls=()), with_transformers("5.23.0")) == ()
    assert about_own_code(msgspec.structs.replace(GLM, is_remote_code=False), with_transformers("5.23.0")) == ()
    assert about_own_code(msgspec.structs.replace(GLM, model_type="unheard_of"), with_transformers("5.23.0")) == ()


def test_code_at_hand_outdoes_what_is_published() -> None:
    calls = ("from_legacy_cache", "get_max_length", "post_init")
    profile = msgspec.structs.replace(COGVLM2, broken_calls=calls)
    (now,) = about_own_code(profile, with_transformers("5.23.0"))
    (then,) = about_own_code(profile, with_transformers("4.50.3"))

    # 5.13 brought get_max_length back.
    assert now.startswith("Its own code calls from_legacy_cache, does not call post_init: with transformers 5.0 ")
    assert "Use transformers<5.0" in now
    assert now.endswith("or newer code.")
    assert then.startswith("Its own code calls get_max_length of the cache: with transformers 4.49 ")


def test_why_it_does_not_run_here_is_a_phrase() -> None:
    assert why_broken(GLM, "5.23.0") == (
        "its own code, as published, calls _extract_past_from_model_output: with transformers 4.49 and newer, "
        "AttributeError at the first generate, and 5.23.0 is installed"
    )
    assert why_broken(GLM, "4.48.3") is None
    assert why_broken(msgspec.structs.replace(GLM, is_remote_code=False), "5.23.0") is None


def test_a_plan_says_it_first() -> None:
    made = plan(GLM, with_transformers("5.23.0"), Workload(text_tokens=64), Policy())
    assert made.notes[0].startswith("Its own code, as published, calls _extract_past_from_model_output")


def test_the_tables_know_each_other() -> None:
    assert {name for names in PUBLISHED.values() for name in names} <= BREAKS.keys()
    assert NATIVE.keys() <= PUBLISHED.keys()
    for name, found in BREAKS.items():
        assert is_broken(name, found.since)
        assert not is_broken(name, (found.since[0], found.since[1] - 1))
        assert found.until is None or not is_broken(name, found.until)


def test_latent_attention_and_experts_of_own_code_go_as_before_5() -> None:
    latent = msgspec.structs.replace(GLM.text, kv_lora_rank=512)
    new = with_transformers("5.23.0")

    assert release_for(GLM, new) == (5, 23)
    assert release_for(msgspec.structs.replace(GLM, text=latent), new) == (4, 57)
    assert release_for(msgspec.structs.replace(GLM, text=msgspec.structs.replace(GLM.text, experts=64)), new) == (4, 57)
    assert release_for(msgspec.structs.replace(GLM, text=latent, is_remote_code=False), new) == (5, 23)


def test_the_cache_of_own_latent_attention_is_told_as_such() -> None:
    text = msgspec.structs.replace(GLM.text, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    made = plan(msgspec.structs.replace(GLM, text=text), with_transformers("5.23.0"), Workload(text_tokens=64), Policy())
    (line,) = {line.source for stage in made.stages for line in stage.ledger if line.kind == "kv_cache"}
    assert line.endswith("(its own code keeps keys and values expanded)")


def test_a_rule_without_a_grid_counts_every_tile_of_any_image() -> None:
    rule = ImageRule(kind="tiles", size=336, patch=14, merge=2, max_tiles=12, has_thumbnail=True, method="number")
    full = msgspec.structs.replace(INTERNVL, image=rule)
    counted = msgspec.structs.replace(INTERNVL, image=msgspec.structs.replace(rule, method=""))
    small = Workload(images=1, image_height=336, image_width=336)

    assert image_load(full, small).tokens == 13 * 144 == image_load(full, Workload(images=1)).tokens
    assert image_load(counted, small).tokens == 144


# -- maps


def messages(profile: ModelProfile, device_map: dict[str, int], severity: str) -> list[str]:
    found = check_map(device_map, profile, MACHINE, Workload(images=1, text_tokens=16)).findings
    return [finding.message for finding in found if finding.severity == severity and finding.code == "VLM615"]


def internvl(**where: int) -> dict[str, int]:
    parts = {"vision_model": 0, "mlp1": 0, "language_model.model.embed_tokens": 0, "language_model.model.rotary_emb": 0}
    layers = {f"language_model.model.layers.{number}": int(13 < number < 27) for number in range(28)}
    return {**parts, **layers, "language_model.model.norm": 0, "language_model.lm_head": 0, **where}


def test_a_projector_elsewhere_fails_in_a_plain_pass_alone() -> None:
    assert messages(INTERNVL, internvl(), "error") == messages(INTERNVL, internvl(), "warning") == []
    (warning,) = messages(INTERNVL, internvl(mlp1=1), "warning")
    assert warning.startswith(
        "mlp1 is on cuda:1, and what it is joined with, language_model.model.embed_tokens, on cuda:0: "
    )
    assert "a plain forward pass, input_embeds[selected] * 0.0 + vit_embeds in modeling_internvl_chat.py says" in warning


def test_an_embedding_elsewhere_than_the_inputs_cannot_take_an_image() -> None:
    device_map = internvl(**{"language_model.model.embed_tokens": 1, "mlp1": 1})
    (error,) = messages(INTERNVL, device_map, "error")
    assert error.startswith(
        "language_model.model.embed_tokens is on cuda:1 and the inputs are on cuda:0: with an image "
        "input_embeds[input_ids == img_context_token_id] in modeling_internvl_chat.py says "
    )


DEEPSEEK_CONFIG = {
    "model_type": "deepseek_vl_v2",
    "architectures": ["DeepseekVLV2ForCausalLM"],
    "language_config": {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32,
    },
    "vision_config": {"width": 4, "layers": 2, "heads": 2, "patch_size": 14, "image_size": 384},
}  # fmt: skip


def profile_of(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ModelProfile:
    tensors = {name: StoredTensor("BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()}
    return build_profile(Checkpoint(config, tensors), name="x", origin="checkpoint")


def deepseek() -> ModelProfile:
    """Published without ``auto_map``: the class is that of a package."""
    shapes = {
        "image_newline": (8,),
        "view_seperator": (8,),
        "vision.pos_embed": (1, 4, 4),
        **{f"vision.blocks.{number}.attn.qkv.weight": (12, 4) for number in range(2)},
        **{f"vision.blocks.{number}.mlp.fc1.weight": (8, 4) for number in range(2)},
        "projector.layers.0.weight": (8, 16),
        "language.model.embed_tokens.weight": (32, 8),
        **{f"language.model.layers.{number}.mlp.up_proj.weight": (16, 8) for number in range(2)},
        **{f"language.model.layers.{number}.self_attn.o_proj.weight": (8, 8) for number in range(2)},
        "language.model.norm.weight": (8,),
        "language.lm_head.weight": (32, 8),
    }
    return profile_of(DEEPSEEK_CONFIG, shapes)


def minicpmv() -> ModelProfile:
    """The text body first, then the tower, then the resampler: ``auto`` puts the last two last."""
    body = {
        "self_attn.q_proj.weight": (8, 8),
        "self_attn.k_proj.weight": (8, 8),
        "self_attn.v_proj.weight": (8, 8),
        "self_attn.o_proj.weight": (8, 8),
        "mlp.gate_proj.weight": (16, 8),
        "mlp.up_proj.weight": (16, 8),
        "mlp.down_proj.weight": (8, 16),
    }
    shapes = {
        "llm.model.embed_tokens.weight": (32, 8),
        **{f"llm.model.layers.{number}.{name}": shape for number in range(40) for name, shape in body.items()},
        "llm.model.norm.weight": (8,),
        "llm.lm_head.weight": (32, 8),
        "vpm.embeddings.patch_embedding.weight": (2, 3, 14, 14),
        "resampler.query": (4, 8),
        "resampler.proj": (8, 8),
        "resampler.kv_proj.weight": (8, 8),
    }
    config = {
        "model_type": "minicpmv", "architectures": ["MiniCPMV"], "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 40, "vocab_size": 32,
        "vision_config": {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14,
                          "intermediate_size": 16, "image_size": 980},
    }  # fmt: skip
    return profile_of(config, shapes)


def test_a_plan_knows_that_auto_parts_what_is_joined() -> None:
    profile = minicpmv()
    policy = Policy(min_gpus=2, max_gpus=2)
    made = plan(profile, MACHINE, Workload(images=1, text_tokens=16, new_tokens=2), policy)

    assert made.auto is not None
    assert made.auto.parted == ("resampler",)
    assert "parts resampler from the output" in made.auto.verdict


def test_a_bare_parameter_of_the_model_itself_goes_to_the_inputs_whatever_the_map_says() -> None:
    profile = deepseek()
    made = plan(profile, MACHINE, Workload(images=1, text_tokens=16, new_tokens=2), Policy(min_gpus=2, max_gpus=2))
    assert profile.is_remote_code
    assert profile.vision is not None
    assert made.fits
    assert messages(profile, {key: int(value) for key, value in made.device_map.items()}, "error") == []
    # The tower first on one GPU, and all that it is joined with on the other.
    other = {"vision": 0, **{key: 1 for key in made.device_map if key != "vision"}}
    errors = messages(profile, other, "error")

    assert any(
        error.startswith("image_newline is on cuda:0, and what it is joined with, projector, on cuda:1") for error in errors
    )
    assert any(
        error.startswith("language.model.embed_tokens is on cuda:1 and the inputs are on cuda:0") for error in errors
    )


# -- bitsandbytes


def test_a_head_that_own_code_does_not_name_is_quantized() -> None:
    """Four bits a weight, a scale for each 64; of a class that names it, 16 bit. Of no other part a byte changes."""
    entry = catalogue()["THUDM/glm-4v-9b"].checkpoint()
    told = build_profile(entry._replace(tells_head=True), name="x", origin="checkpoint")
    elements = 151_552 * 4096
    for profile, size_bytes in ((GLM, elements // 2 + 4 * elements // 64 + 64), (told, 2 * elements)):
        sizes = {unit.key: unit_bytes(unit, profile, Workload(quantization="nf4")) for unit in profile.units}
        assert sizes.pop("transformer.output_layer") == size_bytes
        assert sum(sizes.values()) == sum(
            unit_bytes(unit, GLM, Workload(quantization="nf4")) for unit in GLM.units if unit.role != "head"
        )
        said = " ".join(plan(profile, MACHINE, Workload(quantization="nf4", text_tokens=64)).notes)
        assert ("and transformer.output_layer." in said) == (profile is told)
    other = build_profile(entry._replace(config={**entry.config, "auto_map": {}}), name="x", origin="checkpoint")
    assert not other.is_remote_code
    assert not [unit for unit in other.units if unit.role == "head" and unit.linear.tensors]


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_a_quantized_head_is_unpacked_beside_its_logits(quantization: Quantization | None) -> None:
    table, tokens = 151_552 * 4096, 512
    for workload, rows in (
        (Workload(images=0, text_tokens=tokens, quantization=quantization), tokens),
        (Workload(images=0, text_tokens=tokens, quantization=quantization, batch=2), 2 * tokens),
    ):
        prices = Footprint(GLM, workload, image_load(GLM, workload), chain(GLM).atoms)
        states, logits = 2 * rows * 4096, rows * 151_552
        at_work = {None: 0, "int8": 8 * logits, "nf4": 2 * logits + 2 * table}[quantization]
        assert prices.work(tokens).head == 2 * states + max(6 * logits, at_work)
        once = workload.batch * 151_552
        unpacked = 2 * table if workload.batch > 1 else 0
        answer = {None: 0, "int8": 8 * once, "nf4": 2 * once + unpacked}[quantization]
        assert prices.work(tokens).answer == max(6 * once, answer)


def test_glm4v_in_nf4_takes_as_much_less_as_was_measured() -> None:
    """Of the GPU with the head, cut as on the two H200s: 12 % less than with a head in 16 bit (benchmarks/README.md)."""
    entry = catalogue()["THUDM/glm-4v-9b"].checkpoint()
    told = build_profile(entry._replace(tells_head=True), name="x", origin="checkpoint")
    workload = Workload(images=1, text_tokens=257, new_tokens=2, quantization="nf4")
    needs = []
    for profile in (GLM, told):
        prices = Footprint(profile, workload, image_load(profile, workload), chain(profile).atoms)
        end = len(prices.atoms)
        needs.append(prices.detail(end - 31, end, 257).total_bytes)
    assert needs[0] / needs[1] == pytest.approx(0.88, abs=0.02)
