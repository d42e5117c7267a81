"""Refuse workloads and policies that make no sense, before anything is computed from them."""

from __future__ import annotations

from ..errors import UsageError
from ..machine import Machine
from ..model import ModelProfile
from ..workload import Policy, Workload

MAX_TOKENS = 10_000_000
"""Longest prompt that is planned for; the longest context of a published model is 10 million tokens (Llama 4 Scout)."""
MAX_BATCH = 4_096
MAX_IMAGES = 4_096
MAX_EDGE = 65_536
MAX_LORA_RANK = 65_536
"""No weight of a model that exists is that narrow: adapters of this rank are larger than the weights."""


def validate_workload(workload: Workload, profile: ModelProfile | None = None) -> None:
    """Check that a workload can be meant seriously.

    Args:
        workload: What the model is to do.
        profile: The model, to refuse quantizing it twice; ``None`` looks at the workload alone.

    Raises:
        UsageError: A number is out of range, or the combination is impossible; one sentence says which.
    """
    _between("text_tokens", workload.text_tokens, 0, MAX_TOKENS)
    _between("new_tokens", workload.new_tokens, 0, MAX_TOKENS)
    _between("batch", workload.batch, 1, MAX_BATCH)
    _between("images", workload.images, 0, MAX_IMAGES)
    for name, edge in (("image_height", workload.image_height), ("image_width", workload.image_width)):
        if edge is not None:
            _between(name, edge, 1, MAX_EDGE)
    if workload.text_tokens + workload.images == 0:
        raise UsageError("The workload has neither text nor images: ask for at least 1 text token or 1 image.")
    if workload.training is not None:
        _between("lora_rank", workload.training.lora_rank, 1, MAX_LORA_RANK)
    if workload.quantization and profile is not None and profile.quantization:
        raise UsageError(
            f"{profile.name} is already quantized ({profile.quantization}): "
            f"bitsandbytes cannot load it in {workload.quantization}; leave the quantization out."
        )


def validate_policy(policy: Policy, machine: Machine) -> None:
    """Check that a policy can be followed on a machine.

    Raises:
        UsageError: A number is out of range, or a GPU index is not of this machine; one sentence says which.
    """
    if not 0 <= policy.headroom_fraction < 1:
        raise UsageError(f"headroom_fraction must be at least 0 and below 1, not {policy.headroom_fraction}.")
    for name, size in (("headroom_min_bytes", policy.headroom_min_bytes), ("context_bytes", policy.context_bytes)):
        if size is not None and size < 0:
            raise UsageError(f"{name} must not be negative, not {size}.")
    if policy.min_gpus < 1:
        raise UsageError(f"min_gpus must be at least 1, not {policy.min_gpus}.")
    if policy.max_gpus is not None and policy.max_gpus < 1:
        raise UsageError(f"max_gpus must be at least 1, not {policy.max_gpus}.")
    if policy.max_gpus is not None and policy.max_gpus < policy.min_gpus:
        raise UsageError(f"max_gpus ({policy.max_gpus}) must not be below min_gpus ({policy.min_gpus}).")
    indices = [gpu.index for gpu in machine.gpus]
    capped, pinned = (gpu for gpu, _ in policy.max_memory), (gpu for _, gpu in policy.pins)
    for index in (*(policy.gpus or ()), *policy.exclude, *capped, *pinned):
        if index not in indices:
            raise UsageError(f"There is no GPU {index} on this machine: it has {_named(indices)}.")
    if policy.gpus is not None and not policy.gpus:
        raise UsageError("The list of GPUs to use is empty: name at least one, or leave it out.")
    allowed = indices if policy.gpus is None else policy.gpus
    if policy.exclude and set(allowed) <= set(policy.exclude):
        raise UsageError(f"Every GPU is excluded: exclude fewer of {_named(list(allowed))}.")
    _validate_max_memory(policy)


def _validate_max_memory(policy: Policy) -> None:
    seen: set[int] = set()
    for index, size in policy.max_memory:
        if index in seen:
            raise UsageError(f"max_memory names GPU {index} twice: give it one limit.")
        seen.add(index)
        if size <= 0:
            raise UsageError(f"max_memory of GPU {index} must be more than 0 bytes, not {size}; leave it out with exclude.")


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} must be between {low:,} and {high:,}, not {value:,}.")


def _named(indices: list[int]) -> str:
    return f"GPU {', '.join(map(str, indices))}" if indices else "no GPU"
