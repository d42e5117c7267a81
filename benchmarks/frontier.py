"""Hold the planner against real GPUs: longest prompts, brute force over cuts, ``auto``; predicted and measured peaks.

    python benchmarks/frontier.py --out FOLDER [--budget SECONDS] [SCENARIO ...]

A scenario is a model at its published dimensions (random weights, bfloat16, made on the GPUs, never on disk) and the memory
that is free on two GPUs, which ``ballast.py`` brings about by holding the rest. In it:

- the planner plans for the machine as it finds it (NVML), with no headroom;
- the map is loaded as transformers 5 loads one (weights cut out of one segment a GPU) and dispatched by accelerate;
- ``truth``: peaks of several prompts and images, predicted and measured, allocated and reserved;
- ``frontier``: the longest text prompt that runs, found by doubling and halving to 1 %, whether what was promised ran, and
  whether a tenth more ran out;
- ``brute force``: every other contiguous cut in both orders of the GPUs that what lives at once does not rule out is asked
  for 3 % more than the planner's map reached, and measured when it gives it;
- ``auto``: accelerate's own map for the same free memory, likewise.

Needs two GPUs of 80 GiB, torch, transformers and accelerate. Rows go to ``frontier.json`` in FOLDER as they come.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from traced_models import config_of, image_inputs

from vlm_doctor.planner import plan
from vlm_doctor.planner.budget import budgets
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.order import Split
from vlm_doctor.planner.problem import ask
from vlm_doctor.sources import collect
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile
from vlm_doctor.workload import Policy, Workload

HERE = Path(__file__).resolve().parent
GIB = 2**30
NEW_TOKENS = 2
PRECISION = 0.01
WORKLOAD = Workload(images=0, text_tokens=256, new_tokens=NEW_TOKENS)
POLICY = Policy(min_gpus=2, max_gpus=2, headroom_fraction=0.0, headroom_min_bytes=0)
BETTER = 1.03
MOST_CUTS = 8
"""Of those that the formulas rank highest, the planner's own not counted."""
ASKED = {
    "glm": ((23.5, 23.5), (12, 23.5), (23.5, 12), (16, 10), (40, 12)),
    "qwen": ((23.5, 23.5), (12, 23.5), (16, 8)),
    "mha": ((23.5, 23.5), (14, 20)),
    "window": ((23.5, 23.5), (20, 14)),
    "moe": ((40, 40), (30, 44)),
}
MODELS = {
    "glm": "glm-4.1v-9b",
    "qwen": "qwen2.5-vl-7b",
    "mha": "llava-1.5-13b",
    "window": "gemma-3-12b",
    "moe": "qwen3-vl-30b-a3b",
}
SCENARIOS = {
    f"{name}:{'+'.join(map(str, free))}": (MODELS[name], free) for name, scenarios in ASKED.items() for free in scenarios
}


