"""The allocation scripts that come with the doctor, held against the real code of the installed transformers.

Models have true dimensions and few layers, which makes what a layer and a tower allocate weigh more than in a whole one.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from vlm_doctor import load_machine
from vlm_doctor.allocation import LayerScript, Made
from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.allocator import SMALL_BYTES, Allocator
from vlm_doctor.planner.image_tokens import ImageLoad, image_load, pictures
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.planner.replay import Held, Program, dimensions
from vlm_doctor.planner.traced_footprint import trace_request
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.child import Child
from vlm_doctor.sources.model_profile import build_profile
from vlm_doctor.sources.trace import FOLDER, PROGRAM, understand
from vlm_doctor.trace import BEFORE, TOWER, Trace
from vlm_doctor.units import MIB
from vlm_doctor.workload import Workload

from ..doctor.planner.profiles import with_transformers

pytestmark = pytest.mark.models

if int(pytest.importorskip("transformers").__version__.split(".")[0]) < 5:
    pytest.skip("scripts are written from the code of transformers 5", allow_module_level=True)

LAYERS, BLOCKS, MIDDLE = 7, 4, 4
TEXT_TOKENS = (1203, 6011)
EDGES = (0, 448, 1120)
TEXT_SHARE, IMAGE_SHARE = 0.005, 0.01
SMALL_TENSORS_BYTES = 3 * MIB
"""Tensors of up to 1 MiB that do not outlive a list are left out of a replay: they share segments that are there anyway."""
MODELS = (
    "llava-1.5-7b", "internvl3-8b", "glm-4.1v-9b", "qwen2-vl-7b", "qwen2.5-vl-7b", "qwen3-vl-8b", "qwen3-vl-30b-a3b",
    "gemma-3-4b", "gemma-3-27b", "paligemma-3b", "pixtral-12b", "llama-3.2-11b-vision",
)  # fmt: skip
MASKS_EXPERTS = "qwen3-vl-30b-a3b"
"""Its script masks what experts give, as transformers 5.17 does; 5.23 does not where they are not spread over processes."""
WITHOUT_TOWER = ("pixtral-12b", "llama-3.2-11b-vision")


class Case(NamedTuple):
    """One run of a model, traced, and the same by its scripts."""

    edge: int
    images: ImageLoad
    run: Trace
    program: Program


def _config(name: str) -> Any:
    import transformers

    path = Path(__file__).parents[2] / "benchmarks" / "traced_models.py"
    spec = importlib.util.spec_from_file_location("traced_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind, fields = module.CONFIGS[name]
    fields = copy.deepcopy(fields)
    text, vision = fields.setdefault("text_config", {}), fields.setdefault("vision_config", {})
    text["num_hidden_layers"] = LAYERS
    if kind == "mllama":
        text["cross_attention_layers"] = [3]
    if kind.startswith("qwen3_vl"):
        vision["deepstack_visual_indexes"] = [0, 1, 2]
    if kind == "qwen2_5_vl":
        vision["fullatt_block_indexes"] = [1]
    usual = transformers.AutoConfig.for_model(kind, **fields).vision_config
    vision["depth" if hasattr(usual, "depth") else "num_hidden_layers"] = BLOCKS
    return transformers.AutoConfig.for_model(kind, **fields)


@cache
def _model(name: str) -> tuple[ModelProfile, dict[str, Any]]:
    """What the planner knows of it, and config.json."""
    import torch
    import transformers

    config = _config(name)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    fields = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    tensors = {name: StoredTensor("BF16", tuple(one.shape), 2 * one.numel()) for name, one in model.named_parameters()}
    profile = build_profile(Checkpoint(fields, tensors), name=name, origin="checkpoint")
    return as_loaded(profile, with_transformers(load_machine("1xA100"), transformers.__version__)), fields


@cache
def _cases(name: str, has_cudnn: bool) -> tuple[Case, ...]:
    profile, config = _model(name)
    assert profile.body_script is not None
    request = trace_request(profile, Workload(images=1, new_tokens=2), load_machine("1xH100" if has_cudnn else "1xA100"))
    asked = []
    for edge in EDGES if name not in WITHOUT_TOWER else (0,):
        load = image_load(profile, Workload(images=int(bool(edge)), image_height=edge or None))
        asked += [(edge, load, text + load.tokens) for text in TEXT_TOKENS]
    runs = [
        {
            "tokens": tokens,
            "batch": 1,
            "steps": 2,
            "pictures": msgspec.to_builtins(pictures(profile, Workload(images=int(bool(edge)), image_height=edge or None))),
        }
        for edge, _, tokens in asked
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    fields = ("architecture", "dtype", "attention", "layers", "tower", "cudnn_width")
    arguments = {"config": config, "runs": runs, "folder": None, **{name: getattr(request, name) for name in fields}}
    traces = understand(
        Child(PROGRAM, arguments, environment=environment, deadline_s=300, idle_s=100, folder=FOLDER).outcome(), request
    )
    return tuple(
        Case(
            edge,
            load,
            run,
            Program(
                profile.body_script,
                profile.tower_script if edge else None,
                dimensions(profile, load),
                item_bytes=2,
                batch=1,
                new_tokens=2,
                cudnn_width=request.cudnn_width,
                keeps_states=profile.vision is not None and profile.vision.keeps_states,
                holds_states=profile.vision is not None and not profile.vision.lets_go,
            ),
        )
        for (edge, load, _), run in zip(asked, traces.runs, strict=True)
    )


def _held(profile: ModelProfile) -> Held:
    kinds = tuple(profile.text.cached_layers) or ("full",) * LAYERS
    return Held(kinds=kinds, weights_bytes=0, is_first=True, has_head=True, has_inputs=True)


def _traced_peak(run: Trace, places: frozenset[int]) -> int:
    """Of the same allocator, which rounds, and gives blocks that are a little too large."""
    allocator, alive = Allocator(), {}
    for tensor, size_bytes, _ in run.of_device(places):
        if size_bytes:
            alive[tensor] = allocator.make(size_bytes)
        else:
            allocator.free(alive.pop(tensor))
    return allocator.peak_allocated_bytes


@pytest.mark.parametrize("has_cudnn", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_peaks_are_those_of_the_traced_model(name: str, has_cudnn: bool) -> None:
    profile, _ = _model(name)
    held = _held(profile)
    layers = msgspec.structs.replace(held, is_first=False, has_head=False, has_inputs=False)
    parts = {
        "whole": (frozenset(range(TOWER, LAYERS + 1)), held),
        "middle": (
            frozenset({MIDDLE, MIDDLE + 1}),
            msgspec.structs.replace(layers, kinds=held.kinds[MIDDLE : MIDDLE + 2]),
        ),
        "last": (
            frozenset({LAYERS - 1, LAYERS}),
            msgspec.structs.replace(layers, kinds=held.kinds[-1:], has_head=True),
        ),
    }
    for case in _cases(name, has_cudnn):
        for part, (places, stage) in parts.items():
            traced, found = _traced_peak(case.run, places), case.program.peaks(stage, case.run.tokens)[0]
            share = IMAGE_SHARE if case.edge else TEXT_SHARE
            assert found == pytest.approx(traced, rel=share, abs=SMALL_TENSORS_BYTES), (part, case.edge, case.run.tokens)


@pytest.mark.parametrize("has_cudnn", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_comes_before_the_layers_is_no_less_than_traced(name: str, has_cudnn: bool) -> None:
    """No more either, but for the embedded prompt: releases differ in whether it is there while the tower runs."""
    profile, _ = _model(name)
    held = msgspec.structs.replace(_held(profile), kinds=(), has_head=False)
    for case in _cases(name, has_cudnn):
        traced = _traced_peak(case.run, frozenset({TOWER, BEFORE}))
        found = case.program.peaks(held, case.run.tokens)[0]
        prompt_bytes = 2 * case.run.tokens * profile.text.hidden if case.edge else 0
        assert found > (1 - IMAGE_SHARE) * traced - SMALL_TENSORS_BYTES, (case.edge, case.run.tokens)
        assert found < (1 + IMAGE_SHARE) * traced + SMALL_TENSORS_BYTES + prompt_bytes, (case.edge, case.run.tokens)


@pytest.mark.parametrize("has_cudnn", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name != MASKS_EXPERTS])
def test_large_tensors_of_a_layer_come_and_go_in_the_traced_order(name: str, has_cudnn: bool) -> None:
    profile, _ = _model(name)
    assert profile.body_script is not None
    kind = _held(profile).kinds[MIDDLE]
    for case in _cases(name, has_cudnn):
        tower = profile.tower_script if case.edge else None
        scripts = tower.layers if tower is not None and tower.layers else profile.body_script.layers
        layer = scripts.get(kind) or next(iter(scripts.values()))
        assert list(_scripted_order(layer, case)) == list(_traced_order(case.run)), (case.edge, case.run.tokens)


def _traced_order(run: Trace) -> Iterator[tuple[int, bool]]:
    """Sizes of what comes, in bytes, and of what goes, at one layer."""
    sizes: dict[int, int] = {}
    for event in run.events[: run.decode_begin()]:
        if event.place == MIDDLE and event.size_bytes > SMALL_BYTES:
            sizes[event.tensor] = event.size_bytes
            yield event.size_bytes, True
        elif not event.size_bytes and event.place == MIDDLE and event.tensor in sizes:
            yield sizes.pop(event.tensor), False


def _scripted_order(layer: LayerScript, case: Case) -> Iterator[tuple[int, bool]]:
    sizes: list[int] = []
    for event in layer.prefill:
        if isinstance(event, Made):
            sizes.append(case.program._size(event, case.run.tokens))
            if sizes[-1] > SMALL_BYTES:
                yield sizes[-1], True
        elif event >= 0 and sizes[event] > SMALL_BYTES:
            yield sizes[event], False
