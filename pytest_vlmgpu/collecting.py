"""From collected tests to gated ones: read markers and fixtures, parametrise, and order by model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from . import markers
from .state import GATED_TEST, POSITION, WATCHED_TEST, gate_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .requirements import VlmSpec

_FIXTURES_MODULE = "pytest_vlmgpu.fixtures"
_GATE_FIXTURE = "_vlm_gate"
_WATCH_FIXTURE = "_vlm_watch"


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Give the fixture ``vlm`` the models that a test names, or that of ``--vlm-model``.

    One model leaves the test's id as it is; several add the last part of each name.

    Raises:
        pytest.Collector.CollectError: A marker is wrong.
    """
    definition = metafunc.definition
    if not _uses(definition, metafunc.fixturenames, "vlm") or _is_parametrized_by_user(definition):
        return
    specs: Sequence[VlmSpec | None] = markers.read_models(definition, definition.nodeid)
    if not specs:
        default = gate_of(metafunc.config).spec_from(None)
        specs = [markers.with_gpus(default, definition, definition.nodeid)] if default else []
    if specs:
        ids = [pytest.HIDDEN_PARAM] if len(specs) == 1 else [spec.name.rstrip("/").split("/")[-1] for spec in specs if spec]
        metafunc.parametrize("vlm", specs, indirect=True, scope="session", ids=ids)


def examine(report: pytest.CollectReport, concerned: Sequence[pytest.Function]) -> None:
    """Store what each test asks for and put the gate before its fixtures; turn a wrong marker into a collection error."""
    try:
        for item in concerned:
            _examine_test(item)
    except pytest.Collector.CollectError as error:
        report.outcome = "failed"
        report.longrepr = str(error)
        report.result = []