class Out:
    """Rows, on disk as soon as they are known."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "frontier.json"
        self._rows: list[dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else []

    def add(self, **row: Any) -> None:
        """Print and save."""
        self._rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        self._path.write_text(json.dumps(self._rows, indent=0))


class Subject:
    """A model that can be put on the GPUs again and again."""

    def __init__(self, name: str) -> None:
        config = config_of(name)
        text = config.get_text_config()
        text.max_position_embeddings = max(262_144, text.max_position_embeddings)
        with init_empty_weights(include_buffers=False):
            self.model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
        self.model.tie_weights()
        fields = config.to_dict()
        fields["architectures"] = [type(self.model).__name__]
        tensors, seen = {}, set()
        self.shapes = {}
        for key, parameter in self.model.named_parameters(remove_duplicate=False):
            self.shapes[key] = tuple(parameter.shape)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                tensors[key] = StoredTensor("BF16", tuple(parameter.shape), 2 * parameter.numel())
        self.profile = build_profile(Checkpoint(fields, tensors), name=name, origin="checkpoint")
        self.tied = {key for key in self.shapes if key not in tensors}
        self.buffers = {key: value.clone() for key, value in self.model.named_buffers()}

    def place(self, device_map: dict[str, int]) -> None:
        """Put weights of zeros where a map wants them, cut out of one segment a GPU, and dispatch."""
        self.remove()
        owner = {key: _device(device_map, key) for key in [*self.shapes, *self.buffers]}
        sizes = [0, 0]
        for key, shape in self.shapes.items():
            if key not in self.tied:
                sizes[owner[key]] += 2 * torch.Size(shape).numel()
        for gpu, size in enumerate(sizes):
            if size:
                torch.empty(size, dtype=torch.uint8, device=gpu)
        for key, shape in self.shapes.items():
            if key not in self.tied:
                self._set(key, torch.zeros(shape, dtype=torch.bfloat16, device=owner[key]))
        for key, value in self.buffers.items():
            module, _, leaf = key.rpartition(".")
            self.model.get_submodule(module)._buffers[leaf] = value.to(owner[key])
        if self.tied:
            self.model.tie_weights()
        dispatch_model(self.model, device_map, skip_keys=self.model._skip_keys_device_placement, force_hooks=True)

    def _set(self, key: str, value: torch.Tensor) -> None:
        module, _, leaf = key.rpartition(".")
        self.model.get_submodule(module)._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)

    def remove(self) -> None:
        """Take everything off the GPUs."""
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(self.model)
        for key, shape in self.shapes.items():
            self._set(key, torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        for key, value in self.buffers.items():
            module, _, leaf = key.rpartition(".")
            self.model.get_submodule(module)._buffers[leaf] = value
        clean()

    def ask(self, text_tokens: int, edge: int = 0) -> bool:
        """Read a prompt and make two tokens; False when memory runs out."""
        try:
            with torch.inference_mode():
                self.model.generate(
                    **self._inputs(text_tokens, edge),
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    do_sample=False,
                )
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            clean()

    def _inputs(self, text_tokens: int, edge: int) -> dict[str, Any]:
        config = self.model.config
        if edge:
            rule = self.profile.image
            assert rule is not None
            side = edge // (rule.patch * rule.merge)
            made = image_inputs(config, side**2, text_tokens, 1, edge=side * rule.patch * rule.merge, sequences=1)
            return {key: value.to(self.model.device) for key, value in made.items()}
        ids = torch.full((1, text_tokens), 5, device=self.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.model_type == "gemma3":
            inputs["token_type_ids"] = torch.zeros_like(ids)
        return inputs


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _device(device_map: dict[str, int], key: str) -> int:
    while key not in device_map:
        if not key:
            return 0
        key = key.rpartition(".")[0]
    return device_map[key]


def longest(subject: Subject, start: int, deadline: float) -> int:
    """The longest prompt up to which all that are tried run, to within 1 %."""
    low, high, tokens = 0, 0, max(64, start)
    while time.monotonic() < deadline:
        if subject.ask(tokens):
            low = tokens
        else:
            high = tokens
        if not high:
            tokens = int(tokens * 1.08)
        elif not low:
            tokens = int(tokens * 0.92)
        elif high - low <= max(1, PRECISION * low):
            break
        else:
            tokens = (low + high) // 2
        if tokens < 64:
            break
    # Memory fails in gaps: the longest prompt is the one up to which all run.
    for share in (0.98, 0.95, 0.92, 0.89):
        if time.monotonic() < deadline and not subject.ask(int(low * share)):
            print(f"a gap at {int(low * share)} below {low}", flush=True)
            low = int(low * (share - 0.015))
    return low


def scenario(name: str, out: Out, deadline: float) -> None:
    """Everything about one model on cards with so much free. The ballast is there already."""
    model_name, free = SCENARIOS[name]
    subject = Subject(model_name)
    machine = collect(with_torch=False)
    started = time.perf_counter()
    planned = plan(subject.profile, machine, WORKLOAD, POLICY)
    seconds = round(time.perf_counter() - started, 3)
    if not planned.fits:
        out.add(scenario=name, fits=False, why=planned.shortage.message if planned.shortage else "")
        return
    promised = planned.longest_prompt_tokens or 0
    layers = [sum(".layers." in key for key in stage.keys) for stage in planned.stages]
    gpus = [stage.gpu for stage in planned.stages]
    torch.cuda.init()
    device_map = {key: gpus[position] for key, position in planned.device_map.items() if isinstance(position, int)}
    subject.place(device_map)
    subject.ask(32)
    truth(subject, machine, planned, name, out, deadline)
    is_kept = subject.ask(promised)
    own = longest(subject, promised, deadline)
    out.add(
        scenario=name, what="plan", gpus=gpus, layers=layers, seconds=seconds, promised=promised, promise_ran=is_kept,
        longest=own, promised_over_longest=round(promised / max(1, own), 3),
        tenth_more_ran=subject.ask(int(promised * 1.1)),
    )  # fmt: skip
    brute_force(subject, machine, name, out, own, device_map, deadline)
    careless = auto_map(subject, free)
    if time.monotonic() < deadline - 10 and careless is not None:
        subject.place(careless)
        runs = subject.ask(64)
        reached = longest(subject, int(own * 0.6), deadline) if runs else 0
        cut = sum(".layers." in key and device == 0 for key, device in careless.items())
        out.add(
            scenario=name, what="auto", layers_on_first=cut, longest=reached, plan_over_auto=round(own / max(1, reached), 2)
        )
    subject.remove()


def truth(subject: Subject, machine: Any, planned: Any, name: str, out: Out, deadline: float) -> None:
    """Predicted and measured peaks on the planner's map."""
    promised = planned.longest_prompt_tokens or 0
    cases = [(share, 0) for share in (0.1, 0.4, 0.8)]
    if subject.profile.image is not None and subject.profile.image.kind == "merge":
        cases += [(0.0, 1120), (0.0, 2240)]
    for share, edge in cases:
        if time.monotonic() > deadline - 30:
            return
        text = max(64, int(promised * share))
        workload = msgspec.structs.replace(
            WORKLOAD, text_tokens=text, images=int(bool(edge)), image_height=edge or None, image_width=edge or None
        )
        stages = stages_for(subject, machine, planned, workload)
        for stage in stages:
            torch.cuda.reset_peak_memory_stats(stage.gpu)
        ran = subject.ask(text, edge)
        for stage in stages:
            peak, reserved = torch.cuda.max_memory_allocated(stage.gpu), torch.cuda.max_memory_reserved(stage.gpu)
            out.add(
                scenario=name, what="truth", gpu=stage.gpu, text=text, edge=edge, ran=ran,
                predicted=stage.peak_bytes, measured=peak, error=round(stage.peak_bytes / peak - 1, 5),
                predicted_reserved=stage.reserved_bytes, reserved=reserved,
                reserved_error=round(stage.reserved_bytes / reserved - 1, 4),
            )  # fmt: skip


