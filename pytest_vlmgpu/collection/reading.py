"""What the markers and fixtures of a collected test ask for. Equal tests of a module or class are read once.

Suites of thousands of tests carry the same few markers, and collection is what everybody waits for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import markers
from ..concern import GATED_FIXTURES, may_be_gated
from ..requirements import GatedTest, Requirements, WatchedTest
from ..state import gate_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from ..concern import Ours
    from ..requirements import VlmSpec

FIXTURES_MODULE = "pytest_vlmgpu.fixtures"
GATE_FIXTURE = "_vlm_gate"
WATCH_FIXTURE = "_vlm_watch"
_RUN_TIME = frozenset({"vlm_factory", "vlm_device"})
"""Fixtures that ask for GPUs when they are used."""
_TAKES_ALL = frozenset({"vlm_gpus", "vlm_factory"})
"""Fixtures whose tests may use every GPU of the run; which models the latter loads is not known before it runs."""


class Examined(NamedTuple):
    """What one test asks for; the same object for all tests of a collector that ask for the same."""

    marks: int
    """Markers of the test's own that were read: a hook may add others later."""
    gated: GatedTest | None = None
    watched: WatchedTest | None = None
    model: VlmSpec | None = None
    """What it loads."""
    callspec: Any = None
    """What pytest reads of a parameter, for a test that names a model and has no parameters."""

    @property
    def mutates(self) -> bool:
        """True when it may change the model."""
        return self.watched is not None and self.watched.mutates

    @property
    def runs_before_loads(self) -> bool:
        """True when it needs free memory and loads nothing: it runs before the first model takes it."""
        test = self.gated
        return test is not None and not test.loads and bool(test.requirements.needs_memory or test.specs)


class Examinations(NamedTuple):
    """What was found of all tests that were examined."""

    items: list[Any]
    """Kept, so that no other object gets an identity of theirs."""
    of: dict[int, Examined]
    """Identity of an item to what it asks for: a look into its stash takes ten times as long."""


class Reading:
    """What markers and fixtures say, without the parameters of a test."""

    def __init__(self, item: pytest.Function, used: frozenset[str], marks: int) -> None:
        limit_bytes, mutates = markers.read_limit(item, item.nodeid), markers.may_mutate(item, item.nodeid)
        requirements = markers.read_requirements(item, item.nodeid)
        self._marks = marks
        self.loads = "vlm" in used
        uses_factory = not _RUN_TIME.isdisjoint(used)
        is_metered = limit_bytes is not None or "vlm_vram" in used
        is_ours = bool(used or requirements or is_metered or mutates)
        markers.refuse_unknown(item, is_surely_meant=is_ours)
        # A project may have had a marker or a fixture vlm before this plugin was installed: its tests run as they did.
        is_theirs = not is_ours and ("vlm" in item.fixturenames or "vlm" in markers.registered(item.config))
        self.named: tuple[VlmSpec, ...] = () if is_theirs else markers.read_models(item, item.nodeid)
        self.requirements = Requirements.strictest(requirements)
        self._wants_gpus = bool(requirements) or "vlm_gpus" in used
        self._takes_all = not _TAKES_ALL.isdisjoint(used)
        self.is_gated = bool(self._wants_gpus or self.named or self.loads or uses_factory)
        self.watched: WatchedTest | None = None
        if self.loads or uses_factory or is_metered:
            self.watched = WatchedTest(self.loads, mutates, limit_bytes, self.requirements.vram_bytes)
        self.known: dict[VlmSpec | None, Examined] = {}
        """What tests with each model ask for."""

    def examined(self, item: Any) -> Examined:
        """The record of a test.

        Raises:
            pytest.Collector.CollectError: It names several models, and cannot run with each.
        """
        model = self._model_of(item) if self.loads else None
        known = self.known.get(model)
        if known is None:
            known = self.known[model] = self._examine(item, model)
        return known

    def _examine(self, item: Any, model: VlmSpec | None) -> Examined:
        if not self.is_gated:
            return Examined(self._marks, None, self.watched)
        specs = self.named
        if self.loads:
            specs = () if model is None else (model,)
        test = GatedTest(specs, self.requirements, self._wants_gpus, self.loads, self._takes_all)
        # Also one that loads nothing may ask for its model at run time (request.getfixturevalue): nobody can know before.
        given = _callspec(item, specs[0] if len(specs) == 1 else specs) if specs else None
        return Examined(self._marks, test, self.watched, model, given)

    def _model_of(self, item: Any) -> VlmSpec | None:
        """The model of a test: that of its parameter, its marker or ``--vlm-model``."""
        callspec: Any = getattr(item, "callspec", None)
        is_given = callspec is not None and "vlm" in callspec.params
        parameter = callspec.params["vlm"] if is_given else None
        if not is_given and len(self.named) == 1:
            return self.named[0]
        spec = gate_of(item.config).spec_from(parameter)
        if spec is not None and spec.min_gpus != self.requirements.gpus:
            spec = spec.spread_over(self.requirements.gpus)
        is_one_of_them = spec in self.named and getattr(callspec, "models", 0) == len(self.named)
        if self.named and not is_one_of_them and not is_parametrized_by_user(item):
            raise self._several_models(item)
        return spec

    def _several_models(self, item: Any) -> pytest.Collector.CollectError:
        if getattr(item, "nofuncargs", False):
            return markers.wrong(
                f"{item.nodeid}: @pytest.mark.vlm names {len(self.named)} models, and tests of a unittest.TestCase run "
                "once: name one, and make a subclass for each other model."
            )
        if not hasattr(item, "callspec") or hasattr(item.callspec, "models"):
            return markers.wrong(
                f"{item.nodeid}: @pytest.mark.vlm names {len(self.named)} models, and a hook that adds it to a "
                "collected test can name one: write it in the module, or as pytestmark."
            )
        return markers.wrong(
            f"{item.nodeid}: a marker on a parameter names one model, and none where the test function names its own: this "
            "test would have several."
        )


