"""The steps of ``glm4v_two_h200.py`` that need torch. Each runs in a process of its own and writes one JSON file."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frontier import split_of
from msgspec.structs import replace

from vlm_doctor.planner import account, plan
from vlm_doctor.planner.budget import budgets
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.problem import ask
from vlm_doctor.sources import collect, load_machine
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.workload import Policy, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_vlmgpu.models.loading import LoadedVlm
    from vlm_doctor.machine import Machine
    from vlm_doctor.model import ModelProfile
    from vlm_doctor.placement import Plan, Stage

GIB = 2**30
NEW_TOKENS = 16
PROMPTS = [
    Workload(images=0, text_tokens=512, new_tokens=NEW_TOKENS),
    Workload(images=0, text_tokens=4096, new_tokens=NEW_TOKENS),
    Workload(images=0, text_tokens=16384, new_tokens=NEW_TOKENS),
    Workload(images=0, text_tokens=32768, new_tokens=NEW_TOKENS),
    Workload(images=1, image_width=336, image_height=336, text_tokens=64, new_tokens=NEW_TOKENS),
    Workload(images=1, image_width=1120, image_height=1120, text_tokens=64, new_tokens=NEW_TOKENS),
    Workload(images=1, image_width=2240, image_height=2240, text_tokens=64, new_tokens=NEW_TOKENS),
]
# As a 24 GiB card would have it: 2 % of the nominal size. The emulated cards' total is that of the H200.
POLICY = Policy(min_gpus=2, max_gpus=2, headroom_fraction=0.0, headroom_min_bytes=GIB // 2)
CUTS = (
    (-1, False),
    (1, False),
    (0, True),
    (-2, False),
    (2, False),
    (-2, True),
    (2, True),
    (-4, False),
    (4, False),
    (-4, True),
)
"""Layers by which the border moves, and whether the GPUs change places; in this order while time lasts."""
GLM41V_9B = {
    "vision_config": {},
    "text_config": {
        "vocab_size": 151552,
        "max_position_embeddings": 262144,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5},
    },
}
"""All else of the published 9B model is the default of the class."""
QWEN25_VL_7B = {
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3456, "num_heads": 16, "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2,
    },
    "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 262144, "rope_theta": 1000000.0,
        "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""From the published config.json, but for the longest position."""
TRUE_SIZES = {"glm4v": GLM41V_9B, "qwen2_5_vl": QWEN25_VL_7B}
NOT_RUN = "needs CUDA, not run"


