"""``torch.cuda`` of two GPUs with a counting allocator: enough of it for what reads memory, without torch."""

from __future__ import annotations

from types import SimpleNamespace

GIB = 2**30


class Cuda:
    """Tensors are numbers: :meth:`take` and :meth:`free` so many GiB."""

    def __init__(self, total_gib: float = 24) -> None:
        self.total = int(total_gib * GIB)
        self.allocated = [0, 0]
        self.peak = [0, 0]
        self.reserved = [0, 0]
        self.peak_reserved = [0, 0]
        self.emptied = 0
        self.is_broken = False

    def take(self, gib: float, ordinal: int = 0) -> None:
        self.allocated[ordinal] += int(gib * GIB)
        self.peak[ordinal] = max(self.peak[ordinal], self.allocated[ordinal])
        self.reserved[ordinal] = max(self.reserved[ordinal], self.allocated[ordinal])
        self.peak_reserved[ordinal] = max(self.peak_reserved[ordinal], self.reserved[ordinal])

    def free(self, gib: float, ordinal: int = 0) -> None:
        self.allocated[ordinal] -= int(gib * GIB)

    def _answer(self) -> None:
        """What asks the driver fails once a kernel has failed."""
        if self.is_broken:
            raise RuntimeError("CUDA error: unspecified launch failure")

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def memory_allocated(self, ordinal: int) -> int:
        return self.allocated[ordinal]

    def max_memory_allocated(self, ordinal: int) -> int:
        return self.peak[ordinal]

    def memory_reserved(self, ordinal: int) -> int:
        return self.reserved[ordinal]

    def max_memory_reserved(self, ordinal: int) -> int:
        return self.peak_reserved[ordinal]

    def reset_peak_memory_stats(self, ordinal: int) -> None:
        self.peak[ordinal] = self.allocated[ordinal]
        self.peak_reserved[ordinal] = self.reserved[ordinal]

    def mem_get_info(self, ordinal: int) -> tuple[int, int]:
        self._answer()
        return self.total - self.reserved[ordinal] - GIB // 2, self.total

    def memory_stats(self, ordinal: int) -> dict[str, int]:
        return {"segment.all.current": 3, "inactive_split_bytes.all.current": 2**20, "num_alloc_retries": 1}

    def empty_cache(self) -> None:
        self._answer()
        self.emptied += 1
        self.reserved = list(self.allocated)


class Module:
    """Stands for ``torch.nn.Module``; no model of these tests is one."""


class Tensor:
    """Stands for ``torch.Tensor``."""


def fake_torch(cuda: Cuda) -> SimpleNamespace:
    """A module torch with that ``cuda``."""
    return SimpleNamespace(cuda=cuda, nn=SimpleNamespace(Module=Module), Tensor=Tensor)
