from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_doctor.sources.layer_caches import layer_caches
from vlm_doctor.sources.model_shapes import Fields

LETTERS = {"full": "F", "sliding": "s", "chunked": "c", "linear": "l", "cross": "x", "none": "-"}


def caches(layers: int, window: int | None = None, model_type: str = "", **values: Any) -> str:
    found = layer_caches(Fields(values, model_type, ""), layers, window)
    return "".join(LETTERS[kind] for kind in found)


def test_layers_that_are_all_alike_need_no_list() -> None:
    assert caches(3) == ""
    assert caches(3, 8) == ""
    assert caches(2, None, layer_types=["full_attention", "full_attention"]) == ""
    assert caches(2, 8, layer_types=["sliding_attention", "sliding_attention"]) == ""


def test_what_the_file_names_counts() -> None:
    assert caches(3, 8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]) == "sFs"
    assert caches(3, 8, layer_types=["full_attention"] * 3) == "FFF"
    assert caches(4, None, layers_block_type=["mamba", "moe", "attention", "indexed_attention"]) == "l-FF"
    assert caches(4, None, hybrid_override_pattern="M-*E") == "l-F-"


def test_a_list_of_another_length_or_kind_does_not_count() -> None:
    assert caches(3, None, layer_types=["conv"]) == ""
    assert caches(3, None, layer_types=[1, 2, 3]) == ""
    assert caches(3, None, layer_types="conv") == ""
    assert caches(3, None, hybrid_override_pattern="M") == ""


def test_a_promise_of_countless_layers_costs_nothing() -> None:
    assert caches(2**31 - 1, 8, full_attention_interval=2) == ""


@pytest.mark.parametrize(
    ("model_type", "window", "values", "expected"),
    [
        ("gemma3_text", 8, {}, "sssssFs"),
        ("gemma3_text", 8, {"sliding_window_pattern": 3}, "ssFssFs"),
        ("gemma3_text", None, {}, ""),
        ("gemma2", 8, {}, "sFsFsFs"),
        ("qwen2", 8, {"max_window_layers": 5}, "FFFFFss"),
        ("qwen2", None, {"max_window_layers": 5}, ""),
        ("llama4_text", None, {}, "cccFccc"),
        ("qwen3_5_text", None, {}, "lllFlll"),
        ("", None, {"full_attention_interval": 2}, "lFlFlFl"),
        ("", None, {"cross_attention_layers": [1, 4, 99, "x"]}, "FxFFxFF"),
        ("gemma3n_text", 8, {"num_kv_shared_layers": 2}, "ssssF--"),
        ("", None, {"num_kv_shared_layers": 0}, ""),
    ],
)
def test_what_the_file_leaves_out_follows_the_class(
    model_type: str, window: int | None, values: dict[str, Any], expected: str
) -> None:
    assert caches(7, window, model_type, **values) == expected


WORDS = st.sampled_from(["M*-E", "M", "sliding_attention", "x"])
VALUES = st.none() | st.integers(-2, 9) | WORDS | st.lists(st.integers(-1, 9) | WORDS, max_size=8)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 8),
    st.none() | st.integers(1, 9),
    st.dictionaries(
        st.sampled_from(
            [
                *("layer_types", "layers_block_type", "hybrid_override_pattern", "cross_attention_layers"),
                *("num_kv_shared_layers", "full_attention_interval", "sliding_window_pattern", "max_window_layers"),
            ]
        ),
        VALUES,
    ),
)
def test_any_config_gives_one_word_a_layer_or_none(layers: int, window: int | None, values: dict[str, Any]) -> None:
    found = caches(layers, window, **values)
    assert len(found) in (0, layers)
    assert window is not None or "s" not in found


@pytest.mark.models
@pytest.mark.parametrize("family", ["gemma3", "gemma3n", "llama4", "qwen3_5", "aya_vision", "idefics2", "mllama"])
def test_the_installed_class_makes_the_same_of_its_default_config(family: str) -> None:
    import transformers

    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} does not know {family}")
    body = transformers.AutoConfig.for_model(family).get_text_config(decoder=True)
    kinds = getattr(body, "layer_types", None)
    window = getattr(body, "sliding_window", None)
    layers = body.num_hidden_layers
    values = {key: value for key, value in body.to_dict().items() if key not in ("layer_types", "model_type")}
    found = caches(layers, window, body.model_type, **values)
    if kinds is None:
        assert found.replace("x", "") == ("F" * found.count("F"))
        return
    words = {"full_attention": "F", "sliding_attention": "s", "chunked_attention": "c", "linear_attention": "l"}
    expected = [words[kind] for kind in kinds]
    shared = getattr(body, "num_kv_shared_layers", 0)
    expected[layers - shared :] = ["-"] * shared
    assert found == "".join(expected)
