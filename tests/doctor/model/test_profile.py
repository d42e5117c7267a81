from __future__ import annotations

import ast
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vlm_doctor
from vlm_doctor import Policy, Workload, load_machine
from vlm_doctor.errors import ModelError, UsageError
from vlm_doctor.model import ModelProfile
from vlm_doctor.placement import Plan
from vlm_doctor.planner.planning import sketch
from vlm_doctor.sources.catalogue import catalogue, find_entry
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.sources.model_profile import build_profile

PURE = (
    "checkpoint",
    "image_bounds",
    "image_files",
    "image_rule",
    "layer_caches",
    "model_profile",
    "model_shapes",
    "model_units",
    "quantized_tensors",
    "module_names",
    "shapes_from_tensors",
    "tensor_pickle",
    "tower_parts",
    "linear_layers",
    "unit_contents",
    "weightless_units",
)

TEXT: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
VISION: dict[str, Any] = {
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 14,
}
NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.vision_tower.blocks.0.norm.weight")


def profile(config: dict[str, Any], shapes: dict[str, tuple[int, ...]] | None = None, dtype: str = "BF16") -> ModelProfile:
    tensors = {
        name: StoredTensor(dtype, shape, 16) for name, shape in {**dict.fromkeys(NAMES, (8,)), **(shapes or {})}.items()
    }
    return build_profile(
        Checkpoint({"architectures": ["NewVlm"], "model_type": "new", **config}, tensors), name="x", origin="checkpoint"
    )


def text(**changes: Any) -> Any:
    return profile({"text_config": {**TEXT, **changes}}).text


@pytest.mark.parametrize("module", PURE)
def test_the_description_of_a_model_is_made_without_touching_the_world(module: str) -> None:
    tree = ast.parse((Path(vlm_doctor.__file__).parent / "sources" / f"{module}.py").read_text(encoding="utf-8"))
    imported = {
        name.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    imported |= {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
    }
    assert imported <= {
        "__future__",
        "collections",
        "functools",
        "itertools",
        "math",
        "pickletools",
        "re",
        "typing",
        "warnings",
        "msgspec",
    }


@pytest.mark.parametrize("part", ["text_config", "llm_config", "language_config", None])
def test_the_text_body_is_found_under_each_name(part: str | None) -> None:
    found = profile({part: TEXT} if part else TEXT).text
    assert (found.layers, found.hidden, found.intermediate, found.heads, found.vocabulary) == (1, 8, 16, 2, 32)


def test_the_spelling_of_chatglm_is_understood() -> None:
    config = {
        "num_layers": 1,
        "hidden_size": 8,
        "ffn_hidden_size": 20,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 3,
        "padded_vocab_size": 40,
        "seq_length": 99,
    }
    found = profile(config).text
    assert (found.intermediate, found.kv_heads, found.head_dim, found.vocabulary, found.max_positions) == (20, 2, 3, 40, 99)
    assert profile({**config, "multi_query_attention": False}).text.kv_heads == 4


def test_a_whole_float_is_a_number() -> None:
    assert text(hidden_size=8.0).hidden == 8


@pytest.mark.parametrize(("ratio", "expected"), [(2, 8), (2.67, 10), (None, 16), ("x", 16), (-1, 16), (float("nan"), 16)])
def test_the_width_of_a_tower_may_be_a_ratio(ratio: Any, expected: int) -> None:
    vision = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    shape = profile({**TEXT, "vision_config": {**vision, "mlp_ratio": ratio}}).vision
    assert shape is not None
    assert shape.intermediate == expected


def test_heads_of_keys_default_to_all_heads() -> None:
    assert (text().kv_heads, text().head_dim) == (2, 4)
    assert text(num_key_value_heads=1, head_dim=6).kv_heads == 1


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("k_proj", 4, 1),
        ("k_proj", 5, 2),
        ("language_expert_query_key_value", 16, 1),
        ("qkv_proj", 24, 2),
        ("qkv_proj", 23, 2),
        ("wqkv", 8, 2),
    ],
)
def test_heads_of_keys_are_read_from_the_projection(name: str, rows: int, expected: int) -> None:
    key = f"model.layers.0.self_attn.{name}.weight"
    found = profile({"text_config": TEXT}, {key: (rows, 8)})
    assert found.text.kv_heads == expected


