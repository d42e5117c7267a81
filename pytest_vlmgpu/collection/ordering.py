"""The order of gated tests: each model is loaded once, and what is needed to keep it so while they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..state import ASKED, EXAMINED, POSITION, gate_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from ..requirements import VlmSpec
    from .reading import Examined

    Requests = Sequence[Examined | None]


def requests_of(config: pytest.Config, items: Sequence[pytest.Item]) -> list[Examined | None]:
    """What each test asks for; ``None`` where it is no concern of ours.

    This list goes beside that of the tests: pairs would be ten thousand objects more for the garbage collector.
    """
    examinations = config.stash.get(EXAMINED, None)
    return list(map(examinations.of.get, map(id, items))) if examinations is not None else [None] * len(items)


def arrange(config: pytest.Config, items: list[pytest.Item], requests: list[Examined | None] | None = None) -> None:
    """Order tests, and with them what they ask for where that is known, so that each model is loaded once.

    pytest before 9.2 groups session parameters by their position and not by their value, and a shuffling plugin does not
    group at all. Tests that need free memory and load nothing run before the first model takes it. Where an order loads
    each model once, it is not touched.
    """
    asked = config.stash.get(ASKED, [])
    if all(_is_the_same(examined, asked[0]) for examined in asked):
        return
    requests = requests_of(config, items) if requests is None else requests
    if _is_in_order(requests):
        return
    order = _in_order(requests)
    items[:] = [items[position] for position in order]
    requests[:] = [requests[position] for position in order]


def note(config: pytest.Config, items: Sequence[pytest.Item], requests: Requests) -> None:
    """Remember which model is used when, which requirements share a load, and what the tests of this process need."""
    from .groups import needs_of

    gate = gate_of(config)
    positions: dict[int, list[int]] = {}
    distinct: dict[int, Examined] = {}
    for position, examined in enumerate(requests):
        if examined is not None and examined.gated is not None:
            items[position].stash[POSITION] = position
            key = id(examined)
            if key in positions:
                positions[key].append(position)
            else:
                positions[key] = [position]
                distinct[key] = examined
    uses: dict[VlmSpec, list[int]] = {}
    for key, examined in distinct.items():
        if examined.model is not None and examined.gated is not None:
            uses.setdefault(examined.model, []).extend(positions[key])
            asked = gate.sharing.setdefault(examined.model, [])
            if examined.gated.requirements not in asked:
                asked.append(examined.gated.requirements)
    gate.residents.uses = {model: sorted(places) for model, places in uses.items()}
    gate.own.needs = needs_of(config, [examined.gated for examined in distinct.values() if examined.gated is not None])


def _is_the_same(examined: Examined, other: Examined) -> bool:
    """True when it does not matter which of two such tests comes first."""
    return (
        examined.model == other.model
        and examined.runs_before_loads == other.runs_before_loads
        and examined.mutates == other.mutates
    )


def _is_in_order(requests: Requests) -> bool:
    """True when each model would be loaded once, nothing that needs memory is late, and no test finds a changed model."""
    last: Examined | None = None
    models: dict[VlmSpec, bool] = {}
    """To whether a test that may change the model came."""
    model: VlmSpec | None = None
    for examined in requests:
        if examined is last or examined is None or examined.gated is None:
            continue
        last = examined
        if examined.model is None:
            if models and examined.runs_before_loads:
                return False
            continue
        mutates = examined.mutates
        if examined.model != model:
            model = examined.model
            if model in models:
                return False
            models[model] = mutates
        elif models[model] and not mutates:
            return False
        models[model] = mutates
    return True


def _in_order(requests: Requests) -> list[int]:
    """Positions: each group whole at the place of its first test, what needs free memory in front of the first group."""
    groups: dict[VlmSpec, list[int]] = {}
    mutating: dict[VlmSpec, list[int]] = {}
    before: dict[int, None] = {}
    for position, examined in enumerate(requests):
        if examined is None:
            continue
        if examined.model is not None:
            # After a test that may change the model it is loaded again: nobody should be left who needs it.
            (mutating if examined.mutates else groups).setdefault(examined.model, []).append(position)
        elif examined.runs_before_loads:
            before[position] = None
    order: list[int] = []
    for position, examined in enumerate(requests):
        if examined is None or (examined.model is None and not examined.runs_before_loads):
            order.append(position)
        elif examined.model is None:
            if position in before:
                del before[position]
                order.append(position)
        else:
            order += [*before, *groups.pop(examined.model, ()), *mutating.pop(examined.model, ())]
            before.clear()
    return order
