"""Hold the planner against real GPUs: longest prompts, brute force over cuts, ``auto``; predicted and measured peaks.

    python benchmarks/frontier.py --out FOLDER [--budget SECONDS] [SCENARIO ...]

A scenario is a model at its published dimensions (weights of zeros, bfloat16, made on the GPUs, never on disk) and the
memory that is free on each GPU, which ``ballast.py`` brings about by holding the rest: ``qwen:12+23.5``. In it:

- the planner plans for the machine as it finds it (NVML), with no headroom;
- the map is loaded as transformers 5 loads one (weights cut out of one segment a GPU) and dispatched by accelerate;
- ``truth``: peaks of several prompts and images, predicted and measured, allocated and reserved;
- ``frontier``: the longest text prompt that runs, found by doubling and halving to 1 %, whether what was promised ran, and
  whether a tenth more ran out;
- ``auto``: accelerate's own map for the same free memory, likewise;
- ``images``: a plan for an image of 1120 pixels, the largest it promises beside 64 text tokens, and the largest that runs;
- ``brute force``: every other contiguous cut in both orders of two GPUs (of more: each boundary moved by one) that what
  lives at once does not rule out is asked for 3 % more than the planner's map reached, and measured when it gives it.

Needs GPUs of 80 GiB, torch, transformers and accelerate. Rows go to ``frontier.json`` in FOLDER as they come.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from ballast import held
from traced_models import config_of, image_inputs

from vlm_doctor.planner import plan
from vlm_doctor.planner.budget import budgets
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.map_names import owner
from vlm_doctor.planner.order import Split
from vlm_doctor.planner.problem import ask
from vlm_doctor.planner.validate import MAX_EDGE
from vlm_doctor.sources import collect
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile
from vlm_doctor.visibility import visible_gpus
from vlm_doctor.workload import Policy, Workload

GIB = 2**30
NEW_TOKENS = 2
PRECISION = 0.01
WORKLOAD = Workload(images=0, text_tokens=256, new_tokens=NEW_TOKENS)
POLICY = Policy(min_gpus=2, max_gpus=2, headroom_fraction=0.0, headroom_min_bytes=0)
IMAGE = msgspec.structs.replace(WORKLOAD, images=1, image_height=1120, image_width=1120, text_tokens=64)
BETTER = 1.03
TRIES = 4
MOST_CUTS = 8
"""Of those that the formulas rank highest, the planner's own not counted."""
ASKED = {
    "glm": ((23.5, 23.5), (12, 23.5), (23.5, 12), (16, 10), (40, 12)),
    "qwen": ((23.5, 23.5), (12, 23.5), (16, 8)),
    "mha": ((23.5, 23.5), (14, 20)),
    "window": ((23.5, 23.5), (20, 14)),
    "moe": ((40, 40), (30, 44)),
    "72b": ((23.5,) * 8,),
}
MODELS = {
    "glm": "glm-4.1v-9b",
    "qwen": "qwen2.5-vl-7b",
    "mha": "llava-1.5-13b",
    "window": "gemma-3-12b",
    "moe": "qwen3-vl-30b-a3b",
    "72b": "qwen2.5-vl-72b",
}
SCENARIOS = [f"{name}:{'+'.join(map(str, free))}" for name, scenarios in ASKED.items() for free in scenarios]


def cards_of(scenario: str) -> tuple[float, ...]:
    """GiB that are free on each GPU."""
    return tuple(map(float, scenario.rpartition(":")[2].split("+")))


def policy_for(cards: int) -> Policy:
    """All GPUs of a scenario are to be used."""
    return msgspec.structs.replace(POLICY, min_gpus=cards, max_gpus=cards)


