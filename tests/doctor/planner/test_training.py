"""A training step: formulas against real steps, and what must hold of them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.model import ModelProfile, TextShape
from vlm_doctor.planner import plan
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.layer_work import LayerKind
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.planner.memory import Footprint, Holding, StageNeed
from vlm_doctor.planner.training import (
    SLACK_BYTES,
    WASTE,
    Peak,
    Trained,
    Waste,
    largest_step_bytes,
    peak,
    step_work,
    trained,
)
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Optimizer, Training, Workload

from .profiles import glm41v_9b, llava_13b, machine, unit

DENSE, EXPERTS = LayerKind("full", has_experts=False), LayerKind("full", has_experts=True)


def small(
    body: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> ModelProfile:
    """The models of benchmarks/count_training.py; weights of norms are those of two a layer."""
    text = TextShape(
        layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, head_dim=64,
        vocabulary=vocabulary, body=body,
    )  # fmt: skip
    elements = 2 * hidden * 64 * (heads + kv_heads) + 3 * hidden * intermediate + 2 * hidden
    units = (
        unit("model.embed_tokens", "embedding", vocabulary * hidden),
        *(unit(f"model.layers.{number}", "layer", elements, layer=number) for number in range(layers)),
        unit("model.norm", "norm", hidden),
        unit("lm_head", "head", vocabulary * hidden),
    )
    return msgspec.structs.replace(
        glm41v_9b(), model_type=body, units=units, text=text, vision=None, image=None, body_script=None
    )


def prices(profile: ModelProfile, training: Training, **fields: Any) -> Footprint:
    workload = Workload(**{"images": 0, "training": training, **fields})
    return Footprint(profile, workload, image_load(profile, workload), chain(profile).atoms)


def whole(profile: ModelProfile, training: Training, **fields: Any) -> StageNeed:
    made = prices(profile, training, **fields)
    return made.detail(0, len(made.atoms), made.workload.text_tokens)


@pytest.mark.parametrize(
    ("body", "shape", "counted_mib"),
    [
        ("llama", (512, 1376, 4, 8, 8, 2048), (140.7, 140.7, 96.4, 54.5)),
        ("llama", (384, 1536, 6, 6, 2, 8000), (190.9, 182.4, 148.1, 83.2)),
        ("qwen3", (512, 1376, 4, 8, 8, 2048), (140.7, 140.7, 102.5, 56.1)),
        ("qwen3", (384, 1536, 6, 6, 2, 8000), (197.8, 182.5, None, None)),
        ("glm4", (512, 1376, 4, 8, 8, 2048), (140.8, 140.8, 99.1, 56.0)),
        ("glm4", (384, 1536, 6, 6, 2, 8000), (203.0, 182.6, 151.1, 82.7)),
    ],
)
def test_steps_meet_the_counted_ones(body: str, shape: tuple[int, ...], counted_mib: tuple[float | None, ...]) -> None:
    """benchmarks/count_training.py: second step of real training on a CPU, 384 tokens, bfloat16, AdamW, rank 16.

    There is one workspace less on a CPU.
    """
    profile = small(body, *shape)
    for (method, is_checkpointed), counted in zip(
        (("full", False), ("full", True), ("lora", False), ("lora", True)), counted_mib, strict=True
    ):
        training = Training(method="full" if method == "full" else "lora", gradient_checkpointing=is_checkpointed)
        need = whole(profile, training, text_tokens=384)
        predicted = (need.total_bytes - need.fragmentation_bytes) / MIB - 32
        if counted is not None:
            assert 0.98 * counted <= predicted <= 1.04 * counted, (method, is_checkpointed, predicted)


def test_full_training_keeps_gradients_and_two_states_in_the_type_of_the_weights() -> None:
    weights = glm41v_9b().stored_bytes
    fields: dict[str, Any] = {"images": 1, "image_height": 56, "text_tokens": 64}
    need = whole(glm41v_9b(), Training(method="full"), **fields)
    assert need.weights_bytes == weights
    assert need.moment == "the optimizer steps"
    assert need.training_bytes == 3 * weights
    assert need.activations_bytes == weights + 32 * MIB  # the roots of all second moments
    assert need.kv_cache_bytes == 0
    wide = whole(glm41v_9b(), Training(method="full"), **fields, dtype="float32")
    assert wide.training_bytes == 6 * weights


def test_a_tower_that_no_prompt_passes_has_no_gradients() -> None:
    """Optimizers leave out weights without one, so that there are no states and no temporaries either."""
    profile = glm41v_9b()
    passed = sum(one.stored_bytes for one in profile.units if one.role not in ("vision", "projector"))
    text = prices(profile, Training(method="full"), text_tokens=64)
    need = text.detail(0, len(text.atoms), 64)
    assert need.weights_bytes == profile.stored_bytes > passed
    assert need.training_bytes == 3 * passed
    assert need.activations_bytes == passed + 32 * MIB
    seen = text.changed(msgspec.structs.replace(text.workload, images=1, image_height=56), text.images, is_bare=False)
    assert seen.detail(0, len(text.atoms), 64).training_bytes == 3 * profile.stored_bytes
    longer = text.changed(msgspec.structs.replace(text.workload, text_tokens=65), text.images, is_bare=False)
    assert longer.detail(0, len(text.atoms), 64) == need
    # A map's device is taken to be trained in proportion, so that those without the tower have all of theirs.
    layers = profile.stored_bytes // 2
    held = Holding(weights_bytes=layers, layers=20, has_tower=False, has_embedding=False, has_head=False)
    assert text.need_of(held, 64).training_bytes >= 3 * layers


@pytest.mark.parametrize(
    ("optimizer", "states", "step"),
    [("adamw", 4.0, 2.0), ("adamw_8bit", 2 + 8 / 256, 0.0), ("adafactor", 0.05, 0.0), ("sgd", 0.0, 0.0)],
)
def test_states_of_optimizers(optimizer: Optimizer, states: float, step: float) -> None:
    workload = Workload(training=Training(method="full", optimizer=optimizer))
    made = trained(unit("layer", "layer", 3000), DENSE, llava_13b(), workload)
    assert made == (0, 6000, math.ceil(states * 3000), step * 3000)


def test_adafactor_takes_one_tensor_after_another() -> None:
    units = [unit("one", "layer", 3000), unit("two", "layer", 6000)]
    training = Training(method="full", optimizer="adafactor")
    workload = Workload(images=0, training=training)
    assert largest_step_bytes([*units, unit("model.visual", "vision", 9000)], workload) == 12 * 2000
    assert largest_step_bytes([], workload) == 0
    for other in (None, Training(optimizer="adafactor"), Training(method="full")):
        assert largest_step_bytes(units, Workload(training=other)) == 0
    need = prices(glm41v_9b(), training).detail(1, 41, 1)
    assert need.moment == "the optimizer steps"
    assert need.activations_bytes == 12 * (203_969_024 // 3) + 32 * MIB


def test_adapters_are_in_float32_with_gradients_and_states() -> None:
    workload = Workload(training=Training(lora_rank=8))
    made = trained(unit("layer", "layer", 3000), DENSE, llava_13b(), workload)
    adapters = 4 * 8 * (8 * 5120 + 3 * (5120 + 13824))
    assert made == (adapters, adapters, 2 * adapters, adapters)
    assert trained(unit("model.visual", "vision", 3000), None, llava_13b(), workload) == Trained()
    assert trained(unit("layer", "layer", 3000), DENSE, llava_13b(), Workload()) == Trained()
    joined = trained(unit("layer", "layer", 3000), EXPERTS, llava_13b(), workload)
    assert joined.adapters == 4 * 8 * 8 * 5120


def test_adapters_of_latent_attention() -> None:
    text = msgspec.structs.replace(
        llava_13b().text, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    made = trained(unit("l", "layer", 9), EXPERTS, llava_13b(text=text), Workload(training=Training(lora_rank=1)))
    assert made.adapters == 4 * (3 * 5120 + 40 * 192 + 2 * 512 + 64 + 40 * 256 + 40 * 128)
    kinds = {DENSE, EXPERTS}
    workload = Workload(images=0, training=Training(gradient_checkpointing=False))
    for profile in (llava_13b(text=text), llava_13b()):
        work = step_work(kinds, profile, workload, image_load(profile, workload), 100)
        assert work.saved == work.layer
        assert min(work.layer.values()) > 100 * 5120


def test_the_levers_of_the_guides_are_worth_gibibytes() -> None:
    """GLM-4V-9B's guide: bfloat16, checkpointing, a smaller batch."""
    fields = {"text_tokens": 2048, "batch": 4}

    def gib(**training: Any) -> float:
        return whole(glm41v_9b(), Training(**training), **fields).total_bytes / GIB

    plain = gib(gradient_checkpointing=False)
    assert plain - gib() > 40
    assert gib(method="full") - gib() > 50
    assert gib(method="full") - gib(method="full", optimizer="adamw_8bit") > 30
    assert whole(glm41v_9b(), Training(), text_tokens=2048, batch=2).total_bytes / GIB < gib() - 4
    assert whole(glm41v_9b(), Training(), **fields, dtype="float32").total_bytes / GIB > gib() + 19


