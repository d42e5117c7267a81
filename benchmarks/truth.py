"""Measured peaks of ``frontier.py`` beside what the planner says today, by allocation scripts and by traces.

    python benchmarks/truth.py [benchmarks/results/2xh200-frontier.json]

Rows of that file are readings of GPUs: a model, a map, a prompt or an image, and most that torch had allocated and
reserved on each GPU. Here the same stages are priced anew, once by the scripts (or formulas) of the planner and
once from the model's own code, traced without weights by the installed transformers. Needs no GPU; some minutes.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import cuts
import frontier
import msgspec

from vlm_doctor.planner import account
from vlm_doctor.planner.budget import budgets
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.order import Split
from vlm_doctor.planner.problem import ask
from vlm_doctor.planner.traced import IrregularError
from vlm_doctor.planner.traced_footprint import trace_request
from vlm_doctor.sources.trace import trace
from vlm_doctor.workload import Workload

ROWS = Path(__file__).parent / "results" / "2xh200-frontier.json"
Readings = dict[tuple[int, int], dict[int, dict[str, Any]]]
"""By text tokens and edge of the image, then by GPU."""


def readings(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], Readings]]:
    """Scenarios with their plan and what was measured on its map."""
    for plan in (row for row in rows if row.get("what") == "plan"):
        found: Readings = {}
        for row in rows:
            if row["scenario"] == plan["scenario"] and row.get("what") == "truth" and row["ran"]:
                found.setdefault((row["text"], row["edge"]), {})[row["gpu"]] = row
        yield plan["scenario"], plan, found


def workload_of(text: int, edge: int) -> Workload:
    """As ``frontier.py`` asked."""
    fields: dict[str, Any] = {"images": 1, "image_height": edge, "image_width": edge} if edge else {}
    return msgspec.structs.replace(frontier.WORKLOAD, text_tokens=text, **fields)


def split_with(layers: list[int], gpus: list[int], atoms: Any) -> Split:
    """The split with so many layers on each GPU."""
    wanted, ends, count = list(accumulate(layers))[:-1], [], 0
    for end, atom in enumerate(atoms):
        has_layer = any(unit.role == "layer" for unit in atom.units)
        # A stage ends where the first layer of the next one is.
        if has_layer and len(ends) < len(wanted) and count == wanted[len(ends)]:
            ends.append(end)
        count += sum(unit.role == "layer" for unit in atom.units)
    return Split(tuple(gpus), (*ends, len(atoms)))


def priced(subject: Any, machine: Any, plan: dict[str, Any], workload: Workload, *, is_traced: bool) -> dict[int, Any]:
    """Stages by GPU."""
    policy = frontier.policy_for(len(machine.gpus))
    traces = None
    if is_traced:
        traces = trace(trace_request(subject.profile, workload, machine), subject.fields)
    links = chain(subject.profile)
    problem = ask(subject.profile, workload, policy, machine, chain=links, found=budgets(machine, policy), traces=traces)
    split = split_with(plan["layers"], plan["gpus"], problem.atoms)
    return {stage.gpu: stage for stage in account.stages(problem, split)}


def said(errors: list[float]) -> str:
    """Median of the absolute error, p95, largest, and the worst that was too low, in per cent."""
    sizes = sorted(map(abs, errors))
    figures = (statistics.median(sizes), sizes[int(0.95 * (len(sizes) - 1))], sizes[-1], min(0.0, *errors))
    return " | ".join(f"{100 * figure:.2f} %" for figure in figures)


def main() -> None:
    rows = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else ROWS).read_text())
    errors: dict[tuple[str, str, str], list[float]] = {}
    for scenario, plan, found in readings(rows):
        if 0 in plan["layers"]:  # the cut is inside of what comes before the layers
            continue
        subject = cuts.subject(frontier.MODELS[scenario.partition(":")[0]])
        machine = cuts.machine_of(frontier.cards_of(scenario))
        for (text, edge), by_gpu in sorted(found.items()):
            for tier, is_traced in (("scripts", False), ("traces", True)):
                try:
                    stages = priced(subject, machine, plan, workload_of(text, edge), is_traced=is_traced)
                except IrregularError as error:
                    print(f"{scenario} text {text} edge {edge} not traced: {error}")
                    continue
                for gpu, row in by_gpu.items():
                    stage, kind = stages[gpu], "images" if edge else "text"
                    for measure, told, was in (
                        ("allocated", stage.peak_bytes, row["measured"]),
                        ("reserved", stage.reserved_bytes, row["reserved"]),
                    ):
                        if told is not None:
                            errors.setdefault((tier, measure, kind), []).append(told / was - 1)
                            if abs(told / was - 1) > 0.01:
                                print(
                                    f"{scenario} text {text} edge {edge} GPU {gpu} {tier} {measure}: {told / was - 1:+.3%}"
                                )
        print(scenario, "done", file=sys.stderr, flush=True)
    print("| tier | measure | prompts | stages | median error | p95 | largest | worst too low |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (tier, measure, kind), values in sorted(errors.items()):
        print(f"| {tier} | {measure} | {kind} | {len(values)} | {said(values)} |")


if __name__ == "__main__":
    main()
