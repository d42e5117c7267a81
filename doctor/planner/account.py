"""Tell people what a split costs and why it is so: the ledger of every stage, its cuts and the reasons."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.versions import NEWEST_TRANSFORMERS
from ..health import fault_of_link
from ..model import ModelProfile, Role, Unit
from ..placement import Cut, LedgerKind, LedgerLine, Stage
from ..units import format_gib
from .budget import Budget, Exclusion
from .constraints import Atom
from .kv_cache import kept_elements
from .memory import Footprint, StageNeed, loaded_dtype, unit_bytes
from .order import Split
from .own_code import about_own_code
from .problem import Problem
from .quantized_rules import UNPACK_WHILE_LOADING, about_quantization, loses_hooks
from .release import is_before_5, release_of
from .search import Choice

_PARTS: dict[Role, str] = {
    "vision": "vision tower",
    "projector": "projector",
    "embedding": "embedding",
    "layer": "layers",
    "norm": "final norm",
    "head": "head",
    "other": "other",
}


def stages(problem: Problem, split: Split) -> tuple[Stage, ...]:
    """The stages of a split, each with its ledger."""
    return tuple(
        _stage(problem, run, problem.budgets[gpu], problem.need(split, stage))
        for stage, (gpu, run) in enumerate(zip(split.gpus, split.runs, strict=True))
    )


def units_of(footprint: Footprint, run: tuple[int, int]) -> list[Unit]:
    """Units of a run of atoms, in the order of the profile."""
    return [unit for atom in footprint.atoms[run[0] : run[1]] for unit in atom.units]


def _stage(problem: Problem, run: tuple[int, int], budget: Budget, need: StageNeed) -> Stage:
    footprint = problem.footprint
    workload, units = footprint.workload, units_of(footprint, run)
    copy_bytes = 0 if run[0] else footprint.copy_bytes
    work_bytes = need.activations_bytes - copy_bytes
    tokens = workload.text_tokens + footprint.images.tokens
    lines = [
        _line("driver", "driver and firmware", budget.driver_bytes, budget.total_source),
        _line("others", "other processes", budget.others_bytes, budget.total_source),
        _line("context", "CUDA context and libraries", budget.context_bytes, budget.context_source),
        _line("workspace", "cuBLAS workspace", budget.workspace_bytes, budget.workspace_source),
        *_weights(footprint, units),
        _line(
            "kv_cache",
            f"KV cache of {tokens + workload.answer_tokens:,} tokens"
            + (f" x {workload.batch}" if workload.batch > 1 else ""),
            need.kv_cache_bytes,
            _cache_source(footprint),
        ),
        _line("activations", f"activations, largest while {need.moment}", work_bytes, activations_source(problem)),
        *_copies(copy_bytes),
        *_training(footprint, need.training_bytes),
        _line(
            "fragmentation",
            "allocator fragmentation",
            need.fragmentation_bytes,
            _fragmentation_source(problem),
        ),
        _line("headroom", "headroom", budget.headroom_bytes, budget.headroom_source),
    ]
    left_bytes = budget.total_bytes - sum(line.size_bytes for line in lines)
    lines.append(_line("left", "left", left_bytes, "total less all of the above"))
    return Stage(
        gpu=budget.gpu.index,
        uuid=budget.gpu.uuid,
        name=budget.gpu.name,
        keys=tuple(unit.key for unit in units),
        ledger=tuple(line for line in lines if line.size_bytes or line.kind in ("kv_cache", "activations", "left")),
        total_bytes=budget.total_bytes,
        reserved_bytes=budget.workspace_bytes + (need.total_bytes if need.reserved_bytes is None else need.reserved_bytes),
    )


def _cache_source(footprint: Footprint) -> str:
    """How a layer's cache is counted."""
    text = footprint.profile.text
    if text.kv_lora_rank is None:
        own = f" (full attention: {text.full_kv_heads} x {text.full_head_dim})" if text.full_head_dim else ""
        return f"2 x layers x {text.kv_heads} KV heads x {text.head_dim}{own} x bytes x tokens x batch"
    keys, values = kept_elements("full", text, footprint.release)
    which = "4 keeps keys and values expanded" if is_before_5(footprint.release) else "5 keeps them compressed"
    if footprint.profile.is_remote_code:
        return f"layers x {keys + values} x bytes x tokens x batch (its own code keeps keys and values expanded)"
    return f"layers x {keys + values} x bytes x tokens x batch (transformers {which})"


def activations_source(problem: Problem) -> str:
    """Where the figures for activations come from."""
    if problem.replay and problem.traces is None:
        return "every tensor of the real code, replayed"
    return problem.footprint.source


def _fragmentation_source(problem: Problem) -> str:
    """Where the figure for fragmentation comes from."""
    if problem.replay:
        return "torch's allocator, replayed: least memory in which the stage runs"
    if problem.workload.training is not None:
        return "shares of the worst moments of a step, fitted to recorded steps in torch's allocator"
    return "share of the largest temporary and of the KV cache, fitted to measured out-of-memory limits"


