"""What the planner asks of a trace, and prices of stages by it, in the place of ``memory.Footprint``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ..machine import Machine
from ..model import ModelProfile
from ..trace import BEFORE, TOWER, TraceRequest, Traces
from ..workload import Workload
from .constraints import Atom
from .image_tokens import ImageLoad, image_load, pictures
from .kernels import cudnn_width
from .memory import Footprint, Holding, StageNeed
from .release import Release
from .stage_need import Price
from .traced import Phase, Regimes, Timeline, lengths
from .traced_replay import TracedProgram

_KEPT_TIMELINES = 4
"""The search compares two lengths at a time."""
_TRACED_DTYPES = ("float32", "bfloat16", "float16")
_MOST_REAL_ELEMENTS = 2**22
"""Smaller hidden states may have data in a trace (``MAX_REAL_ELEMENTS`` of sources/trace_operations.py), by which code of a
checkpoint chooses places with a mask and counts them; CogVLM, run without an image, does."""
_TOWER_ROLES = ("vision", "projector")
_MOMENTS: dict[Phase, str] = {"return": "the logits come back", "answer": "the next token is made"}


def obstacle(profile: ModelProfile, workload: Workload, *, trust_remote_code: bool = False) -> str | None:
    """Why a model cannot be traced for a workload, as a phrase; ``None`` when nothing is known to stand in the way."""
    if profile.is_remote_code and not trust_remote_code:
        return (
            "its class is code of the checkpoint: read it, and if you trust it, add --trust-remote-code "
            "(in Python trust_remote_code=True)"
        )
    if profile.quantization or workload.quantization:
        return "kernels of quantized weights run on GPUs only"
    if workload.training:
        return "a training step is not traced"
    if workload.is_padded:
        return "prompts of different length, whose padding a mask hides, are not traced"
    if workload.images and profile.vision is not None and profile.image is None:
        return "its image rule is unknown"
    return None


def trace_request(profile: ModelProfile, workload: Workload, machine: Machine) -> TraceRequest:
    """What to trace for a plan. See :func:`obstacle` for what cannot be."""
    load = image_load(profile, workload)
    images = pictures(profile, workload)
    steps = min(2, max(1, workload.new_tokens)) if workload.makes_answer else 0
    dtype = workload.dtype or profile.dtype
    widths = [cudnn_width(gpu, machine.libraries) for gpu in machine.gpus]
    # A word stands behind each image.
    least = load.tokens + workload.images if images else 0
    if profile.is_remote_code:
        least = max(least, _MOST_REAL_ELEMENTS // profile.text.hidden + 1)
    return TraceRequest(
        architecture=profile.architecture,
        dtype=dtype if dtype in _TRACED_DTYPES else "bfloat16",
        attention="eager" if workload.attention == "eager" else "sdpa",
        cudnn_width=min(widths, default=0) if workload.attention == "sdpa" else 0,
        layers=tuple(unit.key for unit in profile.units if unit.role == "layer"),
        tower=tuple(unit.key for unit in profile.units if unit.role in _TOWER_ROLES) if images else (),
        lengths=lengths(load.tokens, profile.text.sliding_window, steps, profile.text.active_experts, least),
        steps=steps,
        batch=workload.batch,
        pictures=images,
        image_tokens=load.tokens if images and profile.is_remote_code else 0,
        is_remote_code=profile.is_remote_code,
    )


class TracedFootprint(Footprint):
    """Prices any run of atoms by what was seen to be allocated; fragmentation stays that of the formulas.

    Args:
        profile: The model.
        workload: What it is to do.
        images: Its images, counted.
        atoms: Those placed on GPUs, in the order of execution.
        offloaded: Those behind them whose weights stay in host memory.
        is_bare: Leave out what the allocator wastes, for a bound that no split can beat.
        release: Of transformers.
        traces: What :func:`trace_request` asked for.

    Raises:
        IrregularError: The traces do not tell about other lengths.
    """

    def __init__(
        self,
        profile: ModelProfile,
        workload: Workload,
        images: ImageLoad,
        atoms: Sequence[Atom],
        offloaded: Sequence[Atom] = (),
        *,
        is_bare: bool = False,
        release: Release = None,
        traces: Traces,
    ) -> None:
        super().__init__(profile, workload, images, atoms, offloaded, is_bare=is_bare, release=release)
        self._traces = traces
        self._regimes = Regimes(traces, profile.text.sliding_window)
        self._numbers = {
            unit.key: number for number, unit in enumerate(unit for unit in profile.units if unit.role == "layer")
        }
        self._places = [self._places_of(atom) for atom in atoms]
        self._guests = frozenset(place for atom in offloaded for place in self._places_of(atom))
        self._timelines: dict[int, Timeline] = {}

    def changed(self, workload: Workload, images: ImageLoad, *, is_bare: bool) -> Footprint:
        """Prices of another workload: by the same traces if it only has another prompt or more tokens to make."""
        before = msgspec.structs.replace(
            self.workload, text_tokens=workload.text_tokens, new_tokens=workload.new_tokens, allocator=workload.allocator
        )
        if before == workload and (workload.answer_tokens > 1) == (self.workload.answer_tokens > 1):
            return TracedFootprint(
                self.profile,
                workload,
                images,
                self.atoms,
                self.offloaded,
                is_bare=is_bare,
                release=self.release,
                traces=self._traces,
            )
        return Footprint(self.profile, workload, images, self.atoms, self.offloaded, is_bare=is_bare, release=self.release)

    @property
    def source(self) -> str:
        """Where the figures for activations come from."""
        versions = f"transformers {self._traces.transformers}, torch {self._traces.torch}"
        origin = "the checkpoint's own code, " if self.profile.is_remote_code else ""
        return f"traced: {self._traces.architecture} of {origin}{versions}"

    def traced_program(self) -> TracedProgram:
        """The same traces for torch's allocator."""
        caches = self.profile.text.cached_layers
        return TracedProgram(self._regimes, caches, new_tokens=self.workload.answer_tokens)

    def needs(self, text_tokens: int) -> Price:
        """A function that prices runs of atoms: total bytes."""
        by_formula = self._call_needs(text_tokens, None)
        timeline = self._timeline(text_tokens)
        known: dict[tuple[int, int, bool | None], int] = {}

        def need(first: int, end: int, is_main: bool | None = None) -> int:
            if (first, end, is_main) not in known:
                holding = msgspec.structs.replace(self._run_holding(first, end), is_main=is_main)
                lost = 0 if self.is_bare else self._lost(by_formula, first, end, text_tokens)
                peak, _, _ = self._peak(timeline, holding, self._run_places(first, end), text_tokens)
                work = peak + lost + (0 if first else self.copy_bytes)
                # A trace begins when the weights are loaded.
                known[first, end, is_main] = holding.weights_bytes + max(work, holding.loading_bytes)
            return known[first, end, is_main]

        return need

    def _lost(self, by_formula: Price, first: int, end: int, text_tokens: int) -> int:
        """What the allocator wastes beside the work of a run of atoms, by the formulas."""
        holding = msgspec.structs.replace(self._run_holding(first, end), loading_bytes=0)
        live = super().need_of(holding, text_tokens).total_bytes + (0 if first else self.copy_bytes)
        return max(0, by_formula(first, end) - live)

    def detail(self, first: int, end: int, text_tokens: int, *, is_main: bool | None = None) -> StageNeed:
        """What the atoms from ``first`` up to, not including, ``end`` need, item by item; ``is_main`` as in ``Holding``."""
        holding = msgspec.structs.replace(self._run_holding(first, end), is_main=is_main)
        need = self._of_places(holding, self._run_places(first, end), text_tokens)
        if not first:
            need = msgspec.structs.replace(need, activations_bytes=need.activations_bytes + self.copy_bytes)
        if holding.loading_bytes > need.kv_cache_bytes + need.activations_bytes:
            need = msgspec.structs.replace(
                need, activations_bytes=holding.loading_bytes - need.kv_cache_bytes, moment="the weights are loaded"
            )
        total = self.needs(text_tokens)(first, end, is_main)
        return msgspec.structs.replace(need, fragmentation_bytes=total - need.total_bytes)

    def need_of(self, holding: Holding, text_tokens: int) -> StageNeed:
        """What a device needs for its part of a model, without fragmentation.

        A part is told by the number of its layers; layers do not differ much, so the first ones, or those before the head,
        stand for them.
        """
        layers = len(self._numbers)
        first = layers - holding.layers if holding.has_head and not holding.has_embedding else 0
        places = set(range(first, first + holding.layers))
        places.update([TOWER] * holding.has_tower + [BEFORE] * holding.has_embedding + [layers] * holding.has_head)
        return self._of_places(holding, frozenset(places), text_tokens)

    def _of_places(self, holding: Holding, places: frozenset[int], text_tokens: int) -> StageNeed:
        timeline = self._timeline(text_tokens)
        peak, place, phase = self._peak(timeline, holding, places, text_tokens)
        kept = min(peak, timeline.kept(places))
        return StageNeed(
            weights_bytes=holding.weights_bytes,
            kv_cache_bytes=kept,
            activations_bytes=peak - kept,
            fragmentation_bytes=0,
            moment=_MOMENTS.get(phase) or self._moment(place),
        )

    def _peak(
        self, timeline: Timeline, holding: Holding, places: frozenset[int], text_tokens: int
    ) -> tuple[int, int, Phase]:
        """Most bytes of the work on a device with these places, and where and when that is."""
        peak, place, phase = timeline.peak(places, gets_logits=bool(holding.is_main) and holding.may_get_logits)
        return peak + (self.work(text_tokens).pixels if holding.has_more_pixels else 0), place, phase

    def _moment(self, place: int) -> str:
        if place == len(self._numbers):
            return "the head computes logits"
        return {TOWER: "the vision tower runs", BEFORE: "the prompt is embedded"}.get(place, "a layer reads the prompt")

    def _timeline(self, text_tokens: int) -> Timeline:
        if text_tokens not in self._timelines:
            tokens = text_tokens + self.images.tokens
            # The last step reads all tokens but the one it makes, and the trace has the first step behind the prompt.
            more = max(0, self.workload.answer_tokens - 2)
            while len(self._timelines) >= _KEPT_TIMELINES:
                del self._timelines[next(iter(self._timelines))]
            self._timelines[text_tokens] = Timeline(self._regimes.at(tokens, new_tokens=more))
        return self._timelines[text_tokens]

    def _run_places(self, first: int, end: int) -> frozenset[int]:
        guests = frozenset() if first else self._guests
        return guests.union(*self._places[first:end])

    def _places_of(self, atom: Atom) -> frozenset[int]:
        return frozenset(self._unit_places((unit.key, unit.role) for unit in atom.units)) | (
            frozenset({TOWER}) if atom.has_tower else frozenset()
        )

    def _unit_places(self, units: Iterable[tuple[str, str]]) -> Iterable[int]:
        for key, role in units:
            if role == "layer":
                yield self._numbers[key]
            elif role == "embedding":
                yield BEFORE
            elif role in ("norm", "head"):
                yield len(self._numbers)
