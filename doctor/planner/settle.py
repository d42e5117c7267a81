"""Settle on a split: hold the best of the search against torch's allocator, and take the one that really goes furthest.

The search prices a stage by what lives at once. What the allocator wastes on top depends on every size and on the order of
things, and jumps from one cut to the next; so the splits that are nearly as good as the best are replayed, and the one
whose prompts run without a gap up to the longest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from ..machine import Gpu, Libraries
from ..units import MIB
from .kernels import cudnn_width
from .memory import Footprint, StageNeed
from .near import near_best
from .order import Split
from .prompt_work import makes_all_logits
from .release import is_before_5
from .replay import Held, Program, Replayed, dimensions
from .search import Choice
from .vision_work import pixels_bytes

if TYPE_CHECKING:
    from .problem import Problem

MOST_CANDIDATES = 40
MOST_SPREAD = 3
"""Stages up to which all near splits are candidates; beyond, those with one border moved by one atom."""
NEAR_SHARE = 0.2
"""Of the longest prompt: what the allocator wastes differs by less between two splits. Recorded in ``benchmarks/``."""
STEP = 0.0125
"""Prompts are tried at lengths that differ by this share of the longest that anything could take."""
LOWEST_SHARE = 0.55
"""Of the longest prompt: where trying begins."""
GAP_STEPS = 8
"""A tenth of the longest prompt: gaps seen in replays and on GPUs lie there."""
SLACK_BYTES = 16 * MIB
"""Left free for what a script does not tell: small tensors, of which 2 to 4 MiB more were seen on GPUs than replayed."""
NARROW_SHARE = 1 / 300
"""Of a length: gaps that are narrower do not count. LLaVA-1.5 13B fails at 5,119 and 5,120 tokens, where a tensor fills its
segment to the byte, and runs 5,839."""
FINE_STEP = 1 / 400
FINE_STEPS = 6
"""Where a prompt is promised, lengths just below it are tried again: gaps there are narrow, and none is worth its risk."""
_NEED_STEP = 16 * MIB
_Takes = Callable[["Problem", Split, int], bool]


class Replay:
    """Judges the stages of one question by replaying what they allocate.

    Args:
        footprint: The model, its workload and its atoms.
        gpus: By position.
        libraries: What will run it, where that is known.
    """

    def __init__(self, footprint: Footprint, gpus: Sequence[Gpu], libraries: Libraries | None = None) -> None:
        self._footprint = footprint
        self._kernels = [cudnn_width(gpu, libraries) for gpu in gpus]
        self._programs = {width: _program(footprint, cudnn_width=width) for width in {*self._kernels}}
        self._pixels_bytes = (
            pixels_bytes(footprint.profile, footprint.images, footprint.item_bytes) * footprint.workload.batch
        )
        self._held: dict[tuple[int, int], Held] = {}
        self._known: dict[tuple[object, ...], bool] = {}
        self._enough: dict[tuple[Held, int, int], int] = {}
        """Bytes with which nothing is given back to the driver: with more, all goes on in the same way."""
        self._peaks: dict[tuple[object, ...], tuple[int, int]] = {}

    def runs(
        self, run: tuple[int, int], position: int, text_tokens: int, capacity_bytes: int, *, is_main: bool | None = None
    ) -> bool:
        """Whether a run of atoms on a GPU takes a prompt with so much text, in so much memory.

        The caller's tensors are where the model begins; where ``is_main`` says, as in ``Holding``, that the main GPU is
        another, also if they are there, where ``inputs.to("cuda")`` puts them. Accelerate's hook around the whole model
        takes them there in any case: pixels then are there, and once more, moved for the tower, beside the caller's where
        the model begins: 62 MB of 2240 x 2240 each, seen on two H200s. Logits come back to where the prompt came from.
        """
        kernel = self._kernels[position]
        if capacity_bytes < self._hold(run).weights_bytes + self._footprint.loading_of(*run):
            return False
        return all(self._runs(case, kernel, text_tokens, capacity_bytes) for case in self._cases(run, kernel, is_main))

    def _cases(self, run: tuple[int, int], kernel: int, is_main: bool | None) -> set[Held]:
        """What a run of atoms may have to replay, by where the caller's tensors are."""
        held = self._hold(run)
        cases = {held}
        if is_main:
            is_moved = held.has_inputs or self._programs[kernel].has_movable_inputs
            away = msgspec.structs.replace(held, has_inputs=is_moved, more_pixels_bytes=self._pixels_bytes)
            cases.add(msgspec.structs.replace(away, gets_logits=not held.has_head))
        elif is_main is False and held.is_first:
            cases.add(msgspec.structs.replace(held, more_pixels_bytes=self._pixels_bytes))
        return cases

    def _runs(self, held: Held, kernel: int, text_tokens: int, capacity_bytes: int) -> bool:
        tokens = text_tokens + self._footprint.images.tokens
        load = held, kernel, tokens
        capacity_bytes -= SLACK_BYTES
        if capacity_bytes >= self._enough.get(load, capacity_bytes + 1):
            return True
        question = *load, capacity_bytes
        if question not in self._known:
            self._known[question] = self._programs[kernel].runs(held, tokens, capacity_bytes)
        return self._known[question]

    def need(self, run: tuple[int, int], position: int, capacity_bytes: int, *, is_main: bool | None = None) -> StageNeed:
        """What a run of atoms needs of a GPU for the workload, item by item; ``is_main`` as in ``Holding``.

        Fragmentation is what the stage needs beyond its peak: least memory in which it runs, to within 16 MiB.
        """
        text_tokens = self._footprint.workload.text_tokens
        rough = self._footprint.detail(*run, text_tokens)
        kernel, held = self._kernels[position], self._hold(run)
        tokens = text_tokens + self._footprint.images.tokens
        peak, reserved = self._peaks_of(held, kernel, tokens)
        self._enough[held, kernel, tokens] = reserved
        loading = self._footprint.loading_of(*run)
        if loading > peak:
            rough = msgspec.structs.replace(rough, moment="the weights are loaded")
            peak, reserved = loading, max(reserved, held.weights_bytes + loading)
        low = held.weights_bytes + peak
        cases = self._cases(run, kernel, is_main)
        reserved = max(reserved, *(self._peaks_of(case, kernel, tokens)[1] for case in cases))
        # With what it takes where there is enough, each case runs.
        high = max(reserved, low) + SLACK_BYTES
        if self.runs(run, position, text_tokens, min(capacity_bytes, high), is_main=is_main):
            high = min(capacity_bytes, high)
            if high - SLACK_BYTES < reserved:
                reserved = max(low, *(self._peaks_of(case, kernel, tokens, high - SLACK_BYTES)[1] for case in cases))
        while high - low > _NEED_STEP:
            middle = (low + high) // 2
            if self.runs(run, position, text_tokens, middle, is_main=is_main):
                high = middle
            else:
                low = middle
        return msgspec.structs.replace(
            rough,
            activations_bytes=peak - rough.kv_cache_bytes,
            fragmentation_bytes=max(0, high - held.weights_bytes - peak),
            reserved_bytes=reserved,
        )

    def _peaks_of(self, held: Held, kernel: int, tokens: int, capacity_bytes: int | None = None) -> tuple[int, int]:
        question = held, kernel, tokens, capacity_bytes
        if question not in self._peaks:
            self._peaks[question] = self._programs[kernel].peaks(held, tokens, capacity_bytes)
        return self._peaks[question]

    def _hold(self, run: tuple[int, int]) -> Held:
        if run not in self._held:
            atoms = self._footprint.atoms[run[0] : run[1]]
            caches = self._footprint.profile.text.cached_layers
            layers = [unit.layer for atom in atoms for unit in atom.units if unit.role == "layer"]
            self._held[run] = Held(
                kinds=tuple(caches[layer] if layer is not None and layer < len(caches) else "full" for layer in layers),
                weights_bytes=self._footprint.weights_of(*run),
                small_weights_bytes=self._footprint.item_bytes
                * sum(unit.small_elements for atom in atoms for unit in atom.units),
                is_first=any(atom.has_embedding for atom in atoms),
                has_head=any(atom.has_head for atom in atoms),
                has_inputs=any(atom.has_embedding for atom in atoms),
            )
        return self._held[run]


