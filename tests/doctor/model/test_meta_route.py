"""The second opinion: every class behind ``AutoModelForImageTextToText``, built on the meta device from its default config.

What its checkpoint would hold is written down as headers, under the names that ``save_pretrained`` gives them, and read by
the profile: both must agree on every parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from vlm_doctor import load_machine
from vlm_doctor.machine import Libraries, Package
from vlm_doctor.model import LinearWeights, ModelProfile, Unit
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.installed_transformers import families_with_stored_names, has_flat_towers
from vlm_doctor.sources.model_profile import build_profile

pytestmark = pytest.mark.models

NO_CHAIN = {
    "florence2": "encoder and decoder, with one table shared by both",
    "pi0": "a policy of two models: the action expert's width is not that of the config's text body",
    "t5gemma2": "encoder and decoder",
    "udop": "encoder and decoder, with tables shared between blocks",
    "vision-encoder-decoder": "encoder and decoder",
}
"""Classes that no chain of units describes; a plan for them is not promised."""

UNNAMED = {
    "text_decoder.bert.embeddings",
    "git.embeddings",
    "model.language_model.rotary_emb_local",
    "model.language_model.pos_emb",
    "model.rotary_emb",
}
"""Modules with buffers that need no key of their own: they hold the embedding (BLIP, GIT), or their forward moves the
buffer to its input's device (Gemma 3, LFM2 and Evolla of 4.57)."""

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "bool": "BOOL", "uint8": "U8"}


def families() -> list[str]:
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    except ImportError:
        return []
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def built(family: str) -> Any:
    """The class on the meta device. Default configs are incomplete for some, and timm is not installed."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.for_model(family)
        architecture = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        with torch.device("meta"):
            return architecture._from_config(config)
    except Exception as error:  # noqa: BLE001 - whatever a class raises that cannot be built
        pytest.skip(f"{family} cannot be built from its default config: {type(error).__name__}: {str(error)[:80]}")


def stored(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of the class, each once, by its own names and by those of a checkpoint."""
    first: dict[int, str] = {}
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tensors.pop(name, None)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return tensors, tensors
    return tensors, revert_weight_conversion(model, dict(tensors))


def headers(tensors: dict[str, Any]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(
            DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), tensor.numel() * tensor.element_size()
        )
        for name, tensor in tensors.items()
    }


def owners(keys: Iterable[str], name: str) -> list[str]:
    return [key for key in keys if name == key or name.startswith(f"{key}.")]


def profile_of(model: Any, tensors: dict[str, Any]) -> ModelProfile:
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    checkpoint = Checkpoint(config, headers(tensors))
    return build_profile(
        checkpoint,
        name="x",
        origin="checkpoint",
        are_towers_flat=has_flat_towers(),
        stored_names=families_with_stored_names(),
    )


def check_units(profile: ModelProfile, tensors: dict[str, Any], model: Any) -> None:
    modules = dict(model.named_modules())
    keys = [unit.key for unit in profile.units]
    assert {name: found for name in tensors if len(found := owners(keys, name)) != 1} == {}
    assert [key for key in keys if key not in modules and key not in tensors] == []
    expected: Counter[str] = Counter(dict.fromkeys(keys, 0))
    for name, tensor in tensors.items():
        expected[owners(keys, name)[0]] += tensor.numel() * tensor.element_size()
    assert {unit.key: unit.stored_bytes for unit in profile.units} == expected
    layers = [unit.key for unit in profile.units if unit.role == "layer"]
    assert layers
    assert {type(modules[key.rpartition(".")[0]]).__name__ for key in layers} == {"ModuleList"}
    assert profile.text.layers == len(layers) or profile.notes


def check_buffers(keys: list[str], model: Any, below: str = "") -> None:
    with_buffers = [
        name for name, module in model.named_modules() if any(True for _ in module.buffers(recurse=False)) and below in name
    ]
    assert {name for name in with_buffers if not owners(keys, name)} <= UNNAMED


