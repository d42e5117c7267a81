"""When nothing fits: what is missing, whether it can ever fit, and which single change would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from ..placement import Lever, Shortage, Stage
from ..units import format_gib
from .budget import Exclusion
from .image_tokens import image_edges
from .memory import item_bytes, loaded_dtype
from .place import largest
from .problem import Problem


def shortage(problem: Problem, stages: Sequence[Stage], excluded: Sequence[Exclusion]) -> Shortage:
    """Say by how much a model does not fit, and what would change that.

    Args:
        problem: The question that has no answer.
        stages: The split that comes closest; empty when there is none.
        excluded: GPUs that cannot be used.
    """
    if not stages:
        return _no_split(problem, excluded)
    tightest = min(stages, key=lambda stage: stage.left_bytes)
    missing_bytes = -tightest.left_bytes
    empty = msgspec.structs.replace(problem, budgets=tuple(budget.without_others() for budget in problem.budgets))
    message = (
        f"{problem.profile.name} does not fit: even the best split over {_gpus(len(stages))} lacks "
        f"{format_gib(missing_bytes)} on GPU {tightest.gpu}. {_proof(problem)}"
    )
    levers = _levers(problem, empty, -missing_bytes)
    return Shortage(
        missing_bytes=missing_bytes,
        message=message,
        is_permanent=not empty.fits() and all(left.is_permanent for left in excluded),
        levers=tuple(sorted(levers, key=lambda lever: not lever.fits)),
    )


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def _no_split(problem: Problem, excluded: Sequence[Exclusion]) -> Shortage:
    """There are too few GPUs, or too few parts, for any split at all."""
    name, parts = problem.profile.name, len(problem.chain.atoms)
    needed_bytes = problem.footprint.detail(0, parts, problem.workload.text_tokens).total_bytes
    usable, asked = len(problem.budgets), _gpus(problem.policy.min_gpus)
    why = f" ({'; '.join(f'GPU {left.gpu}: {left.reason}' for left in excluded)})" if excluded else ""
    if not usable:
        message = f"No GPU can be used{why}, and {name} needs {format_gib(needed_bytes)}."
    elif usable < problem.policy.min_gpus:
        message = f"At least {asked} are asked for, and {usable} can be used{why}."
    else:
        message = f"At least {asked} are asked for, and {name} can be cut into {parts} parts at most."
    return Shortage(missing_bytes=needed_bytes, message=message, is_permanent=all(left.is_permanent for left in excluded))


def _proof(problem: Problem) -> str:
    """A lower bound that no split can beat, where one of the two simple ones shows it."""
    footprint, capacities = problem.footprint, problem.capacities
    atoms = len(problem.chain.atoms)
    need = footprint.needs(problem.workload.text_tokens)
    whole = footprint.detail(0, atoms, problem.workload.text_tokens)
    fixed_bytes = whole.weights_bytes + whole.kv_cache_bytes
    room_bytes = sum(max(0, capacity) for capacity in capacities)
    largest_bytes, roomiest_bytes = max(need(atom, atom + 1) for atom in range(atoms)), max(capacities)
    if fixed_bytes > room_bytes:
        together = "this GPU" if len(capacities) == 1 else f"all {len(capacities)} GPUs together"
        return (
            f"Weights and KV cache alone take {format_gib(fixed_bytes)}, and {together} can give {format_gib(room_bytes)}."
        )
    if largest_bytes > roomiest_bytes:
        return (
            f"A part that cannot be cut needs {format_gib(largest_bytes)}, and the roomiest GPU can give "
            f"{format_gib(roomiest_bytes)}."
        )
    return "All cuts and all orders of the GPUs were compared."


MOST_MORE_GPUS = 15
"""With one that is there already: two of the largest machines that are sold with eight."""


class _Offer(msgspec.Struct, frozen=True):
    """A change to be tried: what it is called, and the question it leads to."""

    change: str
    problem: Problem


def _levers(problem: Problem, empty: Problem, margin_bytes: int) -> Iterator[Lever]:
    """Single changes that save memory, smallest first; what saves nothing is left out."""
    for offer in (*_switches(problem), *_reductions(problem), *_formats(problem), *_machines(problem, empty)):
        after_bytes = offer.problem.margin_bytes()
        if after_bytes is not None and after_bytes > margin_bytes:
            yield Lever(change=offer.change, saves_bytes=after_bytes - margin_bytes, fits=after_bytes >= 0)


def _switches(problem: Problem) -> Iterator[_Offer]:
    """The same answers by other means."""
    if problem.workload.attention == "eager":
        yield _Offer("use fused attention (sdpa) instead of eager", problem.changed(attention="sdpa"))
    if problem.workload.logits == "forward":
        yield _Offer("call generate instead of a plain forward", problem.changed(logits="generate"))


def _reductions(problem: Problem) -> Iterator[_Offer]:
    """Less to do: for each quantity the largest that fits, where one does."""
    workload, rule = problem.workload, problem.profile.image
    texts = problem.footprint.images.tokens == 0
    ranges: list[tuple[str, int, int, Callable[[int], Problem]]] = [
        ("prompt of at most {:,} text tokens", int(texts), workload.text_tokens, lambda n: problem.changed(text_tokens=n)),
        ("at most {:,} new tokens", 0, workload.new_tokens, lambda n: problem.changed(new_tokens=n)),
        ("batch of {:,}", 1, workload.batch, lambda n: problem.changed(batch=n)),
        ("{:,} images in each prompt", 1, workload.images, lambda n: problem.changed(images=n)),
    ]
    if rule and rule.kind == "merge" and workload.images:
        height, width = image_edges(rule, workload)
        longer = max(height, width)

        def resized(edge: int) -> Problem:
            return problem.changed(image_height=max(1, height * edge // longer), image_width=max(1, width * edge // longer))

        ranges.append(("images of at most {:,} pixels along the longer edge", rule.patch * rule.merge, longer, resized))
    for text, low, high, changed in ranges:
        if low < high and changed(low).fits():
            number = largest(low, high - 1, _that_fit(changed))
            yield _Offer(text.format(number), changed(number))


def _that_fit(changed: Callable[[int], Problem]) -> Callable[[int], bool]:
    return lambda number: changed(number).fits()


def _formats(problem: Problem) -> Iterator[_Offer]:
    """Smaller weights."""
    profile, workload = problem.profile, problem.workload
    if workload.quantization is None and item_bytes(loaded_dtype(profile, workload)) > 2:
        yield _Offer("load in bfloat16", problem.changed(dtype="bfloat16"))
    if profile.quantization is None:
        if workload.quantization is None:
            yield _Offer("load in 8 bit (int8)", problem.changed(quantization="int8"))
        if workload.quantization != "nf4":
            yield _Offer("load in 4 bit (nf4)", problem.changed(quantization="nf4"))


def _machines(problem: Problem, empty: Problem) -> Iterator[_Offer]:
    """More memory."""
    held = [
        f"{format_gib(budget.others_bytes)} on GPU {budget.gpu.index}" for budget in problem.budgets if budget.others_bytes
    ]
    if held:
        yield _Offer(f"wait until other processes give back what they hold ({', '.join(held)})", empty)
    if problem.policy.max_gpus is not None and problem.policy.max_gpus < len(problem.budgets):
        policy = msgspec.structs.replace(problem.policy, max_gpus=None)
        yield _Offer(f"allow all {len(problem.budgets)} GPUs", msgspec.structs.replace(problem, policy=policy))
    else:
        roomiest = max(empty.budgets, key=lambda budget: budget.available_bytes)
        policy = msgspec.structs.replace(problem.policy, max_gpus=None)

        def grown(count: int) -> Problem:
            return msgspec.structs.replace(problem, budgets=(*problem.budgets, *[roomiest] * count), policy=policy)

        count = next((count for count in range(1, MOST_MORE_GPUS + 1) if grown(count).fits()), 1)
        more = "one more GPU" if count == 1 else f"{count} more GPUs"
        yield _Offer(f"{more} like GPU {roomiest.gpu.index} ({roomiest.gpu.name}), empty", grown(count))
