"""From collected tests to gated ones: read markers and fixtures, store what each test asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ..state import ASKED, EXAMINED, GATED_TEST, OURS, READ_MARKS, REQUESTS, WATCHED_TEST
from .reading import GATE_FIXTURE, WATCH_FIXTURE, Examinations, Readings, scope_of_vlm
from .spreading import Spreading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _pytest.nodes import Node

    from ..concern import Ours
    from .ordering import Requests


def examine(report: pytest.CollectReport, concerned: Sequence[pytest.Function]) -> None:
    """Store what each test asks for and put the gate before its fixtures; turn a wrong marker into a collection error.

    A test that names several models becomes one for each.
    """
    spreading = Spreading()
    error = _examine(concerned, spreading)
    if error is None and (spread := spreading.spread()):
        error = _examine([test for tests in spread.values() for test in tests])
        report.result = list(spreading.in_their_place(report.result, spread))
    if error is not None:
        report.outcome = "failed"
        report.longrepr = error
        report.result = []


def examine_again(session: pytest.Session, requests: Requests) -> bool:
    """Examine tests to which a hook of the project has added a marker since they were collected; False without any.

    A wrong one is reported in the way in which pytest reports errors of collection: none of the tests beside it runs.
    """
    ours = session.config.stash[OURS]
    changed: dict[Any, list[Any]] = {}
    for item in _changed(session.items, requests, ours):
        changed.setdefault(item.parent, []).append(item)
    known = session.config.stash[EXAMINED].of if EXAMINED in session.config.stash else {}
    for collector, items in changed.items():
        for item in items:
            known.pop(id(item), None)
            item.fixturenames = [name for name in item.fixturenames if name not in (GATE_FIXTURE, WATCH_FIXTURE)]
        error = _examine(items)
        if error is not None:
            _report(session, collector.nodeid, error)
            session.items[:] = [item for item in session.items if item.parent is not collector]
    return bool(changed)


def refuse(session: pytest.Session, error: str) -> None:
    """Let a worker of pytest-xdist run nothing, and have the controller say why; its own errors of usage nobody sees."""
    _report(session, "the tests of a worker", error)
    session.items.clear()


def _report(session: pytest.Session, nodeid: str, error: str) -> None:
    session.config.hook.pytest_collectreport(report=pytest.CollectReport(nodeid, "failed", error, []))


def settle(config: pytest.Config, requests: Requests) -> None:
    """Note what was found at the end of the collection; tests that will not run are let go."""
    config.stash[REQUESTS] = requests
    if EXAMINED in config.stash:
        del config.stash[EXAMINED]


def give_requests(items: Sequence[pytest.Item], requests: Requests) -> None:
    """Tell each test that will run what it asks for."""
    for item, examined in zip(items, requests, strict=True):
        if examined is None:
            continue
        if examined.gated is not None:
            item.stash[GATED_TEST] = examined.gated
        if examined.watched is not None:
            item.stash[WATCHED_TEST] = examined.watched


def give_models(items: Sequence[Any], requests: Requests) -> None:
    """Give each test that loads a model, or may ask for it at run time, its own, as a parameter.

    This comes last: pytest would spend as much time on ordering these parameters as on all else, to the same end.
    """
    for item, examined in zip(items, requests, strict=True):
        if examined is None or examined.callspec is None:
            continue
        callspec = getattr(item, "callspec", None)
        if callspec is None:
            item.callspec = examined.callspec
            continue
        if "vlm" not in callspec.params:
            callspec.indices["vlm"], callspec._arg2scope["vlm"] = 0, scope_of_vlm(item)
        callspec.params["vlm"] = examined.callspec.params["vlm"]


def _examine(concerned: Sequence[Any], spreading: Spreading | None = None) -> str | None:
    """Examine tests; returns what is wrong with the first that is wrong.

    Args:
        concerned: The tests.
        spreading: Where those go that name several models; an error without.
    """
    config = concerned[0].config
    ours = config.stash[OURS]
    readings = Readings(ours)
    if EXAMINED not in config.stash:
        config.stash[EXAMINED] = Examinations([], {})
    known = config.stash[EXAMINED]
    known.items.extend(concerned)
    of, entry_of = known.of, readings.of
    parent = None
    try:
        for item in concerned:
            # Written for speed: this is done for each test.
            entry = entry_of(item)
            if entry is None:
                continue
            reading, fixturenames, examined, has_parameters = entry
            if examined is None:
                if spreading is not None and spreading.takes(item, reading.named):
                    continue
                examined = reading.examined(item)
            of[id(item)] = examined
            if fixturenames is None:
                pass
            elif has_parameters:
                # A list of its own: pytest shares one between all parameters of a function.
                item.fixturenames = fixturenames.copy()
            else:
                # In its place: ten thousand lists more would have the garbage collector look at all objects once more.
                item.fixturenames[:] = fixturenames
            if item.parent is not parent:
                parent = item.parent
                parent.stash[READ_MARKS] = _marks_above(parent, ours)
    except pytest.Collector.CollectError as error:
        return str(error)
    finally:
        config.stash.setdefault(ASKED, []).extend(readings.examined)
    return None


def _changed(items: Sequence[pytest.Item], requests: Requests, ours: Ours) -> list[pytest.Function]:
    """Tests with other markers than when they were examined, or that were not, and have markers now."""
    found: list[pytest.Function] = []
    parent = None
    is_parent_changed = False
    for item, examined in zip(items, requests, strict=True):
        if item.parent is not parent:
            parent = item.parent
            assert parent is not None
            is_parent_changed = _marks_above(parent, ours) != parent.stash.get(READ_MARKS, 0)
        marks = 0
        for mark in item.own_markers:
            if ours[mark.name]:
                marks += 1
        known = 0 if examined is None else examined.marks
        if (marks != known or is_parent_changed) and isinstance(item, pytest.Function):
            found.append(item)
    return found


def _marks_above(parent: Node, ours: Ours) -> int:
    return sum(ours[mark.name] for mark in parent.iter_markers())
