"""The replay of ``device_map="auto"`` puts every parameter where the installed transformers would."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.auto_replay import AutoError, Device, Mode, replay
from vlm_doctor.planner.auto_tree import tree
from vlm_doctor.sources.catalogue import catalogue
from vlm_doctor.sources.model_profile import build_profile

from .families import FAMILIES

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.models

CATALOGUE = tuple(name for name, entry in catalogue().items() if not entry.config.get("auto_map"))
MODES: tuple[Mode, ...] = ("auto", "auto", "balanced_low_0", "sequential")


def machines(total_bytes: int, seed: int, count: int) -> Iterator[dict[Device, float]]:
    """Equal, unequal, tight and too small ones, of one to eight GPUs."""
    chance = random.Random(seed)
    for _ in range(count):
        gpus = chance.choice([1, 2, 2, 3, 4, 8])
        fill = chance.choice([1.5, 1.3, 1.05, 0.7])
        parts = [chance.choice([1.0, chance.uniform(0.3, 1.5)]) for _ in range(gpus)]
        memory: dict[Device, float] = {
            gpu: int(total_bytes * fill * part / sum(parts)) + chance.randrange(1000) for gpu, part in enumerate(parts)
        }
        yield {**memory, "cpu": int(total_bytes * chance.choice([0.2, 5]))}


def compare(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, profile: ModelProfile, names: Sequence[str], count: int = 16
) -> None:
    from .installed_auto import MAJOR, ROUTE, device_of, installed_map

    items = profile.registered[MAJOR]
    root = tree(items, lambda item: 2 * item.unit.elements + item.buffer_bytes)
    ties = [[f"{key}.weight" for key in group] for group in profile.tied]
    for seed, mode in enumerate(MODES):
        for memory in machines(profile.stored_bytes, seed, count // len(MODES)):
            expected = installed_map(monkeypatch, model, memory, mode)
            placed = replay(root, memory, ties, route=ROUTE, mode=mode)

            wanted = {name: device_of(name, expected) for name in names}
            found = {name: device_of(_class_name(name, placed.devices), placed.devices) for name in names}
            assert found == wanted, (mode, memory)


def _class_name(name: str, devices: dict[str, Device]) -> str:
    """A CLIP tower of a checkpoint has a level that the class of transformers 5 has not."""
    parts = name.split(".")
    is_known = any(".".join(parts[:count]) in devices for count in range(1, len(parts) + 1))
    return name if is_known else name.replace(".vision_model.", ".", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_by_its_default_config(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from .installed_auto import MAJOR, of_family, stored_tensors

    model, profile = of_family(family)

    if family == "lfm2_vl" and MAJOR == "4":
        assert MAJOR not in profile.registered, "its tower has another patch embedding than SigLIP2 by itself"
        return
    compare(monkeypatch, model, profile, list(stored_tensors(model)))


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_at_its_true_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from .installed_auto import on_meta, stored_tensors

    entry = catalogue()[name]
    config = transformers.AutoConfig.for_model(**entry.config)
    model = on_meta(config, getattr(transformers, entry.config["architectures"][0]))
    profile = build_profile(entry.checkpoint(), name=name, origin="catalogue")

    compare(monkeypatch, model, profile, list(stored_tensors(model)))


@pytest.mark.parametrize(
    ("name", "builder", "block"),
    [
        ("THUDM/glm-4v-9b", "glm_4v_9b", "GLMBlock"),
        ("THUDM/cogvlm2-llama3-chat-19B", "cogvlm2_19b", "CogVLMDecoderLayer"),
    ],
)
def test_remote_code(name: str, builder: str, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from . import remote_skeletons
    from .installed_auto import MAJOR, stored_tensors

    with torch.device("meta"):
        model = getattr(remote_skeletons, builder)().to(torch.bfloat16)
    model._no_split_modules = {block}
    model.all_tied_weights_keys = {}
    if MAJOR == "4":
        model._get_no_split_modules = lambda mode: [block]
    entry = catalogue()[name]
    profile = build_profile(entry.checkpoint(), name=name, origin="catalogue")

    names = [tensor for tensor in entry.checkpoint().tensors if not tensor.endswith("inv_freq")]
    assert set(names) == set(stored_tensors(model))
    compare(monkeypatch, model, profile, names, count=40)


def test_a_reported_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """CogVLM2#10: four GPUs of 12 GiB with the multi-GPU demo, and an error where the vision MLP is added."""
    profile = build_profile(catalogue()["THUDM/cogvlm2-llama3-chat-19B"].checkpoint(), name="cogvlm2", origin="catalogue")
    root = tree(profile.registered["4"], lambda item: 2 * item.unit.elements + item.buffer_bytes)
    try:
        devices = replay(root, dict.fromkeys(range(4), 12 * 2**30), [], route="4", mode="sequential").devices
    except AutoError:
        pytest.fail("the demo does load")

    block = {name: device for name, device in devices.items() if ".transformer.layers.56." in name}
    assert {device for name, device in block.items() if name.endswith(".input_layernorm")} == {2}
    assert {device for name, device in block.items() if not name.endswith(".input_layernorm")} == {3}
