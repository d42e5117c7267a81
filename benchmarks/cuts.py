"""Brute force without a GPU: every contiguous cut in both orders of two GPUs, replayed through torch's allocator.

    python benchmarks/cuts.py [SCENARIO ...]

Scenarios are those of ``frontier.py``, or others in their manner: ``qwen:10+10``. For each the planner's own cut and
promise, and the longest prompt of the best other cut, walked up in steps of 1 % from 94 % of the promise until one fails.
That the replay tells what GPUs do is what ``frontier.py`` and tests/doctor/planner/test_replay.py show.
"""

from __future__ import annotations

import sys
import time
from functools import cache
from typing import Any

import frontier
import msgspec

from vlm_doctor import Machine, load_machine
from vlm_doctor.planner import plan
from vlm_doctor.planner.order import Split
from vlm_doctor.planner.settle import takes_anyway

START, STEP = 0.94, 1.01
HOPPER = (9, 0)


@cache
def subject(name: str) -> Any:
    return frontier.Subject(name)


def machine_of(free: tuple[float, ...]) -> Machine:
    machine = load_machine(",".join(f"{gib}GiB" for gib in free))
    return msgspec.structs.replace(
        machine, gpus=tuple(msgspec.structs.replace(gpu, compute_capability=HOPPER) for gpu in machine.gpus)
    )


def reach(problem: Any, split: Split, promised: int) -> int:
    """The longest prompt without a gap above the start; 0 where the start already fails."""
    tokens, reached = int(promised * START), 0
    while takes_anyway(problem, split, tokens):
        reached, tokens = tokens, int(tokens * STEP) + 1
    return reached


def judge(name: str, free: tuple[float, ...]) -> str:
    model, machine = subject(name), machine_of(free)
    started = time.perf_counter()
    planned = plan(model.profile, machine, frontier.WORKLOAD, frontier.POLICY)
    seconds = time.perf_counter() - started
    if not planned.fits:
        return "does not fit"
    promised = planned.longest_prompt_tokens or 0
    problem = frontier.problem_of(model, machine, frontier.WORKLOAD)
    own, atoms = frontier.split_of(problem, planned.stages), len(problem.atoms)
    others = [Split(gpus, (end, atoms)) for gpus in ((0, 1), (1, 0)) for end in range(1, atoms)]
    possible = [
        split for split in others if split != own and (problem.bare.longest_text_tokens(split) or 0) > promised * START
    ]
    best = max((reach(problem, split, promised) for split in possible), default=0)
    cut = ", ".join(f"{sum('.layers.' in key for key in stage.keys)} on GPU {stage.gpu}" for stage in planned.stages)
    return f"{cut} | {promised:,} | {best:,} of {len(possible)} | {promised / max(best, promised):.3f} | {seconds:.2f}"


def main() -> None:
    print("| model | free GiB | layers | promised | best other cut | plan / best | plan, s |")
    print("| --- " * 7 + "|")
    for text in sys.argv[1:] or frontier.SCENARIOS:
        key, _, cards = text.partition(":")
        print(
            f"| {frontier.MODELS[key]} | {cards} | {judge(frontier.MODELS[key], tuple(map(float, cards.split('+'))))} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
