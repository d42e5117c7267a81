"""Runs a trial: one child process that loads a model and calls it, with a deadline; whatever becomes of it is an answer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..errors import UsageError
from ..model import ModelProfile
from ..placement import Plan
from ..planner.image_tokens import image_load, pictures
from ..sources.child import Child, Outcome
from ..sources.model_files import find_model
from ..trial import Attempt, Route
from ..visibility import VARIABLE
from ..workload import Workload

_IDLE_S = 120.0
"""Without CPU time or a page read, before torch is imported: it hangs."""
_FOLDER = Path(__file__).parent.parent
"""The child loads its modules from here, so that it can use those of ``sources``."""
_PROGRAM = "probes.try_child"
_EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""The first is torch's word up to 2.8, the second since."""


class Trier:
    """What the attempts of one trial have in common.

    Args:
        name: Folder, catalogue name or hub id, as ``load_profile`` takes it.
        profile: The same model, read.
        workload: The call.
        trust_remote_code: Allow Python code of the checkpoint to run.
        allow_network: The child may ask the hub for what is not on the disk.
        deadline_s: Seconds for each attempt.
        environment: Of the children; ``None`` is that of this process.

    Raises:
        UsageError: The checkpoint brings Python code that nobody allowed to run.
    """

    def __init__(
        self,
        name: str,
        profile: ModelProfile,
        workload: Workload,
        *,
        trust_remote_code: bool = False,
        allow_network: bool = True,
        deadline_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if profile.is_remote_code and not trust_remote_code:
            raise UsageError(
                f"{name} brings its own Python code (auto_map in config.json), which was not run: read that code, and if "
                "you trust it, add --trust-remote-code."
            )
        place = find_model(name)
        is_folder = isinstance(place, Path)
        self._source = (str(place), None) if isinstance(place, Path) else (place.repo, place.revision)
        self.name = name
        self._profile = profile
        self.workload = workload
        self._trust_remote_code = trust_remote_code
        self._deadline_s = deadline_s
        self._environment = dict(os.environ if environment is None else environment)
        if is_folder or not allow_network:
            self._environment["HF_HUB_OFFLINE"] = "1"
        if workload.allocator == "expandable":
            self._environment |= _EXPANDABLE

    def by_plan(self, plan: Plan) -> Attempt:
        """Load it where a plan puts it."""
        whole: dict[str, int | str] = {"": 0}
        device_map = whole if len(plan.stages) == 1 and plan.offloaded is None else plan.device_map
        return self._attempt("plan", device_map, plan.dtype, visible=plan.cuda_visible_devices)

    def by_auto(self, gpus: Sequence[str], *, dtype: str) -> Attempt:
        """Load it with ``device_map="auto"`` on the GPUs with these UUIDs."""
        return self._attempt("auto", "auto", dtype, visible=",".join(gpus))

    def on_cpu(self) -> Attempt:
        """Load it for the CPU."""
        return self._attempt("cpu", None, self.workload.dtype or self._profile.dtype, visible="")

    def _attempt(
        self, route: Route, device_map: Mapping[str, int | str] | str | None, dtype: str, *, visible: str
    ) -> Attempt:
        arguments = {
            "name": self._source[0],
            "revision": self._source[1],
            "device_map": device_map,
            "dtype": dtype,
            "attention": self.workload.attention,
            "quantization": self.workload.quantization,
            "trust_remote_code": self._trust_remote_code,
            "work": work_of(self._profile, self.workload),
            "blocks": _blocks(self._profile),
            "parent": os.getpid(),
        }
        child = Child(
            _PROGRAM,
            arguments,
            environment={**self._environment, VARIABLE: visible},
            deadline_s=self._deadline_s,
            idle_s=_IDLE_S,
            folder=_FOLDER,
        )
        return understand(child.outcome(), route)


def work_of(profile: ModelProfile, workload: Workload) -> dict[str, Any]:
    """The call in numbers, as the planner counts them."""
    load = image_load(profile, workload)
    images = pictures(profile, workload)
    return {
        "batch": workload.batch,
        "pictures": None if images is None else msgspec.to_builtins(images),
        "image_tokens": load.tokens,
        "prompt_tokens": load.tokens + workload.text_tokens,
        "new_tokens": workload.new_tokens,
    }


def _blocks(profile: ModelProfile) -> list[str]:
    """Repeated blocks: text layers, and those of towers."""
    layers = [unit.key for unit in profile.units if unit.role == "layer"]
    return layers + [part.key for unit in profile.units for part in unit.parts if part.layer is not None]


def understand(outcome: Outcome, route: Route) -> Attempt:
    """Turn what a child said, and how it ended, into a record. An answer that cannot be read is a crash."""
    told = outcome.answer
    state = {"ok": "raised" if "traceback" in told else "ran", "failed": "raised"}.get(outcome.state, outcome.state)
    fields = {**told, "route": route, "state": state, "message": outcome.message, "seconds": outcome.seconds}
    try:
        return msgspec.convert(fields, Attempt)
    except msgspec.ValidationError as error:
        message = f"an unreadable answer ({error})"
        return Attempt(route=route, state="crashed", message=message, seconds=outcome.seconds)
