"""Peak GPU memory of a phase of a test session, as torch's allocator and the driver count it."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any, NamedTuple

ATTACHED: dict[int, int] = {}
"""CUDA ordinal to bytes of models that another process keeps and this one is attached to (``--vlm-warm``): the allocator of
this process does not count them."""


class Peak(NamedTuple):
    """The most memory of one GPU that was in use at once, in bytes."""

    allocated: int
    """By tensors: what :attr:`vlm_doctor.placement.Stage.peak_bytes` predicts."""
    reserved: int
    """By the allocator's segments, which hold the tensors and the gaps between them."""


class Meter:
    """Measures from :meth:`start` on; meters may overlap, though torch keeps one peak a GPU.

    A meter never imports torch and never creates a CUDA context: where the process under test has not used a GPU, there is
    nothing to measure. What a test resets itself (``torch.cuda.reset_peak_memory_stats``) is lost to the meter.
    """

    _running: tuple[Meter, ...] = ()
    """All that were started and not stopped: each keeps what another one resets."""

    def __init__(self) -> None:
        self._kept: dict[int, Peak] = {}

    def start(self) -> None:
        """Forget the peaks so far, for this meter alone."""
        cuda = used_cuda()
        others = [meter for meter in Meter._running if meter is not self]
        if cuda is not None:
            for meter in others:
                meter._kept = meter.read()
            for ordinal in range(cuda.device_count()):
                cuda.reset_peak_memory_stats(ordinal)
        self._kept = {}
        Meter._running = (*others, self)

    def read(self) -> dict[int, Peak]:
        """CUDA ordinal to the peak since :meth:`start`, of each GPU that held any tensor; empty without CUDA."""
        cuda = used_cuda()
        if cuda is None:
            return dict(self._kept)
        peaks = {}
        for ordinal in range(cuda.device_count()):
            kept = self._kept.get(ordinal, Peak(0, 0))
            more = ATTACHED.get(ordinal, 0)
            now = Peak(cuda.max_memory_allocated(ordinal) + more, cuda.max_memory_reserved(ordinal) + more)
            peaks[ordinal] = Peak(*map(max, kept, now))
        return {ordinal: peak for ordinal, peak in peaks.items() if peak.reserved}

    def stop(self) -> dict[int, Peak]:
        """The last :meth:`read`."""
        peaks = self.read()
        Meter._running = tuple(meter for meter in Meter._running if meter is not self)
        return peaks


def allocated_bytes() -> dict[int, int]:
    """CUDA ordinal to what tensors hold right now; empty where CUDA was not used."""
    cuda = used_cuda()
    return {} if cuda is None else {ordinal: cuda.memory_allocated(ordinal) for ordinal in range(cuda.device_count())}


def driver_bytes() -> dict[int, int]:
    """CUDA ordinal to what the driver says is taken of the GPU right now, by everybody; empty where CUDA was not used.

    The allocator keeps its segments, so right after a test this is close to the test's own peak in the driver's eyes.
    """
    cuda = used_cuda()
    if cuda is None:
        return {}
    taken = {}
    for ordinal in range(cuda.device_count()):
        if cuda.memory_reserved(ordinal):
            # Asked only where a context exists already: the question would create one.
            info = driver_info(cuda, ordinal)
            if info is not None:
                taken[ordinal] = info[1] - info[0]
    return taken


def driver_info(cuda: Any, ordinal: int) -> tuple[int, int] | None:
    """Free and total bytes as the driver counts; ``None`` from a GPU that has stopped answering.

    That is asked while a failure is reported, which must not be lost: each later use of the GPU tells it again.
    """
    try:
        free, total = cuda.mem_get_info(ordinal)
    except RuntimeError:
        return None
    return free, total


def empty_cache() -> None:
    """Let torch return to the driver what it keeps for later, where CUDA was used.

    A GPU that has stopped answering gives nothing back; the next use of it tells.
    """
    cuda = used_cuda()
    if cuda is not None:
        with suppress(RuntimeError):
            cuda.empty_cache()


def used_cuda() -> Any:
    """``torch.cuda`` where this process has already used it, else ``None``."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


class Allocator(NamedTuple):
    """What torch's allocator and the driver say of one GPU, in bytes where nothing else is said."""

    allocated: int
    peak: int
    reserved: int
    free: int
    total: int
    segments: int = 0
    """Number of segments."""
    split: int = 0
    """In blocks of segments that are in use elsewhere, which can be given to nobody else."""
    retries: int = 0
    """How often the allocator gave everything back and tried again."""


def allocators() -> dict[int, Allocator]:
    """CUDA ordinal to what is known of each GPU that this process uses; empty where CUDA was not used."""
    cuda = used_cuda()
    if cuda is None:
        return {}
    found = {}
    for ordinal in range(cuda.device_count()):
        info = driver_info(cuda, ordinal) if cuda.memory_reserved(ordinal) else None
        if info is None:
            continue
        free, total = info
        stats = cuda.memory_stats(ordinal)
        found[ordinal] = Allocator(
            allocated=cuda.memory_allocated(ordinal),
            peak=cuda.max_memory_allocated(ordinal),
            reserved=cuda.memory_reserved(ordinal),
            free=free,
            total=total,
            segments=stats.get("segment.all.current", 0),
            split=stats.get("inactive_split_bytes.all.current", 0),
            retries=stats.get("num_alloc_retries", 0),
        )
    return found