class Answer(dict[str, Any]):
    """What a step has found so far, on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def add(self, **found: object) -> None:
        """Print and save findings."""
        self.update(found)
        say(json.dumps(found))
        self._path.write_text(json.dumps(self))


def say(*words: object) -> None:
    print(*words, flush=True)


def has_cuda(gpus: int) -> bool:
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.device_count() >= gpus)


def machine_of(spec: str) -> Machine:
    """The machine as it is now, or a made-up one."""
    return collect(with_torch=False) if spec == "live" else load_machine(spec)


def build(folder: Path, family: str, answer: Answer, *, is_tiny: bool) -> None:
    """A checkpoint with random weights: of the published model's dimensions, or tiny."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from pytest_vlmgpu.fakes.tiny_families import PRINTABLE
    from pytest_vlmgpu.testing import tiny_config, write_processor

    started = time.perf_counter()
    settings = tiny_config(family, write_processor(folder, family))
    if not is_tiny:
        size = TRUE_SIZES[family]
        kept = {key: settings["text_config"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        settings.update(text_config={**kept, **size["text_config"]}, vision_config=size["vision_config"])
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
        # Every other token has logit 0, below the best of 94 random ones: answers are printable and never end.
        model.lm_head.weight[PRINTABLE:] = 0
    say("made after", round(time.perf_counter() - started, 1), "s")
    model.save_pretrained(folder, max_shard_size="5GB")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    answer.add(parameters=parameters, seconds=round(time.perf_counter() - started, 1), device=device)


def accuracy(folder: Path, machine_spec: str, answer: Answer, deadline: float) -> None:
    """Predicted beside measured peak of each GPU, for prompts of several lengths, on the map that the planner chose."""
    from pytest_vlmgpu.models.loading import load, torch_ordinals
    from pytest_vlmgpu.testing import tiny_image

    profile, machine = load_profile(str(folder)), machine_of(machine_spec)
    planned = plan(profile, machine, PROMPTS[0], POLICY)
    answer.add(plan=facts_of(planned))
    predictions = [(workload, stages_for(planned, profile, machine, workload)) for workload in PROMPTS]
    if not has_cuda(len(planned.stages)):
        predicted = {name_of(workload): [stage.peak_bytes for stage in stages] for workload, stages in predictions}
        answer.add(predicted_bytes=predicted, not_run=NOT_RUN)
        return
    ordinals = torch_ordinals()
    free = {gpu.uuid: gpu.memory_free_bytes or 0 for gpu in machine.gpus}
    vlm = load(str(folder), planned)
    answer.add(load_seconds=round(vlm.load_seconds, 2))
    vlm.generate(tiny_image(336, 336), "warm up", max_new_tokens=2)
    rows: list[dict[str, Any]] = []
    for workload, stages in predictions:
        if time.monotonic() < deadline:
            rows += measure(vlm, workload, [(stage, ordinals[stage.uuid], free[stage.uuid]) for stage in stages])
            answer.add(rows=rows)


def measure(vlm: LoadedVlm, workload: Workload, places: list[tuple[Stage, int, int]]) -> list[dict[str, Any]]:
    """One prompt: for each stage, with its ordinal and the memory that was free before loading, the peaks."""
    import torch

    from pytest_vlmgpu.testing import tiny_image
    from pytest_vlmgpu.watching.meter import Meter

    picture = tiny_image(workload.image_width or 0, workload.image_height or 0) if workload.images else None
    text = "x" * workload.text_tokens
    meter = Meter()
    meter.start()
    started = time.perf_counter()
    ran = attempt(lambda: vlm.generate(picture, text, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS))
    seconds = round(time.perf_counter() - started, 2)
    peaks = meter.stop()
    rows = []
    for stage, ordinal, free in places:
        peak, weights = peaks[ordinal], stage.weights_bytes
        work = max(1, peak.allocated - weights)
        rows.append(
            {
                "prompt": name_of(workload),
                "gpu": stage.gpu,
                "ran": ran,
                "seconds": seconds,
                "predicted_bytes": stage.peak_bytes,
                "measured_bytes": peak.allocated,
                "ratio": round(stage.peak_bytes / peak.allocated, 4),
                "ratio_without_weights": round((stage.peak_bytes - weights) / work, 3),
                "predicted_reserved_bytes": stage.peak_bytes + total_of(stage, "fragmentation"),
                "reserved_bytes": peak.reserved,
                "predicted_outside_bytes": total_of(stage, "context", "workspace"),
                "outside_torch_bytes": free - torch.cuda.mem_get_info(ordinal)[0] - torch.cuda.memory_reserved(ordinal),
            }
        )
    return rows


def frontier(folder: Path, machine_spec: str, answer: Answer, deadline: float) -> None:
    """Longest text prompt that really runs: the planner's map, and other cuts, in both orders of the GPUs."""
    from pytest_vlmgpu.models.loading import load, unload

    profile, machine = load_profile(str(folder)), machine_of(machine_spec)
    workload = Workload(images=0, text_tokens=512, new_tokens=2)
    planned = plan(profile, machine, workload, POLICY)
    predicted = plan(profile, machine, workload, replace(POLICY, headroom_min_bytes=0)).longest_prompt_tokens
    answer.add(plan=facts_of(planned), predicted_without_headroom=predicted)
    if not has_cuda(2):
        answer.add(not_run=NOT_RUN)
        return
    vlm = load(str(folder), planned)
    best = longest(vlm, predicted or 4096, deadline)
    answer.add(plan_tokens=best)
    unload(vlm)

    cuts: dict[str, int] = {}
    for label, moved in cuts_near(planned, profile):
        if time.monotonic() < deadline - 15:
            vlm = load(str(folder), moved)
            cuts[label] = longest_if_better(vlm, best, deadline)
            answer.add(cuts=cuts)
            unload(vlm)


def auto(folder: Path, machine_spec: str, answer: Answer, deadline: float) -> None:
    """Longest text prompt that really runs on the map of ``device_map="auto"``."""
    if not has_cuda(2):
        answer.add(not_run=NOT_RUN, machine=machine_spec)
        return
    careless, layers = load_auto(folder)
    answer.add(auto_layers_on_first=layers, auto_tokens=longest(careless, 8192, deadline))


def longest_if_better(vlm: LoadedVlm, best: int, deadline: float) -> int:
    """Longest prompt of a map that beats ``best`` by more than the precision of the search, else 0: one question mostly."""
    return longest(vlm, int(best * 1.05), deadline) if prefill(vlm, int(best * 1.02)) else 0


def load_auto(folder: Path) -> tuple[LoadedVlm, int]:
    """The model as ``device_map="auto"`` places it, in the wrapper that :func:`prefill` asks."""
    import torch
    from transformers import AutoModelForImageTextToText

    from pytest_vlmgpu.models.loading import LoadedVlm

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto")
    placed = getattr(model, "hf_device_map", {"": 0})
    first = next(iter(placed.values()))
    layers = sum(".layers." in key and device == first for key, device in placed.items())
    numbers = {key: device for key, device in placed.items() if isinstance(device, int)}
    return LoadedVlm(str(folder), model, None, None, numbers, (), f"cuda:{first}", 0.0), layers


def prefill(vlm: LoadedVlm, tokens: int) -> bool:
    """Read a text prompt of so many tokens and make two more; False when memory runs out."""
    import torch

    def ask() -> None:
        ids = torch.randint(1, 90, (1, tokens), device=vlm.input_device)
        vlm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2, do_sample=False
        )

    return attempt(ask)


def attempt(ask: Callable[[], object]) -> bool:
    """Whether memory suffices; the allocator is emptied afterwards either way."""
    import torch

    try:
        ask()
    except torch.OutOfMemoryError:
        is_enough = False
    except RuntimeError as error:
        # A kernel that fails leaves the CUDA context of this process unusable: what was found so far is all there is.
        raise SystemExit(f"not a matter of memory: {error}") from error
    else:
        is_enough = True
    gc.collect()
    torch.cuda.empty_cache()
    return is_enough


def longest(vlm: LoadedVlm, start: int, deadline: float, precision: float = 0.02) -> int:
    """Largest prompt that runs, to within ``precision``; the best seen when time runs out."""
    low, high, tokens = 0, 0, start
    while time.monotonic() < deadline:
        if prefill(vlm, tokens):
            low = tokens
        else:
            high = tokens
        if not high:
            tokens = int(tokens * 1.3)
        elif not low:
            tokens = int(tokens * 0.75)
        elif high - low <= precision * low:
            break
        else:
            tokens = (low + high) // 2
        if tokens < 256:
            break
    return low


def cuts_near(planned: Plan, profile: ModelProfile) -> Iterator[tuple[str, Plan]]:
    """The planner's map with the border between the GPUs moved, or the GPUs in the other order, nearest first."""
    layers = [unit.key for unit in profile.units if unit.role == "layer"]
    own = sum(planned.device_map[key] == 0 for key in layers)

    def moved(count: int, *, is_swapped: bool) -> Plan:
        border = {key: int(position >= count) for position, key in enumerate(layers)}
        device_map = {**planned.device_map, **border}
        return replace(planned, device_map={key: at ^ is_swapped for key, at in device_map.items()})

    for distance, is_swapped in CUTS:
        count = (len(layers) - own if is_swapped else own) + distance
        if 0 <= count <= len(layers):
            yield f"{count} first{', GPUs swapped' * is_swapped}", moved(count, is_swapped=is_swapped)


def stages_for(planned: Plan, profile: ModelProfile, machine: Machine, workload: Workload) -> tuple[Stage, ...]:
    """The ledger of a plan's map for another workload."""
    policy = replace(POLICY, gpus=tuple(stage.gpu for stage in planned.stages))
    problem = ask(profile, workload, policy, machine, chain=chain(profile), found=budgets(machine, policy))
    return account.stages(problem, split_of(problem, planned.stages))


def total_of(stage: Stage, *kinds: str) -> int:
    return sum(line.size_bytes for line in stage.ledger if line.kind in kinds)


def facts_of(planned: Plan) -> dict[str, Any]:
    return {
        "fits": planned.fits,
        "longest_prompt_tokens": planned.longest_prompt_tokens,
        "gpus": [stage.gpu for stage in planned.stages],
        "layers": [sum(".layers." in key for key in stage.keys) for stage in planned.stages],
        "weights_bytes": [stage.weights_bytes for stage in planned.stages],
        "shortage": planned.shortage.message if planned.shortage else None,
    }


def name_of(workload: Workload) -> str:
    return f"image {workload.image_width} px" if workload.images else f"text {workload.text_tokens}"
