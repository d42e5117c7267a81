from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.data.activations import DEFAULT_TEXT, DEFAULT_VISION, text_coefficient, vision_coefficient
from vlm_doctor.model import LayerCache, LinearWeights, ModelProfile, Unit
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.kv_cache import Cached
from vlm_doctor.planner.memory import Footprint, Holding, StageNeed, item_bytes, loaded_dtype, unit_bytes
from vlm_doctor.planner.settle import replay_of
from vlm_doctor.planner.weights import loading_bytes
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.allocation_scripts import body_script
from vlm_doctor.units import MIB
from vlm_doctor.workload import Workload

from .profiles import glm41v_9b, llava_13b, unit

_FULL: tuple[LayerCache, ...] = ("full",)
LAYER = unit("layer", "layer", 1_000, linear=900)


def footprint(profile: ModelProfile, **fields: Any) -> Footprint:
    workload = Workload(**fields)
    return Footprint(profile, workload, image_load(profile, workload), chain(profile).atoms)


def layer_of(prices: Footprint, text_tokens: int) -> int:
    """Work of the one kind of layer that there is."""
    (only,) = prices.work(text_tokens).layer.values()
    return only


def cached_of(prices: Footprint, text_tokens: int) -> Cached:
    (only,) = prices.work(text_tokens).cached.values()
    return only


def whole(profile: ModelProfile, **fields: Any) -> StageNeed:
    prices = footprint(profile, **fields)
    return prices.detail(0, len(prices.atoms), prices.workload.text_tokens)


@pytest.mark.parametrize(
    ("stored", "fields", "size_bytes"),
    [
        ({"BF16": 1000}, {}, 2000),
        ({"BF16": 1000}, {"dtype": "float32"}, 4000),
        ({"F32": 1000}, {}, 2000),
        ({"F32": 1000}, {"dtype": "float16"}, 2000),
        ({"BF16": 600, "F32": 400}, {"dtype": "float32"}, 4000),
        ({"BF16": 600, "I32": 100, "U8": 7, "BOOL": 5, "I64": 1}, {}, 1200 + 400 + 7 + 5 + 8),
        ({"BF16": 600, "F8_E4M3": 400}, {"dtype": "float32"}, 2400 + 400),
        ({"F4": 3}, {}, 2),
        ({"BF16": 1000}, {"quantization": "int8"}, 896 + 4 * 16 + 208),
        ({"BF16": 1000}, {"quantization": "nf4"}, 448 + 4 * 14 + 64 * 3 + 208),
        ({"F32": 1000}, {"quantization": "nf4", "dtype": "float32"}, 448 + 4 * 14 + 64 * 3 + 416),
        ({"BF16": 900, "I32": 100}, {"quantization": "int8"}, 896 + 4 * 16 + 8 + 400),
    ],
)
def test_bytes_of_a_unit_once_loaded(stored: dict[str, int], fields: dict[str, Any], size_bytes: int) -> None:
    linear = LinearWeights(elements=896, rows=16, tensors=3, largest=300)
    own = msgspec.structs.replace(LAYER, parameters=stored, linear=linear)
    assert unit_bytes(own, glm41v_9b(), Workload(**fields)) == size_bytes


def test_a_quantized_checkpoint_keeps_its_stored_bytes() -> None:
    own = Unit(key="layer", role="layer", parameters={"I32": 100, "F16": 8}, stored_bytes=416)
    assert unit_bytes(own, glm41v_9b(quantization="gptq"), Workload(dtype="float32")) == 416


def test_dtypes() -> None:
    assert [item_bytes(name) for name in ("float32", "bfloat16", "float16", "float8_e4m3fn")] == [4, 2, 2, 2]
    assert loaded_dtype(glm41v_9b(), Workload()) == "bfloat16"
    assert loaded_dtype(glm41v_9b(), Workload(dtype="float32")) == "float32"


def test_the_kv_cache_holds_all_tokens_of_all_sequences() -> None:
    need = whole(llava_13b(), images=0, text_tokens=1000, new_tokens=24, batch=3)
    assert need.kv_cache_bytes == 2 * 40 * 128 * 40 * 2 * 1024 * 3


