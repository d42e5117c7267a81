"""What a torch process takes of a GPU beside its tensors, by compute capability: CUDA context, libraries, workspaces."""

from __future__ import annotations

import msgspec

from ..units import MIB


class Overhead(msgspec.Struct, frozen=True):
    """Bytes on one GPU, for one process."""

    context_bytes: int
    """CUDA context, and the kernels and libraries that the first forward pass loads."""
    workspace_bytes: int
    """Of cuBLAS, which torch allocates at the first matrix product."""
    context_source: str
    workspace_source: str


_LARGE, _SMALL = 32 * MIB, 4096 * 1024 * 2 + 16 * 1024 * 8
"""Source: parseChosenWorkspaceSize of torch, aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB where the major number is 9,
10 or 12 (9.0 alone in older releases), else ``:4096:2:16:8``."""
_MEASURED = 698 * MIB
"""618 MiB for the context, the rest for kernels and libraries. Measured: H200, driver 580.159.04, torch 2.11
(benchmarks/README.md). Since CUDA 11.7 kernels are loaded when they are first used; before, a context took 1 GiB and more
(https://github.com/pytorch/pytorch/issues/107667), so versions of torch before 2.0 need ``Policy.context_bytes``."""
_BLACKWELL = 896 * MIB
"""The same for 160 multiprocessors in place of 132, rounded up: what a context reserves grows with them (local memory for
every thread that fits). Not measured."""


def overhead_of(capability: tuple[int, int] | None) -> Overhead:
    """What to leave for torch on a GPU.

    Args:
        capability: Major and minor; ``None`` is taken to be a Hopper card, on which both were measured.
    """
    if capability is None or capability[0] == 9:
        return Overhead(_MEASURED, _LARGE, "measured on an H200", "torch's default on Hopper")
    if capability[0] >= 10:
        source = "measured on an H200, and more for more multiprocessors"
        return Overhead(_BLACKWELL, _LARGE, source, "torch's default on Blackwell")
    source = "measured on an H200, which takes more than earlier cards"
    return Overhead(_MEASURED, _SMALL, source, "torch's default before Hopper")
