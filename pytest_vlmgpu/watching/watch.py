"""What is done around each test that uses a shared model: seed, measure, hold the model to what it was.

The model is looked at after all wider fixtures were set up and again when the test's own are torn down. What differs was
done by this test, so this test fails, and the model is put right before the next one.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from ..output import keep_output
from ..state import FAILURE, GATED_TEST, WATCH, WATCHED_TEST, gate_of
from ..verdicts import FAULT, LEFT_BY_TEST, MUTATED
from . import fingerprint, memory_report, vram
from .meter import Meter, allocated_bytes
from .properties import NOTE

if TYPE_CHECKING:
    from collections.abc import Generator

    from ..gating.gate import Gate
    from ..options import Level
    from .fingerprint import Fingerprint

_FIXTURES_MODULE = "pytest_vlmgpu.fixtures"
_NAME = "vlmgpu-watch"


class Failure(NamedTuple):
    """What a test raised."""

    error: BaseException | None
    """``None`` once it was looked at: nothing is to refer to its frames."""
    is_memory_short: bool


@dataclass
class _Guarded:
    """The model that tests share right now, and what it is to look like."""

    model: weakref.ref[Any]
    looks: Fingerprint


class Watch:
    """One a run, registered as a plugin when the first watched test was collected."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._guarded: _Guarded | None = None
        self._is_stale = True
        """True when something wider than a test may have changed the model since it was looked at."""
        self.meter = Meter()
        self._allocated: dict[int, int] = {}
        self._blame = ""
        """What the running test was failed with by :meth:`end`."""
        self._random: list[tuple[Any, Any]] = []

    def begin(self, request: pytest.FixtureRequest) -> None:
        """Start watching, after all wider fixtures were set up and before the first of the test's own."""
        loaded = _shared_value(request.node)
        if loaded is not None:
            self._look(loaded, request.node)
            self._seed(loaded)
        self._allocated = allocated_bytes()
        self.meter.start()

    def end(self, request: pytest.FixtureRequest) -> None:
        """Judge what the test did, after the last of its own fixtures was torn down.

        Raises:
            pytest.fail.Exception: It changed the model, or left memory behind.
        """
        item = request.node
        self.meter.stop()
        self._unseed()
        # First: of a model that is gone no weight is to be read.
        problems = self._judge_warmth(request)
        if not problems and not item.stash[WATCHED_TEST].mutates:
            problems = self._judge_model(request)
        if item.stash[WATCHED_TEST].mutates:
            self._reload(request)
        problems += self._judge_memory(item)
        # A test that failed already did not reach the line that undoes it: one failure tells enough.
        is_told = FAILURE in item.stash
        errors = [text for level, text in problems if level == "error" and not is_told]
        item.user_properties += [(NOTE, text) for _, text in problems if text not in errors]
        self._blame = "\n".join(errors)
        if errors:
            pytest.fail(self._blame, pytrace=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note the peaks of a watched test, and fail one that took more than it may."""
        if WATCHED_TEST not in item.stash:
            return (yield)
        try:
            result = yield
        except BaseException:
            vram.note(item, self.meter)
            raise
        vram.note(item, self.meter)
        vram.hold_to_limit(item, self.meter)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note that a watched test failed; where it ran out of memory, say how that came about."""
        report = yield
        if WATCHED_TEST not in item.stash or call.excinfo is None or call.excinfo.errisinstance(pytest.skip.Exception):
            return report
        if call.when == "teardown" and self._blame and report.outcome != "failed":
            # pytest takes any failure of an xfail test as the expected one; this one concerns the tests that follow.
            report.outcome, report.longrepr = "failed", self._blame
            vars(report).pop("wasxfail", None)
        self._blame = ""
        error = call.excinfo.value
        is_memory_short = memory_report.explain(
            report,
            error,
            _shared_value(item),
            self._gate.latest_machine,
            is_verbose=item.config.get_verbosity() > 0,
        )
        item.stash[FAILURE] = Failure(error, is_memory_short)
        if call.when == "teardown":
            self._forget(item)
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Begin anew where a test is run again."""
        if FAILURE in item.stash:
            del item.stash[FAILURE]
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Have nothing of a failed test kept in memory by its traceback; a debugger has looked at it by now."""
        self._forget(item)
        return (yield)

    @staticmethod
    def _forget(item: pytest.Item) -> None:
        if FAILURE in item.stash:
            failure = item.stash[FAILURE]
            if failure.error is not None:
                memory_report.clear_frames(failure.error, is_memory_short=failure.is_memory_short)
            item.stash[FAILURE] = failure._replace(error=None)

    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """What a wider fixture does to a model, it does for all tests of its scope."""
        self._is_stale = self._is_stale or fixturedef.scope != "function"

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """What it undoes, too."""
        self._is_stale = self._is_stale or fixturedef.scope != "function"

    def _look(self, loaded: Any, item: pytest.Item) -> None:
        if self._gate.settings.mutation == "off" or item.stash[WATCHED_TEST].mutates:
            return
        model = getattr(loaded, "model", loaded)
        guarded = self._guarded
        if guarded is not None and not self._is_stale and guarded.model() is model:
            return
        problem = ""
        try:
            looks = fingerprint.take(model, getattr(loaded, "processor", None))
        except RuntimeError as error:
            problem = _gpu_failed(error, "before this test")
        if problem:
            # Not inside the handler: the report is one sentence, without the chain of errors behind it.
            pytest.fail(problem, pytrace=False)
        self._guarded = _Guarded(weakref.ref(model), looks) if looks is not None else None
        self._is_stale = False

    def _judge_model(self, request: pytest.FixtureRequest) -> list[tuple[Level, str]]:
        guarded, loaded = self._guarded, _shared_value(request.node)
        if guarded is None or loaded is None or self._gate.settings.mutation == "off":
            return []
        model = getattr(loaded, "model", loaded)
        processor = getattr(loaded, "processor", None)
        name = _model_name(request.node)
        if model is not guarded.model():
            self._reload(request)
            return [(self._gate.settings.mutation, _mutated(name, "another model in its place", is_restored=False))]
        try:
            looks = fingerprint.take(model, processor)
            found = fingerprint.changes(guarded.looks, looks) if looks is not None else None
            if found is None or not found.texts:
                return []
            is_restored = found.is_restorable
            if is_restored:
                fingerprint.restore(model, processor, guarded.looks)
                again = fingerprint.take(model, processor)
                is_restored = again is not None and not fingerprint.changes(guarded.looks, again).texts
        except RuntimeError as error:
            self._guarded = None
            return [("error", _gpu_failed(error, "in this test"))]
        if not is_restored:
            del model
            self._reload(request)
        return [(self._gate.settings.mutation, _mutated(name, "; ".join(found.texts), is_restored=is_restored))]

    def _judge_warmth(self, request: pytest.FixtureRequest) -> list[tuple[Level, str]]:
        """A model on GPUs that was attached to goes with the process that keeps it."""
        warm: Any = getattr(_shared_value(request.node), "warm", None)
        if not getattr(warm, "is_lost", False):
            return []
        self._reload(request)
        return [
            (
                "error",
                f"{FAULT}: the warm host of {_model_name(request.node)} ended while the test ran, and the model's "
                f"memory with it. It is loaded again for the tests that follow; the host's log is {warm.log}.",
            )
        ]

    def _reload(self, request: pytest.FixtureRequest) -> None:
        """Let the model go, as pytest does between two models: the next test that needs it loads it again."""
        self._guarded = None
        fixture = _shared_fixture(request.node)
        if fixture is not None:
            fixture.finish(request)
            for spec in request.node.stash[GATED_TEST].specs:
                self._gate.let_go(spec)

    def _judge_memory(self, item: pytest.Item) -> list[tuple[Level, str]]:
        """Memory of tensors that is taken now and was not before the test; it is collected first where there is much."""
        level = self._gate.settings.leak_check
        if level == "off" or item.stash[WATCHED_TEST].mutates:
            return []
        tolerance = self._gate.settings.leak_tolerance
        left = vram.grown(self._allocated, tolerance)
        if left:
            vram.collect()
            left = vram.grown(self._allocated, tolerance)
        if not left:
            return []
        who = vram.who_holds(left)
        what = f"{item.name} left {vram.on_gpus(left)} taken{who}"
        text = f"{LEFT_BY_TEST}: {what}: delete it in the test, or when its fixture ends."
        return [(level, text)]

    def _seed(self, loaded: Any) -> None:
        """Give torch the same random numbers in each test, and remember its own."""
        seed = self._gate.settings.seed
        torch: Any = fingerprint.torch_of(getattr(loaded, "model", loaded))
        if seed is None or torch is None:
            return
        generators = [torch.default_generator]
        if torch.cuda.is_initialized():
            generators += torch.cuda.default_generators
        self._random = [(generator, generator.get_state()) for generator in generators]
        for generator in generators:
            generator.manual_seed(seed)

    def _unseed(self) -> None:
        for generator, state in self._random:
            generator.set_state(state)
        self._random = []


def register(config: pytest.Config) -> None:
    """Have the tests of this run watched."""
    if not config.pluginmanager.has_plugin(_NAME):
        config.stash[WATCH] = Watch(gate_of(config))
        config.pluginmanager.register(config.stash[WATCH], _NAME)
        keep_output(config)


def _shared_fixture(item: Any) -> Any:
    """Our fixture ``vlm`` behind a test, also where the project overrides it with one that uses it; else ``None``."""
    if not item.stash[WATCHED_TEST].loads:
        return None
    definitions = item._fixtureinfo.name2fixturedefs.get("vlm", ())
    return next((fixture for fixture in definitions if fixture.func.__module__ == _FIXTURES_MODULE), None)


def _shared_value(item: pytest.Item) -> Any:
    """The value of that fixture, if it is set up."""
    fixture = _shared_fixture(item)
    result = fixture.cached_result if fixture is not None else None
    return result[0] if result is not None and result[2] is None else None


def _model_name(item: pytest.Item) -> str:
    specs = item.stash[GATED_TEST].specs if GATED_TEST in item.stash else ()
    return specs[0].label if specs else "the model"


def _mutated(name: str, what: str, *, is_restored: bool) -> str:
    after = "It was put right" if is_restored else "It is loaded again"
    return (
        f"{MUTATED}: this test changed {name}, which other tests share, and left it so: {what}. {after} for the tests that "
        "follow: undo the change in the test or its fixture, or mark the test @pytest.mark.vlm_mutates."
    )


def _gpu_failed(error: RuntimeError, when: str) -> str:
    detail = next(iter(str(error).splitlines()), "")
    return (
        f"{FAULT}: the GPU stopped answering {when} ({type(error).__name__}: {detail}): every later test in this "
        "process fails with it; look at the first one that failed, and for Xid messages with dmesg."
    )