def stages_for(subject: Subject, machine: Any, planned: Any, workload: Workload) -> Any:
    """The ledger of a plan's map for another workload."""
    from vlm_doctor.planner import account

    problem = problem_of(subject, machine, workload)
    return account.stages(problem, split_of(problem, planned.stages))


def problem_of(subject: Subject, machine: Any, workload: Workload) -> Any:
    found = budgets(machine, POLICY)
    return ask(subject.profile, workload, POLICY, machine, chain=chain(subject.profile), found=found)


def split_of(problem: Any, stages: Any) -> Split:
    """A plan's stages as a split of the chain."""
    position = {budget.gpu.index: number for number, budget in enumerate(problem.budgets)}
    ends, units = [], 0
    sizes = [len(stage.keys) for stage in stages]
    for number, atom in enumerate(problem.atoms, start=1):
        units += len(atom.units)
        if units == sum(sizes[: len(ends) + 1]):
            ends.append(number)
    return Split(tuple(position[stage.gpu] for stage in stages), tuple(ends))


def brute_force(
    subject: Subject, machine: Any, name: str, out: Out, own: int, chosen: dict[str, int], deadline: float
) -> None:
    """Ask the other cuts for 3 % more, those that the formulas rank highest first."""
    problem = problem_of(subject, machine, WORKLOAD)
    atoms = len(problem.atoms)
    ranked = []
    for gpus in ((0, 1), (1, 0)):
        for end in range(1, atoms):
            split = Split(gpus, (end, atoms))
            bound = problem.bare.longest_text_tokens(split)
            if bound is not None and bound >= own * BETTER:
                ranked.append((problem.longest_text_tokens(split) or 0, bound, split))
    ranked.sort(key=lambda entry: (-entry[0], -entry[1]))
    asked = better = 0
    best = own
    for priced, bound, split in ranked:
        device_map = map_of(problem, split)
        if device_map == chosen:
            continue
        if asked == MOST_CUTS or time.monotonic() > deadline - 15:
            break
        asked += 1
        subject.place(device_map)
        if subject.ask(int(own * BETTER)):
            better += 1
            reached = longest(subject, int(own * BETTER), deadline)
            best = max(best, reached)
            out.add(
                scenario=name,
                what="other cut",
                gpus=split.gpus,
                end=split.ends[0],
                priced=priced,
                bound=bound,
                longest=reached,
            )
    out.add(
        scenario=name, what="brute force", possible=len(ranked), asked=asked, better=better,
        plan_over_best=round(own / max(1, best), 4),
    )  # fmt: skip


