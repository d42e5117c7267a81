"""The message of torch when a GPU is full, read: its figures, and what they say about the reason. Pure."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from .units import GIB, format_gib

_FACTORS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = r"(\d{1,12}(?:\.\d{1,4})?) (bytes|KiB|MiB|GiB|TiB)"
# Of c10/cuda/CUDACachingAllocator.cpp: the form since torch 2.2, then that of older versions.
_FIELDS = {
    "tried": re.compile(rf"Tried to allocate {_SIZE}"),
    "total": re.compile(rf"(?:has a total capacity of {_SIZE}|{_SIZE} total capacity)"),
    "free": re.compile(rf"(?:of which {_SIZE} is free|{_SIZE} free;)"),
    "own": re.compile(rf"this process has {_SIZE} memory in use"),
    "allocated": re.compile(rf"(?:allocated memory {_SIZE} is allocated by PyTorch|{_SIZE} already allocated)"),
    "unused": re.compile(rf"and {_SIZE} is reserved by PyTorch but unallocated"),
    "reserved": re.compile(rf"{_SIZE} reserved in total by PyTorch"),
}
_OTHERS = re.compile(rf"Process (\d{{1,9}}) has {_SIZE} memory in use")
_GPU = re.compile(r"GPU (\d{1,4})\b")
_WORTH_NAMING_BYTES = GIB // 2

Reason = Literal["too_large", "others", "fragments", "full", "unknown"]


class OutOfMemory(NamedTuple):
    """Figures of one message, in bytes; ``None`` where it does not tell."""

    gpu: int | None
    """As torch counts them: after CUDA_VISIBLE_DEVICES."""
    tried: int | None
    total: int | None
    free: int | None
    own: int | None
    """Of this process: torch, CUDA context and libraries."""
    allocated: int | None
    unused: int | None
    """Reserved by torch's allocator and not in use."""
    others: tuple[tuple[int, int], ...]
    """Process id and bytes of other processes."""

    @property
    def reason(self) -> Reason:
        """Why there was no room: the call is larger than the card, others hold it, it is in pieces, or it is full."""
        if self.tried is None or self.total is None:
            return "unknown"
        if self.tried > self.total:
            return "too_large"
        if self.held_by_others >= max(_WORTH_NAMING_BYTES, self.tried - (self.free or 0)):
            return "others"
        return "fragments" if (self.unused or 0) >= self.tried else "full"

    @property
    def held_by_others(self) -> int:
        """Bytes that other processes hold: as the message lists them, or what remains of the card."""
        listed = sum(size for _, size in self.others)
        if listed or self.own is None or self.total is None or self.free is None:
            return listed
        rest = self.total - self.free - self.own
        return rest if rest >= _WORTH_NAMING_BYTES else 0


def parse_out_of_memory(text: str) -> OutOfMemory:
    """Read the message of ``torch.OutOfMemoryError``, of torch 1.13 to 2.13."""
    sizes = {name: _size(pattern.search(text)) for name, pattern in _FIELDS.items()}
    gpu = _GPU.search(text)
    unused, reserved, allocated = sizes["unused"], sizes["reserved"], sizes["allocated"]
    if unused is None and reserved is not None and allocated is not None:
        unused = max(0, reserved - allocated)
    others = tuple((int(match[1]), _bytes(match[2], match[3])) for match in _OTHERS.finditer(text))
    return OutOfMemory(
        gpu=int(gpu[1]) if gpu else None,
        tried=sizes["tried"],
        total=sizes["total"],
        free=sizes["free"],
        own=sizes["own"],
        allocated=allocated,
        unused=unused,
        others=others,
    )


def _size(match: re.Match[str] | None) -> int | None:
    if match is None:
        return None
    number, unit = (part for part in match.groups() if part is not None)
    return _bytes(number, unit)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _FACTORS[unit])


def figures_of(found: OutOfMemory) -> dict[str, str]:
    """The figures, for people."""
    named = {
        "tried to allocate": found.tried,
        "total": found.total,
        "free": found.free,
        "this process": found.own,
        "allocated by torch": found.allocated,
        "reserved, not in use": found.unused,
    }
    said = {} if found.gpu is None else {"GPU, as torch counts": str(found.gpu)}
    said |= {name: format_gib(size) for name, size in named.items() if size is not None}
    if found.others:
        said["other processes"] = ", ".join(f"pid {pid}: {format_gib(size)}" for pid, size in found.others[:8])
    return said


def explain(found: OutOfMemory) -> tuple[str, str, tuple[str, ...]] | None:
    """What the figures say: one sentence, what to do, and commands; ``None`` where they are missing."""
    tried = format_gib(found.tried or 0)
    gpu = "the GPU" if found.gpu is None else f"GPU {found.gpu}"
    if found.reason == "unknown":
        return None
    if found.reason == "too_large":
        return (
            f"One tensor of {tried} was asked for, more than {gpu} has: no map can help.",
            "Make the call smaller: fewer or smaller images, a shorter prompt, a smaller batch; with eager attention, "
            "use sdpa.",
            ("vlm-doctor plan MODEL",),
        )
    if found.reason == "others":
        return (
            f"Other processes hold {format_gib(found.held_by_others)} of {gpu}; {tried} more were asked for.",
            "Wait for them, take another GPU, or stop them if they are yours.",
            ("nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv", "vlm-doctor"),
        )
    if found.reason == "fragments":
        return (
            f"torch holds {format_gib(found.unused or 0)} of {gpu} that are not in use, but in pieces smaller than "
            f"{tried}.",
            "Let the allocator join pieces, before the program starts.",
            ("export PYTORCH_ALLOC_CONF=expandable_segments:True PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",),
        )
    own = "" if found.own is None else f", {format_gib(found.own)} of it this process"
    return (
        f"{gpu[0].upper()}{gpu[1:]} is full{own}: {tried} were asked for and {format_gib(found.free or 0)} are free.",
        "Place the model so that this GPU has room for the largest call, or make the call smaller.",
        ("vlm-doctor plan MODEL",),
    )