def _program(footprint: Footprint, *, cudnn_width: int) -> Replayed:
    traced = footprint.traced_program()
    if traced is not None:
        return traced
    profile, workload = footprint.profile, footprint.workload
    assert profile.body_script is not None
    vision = profile.vision
    return Program(
        profile.body_script,
        profile.tower_script if workload.images else None,
        dimensions(profile, footprint.images),
        item_bytes=footprint.item_bytes,
        batch=workload.batch,
        new_tokens=workload.new_tokens,
        cudnn_width=cudnn_width,
        keeps_states=vision is not None and vision.keeps_states,
        holds_states=vision is not None and not vision.lets_go,
    )


def replay_of(footprint: Footprint, gpus: Sequence[Gpu], libraries: Libraries | None = None) -> Replay | None:
    """A judge, where it is known what the model allocates for the workload."""
    profile, workload = footprint.profile, footprint.workload
    is_scripted = profile.body_script is not None and (not footprint.images.tokens or profile.tower_script is not None)
    is_plain = (
        workload.attention == "sdpa"
        and not profile.text.is_never_fused
        and workload.logits == "generate"
        and workload.training is None
        and workload.quantization is None
        and workload.allocator == "native"
        and not workload.is_padded
        and not (profile.text.experts and is_before_5(footprint.release))
        and not makes_all_logits(profile, footprint.release)
        and profile.quantization is None
    )
    if footprint.traced_program() is not None:
        is_scripted, is_plain = True, workload.allocator == "native"
    has_whole_tower = not any(atom.has_tower and not atom.has_embedding for atom in footprint.atoms)
    if footprint.is_bare or footprint.offloaded or not (is_scripted and is_plain and has_whole_tower):
        return None
    return Replay(footprint, gpus, libraries)