def test_full_training_of_the_tower_keeps_what_it_did() -> None:
    shapes: dict[str, Any] = {"images": 1, "image_height": 1120, "text_tokens": 64}
    block = 6400 * (15 * 1536 + 4 * 4096) * 2
    workload = Workload(**shapes, training=Training(method="full", gradient_checkpointing=False))
    load = image_load(glm41v_9b(), workload)
    work = step_work({DENSE}, glm41v_9b(), workload, load, 64)
    assert (work.tower_saved, work.tower_backward) == (24 * block, 2 * 6400 * 4096 * 2)
    checkpointed = msgspec.structs.replace(workload, training=Training(method="full"))
    work = step_work({DENSE}, glm41v_9b(), checkpointed, load, 64)
    assert (work.tower_saved, work.tower_backward) == (24 * 6400 * 1536 * 2, block + 2 * 6400 * 4096 * 2)
    adapted = msgspec.structs.replace(workload, training=Training())
    assert step_work({DENSE}, glm41v_9b(), adapted, load, 64).tower_saved == 0
    assert step_work({DENSE}, glm41v_9b(vision=None), workload, load, 64).tower_saved == 0


def test_adapters_keep_what_a_tower_did_where_gradients_pass_it() -> None:
    """transformers 5 lets them begin at the tower's own embedding."""
    profile = llava_13b()
    workload = Workload(images=1, training=Training(gradient_checkpointing=False))
    load = image_load(profile, workload)
    assert profile.vision is not None
    block = load.sequences * load.patches * (10 * profile.vision.hidden + 3 * profile.vision.intermediate) * 2
    assert step_work({DENSE}, profile, workload, load, 64).tower_saved == profile.vision.layers * block
    assert step_work({DENSE}, profile, workload, load, 64, release=(4, 57)).tower_saved == 0
    assert step_work({DENSE}, glm41v_9b(), workload, image_load(glm41v_9b(), workload), 64).tower_saved == 0


