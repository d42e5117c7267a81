"""The planner's one entry point: put its parts together."""

from __future__ import annotations

from ..machine import Machine
from ..model import ModelProfile
from ..placement import Plan, Stage
from ..topology import link_rank
from ..workload import Policy, Workload
from . import account
from .auto import auto_placement
from .budget import budgets
from .constraints import chain
from .levers import shortage
from .memory import loaded_dtype
from .order import Rank, Split
from .problem import Problem
from .search import choose, closest
from .validate import validate_policy, validate_workload

_DEFAULT_WORKLOAD = Workload()
_DEFAULT_POLICY = Policy()


def plan(
    profile: ModelProfile, machine: Machine, workload: Workload = _DEFAULT_WORKLOAD, policy: Policy = _DEFAULT_POLICY
) -> Plan:
    """Find where each unit of a model goes.

    Args:
        profile: The model, from its config and headers.
        machine: Live, recorded or synthetic.
        workload: One call of the model, at its largest.
        policy: How careful to be, and which GPUs may be used.

    Returns:
        A plan. When nothing fits, ``fits`` is false, ``shortage`` says what is missing and what would help, and the
        stages are those of the split that comes closest.

    Raises:
        UsageError: Workload or policy make no sense, alone or for this model and machine.
        ModelFileError: The profile cannot be placed: it has no layers, or ties units that it does not have.
    """
    validate_workload(workload, profile)
    validate_policy(policy, machine)
    found = budgets(machine, policy)
    problem = Problem(profile, chain(profile), workload, policy, found.usable)
    footprint = problem.footprint

    def rank(a: int, b: int) -> int:
        return link_rank(machine.link(found.usable[a].gpu.index, found.usable[b].gpu.index))

    choice = choose(footprint, problem.capacities, problem.counts, problem.most_text_tokens, rank)
    split = choice.split if choice else _closest_split(problem, rank)
    stages = account.stages(footprint, split, found.usable) if split else ()
    longest = choice.text_tokens + footprint.images.tokens if choice else None
    placed = [(stage.gpu, stage.keys) for stage in stages] if choice else []
    return Plan(
        model=profile.name,
        revision=profile.revision,
        machine=machine.description,
        fits=choice is not None,
        workload=workload,
        dtype=loaded_dtype(profile, workload),
        prompt_tokens=workload.text_tokens + footprint.images.tokens,
        image_tokens=footprint.images.tokens,
        device_map=_device_map(stages) if choice else {},
        max_memory={position: _weight_room(stage) for position, stage in enumerate(stages)} if choice else {},
        cuda_visible_devices=",".join(str(stage.gpu) if machine.origin == "synthetic" else stage.uuid for stage in stages),
        stages=stages,
        cuts=account.cuts(problem, split, machine) if split else (),
        reasons=account.reasons(problem, split, found.excluded) if choice and split else (),
        longest_prompt_tokens=longest,
        auto=auto_placement(problem, machine, plan_stages=placed, plan_longest=longest),
        shortage=None if choice else shortage(problem, stages, found.excluded),
        notes=account.notes(problem, choice),
        is_remote_code=profile.is_remote_code,
        needs_quantization=profile.quantization or workload.quantization,
    )


def _closest_split(problem: Problem, rank: Rank) -> Split | None:
    """The split that lacks least."""
    found = closest(problem.footprint, problem.capacities, problem.counts, rank)
    return found[1] if found else None


def _device_map(stages: tuple[Stage, ...]) -> dict[str, int]:
    """One key for the whole model on one GPU, else one for every unit: never a key and a key inside it.

    transformers 5 takes keys as prefixes of names, so that a parent's key and a child's would fight over the child.
    """
    if len(stages) == 1:
        return {"": 0}
    return {key: position for position, stage in enumerate(stages) for key in stage.keys}


def _weight_room(stage: Stage) -> int:
    """Bytes that weights may take on a GPU, all else reserved: what accelerate calls ``max_memory``."""
    return sum(line.size_bytes for line in stage.ledger if line.kind in ("weights", "left"))
