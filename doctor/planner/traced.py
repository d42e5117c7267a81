"""The traced tier: prices from the allocations of the model's real code, in the place of formulas.

A trace is of one length. Sizes of tensors are polynomials of the prompt's length, of degree 2 at most (masks have pairs of
tokens), so that three lengths give every other one, and a fourth tells whether that is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import msgspec

from ..trace import BEFORE, TOWER, Event, Trace, Traces, rounded_bytes

Phase = Literal["prompt", "return", "answer"]
"""Of a run: the prompt is read; logits of the prompt go back to where it came from; one more token is made."""

STEP = 512
"""Tokens from one traced length to the next."""
_SHORTEST = 64
"""Text tokens of the shortest prompt traced."""
_SHORT_SORT = 4096
"""Keys that are sorted in place; a mixture of experts sorts as many for each token as experts read it.
Source: should_use_small_sort of aten/src/ATen/native/cuda/Sort.h."""
_ROW = 8
"""Lengths traced are one more than a multiple, so that rows of masks that are padded to whole vectors are padded most."""


class IrregularError(Exception):
    """The events of prompts of different length differ in more than sizes that are polynomials; the message is a phrase."""


def lengths(image_tokens: int, window: int | None, steps: int, active_experts: int = 0, least: int = 0) -> tuple[int, ...]:
    """Lengths of prompts to trace: four, and four more where a sliding window makes long prompts another program.

    Args:
        image_tokens: Of one prompt.
        window: Tokens of the sliding window; ``None`` when there is none.
        steps: Tokens to generate.
        active_experts: That read each token, in a mixture of experts.
        least: Tokens below which the model runs another program, or a prompt has no room for what it needs.
    """
    least = max(least, image_tokens + _SHORTEST, _SHORT_SORT // active_experts + 1 if active_experts else 0)
    if window is None:
        return _four(least, STEP)
    beyond = _four(max(least, window + 1), STEP)
    step = (window - steps - _ROW - least) // 8 // _ROW * _ROW
    return (*_four(least, step), *beyond) if step > 0 else beyond


def _four(least: int, step: int) -> tuple[int, ...]:
    first = -(-least // _ROW) * _ROW + 1
    return first, first + step, first + 2 * step, first + 7 * step


class Growth:
    """The same events at any length of the prompt.

    Args:
        runs: At least three, of different lengths.

    Raises:
        IrregularError: They do not have the same events, or the sizes of the later ones do not follow from the first three.
    """

    def __init__(self, runs: Sequence[Trace]) -> None:
        self.shape = runs[0]
        """The first run: all but sizes holds for every length."""
        self._lengths = tuple(run.tokens for run in runs[:3])
        for run in runs[1:]:
            if not _is_alike(run, self.shape):
                raise IrregularError(f"prompts of {self.shape.tokens} and {run.tokens} tokens run different code")
        kinds: dict[tuple[int, ...], int] = {}
        self._kind = [
            kinds.setdefault(sizes, len(kinds))
            for sizes in zip(*([event.size_bytes for event in run.events] for run in runs), strict=True)
        ]
        self._curves = [_curve(sizes[:3], self._lengths) for sizes in kinds]
        for number, run in enumerate(runs[3:], start=3):
            for sizes, curve in zip(kinds, self._curves, strict=True):
                if _value(curve, self._lengths, run.tokens) != sizes[number]:
                    raise IrregularError(f"a tensor of {sizes[0]} bytes grows in no regular way with the prompt")

    def sizes(self, tokens: int, *, new_tokens: int = 0) -> list[int]:
        """For each event its size in bytes, for a prompt of that length; the sign and 0 mean what they mean in an event.

        Args:
            tokens: Of the prompt.
            new_tokens: What is behind the prompt is told for so many tokens later.
        """
        sizes = self._at(tokens)
        if new_tokens:
            begin = self.shape.decode_begin()
            sizes[begin:] = self._at(tokens + new_tokens)[begin:]
        return sizes

    def _at(self, tokens: int) -> list[int]:
        values = [_value(curve, self._lengths, tokens) for curve in self._curves]
        # No tensor comes or goes with the length, however short the prompt.
        values = [
            max(1, value) if curve[0] > 0 else min(-1, value) if curve[0] else 0
            for curve, value in zip(self._curves, values, strict=True)
        ]
        return [values[kind] for kind in self._kind]

    def at(self, tokens: int, *, new_tokens: int = 0) -> Trace:
        """The trace of a prompt of that length, with the arguments of :meth:`sizes`."""
        events = tuple(
            Event(event.tensor, size, event.place, event.module)
            for event, size in zip(self.shape.events, self.sizes(tokens, new_tokens=new_tokens), strict=True)
        )
        return msgspec.structs.replace(self.shape, tokens=tokens, events=events)


def _is_alike(run: Trace, other: Trace) -> bool:
    def kinds(events: Sequence[Event]) -> list[tuple[int, int, bool, bool]]:
        return [(event.tensor, event.place, event.size_bytes > 0, event.size_bytes < 0) for event in events]

    return len(run.events) == len(other.events) and kinds(run.events) == kinds(other.events)


_Curve = tuple[int, Fraction, Fraction]
"""Newton's form: value at the first length, first and second divided difference."""


def _curve(sizes: Sequence[int], lengths: Sequence[int]) -> _Curve:
    first = Fraction(sizes[1] - sizes[0], lengths[1] - lengths[0])
    second = Fraction(sizes[2] - sizes[1], lengths[2] - lengths[1])
    return sizes[0], first, (second - first) / (lengths[2] - lengths[0])


