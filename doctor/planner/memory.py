"""What a run of a model's parts needs of its GPU: weights, what layers keep, and the work at its worst moment.

Symbols: T prompt tokens, N new tokens, B batch, H hidden, V vocabulary, b bytes an element.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..model import ModelProfile
from ..units import MIB
from ..workload import Training, Workload
from . import training as step
from .constraints import Atom
from .image_tokens import ImageLoad
from .layer_work import LayerKind, coefficient_of, layer_kinds
from .prompt_work import Work, prompt_work
from .release import Release
from .stage_need import Holding, Price, StageNeed
from .vision_work import tower_coefficient
from .weights import computed_item_bytes, copied_bytes, item_bytes, loaded_dtype, loading_bytes, unit_bytes

if TYPE_CHECKING:
    from .replay import Replayed

__all__ = ["Footprint", "Holding", "StageNeed", "Work", "copied_bytes", "item_bytes", "loaded_dtype", "unit_bytes"]

FRAGMENTATION_BYTES = 64 * MIB
FRAGMENTATION_OF_KV_CACHE = 0.25
FRAGMENTATION_OF_ENCODING = 0.5
"""Reserved memory that cannot serve a request: a constant, a share of the KV cache and a share of one layer's work
(``lost_first`` and ``lost_later`` of the text coefficient), or else a share of the vision tower's work. Keys and values
that stay are cut out of blocks that temporaries left, which then are too small for the next layer's largest temporary;
requests below 10 MiB share segments of 20 MiB (torch, CUDACachingAllocator).

