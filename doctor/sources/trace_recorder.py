"""Writes down which tensors come and go on the GPU that is not there. Used by :mod:`.trace_child` only."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .trace_ghost import Notes, storage_of
from .trace_operations import run


class Recorder(TorchDispatchMode, Notes):  # type: ignore[misc]
    """Runs operations on ghosts and writes down every storage that comes and goes.

    ``events`` holds ``[number, size_bytes, place, module]``: a size above 0 is an allocation, 0 the end of that number; a
    negative size says that so many bytes of it are read, for the first time, at a place other than its own.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.events: list[list[int]] = []
        self.place = 0
        self.module = 0
        self._numbers: dict[int, int] = {}
        self._places: dict[int, set[int]] = {}
        self._next = 1
        self._is_listening = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare the import of torch's compiler, a second of time."""
        return False

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these: weights."""
        for tensor in tensors:
            self._numbers[storage_of(tensor)._cdata] = 0

    def listen(self) -> None:
        """Count from now on."""
        self._is_listening = True

    def born(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is known or empty."""
        storage = storage_of(tensor)
        key = storage._cdata
        if not self._is_listening or key in self._numbers or not storage.nbytes():
            return
        number = self._allocate(storage.nbytes())
        self._numbers[key] = number
        self._places[number] = {self.place}
        weakref.finalize(storage, self._end, key, number)

    def read(self, tensor: torch.Tensor) -> None:
        """Note the first use of a storage at a place other than its own: on another GPU it would be a copy."""
        number = self._numbers.get(storage_of(tensor)._cdata, 0)
        if number and self.place not in self._places[number]:
            self._places[number].add(self.place)
            self.events.append([number, -tensor.numel() * tensor.element_size() or -1, self.place, self.module])

    def temporary(self, *sizes_bytes: int) -> None:
        """Scratch memory that a kernel allocates, all of it at once, and gives back when it has run."""
        if self._is_listening:
            numbers = [self._allocate(size) for size in sizes_bytes if size]
            self.events.extend([number, 0, self.place, self.module] for number in reversed(numbers))

    def _allocate(self, size_bytes: int) -> int:
        number, self._next = self._next, self._next + 1
        self.events.append([number, size_bytes, self.place, self.module])
        return number

    def _end(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self._places.pop(number, None)
        self.events.append([number, 0, self.place, self.module])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].claimed
        return run(func, args, kwargs or {}, self)
