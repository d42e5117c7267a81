"""Tensors without data that claim to be on a GPU. Used by the child program :mod:`.trace_child` only."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CUDA = torch.device("cuda", 0)
META = torch.device("meta")
CPU = torch.device("cpu")


class Notes:
    """Hears what operations do with memory, and keeps nothing of it."""

    def born(self, tensor: torch.Tensor) -> None:
        """A tensor was made."""

    def read(self, tensor: torch.Tensor) -> None:
        """A tensor is an operand."""

    def temporary(self, *sizes_bytes: int) -> None:
        """A kernel holds scratch memory while it runs."""


class Ghost(torch.Tensor):  # type: ignore[misc]
    """A tensor that claims to be on a device and keeps only what ``inner`` keeps: nothing (meta), or small data (CPU)."""

    inner: torch.Tensor
    claimed: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device = CUDA) -> Ghost:
        """Claim a device for a tensor; both keep the same memory."""
        ghost: Ghost = torch.Tensor._make_subclass(
            cls, inner, require_grad=False, dispatch_device=True, device_for_backend_keys=device
        )
        ghost.inner = inner
        ghost.claimed = device
        return ghost

    def __repr__(self) -> str:
        return f"Ghost({tuple(self.inner.shape)}, {self.inner.dtype}, {self.claimed}, {self.inner.device.type})"

    @property
    def is_real(self) -> bool:
        """Whether there is data."""
        return bool(self.inner.device.type == "cpu")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].claimed
        from .trace_operations import run

        return run(func, args, kwargs or {}, Notes())


def map_nested(change: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to whatever is in lists, tuples and dicts; torch's own is several times slower."""
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([map_nested(change, one) for one in value])
    if kind is dict:
        return {key: map_nested(change, one) for key, one in value.items()}
    if isinstance(value, tuple):  # named ones
        return kind([map_nested(change, one) for one in value])
    return change(value)


def tensors_in(value: Any, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """Append all tensors of nested lists, tuples and dicts to ``found``, and give it back."""
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            tensors_in(one, found)
    elif isinstance(value, dict):
        for one in value.values():
            tensors_in(one, found)
    return found


def storage_of(tensor: torch.Tensor) -> Any:
    """The memory of a tensor, which views share."""
    inner = tensor.inner if isinstance(tensor, Ghost) else tensor
    return inner.untyped_storage()


def pretend_cuda() -> None:
    """Let tensors say that they are on a GPU in a process that must not touch one.

    Torch starts CUDA where a GPU is named, before a mode can answer, and selects that GPU around many operations. The
    selector of a torch built with CUDA is replaced by torch itself when it finds no GPU; a torch built without CUDA has
    none, and gets the one of the meta device, which does nothing. Source: c10/core/impl/DeviceGuardImplInterface.h.
    """
    torch.cuda._lazy_init = lambda: None
    # torch.tensor(...) makes its tensor on the CPU and moves it where a mode can see that.
    torch._C._set_only_lift_cpu_tensors(True)
    torch._C._ensureCUDADeviceGuardSet()
    if torch.version.cuda is None:
        kinds = torch._C._autograd.DeviceType
        cuda, meta = int(kinds.CUDA.value), int(kinds.Meta.value)
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        table = "_ZN3c104impl26device_guard_impl_registryE"
        selectors = (ctypes.c_void_p * (max(cuda, meta) + 1)).in_dll(library, table)
        selectors[cuda] = selectors[cuda] or selectors[meta]
