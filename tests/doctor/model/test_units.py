from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.data.families import FamilyRules
from vlm_doctor.model import LinearWeights, Role
from vlm_doctor.sources.checkpoint import StoredTensor
from vlm_doctor.sources.model_units import Cut, cut_into_units
from vlm_doctor.sources.weightless_units import complete_units


def cut(*names: str) -> Cut:
    return cut_into_units({name: StoredTensor("BF16", (2, 3), 12) for name in names})


def roles(*names: str) -> dict[str, str]:
    return {unit.key: unit.role for unit in cut(*names).units}


def test_layers_are_told_apart_by_whole_components() -> None:
    found = cut(*(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(12)))
    assert [unit.key for unit in found.units] == [f"model.layers.{layer}" for layer in range(12)]
    assert [unit.layer for unit in found.units] == list(range(12))
    assert {unit.stored_bytes for unit in found.units} == {12}


@pytest.mark.parametrize(
    ("name", "key", "role"),
    [
        ("model.visual.merger.mlp.0.weight", "model.visual", "vision"),
        ("model.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", "model.vision_tower", "vision"),
        ("vpm.encoder.layers.0.mlp.fc1.weight", "vpm", "vision"),
        ("model.vision.boi", "model.vision", "vision"),
        ("model.multi_modal_projector.vision_proj.weight", "model.multi_modal_projector", "projector"),
        ("model.image_newline", "model.image_newline", "projector"),
        ("query_tokens", "query_tokens", "projector"),
        ("qformer.encoder.layer.0.output.dense.weight", "qformer", "projector"),
        ("mlp1.0.weight", "mlp1", "projector"),
        ("resampler.kv_proj.weight", "resampler", "projector"),
        ("model.audio_tower.layers.0.fc1.weight", "model.audio_tower", "other"),
        ("model.embed_tokens.weight", "model.embed_tokens", "embedding"),
        ("model.layers.7.mlp.vision_mlp.up_proj.weight", "model.layers.7", "layer"),
        ("model.layers.7.self_attn.rotary_emb.inv_freq", "model.layers.7", "layer"),
        ("model.norm.weight", "model.norm", "norm"),
        ("model.ln_f.weight", "model.ln_f", "norm"),
        ("model.embeddings.weight", "model.embeddings", "embedding"),
        ("lm_head.weight", "lm_head", "head"),
        ("model.position_bias", "model.position_bias", "other"),
        ("alpha", "alpha", "other"),
    ],
)
def test_parts_are_recognized_by_their_names(name: str, key: str, role: Role) -> None:
    found = roles(name, "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "model.layers.2.mlp.weight")
    assert found[key] == role


def test_units_stand_in_execution_order() -> None:
    found = cut(
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.w",
        "model.layers.0.w",
        "model.embed_tokens.weight",
        "a",
        "mlp1.w",
        "vit.w",
    )
    assert [unit.role for unit in found.units] == [
        "vision",
        "projector",
        "other",
        "embedding",
        "layer",
        "layer",
        "norm",
        "head",
    ]
    assert [unit.layer for unit in found.units if unit.role == "layer"] == [0, 1]


def test_a_stack_of_another_name_is_still_found() -> None:
    assert roles("decoder.cells.0.w", "decoder.cells.1.w") == {"decoder.cells.0": "layer", "decoder.cells.1": "layer"}


def test_the_larger_of_two_stacks_holds_the_text() -> None:
    found = cut("encoder.layers.0.w", *(f"decoder.layers.{layer}.w" for layer in range(3)))
    assert found.body == "decoder"
    assert [unit.key for unit in found.units] == ["encoder", "decoder.layers.0", "decoder.layers.1", "decoder.layers.2"]


def test_what_is_left_over_becomes_whole_modules() -> None:
    assert roles("model.layers.0.w", "model.extra.a.weight", "model.extra.b.weight", "model.scale") == {
        "model.layers.0": "layer",
        "model.extra": "other",
        "model.scale": "other",
    }


def test_a_unit_swallows_what_lies_below_it() -> None:
    assert roles("lm_head.weight", "lm_head.layers.0.w") == {"lm_head": "head"}
    assert roles("a", "a.b", "a.b.c") == {"a": "other"}


def test_only_linear_weights_are_quantizable() -> None:
    found = cut_into_units(
        {
            "model.layers.0.up_proj.weight": StoredTensor("BF16", (4, 2), 16),
            "model.layers.0.up_proj.bias": StoredTensor("BF16", (4,), 8),
            "model.layers.0.packed.weight": StoredTensor("U8", (4, 2), 8),
            "model.layers.0.norm.weight": StoredTensor("F32", (2,), 8),
            "model.vision.position_embedding.weight": StoredTensor("BF16", (9, 2), 36),
            "model.embed_tokens.weight": StoredTensor("BF16", (5, 2), 20),
            "lm_head.weight": StoredTensor("BF16", (5, 2), 20),
        }
    )
    assert {unit.key: unit.linear.elements for unit in found.units} == {
        "model.vision": 0,
        "model.embed_tokens": 0,
        "model.layers.0": 8,
        "lm_head": 0,
    }
    layer = next(unit for unit in found.units if unit.role == "layer")
    assert layer.parameters == {"BF16": 12, "U8": 8, "F32": 2}
    assert (layer.stored_bytes, layer.largest_tensor_elements, layer.elements) == (40, 8, 22)


def test_what_bitsandbytes_leaves_alone_is_known_by_names_and_shapes() -> None:
    stem = "model.layers.0."
    found = cut_into_units(
        {
            f"{stem}q_proj.weight": StoredTensor("BF16", (4, 2), 16),
            f"{stem}mlp.gate.weight": StoredTensor("BF16", (3, 2), 12),
            f"{stem}mlp.experts.0.up_proj.weight": StoredTensor("BF16", (5, 2), 20),
            f"{stem}mlp.experts.1.up_proj.weight": StoredTensor("BF16", (6, 2), 24),
            f"{stem}mlp.experts.up_proj": StoredTensor("BF16", (2, 5, 2), 40),
            f"{stem}relative_attention_bias.weight": StoredTensor("BF16", (7, 2), 28),
            f"{stem}q_norm.weight": StoredTensor("BF16", (2, 2), 8),
            "vision.attention.in_proj_weight": StoredTensor("BF16", (6, 2), 24),
            "vision.attention.out_proj.weight": StoredTensor("BF16", (2, 2), 8),
            "vision.patch_embed.weight": StoredTensor("BF16", (2, 12), 48),
            "lm_head.dense.weight": StoredTensor("BF16", (2, 2), 8),
            "lm_head.decoder.weight": StoredTensor("BF16", (9, 2), 36),
            "weight": StoredTensor("BF16", (2, 2), 8),
        },
        FamilyRules(unquantized=("q_proj",)),
    )
    linear = {unit.key: unit.linear for unit in found.units}
    layer = next(unit for unit in found.units if unit.role == "layer")
    assert linear["model.layers.0"] == LinearWeights()
    assert layer.expert_linear == LinearWeights(elements=22, rows=11, tensors=2, largest=12)
    assert linear["vision"] == LinearWeights(24, 2, 1, 24)
    assert linear["lm_head"] == LinearWeights(4, 2, 1, 4)
    assert linear["weight"].elements == 4


def test_a_family_s_exceptions_outdo_what_a_tensor_looks_like() -> None:
    tensors = {
        "model.layers.0.attn.in_proj_weight": StoredTensor("BF16", (6, 2), 24),
        "model.layers.0.attn.out_proj.weight": StoredTensor("BF16", (2, 2), 8),
        "model.layers.0.attn.out_proj.bias": StoredTensor("BF16", (2,), 4),
        "model.layers.0.packed.in_proj_weight": StoredTensor("U8", (6, 2), 12),
        "model.layers.0.scalar.in_proj_weight": StoredTensor("BF16", (), 2),
    }
    plain, ruled = (
        cut_into_units(tensors, rules).units[0].linear
        for rules in (FamilyRules(), FamilyRules(quantized=("in_proj_weight", "out_proj")))
    )
    assert plain == LinearWeights()
    assert ruled == LinearWeights(elements=16, rows=8, tensors=2, largest=12)


@pytest.mark.parametrize(
    ("layers", "head"),
    [
        ("model.layers", "lm_head"),
        ("model.language_model.layers", "lm_head"),
        ("llm.model.layers", "llm.lm_head"),
        ("language_model.model.decoder.layers", "language_model.lm_head"),
        ("transformer.h", "lm_head"),
    ],
)
def test_a_head_that_is_not_stored_is_tied_and_named(layers: str, head: str) -> None:
    table = layers.rpartition(".")[0] + ".embed_tokens"
    done = complete_units(cut(f"{table}.weight", f"{layers}.0.w"), body_type="x", ties_embeddings=None)
    assert done.tied == ((table, head),)
    assert done.units[-1].key == head
    assert (done.units[-1].role, done.units[-1].stored_bytes, done.units[-1].parameters) == ("head", 0, {})


def test_a_head_is_not_made_up_where_no_class_has_one() -> None:
    done = complete_units(cut("bert.embed_tokens.w", "bert.encoder.layer.0.w"), body_type="x", ties_embeddings=True)
    assert done.tied == ()
    assert [unit.role for unit in done.units] == ["embedding", "layer"]


@pytest.mark.parametrize(("flag", "tied"), [(True, (("model.embed_tokens", "lm_head"),)), (False, ()), (None, ())])
def test_a_stored_head_is_tied_only_when_the_config_says_so(flag: bool | None, tied: tuple[tuple[str, str], ...]) -> None:
    stored = cut("model.embed_tokens.weight", "model.layers.0.w", "lm_head.weight")
    done = complete_units(stored, body_type="x", ties_embeddings=flag)
    assert done.tied == tied
    assert sum(unit.stored_bytes for unit in done.units) == 36


def test_position_buffers_are_named_before_the_layers() -> None:
    stored = cut("model.language_model.embed_tokens.weight", "model.language_model.layers.0.w", "lm_head.weight")
    done = complete_units(stored, body_type="qwen2_5_vl_text", ties_embeddings=False)
    assert [unit.key for unit in done.units][1] == "model.language_model.rotary_emb"


@pytest.mark.parametrize("body_type", ["opt", "unheard_of"])
def test_position_buffers_are_not_made_up(body_type: str) -> None:
    done = complete_units(cut("model.embed_tokens.weight", "model.layers.0.w"), body_type=body_type, ties_embeddings=None)
    assert "model.rotary_emb" not in {unit.key for unit in done.units}


def test_position_buffers_that_are_stored_are_named_once() -> None:
    stored = cut("transformer.rotary_pos_emb.inv_freq", "transformer.encoder.layers.0.w")
    done = complete_units(stored, body_type="chatglm", ties_embeddings=False, rotary=("transformer.rotary_pos_emb",))
    assert [unit.key for unit in done.units] == ["transformer.rotary_pos_emb", "transformer.encoder.layers.0"]
    assert done.units[0].stored_bytes == 12


COMPONENTS = st.sampled_from(
    [
        "model",
        "layers",
        "visual",
        "vision_tower",
        "lm_head",
        "norm",
        "embed_tokens",
        "proj",
        "0",
        "1",
        "10",
        "weight",
        "x",
        "audio",
        "9999999",
    ]
)
PARAMETERS = st.lists(COMPONENTS, min_size=1, max_size=5).map(".".join)
TENSORS = st.dictionaries(
    PARAMETERS,
    st.builds(
        lambda dtype, shape: StoredTensor(
            dtype, tuple(shape), (4 if dtype == "F32" else 2) * StoredTensor(dtype, tuple(shape), 0).elements
        ),
        st.sampled_from(["F32", "BF16"]),
        st.lists(st.integers(0, 5), max_size=3),
    ),
    min_size=1,
    max_size=30,
)


@given(TENSORS)
def test_every_tensor_belongs_to_exactly_one_unit(tensors: dict[str, StoredTensor]) -> None:
    found = cut_into_units(tensors)
    keys = [unit.key for unit in found.units]
    for name in tensors:
        assert sum(name == key or name.startswith(f"{key}.") for key in keys) == 1
    assert sum(unit.stored_bytes for unit in found.units) == sum(tensor.stored_bytes for tensor in tensors.values())
    assert sum(unit.elements for unit in found.units) == sum(tensor.elements for tensor in tensors.values())


@given(
    TENSORS,
    st.sampled_from([None, (), ("transformer.rotary_pos_emb", "model.x")]),
    st.sampled_from(["llama", "opt", "x"]),
    st.sampled_from([True, False, None]),
)
def test_no_key_is_the_parent_of_another(
    tensors: dict[str, StoredTensor], rotary: tuple[str, ...] | None, body_type: str, flag: bool | None
) -> None:
    done = complete_units(cut_into_units(tensors), body_type=body_type, ties_embeddings=flag, rotary=rotary)
    keys = [unit.key for unit in done.units]
    assert len(keys) == len(set(keys))
    assert not [(a, b) for a in keys for b in keys if b.startswith(f"{a}.")]
    assert all(key in keys for group in done.tied for key in group)
    assert sum(unit.stored_bytes for unit in done.units) == sum(tensor.stored_bytes for tensor in tensors.values())