def map_of(problem: Any, split: Split) -> dict[str, int]:
    return {
        unit.key: problem.budgets[gpu].gpu.index
        for gpu, (first, end) in zip(split.gpus, split.runs, strict=True)
        for atom in problem.atoms[first:end]
        for unit in atom.units
    }


def auto_map(subject: Subject, free: tuple[float, float]) -> dict[str, int] | None:
    """What ``device_map="auto"`` makes of the same free memory, by accelerate's own functions."""
    subject.remove()
    classes = list(subject.model._no_split_modules or [])
    budget: dict[Any, int] = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in (0, 1)}
    budget["cpu"] = 200 * GIB
    balanced = get_balanced_memory(subject.model, budget, no_split_module_classes=classes, dtype=torch.bfloat16)
    found = infer_auto_device_map(subject.model, balanced, no_split_module_classes=classes, dtype=torch.bfloat16)
    if any(not isinstance(device, int) for device in found.values()):
        print(f"auto spills: {sorted({str(device) for device in found.values()})} at {free}", flush=True)
        return None
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=540)
    parser.add_argument("--each", type=float, default=110)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("scenarios", nargs="*")
    options = parser.parse_args()
    if options.child:
        scenario(options.scenarios[0], Out(options.out), time.monotonic() + options.each)
        return
    end = time.monotonic() + options.budget
    for name in options.scenarios or SCENARIOS:
        left = end - time.monotonic()
        if left < 40:
            print("no time left for", name, flush=True)
            continue
        free = [str(gib) for gib in SCENARIOS[name][1]]
        ballast = subprocess.Popen(
            [sys.executable, str(HERE / "ballast.py"), *free], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert ballast.stdout is not None
        print(f"== {name}: {ballast.stdout.readline().strip()}", flush=True)
        each = min(options.each, left - 25)
        words = [sys.executable, __file__, "--out", str(options.out), "--child", "--each", str(each), name]
        try:
            subprocess.run(words, timeout=each + 25, check=False)
        except subprocess.TimeoutExpired:
            print(name, "timed out", flush=True)
        ballast.communicate("")


if __name__ == "__main__":
    main()
