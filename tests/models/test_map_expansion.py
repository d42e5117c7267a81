"""A plan's map means what it says: the installed transformers put every parameter where the plan counts it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest

from vlm_doctor import Plan, Policy, Workload, load_machine, plan
from vlm_doctor.model import ModelProfile
from vlm_doctor.sources.catalogue import catalogue
from vlm_doctor.sources.model_profile import build_profile

from .families import FAMILIES

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.models


def planned(profile: ModelProfile, *, gpus: int) -> Plan:
    made = plan(profile, load_machine("8x400GiB"), Workload(images=0), Policy(min_gpus=gpus, headroom_fraction=0))
    assert made.fits
    return made


def check(model: nn.Module, profile: ModelProfile) -> None:
    from accelerate.utils.modeling import check_device_map
    from transformers.modeling_utils import expand_device_map

    modules = {name for name, _ in model.named_modules()}
    layers = sum(unit.role == "layer" for unit in profile.units)
    for gpus in (1, 2, min(4, layers)):
        made = planned(profile, gpus=gpus)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        names += [name for name, _ in model.named_buffers() if name in model.state_dict()]

        expanded = expand_device_map(made.device_map, names)

        assert expanded == {name: place(name, made.device_map) for name in names}
        # accelerate warns of keys that are bare parameters, and heeds them.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
            check_device_map(model, made.device_map)
        parameters = set(names)
        assert all(not key or key in parameters or key in modules for key in made.device_map)
        if gpus > 1:
            assert set(made.device_map) >= {unit.key for unit in profile.units if unit.role == "layer"}
            assert_disjoint(made.device_map)


def place(name: str, device_map: dict[str, int | str]) -> int | str:
    """By whole components: ``layers.1`` holds nothing of ``layers.10``."""
    (found,) = [device for key, device in device_map.items() if not key or f"{name}.".startswith(f"{key}.")]
    return found


def assert_disjoint(keys: Iterable[str]) -> None:
    known = set(keys)
    for key in known:
        above = key.rpartition(".")[0]
        while above:
            assert above not in known, f"{key} lies in {above}"
            above = above.rpartition(".")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_by_its_default_config(family: str) -> None:
    from .installed_auto import of_family

    check(*of_family(family))


@pytest.mark.parametrize("name", [name for name, entry in catalogue().items() if not entry.config.get("auto_map")])
def test_the_catalogue_at_its_true_size(name: str) -> None:
    import transformers

    from .installed_auto import on_meta

    entry = catalogue()[name]
    config = transformers.AutoConfig.for_model(**entry.config)
    model = on_meta(config, getattr(transformers, entry.config["architectures"][0]))

    check(model, build_profile(entry.checkpoint(), name=name, origin="catalogue"))


@pytest.mark.parametrize(
    ("name", "builder"), [("THUDM/glm-4v-9b", "glm_4v_9b"), ("THUDM/cogvlm2-llama3-chat-19B", "cogvlm2_19b")]
)
def test_remote_code(name: str, builder: str) -> None:
    import torch

    from . import remote_skeletons

    with torch.device("meta"):
        model = getattr(remote_skeletons, builder)()
    profile = build_profile(catalogue()[name].checkpoint(), name=name, origin="catalogue")
    if "rotary_pos_emb" in str(profile.units):
        # The published class has it; the skeleton has parameters alone.
        model.transformer.add_module("rotary_pos_emb", torch.nn.Identity())
    if "rotary_emb" in str(profile.units):
        model.model.add_module("rotary_emb", torch.nn.Identity())
    check(model, profile)


def test_the_prefix_trap_is_real() -> None:
    """transformers 5 takes keys for beginnings of names; a plan survives that because it names every layer."""
    from transformers.modeling_utils import expand_device_map

    from .installed_auto import MAJOR

    trap = expand_device_map({"": 1, "model.layers.1": 0}, ["model.layers.1.weight", "model.layers.10.weight"])
    assert trap["model.layers.10.weight"] == (1 if MAJOR == "4" else 0)
    named = expand_device_map(
        {f"model.layers.{number}": number % 2 for number in range(11)}, ["model.layers.1.weight", "model.layers.10.weight"]
    )
    assert named == {"model.layers.1.weight": 1, "model.layers.10.weight": 0}
