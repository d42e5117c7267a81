"""What check_map says of a map against what happens: tiny models under accelerate's real hooks, on GPUs that are not there."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from vlm_doctor import Workload, load_machine, load_profile
from vlm_doctor.device_map import MapCheck
from vlm_doctor.machine import Libraries, Package
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.planner.map_devices import main_device

if TYPE_CHECKING:
    from vlm_doctor.model import ModelProfile

pytestmark = pytest.mark.models

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

import transformers  # noqa: E402
from accelerate import dispatch_model  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

from pytest_vlmgpu.processors import load_processor, prompt_text  # noqa: E402
from pytest_vlmgpu.source import find_source  # noqa: E402
from pytest_vlmgpu.testing import TINY_FAMILIES, tiny_image  # noqa: E402

from .fake_devices import FakeDevices  # noqa: E402

Map = dict[str, int | str]
DEVICES = 3


class Subject:
    """A tiny model with inputs for it."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
        source = find_source(str(folder))
        processor = load_processor(transformers, source, self.model.config, trust_remote_code=False)
        text = prompt_text(processor, 1, "What is it?")
        self.inputs = dict(processor(images=[tiny_image()], text=text, return_tensors="pt"))
        self.profile: ModelProfile = load_profile(str(folder))

    def logits(self, device_map: Mapping[str, int | str] | None) -> torch.Tensor:
        """Run the model; with a map on fake GPUs, dispatched by accelerate."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            if device_map is None:
                return model(**self.inputs).logits
            with FakeDevices():
                places = {key: torch.device("cuda", device) for key, device in device_map.items()}
                first = torch.device("cuda", main_device(device_map.values()))
                if len(set(places.values())) > 1:
                    dispatch_model(model, places, main_device=first, skip_keys=model._skip_keys_device_placement)
                else:
                    model.to(first)
                inputs = {name: tensor.to(first) for name, tensor in self.inputs.items()}
                return model(**inputs).logits.as_subclass(torch.Tensor)

    def check(self, device_map: Mapping[str, int | str]) -> MapCheck:
        packages = (Package(name="transformers", version=transformers.__version__),)
        machine = msgspec.structs.replace(
            load_machine("80GiB,80GiB,80GiB"), libraries=Libraries(python="3", executable="python", packages=packages)
        )
        return check_map(device_map, self.profile, machine, Workload())


@pytest.fixture(scope="module")
def subjects(tiny_vlms: Mapping[str, Path]) -> dict[str, Subject]:
    return {family: Subject(folder) for family, folder in tiny_vlms.items()}


def runs(subject: Subject, device_map: Mapping[str, int | str]) -> str:
    """Nothing when the map runs and the answer is right, otherwise what torch says."""
    try:
        logits = subject.logits(device_map)
    except (RuntimeError, ValueError) as error:
        return str(error)
    assert torch.allclose(logits, subject.logits(None))
    return ""


def unit_map(subject: Subject, choose: Callable[[str], int]) -> Map:
    return {unit.key: choose(unit.key) for unit in subject.profile.units}


def random_map(subject: Subject, dice: random.Random) -> Map:
    """A map with the faults that people make: blocks in parts, keys in keys, bits of towers."""
    borders = sorted(dice.choices(range(len(subject.profile.units) + 1), k=DEVICES - 1))
    device_map: Map = {
        unit.key: sum(at >= border for border in borders) for at, unit in enumerate(subject.profile.units)
    }
    modules = dict(subject.model.named_modules())
    for group in subject.profile.tied:
        if dice.random() < 0.8:
            device_map.update(dict.fromkeys(group, device_map[group[0]]))
    for _ in range(dice.choice([0, 0, 1, 1, 2])):
        key = dice.choice([k for k in device_map if k in modules and any(True for _ in modules[k].children())])
        device = device_map[key]
        fault = dice.choice(["parts", "parts elsewhere", "inner key", "move"])
        children = [
            f"{key}.{name}" for name, child in modules[key].named_children() if any(True for _ in child.parameters())
        ]
        bare = [f"{key}.{name}" for name, _ in modules[key].named_parameters(recurse=False)]
        if fault == "move" or not children:
            device_map[key] = dice.randrange(DEVICES)
        elif fault == "inner key":
            device_map[dice.choice(children)] = dice.randrange(DEVICES)
        else:
            del device_map[key]
            device_map.update(dict.fromkeys([*children, *bare], device))
            if fault == "parts elsewhere":
                device_map[dice.choice(children)] = dice.randrange(DEVICES)
    return device_map
