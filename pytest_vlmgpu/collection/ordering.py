"""The order of gated tests: each model is loaded once, and what is needed to keep it so while they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..state import EXAMINED, POSITION, gate_of
from .groups import needs_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from ..requirements import VlmSpec
    from .reading import Examined

    Tests = Sequence[tuple[pytest.Item, Examined | None]]


def arrange(items: list[pytest.Item]) -> Tests:
    """Order tests so that each model is loaded once; returns them with what each asks for.

    pytest before 9.2 groups session parameters by their position and not by their value, and a shuffling plugin does not
    group at all. Tests that need free memory and load nothing run before the first model takes it. Where an order loads
    each model once, it is not touched.
    """
    tests: Tests = [(item, item.stash.get(EXAMINED, None)) for item in items]
    if not _is_in_order(tests):
        tests = _in_order(tests)
        items[:] = [item for item, _ in tests]
    return tests


def note(config: pytest.Config, tests: Tests) -> None:
    """Remember which model is used when, which requirements share a load, and what the tests of this process need."""
    gate = gate_of(config)
    positions: dict[int, list[int]] = {}
    distinct: dict[int, Examined] = {}
    for position, (item, examined) in enumerate(tests):
        if examined is not None and examined.gated is not None:
            item.stash[POSITION] = position
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


def _is_in_order(tests: Tests) -> bool:
    """True when each model would be loaded once, nothing that needs memory is late, and no test finds a changed model."""
    last: Examined | None = None
    models: dict[VlmSpec, bool] = {}
    """To whether a test that may change the model came."""
    model: VlmSpec | None = None
    for _, examined in tests:
        if examined is last or examined is None or examined.gated is None:
            continue
        last = examined
        if examined.model is None:
            if models and examined.runs_before_loads:
                return False
            continue
        mutates = examined.watched is not None and examined.watched.mutates
        if examined.model != model:
            model = examined.model
            if model in models:
                return False
            models[model] = mutates
        elif models[model] and not mutates:
            return False
        models[model] = mutates
    return True


def _in_order(tests: Tests) -> Tests:
    """Each group whole at the place of its first test, and what needs free memory in front of the first group."""
    groups: dict[VlmSpec, list[tuple[pytest.Item, Examined | None]]] = {}
    before: dict[int, tuple[pytest.Item, Examined | None]] = {}
    for test in tests:
        examined = test[1]
        if examined is None:
            continue
        if examined.model is not None:
            groups.setdefault(examined.model, []).append(test)
        elif examined.runs_before_loads:
            before[id(test)] = test
    # After a test that may change the model it is loaded again: nobody should be left who needs it.
    for group in groups.values():
        group.sort(key=lambda test: test[1] is not None and test[1].watched is not None and test[1].watched.mutates)
    arranged: list[tuple[pytest.Item, Examined | None]] = []
    for test in tests:
        examined = test[1]
        if examined is None or (examined.model is None and not examined.runs_before_loads):
            arranged.append(test)
        elif examined.model is None:
            arranged += [test] if before.pop(id(test), None) else []
        else:
            arranged += [*before.values(), *groups.pop(examined.model, [])]
            before.clear()
    return arranged
