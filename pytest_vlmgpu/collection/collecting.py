"""From collected tests to gated ones: read markers and fixtures, parametrise, and order by model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from .. import markers
from ..state import ALIASES, GATED_TEST, IS_CONCERNED, POSITION, WATCHED_TEST, gate_of
from .reading import Readings, uses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..gating.gate import Gate
    from ..requirements import GatedTest, VlmSpec
    from .aliases import Alias
    from .reading import Reading

_GATE_FIXTURE = "_vlm_gate"
_WATCH_FIXTURE = "_vlm_watch"
_SEVERAL: pytest.StashKey[bool] = pytest.StashKey()
"""Of a module or class: its markers, and those of what it is in, may name more than one model."""


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Run a test that names several models with each; the last part of each name is added to the test's id.

    One model is given to the test when it is examined: pytest's own way there costs as much as all the rest of a test.

    Raises:
        pytest.Collector.CollectError: A marker is wrong.
    """
    definition = metafunc.definition
    if not _may_name_several(definition):
        return
    if not uses(definition, metafunc.fixturenames, "vlm") or _is_parametrized_by_user(definition):
        return
    specs = markers.read_models(definition, definition.nodeid)
    if len(specs) > 1:
        ids = [spec.name.rstrip("/").split("/")[-1] for spec in specs]
        metafunc.parametrize("vlm", specs, indirect=True, scope="session", ids=ids)


def examine(report: pytest.CollectReport, concerned: Sequence[pytest.Function]) -> None:
    """Store what each test asks for and put the gate before its fixtures; turn a wrong marker into a collection error."""
    config = concerned[0].config
    config.stash[IS_CONCERNED] = True
    aliases: dict[str, Alias] = config.stash.get(ALIASES, {})
    readings = Readings(aliases)
    places = _Places()
    try:
        for item in concerned:
            _examine_test(item, readings.of(item), places)
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
    gated = [(item, item.stash[GATED_TEST]) for item in items if GATED_TEST in item.stash]
    if not gated:
        return
    gate = gate_of(config)
    groups: dict[VlmSpec, list[pytest.Item]] = {}
    # pytest computes the hash of an item anew each time it is asked for.
    group_of: dict[int, list[pytest.Item]] = {}
    before = []
    for item, test in gated:
        if test.loads and test.specs:
            group_of[id(item)] = group = groups.setdefault(test.specs[0], [])
            group.append(item)
        elif not test.loads and (test.requirements.needs_memory or test.specs):
            before.append(item)
    for test in {id(test): test for _, test in gated}.values():
        if test.loads and test.specs:
            asked = gate.sharing.setdefault(test.specs[0], [])
            if test.requirements not in asked:
                asked.append(test.requirements)
    for tests in groups.values():
        # After a test that may change the model it is loaded again: nobody should be left who needs it.
        tests.sort(key=lambda item: item.stash[WATCHED_TEST].mutates)
    items[:] = _in_order(items, group_of, before)
    _note_order(gate, items)


def _in_order(
    items: Sequence[pytest.Item], group_of: dict[int, list[pytest.Item]], before: Sequence[pytest.Item]
) -> list[pytest.Item]:
    """Each group whole at the place of its first test, and ``before`` in front of the first group."""
    arranged: list[pytest.Item] = []
    taken: set[int] = set()
    for item in items:
        if id(item) in taken:
            continue
        for one in (*before, *group_of[id(item)]) if id(item) in group_of else (item,):
            if id(one) not in taken:
                taken.add(id(one))
                arranged.append(one)
    return arranged


def _note_order(gate: Gate, items: Sequence[pytest.Item]) -> None:
    """Remember which model is used when, and what the tests of this process need."""
    from ..models.residents import uses_of
    from .groups import group_tests

    gate.own.needs = group_tests(items).needs
    order = []
    for position, item in enumerate(items):
        test = item.stash.get(GATED_TEST, None)
        if test is not None:
            item.stash[POSITION] = position
            if test.loads and test.specs:
                order.append((position, test.specs[0]))
    gate.residents.uses = uses_of(order)


