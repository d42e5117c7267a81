"""Published models on real GPUs: what a plan says beside what torch allocated and reserved.

    python benchmarks/published_on_gpu.py --out FILE [--cards 1|2] [--jobs N] [--budget SECONDS] [NAME ...]
    python benchmarks/published_on_gpu.py --beside FILE [NAME ...]

The models of ``published_dimensions.py`` with the workloads there. Each is made as headers in a sparse file, whose holes
read as zeros, planned for the GPUs of this machine as if nobody else used them, loaded with ``from_pretrained`` by the
plan's map, and called with token numbers and noise for pixels, as ``vlm-doctor try`` does where there is no processor.
``--cards 2`` parts each model over two GPUs. Several models run at a time, in processes of their own: peaks are those that
torch counts for each. ``--device cpu --layers 2`` makes the first call of each without a GPU, and measures nothing.

``--beside`` needs no GPU: it plans the models of such a file anew, for two H200s with the libraries that read it, and holds
what the plans say today to what was measured then.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from published_dimensions import PUBLISHED, WORKLOADS

from vlm_doctor.machine import Libraries, Package
from vlm_doctor.planner import plan
from vlm_doctor.probes.loading import workload_options
from vlm_doctor.probes.trial_run import work_of
from vlm_doctor.probes.try_prompt import make_prompt
from vlm_doctor.sources import collect
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.sources.named_machine import load_machine
from vlm_doctor.units import GIB
from vlm_doctor.workload import Policy, Workload

NEW_TOKENS = 8
READ_WITH = {"torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.15.0"}
"""Libraries of the machine that read benchmarks/results/2xh200-published.json."""
EACH_S = 200.0
SPARE_GIB = 14.0
"""Of a GPU for each process: its CUDA context, and the work on the longest prompt in eager attention."""


def machine_of(device: str, cards: int) -> Any:
    """The machine's own GPUs, all of their memory free; a made-up one where there are none."""
    machine = collect(with_torch=False)
    if device == "cpu":
        return msgspec.structs.replace(load_machine(f"{cards}xH100-80GB"), libraries=machine.libraries)
    gpus = [msgspec.structs.replace(gpu, memory_free_bytes=gpu.memory_total_bytes, processes=()) for gpu in machine.gpus]
    return msgspec.structs.replace(machine, gpus=tuple(gpus))


def load(folder: str, planned: Any, workload: Workload, device: str) -> Any:
    """As the plan's script loads it."""
    import torch
    import transformers

    where: Any = {"": device}
    if device != "cpu":
        gpus = [stage.gpu for stage in planned.stages]
        where = {key: gpus[place] for key, place in planned.device_map.items()} if len(gpus) > 1 else {"": gpus[0]}
    options = workload_options(
        transformers, attention=workload.attention, quantization=None, dtype=torch.bfloat16, device_map=where
    )
    kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(folder, dtype=torch.bfloat16, device_map=where, **options).eval()


def prompt_of(model: Any, profile: Any, workload: Workload, folder: str) -> tuple[dict[str, Any], int]:
    """Inputs of a call, and how many tokens more than planned its prompt has."""
    import transformers

    work = work_of(profile, workload)
    inputs, tokens, _, _ = make_prompt(transformers, model, work, name=folder, revision=None, trust_remote_code=False)
    return inputs, tokens - work["prompt_tokens"]


def briefly(profile: Any, planned: Any) -> dict[str, Any]:
    """A plan's map: text layers of each stage, and the stage of everything else."""
    layers = {unit.key for unit in profile.units if unit.role == "layer"}
    others = {key: place for key, place in (planned.device_map or {}).items() if key not in layers}
    return {"layers": [len(layers.intersection(stage.keys)) for stage in planned.stages], "others": others}


def call(model: Any, inputs: dict[str, Any], *, makes_answer: bool = True) -> None:
    import torch

    with torch.inference_mode():
        if makes_answer:
            model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        else:
            model(**inputs, use_cache=True)


def measure(model: Any, profile: Any, workload: Workload, folder: str, planned: Any) -> list[dict[str, Any]]:
    """Rows of one workload, one for each stage."""
    import torch

    inputs, tokens_off = prompt_of(model, profile, workload, folder)
    gpus = [stage.gpu for stage in planned.stages] if torch.cuda.is_available() else []
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    torch.cuda.empty_cache()
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    call(model, inputs, makes_answer=workload.makes_answer)
    rows = []
    for stage in planned.stages:
        row = {
            "gpu": stage.gpu,
            "weights": stage.weights_bytes,
            "told": stage.peak_bytes,
            "told_reserved": stage.reserved_bytes,
            "tokens_off": tokens_off,
        }
        if gpus:
            row["measured"] = torch.cuda.max_memory_allocated(stage.gpu)
            row["reserved"] = torch.cuda.max_memory_reserved(stage.gpu)
        rows.append(row)
    return rows


