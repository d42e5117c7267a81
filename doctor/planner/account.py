"""Tell people what a split costs and why it is so: the ledger of every stage, its cuts and the reasons."""

from __future__ import annotations

from collections.abc import Sequence

from ..machine import Machine
from ..model import Role, Unit
from ..placement import Cut, LedgerKind, LedgerLine, Stage
from ..units import format_gib
from .budget import Budget, Exclusion
from .constraints import Atom
from .memory import Footprint, StageNeed, loaded_dtype, unit_bytes
from .order import Split
from .problem import Problem
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


def stages(footprint: Footprint, split: Split, budgets: Sequence[Budget]) -> tuple[Stage, ...]:
    """The stages of a split, each with its ledger."""
    text_tokens = footprint.workload.text_tokens
    return tuple(
        _stage(footprint, units_of(footprint, run), budgets[gpu], footprint.detail(*run, text_tokens))
        for gpu, run in zip(split.gpus, split.runs, strict=True)
    )


def units_of(footprint: Footprint, run: tuple[int, int]) -> list[Unit]:
    """Units of a run of atoms, in the order of the profile."""
    return [unit for atom in footprint.atoms[run[0] : run[1]] for unit in atom.units]


def _stage(footprint: Footprint, units: list[Unit], budget: Budget, need: StageNeed) -> Stage:
    workload = footprint.workload
    tokens = workload.text_tokens + footprint.images.tokens
    text = footprint.profile.text
    lines = [
        _line("driver", "driver and firmware", budget.driver_bytes, budget.total_source),
        _line("others", "other processes", budget.others_bytes, budget.total_source),
        _line("context", "CUDA context and libraries", budget.context_bytes, budget.context_source),
        _line("workspace", "cuBLAS workspace", budget.workspace_bytes, "torch's default on Hopper"),
        *_weights(footprint, units),
        _line(
            "kv_cache",
            f"KV cache of {tokens + workload.new_tokens:,} tokens" + (f" x {workload.batch}" if workload.batch > 1 else ""),
            need.kv_cache_bytes,
            f"2 x layers x {text.kv_heads} KV heads x {text.head_dim} x bytes x tokens x batch",
        ),
        _line("activations", f"activations, largest while {need.moment}", need.activations_bytes, footprint.source),
        _line(
            "fragmentation",
            "allocator fragmentation",
            need.fragmentation_bytes,
            "share of the largest temporary and of the KV cache, fitted to measured out-of-memory limits",
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
    )


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


def cuts(problem: Problem, split: Split, machine: Machine) -> tuple[Cut, ...]:
    """The borders between stages, with the link they cross and why they are where they are."""
    atoms = problem.chain.atoms
    result = []
    for number, (first, border) in enumerate(split.runs[:-1]):
        gpu, following = (problem.budgets[position].gpu.index for position in split.gpus[number : number + 2])
        link = machine.link(gpu, following)
        free = format_gib(problem.budgets[split.gpus[number]].free_bytes)
        result.append(
            Cut(
                before=atoms[border - 1].units[-1].key,
                after=atoms[border].units[0].key,
                link=link.label if link else "?",
                reason=f"GPU {gpu} has {free} free and takes {_contents(atoms[first:border])}: "
                f"{_why(problem, split, number)}.",
            )
        )
    return tuple(result)


def _contents(atoms: Sequence[Atom]) -> str:
    """What a stage holds, in words."""
    layers = sum(atom.layers for atom in atoms)
    roles = {unit.role for atom in atoms for unit in atom.units}
    parts = [f"the {_PARTS[role]}" for role in ("vision", "embedding") if role in roles]
    parts += [_counted(layers)] if layers else []
    parts += ["the head"] if "head" in roles else []
    return _joined(parts or ["what comes before the layers"])


def _why(problem: Problem, split: Split, number: int) -> str:
    """Why a border is where it is: what would happen were it one layer further on, or one layer earlier."""
    footprint = problem.footprint
    longest = problem.longest_text_tokens(split)
    if longest is None:
        return "the split that lacks least"
    for by, change in ((1, "more"), (-1, "fewer")):
        moved = split.moved(number, by)
        if moved is None:
            continue
        other = problem.longest_text_tokens(moved)
        if other is None:
            return f"one layer {change} would not fit"
        if other < longest:
            here, there = (tokens + footprint.images.tokens for tokens in (longest, other))
            return f"with one layer {change} the longest prompt would fall from {here:,} to {there:,} tokens"
    return "so the tighter of the two GPUs keeps the most"


def reasons(problem: Problem, split: Split, excluded: Sequence[Exclusion]) -> tuple[str, ...]:
    """Why so many GPUs, why these, and what constraints acted."""
    count, usable = len(split.gpus), len(problem.budgets)
    names = _gpu_names(problem, split)
    if count == 1:
        result = ["One GPU is enough, and a model on one GPU answers fastest."]
    elif count > problem.policy.min_gpus:
        margin_bytes = problem.with_gpus(count - 1).margin_bytes()
        assert margin_bytes is not None
        fewer = "one GPU" if count == 2 else f"{count - 1} GPUs"
        result = [f"{count} GPUs are needed: {fewer} would lack {format_gib(-margin_bytes)}."]
    else:
        result = [f"{count} GPUs because the policy asks for at least {problem.policy.min_gpus}."]
    if count < usable:
        choice = f"None of the {usable}" if count == 1 else f"No choice of {count} among the {usable}"
        result.append(f"{choice} GPUs that could be used takes a longer prompt than {names}.")
    result += [f"GPU {exclusion.gpu} is left out: {exclusion.reason}." for exclusion in excluded]
    if count > 1:
        result += problem.chain.constraints
    return tuple(result)


def notes(problem: Problem, choice: Choice | None) -> tuple[str, ...]:
    """What was assumed."""
    profile, workload, footprint = problem.profile, problem.workload, problem.footprint
    result = [*profile.notes]
    if footprint.images.note:
        result.append(footprint.images.note)
    result.append(f"Activations: {footprint.source}.")
    if profile.quantization and workload.dtype:
        result.append(f"The checkpoint is quantized ({profile.quantization}): its weights keep their stored size.")
    positions = profile.text.max_positions
    if positions is not None:
        needed = workload.text_tokens + footprint.images.tokens + workload.new_tokens
        if needed > positions:
            result.append(f"Prompt and answer take {needed:,} tokens, more than the {positions:,} positions of the model.")
        elif choice and choice.text_tokens >= problem.most_text_tokens:
            result.append(f"The longest prompt is set by the model's {positions:,} positions, not by memory.")
    if choice and choice.is_rounded:
        result.append("So many GPUs differ in free memory that it was rounded down to make the search quick.")
    if choice and not choice.split.is_exact:
        result.append("Not every order of the GPUs was compared for the fastest links; memory was searched exactly.")
    return tuple(result)


def _gpu_names(problem: Problem, split: Split) -> str:
    numbers = [str(problem.budgets[gpu].gpu.index) for gpu in split.gpus]
    return f"GPU {numbers[0]}" if len(numbers) == 1 else f"GPUs {_joined(numbers)}"


def _counted(layers: int) -> str:
    return f"{layers} layer{'' if layers == 1 else 's'}"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
