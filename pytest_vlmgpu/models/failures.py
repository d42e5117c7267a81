"""What can go wrong when a model is loaded, as a code and one sentence. Pure: errors and readings come in as data."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_doctor.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vlm_doctor.placement import Stage


_OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "MemoryError")
_DETAIL_LENGTH = 200
"""Characters of a library's own message that a sentence quotes."""


class LoadFailure(Exception):  # noqa: N818 - what a test meets is a failed load, not a bug of ours
    """A model could not be loaded as planned."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        """Such as ``VLM714``: ``vlm-doctor explain`` knows it."""
        self.message = message
        """One sentence: what, where, what to do."""
        self.details = ""
        """Traceback of the library's own error as text; not chained, because its frames would keep half a model alive."""


class Allocation(NamedTuple):
    """What torch and the driver say of one GPU at the moment it ran out of memory, in bytes."""

    allocated: int
    reserved: int
    free: int


def needs_remote_code(name: str) -> LoadFailure:
    """The failure for a checkpoint whose class is Python code that nobody allowed to run."""
    return LoadFailure(
        "VLM713",
        f"{name} brings its own Python code (auto_map in config.json), which was not run: read that code, and if you trust "
        "it, allow it with trust_remote_code=True.",
    )


def broken_torch(error: Exception) -> LoadFailure:
    """The failure for a torch that is installed and cannot be imported, whatever the model."""
    detail = _one_line(f"{type(error).__name__}: {error}")
    failure = LoadFailure("VLM712", f"torch cannot be imported ({detail}): run vlm-doctor to see why.")
    failure.details = "".join(traceback.format_exception(error))
    return failure


def check_weights(name: str, problems: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights are random: its answers look plausible and mean nothing.

    Args:
        name: The model.
        problems: What ``from_pretrained(output_loading_info=True)`` returns beside the model. Weights of another shape are
            refused by transformers itself.

    Raises:
        LoadFailure: VLM713, when weights are missing from the checkpoint.
    """
    missing = sorted(problems.get("missing_keys", ()))
    if missing:
        raise LoadFailure(
            "VLM713",
            f"the checkpoint of {name} lacks {len(missing)} of its weights, such as {missing[0]}: download it again, "
            "or install the transformers version it was saved with.",
        )


def explained(
    name: str, error: Exception, stages: Sequence[Stage], allocations: Callable[[], Mapping[str, Allocation]]
) -> LoadFailure:
    """The failure for an error that a library raised while it loaded the model.

    Args:
        name: The model.
        error: What was raised.
        stages: Of the plan; empty when the model was loaded for the CPU.
        allocations: Gives GPU UUID to what is allocated now; called only when memory ran out.
    """
    texts = _chain(error)
    everything = " ".join(texts)
    detail = _one_line(texts[0])
    if any(sign in everything for sign in _OUT_OF_MEMORY):
        failure = LoadFailure("VLM715", _out_of_memory(name, detail, stages, allocations()))
    elif "CUDA error" in everything:
        failure = LoadFailure(
            "VLM712",
            f"a GPU failed while {name} was loaded ({detail}): run vlm-doctor, and look for Xid messages with dmesg.",
        )
    elif "trust_remote_code" in everything:
        failure = needs_remote_code(name)
    elif isinstance(error, ModuleNotFoundError):
        failure = LoadFailure(
            "VLM713",
            f"{name} needs the Python package {error.name}, which is not installed: install it (torch, transformers and "
            "accelerate come with pytest-vlmgpu[models]).",
        )
    else:
        failure = LoadFailure(
            "VLM713",
            f"{name} cannot be loaded ({detail}): check the name, and its files with vlm-doctor plan {name}.",
        )
    failure.details = "".join(traceback.format_exception(error))
    return failure


def _chain(error: BaseException | None) -> list[str]:
    """``Type: message`` of the error, then of what caused it."""
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return texts


def _out_of_memory(name: str, detail: str, stages: Sequence[Stage], readings: Mapping[str, Allocation]) -> str:
    figures = [_figures(stage, readings.get(stage.uuid)) for stage in stages]
    beside = f" Planned and found: {'; '.join(figures)}." if figures else ""
    advice = "see with vlm-doctor who holds memory, then plan again."
    return f"{name} ran out of memory while it was loaded ({detail}): {advice}{beside}"


def _figures(stage: Stage, reading: Allocation | None) -> str:
    planned = (
        f"GPU {stage.gpu} ({stage.name}) {format_gib(stage.weights_bytes)} of weights and "
        f"a peak of {format_gib(stage.peak_bytes)}"
    )
    if reading is None:
        return planned
    return (
        f"{planned}, torch has {format_gib(reading.allocated)} allocated and {format_gib(reading.reserved)} reserved, "
        f"{format_gib(reading.free)} free"
    )


def _one_line(text: str) -> str:
    """First line of a library's message, without its full stop and not longer than a sentence may be."""
    line = next(iter(text.strip().splitlines()), "").rstrip(". ")
    return line if len(line) <= _DETAIL_LENGTH else f"{line[:_DETAIL_LENGTH]}…"
