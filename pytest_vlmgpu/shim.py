"""The GPU decorators of transformers', accelerate's, diffusers' and vLLM's test helpers, as markers of this plugin.

Change the import and keep the tests::

    from pytest_vlmgpu.shim import require_torch_gpu, require_torch_multi_gpu

Nothing is asked and nothing heavy is imported when a test module is: ``transformers.testing_utils`` costs seconds there
and creates a CUDA context. Each decorator marks a function, a method, or a class, ``unittest.TestCase`` too; without pytest
they do nothing. What differs: memory is *free* memory of *each* GPU and is judged right before the test, a broken or busy
GPU is an error and not a skip, and an amount that is met exactly is enough.

Not here are gates that ask for few GPUs (``require_torch_non_multi_gpu``, ``require_single_device``: ``--vlm-gpus`` chooses
how many a run gets), and gates of other hardware or of packages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "large_gpu_mark",
    "large_gpu_test",
    "multi_gpu_test",
    "require_accelerator_memory",
    "require_bf16",
    "require_big_accelerator",
    "require_big_gpu_with_torch_cuda",
    "require_cuda",
    "require_cuda_or_hpu",
    "require_cuda_or_xpu",
    "require_fp8",
    "require_fp16",
    "require_multi_device",
    "require_multi_gpu",
    "require_multi_gpu_or_xpu",
    "require_non_cpu",
    "require_torch_accelerator",
    "require_torch_accelerator_memory",
    "require_torch_bf16",
    "require_torch_bf16_gpu",
    "require_torch_fp16",
    "require_torch_gpu",
    "require_torch_large_accelerator",
    "require_torch_large_gpu",
    "require_torch_multi_accelerator",
    "require_torch_multi_gpu",
    "require_torch_n_accelerators",
    "require_torch_tf32",
]

TestT = TypeVar("TestT", bound="Callable[..., Any] | type")

_LARGE_GIB = 20.0
"""Default of transformers' ``require_torch_large_gpu(test_case, memory=20)``. Source: transformers/testing_utils.py."""
_BIG_GIB = 24.0
"""Default of diffusers' ``require_big_accelerator`` (``BIG_GPU_MEMORY``). Source: diffusers tests/testing_utils.py."""


def require_torch_gpu(test_case: TestT) -> TestT:
    """One GPU (transformers, diffusers, peft)."""
    return _mark(test_case)


def require_torch_multi_gpu(test_case: TestT) -> TestT:
    """Two GPUs (transformers, diffusers, peft)."""
    return _mark(test_case, gpus=2)


def require_torch_n_accelerators(n: int) -> Callable[[TestT], TestT]:
    """So many GPUs (transformers)."""
    return _marker(gpus=n)


@overload
def require_torch_large_gpu(test_case: TestT, memory: float = ...) -> TestT: ...
@overload
def require_torch_large_gpu(test_case: None = None, *, memory: float = ...) -> Callable[[TestT], TestT]: ...
def require_torch_large_gpu(test_case: Any = None, memory: float = _LARGE_GIB) -> Any:
    """One GPU with so many GiB free (transformers). With or without arguments."""
    return _marker(vram_gib=memory) if test_case is None else _mark(test_case, vram_gib=memory)


@overload
def require_torch_accelerator_memory(test_case: TestT, *, memory: float) -> TestT: ...
@overload
def require_torch_accelerator_memory(test_case: None = None, *, memory: float) -> Callable[[TestT], TestT]: ...
def require_torch_accelerator_memory(test_case: Any = None, *, memory: float) -> Any:
    """So many GiB free over all GPUs together (transformers; for tests that shard one model)."""
    return _marker(total_vram_gib=memory) if test_case is None else _mark(test_case, total_vram_gib=memory)


def require_torch_bf16_gpu(test_case: TestT) -> TestT:
    """One GPU with bfloat16 in hardware (transformers)."""
    return _mark(test_case, bf16=True)


def require_fp8(test_case: TestT) -> TestT:
    """One GPU with 8-bit floating point in hardware (accelerate)."""
    return _mark(test_case, fp8=True)


def require_accelerator_memory(min_memory_gb: float) -> Callable[[TestT], TestT]:
    """One GPU with so many GiB free (diffusers, whose "GB" are GiB)."""
    return _marker(vram_gib=min_memory_gb)


def require_big_accelerator(test_case: TestT) -> TestT:
    """One GPU with 24 GiB free (diffusers)."""
    return _mark(test_case, vram_gib=_BIG_GIB)


def large_gpu_mark(min_gb: float) -> pytest.MarkDecorator:
    """One GPU with so many GB (10**9 bytes, as vLLM counts) free."""
    return pytest.mark.vlm_requires(vram_gib=f"{min_gb}GB")


def large_gpu_test(*, min_gb: float) -> Callable[[TestT], TestT]:
    """The same as a decorator (vLLM)."""
    return _marker(vram_gib=f"{min_gb}GB")


def multi_gpu_test(*, num_gpus: int) -> Callable[[TestT], TestT]:
    """So many GPUs (vLLM, which also starts a process for the test; this does not)."""
    return _marker(gpus=num_gpus)


require_torch_accelerator = require_cuda = require_non_cpu = require_torch_gpu
require_cuda_or_hpu = require_cuda_or_xpu = require_torch_fp16 = require_fp16 = require_torch_gpu
require_torch_multi_accelerator = require_multi_device = require_multi_gpu = require_torch_multi_gpu
require_multi_gpu_or_xpu = require_torch_multi_gpu
require_torch_large_accelerator = require_torch_large_gpu
# TensorFloat-32 came with the same generation as bfloat16.
require_torch_bf16 = require_bf16 = require_torch_tf32 = require_torch_bf16_gpu
require_big_gpu_with_torch_cuda = require_big_accelerator


def _marker(**requirements: Any) -> Callable[[TestT], TestT]:
    def mark(test_case: TestT) -> TestT:
        return _mark(test_case, **requirements)

    return mark


def _mark(test_case: TestT, **requirements: Any) -> TestT:
    marked: TestT = pytest.mark.vlm_requires.with_args(**requirements)(test_case)
    return marked
