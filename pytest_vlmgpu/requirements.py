"""What a test asks for, as data: the model it names and the GPUs it needs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

DTYPES = ("bfloat16", "float16", "float32")
"""In which models are loaded, in torch's words."""
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
"""What else they are called, for messages."""
DEVICE_MAPS = ("doctor", "single", "auto", "balanced")
"""Who places a model: the planner; the planner, on one GPU; transformers with its own ``device_map`` of that name."""
BY_TRANSFORMERS = ("auto", "balanced")
"""Those that ``from_pretrained`` is given as they are."""
BF16_CAPABILITY = (8, 0)
"""First compute capability with bfloat16 in hardware. Source: CUDA programming guide, arithmetic instructions."""
FP8_CAPABILITY = (8, 9)
"""First compute capability with 8-bit floating point in hardware (Ada). Source: as above."""


@dataclass(frozen=True)
class VlmSpec:
    """One model as a test names it. Tests with equal specs share one load."""

    name: str
    """Folder or hub id."""
    dtype: str | None = None
    """torch's word, such as ``bfloat16``; ``None`` is the checkpoint's own."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""
    min_gpus: int = 1
    """Spread the model over at least this many GPUs (``vlm_requires(gpus=…)``)."""
    device_map: str | None = None
    """Who places it, of :data:`DEVICE_MAPS`; ``None``, which is what a test gets for ``doctor``, is the planner."""
    rules: str = ""
    """Whose fixtures place and load it, where tests of this model see different ones: folders and files."""

    @property
    def is_placed_by_transformers(self) -> bool:
        """True for ``device_map="auto"`` and ``"balanced"``: the planner only says whether it fits."""
        return self.device_map in BY_TRANSFORMERS

    def completed(self, *, gpus: int, dtype: str | None, device_map: str) -> VlmSpec:
        """As one test uses it.

        Args:
            gpus: As many as the test requires.
            dtype: Where the marker names none.
            device_map: Where the marker names none. A test of several GPUs is not put on one by it.
        """
        how = self.device_map or device_map
        return replace(self, dtype=self.dtype or dtype, device_map=None if how == "doctor" else how).spread_over(gpus)

    def spread_over(self, gpus: int) -> VlmSpec:
        """The same on at least so many GPUs."""
        how = None if self.device_map == "single" and gpus > 1 else self.device_map
        return replace(self, min_gpus=gpus, device_map=how)

    @property
    def label(self) -> str:
        """``org/model (float16, at least 2 GPUs)``: the name, then what differs from the default."""
        details = [self.dtype] if self.dtype else []
        details += [f'device_map "{self.device_map}"'] if self.device_map else []
        details += [f"at least {self.min_gpus} GPUs"] if self.min_gpus > 1 else []
        details += [f"by the fixtures of {self.rules}"] if self.rules else []
        return f"{self.name} ({', '.join(details)})" if details else self.name


@dataclass(frozen=True)
class Estimate:
    """What a model needs, as an engine that places it itself says (hook ``pytest_vlmgpu_estimate``)."""

    vram_bytes: int
    """Free memory on each GPU."""
    gpus: int = 1
    """On so many GPUs."""


@dataclass(frozen=True)
class Requirements:
    """What the GPUs of a test must offer. Sizes are bytes; every number is a lower bound that may be met exactly."""

    gpus: int = 1
    """So many GPUs must meet the requirements for each GPU at once."""
    vram_bytes: int | None = None
    """Free memory on each of them."""
    total_vram_bytes: int | None = None
    """Free memory of all GPUs that meet the other requirements, together."""
    capability: tuple[int, int] | None = None
    """Compute capability, such as ``(8, 0)``."""
    p2p: bool = False
    """Each of them reaches the memory of every other one directly."""
    exclusive: bool = False
    """No other process computes on them."""
    reason: str | None = None
    """Why, for people; of several markers all reasons."""

    @property
    def needs_memory(self) -> bool:
        """True when free memory matters."""
        return self.vram_bytes is not None or self.total_vram_bytes is not None

    @classmethod
    def strictest(cls, requirements: Iterable[Requirements]) -> Requirements:
        """Join requirements that all apply: the larger of each."""
        return reduce(_stricter, requirements, cls())


@dataclass(frozen=True)
class WatchedTest:
    """What is measured and guarded while a test runs, read when it is collected."""

    loads: bool
    """True when it uses the fixture ``vlm``: the model is shared, and must stay as it is."""
    mutates: bool = False
    """``vlm_mutates``: it may change the model, which is loaded again for whoever comes next."""
    limit_bytes: int | None = None
    """``vlm_limit_vram``: the most memory its tensors may take on any one GPU."""
    declared_bytes: int | None = None
    """``vlm_requires(vram_gib=…)``, to be held against what was measured."""


@lru_cache(maxsize=1024)
def _stricter(one: Requirements, other: Requirements) -> Requirements:
    joined: dict[str, Any] = {}
    for field in fields(Requirements):
        if field.name == "reason":
            continue
        values = [value for value in (getattr(one, field.name), getattr(other, field.name)) if value is not None]
        joined[field.name] = max(values, default=None)
    reasons = [text for reason in (one.reason, other.reason) if reason for text in reason.split("; ")]
    return Requirements(**joined, reason="; ".join(dict.fromkeys(reasons)) or None)


@dataclass(frozen=True)
class GatedTest:
    """What one test asks for, read from its markers and fixtures when it is collected."""

    specs: tuple[VlmSpec, ...]
    """Models it names; one, or none when it names no model, where the fixture ``vlm`` is used."""
    requirements: Requirements
    """All ``vlm_requires`` that apply, joined."""
    wants_gpus: bool
    """True when it asks for GPUs as such (``vlm_requires``, ``vlm_gpus``), so that a CPU run cannot satisfy it."""
    loads: bool
    """True when it uses the fixture ``vlm``."""
    takes_all: bool = False
    """True when it may use every GPU of the run (``vlm_gpus``, ``vlm_factory``)."""
