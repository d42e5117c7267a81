"""Brute force without a GPU: every contiguous cut in both orders of two GPUs (of more, the
neighbours of the plan's), replayed through torch's allocator.

    python benchmarks/cuts.py [--images] [SCENARIO ...]

Scenarios are those of ``frontier.py``, or others in their manner: ``qwen:10+10``. For each the planner's own cut and
promise, and the longest prompt of the best other cut, walked up in steps of 1 % from 94 % of the promise until one fails.
With ``--images`` the largest square image instead, beside 64 text tokens, of the plan for an image of 1120 pixels and of
every cut that takes such a one, and whether a plan for the best of these images fits.
That the replay tells what GPUs do is what ``frontier.py`` and tests/doctor/planner/test_replay.py show.
"""

from __future__ import annotations

import math
import sys
import time
from functools import cache
from typing import Any

import frontier
import msgspec

from vlm_doctor import Machine, load_machine
from vlm_doctor.planner import plan
from vlm_doctor.planner.image_tokens import image_rule
from vlm_doctor.planner.order import Split
from vlm_doctor.planner.place import largest
from vlm_doctor.planner.settle import takes_anyway
from vlm_doctor.planner.validate import MAX_EDGE

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
    planned = plan(model.profile, machine, frontier.WORKLOAD, frontier.policy_for(len(free)))
    seconds = time.perf_counter() - started
    if not planned.fits:
        return "does not fit"
    promised = planned.longest_prompt_tokens or 0
    problem = frontier.problem_of(model, machine, frontier.WORKLOAD)
    others = frontier.others(problem, frontier.map_for(planned))
    possible = [split for split in others if (problem.bare.longest_text_tokens(split) or 0) > promised * START]
    best = max((reach(problem, split, promised) for split in possible), default=0)
    cut = ", ".join(f"{sum('.layers.' in key for key in stage.keys)} on GPU {stage.gpu}" for stage in planned.stages)
    return f"{cut} | {promised:,} | {best:,} of {len(possible)} | {promised / max(best, promised):.3f} | {seconds:.2f}"


def largest_image(problem: Any, split: Split, cell: int, most: int) -> int:
    """Edge in pixels of the largest square image, found by halving; 0 where even the first cell does not run."""

    def runs(cells: int) -> bool:
        asked = problem.changed(image_height=cells * cell, image_width=cells * cell)
        return asked.bare.split_fits(split) and takes_anyway(asked, split, asked.workload.text_tokens)

    return cell * largest(0, most, lambda cells: cells == 0 or runs(cells))


def judge_images(name: str, free: tuple[float, ...]) -> str:
    model, machine = subject(name), machine_of(free)
    workload = frontier.IMAGE
    rule = image_rule(model.profile)
    assert rule is not None
    cell = rule.patch * rule.merge
    most = (math.isqrt(rule.max_pixels) if rule.max_pixels else MAX_EDGE) // cell
    planned = plan(model.profile, machine, workload, frontier.policy_for(len(free)))
    if not planned.fits or planned.limits is None:
        return "does not fit"
    promised = planned.limits.image_edge or 0
    problem = frontier.problem_of(model, machine, workload)
    others = frontier.others(problem, frontier.map_for(planned))
    possible = [split for split in others if problem.bare.split_fits(split)]
    mine = largest_image(problem, frontier.split_of(problem, planned.stages), cell, most)
    best = max((largest_image(problem, split, cell, most) for split in possible), default=0)
    cut = ", ".join(f"{sum('.layers.' in key for key in stage.keys)} on GPU {stage.gpu}" for stage in planned.stages)
    ratio = (mine / max(best, mine)) ** 2
    wanted = msgspec.structs.replace(workload, image_height=max(best, mine), image_width=max(best, mine))
    again = "fits" if plan(model.profile, machine, wanted, frontier.policy_for(len(free))).fits else "does not fit"
    return f"{cut} | {promised} | {mine} | {best} of {len(possible)} | {ratio:.3f} | {again}"


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--images"]
    of_images = len(words) < len(sys.argv) - 1
    headings = (
        "model | free GiB | layers | promised | own | best other cut | pixels: plan / best | plan for the best"
        if of_images
        else "model | free GiB | layers | promised | best other cut | plan / best | plan, s"
    )
    print(f"| {headings} |")
    print("| --- " * (headings.count("|") + 1) + "|")
    for text in words or frontier.SCENARIOS:
        name, free = frontier.MODELS[text.partition(":")[0]], frontier.cards_of(text)
        row = (judge_images if of_images else judge)(name, free)
        print(f"| {name} | {'+'.join(f'{gib:g}' for gib in free)} | {row} |", flush=True)


if __name__ == "__main__":
    main()
