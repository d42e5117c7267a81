"""What accelerate does with offloaded modules, which the planner's prices rest on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vlmgpu.testing import TINY_FAMILIES
from vlm_doctor.planner.memory import copied_bytes
from vlm_doctor.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = pytest.mark.models


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_one_module_at_a_time_is_copied_and_it_is_no_larger_than_planned(
    family: str, tiny_vlms: Mapping[str, Path]
) -> None:
    from accelerate.hooks import AlignDevicesHook, SequentialHook, attach_align_device_hook_on_blocks
    from accelerate.utils import extract_submodules_state_dict
    from transformers import AutoModelForImageTextToText

    from vlm_doctor.sources.model_files import load_profile

    profile = load_profile(str(tiny_vlms[family]), allow_network=False)
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlms[family], dtype="float32")
    layers = [unit for unit in profile.units if unit.role == "layer"]
    kept = [unit.key for unit in profile.units if unit.role != "layer"]
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    # As dispatch_model calls it for a map with "cpu", with the CPU in the part of the GPU.
    attach_align_device_hook_on_blocks(
        model,
        execution_device={"": "cpu", **{unit.key: "cpu" for unit in profile.units}},
        offload={**dict.fromkeys(kept, False), **{unit.key: True for unit in layers}},
        weights_map=extract_submodules_state_dict(model.state_dict(), [unit.key for unit in layers]),
    )
    largest: dict[str, int] = {}
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
        if not any(isinstance(one, AlignDevicesHook) and one.offload for one in hooks):
            continue
        assert not any(one.place_submodules for one in hooks if isinstance(one, AlignDevicesHook) and one.offload)
        owner = next(unit.key for unit in layers if name == unit.key or name.startswith(f"{unit.key}."))
        copied = sum(sizes[f"{name}.{own}"] for own, _ in module.named_parameters(recurse=False))
        largest[owner] = max(copied, largest.get(owner, 0))
    workload = Workload(dtype="float32")
    assert set(largest) == {unit.key for unit in layers}
    for unit in layers:
        assert 0 < largest[unit.key] <= copied_bytes(unit, profile, workload) <= 1.5 * largest[unit.key]
