"""When nothing fits: what is missing, whether it can ever fit, and which single change would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from ..placement import Lever, Shortage, Stage
from ..units import format_gib
from .budget import Exclusion
from .image_tokens import image_edges
from .memory import item_bytes, loaded_dtype
from .offload import obstacle, with_offload
from .order import Split
from .place import largest
from .problem import Problem

MOST_MORE_GPUS = 15
"""With one that is there already: two of the largest machines that are sold with eight."""


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
        f"{format_gib(missing_bytes)} on GPU {tightest.gpu}. {_proof(problem)}{_tried(problem)}"
    )
    return Shortage(
        missing_bytes=missing_bytes,
        message=message,
        is_permanent=not empty.fits() and all(left.is_permanent for left in excluded),
        levers=_sorted(_levers(problem, empty, -missing_bytes)),
    )


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def _sorted(levers: Iterator[Lever]) -> tuple[Lever, ...]:
    return tuple(sorted(levers, key=lambda lever: not lever.fits))


def _no_split(problem: Problem, excluded: Sequence[Exclusion]) -> Shortage:
    """There are too few GPUs, or too few parts, for any split at all."""
    name, parts = problem.profile.name, len(problem.chain.atoms)
    needed_bytes = problem.footprint.detail(0, parts, problem.workload.text_tokens).total_bytes
    usable, asked = len(problem.budgets), _gpus(problem.policy.min_gpus)
    why = f" ({_reasons(excluded)})" if excluded else ""
    if not usable:
        message = f"No GPU can be used{why}, and {name} needs {format_gib(needed_bytes)}."
    elif usable < problem.policy.min_gpus:
        message = f"At least {asked} are asked for, and {usable} can be used{why}."
    elif parts < problem.policy.min_gpus:
        message = f"At least {asked} are asked for, and {name} can be cut into {parts} parts at most."
    else:
        message = f"No split of {name} is left: every one goes against a pin or sends data over a faulty link."
    return Shortage(
        missing_bytes=0 if usable else needed_bytes,
        message=message,
        is_permanent=all(left.is_permanent for left in excluded),
        levers=_sorted(_found(_freedoms(problem), None)),
    )


def _reasons(excluded: Sequence[Exclusion]) -> str:
    """``GPUs 0, 1: hidden by CUDA_VISIBLE_DEVICES; GPU 2: …``."""
    by_reason: dict[str, list[str]] = {}
    for left in excluded:
        by_reason.setdefault(left.reason, []).append(str(left.gpu))
    return "; ".join(
        f"GPU{'' if len(gpus) == 1 else 's'} {', '.join(gpus)}: {reason}" for reason, gpus in by_reason.items()
    )


def _proof(problem: Problem) -> str:
    """A lower bound that no split can beat, where one of the two simple ones shows it."""
    footprint, rooms = problem.footprint, problem.fleet.rooms
    atoms = range(len(problem.atoms))
    need = footprint.needs(problem.workload.text_tokens)
    fixed_bytes = footprint.least_bytes
    work_bytes = _least_work_bytes(problem)
    roomiest = sorted((max(0, room.capacity_bytes) for room in rooms), reverse=True)
    together = "this GPU" if len(rooms) == 1 else f"all {len(rooms)} GPUs together"
    what = "Weights and KV cache"
    if problem.workload.training is not None:
        what = "Weights and optimizer states"
    if fixed_bytes > sum(roomiest):
        given = format_gib(sum(roomiest))
        return f"{what} alone take {format_gib(fixed_bytes)}, and {together} can give {given}."
    if all(fixed_bytes + work_bytes(count) > sum(roomiest[:count]) for count in problem.counts):
        count = problem.counts[-1]
        together = "this GPU" if len(rooms) == 1 else f"the roomiest {count}" if count < len(rooms) else together
        work, given = format_gib(work_bytes(count)), format_gib(sum(roomiest[:count]))
        return (
            f"{what} take {format_gib(fixed_bytes)}, the work on them at least {work} on {_gpus(count)}, "
            f"and {together} can give {given}."
        )
    largest_bytes = max(need(atom, atom + 1) for atom in atoms)
    if largest_bytes > roomiest[0]:
        return (
            f"A part that cannot be cut needs {format_gib(largest_bytes)}, and the roomiest GPU can give "
            f"{format_gib(roomiest[0])}."
        )
    return "All cuts and all orders of the GPUs were compared."


def _least_work_bytes(problem: Problem) -> Callable[[int], int]:
    """Bytes of work and fragmentation that any split over so many stages has at least.

    What a stage needs beside weights and KV cache grows with its atoms. So the stage with the neediest atom needs no less
    than it, and the others no less than the atoms that need least.
    """
    tokens = problem.workload.text_tokens
    details = [problem.footprint.detail(atom, atom + 1, tokens) for atom in range(len(problem.atoms))]
    beside = sorted(detail.total_bytes - detail.weights_bytes - detail.kv_cache_bytes for detail in details)
    return lambda count: beside[-1] + sum(beside[: count - 1])


def _tried(problem: Problem) -> str:
    """What else was tried in vain."""
    texts = []
    if problem.chain.is_tower_broken:
        texts.append(" Cuts between the blocks of the vision tower were allowed.")
    if problem.policy.offload:
        why = obstacle(problem)
        texts.append(
            f" Offloading is no way out: {why}."
            if why is not None
            else " Nor does it fit with any number of the last layers in host memory."
        )
    return "".join(texts)


class _Offer(msgspec.Struct, frozen=True):
    """A change to be tried: what it is called, and the question it leads to."""

    change: str
    problem: Problem


def _levers(problem: Problem, empty: Problem, margin_bytes: int) -> Iterator[Lever]:
    """Single changes that save memory, smallest first; what saves nothing is left out."""
    offers = (
        *_freedoms(problem), *_switches(problem), *_training(problem), *_reductions(problem), *_formats(problem),
        *_host(problem), *_machines(problem, empty),
    )  # fmt: skip
    return _found(offers, margin_bytes)


def _found(offers: Sequence[_Offer] | Iterator[_Offer], margin_bytes: int | None) -> Iterator[Lever]:
    """Offers that leave more than there is; all that fit where there is no split to compare with."""
    for offer in offers:
        after_bytes = _margin_bytes(offer.problem)
        if after_bytes is None:
            continue
        if margin_bytes is None:
            if after_bytes >= 0:
                yield Lever(change=offer.change, saves_bytes=0, fits=True)
        elif after_bytes > margin_bytes:
            yield Lever(change=offer.change, saves_bytes=after_bytes - margin_bytes, fits=after_bytes >= 0)


def _margin_bytes(problem: Problem) -> int | None:
    """Margin of the best split, with layers in host memory where that is allowed and needed."""
    margin_bytes = problem.margin_bytes()
    if problem.policy.offload and (margin_bytes is None or margin_bytes < 0):
        candidate = with_offload(problem)
        return candidate.margin_bytes() if candidate is not None else margin_bytes
    return margin_bytes


def levers_that_save(problem: Problem, split: Split) -> tuple[Lever, ...]:
    """For a training step that fits: what each change would save on the tightest GPU of its split."""
    rooms, tokens = problem.fleet.rooms, problem.workload.text_tokens
    before_bytes = split.margin(problem.footprint.needs(tokens), rooms)
    offers = [*_training(problem), *_switches(problem)]
    if problem.workload.batch > 1:
        half = problem.workload.batch // 2
        offers.append(_Offer(f"batch of {half:,}", problem.changed(batch=half)))
    gains = ((offer.change, split.margin(offer.problem.footprint.needs(tokens), rooms) - before_bytes) for offer in offers)
    return tuple(Lever(change=change, saves_bytes=gain, fits=True) for change, gain in gains if gain > 0)


def _freedoms(problem: Problem) -> Iterator[_Offer]:
    """Fewer demands of the user."""
    policy = problem.policy
    for pin in policy.pins:
        rest = tuple(other for other in policy.pins if other != pin)
        yield _Offer(f"drop --pin {pin[0]}={pin[1]}", problem.with_policy(pins=rest))
    for gpu in policy.exclude:
        rest_gpus = tuple(other for other in policy.exclude if other != gpu)
        yield _Offer(f"use GPU {gpu} too (drop it from --exclude)", problem.with_policy(exclude=rest_gpus))
    for gpu, size in policy.max_memory:
        rest_caps = tuple(cap for cap in policy.max_memory if cap[0] != gpu)
        change = f"allow more than {format_gib(size)} on GPU {gpu} (drop --max-memory {gpu}=...)"
        yield _Offer(change, problem.with_policy(max_memory=rest_caps))


def _host(problem: Problem) -> Iterator[_Offer]:
    """Host memory where it was not allowed."""
    if not problem.policy.offload and obstacle(problem) is None:
        candidate = with_offload(problem)
        if candidate is not None:
            yield _Offer("allow the last layers in host memory, much slower (--offload)", candidate)


def _switches(problem: Problem) -> Iterator[_Offer]:
    """The same answers by other means."""
    if problem.workload.attention == "eager":
        yield _Offer("use fused attention (sdpa) instead of eager", problem.changed(attention="sdpa"))
    if problem.workload.logits == "forward":
        yield _Offer("call generate instead of a plain forward", problem.changed(logits="generate"))
    if problem.workload.allocator == "native":
        change = "let torch's allocator expand segments (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)"
        yield _Offer(change, problem.changed(allocator="expandable"))


def _training(problem: Problem) -> Iterator[_Offer]:
    """The usual means to train in less memory."""
    training = problem.workload.training
    if training is None:
        return
    if not training.gradient_checkpointing:
        checkpointed = msgspec.structs.replace(training, gradient_checkpointing=True)
        yield _Offer("gradient checkpointing", problem.changed(training=checkpointed))
    if training.method == "full":
        adapters = msgspec.structs.replace(training, method="lora")
        change = f"train LoRA adapters of rank {training.lora_rank} instead of all weights"
        yield _Offer(change, problem.changed(training=adapters))
    if training.optimizer == "adamw":
        small = msgspec.structs.replace(training, optimizer="adamw_8bit")
        yield _Offer("an optimizer with 8-bit states (adamw_8bit)", problem.changed(training=small))


def _reductions(problem: Problem) -> Iterator[_Offer]:
    """Less to do: for each quantity the largest that fits, where one does."""
    workload, rule = problem.workload, problem.profile.image
    texts = problem.footprint.images.tokens == 0
    ranges: list[tuple[str, int, int, Callable[[int], Problem]]] = [
        ("prompt of at most {:,} text tokens", int(texts), workload.text_tokens, lambda n: problem.changed(text_tokens=n)),
        ("at most {:,} new tokens", 0, workload.answer_tokens, lambda n: problem.changed(new_tokens=n)),
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

        # A number of its own: what is pinned to the roomiest GPU is not pinned to others of its kind.
        another = msgspec.structs.replace(roomiest, gpu=msgspec.structs.replace(roomiest.gpu, index=-1))

        def grown(count: int) -> Problem:
            return msgspec.structs.replace(problem, budgets=(*problem.budgets, *[another] * count), policy=policy)

        count = next((count for count in range(1, MOST_MORE_GPUS + 1) if grown(count).fits()), 1)
        more = "one more GPU" if count == 1 else f"{count} more GPUs"
        yield _Offer(f"{more} like GPU {roomiest.gpu.index} ({roomiest.gpu.name}), empty", grown(count))