The figures that predict most among those that never claim a prompt that ran out of memory, in 14 readings on H200 cards of
12 and 23.5 GiB free (predicted 87 to 99 % of the true longest prompt) and in 175 replays of traced allocations of five
model families through a model of torch's caching allocator (74 to 100 %, 89 % on average); the replays themselves meet the
last three readings within 5 %. A much closer formula cannot be had: what is lost jumps between 0.15 and 0.55 of a layer's
work from one cut to the next.
"""


class _Column(NamedTuple):
    """One kind of layer, as the search asks for it."""

    following: list[int]
    """For each atom, the first one from there on that has such a layer."""
    layer: int
    lost_first: int
    lost_later: int
    next_token: int


class Footprint:
    """Prices any run of atoms for one model and workload, as a function of the text tokens."""

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
    ) -> None:
        """Sum up the parts.

        Args:
            profile: The model.
            workload: What it is to do.
            images: Its images, counted.
            atoms: Those placed on GPUs, in the order of execution.
            offloaded: Those behind them whose weights stay in host memory. The first stage executes them, so it has their
                KV cache and their work, and room for a copy of the module in use.
            is_bare: Leave out what the allocator wastes, for a bound that no split can beat.
            release: Of transformers.
        """
        self.profile = profile
        self.workload = workload
        self.images = images
        self.atoms = atoms
        self.offloaded = offloaded
        self.is_bare = is_bare
        self.release = release
        guests = [unit for atom in offloaded for unit in atom.units]
        self.copy_bytes = max((copied_bytes(unit, profile, workload) for unit in guests), default=0)
        """Of weights of an offloaded module, on the first stage while it is in use."""
        self._guest_layers = sum(atom.layers for atom in offloaded)
        self._has_guest_head = any(atom.has_head for atom in offloaded)
        self.item_bytes = computed_item_bytes(profile, workload)
        """Of one element of a hidden state."""
        self._weights = [0]
        self._layers = [0]
        self._heads = [0]
        self._towers = [0]
        for atom in atoms:
            self._weights.append(self._weights[-1] + sum(unit_bytes(unit, profile, workload) for unit in atom.units))
            self._layers.append(self._layers[-1] + atom.layers)
            self._heads.append(self._heads[-1] + atom.has_head)
            self._towers.append(self._towers[-1] + atom.has_tower)
        self._embedding = next((number for number, atom in enumerate(atoms) if atom.has_embedding), -1)
        """Number of the atom where the prompt is embedded; negative where none is."""
        self._kind_of = layer_kinds(profile)
        self._kinds_of_atom = [self._kinds_of(atom) for atom in atoms]
        self._guest_kinds = sum((self._kinds_of(atom) for atom in offloaded), Counter[LayerKind]())
        self._following = {
            kind: _following([kind in counts for counts in self._kinds_of_atom]) for kind in set(self._kind_of.values())
        }
        self._counts = {
            kind: list(accumulate((counts[kind] for counts in self._kinds_of_atom), initial=0)) for kind in self._following
        }
        """For each kind of layer, how many of it the first so many atoms have."""
        self._loading = [loading_bytes(atom.units, profile, workload, release) for atom in atoms]
        self._trained = [step.Trained()]
        self._largest_step = [step.largest_step_bytes(atom.units, workload) for atom in atoms]
        for atom in atoms:
            own = (step.trained(unit, self._kind_of.get(unit.key), profile, workload) for unit in atom.units)
            self._trained.append(sum(own, self._trained[-1]))

    def _kinds_of(self, atom: Atom) -> Counter[LayerKind]:
        return Counter(self._kind_of[unit.key] for unit in atom.units if unit.role == "layer")

    def changed(self, workload: Workload, images: ImageLoad, *, is_bare: bool) -> Footprint:
        """The same parts for another workload; their weights are summed up again only where they change."""
        same = ("dtype", "quantization", "training")
        has_images = bool(workload.images), bool(self.workload.images)
        if any(getattr(workload, field) != getattr(self.workload, field) for field in same) or (
            workload.training is not None and has_images[0] != has_images[1]
        ):
            return type(self)(
                self.profile, workload, images, self.atoms, self.offloaded, is_bare=is_bare, release=self.release
            )
        result = copy(self)
        result.workload, result.images, result.is_bare = workload, images, is_bare
        return result

    def traced_program(self) -> Replayed | None:
        """What to replay through torch's allocator, where the model was traced."""
        return None

    def loading_of(self, first: int, end: int) -> int:
        """Bytes that loading the atoms from ``first`` up to, not including, ``end`` takes beside their weights."""
        return max(self._loading[first:end])

    def weights_of(self, first: int, end: int) -> int:
        """Bytes of the weights of a run of atoms."""
        return self._weights[end] - self._weights[first]

    @property
    def least_bytes(self) -> int:
        """Weights and KV cache of everything that GPUs hold or execute, or what training keeps: what no split can avoid."""
        weights = self._weights[-1] + self.copy_bytes
        if self.workload.training is not None:
            return weights + self._trained[-1].adapters + self._trained[-1].states
        cached = self.work(self.workload.text_tokens).cached
        kinds = sum(self._kinds_of_atom, self._guest_kinds)
        return weights + max(
            sum(count * cached[kind].prefill for kind, count in kinds.items()),
            sum(count * cached[kind].final for kind, count in kinds.items()),
        )

    @property
    def source(self) -> str:
        """Where the figures for activations come from."""
        text = coefficient_of(self.profile).text
        tower = tower_coefficient(self.profile)
        is_counted = self.profile.vision is not None or tower.pixel_elements
        return f"{text}; {tower.text}" if is_counted and self.images.patches else text

    def work(self, text_tokens: int) -> Work:
        """Bytes of the work on one prompt with ``text_tokens`` tokens of text and the workload's images."""
        return prompt_work(self._following, self.profile, self.workload, self.images, text_tokens, release=self.release)

    def needs(self, text_tokens: int) -> Price:
        """A function that prices runs of atoms: total bytes, growing with every atom.

        The search asks it tens of thousands of times; :meth:`detail` says the same, item by item.
        """
        if self.workload.training is not None:
            return self._step_needs(text_tokens)
        return self._call_needs(text_tokens, self._loading if any(self._loading) else None)

    def _call_needs(self, text_tokens: int, loading: Sequence[int] | None) -> Price:  # noqa: C901 - what follows
        """Prices of a call; ``loading`` is what each atom takes to load, where that counts."""
        work = self.work(text_tokens)
        weights, layers, heads = self._weights, self._layers, self._heads
        embedding, towers = self._embedding, self._towers
        share, encoding, constant = self._shares()
        encode = math.ceil((1 + encoding) * work.encode)
        prefilled, guest_prefilled = self._summed(
            {kind: math.ceil((1 + share) * kept.prefill) for kind, kept in work.cached.items()}
        )
        finished, guest_finished = self._summed(
            {kind: math.ceil((1 + share) * kept.final) for kind, kept in work.cached.items()}
        )
        columns = self._columns(work)
        guest_layers, guest_heads, copy_bytes = self._guest_layers, int(self._has_guest_head), self.copy_bytes
        has_guests = bool(guest_layers or guest_heads)
        head, answer, returned, held_bytes, pixels = work.head, work.answer, work.returned, work.held, work.pixels

        def need(first: int, end: int, is_main: bool | None = None) -> int:
            held = weights[end] - weights[first]
            prefill, decode = prefilled[end] - prefilled[first], finished[end] - finished[first]
            run_heads, run_layers = heads[end] - heads[first], layers[end] - layers[first]
            embeds, hosts = first <= embedding < end, has_guests and not first
            if hosts:
                held += copy_bytes
                prefill, decode = prefill + guest_prefilled, decode + guest_finished
                run_layers, run_heads = run_layers + guest_layers, run_heads + guest_heads
            busy = 0
            if run_layers:
                lost = grows = 0
                for following, layer, lost_first, lost_later, next_token in columns:
                    if following[first] < end or (hosts and guest_layers):
                        grows = max(grows, next_token)
                        if layer > busy:
                            busy, lost = layer, lost_first if embeds else lost_later
                            if hosts and lost < lost_first:
                                lost = lost_first
                prefill, decode = prefill + lost, decode + grows + constant
            if run_heads:
                decode += answer
                busy = max(busy, head)
            logits_back = prefill + returned if (embeds or is_main) and not run_heads else 0
            prefill, decode = prefill + busy, max(decode, logits_back)
            if embeds:
                prefill, decode = prefill + held_bytes, decode + pixels
            most = prefill if prefill > decode else decode
            if encode > most and towers[end] > towers[first]:
                most = encode
            if is_main is not None and is_main != embeds:
                most += pixels
            if loading is not None:
                most = max(most, *loading[first:end])
            # A stage must not become cheaper by the anchor, where less is lost on the first GPU.
            return max(held + most, need(embedding + 1, end)) if embeds and end > embedding + 1 else held + most

        return need

    def _summed(self, sizes: Mapping[LayerKind, int]) -> tuple[list[int], int]:
        """Bytes that the layers of the first so many atoms keep, and those of offloaded ones."""
        columns = [[count * sizes[kind] for count in counts] for kind, counts in self._counts.items()]
        total = columns[0] if len(columns) == 1 else [sum(parts) for parts in zip(*columns, strict=True)]
        return total, sum(count * sizes[kind] for kind, count in self._guest_kinds.items())

    def _columns(self, work: Work) -> list[_Column]:
        """The kinds of layers, with what the allocator loses beside each."""
        coefficient = coefficient_of(self.profile)
        shares = (coefficient.lost_first, coefficient.lost_later)
        if self.is_bare or self.workload.allocator == "expandable":
            shares = (0, 0)
        constant = 0 if self.is_bare else FRAGMENTATION_BYTES
        return [
            _Column(
                following,
                work.layer[kind],
                constant + math.ceil(shares[0] * work.layer[kind]),
                constant + math.ceil(shares[1] * work.layer[kind]),
                work.next_token[kind],
            )
            for kind, following in self._following.items()
        ]

    def _shares(self) -> tuple[float, float, int]:
        """What the allocator wastes: shares of the KV cache and of the tower's work, and a constant."""
        if self.is_bare:
            return 0, 0, 0
        if self.workload.allocator == "expandable":
            return 0, 0, FRAGMENTATION_BYTES
        return FRAGMENTATION_OF_KV_CACHE, FRAGMENTATION_OF_ENCODING, FRAGMENTATION_BYTES

    def copied(self, text_tokens: int) -> tuple[int, int]:
        """Most bytes by which pixels that are there once more, and logits that come back, make a stage need more."""
        work, training = self.work(text_tokens), self.workload.training
        if training is None:
            return work.pixels, work.returned
        waste = self._step_waste(training)
        pixels, logits = (1 + waste.encoding) * work.pixels, (1 + waste.logits) * self._step_work(text_tokens).logits
        return math.ceil(pixels), math.ceil(logits)

    def _run_holding(self, first: int, end: int) -> Holding:
        """What a run of atoms holds, by the number of its layers."""
        executes_guests = not first
        return Holding(
            weights_bytes=self._weights[end] - self._weights[first],
            layers=self._layers[end] - self._layers[first] + executes_guests * self._guest_layers,
            has_tower=self._towers[end] > self._towers[first],
            has_embedding=first <= self._embedding < end,
            has_head=self._heads[end] > self._heads[first] or (executes_guests and self._has_guest_head),
            loading_bytes=self.loading_of(first, end),
        )

    def detail(self, first: int, end: int, text_tokens: int, *, is_main: bool | None = None) -> StageNeed:
        """What the atoms from ``first`` up to, not including, ``end`` need, item by item; ``is_main`` as in ``Holding``."""
        total = self.needs(text_tokens)(first, end, is_main)
        if self.workload.training is not None:
            held = self.weights_of(first, end) + (0 if first else self.copy_bytes)
            works = self.work(text_tokens), self._step_work(text_tokens)
            worst = self._run_peak(first, end, works, is_main)
            peak = _of_step(held, worst, max(self._loading[first:end]))
            reserved = held + worst.reserved + (0 if self.is_bare else FRAGMENTATION_BYTES)
            return msgspec.structs.replace(
                peak, fragmentation_bytes=total - peak.total_bytes, reserved_bytes=max(total, reserved)
            )
        executes_guests = not first
        units = [unit for atom in self.atoms[first:end] for unit in atom.units]
        if executes_guests:
            units += [unit for atom in self.offloaded for unit in atom.units]
        keys = tuple(unit.key for unit in units if unit.role == "layer")
        holding = msgspec.structs.replace(self._run_holding(first, end), layer_keys=keys, is_main=is_main)
        peak = self.need_of(holding, text_tokens)
        if executes_guests:
            peak = msgspec.structs.replace(peak, activations_bytes=peak.activations_bytes + self.copy_bytes)
        return msgspec.structs.replace(peak, fragmentation_bytes=total - peak.total_bytes)

    def need_of(self, holding: Holding, text_tokens: int) -> StageNeed:
        """What a device needs for its part of a model, item by item, without fragmentation.

        Of a training step, what the optimizer keeps is shared out by the weights, adapters by the layers.
        """
        if self.workload.training is not None:
            return self._step_need_of(holding, text_tokens)
        work = self.work(text_tokens)
        kinds = self._held_kinds(holding, work)
        prefilled, finished = (
            sum(count * getattr(work.cached[kind], name) for kind, count in kinds.items()) for name in ("prefill", "final")
        )
        more_pixels = work.pixels if holding.has_more_pixels else 0
        busy = {"the prompt is embedded": 0}
        if kinds:
            busy = {"a layer reads the prompt": max(work.layer[kind] for kind in kinds)}
        if holding.has_head:
            busy["the head computes logits"] = work.head
        moment = max(busy, key=lambda name: busy[name])
        totals = {
            moment: prefilled + busy[moment] + (work.held if holding.has_embedding else 0),
            "the next token is made": finished
            + max((work.next_token[kind] for kind in kinds), default=0)
            + (work.answer if holding.has_head else 0)
            + (work.pixels if holding.has_embedding else 0),
            "the logits come back": prefilled + (work.pixels if holding.has_embedding else 0) + work.returned
            if holding.may_get_logits
            else 0,
            "the vision tower runs": work.encode if holding.has_tower else 0,
        }
        totals = {name: size + more_pixels for name, size in totals.items() if size or name == moment}
        totals["the weights are loaded"] = holding.loading_bytes
        moment = max(totals, key=lambda name: totals[name])
        # Of moments that differ little, the ledger has what is kept beside what is worked with.
        kept = min(max(prefilled, finished), totals[moment])
        return StageNeed(
            weights_bytes=holding.weights_bytes,
            kv_cache_bytes=kept,
            activations_bytes=totals[moment] - kept,
            fragmentation_bytes=0,
            moment=moment,
        )

    def _held_kinds(self, holding: Holding, work: Work) -> Counter[LayerKind]:
        """Kinds of the layers of a device; the neediest so many where only their number is known."""
        if holding.layer_keys:
            return Counter(self._kind_of[key] for key in holding.layer_keys)
        kinds = sorted(self._kind_of.values(), key=lambda kind: (work.cached[kind].final, work.layer[kind]), reverse=True)
        return Counter(kinds[: holding.layers])

    def _step_work(self, text_tokens: int) -> step.StepWork:
        return step.step_work(
            set(self._following), self.profile, self.workload, self.images, text_tokens, release=self.release
        )

    def _step_needs(self, text_tokens: int) -> Price:
        """Prices of a training step."""
        works = self.work(text_tokens), self._step_work(text_tokens)
        weights, copy_bytes = self._weights, self.copy_bytes
        constant = self._step_slack_bytes
        known: dict[tuple[int, int, bool | None], int] = {}

        def need(first: int, end: int, is_main: bool | None = None) -> int:
            if (first, end, is_main) not in known:
                worst = self._run_peak(first, end, works, is_main)
                held = weights[end] - weights[first] + (0 if first else copy_bytes)
                most = worst.kept + worst.work + worst.lost + constant
                known[first, end, is_main] = held + max(most, *self._loading[first:end])
            return known[first, end, is_main]

        return need

    def lost_of(self, holding: Holding, run: tuple[int, int], text_tokens: int) -> int:
        """What the allocator loses on a device that is no stage of the planner.

        Args:
            holding: What the device holds. Of a training step it tells all: the most is lost beside the loss.
            run: Atoms of a stage of the same kind, which otherwise lends its own loss.
            text_tokens: Of one prompt.
        """
        if self.workload.training is None:
            return self.detail(*run, text_tokens).fragmentation_bytes
        worst = self._holding_peak(holding, text_tokens)
        live = worst.kept + worst.work
        return max(0, live + worst.lost + self._step_slack_bytes - max(live, holding.loading_bytes))

    @property
    def _step_slack_bytes(self) -> int:
        return 0 if self.is_bare else step.SLACK_BYTES

    def _step_need_of(self, holding: Holding, text_tokens: int) -> StageNeed:
        """What a device needs for its part of a training step."""
        return _of_step(holding.weights_bytes, self._holding_peak(holding, text_tokens), holding.loading_bytes)

    def _holding_peak(self, holding: Holding, text_tokens: int) -> step.Peak:
        """:meth:`_step_peak` of a device that is told by what it holds."""
        training = self.workload.training
        assert training is not None
        if training.method == "lora":
            part, whole = holding.layers, self._layers[-1]
        else:
            # Where the tower is not trained, whoever has it is told too much, and nobody too little.
            whole = self._trained[-1].gradients
            part = min(holding.weights_bytes, whole)
        own = step.Trained(*(-(-size * part // max(1, whole)) for size in self._trained[-1]))
        forward = self.work(text_tokens)
        kinds = self._held_kinds(holding, forward)
        fixed = own._replace(step=own.step + max(self._largest_step))
        return self._step_peak(holding, kinds, fixed, (forward, self._step_work(text_tokens)))

    def _run_peak(self, first: int, end: int, works: tuple[Work, step.StepWork], is_main: bool | None) -> step.Peak:
        """:meth:`_step_peak` of a run of atoms."""
        kinds = Counter({kind: number for kind, sums in self._counts.items() if (number := sums[end] - sums[first])})
        if not first:
            kinds += self._guest_kinds
        holding = msgspec.structs.replace(self._run_holding(first, end), is_main=is_main)
        own = self._trained[end] - self._trained[first]
        fixed = own._replace(step=own.step + max(self._largest_step[first:end]))
        return self._step_peak(holding, kinds, fixed, works)

    def _step_peak(
        self, holding: Holding, kinds: Counter[LayerKind], fixed: step.Trained, works: tuple[Work, step.StepWork]
    ) -> step.Peak:
        """The worst moment of a step.

        Args:
            holding: What the device holds.
            kinds: Of its layers.
            fixed: Of its units together.
            works: On the prompt: of a call, and of a step.
        """
        forward, work = works
        training = self.workload.training
        assert training is not None
        layer = max((work.layer[kind] for kind in kinds), default=0)
        again = work.flowing + (layer if training.gradient_checkpointing else 0) if kinds else 0
        tower = work.tower_saved if holding.has_tower else 0
        more_pixels = forward.pixels if holding.has_more_pixels else 0
        return step.peak(
            fixed=fixed,
            saved=sum(count * work.saved[kind] for kind, count in kinds.items()) + tower,
            again=again,
            last=layer,
            loss=work.loss if holding.has_head else 0,
            largest=work.largest if holding.has_head else 0,
            logits=work.logits if holding.may_get_logits else 0,
            held=(forward.held if holding.has_embedding else 0) + more_pixels,
            encode=forward.encode + more_pixels if holding.has_tower else 0,
            tower=work.tower_backward if holding.has_tower else 0,
            waste=self._step_waste(training),
        )

    def _step_waste(self, training: Training) -> step.Waste:
        """What the allocator wastes in a training step."""
        if self.is_bare or self.workload.allocator == "expandable":
            return step.Waste()
        return step.WASTE[training.method]


def _of_step(weights_bytes: int, peak: step.Peak, loading_bytes: int) -> StageNeed:
    """What a training step needs, or what loading does, before anything of the step is there."""
    if loading_bytes > peak.kept + peak.work:
        return StageNeed(weights_bytes, 0, loading_bytes, 0, "the weights are loaded")
    return StageNeed(weights_bytes, 0, peak.work, 0, peak.moment, peak.kept)


def _following(has: Sequence[bool]) -> list[int]:
    """For each position the first one from there on that has something; their number where none has."""
    result, position = [], len(has)
    for number in range(len(has) - 1, -1, -1):
        position = number if has[number] else position
        result.append(position)
    return result[::-1]