def arrange(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order tests so that each model is loaded once, and note which requirements share a load.

    pytest before 9.2 groups session parameters by their position and not by their value, and a shuffling plugin does not
    group at all. Tests that need free memory and load nothing run before the first model takes it. Other tests stay in
    place, and an order that loads each model once is not touched.
    """
    gated = {item: item.stash[GATED_TEST] for item in items if GATED_TEST in item.stash}
    if not gated:
        return
    sharing = gate_of(config).sharing
    groups: dict[VlmSpec, list[pytest.Item]] = {}
    for item, test in gated.items():
        if test.loads and test.specs:
            groups.setdefault(test.specs[0], []).append(item)
            asked = sharing.setdefault(test.specs[0], [])
            if test.requirements not in asked:
                asked.append(test.requirements)
    for tests in groups.values():
        # After a test that may change the model it is loaded again: nobody should be left who needs it.
        tests.sort(key=lambda item: item.stash[WATCHED_TEST].mutates)
    before = [item for item, test in gated.items() if not test.loads and (test.requirements.needs_memory or test.specs)]
    arranged: dict[pytest.Item, None] = {}
    for item in items:
        if item in arranged:
            continue
        if item in gated and gated[item].loads and gated[item].specs:
            arranged.update(dict.fromkeys([*before, *groups[gated[item].specs[0]]]))
        else:
            arranged[item] = None
    items[:] = arranged
    from .groups import group_tests
    from .residents import uses_of

    gate = gate_of(config)
    gate.own.needs = group_tests(items).needs
    for position, item in enumerate(items):
        item.stash[POSITION] = position
    gate.residents.uses = uses_of(
        (position, gated[item].specs[0])
        for position, item in enumerate(items)
        if item in gated and gated[item].loads and gated[item].specs
    )


def _examine_test(item: pytest.Function) -> None:
    from .requirements import GatedTest, Requirements, WatchedTest

    loads = _uses(item, item.fixturenames, "vlm")
    uses_gpus = _uses(item, item.fixturenames, "vlm_gpus")
    uses_factory = any(_uses(item, item.fixturenames, name) for name in ("vlm_factory", "vlm_device"))
    limit_bytes, mutates = markers.read_limit(item, item.nodeid), markers.may_mutate(item, item.nodeid)
    is_metered = limit_bytes is not None or _uses(item, item.fixturenames, "vlm_vram")
    requirements = markers.read_requirements(item, item.nodeid)
    is_ours = bool(loads or uses_gpus or uses_factory or requirements or is_metered or mutates)
    markers.refuse_unknown(item, is_surely_meant=is_ours)
    # A project may have had a marker or a fixture vlm before this plugin was installed: its tests run as they did.
    is_theirs = not is_ours and ("vlm" in item.fixturenames or "vlm" in markers.registered(item.config))
    named = () if is_theirs else markers.read_models(item, item.nodeid)
    joined = Requirements.strictest(requirements)
    if loads or uses_factory or is_metered:
        item.stash[WATCHED_TEST] = WatchedTest(loads, mutates, limit_bytes, joined.vram_bytes)
        _insert(item, _WATCH_FIXTURE, _before_own_fixtures(item))
    if not (requirements or named or loads or uses_gpus or uses_factory):
        return
    if loads:
        if getattr(item, "nofuncargs", False):
            _parametrize_unittest(item, named)
        callspec: Any = getattr(item, "callspec", None)
        parameter = callspec.params.get("vlm") if callspec is not None else None
        if named and parameter not in named and not _is_parametrized_by_user(item):
            raise markers.wrong(
                f"{item.nodeid}: the fixture vlm cannot take its model from a marker here; a marker on a parameter comes "
                "too late: put it on the test function, its class or module."
            )
        spec = gate_of(item.config).spec_from(parameter)
        named = (markers.with_gpus(spec, item, item.nodeid),) if spec is not None else ()
        if callspec is not None and named:
            callspec.params["vlm"] = named[0]
    item.stash[GATED_TEST] = GatedTest(
        specs=named,
        requirements=joined,
        wants_gpus=bool(requirements) or uses_gpus,
        loads=loads,
    )
    _insert(item, _GATE_FIXTURE, _after_session_wide_setup(item))


def _parametrize_unittest(item: Any, named: Sequence[VlmSpec]) -> None:
    """Give a test of a unittest.TestCase its model in the way of a parameter, so that it shares loads with all others.

    pytest parametrises no such tests; what it reads of a parameter afterwards are these few attributes.
    """
    if len(named) > 1:
        raise markers.wrong(
            f"{item.nodeid}: @pytest.mark.vlm names {len(named)} models, and tests of a unittest.TestCase run once: name "
            "one, and make a subclass for each other model."
        )
    from types import SimpleNamespace

    spec = named[0] if named else gate_of(item.config).spec_from(None)
    if spec is not None:
        scopes = {"vlm": item._fixtureinfo.name2fixturedefs["vlm"][0]._scope}
        item.callspec = SimpleNamespace(
            params={"vlm": spec}, indices={"vlm": 0}, _arg2scope=scopes, _idlist=(), marks=[], id=""
        )


def _insert(item: pytest.Function, name: str, position: int) -> None:
    # A list of its own: pytest shares one between all parameters of a function.
    names = list(item.fixturenames)
    names.insert(position, name)
    item.fixturenames = names


def _before_own_fixtures(item: Any) -> int:
    """Position of the first fixture that is set up for this test alone.

    What wider fixtures do to the shared model belongs to all their tests; what these do is the test's own.
    """
    definitions = item._fixtureinfo.name2fixturedefs
    for index, name in enumerate(item.fixturenames):
        if name in definitions and definitions[name][-1].scope == "function":
            return index
    return len(item.fixturenames)


def _after_session_wide_setup(item: Any) -> int:
    """Position behind the session's autouse fixtures, which may set what the gate reads (a model cache, say).

    All other fixtures come behind the gate: they may need the GPU that is not there.
    """
    info = item._fixtureinfo
    requested = {*info.argnames, *(name for mark in item.iter_markers("usefixtures") for name in mark.args)}
    position = 0
    for index, name in enumerate(item.fixturenames, start=1):
        is_autouse = name in info.initialnames and name not in requested
        if is_autouse and name in info.name2fixturedefs and info.name2fixturedefs[name][-1].scope == "session":
            position = index
    return position


def _uses(definition: Any, fixturenames: Sequence[str], name: str) -> bool:
    """True when a test reaches our fixture of that name, and not only one of the project's own with the same name."""
    if name not in fixturenames:
        return False
    for fixture in reversed(definition._fixtureinfo.name2fixturedefs.get(name, ())):
        if fixture.func.__module__ == _FIXTURES_MODULE:
            return True
        if name not in fixture.argnames:
            return False
    return False


def _is_parametrized_by_user(definition: pytest.Function) -> bool:
    """True when a ``parametrize`` marker names ``vlm`` itself."""
    for mark in definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs.get("argnames", ())
        if "vlm" in ([name.strip() for name in names.split(",")] if isinstance(names, str) else names):
            return True
    return False