@pytest.mark.parametrize(
    ("run", "training", "fields", "moment"),
    [
        ((0, 41), Training(), {"text_tokens": 2048}, "a layer goes backward"),
        ((41, 42), Training(), {"text_tokens": 2048}, "the loss is computed"),
        ((0, 1), Training(), {"images": 1, "image_height": 2240, "text_tokens": 8}, "the logits come back"),
        ((1, 3), Training(method="full", optimizer="sgd"), {"text_tokens": 2048}, "the last gradients are computed"),
        ((1, 3), Training(method="full"), {"text_tokens": 64}, "the optimizer steps"),
    ],
)
def test_the_worst_moment_of_a_step_is_named(
    run: tuple[int, int], training: Training, fields: dict[str, Any], moment: str
) -> None:
    made = prices(glm41v_9b(), training, **fields)
    assert made.detail(*run, made.workload.text_tokens).moment == moment


def test_a_tower_that_is_only_read_is_the_worst_where_there_are_few_words() -> None:
    profile = glm41v_9b()
    profile = msgspec.structs.replace(profile, text=msgspec.structs.replace(profile.text, vocabulary=1000))
    need = prices(profile, Training(), images=1, image_height=2240, text_tokens=8).detail(0, 1, 8)
    assert need.moment == "the vision tower runs"
    assert need.fragmentation_bytes >= 0.5 * (need.activations_bytes - 32 * MIB)


