"""From collected tests to gated ones: read markers and fixtures, parametrise, and order by model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from . import markers
from .state import GATED_TEST, POSITION, gate_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .requirements import VlmSpec

_FIXTURES_MODULE = "pytest_vlmgpu.fixtures"
_GATE_FIXTURE = "_vlm_gate"


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
            sharing.setdefault(test.specs[0], []).append(test.requirements)
    before = [item for item, test in gated.items() if not test.loads and (test.requirements.needs_memory or test.specs)]
    arranged: dict[pytest.Item, None] = {}
    for item in items:
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
    from .requirements import GatedTest, Requirements

    loads = _uses(item, item.fixturenames, "vlm")
    uses_gpus = _uses(item, item.fixturenames, "vlm_gpus")
    requirements = markers.read_requirements(item, item.nodeid)
    is_ours = bool(loads or uses_gpus or requirements)
    markers.refuse_unknown(item, is_surely_meant=is_ours)
    # A project may have had a marker or a fixture vlm before this plugin was installed: its tests run as they did.
    is_theirs = not is_ours and ("vlm" in item.fixturenames or "vlm" in markers.registered(item.config))
    named = () if is_theirs else markers.read_models(item, item.nodeid)
    if not (requirements or named or loads or uses_gpus):
        return
    if loads:
        callspec: Any = getattr(item, "callspec", None)
        parameter = callspec.params.get("vlm") if callspec is not None else None
        if named and parameter not in named and not _is_parametrized_by_user(item):
            raise markers.wrong(
                f"{item.nodeid}: the fixture vlm cannot take its model from a marker here; a marker on a parameter or on a "
                "unittest.TestCase comes too late: put it on the test function, its class or module."
            )
        spec = gate_of(item.config).spec_from(parameter)
        named = (markers.with_gpus(spec, item, item.nodeid),) if spec is not None else ()
        if callspec is not None and named:
            callspec.params["vlm"] = named[0]
    item.stash[GATED_TEST] = GatedTest(
        specs=named,
        requirements=Requirements.strictest(requirements),
        wants_gpus=bool(requirements) or uses_gpus,
        loads=loads,
    )
    # A list of its own: pytest shares one between all parameters of a function.
    names = list(item.fixturenames)
    names.insert(_after_session_wide_setup(item), _GATE_FIXTURE)
    item.fixturenames = names


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