def child(name: str, options: argparse.Namespace) -> None:
    """All workloads of one model; a row goes to standard output as it comes."""
    import torch
    import transformers
    from formulas_and_traces import write_checkpoint

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    family, fields = PUBLISHED[name][0], dict(PUBLISHED[name][1])
    if options.layers:
        cut = dict.fromkeys(("num_hidden_layers", "depth"), options.layers)
        fields |= {part: {**fields[part], **cut} for part in ("text_config", "vision_config") if part in fields}
    config = transformers.AutoConfig.for_model(family, **fields)
    machine = machine_of(options.device, options.cards)
    policy = Policy(min_gpus=options.cards, max_gpus=options.cards, headroom_fraction=0.0, headroom_min_bytes=0)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config)
        profile = load_profile(folder, allow_network=False)
        model = loaded_for = device_map = None
        # Those in eager attention come last: the model is loaded again for them.
        workloads = sorted(WORKLOADS.items(), key=lambda item: item[1].get("attention", ""))
        for kind, asked in workloads[:1] if options.device == "cpu" else workloads:
            workload = Workload(new_tokens=NEW_TOKENS, **asked)
            row: dict[str, Any] = {"model": name, "workload": kind, "cards": options.cards}
            try:
                planned = plan(profile, machine, workload, policy)
                row["fits"] = planned.fits
                row["map"] = briefly(profile, planned)
                if planned.fits:
                    if loaded_for != workload.attention or device_map != planned.device_map:
                        model = None
                        # A loaded model is in cycles of references.
                        gc.collect()
                        torch.cuda.empty_cache()
                        model = load(folder, planned, workload, options.device)
                        loaded_for, device_map = workload.attention, planned.device_map
                        # What the first call of a process makes once: kernels, workspaces.
                        call(model, prompt_of(model, profile, Workload(images=0, text_tokens=32), folder)[0])
                    row["stages"] = measure(model, profile, workload, folder, planned)
            except Exception as error:  # noqa: BLE001 - one row of a table: what failed is what it says
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            print("ROW", json.dumps(row), flush=True)


def planned_again(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one model with what plans say today; those whose plan has another map now are left out."""
    from formulas_and_traces import published_config, write_checkpoint

    packages = tuple(Package(name=package, version=version) for package, version in READ_WITH.items())
    libraries = Libraries(python="3.12.3", executable="python3", packages=packages)
    machine = msgspec.structs.replace(load_machine("2xH200"), libraries=libraries)
    policy = Policy(min_gpus=2, max_gpus=2, headroom_fraction=0.0, headroom_min_bytes=0)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), published_config(name))
        profile = load_profile(folder, allow_network=False)
    found = []
    for row in rows:
        stages = plan(profile, machine, Workload(new_tokens=NEW_TOKENS, **WORKLOADS[row["workload"]]), policy).stages
        if [stage.weights_bytes for stage in stages] != [stage["weights"] for stage in row["stages"]]:
            continue
        told = [{"told": stage.peak_bytes, "told_reserved": stage.reserved_bytes, "tokens_off": 0} for stage in stages]
        found.append({**row, "stages": [{**was, **now} for was, now in zip(row["stages"], told, strict=True)]})
    return found


def beside(file: Path, names: list[str]) -> None:
    """What plans say today beside a file's readings."""
    read: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(file.read_text()):
        if "stages" in row:
            read.setdefault(row["model"], []).append(row)
    found: list[dict[str, Any]] = []
    for name in names or read:
        rows = planned_again(name, read[name])
        print(*map(line_of, rows), sep="\n", flush=True)
        found += rows
    print(f"{sum(map(len, read.values())) - len(found)} of {sum(map(len, read.values()))} workloads have another map now")
    for title, rows in (
        ("eager attention", [row for row in found if row["workload"] == "eager"]),
        ("plain forward pass", [row for row in found if row["workload"] == "forward"]),
        ("all else", [row for row in found if row["workload"] not in ("eager", "forward")]),
    ):
        print(f"{title}:\n{summary(rows)}")


class Runs:
    """Models, each in a process, as many at a time as GPUs have memory for.

    Args:
        options: Of the command.
        free_gib: Of each GPU.
    """

    def __init__(self, options: argparse.Namespace, free_gib: list[float]) -> None:
        self._options = options
        self._free = free_gib
        self._changed = threading.Condition()
        self._end = time.monotonic() + options.budget
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str) -> None:
        """Run one when there is room for it."""
        size = needed_gib(name) / self._options.cards + SPARE_GIB
        gpus = self._take(size)
        words = [sys.executable, __file__, *sys.argv[1:], "--child", name]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else dict(os.environ)
        try:
            left = self._end - time.monotonic()
            done = subprocess.run(
                words, env=environment, timeout=max(1.0, min(EACH_S, left)), capture_output=True, text=True, check=False
            )
            text, end = (
                done.stdout,
                f"exit status {done.returncode}: {done.stderr.strip()[-300:]}" if done.returncode else "",
            )
        except subprocess.TimeoutExpired as error:
            text, end = (error.stdout or b"").decode(), "no time left"
        with self._changed:
            for gpu in gpus:
                self._free[gpu] += size
            found = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]
            self.rows += found
            if end:
                self.rows.append({"model": name, "cards": self._options.cards, "failed": end})
                print(name, end, flush=True)
            print(*map(line_of, found), sep="\n", flush=True)
            if self._options.out:
                self._options.out.write_text(json.dumps(self.rows, indent=0))
            self._changed.notify_all()

    def _take(self, size: float) -> list[int]:
        cards = self._options.cards
        with self._changed:
            while self._free:
                gpus = sorted(range(len(self._free)), key=lambda gpu: -self._free[gpu])[:cards]
                whole = all(free >= size for free in (self._free[gpu] for gpu in gpus))
                if whole:
                    for gpu in gpus:
                        self._free[gpu] -= size
                    return sorted(gpus)
                self._changed.wait(5)
        return []


