"""Tables of ``baselines.py`` about classes and figures: hooks, repeated blocks, work of a prompt, bytes of a checkpoint."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from baseline_models import GIB, NATIVE, blocks_of, no_split_of, subject
from read_headers import by_library
from trace_memory import Case, profile_of, run
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as MAPPING

from vlm_doctor import load_profile
from vlm_doctor.errors import VlmDoctorError
from vlm_doctor.model import ModelProfile
from vlm_doctor.planner.constraints import can_break_tower, chain
from vlm_doctor.planner.map_names import owner
from vlm_doctor.sources.checkpoint_folder import INDEX, read_folder

Row = list[Any]
MIB = 2**20
SHARD_BYTES = 5 * 10**9
"""Of ``save_pretrained`` before transformers 5."""


def hooks() -> Iterator[Row]:
    """E4: a decode step of a 32-layer body on the CPU, one thread, with a key for each layer and on one device."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    plain, hooked = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    keys = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(32)), "model.norm", "model.rotary_emb", "lm_head"]
    attach_align_device_hook_on_blocks(
        hooked,
        execution_device=dict.fromkeys([*keys, ""], torch.device("cpu")),
        offload=dict.fromkeys(keys, False),
        skip_keys=hooked._skip_keys_device_placement,
    )
    pairs = [(_step_ms(plain), _step_ms(hooked)) for _ in range(7)]
    without, with_hooks = sorted(pairs, key=lambda pair: pair[1] - pair[0])[len(pairs) // 2]
    count = sum(hasattr(module, "_hf_hook") for module in hooked.modules())
    each = f"{(with_hooks - without) * 1000 / count:.1f}"
    yield ["map", "modules with a hook", "decode step, ms", "each hook, us"]
    yield ["`auto` over several GPUs, and ours where several are needed", count, f"{with_hooks:.2f}", each]
    yield ["ours on one GPU, where one is enough", 0, f"{without:.2f}", "-"]


def _step_ms(model: Any) -> float:
    token = torch.zeros(1, 1, dtype=torch.long)
    times = []
    with torch.no_grad():
        cache = model(token, use_cache=True).past_key_values
        for _ in range(50):
            started = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[10:])


def audit() -> Iterator[Row]:
    """E7: repeated blocks that the class's own list leaves unprotected, and whether a plan of ours can cut one."""
    yield ["class", "unprotected by its own list", "cut by a plan of ours"]
    built, loose_classes, cut_classes = 0, 0, 0
    unbuilt, refused = [], []
    for config_kind in list(MAPPING.keys()):
        kind = MAPPING[config_kind]
        kind = kind[0] if isinstance(kind, (tuple, list)) else kind
        try:
            with torch.device("meta"):
                model = kind(config_kind())
        except Exception:  # noqa: BLE001 - a default config need not build a model
            unbuilt.append(kind.__name__)
            continue
        built += 1
        blocks = blocks_of(model)
        loose = _unprotected(model, blocks)
        try:
            ours = _listed({path: blocks[path] for path in _cuttable(model, profile_of(model), blocks)})
        except VlmDoctorError:
            refused.append(kind.__name__)
            ours = "has no plan"
        cut_classes += ours not in ("none", "has no plan")
        loose_classes += bool(loose)
        if loose or ours not in ("none", "has no plan"):
            yield [f"`{kind.__name__}`", _listed(loose), ours]
    no_plan = f"; no plan, which it says, for {', '.join(refused)}" if refused else ""
    yield [f"**{built} classes** ({len(unbuilt)} not built)", f"**{loose_classes}**", f"**{cut_classes}**{no_plan}"]


def _unprotected(model: Any, blocks: dict[str, str]) -> dict[str, str]:
    """Blocks that neither their class nor one around them is listed for."""
    try:
        listed = set(no_split_of(model))
    except ValueError:  # transformers 4: the class has no list
        listed = set()
    whole = tuple(f"{path}." for path, module in model.named_modules() if type(module).__name__ in listed)
    return {path: name for path, name in blocks.items() if name not in listed and not path.startswith(whole)}


