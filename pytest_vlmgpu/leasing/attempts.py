"""Notes whether torch tried to start CUDA, while none can be seen: it keeps for the life of its process that there is none.

``torch.cuda.is_initialized()`` stays False after an attempt that failed, so the attempt itself is noted. torch is never
imported here; what is imported while this looks on is seen, too.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType, TracebackType

_EXTENSION = "torch._C"
_PACKAGE = "torch.cuda"
"""Imported by torch itself, after the extension: the moment to look at a torch that is imported late."""
_COUNT = "_cuda_getDeviceCount"
_STARTERS = ("_cuda_init", _COUNT)
"""Functions of the extension through which Python starts CUDA, and C++ where it does so lazily (``device_lazy_init``). A
build for the CPU has none. Source: torch/cuda/__init__.py, torch 2.4 to 2.13."""
_AUTOGRAD = "torch.autograd"
_BACKWARD = "_engine_run_backward"
"""Through which every backward pass goes: the first one has C++ count the GPUs, also where all tensors are the CPU's.
Source: torch/autograd/__init__.py; seen with torch 2.11, which found no GPU in that process from then on."""


class Attempts:
    """Looks on from its beginning to its end as a context."""

    def __init__(self) -> None:
        self.has_failed = False
        """True once CUDA was to be started, and no GPU was found; or GPUs were counted where nobody sees the result."""
        self._wrapped: list[tuple[ModuleType, str, Callable[..., Any]]] = []

    def __enter__(self) -> Attempts:
        if not self._look_on():
            sys.meta_path.insert(0, self)  # as a finder, which finds nothing
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for module, name, function in self._wrapped:
            setattr(module, name, function)
        self._wrapped.clear()

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """Look on at a torch that is being imported; every module is found by others."""
        if name.startswith(_PACKAGE):
            self._look_on()
        return None

    def _look_on(self) -> bool:
        for name in _STARTERS:
            self._wrap(_EXTENSION, name, self._noting)
        self._wrap(_AUTOGRAD, _BACKWARD, self._counting)
        return _EXTENSION in sys.modules

    def _wrap(self, owner: str, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        module = sys.modules.get(owner)
        function = getattr(module, name, None)
        if module is None or function is None or any((module, name) == done[:2] for done in self._wrapped):
            return
        self._wrapped.append((module, name, function))
        setattr(module, name, wrapper(function))

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(*arguments: Any, **options: Any) -> Any:
            self.has_failed = True
            return function(*arguments, **options)

        return counting

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def noting(*arguments: Any) -> Any:
            try:
                result = function(*arguments)
            except BaseException:
                self.has_failed = True
                raise
            if result == 0:  # ``_cuda_init`` gives None
                self.has_failed = True
            return result

        return noting


def counted_gpus() -> int | None:
    """GPUs that torch sees in this process, which starts CUDA; ``None`` where no torch with CUDA is imported."""
    count = getattr(sys.modules.get(_EXTENSION), _COUNT, None)
    if count is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with -W error what torch says of it would be raised
        try:
            return int(count())
        except RuntimeError:
            return 0
