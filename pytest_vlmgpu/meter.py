"""Peak GPU memory of one phase of a test session, as torch's allocator counts it."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """The most memory of one GPU that was in use at once, in bytes."""

    allocated: int
    """By tensors: what :attr:`vlm_doctor.placement.Stage.peak_bytes` predicts."""
    reserved: int
    """By the allocator's segments, which hold the tensors and the gaps between them."""


class Meter:
    """Measures from :meth:`start` to :meth:`stop`; phases follow each other, since torch keeps one peak a GPU.

    A meter never imports torch and never creates a CUDA context: where the process under test has not used a GPU, there is
    nothing to measure.
    """

    def start(self) -> None:
        """Forget the peaks so far."""
        cuda = _used_cuda()
        if cuda is not None:
            for ordinal in range(cuda.device_count()):
                cuda.reset_peak_memory_stats(ordinal)

    def stop(self) -> dict[int, Peak]:
        """CUDA ordinal to the peak since :meth:`start`, of each GPU that held any tensor; empty without CUDA."""
        cuda = _used_cuda()
        if cuda is None:
            return {}
        peaks = {
            ordinal: Peak(cuda.max_memory_allocated(ordinal), cuda.max_memory_reserved(ordinal))
            for ordinal in range(cuda.device_count())
        }
        return {ordinal: peak for ordinal, peak in peaks.items() if peak.reserved}


def _used_cuda() -> Any:
    """``torch.cuda`` where this process has already used it, else ``None``."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None