class _Places:
    """Where our fixtures go among those of a test; the same for tests of one collector with the same fixtures."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[int, int]] = {}

    def of(self, item: Any) -> tuple[int, int]:
        """Positions of the gate and of the watch."""
        info = item._fixtureinfo
        if any(mark.name in ("usefixtures", "parametrize") for mark in item.own_markers):
            return _after_session_wide_setup(item), _before_own_fixtures(item)
        key = (item.parent, tuple(item.fixturenames), info.argnames, info.initialnames)
        places = self._known.get(key)
        if places is None:
            places = self._known[key] = (_after_session_wide_setup(item), _before_own_fixtures(item))
        return places


def _examine_test(item: pytest.Function, reading: Reading, places: _Places) -> None:
    if reading.watched is None and not reading.is_gated:
        return
    before_all, before_own = places.of(item)
    # A list of its own: pytest shares one between all parameters of a function.
    names = list(item.fixturenames)
    if reading.watched is not None:
        item.stash[WATCHED_TEST] = reading.watched
        names.insert(before_own, _WATCH_FIXTURE)
    if reading.is_gated:
        item.stash[GATED_TEST] = _with_model(item, reading) if reading.loads else reading.test(reading.named)
        names.insert(before_all, _GATE_FIXTURE)
    item.fixturenames = names


def _with_model(item: Any, reading: Reading) -> GatedTest:
    """Give a test its model: that of its parameter, its marker or ``--vlm-model``.

    Raises:
        pytest.Collector.CollectError: It names several, and cannot run with each.
    """
    callspec: Any = getattr(item, "callspec", None)
    is_given = callspec is not None and "vlm" in callspec.params
    parameter = callspec.params["vlm"] if is_given else None
    if not is_given and len(reading.named) == 1:
        spec: VlmSpec | None = reading.named[0]
    else:
        if reading.named and parameter not in reading.named and not _is_parametrized_by_user(item):
            raise _several_models(item, reading)
        spec = gate_of(item.config).spec_from(parameter)
        if spec is not None and spec.min_gpus != reading.requirements.gpus:
            spec = spec.spread_over(reading.requirements.gpus)
    if spec is None:
        return reading.test(())
    if callspec is None:
        item.callspec = reading.callspecs.get(spec) or reading.callspecs.setdefault(spec, _callspec(item, spec))
    else:
        callspec.params["vlm"] = spec
        if not is_given:
            callspec.indices["vlm"], callspec._arg2scope["vlm"] = 0, _scope_of_vlm(item)
    return reading.test((spec,))


def _several_models(item: Any, reading: Reading) -> pytest.Collector.CollectError:
    if getattr(item, "nofuncargs", False):
        return markers.wrong(
            f"{item.nodeid}: @pytest.mark.vlm names {len(reading.named)} models, and tests of a unittest.TestCase run "
            "once: name one, and make a subclass for each other model."
        )
    return markers.wrong(
        f"{item.nodeid}: a marker on a parameter names one model, and none where the test function names its own: this "
        "test would have several."
    )


def _callspec(item: Any, spec: VlmSpec) -> Any:
    """Give a test its model in the way of a parameter: pytest then keeps one loaded at a time.

    pytest itself does this for functions, at the price of a new signature and several copies each, and not at all for
    tests of a unittest.TestCase. What it reads of a parameter afterwards are these few attributes.
    """
    return SimpleNamespace(
        params={"vlm": spec}, indices={"vlm": 0}, _arg2scope={"vlm": _scope_of_vlm(item)}, _idlist=(), marks=[], id=""
    )


def _scope_of_vlm(item: Any) -> Any:
    return item._fixtureinfo.name2fixturedefs["vlm"][0]._scope


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


def _may_name_several(definition: pytest.Function) -> bool:
    """False where no marker can name more than one model; cheap, as it is asked of every test with the fixture."""
    aliases = definition.config.stash.get(ALIASES, {})
    names = 0
    for mark in definition.own_markers:
        if mark.name in aliases:
            return True
        names += len(mark.args) if mark.name == "vlm" else 0
    if names or definition.parent is None:
        return names > 1
    if _SEVERAL not in definition.parent.stash:
        marks = list(definition.parent.iter_markers())
        above = sum(len(mark.args) for mark in marks if mark.name == "vlm")
        definition.parent.stash[_SEVERAL] = above > 1 or any(mark.name in aliases for mark in marks)
    return definition.parent.stash[_SEVERAL]


def _is_parametrized_by_user(definition: pytest.Function) -> bool:
    """True when a ``parametrize`` marker names ``vlm`` itself."""
    for mark in definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs.get("argnames", ())
        if "vlm" in ([name.strip() for name in names.split(",")] if isinstance(names, str) else names):
            return True
    return False
