"""A vision tower in its parts: every cut between blocks that a plan may make runs, and gives the same answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vlm_doctor.machine import Libraries, Machine, Package
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile

if TYPE_CHECKING:
    from vlm_doctor.model import ModelProfile

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

import transformers  # noqa: E402
from accelerate import dispatch_model  # noqa: E402

from pytest_vlmgpu.testing import TINY_FAMILIES  # noqa: E402

from .fake_devices import FakeDevices  # noqa: E402
from .test_map_truth import IS_OLD, Subject, runs  # noqa: E402

WHOLE = {"mllama"}
"""Tiny families whose tower no cut may part."""


SMALL = {
    "depth": 3,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "out_hidden_size": 32,
    "vocab_size": 64,
    "image_size": 56,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "projection_dim": 32,
    "pad_token_id": 0,
}
GRID = ("glm4v", "glm4v_moe", "qwen3_vl", "qwen3_vl_moe", "glm46v", "qwen3_5", "glm_ocr")
PIXELS = ("llava", "gemma3", "internvl", "got_ocr2")
"""Families whose tower takes patches with a grid, or squares of pixels."""


def machine_of(*, is_old: bool) -> Machine:
    packages = (Package(name="transformers", version="4.57.6" if is_old else "5.23.0"),)
    libraries = Libraries(python="3", executable="python", packages=packages)
    return Machine(origin="synthetic", description="", libraries=libraries)


def small(family: str) -> Any:
    """A model of that family with a tower of three blocks."""
    config = transformers.AutoConfig.for_model(family)
    for part in (config.text_config, config.vision_config):
        for key, value in SMALL.items():
            if hasattr(part, key):
                setattr(part, key, [value, value] if isinstance(getattr(part, key), (list, tuple)) else value)
        part.layer_types = ["full_attention"] * 3
        if getattr(part, "rope_parameters", None) and "mrope_section" in part.rope_parameters:
            part.rope_parameters["mrope_section"] = [4, 2, 2]
    if hasattr(config, "mm_tokens_per_image"):
        config.mm_tokens_per_image = 1
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def profile_of(model: Any) -> ModelProfile:
    words = {torch.float32: "F32", torch.int64: "I64"}
    tensors = {
        name: StoredTensor(words[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())
        for name, tensor in model.state_dict().items()
    }
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return build_profile(Checkpoint(config, tensors), name="x", origin="checkpoint")


@pytest.mark.parametrize("family", [*GRID, *PIXELS])
def test_a_tower_in_parts_sees_the_same(family: str) -> None:
    try:
        model = small(family)
    except Exception as error:  # noqa: BLE001 - families that this transformers does not know, or sizes that do not suit
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
    patch = model.config.vision_config.patch_size
    if family in GRID:
        width = 3 * model.config.vision_config.temporal_patch_size * patch**2
        inputs = {"pixel_values": torch.randn(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    else:
        inputs = {"pixel_values": torch.randn(1, 3, 56, 56)}
    profile = as_loaded(profile_of(model), machine_of(is_old=IS_OLD))
    atoms = chain(profile, breaks_tower=True).atoms
    anchor = next(number for number, atom in enumerate(atoms) if atom.has_embedding)
    assert anchor == 3
    with torch.no_grad():
        expected = features(model, inputs)
        for cut in range(1, anchor + 1):
            places = {
                unit.key: torch.device("cuda", int(at >= cut)) for at, atom in enumerate(atoms) for unit in atom.units
            }
            placed = copy.deepcopy(model)
            with FakeDevices():
                load_parameters(placed, places)
                dispatch_model(placed, places, main_device=torch.device("cuda", 0), force_hooks=True)
                found = features(placed, {name: tensor.to("cuda:0") for name, tensor in inputs.items()})
            assert all(torch.allclose(a.as_subclass(torch.Tensor), b) for a, b in zip(found, expected, strict=True)), cut


def load_parameters(model: Any, places: Mapping[str, Any]) -> None:
    """Put bare parameters where the map says, as loading does; hooks are for modules alone."""
    for key in places.keys() & dict(model.named_parameters()).keys():
        module, _, name = key.rpartition(".")
        owner = model.get_submodule(module)
        owner._parameters[name] = torch.nn.Parameter(owner._parameters[name].to(places[key]), requires_grad=False)


def features(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """What the projector makes of an image, as a list of tensors."""
    found = (model.model if hasattr(model, "model") else model).get_image_features(**inputs)
    found = getattr(found, "pooler_output", found)
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)] if isinstance(found, (list, tuple)) else [found]


@pytest.fixture(scope="module")
def subjects(tiny_vlms: Mapping[str, Path]) -> dict[str, Subject]:
    return {family: Subject(folder) for family, folder in tiny_vlms.items()}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_cut_of_a_tower_runs(subjects: Mapping[str, Subject], family: str) -> None:
    subject = subjects[family]
    profile = as_loaded(subject.profile, machine_of(is_old=IS_OLD))
    atoms = chain(profile, breaks_tower=True).atoms
    anchor = next(number for number, atom in enumerate(atoms) if atom.has_embedding)
    if not anchor:
        assert family in WHOLE or (IS_OLD and family == "qwen2_5_vl")
        return
    for cut in range(1, anchor + 1):
        for beyond in (anchor + 1, len(atoms) - 1):
            device_map = {
                unit.key: (number >= cut) + (number >= beyond) for number, atom in enumerate(atoms) for unit in atom.units
            }
            assert runs(subject, device_map) == "", (cut, beyond)
            errors = [finding for finding in subject.check(device_map).findings if finding.severity == "error"]
            assert errors == [], (cut, beyond)