def check_ties(profile: ModelProfile, model: Any) -> None:
    keys = [unit.key for unit in profile.units]
    first: dict[int, str] = {}
    tied = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        pair = tuple(sorted({owners(keys, name)[0], owners(keys, other)[0]}))
        if len(pair) > 1:
            tied.add(pair)
    # 4.57 ties when the model is loaded; that a head stays with its embedding is never wrong.
    assert tied <= {tuple(sorted(group)) for group in profile.tied}
    assert len(profile.tied) <= 1


def check_parts(unit: Unit, tensors: dict[str, Any], model: Any) -> None:
    modules = dict(model.named_modules())
    keys = [part.key for part in unit.parts]
    assert sum(part.stored_bytes for part in unit.parts) == unit.stored_bytes
    assert sum(part.elements for part in unit.parts) == unit.elements
    assert sum((part.linear for part in unit.parts), start=LinearWeights()) == unit.linear
    for name in tensors:
        assert len(owners(keys, name)) == len(owners([unit.key], name)), name
    assert [key for key in keys if key not in modules and key not in tensors] == []
    blocks = [part.key for part in unit.parts if part.layer is not None]
    assert {type(modules[key.rpartition(".")[0]]).__name__ for key in blocks} <= {"ModuleList"}
    assert len(blocks) == len(modules[blocks[0].rpartition(".")[0]])
    check_buffers(keys, model, below=f"{unit.key}.")
    # The part of a bare parameter is the parameter: no hook moves it, so that its side must be certain.
    bare = [key for key in keys if key not in modules]
    assert all("embed" in key or key.endswith("cls_token") for key in bare)


def check_no_split(profile: ModelProfile, model: Any) -> None:
    """No key lies inside a module that its class wants whole."""
    names = model._no_split_modules or ()
    whole = {name for name, module in model.named_modules() if type(module).__name__ in names}
    keys = [part.key for unit in profile.units for part in unit.parts or (unit,)]
    cut = [(key, name) for key in keys for name in owners(whole, key) if key != name]
    assert cut == []


NOT_LINEAR_BEFORE_5 = {"blip", "git", "kosmos-2", "kosmos-2.5"}
"""transformers 4.57 keeps the last module, and each of its name (``output`` of GIT), as it is. Small models all."""


def linear_of_class(model: Any) -> dict[str, int]:
    """Elements of the weights that bitsandbytes would replace, by the installed transformers' own rules."""
    import torch

    try:
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError:
        from transformers.integrations.bitsandbytes import get_keys_to_not_convert

        skipped = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
        return {
            name: module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and name.rpartition(".")[2] not in skipped
            and not any(f"{key}." in name or key == name for key in skipped)
        }
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(name, skipped)
    }


def check_linear(profile: ModelProfile, model: Any, *, is_new: bool) -> None:
    """What stays in 16 bit is never counted as quantized, and in the newest release hardly anything the other way."""
    import transformers

    packages = (Package(name="transformers", version=transformers.__version__),)
    libraries = Libraries(python="3", executable="python", packages=packages)
    loaded = as_loaded(profile, msgspec.structs.replace(load_machine("80GiB"), libraries=libraries))
    found: Counter[str] = Counter()
    for name, elements in linear_of_class(model).items():
        found[(owners([unit.key for unit in profile.units], name) or [""])[0]] += elements
    beyond = {
        unit.key: (unit.linear.elements, found[unit.key])
        for unit in loaded.units
        if not (found[unit.key] - 0.005 * unit.elements if is_new else 0) <= unit.linear.elements <= found[unit.key]
    }
    assert beyond == {}


@pytest.mark.parametrize("family", families())
def test_the_class_agrees_with_the_profile(family: str) -> None:
    if family in NO_CHAIN:
        pytest.skip(NO_CHAIN[family])
    model = built(family)
    tensors, saved = stored(model)
    is_new = has_flat_towers()
    for names in (saved, tensors):
        profile = profile_of(model, names)
        check_units(profile, tensors, model)
        check_buffers([unit.key for unit in profile.units], model)
        check_ties(profile, model)
        check_no_split(profile, model)
        if is_new or family not in NOT_LINEAR_BEFORE_5:
            check_linear(profile, model, is_new=is_new)
        for unit in profile.units:
            if unit.parts:
                check_parts(unit, tensors, model)
    assert not any(unit.parts for unit in profile.units if unit.role != "vision")