def test_float32_doubles_cache_and_activations() -> None:
    short, wide = (whole(llava_13b(), images=0, new_tokens=0, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert wide.weights_bytes == 2 * short.weights_bytes
    assert wide.kv_cache_bytes == 2 * short.kv_cache_bytes
    assert wide.activations_bytes == pytest.approx(2 * short.activations_bytes, abs=2)


def test_a_quantized_checkpoint_computes_in_16_bit_and_bitsandbytes_in_the_loaded_type() -> None:
    plain = whole(llava_13b(), images=0)
    assert whole(llava_13b(quantization="awq"), images=0, dtype="float32").kv_cache_bytes == plain.kv_cache_bytes
    assert whole(llava_13b(), images=0, dtype="float32", quantization="int8").kv_cache_bytes == 2 * plain.kv_cache_bytes


def test_int8_needs_its_product_and_nf4_the_weight_in_use() -> None:
    plain, int8, nf4 = (footprint(llava_13b(), images=0, quantization=kind) for kind in (None, "int8", "nf4"))
    largest = max(unit.linear.largest for unit in llava_13b().units if unit.role == "layer")
    assert layer_of(int8, 512) - layer_of(plain, 512) == 4 * 512 * 13824
    assert layer_of(nf4, 512) - layer_of(plain, 512) == 2 * largest
    wide, nf4 = (footprint(llava_13b(), images=0, dtype="float32", quantization=kind) for kind in (None, "nf4"))
    assert layer_of(nf4, 512) - layer_of(wide, 512) == 4 * largest
    joined, int8 = (footprint(glm41v_9b(), images=0, quantization=kind) for kind in (None, "int8"))
    assert layer_of(int8, 512) - layer_of(joined, 512) == 10 * 512 * 13696


def test_a_checkpoint_of_bitsandbytes_computes_as_it_says() -> None:
    for profile in (llava_13b, glm41v_9b):
        text, joined = profile().text, 1 + (profile is glm41v_9b)
        plain, int8, ready, half, full = (
            footprint(profile(**own), images=0, **asked)
            for own, asked in (
                ({}, {}),
                ({}, {"quantization": "int8"}),
                ({"quantization": "bitsandbytes", "computes_in": "int8"}, {}),
                ({"quantization": "bitsandbytes"}, {}),
                ({"quantization": "bitsandbytes", "computes_in": "float32"}, {}),
            )
        )
        assert layer_of(ready, 512) == layer_of(int8, 512)
        assert layer_of(half, 512) - layer_of(plain, 512) == 2 * joined * text.hidden * text.intermediate
        unpacked = 4 * joined * text.hidden * text.intermediate
        passed = 4 * 512 * (joined * text.intermediate + text.hidden)
        assert layer_of(full, 512) - layer_of(plain, 512) == unpacked + passed


def test_eager_attention_pays_for_the_scores_of_all_heads_instead_of_the_mlp() -> None:
    fused, eager = (footprint(llava_13b(), attention=kind) for kind in ("sdpa", "eager"))
    tokens = 512 + 576
    around = 5.2 * tokens * 5120 * 2
    assert layer_of(eager, 512) == math.ceil(around) + 40 * tokens**2 * 10 + 2 * tokens**2
    # Of CLIP's tower, the MLP of three copies gives way to queries, keys and values.
    assert eager.work(512).encode - fused.work(512).encode == 16 * 577**2 * 10 + 577 * (2 * 1024 - 3 * 4096) * 2
    fused, eager = (footprint(llava_13b(), images=0, new_tokens=0, attention=kind) for kind in ("sdpa", "eager"))
    assert layer_of(eager, 8) == layer_of(fused, 8) + 2 * 8**2


def test_scores_of_float16_are_not_copied_to_float32_first() -> None:
    sizes = {
        dtype: layer_of(footprint(llava_13b(), attention="eager", dtype=dtype), 4000) for dtype in ("float16", "bfloat16")
    }
    assert sizes["bfloat16"] - sizes["float16"] == 2 * 40 * 4576**2
    flat = layer_of(footprint(llava_13b(), attention="eager", dtype="float32"), 4000)
    assert flat - sizes["float16"] == pytest.approx(2 * 5.2 * 4576 * 5120 + 2 * 4576**2, abs=2)


def test_masks_of_sliding_windows_grow_with_the_square_beyond_the_window() -> None:
    text = msgspec.structs.replace(llava_13b().text, sliding_window=1024)
    windowed, plain = footprint(llava_13b(text=text), images=0), footprint(llava_13b(), images=0)
    assert layer_of(windowed, 1024) == layer_of(plain, 1024)
    assert layer_of(windowed, 2048) - layer_of(plain, 2048) == 2048**2
    long = 100_000
    assert layer_of(windowed, long) == math.ceil(5.2 * long * 5120 * 2) + 5 * long**2


def test_images_that_attend_both_ways_need_two_masks_even_within_the_window() -> None:
    text = msgspec.structs.replace(llava_13b().text, sliding_window=1024)
    windowed, plain = footprint(llava_13b(text=text)), footprint(llava_13b())
    assert layer_of(windowed, 64) - layer_of(plain, 64) == 2 * (64 + 576) ** 2
    eager = [layer_of(footprint(profile, attention="eager"), 64) for profile in (llava_13b(text=text), llava_13b())]
    assert eager[0] - eager[1] == 2 * (64 + 576) ** 2


def test_logits_of_one_token_or_of_all() -> None:
    states = 512 * 5120 * 2
    assert footprint(llava_13b(), images=0, batch=2).work(1).head == max(6 * 2 * 5120 * 2, 2 * 2 * 5120 * 2 + 2 * 32064 * 6)
    assert footprint(glm41v_9b(), images=0, logits="forward").work(512).head == 2 * 512 * 4096 * 2 + 512 * 151552 * 2
    cog = llava_13b(architecture="CogVLMForCausalLM")
    assert footprint(cog, images=0).work(512).head == 2 * states + 512 * 32064 * 6


@pytest.mark.parametrize(
    ("family", "release", "has_all"),
    [
        ("qwen2_vl", (4, 57), True),
        ("qwen2_vl", None, False),
        ("video_llama_3", (5, 23), True),
        ("blip-2", None, False),
        ("glm4v", (4, 57), False),
    ],
)
def test_classes_that_cannot_be_told_to_keep_the_last_logits_make_all(
    family: str, release: tuple[int, int] | None, has_all: bool
) -> None:
    known = footprint(glm41v_9b(model_type=family, body_script=body_script("glm4v_text")), images=0, text_tokens=4096)
    prices = Footprint(known.profile, known.workload, known.images, known.atoms, release=release)
    made = 4096 * 151552 * 2
    assert (prices.work(4096).head > made) == has_all
    assert (prices.work(4096).returned == made) == has_all
    # What was written down of the class is of a release that makes the last ones alone.
    assert (replay_of(prices, load_machine("1xA100").gpus) is None) == has_all


@pytest.mark.parametrize(
    ("architecture", "fields", "element_bytes"),
    [("Glm4vForConditionalGeneration", {"logits": "forward"}, 2), ("CogVLMForCausalLM", {}, 4)],
)
def test_logits_of_every_token_come_back_to_the_gpu_that_the_prompt_came_from(
    architecture: str, fields: dict[str, Any], element_bytes: int
) -> None:
    prices = footprint(glm41v_9b(architecture=architecture), images=0, text_tokens=4096, **fields)
    first = prices.detail(0, 8, 4096)

    assert first.moment == "the logits come back"
    assert first.kv_cache_bytes + first.activations_bytes >= 4096 * 151552 * element_bytes
    assert prices.needs(4096)(0, 8) == first.total_bytes
    assert prices.detail(0, len(prices.atoms), 4096).moment == "the head computes logits"
    assert prices.detail(8, 16, 4096).moment == "a layer reads the prompt"


def test_image_features_and_the_output_of_the_tower_are_held_on_the_first_gpu() -> None:
    prices = footprint(llava_13b())
    pixels, state, features = 577 * 6 * 14**2 * 2, 577 * 1024 * 2, 576 * 5120 * 2
    rest = (512 + 576) * 5120 * 2 + pixels + 2 * features
    assert prices.work(512).held == rest + 2 * state
    tower = llava_13b().vision
    assert tower is not None
    several = msgspec.structs.replace(tower, taken=4)
    assert footprint(llava_13b(model_type="llava_next", vision=several)).work(512).held == rest + 8 * state
    assert footprint(llava_13b(model_type="vipllava", vision=several)).work(512).held == rest + state


def test_images_read_by_cross_attention_fill_the_cache_of_few_layers_and_one_token_of_the_prompt() -> None:
    kinds: tuple[LayerCache, ...] = ("full", "full", "full", "cross", *_FULL * 36)
    text = msgspec.structs.replace(llava_13b().text, cached_layers=kinds)
    prices = footprint(llava_13b(model_type="mllama", text=text), text_tokens=64, new_tokens=8)
    assert (prices.images.tokens, prices.images.features) == (1, 576)
    each = 2 * 40 * 128 * 2
    cached = {kind.cache: kept for kind, kept in prices.work(64).cached.items()}
    assert cached["full"] == (each * 65, each * 73)
    assert cached["cross"] == (each * 576, each * 576)
    assert prices.detail(4, 5, 64).kv_cache_bytes == each * 576
    assert prices.detail(3, 5, 64).kv_cache_bytes == each * (73 + 576)


@pytest.mark.parametrize(
    ("fields", "moment"),
    [
        ({"text_tokens": 4096}, "a layer reads the prompt"),
        ({"images": 1, "image_height": 4480, "text_tokens": 8}, "the vision tower runs"),
        ({"logits": "forward"}, "the head computes logits"),
    ],
)
def test_the_moment_of_the_largest_activations_is_named(fields: dict[str, Any], moment: str) -> None:
    assert whole(glm41v_9b(), **{"images": 0, **fields}).moment == moment


def test_an_anchor_alone_holds_the_embedded_prompt() -> None:
    prices = footprint(glm41v_9b(), images=0)
    need = prices.detail(0, 1, 512)
    assert (need.kv_cache_bytes, need.activations_bytes, need.fragmentation_bytes) == (0, 512 * 4096 * 2, 0)
    assert need.moment == "the prompt is embedded"


def test_a_stage_costs_no_less_with_the_anchor_than_without_however_little_is_lost_there() -> None:
    prices = footprint(glm41v_9b(), images=0)
    long = 10_000_000
    assert prices.needs(long)(0, 41) == prices.needs(long)(1, 41) == prices.detail(0, 41, long).total_bytes
    assert prices.needs(512)(0, 41) > prices.needs(512)(1, 41)


def test_a_stage_of_tower_blocks_that_executes_offloaded_layers_wastes_what_the_first_gpu_does() -> None:
    """LLaVA's text body wastes more of a layer's work on the first GPU (0.49) than later (0.41)."""
    known = llava_13b()
    blocks = tuple(unit(f"tower.blocks.{number}", "vision", 10 * MIB, layer=number) for number in range(2))
    tower = msgspec.structs.replace(unit("tower", "vision", 20 * MIB), parts=blocks)
    profile = msgspec.structs.replace(known, units=(tower, *known.units[1:]))
    workload = Workload(images=0, text_tokens=2_000, new_tokens=0)
    atoms = chain(profile, breaks_tower=True).atoms
    prices = Footprint(profile, workload, image_load(profile, workload), atoms[:-6], atoms[-6:])
    (layer,) = set(prices.work(2_000).layer.values())
    need = prices.detail(0, 1, 2_000)
    shares = 0.49 * layer + 0.25 * need.kv_cache_bytes
    assert need.moment == "a layer reads the prompt"
    assert need.fragmentation_bytes == pytest.approx(64 * MIB + shares, abs=1_000)


def test_a_long_answer_to_a_short_prompt_pays_for_the_copy_of_a_growing_cache() -> None:
    prices = footprint(llava_13b(), images=0, new_tokens=100_000)
    need = prices.detail(0, 42, 1)
    assert need.moment == "the next token is made"
    cached = cached_of(prices, 1)
    assert need.kv_cache_bytes == 40 * cached.final
    assert need.activations_bytes == cached.final // 2 + prices.work(1).answer


def test_images_without_a_known_tower_cost_their_pixels() -> None:
    prices = footprint(llava_13b(vision=None))
    assert prices.work(512).encode == 577 * 6 * 14**2 * 2
    assert "patch" not in prices.source


def test_the_source_names_the_formulas() -> None:
    assert footprint(glm41v_9b()).source == (
        "4 x intermediate + 3.07 x hidden elements a token (counted, and measured on an H200); "
        "18.2 x hidden elements a patch (counted, and measured on an H200)"
    )
    assert footprint(llava_13b()).source.endswith(
        "3 x intermediate + 4.6 x hidden elements a patch (counted; its activation function makes two copies)"
    )
    tower = llava_13b().vision
    assert tower is not None
    kept = llava_13b(vision=msgspec.structs.replace(tower, keeps_states=True))
    assert footprint(kept).source.endswith(
        "(4.6 + layers) x hidden elements a patch (counted; its activation function makes two copies; this transformers "
        "keeps the hidden states of all layers)"
    )
    assert footprint(llava_13b(), images=0).source == "3 x intermediate + 3.07 x hidden elements a token (counted)"


def test_an_architecture_that_was_not_counted_gets_the_most_of_any() -> None:
    assert text_coefficient("no_such_model") is DEFAULT_TEXT
    assert vision_coefficient("no_such_model") is DEFAULT_VISION
    assert vision_coefficient("cogvlm", "CogVLMForCausalLM") is vision_coefficient("chatglm", "ChatGLMModel")
    assert vision_coefficient("cogvlm", "CogVLMForCausalLM") is not DEFAULT_VISION
    assert vision_coefficient("cogagent", "CogAgentForCausalLM") is DEFAULT_VISION
    assert vision_coefficient("llava").elements(intermediate=4096, hidden=1024, layers=24) == 3 * 4096 + 4.6 * 1024


@given(
    st.sampled_from([glm41v_9b(), llava_13b(), glm41v_9b(runs_inner_generate=True)]),
    st.fixed_dictionaries(
        {
            "images": st.integers(0, 2),
            "text_tokens": st.integers(1, 50_000),
            "new_tokens": st.integers(0, 5_000),
            "batch": st.integers(1, 4),
            "attention": st.sampled_from(["sdpa", "eager"]),
            "logits": st.sampled_from(["generate", "forward"]),
            "quantization": st.sampled_from([None, "int8", "nf4"]),
        }
    ),
    st.data(),
)
def test_a_stage_grows_with_every_atom_and_token_and_both_ways_to_price_it_agree(
    profile: ModelProfile, fields: dict[str, Any], data: st.DataObject
) -> None:
    prices = footprint(profile, **fields)
    atoms = len(prices.atoms)
    first = data.draw(st.integers(0, atoms - 1))
    end = data.draw(st.integers(first + 1, atoms))
    tokens = fields["text_tokens"]
    need = prices.needs(tokens)
    detail = prices.detail(first, end, tokens)
    assert need(first, end) == detail.total_bytes
    assert min(detail.weights_bytes, detail.kv_cache_bytes, detail.activations_bytes, detail.fragmentation_bytes) >= 0
    assert need(first, end) <= prices.needs(tokens + 1)(first, end)
    if end < atoms:
        assert need(first, end) <= need(first, end + 1)
    if first:
        assert need(first, end) <= need(first - 1, end)


def hybrid() -> ModelProfile:
    """40 layers: one dense, then experts; every fourth one keeps all tokens, the others a window or a state."""
    pattern: tuple[LayerCache, ...] = ("sliding", "linear", "sliding", "full")
    kinds = pattern * 10
    text = msgspec.structs.replace(
        llava_13b().text, sliding_window=700, cached_layers=kinds, experts=64, active_experts=8, expert_width=512
    )
    units = tuple(
        msgspec.structs.replace(one, stored_bytes=one.stored_bytes // 4) if one.layer == 0 else one
        for one in llava_13b().units
    )
    return llava_13b(text=text, units=units)


def test_a_stage_pays_for_the_layers_that_it_holds() -> None:
    prices = footprint(hybrid(), images=0, text_tokens=4000, new_tokens=100)
    work = prices.work(4000)
    kept = {kind.cache: work.cached[kind] for kind in work.cached}
    assert prices.detail(2, 3, 4000).kv_cache_bytes == kept["linear"].final
    assert prices.detail(3, 5, 4000).kv_cache_bytes == kept["sliding"].prefill + kept["full"].prefill
    assert prices.detail(4, 5, 4000).kv_cache_bytes == kept["full"].final
    assert prices.detail(1, 2, 4000).activations_bytes < prices.detail(3, 4, 4000).activations_bytes
    assert prices.least_bytes < prices.needs(4000)(0, 42)


def test_the_neediest_layers_stand_for_a_number_of_them() -> None:
    prices = footprint(hybrid(), images=0, text_tokens=4000, new_tokens=100)
    holding = Holding(weights_bytes=0, layers=10, has_tower=False, has_embedding=False, has_head=False)
    keys = tuple(f"model.language_model.layers.{layer}" for layer in range(3, 40, 4))
    named = msgspec.structs.replace(holding, layer_keys=keys)
    assert prices.need_of(holding, 4000) == prices.need_of(named, 4000)


def test_joined_experts_exist_twice_while_they_are_loaded() -> None:
    joined = 317_204_480 * 2  # 64 experts would take more than the layer has
    prices = footprint(hybrid(), images=0, text_tokens=1, new_tokens=1)
    need = prices.detail(3, 4, 1)
    assert need.moment == "the weights are loaded"
    assert need.kv_cache_bytes + need.activations_bytes == joined
    assert prices.detail(40, 42, 1).total_bytes == prices.needs(1)(40, 42)
    old = Footprint(prices.profile, prices.workload, prices.images, prices.atoms, release=(4, 57))
    assert old.detail(3, 4, 1).moment == "a layer reads the prompt"
    assert footprint(hybrid(), images=0, text_tokens=10_000).detail(3, 4, 10_000).moment == "a layer reads the prompt"


def test_bitsandbytes_gets_each_weight_unquantized() -> None:
    units = llava_13b().units
    workload = Workload(quantization="nf4")
    largest = max(unit.linear.largest for unit in units)
    assert loading_bytes(units, llava_13b(), workload, None) == 2 * largest
    assert loading_bytes(units, llava_13b(), Workload(quantization="int8"), None) == 4 * largest
    assert loading_bytes(units, llava_13b(), Workload(quantization="nf4", dtype="float32"), None) == 4 * largest
    assert loading_bytes(units, llava_13b(), workload, (4, 57)) == 4 * largest
    assert loading_bytes(units[1:2], llava_13b(), workload, None) == 0
    assert loading_bytes(units, llava_13b(), Workload(), None) == 0
    joined = [msgspec.structs.replace(unit, linear=LinearWeights()) for unit in units]
    assert loading_bytes(joined, hybrid(), workload, None) == 2 * 317_204_480  # Joined experts are not quantized.
    assert loading_bytes(units, hybrid(), Workload(), None) == 2 * 317_204_480
    assert loading_bytes(units, llava_13b(quantization="awq", text=hybrid().text), Workload(), None) == 0


def test_kernels_of_quantized_checkpoints_unpack_the_weight_in_use() -> None:
    plain, packed = (layer_of(footprint(llava_13b(quantization=kind), images=0), 512) for kind in (None, "awq"))
    assert packed - plain == 2 * 5120 * 13824
    plain, packed = (layer_of(footprint(glm41v_9b(quantization=kind), images=0), 512) for kind in (None, "fp8"))
    assert packed - plain == 2 * 2 * 4096 * 13696


@given(
    st.integers(1, 20_000),
    st.integers(0, 3_000),
    st.sampled_from([None, (4, 57), (5, 23)]),
    st.integers(0, 1),
    st.sampled_from([42, 30]),
    st.data(),
)
def test_prices_of_unlike_layers_grow_and_add_up(
    tokens: int, new_tokens: int, release: Any, images: int, placed: int, data: st.DataObject
) -> None:
    workload = Workload(images=images, text_tokens=tokens, new_tokens=new_tokens)
    profile = hybrid()
    atoms = chain(profile).atoms
    prices = Footprint(profile, workload, image_load(profile, workload), atoms[:placed], atoms[placed:], release=release)
    first = data.draw(st.integers(0, placed - 1))
    end = data.draw(st.integers(first + 1, placed))
    need = prices.needs(tokens)
    detail = prices.detail(first, end, tokens)
    assert need(first, end) == detail.total_bytes
    assert min(detail.kv_cache_bytes, detail.activations_bytes, detail.fragmentation_bytes) >= 0
    assert need(first, end) <= prices.needs(tokens + 1)(first, end)
    if end < placed:
        assert need(first, end) <= need(first, end + 1)
    if first:
        assert need(first, end) <= need(first - 1, end)


@pytest.mark.parametrize("profile", [llava_13b(), glm41v_9b()])
def test_a_forward_pass_keeps_no_cache_of_an_answer(profile: ModelProfile) -> None:
    without, ignored = (whole(profile, images=0, logits="forward", new_tokens=tokens) for tokens in (0, 100_000))
    assert ignored == without
    assert whole(profile, images=0, new_tokens=100_000).total_bytes > without.total_bytes


@pytest.mark.parametrize(
    ("family", "body", "times"),
    [("paligemma", "gemma2", 2), ("paligemma", "gemma", 1), ("gemma4", "x", 2), ("llava", "gemma2", 1)],
)
def test_logits_that_are_capped_or_scaled_exist_twice_in_a_plain_forward(family: str, body: str, times: int) -> None:
    """PaliGemma 2 (3B, 448 pixels) with 1,024 tokens of text: 2.2 GiB beside the weights, traced, 1.1 of them logits."""
    text = msgspec.structs.replace(llava_13b().text, body=body, vocabulary=257_216)
    prices = footprint(llava_13b(model_type=family, text=text), images=0, text_tokens=4096, logits="forward")
    logits = 4096 * 257_216 * 2
    states = 2 * 4096 * 5120 * 2
    assert prices.work(4096).head == states + times * logits
    assert prices.work(4096).returned == logits
    older = Footprint(prices.profile, prices.workload, prices.images, prices.atoms, release=(5, 22))
    assert older.work(4096).head == states + (1 if family == "paligemma" else times) * logits


@pytest.mark.parametrize(("body", "times"), [("granite", 2), ("hyperclovax", 2), ("llama", 1)])
def test_an_embedding_that_is_multiplied_is_there_twice(body: str, times: int) -> None:
    """Granite Vision 3.2 2B with 7,000 tokens of text on two H200s: 32 MiB were missing where the prompt is embedded."""
    text = msgspec.structs.replace(llava_13b().text, body=body)
    held = footprint(llava_13b(text=text), images=0, text_tokens=4096).work(4096).held
    assert held == times * 4096 * 5120 * 2


def test_a_body_that_outranks_its_family_is_priced_as_itself() -> None:
    """Phi-3 in a LLaVA, whose gate and up are one layer; a mixture of experts in InternVL3.5."""
    assert text_coefficient("llava", "phi3") is text_coefficient("phi3v", "phi3")
    assert text_coefficient("llava", "vicuna") is text_coefficient("llava", "")
    assert text_coefficient("internvl", "qwen3_moe").experts_hidden_multiple == 4