class Out:
    """Rows, on disk as soon as they are known."""

    def __init__(self, folder: Path, name: str = "frontier.json") -> None:
        self._path = folder / name
        self._rows: list[dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else []

    def add(self, **row: Any) -> None:
        """Print and save."""
        self._rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        self._path.write_text(json.dumps(self._rows, indent=0))

    def find(self, scenario: str, what: str) -> dict[str, Any] | None:
        """The row of a step that was done already."""
        rows = (row for row in self._rows if row.get("scenario") == scenario and row.get("what") == what)
        return next(rows, None)


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
        self.fields = fields
        self.profile = build_profile(Checkpoint(fields, tensors), name=name, origin="checkpoint")
        self.tied = {key for key in self.shapes if key not in tensors}
        self.buffers = {key: value.clone() for key, value in self.model.named_buffers()}

    def place(self, device_map: dict[str, int], *, is_renumbered: bool = True) -> None:
        """Put weights of zeros where a map wants them, cut out of one segment a GPU, and dispatch.

        Args:
            device_map: Module and GPU.
            is_renumbered: The GPU that the model begins on is the first for torch, as in a plan's snippet; otherwise
                accelerate takes all inputs to GPU 0 first.
        """
        self.remove()
        gpus = {key: device_map.get(owner(device_map, key) or "", 0) for key in [*self.shapes, *self.buffers]}
        sizes = [0] * torch.cuda.device_count()
        for key, shape in self.shapes.items():
            if key not in self.tied:
                sizes[gpus[key]] += 2 * torch.Size(shape).numel()
        for gpu, size in enumerate(sizes):
            if size:
                torch.empty(size, dtype=torch.uint8, device=gpu)
        for key, shape in self.shapes.items():
            if key not in self.tied:
                self._set(key, torch.zeros(shape, dtype=torch.bfloat16, device=gpus[key]))
        for key, value in self.buffers.items():
            module, _, leaf = key.rpartition(".")
            self.model.get_submodule(module)._buffers[leaf] = value.to(gpus[key])
        if self.tied:
            self.model.tie_weights()
        first = next(iter(device_map.values())) if is_renumbered else None
        skipped = self.model._skip_keys_device_placement
        dispatch_model(self.model, device_map, main_device=first, skip_keys=skipped, force_hooks=True)

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
    # What a peer copy still reads must not be given back under it.
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)
    torch.cuda.empty_cache()


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
    free = cards_of(name)
    subject = Subject(MODELS[name.partition(":")[0]])
    machine = collect(with_torch=False)
    started = time.perf_counter()
    planned = plan(subject.profile, machine, WORKLOAD, policy_for(len(free)))
    seconds = round(time.perf_counter() - started, 3)
    if not planned.fits:
        out.add(scenario=name, fits=False, why=planned.shortage.message if planned.shortage else "")
        return
    torch.cuda.init()
    device_map = map_for(planned)
    done = out.find(name, "plan") or ours(subject, machine, planned, name, out, seconds, deadline)
    own = done["longest"]
    if not out.find(name, "auto"):
        auto(subject, name, out, own, deadline)
    if not out.find(name, "images"):
        images(subject, machine, name, out, deadline)
    brute_force(subject, machine, name, out, own, device_map, deadline)
    subject.remove()


def ours(
    subject: Subject, machine: Any, planned: Any, name: str, out: Out, seconds: float, deadline: float
) -> dict[str, Any]:
    """How far the planner's map goes, and whether it is as was said."""
    promised = planned.longest_prompt_tokens or 0
    subject.place(map_for(planned))
    subject.ask(32)
    if not out.find(name, "truth"):
        truth(subject, machine, planned, name, out, deadline)
    is_kept = subject.ask(promised)
    own = longest(subject, promised, deadline)
    row = {
        "gpus": [stage.gpu for stage in planned.stages], "layers": layers_of(planned), "seconds": seconds,
        "promised": promised, "promise_ran": is_kept, "longest": own,
        "promised_over_longest": round(promised / max(1, own), 3), "tenth_more_ran": subject.ask(int(promised * 1.1)),
    }  # fmt: skip
    out.add(scenario=name, what="plan", **row)
    return row


def layers_of(planned: Any) -> list[int]:
    """Text layers of each stage."""
    return [sum(".layers." in key for key in stage.keys) for stage in planned.stages]


