"""The installed libraries' own ``device_map="auto"``, asked about models on the meta device and made-up machines."""

from __future__ import annotations

import copy
from typing import Any

import accelerate.utils.modeling
import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.auto_replay import Device, Mode, Route
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile

MAJOR = transformers.__version__.partition(".")[0]
ROUTE: Route = "4" if MAJOR == "4" else "5.18"
"""Of the versions that the tests run with."""


def on_meta(config: Any, kind: Any) -> Any:
    """A model as ``from_pretrained`` has it when it asks for a map: in bfloat16, tied, without weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = kind(copy.deepcopy(config))
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return model


def of_family(family: str) -> tuple[Any, ModelProfile]:
    """A model by the default config of its family, and what the doctor makes of its checkpoint; skips where it cannot."""
    if family not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = transformers.AutoConfig.for_model(family)
    try:
        model = on_meta(config, getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]))
    except (TypeError, AttributeError, ValueError, AssertionError) as error:
        pytest.skip(f"the default config of {family} builds no model: {error}")
    fields = {**config.to_dict(), "architectures": [type(model).__name__]}
    if MAJOR == "4":
        # The default of a composite config says True, and transformers 4 heeds the text part alone.
        fields["tie_word_embeddings"] = getattr(config.get_text_config(decoder=True), "tie_word_embeddings", True)
    profile = build_profile(Checkpoint(fields, stored_tensors(model)), name=family, origin="checkpoint")
    return model, profile


def installed_map(
    monkeypatch: pytest.MonkeyPatch, model: Any, memory: dict[Device, float], mode: Mode
) -> dict[str, Device]:
    """The map that ``from_pretrained`` would make, with this much free memory."""

    def free(asked: dict[Device, float] | None = None) -> dict[Device, float]:
        return dict(memory if asked is None else asked)

    result: dict[str, Device]
    if MAJOR == "4":
        import transformers.modeling_utils as loading

        monkeypatch.setattr(accelerate.utils.modeling, "get_max_memory", free)
        monkeypatch.setattr(loading, "get_max_memory", free)
        result = loading._get_device_map(model, mode, None, None, torch.bfloat16, None)
    else:
        import transformers.integrations.accelerate as own

        monkeypatch.setattr(own, "accelerate_max_memory", free)
        result = own._get_device_map(model, mode, None, None)
    return result


def stored_tensors(model: nn.Module) -> dict[str, StoredTensor]:
    """What a checkpoint of the model would hold: every tensor once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {
        name: StoredTensor("BF16", tuple(parameter.shape), parameter.numel() * 2)
        for name, parameter in model.named_parameters()
        if name not in tied
    }


def device_of(name: str, device_map: dict[str, Device]) -> Device:
    """Where a map puts a parameter: by the longest key that is it, or holds it."""
    while name not in device_map:
        assert name, "no key covers this parameter"
        name = name.rpartition(".")[0]
    return device_map[name]