class Entry(NamedTuple):
    """What is the same for all tests of a collector with the same markers and fixtures."""

    reading: Reading
    fixturenames: list[str] | None
    """Those of the test with ours among them, to be copied; ``None`` where the test is none of ours."""
    examined: Examined | None
    """``None`` where it depends on the test's parameters."""
    has_parameters: bool


class _Tree(dict[Any, Any]):
    """What tests say, one step a word: who says the same ends in the same place, where ``None`` leads to the entry."""

    def __missing__(self, word: object) -> _Tree:
        branch = self[word] = _Tree()
        return branch


class Readings:
    """The readings of the tests of one collector.

    Args:
        ours: Tells which markers are to be read.
    """

    def __init__(self, ours: Ours) -> None:
        self._ours = ours
        # Identities among the words live as long as the collector's tests, and these longer than this object.
        self._tree = _Tree()
        self._readings: dict[tuple[Any, ...], Reading] = {}
        self._parent: object = None
        self._argnames: tuple[str, ...] = ()
        self._names: list[str] = []
        """Where the last test was, what it takes, and what that needs."""
        self._branch = self._tree
        """Of all tests for which these are the same."""

    def of(self, item: Any) -> Entry | None:
        """Read what a test asks for, or remember; ``None`` for a test that is no concern of ours.

        Raises:
            pytest.Collector.CollectError: A marker is wrong.
        """
        # Written for speed: this is done for each test, and most say what others say.
        info = item._fixtureinfo
        if (
            item.fixturenames != self._names
            or info.argnames != self._argnames
            or item.parent is not self._parent
            or hasattr(item, "callspec")  # its __dict__ would be a new object for whoever asks for it
        ):
            self._turn_to(item)
        place = self._branch
        ours = self._ours
        for mark in item.own_markers:
            name = mark.name
            if ours[name]:
                # Equal values would not do, as True equals 1. Of one file, equal constants are the same.
                place = place[name]
                for value in mark.args:
                    place = place[id(value)]
                kwargs = mark.kwargs
                for keyword in kwargs:
                    place = place[keyword][id(kwargs[keyword])]
            elif name == "usefixtures":
                place = place[id(info)]
        if None not in place:
            place[None] = self._read(item) if may_be_gated(item, ours) else None
        entry: Entry | None = place[None]
        return entry

    def _turn_to(self, item: Any) -> None:
        """Look up the branch of a test whose place or fixtures are not those of the test before."""
        info = item._fixtureinfo
        self._names, self._argnames = item.fixturenames.copy(), info.argnames
        # What fixtures with parameters are is a matter of each function.
        has_parameters = hasattr(item, "callspec")
        self._parent = None if has_parameters else item.parent
        words = (id(item.parent), info.argnames, *self._names, id(info) if has_parameters else None)
        self._branch = self._tree[words]

    def _said(self, item: Any) -> tuple[Any, ...]:
        """What our markers of a test say, equal for all tests of which they say the same."""
        key: list[Any] = [id(item.parent)]
        try:
            for mark in item.own_markers:
                if self._ours[mark.name]:
                    key += mark.name, repr(mark.args), repr(mark.kwargs)
        except Exception:  # noqa: BLE001 - an argument of the project's that cannot be shown is wrong in each of our markers
            return (id(item),)
        return tuple(key)

    @property
    def examined(self) -> list[Examined]:
        """What was found, each once."""
        return [examined for reading in self._readings.values() for examined in reading.known.values()]

    def _read(self, item: Any) -> Entry:
        said = self._said(item)
        names = item.fixturenames
        near = GATED_FIXTURES.intersection(names)
        used = frozenset(name for name in near if uses(item, names, name))
        key = (said, used, "vlm" in near)
        reading = self._readings.get(key)
        if reading is None:
            reading = self._readings[key] = Reading(item, used, len(said) // 3)
        own = reading.watched is not None or reading.is_gated
        has_parameters = hasattr(item, "callspec")
        return Entry(
            reading,
            _with_ours(item, reading) if own else None,
            None if reading.loads and (has_parameters or len(reading.named) > 1) else reading.examined(item),
            has_parameters,
        )


def uses(definition: Any, fixturenames: Sequence[str], name: str) -> bool:
    """True when a test reaches our fixture of that name, and not only one of the project's own with the same name."""
    if name not in fixturenames:
        return False
    for fixture in reversed(definition._fixtureinfo.name2fixturedefs.get(name, ())):
        if fixture.func.__module__ == FIXTURES_MODULE:
            return True
        if name not in fixture.argnames:
            return False
    return False


def is_parametrized_by_user(definition: pytest.Function) -> bool:
    """True when a ``parametrize`` marker names ``vlm`` itself."""
    for mark in definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs.get("argnames", ())
        if "vlm" in ([name.strip() for name in names.split(",")] if isinstance(names, str) else names):
            return True
    return False


def scope_of_vlm(item: Any) -> Any:
    """In pytest's own terms."""
    definitions = item._fixtureinfo.name2fixturedefs.get("vlm") or item.session._fixturemanager.getfixturedefs("vlm", item)
    return definitions[0]._scope


def _callspec(item: Any, spec: VlmSpec | tuple[VlmSpec, ...]) -> Any:
    """Give a test its model in the way of a parameter: pytest then keeps one loaded at a time.

    pytest itself does this for functions, at the price of a new signature and several copies each, and not at all for
    tests of a unittest.TestCase. What it reads of a parameter afterwards are these few attributes.
    """
    return SimpleNamespace(
        params={"vlm": spec}, indices={"vlm": 0}, _arg2scope={"vlm": scope_of_vlm(item)}, _idlist=(), marks=[], id=""
    )


def _with_ours(item: Any, reading: Reading) -> list[str]:
    names = list(item.fixturenames)
    before_all = _after_session_wide_setup(item)
    if reading.watched is not None:
        names.insert(_before_own_fixtures(item), WATCH_FIXTURE)
    if reading.is_gated:
        names.insert(before_all, GATE_FIXTURE)
    return names


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