def _training(footprint: Footprint, size_bytes: int) -> list[LedgerLine]:
    """What a training step keeps beside the weights."""
    if not size_bytes:
        return []
    source = "trained elements x bytes of gradient and of the optimizer's states"
    workload = footprint.workload
    is_full = workload.training is not None and workload.training.method == "full"
    if is_full and footprint.profile.vision is not None and not workload.images:
        source += "; the vision tower has none, as no prompt has an image"
    return [_line("training", "adapters, gradients and optimizer states", size_bytes, source)]


def _copies(copy_bytes: int) -> list[LedgerLine]:
    """Room for what is offloaded, where it is executed."""
    if not copy_bytes:
        return []
    source = "the largest module; accelerate copies each one here when it is called"
    return [_line("activations", "copy of an offloaded module", copy_bytes, source)]


def _weights(footprint: Footprint, units: list[Unit]) -> list[LedgerLine]:
    """One line for each part of the model, in the order of execution."""
    sizes: dict[Role, int] = {}
    for unit in units:
        size_bytes = unit_bytes(unit, footprint.profile, footprint.workload)
        sizes[unit.role] = sizes.get(unit.role, 0) + size_bytes
    source = "safetensors headers"
    if footprint.workload.quantization:
        source += f", loaded in {footprint.workload.quantization}"
    elif not footprint.profile.quantization:
        source += f", loaded in {loaded_dtype(footprint.profile, footprint.workload)}"
    labels = dict(_PARTS)
    layers = sum(unit.role == "layer" for unit in units)
    labels["layer"] = _counted(layers)
    return [_line("weights", f"weights: {labels[role]}", size, source) for role, size in sizes.items()]


def _line(kind: LedgerKind, label: str, size_bytes: int, source: str) -> LedgerLine:
    return LedgerLine(kind=kind, label=label, size_bytes=size_bytes, source=source)


def cuts(problem: Problem, split: Split, longest: int | None) -> tuple[Cut, ...]:
    """The borders between stages, with the link they cross and why they are where they are.

    Args:
        problem: The question.
        split: Its answer, or the split that lacks least.
        longest: Most text tokens that the answer takes; ``None`` when it does not fit.
    """
    atoms = problem.atoms
    result = []
    for number, (first, border) in enumerate(split.runs[:-1]):
        gpu, following = (problem.budgets[position].gpu.index for position in split.gpus[number : number + 2])
        link = problem.machine.link(gpu, following)
        free = format_gib(problem.budgets[split.gpus[number]].free_bytes)
        result.append(
            Cut(
                before=atoms[border - 1].units[-1].key,
                after=atoms[border].units[0].key,
                link=link.label if link else "?",
                reason=f"GPU {gpu} has {free} free and takes {_contents(atoms[first:border], problem.profile)}: "
                f"{_why(problem, split, number, longest)}.",
            )
        )
    return tuple(result)


def _contents(atoms: Sequence[Atom], profile: ModelProfile) -> str:
    """What a stage holds, in words."""
    layers = sum(atom.layers for atom in atoms)
    units = [unit for atom in atoms for unit in atom.units]
    roles = {unit.role for unit in units}
    blocks = sum(unit.role == "vision" and unit.layer is not None for unit in units)
    parts = []
    if blocks:
        parts = [f"{blocks} block{'' if blocks == 1 else 's'} of the vision tower"]
    elif "vision" in roles:
        # Of a tower that is cut, what is behind its blocks; as it stands next to the embedding, it is not worth more words.
        whole = {unit.key for unit in profile.units}
        parts = ["the vision tower"] if any(unit.role == "vision" and unit.key in whole for unit in units) else []
    parts += ["the embedding"] if "embedding" in roles else []
    parts += [_counted(layers)] if layers else []
    parts += ["the head"] if "head" in roles else []
    return _joined(parts or ["what comes before the layers"])


def _why(problem: Problem, split: Split, number: int, longest: int | None) -> str:
    """Why a border is where it is: what would happen were it one layer further on, or one layer earlier."""
    footprint = problem.footprint
    if longest is None:
        return "the split that lacks least"
    border = split.ends[number]
    pin = problem.pins[border]
    if pin is not None and pin != problem.pins[border - 1]:
        return f"what follows is pinned to GPU {pin}"
    noun = "layer" if problem.atoms[border].layers and problem.atoms[border - 1].layers else "part"
    for by, change in ((1, "more"), (-1, "fewer" if noun == "layer" else "less")):
        moved = split.moved(number, by)
        if moved is None:
            continue
        if not problem.split_fits(moved):
            return f"one {noun} {change} would not fit"
        if not problem.takes(moved, longest):
            return f"with one {noun} {change} a prompt of {longest + footprint.images.tokens:,} tokens would not fit"
    return "so the tighter of the two GPUs keeps the most"


