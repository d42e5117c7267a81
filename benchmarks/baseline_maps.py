"""Tables of ``baselines.py`` about maps: those of ``auto`` and ours, a published recipe, and wrong ones."""

from __future__ import annotations

import importlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import transformers
from baseline_models import (
    GIB,
    IS_OLD,
    NATIVE,
    REMOTE,
    SPECS,
    USUAL,
    Device,
    auto_map,
    best_fill,
    device_of,
    laid,
    machine_of,
    planned,
    sizes_of,
    subject,
)  # fmt: skip

from vlm_doctor import check_map, load_profile
from vlm_doctor.device_map import MapCheck
from vlm_doctor.machine import Libraries, Machine, Package
from vlm_doctor.placement import Plan

Row = list[Any]


def _gib(sizes: Mapping[int, int]) -> str:
    return " / ".join(f"{size / GIB:.1f}" for size in sizes.values())


def _cases() -> Iterator[tuple[str, str]]:
    for name in (*NATIVE, *REMOTE):
        for spec in SPECS.get(name, USUAL):
            yield name, spec


def _stages(answer: Plan) -> dict[int, int]:
    return {stage.gpu: stage.weights_bytes for stage in sorted(answer.stages, key=lambda stage: stage.gpu)}


def _weight_fill(answer: Plan) -> str:
    if not answer.fits:
        return "does not fit"
    return f"{max(stage.weights_bytes / stage.total_bytes for stage in answer.stages):.0%}"


def maps() -> Iterator[Row]:
    """E2: weights alone."""
    yield ["model", "GPUs, GiB", "`auto`", "CPU", "fullest", "hops", "blocks cut", "best contiguous", "ours, fewest GPUs",
           "fullest", "ours, as many", "fullest"]  # fmt: skip
    for name, spec in _cases():
        sizes = sizes_of(spec)
        theirs = laid(name, auto_map(name, spec))
        fullest = max(count / (sizes[number] * GIB) for number, count in theirs.gpu_bytes.items())
        least = best_fill(name, spec)
        few, all_of_them = planned(name, spec), planned(name, spec, len(sizes))
        yield [
            name, spec, _gib(theirs.gpu_bytes), f"{theirs.off_bytes / GIB:.1f}" if theirs.off_bytes else "-",
            f"{fullest:.0%}", theirs.hops, len(theirs.cut) or "-",
            f"{least:.0%}" if least <= 1 else f"none ({least:.0%})", _gib(_stages(few)) if few.fits else "-",
            _weight_fill(few), _gib(_stages(all_of_them)) if all_of_them.fits else "-", _weight_fill(all_of_them),
        ]  # fmt: skip


def peaks() -> Iterator[Row]:
    """E10: what one image, 512 text tokens and 256 new ones need, by the same formulas for both maps."""
    yield ["model", "GPUs, GiB", "`auto`: GPUs", "fullest at its peak", "longest prompt", "ours: GPUs",
           "fullest at its peak", "longest prompt", "what the plan says of `auto`"]  # fmt: skip
    for name, spec in _cases():
        answer = planned(name, spec)
        auto = answer.auto
        if auto is None or auto.unknown:
            yield [name, spec, "-", "-", "-", len(answer.stages), _peak(answer), _tokens(answer.longest_prompt_tokens), "-"]
            continue
        used = [share for share in auto.shares if share.need_bytes]
        theirs = max((share.need_bytes / max(1, share.need_bytes + share.left_bytes) for share in used), default=0)
        yield [
            name, spec, len([share for share in used if share.weights_bytes]), f"{theirs:.0%}" if used else "-",
            _tokens(auto.longest_prompt_tokens), len(answer.stages) if answer.fits else "-", _peak(answer),
            _tokens(answer.longest_prompt_tokens), auto.verdict,
        ]  # fmt: skip


def _tokens(count: int | None) -> str:
    return f"{count:,}" if count else "-"


def _peak(answer: Plan) -> str:
    """Need over what the GPU can give (less driver, context and headroom), on the fullest GPU."""
    fills = []
    for stage in answer.stages:
        size = Counter({line.kind: 0 for line in stage.ledger})
        for line in stage.ledger:
            size[line.kind] += line.size_bytes
        need = sum(size[kind] for kind in ("weights", "kv_cache", "activations", "fragmentation"))
        fills.append(need / (need + size["left"]))
    return f"{max(fills):.0%}" + ("" if answer.fits else ", does not fit")


def recipe() -> Iterator[Row]:
    """E3: CogVLM2's demo for several GPUs (its caps and its list of what must not be split), and report CogVLM2#10."""
    from accelerate.utils import infer_auto_device_map

    yield [
        "map",
        "weights on each GPU",
        "disk",
        "blocks cut",
        "boi, eoi / what they meet",
        "check-map: errors",
        "corrected map",
    ]
    model, profile, no_split = subject("CogVLM2-19B")
    rows = [(f"demo, {n} GPUs of 24, {16 if n == 2 else round(42 / n)} each", n, 24, 16 if n == 2 else round(42 / n))
            for n in range(2, 9)]  # fmt: skip
    reports = [(f"report CogVLM2#10, 4 GPUs of {size}, 12 each", 4, size, 12) for size in (12, 16)]
    for label, count, size, cap in (*rows, *reports):
        memory: dict[Device, int] = dict.fromkeys(range(count), cap * GIB)
        device_map = dict(infer_auto_device_map(model, max_memory=memory, no_split_module_classes=no_split))
        weighed = laid("CogVLM2-19B", device_map)
        machine = machine_of(f"{count}x{size}")
        checked = check_map(device_map, profile, machine)
        boi, met = (device_of(f"model.vision.{part}", device_map) for part in ("boi", "linear_proj.dense_4h_to_h.weight"))
        yield [
            label, _gib(weighed.gpu_bytes), f"{weighed.off_bytes / GIB:.1f}" if weighed.off_bytes else "-",
            ", ".join(block.rpartition(".")[2] for block in weighed.cut) or "-", f"{boi} / {met}",
            _errors(checked), _corrected(checked, profile, machine),
        ]  # fmt: skip