def settle(problem: Problem) -> Choice | None:
    """The best split by the policy that runs in the memory there is, or ``None`` when none does."""
    counts = problem.counts
    groups = [counts] if problem.policy.prefer == "context" else []
    for allowed in (*groups, *(range(count, count + 1) for count in counts)):
        choice = problem.bare.choose_among(allowed)
        found = _furthest(problem, choice) if choice else None
        if found is not None:
            return found
    return None


def _furthest(problem: Problem, choice: Choice) -> Choice | None:
    """Of the splits near one, that whose prompts run furthest without a gap; the earlier one among equals."""
    lengths = _lengths(problem.workload.text_tokens, choice.text_tokens)
    best: Split | None = None
    reached = -1
    for split in islice(_candidates(problem, choice), MOST_CANDIDATES):
        if reached + 1 == len(lengths):
            break
        if _nearly(takes)(problem, split, lengths[reached + 1]) and takes_anyway(problem, split, lengths[0]):
            goes = _reach(problem, split, lengths, _nearly(takes))
            if goes > reached:
                best, reached = split, goes
    if best is None:
        return None
    reached = _reach(problem, best, lengths, _nearly(takes_anyway))
    return Choice(best, _refined(problem, best, lengths, reached), is_rounded=choice.is_rounded)


def _nearly(runs: _Takes) -> _Takes:
    """Whether a length runs, or one right below it: a gap of a few tokens is no reason to prefer another split."""
    return lambda problem, split, tokens: (
        runs(problem, split, tokens) or runs(problem, split, tokens - int(tokens * NARROW_SHARE))
    )


