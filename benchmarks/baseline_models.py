"""Material of ``baselines.py``: true-size models on the meta device, ``auto``'s maps of them, and what a map is worth."""

from __future__ import annotations

import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from trace_memory import profile_of
from traced_models import config_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.models.remote_skeletons import cogvlm2_19b, glm_4v_9b
from vlm_doctor import Policy, load_machine, load_profile, plan
from vlm_doctor.machine import Machine
from vlm_doctor.model import ModelProfile
from vlm_doctor.placement import Plan
from vlm_doctor.planner.map_names import owner

GIB = 2**30
CPU_GIB = 200
IS_OLD = transformers.__version__.startswith("4.")
Device = int | str

NATIVE = {
    "LLaVA-1.5-7B": "llava-1.5-7b",
    "Qwen2-VL-7B": "qwen2-vl-7b",
    "InternVL3-8B": "internvl3-8b",
    "GLM-4.1V-9B": "glm-4.1v-9b",
    "Gemma-3-27B": "gemma-3-27b",
    "Qwen2.5-VL-72B": "qwen2.5-vl-72b",
}
REMOTE = {
    "GLM-4V-9B": ("THUDM/glm-4v-9b", glm_4v_9b, ["GLMBlock"]),
    "CogVLM2-19B": ("THUDM/cogvlm2-llama3-chat-19B", cogvlm2_19b, ["CogVLMDecoderLayer"]),
}
"""Code of the checkpoint: the catalogue's name, a skeleton with the same names, shapes and order, its own no-split list."""
SPECS = {
    "Gemma-3-27B": ("2x24", "4x24", "4x16"),
    "Qwen2.5-VL-72B": ("8x24", "2x80", "80+48+48", "48+80+80"),
    "CogVLM2-19B": ("2x24", "4x24", "12+24", "24+12", "4x16"),
}
"""GPUs by their GiB; the other models get :data:`USUAL`."""
USUAL = ("2x24", "4x24", "12+24", "24+12")


class Subject(NamedTuple):
    """A model, as torch and as the planner see it."""

    model: Any
    profile: ModelProfile
    no_split: list[str]


class Laid(NamedTuple):
    """What a map is worth, by weights alone."""

    gpu_bytes: dict[int, int]
    off_bytes: int
    """On the CPU or the disk."""
    cut: list[str]
    """Repeated blocks on several devices."""
    hops: int
    """Changes of device in the order of execution."""


@cache
def subject(name: str) -> Subject:
    """A model on the meta device, in bfloat16."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns that there are no GPUs
    if name in REMOTE:
        known_as, skeleton, no_split = REMOTE[name]
        with torch.device("meta"):
            model = skeleton().to(torch.bfloat16)
        return Subject(model, load_profile(known_as, allow_network=False), no_split)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config_of(NATIVE[name]), dtype=torch.bfloat16)
    model.tie_weights()
    return Subject(model, profile_of(model), no_split_of(model))


def no_split_of(model: Any) -> list[str]:
    """Classes that the model's own authors protect."""
    found = model._get_no_split_modules("auto") if IS_OLD else model._no_split_modules
    return sorted(found or ())


def sizes_of(spec: str) -> list[int]:
    """GiB of each GPU: ``4x24`` or ``24+12``."""
    if "x" in spec:
        count, size = map(int, spec.split("x"))
        return [size] * count
    return [int(size) for size in spec.split("+")]


@cache
def machine_of(spec: str) -> Machine:
    """Those GPUs, empty."""
    machine: Machine = load_machine(",".join(f"{size}GiB" for size in sizes_of(spec)))
    return machine


def auto_map(name: str, spec: str) -> dict[str, Device]:
    """What ``device_map="auto"`` makes: the installed transformers', or accelerate's for code of a checkpoint."""
    model, _, no_split = subject(name)
    memory: dict[Device, float] = {number: size * GIB for number, size in enumerate(sizes_of(spec))}
    memory["cpu"] = CPU_GIB * GIB
    if name in REMOTE:
        from accelerate.utils import get_balanced_memory, infer_auto_device_map

        balanced = get_balanced_memory(model, max_memory=dict(memory), no_split_module_classes=no_split)
        return dict(infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=no_split))
    if IS_OLD:
        import accelerate.utils.modeling as asked
        import transformers.modeling_utils as loading

        free = lambda given=None: dict(memory if given is None else given)  # noqa: E731
        with mock.patch.object(asked, "get_max_memory", free), mock.patch.object(loading, "get_max_memory", free):
            return dict(loading._get_device_map(model, "auto", None, None, torch.bfloat16, None))
    import transformers.integrations.accelerate as own

    with mock.patch.object(own, "accelerate_max_memory", return_value=dict(memory)):
        return dict(own._get_device_map(model, "auto", None, None))


def device_of(name: str, device_map: Mapping[str, Device]) -> Device:
    """By the longest key that is the name, or holds it."""
    return device_map[owner(device_map, name) or ""]


def blocks_of(model: Any) -> dict[str, str]:
    """Outermost repeated blocks with at least two modules that have parameters: path to class."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len(module) < 2 or any(path.startswith(f"{b}.") for b in found):
            continue
        for number, block in enumerate(module):
            if isinstance(block, torch.nn.ModuleList):
                continue
            if sum(any(True for _ in child.parameters()) for child in block.children()) > 1:
                found[f"{path}.{number}"] = type(block).__name__
    return found


def laid(name: str, device_map: Mapping[str, Device]) -> Laid:
    """Weigh a map."""
    model, profile, _ = subject(name)
    size: Counter[Device] = Counter()
    where = {}
    for path, parameter in model.named_parameters():
        where[path] = device_of(path, device_map)
        size[where[path]] += parameter.numel() * parameter.element_size()
    order = [where[path] for unit in profile.units for path in where if path == unit.key or path.startswith(f"{unit.key}.")]
    cut = [b for b in blocks_of(model) if len({device for path, device in where.items() if path.startswith(f"{b}.")}) > 1]
    return Laid(
        {device: count for device, count in sorted(size.items(), key=str) if isinstance(device, int)},
        sum(count for device, count in size.items() if isinstance(device, str)),
        cut,
        sum(a != b for a, b in itertools.pairwise(order)),
    )


@cache
def planned(name: str, spec: str, gpus: int = 1) -> Plan:
    """Our plan for one image, 512 text tokens and 256 new ones, on at least so many GPUs."""
    answer: Plan = plan(subject(name).profile, machine_of(spec), policy=Policy(min_gpus=gpus))
    return answer


def best_fill(name: str, spec: str) -> float:
    """Least possible fill of the fullest GPU by weights alone, over contiguous stages in every order of the GPUs.

    The anchor (what is before the first layer) is whole, as in a plan that breaks no tower.
    """
    from vlm_doctor.planner.constraints import chain

    atoms = [sum(unit.stored_bytes for unit in atom.units) for atom in chain(subject(name).profile).atoms]
    return min(_least_fill(atoms, order) for order in set(itertools.permutations(sizes_of(spec))))


def _least_fill(atoms: Sequence[int], sizes: Sequence[int]) -> float:
    low, high = 0.0, sum(atoms) / (min(sizes) * GIB)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _holds(atoms, [size * GIB * middle for size in sizes]) else (middle, high)
    return high


def _holds(atoms: Sequence[int], rooms: Iterable[float]) -> bool:
    waiting = list(reversed(atoms))
    for room in rooms:
        left = room
        while waiting and waiting[-1] <= left:
            left -= waiting.pop()
    return not waiting