def test_logits_come_back_to_where_the_model_begins() -> None:
    """Also where nothing but the embedding is; on the head's own GPU they are there already."""
    training = Training(gradient_checkpointing=False)
    made = prices(glm41v_9b(), training, text_tokens=2048)
    first = made.detail(0, 1, 2048)
    assert first.moment == "the logits come back"
    held = made.work(2048).held
    assert first.activations_bytes == held + 2 * 2048 * glm41v_9b().text.vocabulary + 32 * MIB
    assert made.detail(0, 42, 2048).moment == "the loss is computed"


def test_a_map_that_puts_the_embedding_beside_the_head_is_told_what_is_lost_beside_the_loss() -> None:
    """Such a GPU is no stage of the planner, and none of its stages loses the same."""
    profile = load_profile("Qwen/Qwen2.5-VL-7B-Instruct", allow_network=False)
    workload = Workload(images=0, text_tokens=8192, training=Training())
    device_map = {unit.key: int(unit.role == "layer") for unit in profile.units}
    checked = check_map(device_map, profile, machine([79.0, 79.0]), workload)
    made = Footprint(profile, workload, image_load(profile, workload), chain(profile).atoms)
    ends = Holding(
        weights_bytes=checked.devices[0].weights_bytes, layers=0, has_tower=True, has_embedding=True, has_head=True
    )
    largest = 4 * 8192 * profile.text.vocabulary
    lost = made.lost_of(ends, (0, 1), 8192)
    assert lost >= largest + SLACK_BYTES
    assert checked.devices[0].need_bytes == made.need_of(ends, 8192).total_bytes + lost
    # Where loading takes more than the step, nothing is lost on top.
    assert made.lost_of(msgspec.structs.replace(ends, loading_bytes=100 * GIB), (0, 1), 8192) == 0


def test_eager_attention_keeps_scores_for_backward() -> None:
    training = Training(gradient_checkpointing=False)
    fused, eager = (whole(llava_13b(), training, attention=kind, text_tokens=512) for kind in ("sdpa", "eager"))
    assert eager.activations_bytes - fused.activations_bytes == 40 * 40 * 512**2 * 6


def test_an_allocator_that_expands_wastes_less() -> None:
    native, expandable = (whole(glm41v_9b(), Training(), allocator=kind) for kind in ("native", "expandable"))
    assert expandable.fragmentation_bytes == SLACK_BYTES
    assert native.fragmentation_bytes > SLACK_BYTES + 64 * MIB
    workload = Workload(images=0, training=Training())
    atoms = chain(glm41v_9b()).atoms
    bare = Footprint(glm41v_9b(), workload, image_load(glm41v_9b(), workload), atoms, is_bare=True)
    assert bare.detail(0, 42, 512).fragmentation_bytes == 0
    assert bare.least_bytes < bare.needs(512)(0, 42)