def reasons(problem: Problem, choice: Choice, excluded: Sequence[Exclusion]) -> tuple[str, ...]:
    """Why so many GPUs, why these, and what constraints acted."""
    split = choice.split
    count, usable = len(split.gpus), len(problem.budgets)
    result = [_why_so_many(problem, count)]
    if count < usable:
        result.append(_why_these(problem, split, usable))
    result += [
        f"GPU {budget.gpu.index} is used although {budget.fault}: the others do not suffice."
        for budget in (problem.budgets[gpu] for gpu in split.gpus)
        if budget.fault is not None
    ]
    result += [f"GPU {exclusion.gpu} is left out: {exclusion.reason}." for exclusion in excluded]
    result += [f"{path} is pinned to GPU {gpu}." for path, gpu in problem.policy.pins]
    if count > 1:
        result += problem.chain.constraints
        result += _kept_apart(problem)
    return tuple(result)


def _why_so_many(problem: Problem, count: int) -> str:
    policy = problem.policy
    if problem.offloaded:
        return f"{_gpus(count)} {'take' if count > 1 else 'takes'} as much of the model as fits; host memory has the rest."
    if count == 1:
        return "One GPU is enough, and a model on one GPU answers fastest."
    if count == policy.min_gpus:
        return f"{count} GPUs because the policy asks for at least {count}."
    margin_bytes = problem.with_gpus(count - 1).margin_bytes()
    fewer = "one GPU" if count == 2 else f"{count - 1} GPUs"
    if margin_bytes is None:
        return f"{count} GPUs are needed: {fewer} cannot follow the pins or avoid the broken links."
    if margin_bytes >= 0:
        return f"{count} GPUs because the policy prefers context: {fewer} would do, but not for so long a prompt."
    return f"{count} GPUs are needed: {fewer} would lack {format_gib(-margin_bytes)}."


def _why_these(problem: Problem, split: Split, usable: int) -> str:
    count, names = len(split.gpus), _gpu_names(problem, split)
    choice = f"None of the {usable}" if count == 1 else f"No choice of {count} among the {usable}"
    if problem.policy.prefer == "speed" and count > 1:
        return f"{choice} GPUs that could be used has faster links than {names}."
    return f"{choice} GPUs that could be used takes a longer prompt than {names}."


def _kept_apart(problem: Problem) -> list[str]:
    """Pairs of usable GPUs that must not be neighbors."""
    pairs = (sorted(pair) for pair, rank in problem.hops.items() if rank is None)
    return [
        f"GPU {a} and GPU {b} are never neighbors: {fault_of_link(problem.machine, a, b)}."
        for a, b in sorted({(a, b) for a, b in pairs})
    ]


def notes(problem: Problem, choice: Choice | None) -> tuple[str, ...]:
    """What was assumed."""
    profile, workload, footprint = problem.profile, problem.workload, problem.footprint
    result = [*about_own_code(profile, problem.machine), *profile.notes]
    if footprint.images.note:
        result.append(footprint.images.note)
    result.append(f"Activations: {activations_source(problem)}.")
    if not profile.is_remote_code and release_of(problem.machine) is None:
        result.append(
            f"transformers {NEWEST_TRANSFORMERS}: the machine does not say which it has, and older ones need more or less."
        )
    if profile.quantization and workload.dtype:
        result.append(f"The checkpoint is quantized ({profile.quantization}): those weights keep their type.")
    result += about_quantization(profile, workload)
    lost = loses_hooks(profile, release_of(problem.machine)) if choice and len(choice.split.gpus) > 1 else None
    if lost:
        result.append(f"{lost[0].upper()}{lost[1:]}. {UNPACK_WHILE_LOADING}")
    if profile.one_gpu and len(problem.budgets) > 1:
        result.append(f"All of the model stays on one GPU: {profile.one_gpu}.")
    positions = profile.text.max_positions
    if positions is not None:
        needed = workload.text_tokens + footprint.images.tokens + workload.answer_tokens
        if needed > positions:
            what = "Prompt and answer take" if workload.answer_tokens else "The prompt takes"
            result.append(f"{what} {needed:,} tokens, more than the {positions:,} positions of the model.")
        elif choice and choice.text_tokens >= problem.most_text_tokens:
            result.append(f"The longest prompt is set by the model's {positions:,} positions, not by memory.")
    if choice and problem.offloaded and not problem.knows_host_memory:
        result.append(
            "How much host memory is available is not known, so whether the offloaded layers fit there is not either."
        )
    if choice and choice.is_rounded:
        result.append("So many GPUs differ in free memory that it was rounded down to make the search quick.")
    if choice and not choice.split.is_exact:
        result.append("Not every order of the GPUs was compared for the fastest links; memory was searched exactly.")
    return tuple(result)


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def _gpu_names(problem: Problem, split: Split) -> str:
    numbers = [str(problem.budgets[gpu].gpu.index) for gpu in split.gpus]
    return f"GPU {numbers[0]}" if len(numbers) == 1 else f"GPUs {_joined(numbers)}"


def _counted(layers: int) -> str:
    return f"{layers} layer{'' if layers == 1 else 's'}"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