def test_packed_projections_say_nothing_about_heads() -> None:
    key = "model.layers.0.self_attn.k_proj.weight"
    assert profile({"text_config": TEXT}, {key: (4, 8)}, dtype="U8").text.kv_heads == 2


def test_heads_of_full_attention_may_be_others() -> None:
    """Gemma 4's two ways to say it, and the norm of its queries, which says it always."""
    kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
    config = {"text_config": {**TEXT, **kinds, "head_dim": 4, "num_key_value_heads": 2}}

    def full(tensors: dict[str, tuple[int, ...]] | None = None, dtype: str = "BF16", **fields: Any) -> tuple[int, int]:
        asked = {"text_config": {**config["text_config"], **fields}}
        found = profile(asked, {"model.layers.1.mlp.up_proj.weight": (16, 8), **(tensors or {})}, dtype=dtype).text
        return found.full_kv_heads, found.full_head_dim

    norm, keys = "model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.k_proj.weight"
    assert full() == (0, 0)
    assert full({norm: (4,), keys: (8, 8)}) == (0, 0)
    assert full({norm: (8,), keys: (8, 8)}) == (1, 8)
    assert full({norm: (8,), norm.replace("1", "0"): (8,), keys: (8, 8)}) == (0, 0), "over both heads, as OLMo's"
    assert full({norm: (8,), norm.replace("1", "0"): (4,), keys: (8, 8)}) == (1, 8)
    assert full({norm: (8,)}) == (2, 8)
    assert full(global_head_dim=8) == (2, 8)
    assert full(global_head_dim=8, num_global_key_value_heads=1) == (2, 8)
    assert full(global_head_dim=8, num_global_key_value_heads=1, attention_k_eq_v=True) == (1, 8)
    assert full({norm: (8,), keys: (4, 8)}, dtype="U8", num_global_key_value_heads=1, attention_k_eq_v=True) == (1, 8)
    assert full(layer_types=["full_attention"] * 2, global_head_dim=8) == (0, 0)


def test_layers_that_share_keys_may_have_wide_mlps_and_embeddings_of_their_own() -> None:
    assert text(use_double_wide_mlp=True, num_kv_shared_layers=1).intermediate == 32
    assert text(use_double_wide_mlp=True, num_kv_shared_layers=0).intermediate == 16
    assert text(hidden_size_per_layer_input=256).layer_input == 256
    assert text(hidden_size_per_layer_input=0).layer_input == text().layer_input == 0


def test_a_sliding_window_counts_only_when_it_is_used() -> None:
    assert text(sliding_window=1024).sliding_window == 1024
    assert text(sliding_window=1024, use_sliding_window=True).sliding_window == 1024
    assert text(sliding_window=1024, use_sliding_window=False).sliding_window is None
    assert text(model_type="mistral").sliding_window == 4096
    assert text(model_type="mistral", sliding_window=None).sliding_window is None
    assert text(model_type="mistral").sliding_window == 4096
    assert text(model_type="mistral", sliding_window=None).sliding_window is None


def test_a_mixture_of_experts_is_as_wide_as_what_a_token_passes() -> None:
    assert text(num_experts_per_tok=2, moe_intermediate_size=10).intermediate == 20
    assert text(num_experts_per_tok=2, moe_intermediate_size=10, n_shared_experts=1).intermediate == 30
    assert text(num_experts_per_tok=2, moe_intermediate_size=10, shared_expert_intermediate_size=7).intermediate == 27
    assert text(num_experts_per_tok=2).intermediate == 32
    assert text(num_experts_per_tok=1, moe_intermediate_size=3).intermediate == 16