def test_offloaded_layers_are_trained_where_they_are_executed() -> None:
    atoms = chain(glm41v_9b()).atoms
    workload = Workload(images=0, training=Training(gradient_checkpointing=False))
    load = image_load(glm41v_9b(), workload)
    part = Footprint(glm41v_9b(), workload, load, atoms[:30], atoms[30:])
    need = part.detail(0, 30, 512)
    assert need.total_bytes == part.needs(512)(0, 30)
    assert need.activations_bytes > 0.9 * whole(glm41v_9b(), workload.training or Training()).activations_bytes


@given(
    st.sampled_from([glm41v_9b(), llava_13b()]),
    st.builds(
        Training,
        method=st.sampled_from(["full", "lora"]),
        optimizer=st.sampled_from(["adamw", "adamw_8bit", "adafactor", "sgd"]),
        lora_rank=st.integers(1, 64),
        gradient_checkpointing=st.booleans(),
    ),
    st.integers(1, 20_000),
    st.integers(1, 4),
    st.data(),
)
def test_a_stage_grows_with_every_atom_token_and_prompt(
    profile: ModelProfile, training: Training, tokens: int, batch: int, data: st.DataObject
) -> None:
    made = prices(profile, training, text_tokens=tokens, batch=batch)
    first = data.draw(st.integers(0, 41))
    end = data.draw(st.integers(first + 1, 42))
    need = made.needs(tokens)
    detail = made.detail(first, end, tokens)
    assert need(first, end) == detail.total_bytes
    assert min(detail.weights_bytes, detail.training_bytes, detail.activations_bytes, detail.fragmentation_bytes) >= 0
    assert need(first, end) <= made.needs(tokens + 1)(first, end)
    assert need(first, end) <= prices(profile, training, batch=batch + 1).needs(tokens)(first, end)
    if end < 42:
        assert need(first, end) <= need(first, end + 1)
    if first:
        assert need(first, end) <= need(first - 1, end)


SIZES = st.integers(0, 1_000)


@given(*[SIZES] * 12, st.integers(0, 10), *[SIZES] * 3, st.sampled_from([Waste(), *WASTE.values()]))
def test_what_is_wasted_never_makes_more_cost_less(
    saved: int, again: int, last: int, loss: int, largest: int, logits: int, held: int, encode: int, tower: int,
    states: int, gradients: int, step: int, factor: int, more: int, more_gradients: int, more_step: int, waste: Waste
) -> None:  # fmt: skip
    def worst(fixed: Trained, saved: int) -> Peak:
        return peak(
            fixed=fixed, saved=saved, again=again, last=last, loss=loss, largest=largest, logits=logits, held=held,
            encode=encode, tower=tower, waste=waste,
        )  # fmt: skip

    one = Trained(0, gradients * factor, states, step)
    two = Trained(0, one.gradients + more_gradients, states, step + more_step)
    few, many = worst(one, saved), worst(two, saved + more)
    assert few.kept + few.work + few.lost <= many.kept + many.work + many.lost
    assert few.reserved <= many.reserved
    assert few.lost >= 0
    assert few.kept + few.work + few.lost <= few.reserved
    assert waste != Waste() or few.lost == 0


def test_a_step_that_fits_nowhere_ends_in_a_shortage() -> None:
    """Here the worst moment changes from one atom to the next."""
    profile = load_profile("OpenGVLab/InternVL3-8B-hf", allow_network=False)
    workload = Workload(
        images=16, image_height=224, image_width=224, dtype="float32", training=Training(method="full"), new_tokens=1
    )
    planned = plan(profile, load_machine("3090+A100-40"), workload)
    assert planned.shortage is not None