def _cuttable(model: Any, profile: ModelProfile, blocks: dict[str, str]) -> list[str]:
    """Blocks whose parameters are in two atoms of the chain, with the tower whole or broken."""
    found = set()
    for breaks in (False, True) if can_break_tower(profile) else (False,):
        atoms = chain(profile, breaks_tower=breaks).atoms
        atom_of = {unit.key: number for number, atom in enumerate(atoms) for unit in atom.units}
        for block in blocks:
            places = {
                atom_of.get(owner(atom_of, name) or "")
                for name, _ in model.named_parameters()
                if name.startswith(f"{block}.")
            }
            if len(places) > 1 or None in places:
                found.add(block)
    return sorted(found)


def _listed(blocks: dict[str, str]) -> str:
    of_class: dict[str, list[str]] = {}
    for path, name in blocks.items():
        of_class.setdefault(name, []).append(path)
    return "; ".join(f"{name} (`{paths[0]}`, {len(paths)})" for name, paths in of_class.items()) or "none"


def work() -> Iterator[Row]:
    """E8: what a prompt needs beside weights, keys and values included: the class traced at true size, and formulas."""
    yield ["model", "input", "attention", "traced MiB", "formulas MiB", "formulas / traced"]
    cases = (Case(1024), Case(4096), Case(4096, logits="forward"), Case(2048, attention="eager"))
    for label, name in NATIVE.items():
        if label == "Qwen2.5-VL-72B":
            continue  # 137 GiB of virtual memory
        models: dict[str, Any] = {}
        for case in (*cases, Case(64, edge=1036 if "Qwen" in label or "GLM" in label else 1120)):
            weights, traced, predicted = run(models, name, case)
            each = [(value - weights) * GIB / MIB for value in (traced, predicted)]
            words = f"{case.text} tokens" + (f", image of {case.edge} px" if case.edge else "")
            words += ", all logits" if case.logits == "forward" else ""
            yield [label, words, case.attention, *(f"{value:,.0f}" for value in each), f"{each[1] / each[0]:.3f}"]


def headers() -> Iterator[Row]:
    """E6 and E9: config and headers alone, offline, beside the class's own parameters and the safetensors library."""
    yield [
        "model", "tensors, shards", "by us, ms", "by safetensors, ms", "safetensors / us", "weights by us, GiB",
        "of the class, GiB", "equal to the byte",
    ]  # fmt: skip
    for label in NATIVE:
        model = subject(label).model
        with tempfile.TemporaryDirectory() as name:
            files = _write(model, Path(name))
            ours, library = _times_ms(Path(name), files)
            profile = load_profile(name, allow_network=False)
        truth = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        stored = sum(unit.stored_bytes for unit in profile.units)
        yield [
            label, f"{len(list(model.parameters())):,}, {len(files)}", f"{ours:.1f}", f"{library:.1f}",
            f"{library / ours:.2f}", f"{stored / GIB:.2f}", f"{truth / GIB:.2f}",
            "yes" if stored == truth else f"NO ({stored - truth:+,})",
        ]  # fmt: skip


def _times_ms(folder: Path, files: list[Path]) -> tuple[float, float]:
    """Least of 15 runs, interleaved: config, index and all headers by us; the headers alone by the library."""
    ours, library = [], []
    for _ in range(15):
        started = time.perf_counter()
        read_folder(folder)
        between = time.perf_counter()
        by_library(files)
        ours.append(1000 * (between - started))
        library.append(1000 * (time.perf_counter() - between))
    return min(ours), min(library)


def _write(model: Any, folder: Path) -> list[Path]:
    """Shards of a model that hold true headers and no data (sparse files)."""
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if end + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    files = []
    for number, header in enumerate(shards, start=1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        files.append(path)
    weight_map = {name: path.name for path, header in zip(files, shards, strict=True) for name in header}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    return files


TABLES = {"hooks": hooks, "audit": audit, "work": work, "headers": headers}