def test_latent_attention_is_counted_expanded() -> None:
    found = text(kv_lora_rank=4, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=6)
    assert (found.kv_heads, found.head_dim) == (2, 7)
    parts = (found.kv_lora_rank, found.qk_nope_head_dim, found.qk_rope_head_dim, found.v_head_dim)
    assert parts == (4, 6, 2, 6)
    assert text(v_head_dim=6).v_head_dim is None


def test_kinds_of_layers_are_read() -> None:
    kinds = ["linear_attention"]
    assert text(layer_types=kinds).cached_layers == ("linear",)
    assert text(attention_chunk_size=64).attention_chunk == 64
    assert text().cached_layers == ()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "auto"}, "bfloat16"),
        ({"torch_dtype": 7}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_the_main_type_is_the_configs_or_the_stored_one(config: dict[str, Any], expected: str) -> None:
    assert profile({**TEXT, **config}).dtype == expected


def test_a_checkpoint_of_integers_is_assumed_to_compute_in_bfloat16() -> None:
    assert profile(TEXT, dtype="U8").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("section", "expected"),
    [({"quant_method": "awq"}, "awq"), ({}, None), ({"quant_method": 4}, "unknown"), (None, None)],
)
def test_a_quantized_checkpoint_names_its_method(section: Any, expected: str | None) -> None:
    assert profile({**TEXT, "quantization_config": section}).quantization == expected


@pytest.mark.parametrize(
    ("config", "is_remote"),
    [
        ({}, False),
        ({"auto_map": {"AutoModel": "m.M"}}, True),
        ({"auto_map": {}}, False),
        (
            {"auto_map": {"AutoModel": "m.M"}, "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
            False,
        ),
        ({"auto_map": {"AutoModel": "m.M"}, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, True),
    ],
)
def test_remote_code_is_what_the_checkpoint_brings_itself(config: dict[str, Any], is_remote: bool) -> None:
    assert profile({**TEXT, **config}).is_remote_code is is_remote


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("InternVLChatModel", True),
        ("MiniCPMV", True),
        ("MiniCPMO", True),
        ("DeepseekVLV2ForCausalLM", True),
        ("NewVlm", False),
    ],
)
def test_classes_that_generate_inside_are_known(architecture: str, expected: bool) -> None:
    assert (
        profile({**TEXT, "architectures": [architecture], "auto_map": {"AutoModel": "m.M"}}).runs_inner_generate is expected
    )


def test_an_unknown_family_with_a_square_image_is_taken_as_fixed() -> None:
    found = profile({**TEXT, "vision_config": {**VISION, "image_size": 28}})
    assert found.image is not None
    assert (found.image.kind, found.image.size, found.image.patch, found.image.merge) == ("fixed", 28, 14, 1)
    assert found.notes == ("How new turns images into tokens is assumed: each is resized to 28 x 28 pixels.",)


@pytest.mark.parametrize("changes", [{}, {"image_size": 7}])
def test_an_unknown_family_without_an_image_size_counts_no_image_tokens(changes: dict[str, Any]) -> None:
    found = profile({**TEXT, "vision_config": {**VISION, **changes}})
    assert found.image is None
    assert found.notes == ("How new turns images into tokens is unknown: image tokens are not counted.",)


def test_a_tower_without_dimensions_is_noted() -> None:
    for config in (TEXT, {**TEXT, "vision_config": {"hidden_size": 4}}):
        found = profile(config)
        assert (found.vision, found.image) == (None, None)
        assert found.notes == (
            "config.json does not give the dimensions of the vision tower: its working memory is not counted.",
        )


def test_a_tower_that_is_priced_by_the_pixel_has_no_need_of_dimensions() -> None:
    assert "working memory" not in " ".join(profile({**TEXT, "model_type": "chameleon"}).notes)


def test_a_model_without_a_tower_is_noted() -> None:
    tensors = {name: StoredTensor("BF16", (8,), 16) for name in NAMES[:2]}
    found = build_profile(
        Checkpoint({"architectures": ["A"], "model_type": "new", **TEXT}, tensors), name="x", origin="checkpoint"
    )
    assert found.notes == ("No vision tower was recognized in the names of the tensors.",)


