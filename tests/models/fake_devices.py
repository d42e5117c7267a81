"""GPUs that are not there: tensors that compute on the CPU and say, and insist, that they are on ``cuda:N``.

Real values, real hooks of accelerate, and torch's own error when one operation meets tensors of two devices. That is how
the tests learn whether a ``device_map`` runs, and whether a model that was moved still answers the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

_MOVES = (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu)
_LOOKS_ONLY = (torch.Tensor.expand_as, torch.Tensor.view_as, torch.Tensor.reshape_as)
"""They take the shape of their second tensor, wherever it is."""
_INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
"""Their indices may be on the CPU."""
_BETWEEN = (torch.Tensor.copy_, torch.Tensor.data.__set__, torch._has_compatible_shallow_copy_type)
"""They may have tensors of two devices."""
_NO_RESULT = (torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__, torch.Tensor.__repr__, torch.Tensor.data_ptr)


class Placed(torch.Tensor):  # type: ignore[misc]
    """A tensor with a device of its own choosing."""

    place: torch.device

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Placed:
        made: Placed = torch.Tensor._make_subclass(cls, data.detach().as_subclass(torch.Tensor), requires_grad)
        made.place = getattr(data, "place", torch.device("cpu"))
        return made


def put(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    """Say that a tensor is on a device, without moving it."""
    if isinstance(tensor, torch.Tensor):
        with torch._C.DisableTorchFunction():
            placed = tensor if isinstance(tensor, Placed) else tensor.as_subclass(Placed)
        placed.place = _device(device)
        return placed
    return tensor


def _device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def place_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor says it is."""
    place = getattr(tensor, "place", None)
    if place is None:
        with torch._C.DisableTorchFunction():
            place = tensor.device
    return place


class FakeDevices(TorchFunctionMode):  # type: ignore[misc]
    """While it is entered, tensors keep to their devices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return place_of(args[0])
        if func == torch.Tensor.is_cuda.__get__:
            return place_of(args[0]).type == "cuda"
        if func is torch.device and type(args[0]) is int:
            return torch.device("cuda", args[0])
        if func == torch.Tensor.data.__set__:
            args[0].place = place_of(args[1])
        with torch._C.DisableTorchFunction():
            if func in _MOVES:
                return self._move(func, args, kwargs)
            tensors = args[:1] if func in _LOOKS_ONLY or _fills_slice(func, args) else (args, kwargs)
            places = {place_of(tensor) for tensor in tree_iter(tensors) if _counts(tensor)}
            if func in _INDEXED:
                places -= {torch.device("cpu")} - {place_of(args[0])}
            if len(places) > 1 and func not in _BETWEEN:
                found = ", ".join(sorted(map(str, places)))
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {found}!"
                )
            device = kwargs.get("device")
            if device is not None:
                kwargs["device"] = "meta" if torch.device(device).type == "meta" else "cpu"
            result = func(*_countable(func, args), **kwargs)
        if device is None:
            device = next(iter(places), None)
            if device is None:
                device = next((place_of(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)), None)
        # A torch.Size is a tuple with methods of its own.
        if device is None or func in _NO_RESULT or isinstance(result, torch.Size):
            return result
        return tree_map(lambda item: put(item, device) if isinstance(item, torch.Tensor) else item, result)

    def _move(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        tensor, *rest = (torch.device("cuda", item) if type(item) is int else item for item in args)
        device, dtype, _, _ = torch._C._nn._parse_to(
            *[item for item in rest if not isinstance(item, torch.Tensor)],
            **{key: value for key, value in kwargs.items() if key in ("device", "dtype")},
        )
        other = next((item for item in rest if isinstance(item, torch.Tensor)), None)
        if other is not None:
            device, dtype = place_of(other), other.dtype
        if func is torch.Tensor.cpu:
            device = torch.device("cpu")
        target = device or place_of(tensor)
        if target == place_of(tensor) and dtype in (None, tensor.dtype) and not kwargs.get("copy"):
            return tensor  # itself, as in torch: a parameter stays one
        moved = tensor if dtype is None else torch.Tensor.to(tensor, dtype)
        if target.type == "meta":
            return torch.Tensor.to(tensor, "meta")
        if target != place_of(tensor) or kwargs.get("copy"):
            moved = torch.Tensor.clone(moved)
        return put(moved, target)


def _fills_slice(func: Any, args: Any) -> bool:
    """Writing to a slice copies, from whatever device."""
    return func is torch.Tensor.__setitem__ and not any(isinstance(item, torch.Tensor) for item in tree_iter(args[1]))


def _countable(func: Any, args: Any) -> Any:
    """CUDA counts integers in bins, the CPU does not."""
    return (args[0].float(), *args[1:]) if func is torch.histc else args


def _counts(item: Any) -> bool:
    """Numbers in tensors may come from anywhere, as in torch."""
    return isinstance(item, torch.Tensor) and item.dim() > 0


@contextmanager
def fake_devices() -> Iterator[None]:
    """Enter the mode."""
    with FakeDevices():
        yield