def map_for(planned: Any) -> dict[str, int]:
    """A plan's map with GPUs as torch numbers them."""
    gpus = [stage.gpu for stage in planned.stages]
    return {key: ordinal(gpus[position]) for key, position in planned.device_map.items() if isinstance(position, int)}


def ordinal(gpu: int) -> int:
    """How torch numbers a GPU in this process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",").index(str(gpu)) if named else gpu


def auto(subject: Subject, name: str, out: Out, own: int, deadline: float) -> None:
    """How far accelerate's map goes."""
    careless = auto_map(subject, cards_of(name))
    if isinstance(careless, str):
        out.add(scenario=name, what="auto", spills=careless)
    elif time.monotonic() < deadline - 10:
        subject.place(careless)
        runs = subject.ask(64)
        reached = longest(subject, int(own * 0.6), min(deadline, time.monotonic() + 45)) if runs else 0
        cut = sum(".layers." in key and device == 0 for key, device in careless.items())
        out.add(
            scenario=name, what="auto", layers_on_first=cut, longest=reached, plan_over_auto=round(own / max(1, reached), 2)
        )


def images(subject: Subject, machine: Any, name: str, out: Out, deadline: float) -> None:
    """The largest square image that a plan for a smaller one promises, and the largest that runs."""
    rule = subject.profile.image
    if rule is None or rule.kind != "merge" or time.monotonic() > deadline - 25:
        return
    policy = policy_for(len(cards_of(name)))
    planned = plan(subject.profile, machine, IMAGE, policy)
    # GPUs as torch numbers them: accelerate then takes all inputs to the first, wherever the model begins.
    keeping = plan(subject.profile, machine, IMAGE, msgspec.structs.replace(policy, keeps_numbers=True))
    if not planned.fits or planned.limits is None or keeping.limits is None:
        out.add(scenario=name, what="images", fits=False)
        return
    cell = rule.patch * rule.merge
    most = (math.isqrt(rule.max_pixels) if rule.max_pixels else MAX_EDGE) // cell * cell
    promised_there = keeping.limits.image_edge or 0
    subject.place(map_for(keeping), is_renumbered=False)
    is_kept_there = subject.ask(64, promised_there)
    promised = planned.limits.image_edge or 0
    subject.place(map_for(planned))
    is_kept = subject.ask(64, promised)
    edge, reached = promised, promised if is_kept else 0
    while is_kept and edge < most and time.monotonic() < deadline:
        edge = min(most, edge + max(cell, int(edge * 0.02) // cell * cell))
        if not subject.ask(64, edge):
            break
        reached = edge
    out.add(
        scenario=name, what="images", layers=layers_of(planned), gpus=[stage.gpu for stage in planned.stages],
        promised=promised, promise_ran=is_kept, largest=reached, most=most,
        with_numbers_kept={"promised": promised_there, "promise_ran": is_kept_there},
    )  # fmt: skip


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
            torch.cuda.reset_peak_memory_stats(ordinal(stage.gpu))
        ran = subject.ask(text, edge)
        for stage in stages:
            device = ordinal(stage.gpu)
            peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
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
    policy = policy_for(len(visible_gpus(machine).gpus))
    return ask(subject.profile, workload, policy, machine, chain=chain(subject.profile), found=budgets(machine, policy))


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
    ranked = []
    for split in others(problem, chosen):
        bound = problem.bare.longest_text_tokens(split)
        if bound is not None and bound >= own * BETTER:
            ranked.append((problem.longest_text_tokens(split) or 0, bound, split))
    ranked.sort(key=lambda entry: (-entry[0], -entry[1]))
    asked = better = 0
    best = own
    for priced, bound, split in ranked:
        if asked == MOST_CUTS or time.monotonic() > deadline - 15:
            break
        asked += 1
        subject.place(map_of(problem, split))
        if subject.ask(int(own * BETTER)):
            better += 1
            reached = longest(subject, int(own * BETTER), deadline)
            best = max(best, reached)
            out.add(
                scenario=name,
                what="other cut",
                gpus=split.gpus,
                ends=split.ends[:-1],
                priced=priced,
                bound=bound,
                longest=reached,
            )
    out.add(
        scenario=name, what="brute force", possible=len(ranked), asked=asked, better=better,
        plan_over_best=round(own / max(1, best), 4),
    )  # fmt: skip


def others(problem: Any, chosen: dict[str, int]) -> list[Split]:
    """All cuts of two GPUs in both orders; of more, the chosen one with each boundary moved by one."""
    atoms = len(problem.atoms)
    if len(problem.budgets) == 2:
        every = [Split(gpus, (end, atoms)) for gpus in ((0, 1), (1, 0)) for end in range(1, atoms)]
        return [split for split in every if map_of(problem, split) != chosen]
    owners = [chosen[atom.units[0].key] for atom in problem.atoms]
    ends = [number for number in range(1, atoms) if owners[number] != owners[number - 1]]
    position = {ordinal(budget.gpu.index): number for number, budget in enumerate(problem.budgets)}
    gpus = tuple(position[owners[end - 1]] for end in [*ends, atoms])
    moved = [[*ends[:at], end + by, *ends[at + 1 :], atoms] for at, end in enumerate(ends) for by in (-1, 1)]
    return [Split(gpus, tuple(each)) for each in moved if sorted({*each, 0}) == [0, *each]]


def map_of(problem: Any, split: Split) -> dict[str, int]:
    return {
        unit.key: ordinal(problem.budgets[gpu].gpu.index)
        for gpu, (first, end) in zip(split.gpus, split.runs, strict=True)
        for atom in problem.atoms[first:end]
        for unit in atom.units
    }


def auto_map(subject: Subject, free: tuple[float, ...]) -> dict[str, int] | str:
    """What ``device_map="auto"`` makes of the same free memory, by accelerate's own functions; where it spills to."""
    subject.remove()
    classes = list(subject.model._no_split_modules or [])
    budget: dict[Any, int] = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(len(free))}
    budget["cpu"] = 200 * GIB
    balanced = get_balanced_memory(subject.model, budget, no_split_module_classes=classes, dtype=torch.bfloat16)
    found = infer_auto_device_map(subject.model, balanced, no_split_module_classes=classes, dtype=torch.bfloat16)
    elsewhere = sorted({str(device) for device in found.values() if not isinstance(device, int)})
    return ", ".join(elsewhere) if elsewhere else dict(found)


def run(name: str, out: Path, end: float) -> None:
    """A scenario in a process of its own, and what is left of it in another where that one dies.

    After out of memory on two GPUs torch 2.11 sometimes dies of "unspecified launch failure".
    """
    for _ in range(TRIES):
        each = end - time.monotonic()
        words = [sys.executable, __file__, "--out", str(out), "--child", "--each", str(each), name]
        try:
            if each < 15 or subprocess.run(words, timeout=each + 25, check=False).returncode == 0:
                return
        except subprocess.TimeoutExpired:
            print(name, "timed out", flush=True)
            return


def begun(names: Iterable[str], budget_s: float, least_s: float) -> Iterator[tuple[str, float]]:
    """Scenarios that there is time for, each with its cards as they are to be, and the seconds that are left for all."""
    end = time.monotonic() + budget_s
    for name in names:
        left = end - time.monotonic()
        if left < least_s:
            print("no time left for", name, flush=True)
            continue
        with held(cards_of(name)) as line:
            print(f"== {name}: {line}", flush=True)
            yield name, left


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=540)
    parser.add_argument("--each", type=float, default=110)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("scenarios", nargs="*")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        scenario(options.scenarios[0], Out(options.out), time.monotonic() + options.each)
        return
    for name, left in begun(options.scenarios or SCENARIOS, options.budget, 40):
        run(name, options.out, time.monotonic() + min(options.each, left - 25))


if __name__ == "__main__":
    main()
