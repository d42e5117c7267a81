"""Work of one layer against what true-size models of transformers 5.23 were seen to allocate.

The class of each row was built with true dimensions and few layers, its forward pass traced without a GPU in bfloat16 (the
traced tier's child program, ``doctor/sources/trace_child.py``), 2,048 tokens, one prompt, cuDNN's fused attention; the
figures are elements a token at the layer's worst moment, its keys and values not counted.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vlm_doctor.model import LayerCache, ModelProfile, TextShape
from vlm_doctor.planner.image_tokens import NO_IMAGES, ImageLoad
from vlm_doctor.planner.layer_work import LayerKind, layer_bytes, layer_kinds, next_token_bytes
from vlm_doctor.planner.prompt_work import prompt_work
from vlm_doctor.planner.release import Release
from vlm_doctor.workload import Workload

from .profiles import llava_13b

TOKENS = 2048
DENSE, EXPERTS = LayerKind("full", has_experts=False), LayerKind("full", has_experts=True)
LINEAR, SLIDING = LayerKind("linear", has_experts=False), LayerKind("sliding", has_experts=False)
CROSS = LayerKind("cross", has_experts=False)
_LATENT = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}


def family(body: str, hidden: int, intermediate: int, heads: int, kv_heads: int, **fields: Any) -> ModelProfile:
    """A model of that body; experts as (all, active, width)."""
    every, active, width = fields.pop("experts", (0, 0, 0))
    text = TextShape(
        layers=40, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads,
        head_dim=fields.pop("head_dim", hidden // heads), vocabulary=32_000, body=body, experts=every,
        active_experts=active, expert_width=width, **fields,
    )  # fmt: skip
    return llava_13b(model_type=f"of_{body}", text=text)


QWEN3_VL_30B = family("qwen3_vl_moe_text", 2048, 6144, 32, 4, head_dim=128, experts=(128, 8, 768))
GLM_45V = family("glm4v_moe_text", 4096, 10944, 96, 8, head_dim=128, experts=(128, 8, 1408))
LLAMA4_SCOUT = family("llama4_text", 5120, 8192, 40, 8, experts=(16, 1, 0))
DEEPSEEK_V3 = family("deepseek_v3", 7168, 18432, 128, 128, head_dim=160, experts=(256, 8, 2048), **_LATENT)
DEEPSEEK_V2_LITE = family("deepseek_v2", 2048, 10944, 16, 16, head_dim=160, experts=(64, 6, 1408), **_LATENT)


@pytest.mark.parametrize(
    ("profile", "kind", "traced"),
    [
        (family("llama", 4096, 11008, 32, 32), DENSE, 45_572.0),
        (family("granite", 4096, 11008, 32, 32), DENSE, 45_572.0),
        (family("mistral", 4096, 14336, 32, 8), DENSE, 55_556.1),
        (family("paddleocr_vl_text", 1024, 3072, 16, 2, head_dim=128), DENSE, 12_288.0),
        (family("granite_docling_text", 1024, 2048, 16, 4, head_dim=64), DENSE, 9_216.0),
        (family("muse_glimmer_text", 6656, 19968, 32, 2, head_dim=128), DENSE, 79_872.0),
        (family("lfm2", 2560, 8192, 32, 8), DENSE, 32_420.0),
        (family("lfm3", 2048, 7680, 16, 4), DENSE, 29_184.0),
        (family("lfm3", 2048, 7680, 16, 4), LINEAR, 29_184.0),
        (family("olmo2", 4096, 11008, 32, 32), DENSE, 41_732.0),
        (family("phi", 2048, 8192, 32, 32), DENSE, 38_980.0),
        (family("phi3", 3072, 8192, 32, 32), DENSE, 42_180.0),
        (family("glm4", 4096, 13696, 32, 2), DENSE, 67_204.0),
        (family("cohere2", 8192, 22528, 64, 64), DENSE, 123_140.0),
        (family("gemma4_text", 2304, 9216, 8, 4, head_dim=256), DENSE, 36_356.1),
        # Its embeddings, the prompt's and each layer's own, are counted where the prompt is embedded.
        (family("gemma3n_text", 2048, 16384, 8, 2, head_dim=256), DENSE, 108_570.0),
        (family("qwen3_5_text", 4096, 12288, 16, 4, head_dim=256), DENSE, 49_284.0),
        (family("qwen3_5_text", 4096, 12288, 16, 4, head_dim=256, linear_width=4096), LINEAR, 115_686.0),
        (family("qwen3_5_moe_text", 2048, 4608, 16, 2, experts=(256, 8, 512), linear_width=4096), LINEAR, 111_590.0),
        (family("qwen3_5_moe_text", 2048, 4608, 16, 2, experts=(256, 8, 512)), EXPERTS, 74_276.5),
        (QWEN3_VL_30B, EXPERTS, 72_228.2),
        (GLM_45V, EXPERTS, 209_468.2),
        (LLAMA4_SCOUT, EXPERTS, 626_980.0),
        (family("mixtral", 4096, 28672, 32, 8, experts=(8, 2, 0)), EXPERTS, 135_472.2),
        (family("aria_text", 2560, 9984, 20, 20, experts=(64, 6, 0)), EXPERTS, 69_564.2),
        (family("ernie4_5_vl_moe_text", 2560, 12288, 20, 4, experts=(64, 6, 1536)), EXPERTS, 72_452.2),
        (DEEPSEEK_V3, DENSE, 162_500.0),
        (DEEPSEEK_V3, EXPERTS, 366_004.2),
        (DEEPSEEK_V2_LITE, DENSE, 39_108.0),
        (DEEPSEEK_V2_LITE, EXPERTS, 80_264.2),
        (
            family(
                "minicpm3", 2560, 6400, 40, 40, head_dim=80, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32,
                v_head_dim=64,
            ),
            DENSE,
            28_516.0,
        ),
    ],
    ids=lambda value: getattr(getattr(value, "text", None), "body", None),
)  # fmt: skip
def test_work_of_a_layer_meets_the_traced_one(profile: ModelProfile, kind: LayerKind, traced: float) -> None:
    workload = Workload(images=0, text_tokens=TOKENS)
    predicted = layer_bytes(kind, profile, workload, NO_IMAGES, TOKENS, release=(5, 23)) / 2 / TOKENS
    assert 0.995 * traced <= predicted <= 1.03 * traced


def test_wide_heads_of_full_attention_are_paid_for() -> None:
    """Gemma 4 31B: there attention needs more than the MLP."""
    text = family("gemma4_text", 5376, 21504, 32, 16, head_dim=256, full_head_dim=512, full_kv_heads=4)
    full, sliding = (
        layer_bytes(kind, text, Workload(images=0), NO_IMAGES, TOKENS, release=None) / 2 / TOKENS
        for kind in (DENSE, SLIDING)
    )
    assert full == pytest.approx(5.1 * 32 * 512 + 2.1 * 5376, rel=1e-4)
    assert full > 1.1 * sliding


def test_embeddings_of_each_layer_are_held_where_the_prompt_is_embedded() -> None:
    plain = family("gemma4_text", 2304, 9216, 8, 4, head_dim=256)
    own = msgspec.structs.replace(plain, text=msgspec.structs.replace(plain.text, layer_input=256))
    kinds = [DENSE]
    without, with_ = (
        prompt_work(kinds, profile, Workload(images=0), NO_IMAGES, TOKENS, release=None) for profile in (plain, own)
    )
    assert with_.held - without.held == 2 * TOKENS * (2 * 40 * 256 + 2304)
    assert with_.layer == without.layer


def test_a_wide_body_that_has_narrow_layers_pays_for_attention() -> None:
    narrow = family("qwen3", 2048, 256, 32, 4, head_dim=128)
    predicted = layer_bytes(DENSE, narrow, Workload(images=0), NO_IMAGES, TOKENS, release=None) / 2 / TOKENS
    assert 23_940 <= predicted <= 1.06 * 23_940
    narrow = family("llama", 4096, 256, 32, 8)
    predicted = layer_bytes(DENSE, narrow, Workload(images=0), NO_IMAGES, TOKENS, release=None) / 2 / TOKENS
    assert predicted >= 24_840


@pytest.mark.parametrize(
    ("profile", "elements"),
    [
        (QWEN3_VL_30B, 128 * (3 * 2048 + 2 * 768) + 3.3 * 2048),
        (LLAMA4_SCOUT, 16 * (5120 + 4 * 8192) + 4.1 * 5120),
        (GLM_45V, 3 * 10944 + 3.1 * 4096 + 6.1 * 4096),
    ],
    ids=["all experts at once", "all experts as in 5", "one after another"],
)
def test_transformers_4_runs_experts_in_other_ways(profile: ModelProfile, elements: float) -> None:
    workload = Workload(images=0)
    old = layer_bytes(EXPERTS, profile, workload, NO_IMAGES, TOKENS, release=(4, 57)) / 2 / TOKENS
    if profile is GLM_45V:
        assert old < layer_bytes(EXPERTS, profile, workload, NO_IMAGES, TOKENS, release=None) / 2 / TOKENS / 2
        return
    assert old == pytest.approx(elements)


def test_eager_scores_of_latent_attention() -> None:
    workload = Workload(images=0, attention="eager")
    predicted = layer_bytes(DENSE, DEEPSEEK_V3, workload, NO_IMAGES, TOKENS, release=(5, 23)) / 2 / TOKENS
    assert 1_442_500 <= predicted <= 1.03 * 1_442_500


def test_flash_attention_takes_no_masks_and_a_padded_batch_takes_one() -> None:
    profile = family("llama", 4096, 11008, 32, 32)
    windowed = msgspec.structs.replace(profile, text=msgspec.structs.replace(profile.text, sliding_window=512))

    def work(model: ModelProfile, kind: LayerKind, **fields: Any) -> int:
        return layer_bytes(kind, model, Workload(images=0, **fields), NO_IMAGES, TOKENS, release=None)

    plain = work(profile, DENSE)
    four = work(profile, DENSE, batch=4)
    assert work(windowed, SLIDING, attention="flash") == work(profile, DENSE, attention="flash") == plain
    assert work(windowed, SLIDING) == plain + TOKENS**2
    assert work(profile, DENSE, is_padded=True, batch=4) == four + 4 * TOKENS**2
    assert work(windowed, SLIDING, is_padded=True) == plain + 2 * TOKENS**2
    assert work(profile, DENSE, is_padded=True, attention="flash") == plain


def test_classes_of_checkpoints_with_masks_of_their_own() -> None:
    cog = llava_13b(architecture="CogVLMForCausalLM", model_type="")
    chat = llava_13b(architecture="ChatGLMForConditionalGeneration", model_type="chatglm")
    long = 20_000
    for profile, kept, working in ((cog, 2, 11), (chat, 0, 0)):
        short, tall = (
            layer_bytes(DENSE, profile, Workload(images=0), NO_IMAGES, tokens, release=None) for tokens in (long, 2 * long)
        )
        assert (tall > 2.5 * short) == bool(kept + working)


@pytest.mark.parametrize(
    ("profile", "kind", "fields", "release", "size_bytes"),
    [
        (family("llama", 4096, 11008, 32, 8), DENSE, {}, None, 1024 * 2 * 1000),
        (family("llama", 4096, 11008, 32, 8), DENSE, {"attention": "eager"}, None, (2 * 4096 * 2 + 32 * 10) * 1000),
        (family("llama", 4096, 11008, 32, 32), DENSE, {"attention": "eager", "batch": 2}, None, 4096 * 2 * 2000),
        (family("llama", 4096, 11008, 32, 8), LINEAR, {}, None, 0),
        (family("llama", 4096, 11008, 32, 8), LayerKind("none", has_experts=False), {}, None, 0),
        (family("llama", 4096, 11008, 32, 8), CROSS, {}, None, 3 * 4096 * 2 * 600),
        (family("llama", 4096, 11008, 32, 8), CROSS, {"attention": "eager"}, None, (3 * 4096 * 2 + 32 * 10) * 600),
        (QWEN3_VL_30B, EXPERTS, {"batch": 4}, None, 4 * 8 * 3 * 768 * 2048 * 2),
        (QWEN3_VL_30B, EXPERTS, {}, (4, 57), 512 * 2 * 1000),
        (DEEPSEEK_V2_LITE, DENSE, {}, (5, 0), 16 * (2 * 128 + 64 + 128) * 2 * 1000),
        (DEEPSEEK_V2_LITE, DENSE, {}, (4, 57), 16 * (128 + 64) * 2 * 1000),
    ],
)
def test_what_the_next_token_needs(
    profile: ModelProfile, kind: LayerKind, fields: dict[str, Any], release: Release, size_bytes: int
) -> None:
    workload = Workload(images=0, **fields)
    assert next_token_bytes(kind, profile, workload, 1000, features=600, release=release) == size_bytes


def test_image_features_are_repeated_for_every_head_where_layers_read_them() -> None:
    """Llama 3.2 11B Vision, one image, 41 tokens of text: a later stage takes 149 MiB, on an H200 as in a trace."""
    profile = family("llama", 4096, 14336, 32, 8)
    images = ImageLoad(tokens=1, features=6404, sequences=4, patches=1601, patch=14)
    more, less = (
        layer_bytes(CROSS, profile, Workload(), seen, 41, release=None)
        for seen in (images, msgspec.structs.replace(images, features=0))
    )
    assert 148 < (more - less) / 2**20 < 153
    eager = Workload(attention="eager")
    scores = layer_bytes(CROSS, profile, eager, images, 41, release=None) - more
    # Of 41 tokens and all features; a mask of the prompt's own pairs is small beside.
    assert scores == pytest.approx(32 * 41 * 6404 * 10, rel=0.01)


def test_layers_of_a_mixture_are_told_by_their_size() -> None:
    text = msgspec.structs.replace(GLM_45V.text, cached_layers=("full", "linear", *["full"] * 38))
    first, *others = (unit for unit in llava_13b().units if unit.role == "layer")
    dense = msgspec.structs.replace(first, stored_bytes=first.stored_bytes // 3, layer=None)
    kinds = layer_kinds(msgspec.structs.replace(GLM_45V, text=text, units=(dense, *others)))
    names: dict[LayerCache, bool] = {kind.cache: kind.has_experts for kind in list(kinds.values())[:2]}
    assert names == {"full": False, "linear": True}
    assert list(kinds.values())[2] == EXPERTS
    assert set(layer_kinds(llava_13b()).values()) == {DENSE}
