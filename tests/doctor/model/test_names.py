"""The tables of names and defaults, held against the installed transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm_doctor.data.config_defaults import ARCHITECTURES, PARTS, SHAPES
from vlm_doctor.data.families import RENAMES
from vlm_doctor.errors import ModelFileError
from vlm_doctor.model import ModelProfile
from vlm_doctor.sources.checkpoint import StoredTensor
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.sources.module_names import by_module_name

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 11,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TEXT = {
    **TEXT,
    "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "mrope"},
    "tie_word_embeddings": False,
}
QWEN_TOWER: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "image_token_index": 95,
    },
    "llava_next": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "image_token_index": 95,
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER},
        "image_token_index": 95,
    },
    "qwen2_vl": {"text_config": QWEN_TEXT, "vision_config": {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 32}},
    "qwen2_5_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": {**QWEN_TOWER, "hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32},
    },
    "glm4v": {
        "text_config": {**TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {
            **QWEN_TOWER,
            "hidden_size": 32,
            "intermediate_size": 40,
            "out_hidden_size": 32,
            "image_size": 28,
        },
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {"model_type": "internvl_vision", **TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": 95,
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TEXT, "head_dim": 8},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER},
        "mm_tokens_per_image": 4,
        "image_token_index": 95,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma", **TEXT, "head_dim": 8},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, "projection_dim": 32},
        "projection_dim": 32,
        "image_token_index": 95,
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "idefics3_vision", **TOWER},
        "image_token_id": 95,
        "pad_token_id": 0,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "smolvlm_vision", **TOWER},
        "image_token_id": 95,
        "pad_token_id": 0,
    },
    "mllama": {
        "text_config": {
            "model_type": "mllama_text_model",
            **TEXT,
            "cross_attention_layers": [1, 10],
            "rope_scaling": {"rope_type": "default"},
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
        "image_token_index": 95,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 8, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        "vision_config": {
            **QWEN_TOWER,
            "hidden_size": 32,
            "intermediate_size": 40,
            "out_hidden_size": 32,
            "num_position_embeddings": 4,
            "deepstack_visual_indexes": [0],
        },
    },
}


def built(family: str, folder: Path) -> tuple[Any, ModelProfile]:
    """A tiny model with random weights, and the profile of what it saves."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    return model, load_profile(str(folder))


def owners(keys: list[str], name: str) -> list[str]:
    return [key for key in keys if name == key or name.startswith(f"{key}.")]


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_the_modules_of_the_installed_class(family: str, tmp_path: Path) -> None:
    model, profile = built(family, tmp_path)
    keys = [unit.key for unit in profile.units]
    parameters = dict(model.named_parameters())
    assert {name: owners(keys, name) for name in parameters if len(owners(keys, name)) != 1} == {}
    modules = {name for name, _ in model.named_modules()}
    assert [key for key in keys if key not in modules and key not in parameters] == []
    assert sum(unit.elements for unit in profile.units) == sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_each_unit_are_those_of_its_module(family: str, tmp_path: Path) -> None:
    model, profile = built(family, tmp_path)
    keys = [unit.key for unit in profile.units]
    expected = dict.fromkeys(keys, 0)
    for name, parameter in model.named_parameters():
        expected[owners(keys, name)[0]] += parameter.numel() * parameter.element_size()
    assert {unit.key: unit.stored_bytes for unit in profile.units} == expected


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_modules_with_position_buffers_are_named(family: str, tmp_path: Path) -> None:
    model, profile = built(family, tmp_path)
    keys = [unit.key for unit in profile.units]
    with_buffers = {name for name, module in model.named_modules() if any(True for _ in module.buffers(recurse=False))}
    # transformers 4.57 has one more in Gemma 3; its forward moves it to the input's device.
    assert {name for name in with_buffers if not owners(keys, name)} <= {"model.language_model.rotary_emb_local"}


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_config(family: str, tmp_path: Path) -> None:
    model, profile = built(family, tmp_path)
    text = model.config.get_text_config()
    assert (profile.text.layers, profile.text.hidden, profile.text.vocabulary) == (11, 32, 96)
    assert profile.text.heads == text.num_attention_heads
    assert profile.text.kv_heads == text.num_key_value_heads
    assert profile.text.head_dim == (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    assert profile.vision is not None
    assert profile.vision.layers == 2
    assert profile.image is not None
    assert profile.notes == ()
    assert profile.architecture == type(model).__name__
    assert not profile.is_remote_code


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_is_named_beside_its_embedding(family: str, tmp_path: Path) -> None:
    model, profile = built(family, tmp_path)
    head = next(unit for unit in profile.units if unit.role == "head")
    embedding = next(unit for unit in profile.units if unit.role == "embedding")
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (head.stored_bytes == 0) is is_tied
    assert profile.tied == (((embedding.key, head.key),) if is_tied else ())


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_are_new_already_stay(family: str) -> None:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    tensors = {name: StoredTensor("F32", tuple(tensor.shape), 0) for name, tensor in model.named_parameters()}
    assert by_module_name(tensors, RENAMES.get(family, ())) == tensors


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_of_classes_and_defaults_agree(family: str) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(family)
    architecture = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__
    assert ARCHITECTURES[family] == architecture
    for part, model_type in PARTS[family].items():
        nested = getattr(config, part)
        assert nested.model_type in (model_type, family, f"{family}_vision")
        known = {key: value for key, value in SHAPES[model_type].items() if getattr(type(nested), key, None) is not None}
        assert {key: getattr(type(nested), key) for key in known if isinstance(getattr(type(nested), key), int)} == {
            key: value for key, value in known.items() if isinstance(getattr(type(nested), key), int)
        }


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("qwen2_vl", "visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
        ("qwen2_5_vl", "model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
        ("qwen2_5_vl", "model.language_model.layers.1.x", "model.language_model.layers.1.x"),
        ("qwen2_5_vl", "lm_head.weight", "lm_head.weight"),
        ("qwen2_5_vl", "models.x", "models.x"),
        ("llava", "language_model.model.layers.10.x", "model.language_model.layers.10.x"),
        ("llava", "language_model.lm_head.weight", "lm_head.weight"),
        ("llava", "multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("llava_next", "image_newline", "model.image_newline"),
        ("llava", "language_model_x.y", "language_model_x.y"),
        ("mllama", "vision_model.class_embedding", "model.vision_model.class_embedding"),
        ("glm4v", "model.visual.downsample.weight", "model.visual.downsample.weight"),
        ("unheard_of", "visual.x", "visual.x"),
    ],
)
def test_names_of_checkpoints_become_names_of_modules(family: str, old: str, new: str) -> None:
    tensor = StoredTensor("F32", (1,), 4)
    assert by_module_name({old: tensor}, RENAMES.get(family, ())) == {new: tensor}


def test_two_names_for_one_parameter_are_refused() -> None:
    tensor = StoredTensor("F32", (1,), 4)
    with pytest.raises(ModelFileError) as raised:
        by_module_name({"visual.x": tensor, "model.visual.x": tensor}, RENAMES["qwen2_vl"])
    assert str(raised.value) == (
        "tensor 'model.visual.x' is stored under its old and its new name; save the checkpoint again."
    )
