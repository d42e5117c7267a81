"""What a library raises while it loads a model, as one sentence with a code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vlmgpu.models.failures import Allocation, LoadFailure, broken_torch, check_weights, explained
from vlm_doctor.placement import LedgerLine, Stage
from vlm_doctor.units import GIB

if TYPE_CHECKING:
    from collections.abc import Mapping

STAGES = (
    Stage(
        gpu=2,
        uuid="GPU-a",
        name="L4",
        keys=("model",),
        ledger=(
            LedgerLine(kind="weights", label="weights", size_bytes=8 * GIB, source="header"),
            LedgerLine(kind="kv_cache", label="KV cache", size_bytes=GIB, source="formula"),
            LedgerLine(kind="left", label="left", size_bytes=GIB, source="rest"),
        ),
        total_bytes=10 * GIB,
    ),
    Stage(gpu=3, uuid="GPU-b", name="L4", keys=("lm_head",), ledger=(), total_bytes=10 * GIB),
)


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which this environment may lack."""


def _never() -> Mapping[str, Allocation]:
    raise AssertionError("allocations are read only when memory ran out")


def _explained(error: Exception) -> tuple[str, str]:
    failure = explained("org/model", error, STAGES, _never)
    return failure.code, failure.message


def test_running_out_of_memory_shows_the_plan_beside_the_allocator() -> None:
    error = OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore advice")
    readings = {"GPU-a": Allocation(allocated=7 * GIB, reserved=8 * GIB, free=GIB // 2)}
    failure = explained("org/model", error, STAGES, lambda: readings)
    assert failure.code == "VLM715"
    assert failure.message == (
        "org/model ran out of memory while it was loaded (OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 "
        "GiB): see with vlm-doctor who holds memory, then plan again. Planned and found: GPU 2 (L4) 8.0 GiB of weights and "
        "a peak of 9.0 GiB, torch has 7.0 GiB allocated and 8.0 GiB reserved, 512 MiB free; GPU 3 (L4) 0 MiB of weights "
        "and a peak of 0 MiB."
    )


def test_out_of_memory_is_recognized_behind_another_error() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise RuntimeError("could not convert weights") from None
    except RuntimeError as error:
        hidden = error
    assert explained("org/model", hidden, (), dict).message == (
        "org/model ran out of memory while it was loaded (RuntimeError: could not convert weights): see with vlm-doctor "
        "who holds memory, then plan again."
    )


def test_a_gpu_fault_is_not_blamed_on_the_model() -> None:
    assert _explained(RuntimeError("CUDA error: an illegal memory access was encountered")) == (
        "VLM712",
        "a GPU failed while org/model was loaded (RuntimeError: CUDA error: an illegal memory access was encountered): run "
        "vlm-doctor, and look for Xid messages with dmesg.",
    )


def test_remote_code_is_recognized_in_the_library_s_own_words() -> None:
    code, message = _explained(ValueError("contains custom code. Please pass the argument `trust_remote_code=True`"))
    assert code == "VLM713"
    assert message == (
        "org/model brings its own Python code (auto_map in config.json), which was not run: read that code, and if you "
        "trust it, allow it with trust_remote_code=True."
    )


def test_a_missing_package_is_named() -> None:
    assert _explained(ModuleNotFoundError("No module named 'torch'", name="torch")) == (
        "VLM713",
        "org/model needs the Python package torch, which is not installed: install it (torch, transformers and accelerate "
        "come with pytest-vlmgpu[models]).",
    )


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("first line.\nsecond", "OSError: first line"),
        ("", "OSError:"),
        ("x" * 300, f"OSError: {'x' * 191}…"),
    ],
)
def test_any_other_error_is_quoted_in_one_line(text: str, quoted: str) -> None:
    assert _explained(OSError(text)) == (
        "VLM713",
        f"org/model cannot be loaded ({quoted}): check the name, and its files with vlm-doctor plan org/model.",
    )


def test_the_traceback_is_kept_as_text() -> None:
    assert explained("org/model", OSError("gone"), (), _never).details == "OSError: gone\n"


def test_a_broken_torch_is_not_blamed_on_the_model() -> None:
    failure = broken_torch(OSError("libcudart.so.13: cannot open shared object file\nmore"))
    assert str(failure) == (
        "VLM712: torch cannot be imported (OSError: libcudart.so.13: cannot open shared object file): run vlm-doctor to "
        "see why."
    )
    assert failure.details.startswith("OSError: libcudart")


def test_complete_weights_pass_and_extra_ones_do_not_matter() -> None:
    check_weights("org/model", {"missing_keys": set(), "unexpected_keys": {"extra"}})


def test_missing_weights_are_counted_and_one_is_named() -> None:
    with pytest.raises(LoadFailure) as caught:
        check_weights("org/model", {"missing_keys": {"model.b", "model.a"}})
    assert (caught.value.code, caught.value.message) == (
        "VLM713",
        "the checkpoint of org/model lacks 2 of its weights, such as model.a: download it again, or install the "
        "transformers version it was saved with.",
    )
