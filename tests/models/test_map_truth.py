"""What check_map says of a map against what happens: tiny models under accelerate's hooks, on GPUs that are not there."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from vlm_doctor import Policy, Workload, load_machine, load_profile, plan
from vlm_doctor.device_map import MapCheck
from vlm_doctor.machine import Libraries, Package
from vlm_doctor.planner.map_check import check_map
from vlm_doctor.planner.map_devices import main_device
from vlm_doctor.planner.map_names import loaded_by

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
from accelerate import dispatch_model, infer_auto_device_map  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

from pytest_vlmgpu.models.processors import load_processor, prompt_text  # noqa: E402
from pytest_vlmgpu.models.source import find_source  # noqa: E402
from pytest_vlmgpu.testing import TINY_FAMILIES, tiny_image  # noqa: E402

from .fake_devices import FakeDevices  # noqa: E402

try:
    from transformers.integrations.accelerate import expand_device_map
except ImportError:
    from transformers.modeling_utils import expand_device_map

IS_OLD = transformers.__version__.startswith("4.")
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

    def logits(self, device_map: Mapping[str, int | str] | None) -> Any:
        """Run the model; with a map on fake GPUs, dispatched by accelerate."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            if device_map is None:
                return model(**self.inputs).logits
            with FakeDevices():
                places = {key: torch.device("cuda", device) for key, device in device_map.items()}
                first = torch.device("cuda", main_device(device_map.values()))
                skip = model._skip_keys_device_placement
                dispatch_model(model, places, main_device=first, skip_keys=skip, force_hooks=True)
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
    device_map: Map = {unit.key: sum(at >= border for border in borders) for at, unit in enumerate(subject.profile.units)}
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


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_map_without_errors_runs_and_one_with_errors_does_not(family: str, subjects: dict[str, Subject]) -> None:
    subject = subjects[family]
    seen = set()
    for seed in range(25):
        device_map = random_map(subject, random.Random(seed))
        if len(set(device_map.values())) == 1:
            continue
        checked = subject.check(device_map)
        said = runs(subject, device_map)
        assert checked.is_clean is not bool(said), (device_map, said, checked.findings)
        if said:
            assert checked.corrected is not None
            assert runs(subject, checked.corrected) == ""
        seen.add(bool(said))
    assert seen == {True, False}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_maps_of_the_planner_run_and_are_clean(family: str, subjects: dict[str, Subject]) -> None:
    subject = subjects[family]
    planned = plan(subject.profile, load_machine("80GiB,80GiB,80GiB"), Workload(), Policy(min_gpus=3))

    assert planned.fits
    assert [finding.code for finding in subject.check(planned.device_map).findings] == ["VLM625"]
    assert runs(subject, planned.device_map) == ""


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_maps_of_accelerate_that_run_raise_no_alarm(family: str, subjects: dict[str, Subject]) -> None:
    subject = subjects[family]
    size = sum(tensor.numel() * tensor.element_size() for tensor in subject.model.parameters())
    blocks = list(getattr(subject.model, "_no_split_modules", None) or ())
    for share in (0.5, 0.7, 0.9):
        caps = {0: int(size * share), 1: int(size * share), 2: size}
        device_map = infer_auto_device_map(subject.model, max_memory=caps, no_split_module_classes=blocks)
        if len(set(device_map.values())) > 1:
            assert subject.check(device_map).is_clean is not bool(runs(subject, device_map)), device_map


def test_the_loader_takes_prefixes_as_the_doctor_says(subjects: dict[str, Subject]) -> None:
    names = list(subjects["llava"].profile.tensors)
    maps: list[Map] = [
        {"": 0, "model.language_model.layers.1": 1},
        {"model": 0, "model.language_model": 1, "model.vision_tower": 2, "lm_head": 0},
        {"model.language_model.layers": 0, "model.language_model.layers.1.mlp": 1, "": 2},
        {unit.key: at % 3 for at, unit in enumerate(subjects["llava"].profile.units)},
    ]
    # More layers than the tiny model has, so that one number begins another.
    names += [f"model.language_model.layers.1{n}.mlp.up_proj.weight" for n in range(3)]
    for device_map in maps:
        expanded = expand_device_map(device_map, names)
        for name in names:
            key = loaded_by(device_map, name, is_old=IS_OLD)
            if IS_OLD:
                pattern = "|".join(re.escape(k) for k in sorted(device_map, reverse=True))
                match = re.search(pattern, name)
                assert match is not None
                assert device_map[match.group()] == device_map[key or ""]
            else:
                assert expanded[name] == (device_map[key] if key is not None else device_map.get("", "cpu"))
