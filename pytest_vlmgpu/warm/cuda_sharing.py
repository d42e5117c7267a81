"""Memory of GPUs for another process, by torch's own means (``torch.multiprocessing.reductions``, CUDA IPC).

A process that has it can write to it, and CUDA knows no other way: so all of it is added up before it is lent again.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import Block, CudaBlock
from .sharing import sample

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_COUNTERS = Path("/dev/shm")
"""Where torch counts who has its memory, in files ``torch_PID_…``. Source: NewProcessWideShmHandle (c10)."""
_ROW = 2**16
"""Words of 8 bytes that have a weight each: words that change places within a row change the sum."""
_ROWS = 128
"""Added up at once: 64 MiB of intermediate memory."""
_PRIME = 1_000_003
"""Odd, so that no bit of an earlier row's sum is lost when rows are joined."""


def checksum(storage: Any) -> int:
    """A number that another content would, but for chance, not have.

    Args:
        storage: Tensor of ``uint8``, on any device; read once, in the order of its bytes.
    """
    import torch

    whole = storage.numel() // 8 * 8
    total = 0
    rest = storage[whole:]
    for value in rest.cpu().tolist():
        total = total * 257 + value + 1
    if not whole:
        return total % 2**64
    # The beginning of a block is aligned, so that its bytes can be read as words.
    words = storage[:whole].view(torch.int64)
    weights = _weights(storage.device)
    for start in range(0, words.numel(), _ROW * _ROWS):
        part = words[start : start + _ROW * _ROWS]
        rows = part.numel() // _ROW
        sums = (part[: rows * _ROW].view(rows, _ROW) * weights).sum(dim=1).tolist() if rows else []
        tail = part[rows * _ROW :]
        if tail.numel():
            sums.append(int((tail * weights[: tail.numel()]).sum()))
        for one in sums:
            total = total * _PRIME + one
        total %= 2**64
    return total


@cache
def _weights(device: Any) -> Any:
    """Odd numbers, the same in each process."""
    import torch

    chance = torch.Generator().manual_seed(_PRIME)
    return torch.randint(-(2**62), 2**62, (_ROW,), generator=chance, dtype=torch.int64).mul_(2).add_(1).to(device)


def exported(storages: Sequence[Any], uuids: Mapping[int, str]) -> tuple[Block, ...]:
    """What another process needs to reach these blocks; asked anew for each, as torch counts who has them.

    Args:
        storages: Tensors of ``uint8``.
        uuids: CUDA ordinal to UUID.
    """
    import torch
    from torch.multiprocessing.reductions import reduce_tensor

    # What torch would have each receiver wait for, one event a block that it opens and never closes; there is nothing to
    # wait for now.
    for ordinal in sorted({storage.device.index for storage in storages}):
        torch.cuda.synchronize(ordinal)
    blocks = []
    for storage in storages:
        if not storage.numel():  # no memory, so no handle either
            blocks.append(Block(0, cuda=CudaBlock(uuid=uuids[storage.device.index])))
            continue
        # Positions of the arguments: torch/multiprocessing/reductions.py, rebuild_cuda_tensor.
        _, arguments = reduce_tensor(storage)
        blocks.append(
            Block(
                storage.numel(),
                sample=sample(storage),
                cuda=CudaBlock(
                    uuid=uuids[storage.device.index],
                    handle=bytes(arguments[7]),
                    storage_bytes=arguments[8],
                    storage_offset=arguments[9],
                    counter=bytes(arguments[11]),
                    counter_offset=arguments[12],
                    event=bytes(arguments[13]),
                ),
                offset=arguments[3],
            )
        )
    return tuple(blocks)


def imported(blocks: Sequence[Block], ordinals: Mapping[str, int]) -> list[Any]:
    """Each block as a tensor of ``uint8`` on the same GPU, whatever its number is here.

    Raises:
        KeyError: A GPU is not seen by this process.
        RuntimeError: CUDA refuses.
    """
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    found = []
    for block in blocks:
        assert block.cuda is not None
        there = block.cuda
        ordinal = ordinals[there.uuid]
        if not there.handle:
            found.append(torch.empty(0, dtype=torch.uint8, device=f"cuda:{ordinal}"))
            continue
        found.append(
            rebuild_cuda_tensor(
                torch.Tensor,
                (block.size_bytes,),
                (1,),
                block.offset,
                torch.storage.TypedStorage,
                torch.uint8,
                ordinal,
                there.handle,
                there.storage_bytes,
                there.storage_offset,
                False,
                there.counter,
                there.counter_offset,
                there.event,
                False,  # no event to wait for: the host has waited for its GPUs itself
            )
        )
    return found


def remove_counters(names: Collection[bytes]) -> None:
    """Remove torch's files of counters, which stay when a process ends at once; whoever still has memory needs none."""
    own = f"torch_{os.getpid()}_"
    for name in (os.fsdecode(each).lstrip("/") for each in names):
        if name.startswith(own) and "/" not in name:
            (_COUNTERS / name).unlink(missing_ok=True)
