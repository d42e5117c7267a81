"""ERNIE 4.5 VL: the names that its checkpoint has, with two sets of experts in a layer, against the installed class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm_doctor.model import ModelProfile
from vlm_doctor.sources.model_files import load_profile

pytestmark = pytest.mark.models

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "moe_intermediate_size": [16, 8],
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "patch_size": 14}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelProfile, set[str]]:
    """A tiny model, the profile of what it saves, and the names in the file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors import safe_open

    if "ernie4_5_vl_moe" not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no ERNIE 4.5 VL")
    config = transformers.AutoConfig.for_model("ernie4_5_vl_moe", text_config=TEXT, vision_config=TOWER)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    folder: Path = tmp_path_factory.mktemp("ernie")
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    return model, load_profile(str(folder)), names


def test_the_file_has_the_names_of_the_published_checkpoint(saved: tuple[Any, ModelProfile, set[str]]) -> None:
    _, _, names = saved
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.experts.7.down_proj.weight", "model.norm.weight"} <= names
    assert any(name.startswith(("vision_model.", "model.vision_model.")) for name in names)


def test_every_parameter_is_in_one_unit_with_its_bytes(saved: tuple[Any, ModelProfile, set[str]]) -> None:
    model, profile, _ = saved
    expected = {unit.key: 0 for unit in profile.units}
    for name, parameter in model.named_parameters():
        (key,) = [key for key in expected if name == key or name.startswith(f"{key}.")]
        expected[key] += parameter.numel() * parameter.element_size()
    assert {unit.key: unit.stored_bytes for unit in profile.units} == expected
    modules = {name for name, _ in model.named_modules()}
    assert [unit.key for unit in profile.units if unit.key not in modules] == []


def test_roles_and_the_larger_set_of_experts(saved: tuple[Any, ModelProfile, set[str]]) -> None:
    _, profile, _ = saved
    roles = {unit.role: unit.key for unit in profile.units}
    assert (roles["vision"], roles["projector"]) == ("model.vision_tower", "model.resampler_model")
    assert (profile.text.experts, profile.text.active_experts, profile.text.expert_width) == (4, 2, 16)