@pytest.mark.parametrize(
    ("family", "root", "vision", "size", "merge", "kind"),
    [
        ("gemma3", {"mm_tokens_per_image": 256}, {"image_size": 896}, 896, 1, "fixed"),
        ("idefics3", {"scale_factor": 2}, {"image_size": 364}, 364, 2, "tiles"),
        ("idefics3", {"scale_factor": 2000}, {"image_size": 364}, 364, 2, "tiles"),
        ("internvl_chat", {"downsample_ratio": 0.5}, {"image_size": 448}, 448, 2, "tiles"),
        ("internvl_chat", {"downsample_ratio": 0.5, "force_image_size": 224}, {"image_size": 448}, 224, 2, "tiles"),
        ("qwen2_vl", {}, {"spatial_merge_size": 3, "depth": 2, "num_heads": 2}, 1008, 3, "merge"),
        ("paligemma", {}, {"image_size": 224}, 224, 1, "fixed"),
    ],
)
def test_families_cut_images_in_their_own_way(
    family: str, root: dict[str, Any], vision: dict[str, Any], size: int, merge: int, kind: str
) -> None:
    rule = profile({**TEXT, **root, "model_type": family, "vision_config": {**VISION, **vision}}).image
    assert rule is not None
    assert (rule.size, rule.merge, rule.kind) == (size, merge, kind)


def test_a_large_sharded_checkpoint_is_described_at_once(write_checkpoint: Callable[..., Path]) -> None:
    entry = find_entry("Qwen2.5-VL-72B-Instruct")
    assert entry is not None
    checkpoint = entry.checkpoint()
    tensors = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in checkpoint.tensors.items()}
    folder = str(write_checkpoint(dict(entry.config), tensors, shards=31))
    durations_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        found = load_profile(folder)
        durations_s.append(time.perf_counter() - start_s)
    assert (len(tensors), len(found.files), found.stored_bytes) == (1353, 31, 146_821_554_688)
    # About 25 ms; the bound leaves room for coverage and busy machines.
    assert min(durations_s) < 0.5


HEAVY = ("torch", "transformers", "huggingface_hub", "safetensors", "numpy", "urllib.request")


def test_no_heavy_library_is_imported() -> None:
    code = (
        "import sys; from vlm_doctor.sources.model_files import load_profile;"
        "load_profile('llava-1.5-7b', allow_network=False);"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        *("architectures", "model_type", "auto_map", "torch_dtype", "dtype", "quantization_config", "tie_word_embeddings"),
        *(
            "text_config",
            "llm_config",
            "vision_config",
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "head_dim",
            "kv_lora_rank",
        ),
        *(
            "mm_tokens_per_image",
            "downsample_ratio",
            "scale_factor",
            "num_experts_per_tok",
            "sliding_window",
            "force_image_size",
        ),
        *("image_size", "patch_size", "mlp_ratio", "num_heads", "depth", "spatial_merge_size", "num_attention_heads"),
    ]
)
FAMILIES = st.sampled_from(["llava", "internvl", "qwen2_vl", "gemma3", "glm4v", "chatglm", "idefics3", "unheard_of"])


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=200, deadline=20_000
)
@given(
    st.dictionaries(KEYS, JSON, max_size=5),
    st.dictionaries(KEYS, JSON, max_size=3),
    st.sampled_from(["", "text_config", "vision_config"]),
    FAMILIES,
)
def test_any_config_gives_a_profile_or_a_model_error(
    llava_config: dict[str, Any], changes: dict[str, Any], nested: dict[str, Any], part: str, family: str
) -> None:
    config = json.loads(json.dumps(llava_config))
    config["model_type"] = family
    config.update(changes)
    target = config.get(part) if part else config
    if isinstance(target, dict):
        target.update(nested)
    tensors = {
        "language_model.model.embed_tokens.weight": StoredTensor("F16", (32, 8), 512),
        "vision_tower.layers.0.fc1.weight": StoredTensor("F16", (6, 4), 48),
        **{f"language_model.model.layers.{layer}.k_proj.weight": StoredTensor("F16", (8, 8), 128) for layer in range(12)},
    }
    with contextlib.suppress(ModelError):
        found = build_profile(Checkpoint(config, tensors), name="x", origin="checkpoint")
        assert found.stored_bytes == 512 + 48 + 12 * 128