def needed_gib(name: str) -> float:
    """Weights and the largest workload, roughly: to tell what may run side by side."""
    text = PUBLISHED[name][1]["text_config"]
    width, layers = text.get("hidden_size", 2880), text.get("num_hidden_layers", 36)
    experts = text.get("num_experts", 0) * text.get("moe_intermediate_size", 0)
    mlp = experts or text.get("intermediate_size", 2880) * (128 if text["model_type"] == "gpt_oss" else 1)
    parameters = layers * (3 * width * mlp + 3 * width**2) + 2 * width * text.get("vocab_size", 200_000) + 1e9
    return 2 * parameters / GIB + 8


def line_of(row: dict[str, Any]) -> str:
    about = f"{row['model']:24} {row.get('workload', ''):14}"
    if "stages" not in row:
        return f"{about} {row.get('failed') or 'does not fit'}"
    parts = []
    for stage in row["stages"]:
        if "measured" not in stage:
            parts.append(f"{stage['told'] / GIB:.2f} told, prompt off by {stage['tokens_off']}")
            continue
        off, held = stage["told"] / stage["measured"] - 1, (stage["told_reserved"] or 0) / stage["reserved"] - 1
        parts.append(f"{stage['measured'] / GIB:7.3f} GiB {off:+7.2%} reserved {held:+7.2%} {stage['tokens_off'] or ''}")
    return f"{about} {' | '.join(parts)}"


def summary(rows: list[dict[str, Any]]) -> str:
    """Errors over all stages that ran."""
    stages = [stage for row in rows for stage in row.get("stages", ()) if "measured" in stage]
    lines = []
    for told, was in (("told", "measured"), ("told_reserved", "reserved")):
        errors = sorted(stage[told] / stage[was] - 1 for stage in stages if stage[told])
        if errors:
            sizes = sorted(map(abs, errors))
            p95 = sizes[int(0.95 * (len(sizes) - 1))]
            lines.append(
                f"{was}: {len(errors)} stages, median {statistics.median(sizes):.3%}, p95 {p95:.3%}, "
                f"from {errors[0]:+.3%} to {errors[-1]:+.3%}"
            )
    return "\n".join(lines) or "nothing was measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--beside", type=Path, metavar="FILE")
    parser.add_argument("--cards", type=int, default=1, choices=(1, 2))
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--budget", type=float, default=540)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, help="of body and tower, instead of their own")
    parser.add_argument("--child", metavar="NAME")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    if options.beside:
        beside(options.beside, options.names)
        return
    free = []
    if options.device == "cuda":
        free = [(gpu.memory_free_bytes or 0) / GIB for gpu in collect(with_torch=False).gpus]
    runs = Runs(options, free)
    names = sorted(options.names or PUBLISHED, key=needed_gib, reverse=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(runs.run, names))
    print(summary(runs.rows))


if __name__ == "__main__":
    main()