def _value(curve: _Curve, lengths: Sequence[int], tokens: int) -> int:
    start, slope, bend = curve
    if not slope and not bend:
        return start
    beyond = tokens - lengths[0]
    value = start + slope * beyond + bend * beyond * (tokens - lengths[1])
    # Half a byte cannot be: where a fraction is left, the next whole number is the careful one.
    return -int(-value // 1) if value > 0 else int(value // 1)


class Regimes:
    """Growths that hold for prompts up to a sliding window and beyond, or one that holds for all.

    Args:
        traces: Runs of the lengths that :func:`lengths` gives.
        window: Tokens of the sliding window, if any.

    Raises:
        IrregularError: As :class:`Growth` does.
    """

    def __init__(self, traces: Traces, window: int | None) -> None:
        within = [run for run in traces.runs if window is not None and run.tokens <= window]
        beyond = [run for run in traces.runs if run not in within]
        self._window = window if within else None
        self._within = Growth(within) if within else None
        self._beyond = Growth(beyond)

    def growth(self, tokens: int) -> Growth:
        """What holds for a prompt of that length."""
        if self._within is not None and self._window is not None and tokens <= self._window:
            return self._within
        return self._beyond

    def at(self, tokens: int, *, new_tokens: int = 0) -> Trace:
        """The trace of a prompt of that length, with decode steps so many tokens later.

        Where the prompt is within the window and those steps are beyond it, the program of long prompts stands for both.
        """
        return self.growth(tokens + new_tokens).at(tokens, new_tokens=new_tokens)


class Item(msgspec.Struct, frozen=True, array_like=True):
    """A change of what outlives a visit of a place, and the most that came and went there since the last change."""

    place: int
    """Where the program is."""
    spike_bytes: int
    """Most bytes alive at once of tensors that come and go within this visit, before the change."""
    origin: int
    """Place of the tensor that changes."""
    change_bytes: int
    """Above 0: it comes. Below 0: it goes."""
    copy_bytes: int
    """It is read here, and on a device that does not have its place this is a copy until the visit ends."""
    visit: int
    phase: Phase


class Timeline:
    """The live bytes of one trace, in a form from which any device's peak is quickly told."""

    def __init__(self, trace: Trace) -> None:
        self.layers = trace.layers
        self.items = tuple(_items(trace))

    def peak(self, places: frozenset[int], *, gets_logits: bool = False) -> tuple[int, int, Phase]:
        """Most bytes alive on a device with these places, and the place and the phase in which that is.

        Args:
            places: Of the device.
            gets_logits: Those of the prompt come back to it, wherever the prompt is embedded.
        """
        now = most = copies = 0
        visit, at = -1, TOWER
        phase: Phase = "prompt"
        for item in self.items:
            if item.visit != visit:
                visit, copies = item.visit, 0
            if item.place in places or (gets_logits and item.phase == "return"):
                total = now + copies + item.spike_bytes
                if total > most:
                    most, at, phase = total, item.place, item.phase
                if item.copy_bytes and item.origin not in places:
                    copies += item.copy_bytes
            if item.origin in places:
                now += item.change_bytes
        return most, at, phase

    def kept(self, places: frozenset[int]) -> int:
        """Bytes that the layers among these places keep from the prompt to the next token: the KV cache."""
        mine = frozenset(place for place in places if 0 <= place < self.layers)
        return sum(item.change_bytes for item in self.items if item.phase != "answer" and item.origin in mine)


def _items(trace: Trace) -> list[Item]:
    """Fold everything that comes and goes within one visit of its own place into spikes."""
    visits = visits_of(trace)
    born, ended = _ends(trace, visits)
    begin = trace.decode_begin()
    behind = next((index for index, event in enumerate(trace.events) if event.place == trace.layers), begin)
    items: list[Item] = []
    now = most = 0
    sizes: dict[int, int] = {}
    origins: dict[int, int] = {}
    visit = -1

    def put(index: int, origin: int, change: int = 0, copy: int = 0) -> None:
        nonlocal most
        place = trace.events[index].place
        phase: Phase = "answer" if index >= begin else "return" if place == BEFORE and index > behind else "prompt"
        items.append(Item(place, most, origin, change, copy, visits[index], phase))
        most = now

    for index, event in enumerate(trace.events):
        if visits[index] != visit:
            visit, now, most = visits[index], 0, 0
        if event.size_bytes > 0:
            sizes[event.tensor], origins[event.tensor] = rounded_bytes(event.size_bytes), event.place
        size, origin = sizes[event.tensor], origins[event.tensor]
        is_local = born[event.tensor] == ended.get(event.tensor, -1)
        if event.size_bytes < 0:
            put(index, origin, copy=rounded_bytes(-event.size_bytes))
            put(index, origin)
        elif is_local:
            now += size if event.size_bytes else -size
            most = max(most, now)
            if not now:
                put(index, origin)
        else:
            put(index, origin, change=size if event.size_bytes else -size)
            if event.size_bytes:
                # The moment itself may be the highest.
                put(index, origin)
    return items


def visits_of(trace: Trace) -> list[int]:
    """For each event the number of the visit it is in: a stay of the program at one place."""
    visits: list[int] = []
    visit, place = -1, None
    for event in trace.events:
        if event.place != place:
            visit, place = visit + 1, event.place
        visits.append(visit)
    return visits


def _ends(trace: Trace, visits: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """For each tensor the visits in which it comes and goes."""
    born: dict[int, int] = {}
    ended: dict[int, int] = {}
    for event, visit in zip(trace.events, visits, strict=True):
        if event.size_bytes > 0:
            born[event.tensor] = visit
        elif event.size_bytes == 0:
            ended[event.tensor] = visit
    return born, ended