def _errors(checked: MapCheck) -> str:
    found = Counter(finding.code for finding in checked.findings if finding.severity == "error")
    warned = Counter(finding.code for finding in checked.findings if finding.severity == "warning")
    text = ", ".join(code if count == 1 else f"{code} x {count}" for code, count in found.items())
    return (text or "none") + (f" (warnings: {', '.join(warned)})" if warned else "")


def _corrected(checked: MapCheck, profile: Any, machine: Machine) -> str:
    if checked.corrected is None:
        return "-" if checked.is_clean else "none fits"
    again = check_map(checked.corrected, profile, machine)
    fate = "clean" if again.is_clean else "NOT CLEAN"
    return f"{fate}, {len(set(checked.corrected.values()))} devices; {checked.changes[0]}"


def wrong() -> Iterator[Row]:
    """E5: wrong hand-written maps of a small Qwen2-VL with 12 layers: what loading says, and what check-map says."""
    yield ["map", f"transformers {transformers.__version__} says while loading", "check-map", "corrected map"]
    version = Package(name="transformers", version=transformers.__version__)
    machine = msgspec.structs.replace(
        machine_of("2x24"), libraries=Libraries(python="3.11", executable="python", packages=(version,))
    )
    config = transformers.AutoConfig.for_model("qwen2_vl", **_SMALL)
    with tempfile.TemporaryDirectory() as folder:
        model = transformers.AutoModelForImageTextToText.from_config(config)
        model.save_pretrained(folder)
        profile = msgspec.structs.replace(load_profile(folder, allow_network=False), name="the model")
        names = [name for name, _ in model.named_parameters()]
        for label, device_map in _WRONG.items():
            checked = check_map(device_map, profile, machine)
            yield [label, _loading(type(model), folder, device_map, names), _said(checked),
                   _corrected(checked, profile, machine)]  # fmt: skip


def _said(checked: MapCheck) -> str:
    told = [finding for finding in checked.findings if finding.severity != "info"]
    return "; ".join(f"{f.code} {f.severity}: {f.message}" for f in told) or "nothing"


def _loading(kind: Any, folder: str, device_map: dict[str, Device], names: list[str]) -> str:
    """GPU 0 becomes the CPU and GPU 1 the disk, so that it can be tried without GPUs, except for keys inside keys."""
    loader = importlib.import_module("transformers.modeling_utils" if IS_OLD else "transformers.integrations.accelerate")
    if any(key.startswith(f"{other}." if other else "") for key in device_map for other in device_map if key != other):
        expanded = loader.expand_device_map(device_map, names)
        wrong = sorted({name.split(".")[3] for name in names if expanded[name] != device_of(name, device_map)}, key=int)
        return f"(not tried) puts layers {' and '.join(wrong)} on another GPU" if wrong else "(not tried)"
    where = {0: "cpu", 1: "disk", "cuda:0": "cpu", "cuda:1": "disk"}
    if not set(device_map.values()) <= set(where):
        return "(not tried)"
    try:
        kind.from_pretrained(
            folder,
            device_map={key: where[value] for key, value in device_map.items()},
            offload_folder=str(Path(folder) / "off"),
        )
    except Exception as error:  # noqa: BLE001 - what the user would see
        return f"{type(error).__name__}: {' '.join(str(error).split())[:110]}"
    return "accepted"


_SMALL: dict[str, Any] = {
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2,
    },
}  # fmt: skip
_BODY = "model.language_model"
_WRONG: dict[str, dict[str, Device]] = {
    "sound": {"model.visual": 0, f"{_BODY}": 1, "lm_head": 1},
    "names of transformers 4.51": {
        "visual": 0, "model.embed_tokens": 0, "model.layers": 1, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1
    },
    "`lm_head` forgotten": {"model.visual": 0, f"{_BODY}": 1},
    "a misspelt key beside sound ones": {"model.visual": 0, f"{_BODY}": 0, "lm_head": 0, "model.languag_model.layers.3": 1},
    "`layers.1` on 0, the body on 1": {"model.visual": 0, f"{_BODY}": 1, f"{_BODY}.layers.1": 0, "lm_head": 1},
    "the tower inside the whole model": {"": 0, "model.visual": 1},
    "a layer in parts on two GPUs": {
        "model.visual": 0, f"{_BODY}.embed_tokens": 0, f"{_BODY}.rotary_emb": 0,
        **{f"{_BODY}.layers.{n}": 0 if n < 6 else 1 for n in range(12) if n != 5},
        **{f"{_BODY}.layers.5.{part}": device for part, device in (("self_attn", 0), ("mlp", 1), ("input_layernorm", 0),
                                                                   ("post_attention_layernorm", 1))},
        f"{_BODY}.norm": 1, "lm_head": 1,
    },
    "devices as texts": {"model.visual": "cuda:0", f"{_BODY}": "cuda:1", "lm_head": "cuda:1"},
    "a GPU that is not there": {"model.visual": 0, f"{_BODY}": 2, "lm_head": 2},
}  # fmt: skip
TABLES = {"maps": maps, "recipe": recipe, "wrong": wrong, "peaks": peaks}
