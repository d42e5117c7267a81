"""Made-up traces: programs of a few layers whose sizes are polynomials of the prompt's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from vlm_doctor.trace import BEFORE, TOWER, Event, Trace, Traces

Size = Callable[[int], int]


def small_trace(tokens: int, *, layers: int = 3, more: int = 1, has_tower: bool = True, returned_bytes: int = 0) -> Trace:
    """A tower, an embedding, layers with a cache and a temporary each, a head; then one step with longer caches.

    Of the logits of each token, so many bytes go back to where the prompt came from.
    """
    events: list[Event] = []
    number = 0

    def make(size: int, place: int, module: int = 0) -> int:
        nonlocal number
        number += 1
        events.append(Event(number, size, place, module))
        return number

    def end(tensor: int, place: int) -> None:
        events.append(Event(tensor, 0, place, 0))

    ids = make(8 * tokens, BEFORE)
    features = make(5000, TOWER, 1) if has_tower else 0
    passes = [len(events)]
    tables = make(256 * tokens, BEFORE, 2)
    states = make(1024 * tokens, BEFORE, 2)
    if features:
        end(features, BEFORE)
    caches = []
    for layer in range(layers):
        events.append(Event(tables, -256 * tokens, layer, 0))
        if layer:
            events.append(Event(states, -1024 * tokens, layer, 0))
        caches.append(make(128 * tokens, layer, 3))
        scratch = make(4096 * tokens + tokens**2, layer, 3)
        output = make(1024 * tokens, layer, 3)
        end(scratch, layer)
        end(states, layer)
        states = output
    events.append(Event(states, -1024 * tokens, layers, 0))
    logits = make(70_000 + returned_bytes * tokens, layers, 4)
    end(states, layers)
    end(tables, layers)
    if returned_bytes:
        events.append(Event(logits, -returned_bytes * tokens, BEFORE, 0))
    if more:
        passes.append(len(events))
        for layer in range(layers):
            longer = make(128 * (tokens + 1), layer, 3)
            end(caches[layer], layer)
            caches[layer] = longer
    end(logits, layers)
    for cache in caches:
        end(cache, layers)
    end(ids, layers)
    names = ("", "visual", "embed_tokens", "layers.0", "lm_head")
    return Trace(tokens=tokens, layers=layers, modules=names, events=tuple(events), passes=tuple(passes))


def traces_of(runs: Sequence[Trace]) -> Traces:
    return Traces(
        architecture="Made", attention="sdpa", torch="2.13", transformers="5.23", weights_bytes=0, runs=tuple(runs)
    )


@st.composite
def any_trace(draw: st.DrawFn) -> Trace:
    """Whatever a program may do: tensors come, are read elsewhere, and go, at places in any order."""
    layers = draw(st.integers(1, 3))
    events: list[Event] = []
    alive: dict[int, int] = {}
    known: dict[int, set[int]] = {}
    passes = [0]
    for _ in range(draw(st.integers(1, 8))):
        place = draw(st.integers(TOWER, layers))
        for _ in range(draw(st.integers(1, 6))):
            what = draw(st.sampled_from(("make", "make", "end", "read")))
            if what == "make" or not alive:
                number = len(known) + 1
                alive[number] = draw(st.integers(1, 10_000))
                known[number] = {place}
                events.append(Event(number, alive[number], place, 0))
                continue
            tensor = draw(st.sampled_from(sorted(alive)))
            if what == "end":
                del alive[tensor]
                events.append(Event(tensor, 0, place, 0))
            elif place not in known[tensor]:
                known[tensor].add(place)
                events.append(Event(tensor, -draw(st.integers(1, alive[tensor])), place, 0))
    if draw(st.booleans()):
        passes.append(draw(st.integers(0, len(events))))
    return Trace(tokens=10, layers=layers, modules=("",), events=tuple(events), passes=tuple(passes))