def _reach(problem: Problem, split: Split, lengths: Sequence[int], runs: _Takes) -> int:
    """How many of the lengths behind the first run without a gap. The first is taken to run.

    Gaps are looked for in the last :data:`GAP_STEPS` lengths alone: where memory is plenty there are none.
    """
    low, high = 0, len(lengths) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if runs(problem, split, lengths[middle]):
            low = middle
        else:
            high = middle - 1
    at = low
    while at > max(0, low - GAP_STEPS):
        at -= 1
        if not runs(problem, split, lengths[at]):
            low = max(0, at - 1)
    return low


def _lengths(wanted: int, bound: int) -> list[int]:
    """Prompts to try: the workload's own, then longer and longer ones up to the bound."""
    step = max(1, int(bound * STEP))
    longer = range(bound, max(wanted, int(bound * LOWEST_SHARE)), -step)
    return [wanted, *reversed(longer)]


def _refined(problem: Problem, split: Split, lengths: Sequence[int], reached: int) -> int:
    """The longest prompt that runs, between a length that does and the next one."""
    low = lengths[reached]
    high = lengths[reached + 1] if reached + 1 < len(lengths) else low
    if not takes_anyway(problem, split, low):
        high, low = low, low - int(low * NARROW_SHARE)
    least = (high - low) // 8
    while high - low > max(1, least):
        middle = (low + high) // 2
        if takes_anyway(problem, split, middle):
            low = middle
        else:
            high = middle
    return _without_gaps(problem, split, low, lengths[0])


def _without_gaps(problem: Problem, split: Split, longest: int, wanted: int) -> int:
    """The longest prompt, not above one that runs, with no gap right below it. What is wanted is taken to run."""
    step = max(1, int(longest * FINE_STEP))
    is_sure, ran = True, 0
    for number, tokens in enumerate(range(longest - step, wanted, -step)):
        # Behind a gap that is further down, as many lengths have to run again.
        if is_sure and FINE_STEPS in (number, ran):
            break
        if not takes_anyway(problem, split, tokens):
            is_sure, ran = False, 0
        elif is_sure:
            ran += 1
        else:
            longest, is_sure = tokens, True
    return longest if is_sure else wanted


def takes(problem: Problem, split: Split, text_tokens: int) -> bool:
    """Whether a split takes a prompt with so much text; the caller's tensors are where the model begins."""
    return _all_run(problem, split, text_tokens, lambda _: None)


def takes_anyway(problem: Problem, split: Split, text_tokens: int) -> bool:
    """The same, also if the caller put them on the main GPU, and with what hooks then copy.

    Where that costs, the choice does not depend on it, but what is promised does.
    """
    return _all_run(problem, split, text_tokens, lambda stage: problem.is_main(split, stage))


def _all_run(problem: Problem, split: Split, text_tokens: int, is_main: Callable[[int], bool | None]) -> bool:
    replay, rooms = problem.replay, problem.fleet.rooms
    assert replay is not None
    need = problem.bare.footprint.needs(text_tokens)
    stages = sorted(
        (rooms[gpu].margin(need, *run), gpu, run, stage)
        for stage, (gpu, run) in enumerate(zip(split.gpus, split.runs, strict=True))
    )
    # What lives at once does not fit if it does not in the tightest, which also is the likeliest to fail: it comes first.
    return stages[0][0] >= 0 and all(
        replay.runs(run, gpu, text_tokens, rooms[gpu].capacity_bytes, is_main=is_main(stage))
        for _, gpu, run, stage in stages
    )


def _candidates(problem: Problem, choice: Choice) -> Iterator[Split]:
    """The search's own split first."""
    bare = problem.bare
    if len(choice.split.gpus) <= MOST_SPREAD:
        for split in near_best(bare.footprint, bare.fleet, choice, share=NEAR_SHARE):
            if problem.policy.prefer != "speed" or split.gpus == choice.split.gpus:
                yield split
        return
    yield choice.split
    for border in range(len(choice.split.gpus) - 1):
        for by in (1, -1):
            moved = choice.split.moved(border, by)
            if moved is not None:
                yield moved