HOSTILE: tuple[Any, ...] = (None, "x", "8", [], {}, [1, 2], -1, 0, 1.5, 10**30, float("nan"), float("inf"), True, 2**31)


def paths(value: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where something stands in a config; lists are taken whole."""
    inner = [path for key, part in value.items() for path in paths(part, (*at, key))] if isinstance(value, dict) else []
    return [*([at] if at else []), *inner]


def planned(name: str, path: tuple[str, ...], value: Any) -> Plan | None:
    """A plan for a model of the catalogue in whose config something else stands; ``None`` where that is refused."""
    checkpoint = catalogue()[name].checkpoint()
    config = json.loads(json.dumps(dict(checkpoint.config)))
    *parents, last = path
    target = config
    for key in parents:
        target = target[key]
    target[last] = value
    with contextlib.suppress(ModelError, UsageError):
        found = build_profile(checkpoint._replace(config=config), name="x", origin="checkpoint")
        return sketch(found, load_machine("2xL4"), Workload(), Policy())
    return None


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=100, deadline=20_000)
@given(st.data())
def test_any_value_in_a_published_config_gives_a_plan_or_a_sentence(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(catalogue())))
    path = data.draw(st.sampled_from(paths(dict(catalogue()[name].config))))
    planned(name, path, data.draw(st.sampled_from(HOSTILE)))


@pytest.mark.parametrize("name", ["zai-org/GLM-4.1V-9B-Thinking", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_without_the_dimensions_of_the_tower_its_allocations_are_not_replayed(name: str) -> None:
    made = planned(name, ("vision_config", "depth"), None)
    assert made is not None
    assert any("dimensions of the vision tower" in note for note in made.notes), made.notes


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=200, deadline=20_000
)
@given(st.data())
def test_any_damage_to_a_file_gives_a_profile_or_a_model_error(
    write_checkpoint: Callable[..., Path], data: st.DataObject
) -> None:
    folder = write_checkpoint(shards=2)
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), 3000) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    (folder / name).write_bytes(content)
    with contextlib.suppress(ModelError):
        load_profile(str(folder), allow_network=False)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=200, deadline=20_000
)
@given(st.text(max_size=60))
def test_any_name_gives_a_profile_or_a_model_error(name: str) -> None:
    with contextlib.suppress(ModelError):
        load_profile(name, allow_network=False)


def test_more_parts_than_any_model_has_are_refused() -> None:
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.{number}.mlp.up_proj.weight": (1, 1) for number in range(2_001)}

    with pytest.raises(ModelError, match="its tensors are named like 2,003 parts of a model"):
        profile({"text_config": TEXT}, shapes)


@pytest.mark.parametrize(("layers", "taken"), [(-2, 1), ([-2], 1), ([], 1), ([-24, -20, -12, -1], 4)])
def test_blocks_of_the_tower_that_give_features_are_counted(llava_config: dict[str, Any], layers: Any, taken: int) -> None:
    config = {**llava_config, "vision_feature_layer": layers}
    tensors = {
        "language_model.model.embed_tokens.weight": StoredTensor("F16", (32, 8), 512),
        "vision_tower.layers.0.fc1.weight": StoredTensor("F16", (6, 4), 48),
        **{f"language_model.model.layers.{layer}.k_proj.weight": StoredTensor("F16", (8, 8), 128) for layer in range(12)},
    }
    vision = build_profile(Checkpoint(config, tensors), name="x", origin="checkpoint").vision
    assert vision is not None
    assert vision.taken == taken
