"""The record of one load, and whether a loader of the user's own put the model where it was planned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan, Stage

    from ..requirements import VlmSpec


@dataclass
class Load:
    """One model that was loaded, for the summary. Sizes are bytes, over all its GPUs."""

    model: str
    where: str
    seconds: float
    weights_bytes: int = 0
    predicted_peak_bytes: int = 0
    measured_peak_bytes: int = 0
    """Of torch's allocator; 0 when it was not used."""
    left_bytes: int = 0
    """Weights that something still referred to after the model was unloaded."""
    held_by: list[str] = field(default_factory=list)
    """What refers to them, in words."""
    missing_bytes: int = 0
    """Memory that was free before the model was loaded and not again after it was unloaded."""
    offloaded_bytes: int = 0
    """Weights that are in host memory or on disk (``--vlm-allow-offload``)."""
    warm: str = ""
    """What came of ``--vlm-warm``, in words."""
    attached_age_s: float | None = None
    """How long ago the model was loaded by another run, to which this one attached."""
    saved_seconds: float = 0.0
    """By attaching."""
    tests: list[str] = field(default_factory=list)
    """Node ids of the tests that were given it; one that ran again is there as often."""


def check_landing(spec: VlmSpec, plan: Plan, loaded: Any, machine: Machine, *, may_offload: bool) -> None:
    """Hold a loader of the user's own to the plan, if it tells a device_map; ours has checked every tensor itself."""
    from vlm_doctor.visibility import visible_gpus

    from ..gating.machine_reader import ordinals_by_uuid
    from .loaded import LoadedVlm
    from .placing import Placed, check_automatic, check_placement, device_map_for

    device_map = getattr(loaded, "device_map", None) or getattr(getattr(loaded, "model", None), "hf_device_map", None)
    if isinstance(loaded, LoadedVlm) or not isinstance(device_map, dict):
        return
    devices = {str(key): f"cuda:{device}" if isinstance(device, int) else str(device) for key, device in device_map.items()}
    is_numbering_known = visible_gpus(machine).is_order_certain
    parts = [Placed(key, at) for key, at in devices.items() if is_numbering_known or not at.startswith("cuda")]
    if spec.is_placed_by_transformers:
        check_automatic(spec.name, str(spec.device_map), parts, may_offload=may_offload)
        return
    check_placement(spec.name, parts, device_map_for(plan, ordinals_by_uuid(machine), may_offload=may_offload))


def stages_used(plan: Plan | None, loaded: Any) -> tuple[Stage, ...]:
    """The GPUs of a loaded model: those where it is, as far as its loader is ours, else those of its plan."""
    from .loaded import LoadedVlm

    if isinstance(loaded, LoadedVlm):
        return loaded.gpus
    return plan.stages if plan is not None else ()


def describe(spec: VlmSpec, plan: Plan | None, loaded: Any, seconds: float) -> Load:
    """What is known of a load when it has ended."""
    from .loaded import LoadedVlm

    warm = loaded.warm if isinstance(loaded, LoadedVlm) else None
    kept: dict[str, Any] = {}
    if warm is not None:
        kept = {"warm": warm.text, "attached_age_s": warm.age_s, "saved_seconds": warm.saved_s}
    if plan is None:
        return Load(spec.label, "the CPU", seconds, **kept)
    stages = stages_used(plan, loaded)
    planned = plan.offloaded.weights_bytes if plan.offloaded is not None else 0
    return Load(
        spec.label,
        f"GPU {', '.join(str(stage.gpu) for stage in stages)}" if stages else "the CPU",
        seconds,
        weights_bytes=sum(stage.weights_bytes for stage in plan.stages),
        # Of a model that transformers has placed, nobody has predicted any.
        predicted_peak_bytes=0 if spec.is_placed_by_transformers else sum(stage.peak_bytes for stage in plan.stages),
        offloaded_bytes=loaded.offloaded_bytes if isinstance(loaded, LoadedVlm) else planned,
        **kept,
    )