def test_the_ledger_tells_that_a_tower_is_left_out() -> None:
    profile = load_profile("Qwen/Qwen2.5-VL-7B-Instruct", allow_network=False)
    whole, adapters = Training(method="full"), Training(method="lora")
    for training, images, is_left_out in ((whole, 0, True), (whole, 1, False), (adapters, 0, False)):
        planned = plan(profile, load_machine("2xH200"), Workload(images=images, training=training))
        lines = {line.kind: line.source for line in planned.stages[0].ledger}
        assert lines["training"].endswith("no prompt has an image") == is_left_out
        assert "recorded steps" in lines["fragmentation"]


def test_a_step_makes_no_answer_that_would_need_positions() -> None:
    profile = load_profile("llava-hf/llava-1.5-7b-hf", allow_network=False)
    positions = profile.text.max_positions
    for tokens, is_too_long in ((512, False), (4096, False), (4097, True)):
        planned = plan(profile, load_machine("80GiB"), Workload(images=0, text_tokens=tokens, training=Training()))
        assert planned.longest_prompt_tokens == max(4096, tokens)
        noted = [note for note in planned.notes if "positions" in note]
        assert noted[0].startswith("The prompt takes 4,097" if is_too_long else "The longest prompt is set by")
    assert positions == 4096


def test_a_trained_sum_is_made_of_its_parts() -> None:
    one, two = Trained(1, 2, 3, 4), Trained(10, 20, 30, 40)
    assert one + two == (11, 22, 33, 44)
    assert one + two - one == two


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_any_device_holds_is_trained_there(method: str) -> None:
    """The whole model as a holding costs what it costs as a stage; a part of it in proportion."""
    made = prices(llava_13b(), Training(method=method), images=1)  # type: ignore[arg-type]
    tokens = made.workload.text_tokens
    stage = made.detail(0, len(made.atoms), tokens)
    layers = sum(atom.layers for atom in made.atoms)
    whole_model = Holding(
        weights_bytes=made.weights_of(0, len(made.atoms)), layers=layers, has_tower=True, has_embedding=True, has_head=True
    )
    assert made.need_of(whole_model, tokens).total_bytes == stage.total_bytes - stage.fragmentation_bytes
    half = msgspec.structs.replace(whole_model, weights_bytes=whole_model.weights_bytes // 2, layers=layers // 2)
    assert made.need_of(half, tokens).training_bytes == pytest.approx(stage.training_bytes / 2, rel=0.01)


def test_joined_experts_exist_twice_while_they_are_loaded_for_training_too() -> None:
    text = msgspec.structs.replace(llava_13b().text, experts=64, active_experts=8, expert_width=512)
    made = prices(llava_13b(text=text), Training(method="lora"), text_tokens=1)
    layer = made.weights_of(3, 4)
    need = made.detail(3, 4, 1)
    assert (need.moment, need.total_bytes) == ("the weights are loaded", 2 * layer)
    assert made.needs(1)(3, 4) == 2 * layer
    assert made.detail(3, 4, 20_000).moment != "the weights are loaded"
    held = Holding(weights_bytes=layer, layers=1, has_tower=False, has_embedding=False, has_head=False, loading_bytes=layer)
    assert made.need_of(held, 1).total_bytes == 2 * layer


def test_layers_with_wider_heads_train_and_keep_more() -> None:
    """Gemma 4: full attention has heads of its own."""
    kinds = tuple(LayerKind(cache, has_experts=False) for cache in ("sliding", "full"))
    text = msgspec.structs.replace(llava_13b().text, full_head_dim=256, full_kv_heads=40)
    profile, layer = llava_13b(text=text), llava_13b().units[5]
    workload = Workload(images=0, training=Training(method="lora", gradient_checkpointing=False))
    adapted, wider = (trained(layer, kind, profile, workload).adapters for kind in kinds)
    assert wider - adapted == 4 * workload.training.lora_rank * 4 * 40 * 128  # type: ignore[union-attr]
    saved = step_work({*kinds}, profile, workload, image_load(profile, workload), 100).saved
    assert saved[kinds[1]] > saved[kinds[0]]
