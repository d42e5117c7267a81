"""What came of really loading a model and calling it: by the plan, and by ``device_map="auto"`` beside it."""

from __future__ import annotations

from typing import Literal

import msgspec

from .answers import ErrorAnswer
from .findings import Finding
from .workload import Workload

Route = Literal["plan", "auto", "cpu"]
"""Whose map was followed; ``cpu`` is none."""
Reached = Literal["start", "imports", "weights", "prompt", "call", "second call"]
"""The last step that was done: nothing, torch and transformers imported, weights loaded, prompt made, one call, both."""


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """What one process had of one GPU."""

    device: str
    """As the process counts: ``cuda:0``."""
    gpu: int | None = None
    """GPU index (NVML order); ``None`` when it is not known."""
    allocated_bytes: int
    """torch's ``max_memory_allocated``, from the start of the process to the end of the first call."""
    reserved_bytes: int
    """torch's ``max_memory_reserved``, likewise."""
    free_bytes: int
    """What the driver then had left."""
    planned_allocated_bytes: int | None = None
    planned_reserved_bytes: int | None = None
    """Predictions of the plan; ``None`` without one."""


class SplitBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A repeated block whose tensors are on several devices."""

    key: str
    devices: tuple[str, ...]


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One process that loaded the model and called it twice, or what became of that."""

    route: Route
    state: Literal["ran", "raised", "crashed", "timed_out"]
    """``ran``: both calls came to their end; ``raised``: an exception; ``crashed``: the process died."""
    sentence: str = ""
    """What came of it."""
    reached: Reached = "start"
    message: str | None = None
    """How the process ended, such as ``SIGKILL``; ``None`` when it came to its own end."""
    seconds: float = 0.0
    """Of the whole process."""
    torch: str | None = None
    transformers: str | None = None
    class_name: str | None = None
    load_seconds: float | None = None
    call_seconds: float | None = None
    """Of the first call."""
    device_map: dict[str, int | str] = {}
    """``hf_device_map`` of the loaded model; empty when one device takes all, with transformers 5."""
    held_bytes: dict[str, int] = {}
    """Device to bytes of parameters and buffers there; ``meta`` is what is offloaded."""
    peaks: tuple[Peak, ...] = ()
    host_peak_bytes: int | None = None
    """Most memory of the process on the host, pages of mapped files included."""
    missing: tuple[str, ...] = ()
    """Some of the weights that the checkpoint lacks, and that are random therefore."""
    missing_count: int = 0
    astray: tuple[str, ...] = ()
    """Some of the tensors that are elsewhere than planned: ``lm_head.weight is on cpu, planned cuda:1``."""
    astray_count: int = 0
    cut_blocks: tuple[SplitBlock, ...] = ()
    """Some of the blocks that are cut."""
    cut_count: int = 0
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    """Made in each prompt."""
    is_finite: bool | None = None
    """Whether the logits of every step are numbers; ``None`` when it did not come to that."""
    is_repeatable: bool | None = None
    """Whether the second call gave the same tokens."""
    text: str | None = None
    """The tokens as text, shortened."""
    traceback: str | None = None
    """Its end."""
    error: ErrorAnswer | None = None
    """What the traceback means."""
    notes: tuple[str, ...] = ()

    @property
    def is_loaded(self) -> bool:
        """True when all weights were loaded."""
        return self.reached not in ("start", "imports")

    @property
    def offloaded_bytes(self) -> int:
        """Weights that no GPU keeps."""
        return sum(size for device, size in self.held_bytes.items() if not device.startswith("cuda"))


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``vlm-doctor try``."""

    model: str
    machine: str
    """``Machine.description``."""
    workload: Workload
    is_good: bool
    """Whether it loaded and answered as planned (with ``--cpu``: whether it loaded and answered)."""
    sentence: str
    attempts: tuple[Attempt, ...] = ()
    """The plan's (or the CPU's) first, then that of ``auto`` where it was asked for; empty when nothing was loaded."""
    findings: tuple[Finding, ...] = ()
    """About the first one."""
