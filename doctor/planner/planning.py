"""The planner's one entry point: put its parts together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from ..machine import Machine
from ..model import ModelProfile
from ..placement import Plan, Stage
from ..trace import Traces
from ..workload import Policy, Workload
from . import account
from .budget import Budgets, Exclusion, budgets
from .constraints import can_break_tower, chain
from .installed import as_loaded
from .levers import levers_that_save, shortage
from .memory import loaded_dtype
from .offload import offloaded, with_offload
from .pins import validate_pins
from .problem import Problem, ask
from .search import Choice
from .traced import IrregularError, Regimes
from .validate import validate_policy, validate_workload

_DEFAULT_WORKLOAD = Workload()
_DEFAULT_POLICY = Policy()


_Question = tuple[Problem, tuple[Exclusion, ...]]
"""And the GPUs that are not considered."""


class _Answer(msgspec.Struct, frozen=True):
    """A question, its answer, and the GPUs that were not considered."""

    problem: Problem
    choice: Choice | None
    excluded: tuple[Exclusion, ...]


def plan(
    profile: ModelProfile,
    machine: Machine,
    workload: Workload = _DEFAULT_WORKLOAD,
    policy: Policy = _DEFAULT_POLICY,
    *,
    traces: Traces | None = None,
    untraced: str | None = None,
) -> Plan:
    """Find where each unit of a model goes.

    What is harmless is tried before what is not: the vision tower as a whole before cuts between its blocks, then GPUs with
    a known fault, and at last, where the policy allows it, host memory for the last layers.

    Args:
        profile: The model, from its config and headers.
        machine: Live, recorded or synthetic.
        workload: One call of the model, at its largest.
        policy: How careful to be, and which GPUs may be used.
        traces: Allocations of the model's real code for this workload (``vlm_doctor.trace_model``), which take the place
            of formulas; ``None`` plans by formulas.
        untraced: Why there are no traces although they were asked for; the plan says so.

    Returns:
        A plan. When nothing fits, ``fits`` is false, ``shortage`` says what is missing and what would help, and the
        stages are those of the split that comes closest.

    Raises:
        UsageError: Workload or policy make no sense, alone or for this model and machine.
        ModelFileError: The profile cannot be placed: it has no layers, or ties units that it does not have.
    """
    # Late: a sketch does without.
    from .auto import auto_placement
    from .cards import suggest_gpus
    from .limits import limits

    profile = as_loaded(profile, machine)
    validate_workload(workload, profile)
    validate_policy(policy, machine)
    found = budgets(machine, policy)
    validate_pins(policy, profile, chain(profile), found)
    if traces is not None:
        try:
            Regimes(traces, profile.text.sliding_window)
        except IrregularError as error:
            traces, untraced = None, str(error)
    answer = _answer(_questions(profile, machine, workload, policy, found=found, traces=traces), Problem.choose)
    problem, choice = answer.problem, answer.choice
    placed = _placed(answer)
    longest = choice.text_tokens + problem.footprint.images.tokens if choice else None
    return msgspec.structs.replace(
        placed,
        longest_prompt_tokens=longest,
        auto=auto_placement(problem, split=choice.split if choice else None, longest_prompt_tokens=longest),
        limits=limits(problem, choice.split, choice.text_tokens) if choice else None,
        levers=levers_that_save(problem, choice.split) if choice and workload.training else (),
        gpu_sets=() if choice else suggest_gpus(profile, workload, policy),
        notes=_notes(placed.notes, untraced),
        tier="formulas" if traces is None else "traced",
    )


def sketch(profile: ModelProfile, machine: Machine, workload: Workload, policy: Policy) -> Plan:
    """A plan at a glance: placed by formulas, and held against torch's allocator for the workload alone.

    It fits where it says so, and does without what takes longest: which of the splits that are nearly as good goes
    furthest, how far the workload can grow, what ``auto`` would have done. Arguments and errors as for :func:`plan`.
    """
    profile = as_loaded(profile, machine)
    validate_policy(policy, machine)
    questions = _questions(profile, machine, workload, policy, found=budgets(machine, policy), traces=None)
    answer = _answer(questions, _first_that_runs)
    return _placed(msgspec.structs.replace(answer, problem=_by_formulas(answer.problem)))


def _by_formulas(problem: Problem) -> Problem:
    return msgspec.structs.replace(problem, is_replayed=False, alike=problem)


def _first_that_runs(problem: Problem) -> Choice | None:
    choice = _by_formulas(problem).choose()
    return choice if choice is None or problem.split_fits(choice.split) else problem.choose()


def _placed(answer: _Answer) -> Plan:
    """Who goes where, and what each GPU then holds."""
    problem, choice = answer.problem, answer.choice
    profile, machine, workload = problem.profile, problem.machine, problem.workload
    footprint = problem.footprint
    split = choice.split if choice else problem.closest_split()
    stages = account.stages(problem, split) if split else ()
    return Plan(
        model=profile.name,
        revision=profile.revision,
        machine=machine.description,
        fits=choice is not None,
        workload=workload,
        dtype=loaded_dtype(profile, workload),
        prompt_tokens=workload.text_tokens + footprint.images.tokens,
        image_tokens=footprint.images.tokens,
        device_map=_device_map(problem, stages) if choice else {},
        max_memory={position: _weight_room(stage) for position, stage in enumerate(stages)} if choice else {},
        cuda_visible_devices=",".join(str(stage.gpu) if machine.origin == "synthetic" else stage.uuid for stage in stages),
        stages=stages,
        cuts=account.cuts(problem, split, choice.text_tokens if choice else None) if split else (),
        reasons=account.reasons(problem, choice, answer.excluded) if choice else (),
        offloaded=offloaded(problem, problem.budgets[choice.split.gpus[0]].gpu) if choice else None,
        shortage=None if choice else shortage(problem, stages, answer.excluded),
        notes=account.notes(problem, choice),
        is_remote_code=profile.is_remote_code,
        refuses_sdpa=profile.refuses_sdpa,
        needs_quantization=profile.quantization or workload.quantization,
    )


def _notes(notes: tuple[str, ...], untraced: str | None) -> tuple[str, ...]:
    if untraced is None:
        return notes
    return (*notes, f"The model was not traced, so that memory is told by formulas: {untraced.rstrip('.')}.")


def _answer(questions: Iterable[_Question], choose: Callable[[Problem], Choice | None]) -> _Answer:
    """The first question that has an answer, or the last one, which allows the most."""
    questions = list(questions)
    for problem, excluded in questions:
        choice = choose(problem)
        if choice is not None:
            return _Answer(problem, choice, excluded)
    if questions[-1][0].policy.offload:
        for problem, excluded in questions:
            candidate = with_offload(problem)
            if candidate is not None:
                return _Answer(candidate, candidate.choose(), excluded)
    problem, excluded = questions[-1]
    return _Answer(problem, None, excluded)


def _questions(
    profile: ModelProfile, machine: Machine, workload: Workload, policy: Policy, *, found: Budgets, traces: Traces | None
) -> Iterator[_Question]:
    """The same question with fewer and fewer scruples."""
    chains = [chain(profile)]
    if can_break_tower(profile):
        chains.append(chain(profile, breaks_tower=True))
    sparing = found.sparing({gpu for _, gpu in policy.pins})
    for gpus in [sparing, found] if sparing != found else [found]:
        for made in chains:
            yield ask(profile, workload, policy, machine, chain=made, found=gpus, traces=traces), gpus.excluded


def _device_map(problem: Problem, stages: tuple[Stage, ...]) -> dict[str, int | str]:
    """One key for the whole model on one GPU, else one for every unit: never a key and a key inside it.

    transformers 5 takes keys as prefixes of names, so that a parent's key and a child's would fight over the child.
    """
    if len(stages) == 1 and not problem.offloaded:
        return {"": 0}
    result: dict[str, int | str] = {key: position for position, stage in enumerate(stages) for key in stage.keys}
    result.update({unit.key: "cpu" for atom in problem.offloaded_atoms for unit in atom.units})
    return result


def _weight_room(stage: Stage) -> int:
    """Bytes that weights may take on a GPU, all else reserved: what accelerate calls ``max_memory``."""
    return sum(line.size_bytes for line in stage.ledger if line.kind in ("weights", "left"))
