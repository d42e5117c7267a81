"""Entry point of the pytest plugin: hooks only.

A run without gated tests imports nothing beyond what is imported here: each hook asks first whether it is concerned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from . import concern, declare, fixtures
from .state import ALIASES, ASKED, CONTROLLER, OURS, SETTINGS, WORKER_INPUT, gate_of

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from .collection.aliases import Alias
    from .collection.reading import Examined
    from .results.summary import Summary

_SUMMARY = "vlmgpu-summary"


def __dir__() -> list[str]:
    """Hooks alone: pytest looks at everything that a plugin lists, twice, whether it is a hook or a fixture."""
    return [name for name in globals() if name.startswith("pytest_")]


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare options and ini keys."""
    declare.add_options(parser, declare.words_given(pluginmanager.get_plugin("pytestconfig")))


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks that others may implement."""
    from . import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the settings; register fixtures and markers."""
    if declare.is_anything_given(config):
        from .options import resolve

        config.stash[SETTINGS] = resolve(config)
        settings = config.stash[SETTINGS]
        told = getattr(config, "workerinput", {}).get(WORKER_INPUT)
        if told is not None:
            from .workers.lifetime import end_with

            end_with(told["controller"])
        if settings.hide_gpu_from_cpu_tests:
            from .leasing import hiding

            config.pluginmanager.register(hiding.Hider(), hiding.NAME)
        if settings.machine != "live" or settings.fake_gpus:
            gate_of(config)  # a machine that cannot be read ends the run here
        if settings.plan:
            config.option.collectonly = True  # until the session starts: pytest-xdist then starts no workers
        if (settings.is_anything_expected or settings.report or settings.plan) and not hasattr(config, "workerinput"):
            _add_summary(config)
    found: dict[str, Alias] = {}
    if config.getini(declare.ALIASES):
        from .collection import aliases

        config.stash[ALIASES] = found = aliases.read_aliases(config)
        for alias in found.values():
            config.addinivalue_line("markers", f"{alias.name}{alias.signature}: stands for {alias.target} of pytest-vlmgpu")
    config.stash[OURS] = concern.Ours(found)
    config.pluginmanager.register(fixtures, "vlmgpu-fixtures")
    for line in declare.MARKERS:
        config.addinivalue_line("markers", line)


@pytest.hookimpl(optionalhook=True, tryfirst=True)  # pytest-xdist's own always answers, and only the first answer counts
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Make ``-n auto`` one worker a GPU where ``--vlm-gpus`` was given; else the choice is pytest-xdist's."""
    if not declare.is_anything_given(config):
        return None
    from .workers.controller import auto_workers

    return auto_workers(config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[Any]) -> None:
    """The controller of pytest-xdist collects nothing: it leases GPUs, and the reports of its workers arrive here."""
    from .workers.controller import start_controller

    start_controller(config, specs)
    _add_summary(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker which one it is."""
    node.config.stash[CONTROLLER].configure(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each model one worker."""
    from .workers.scheduling import make

    return make(config, log)


@pytest.hookimpl(wrapper=True, trylast=True)  # who else looks at these tests, to pick some by their ids, say, comes behind
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Read what each collected test asks for; a wrong marker makes the collection of its module fail."""
    report = yield
    tests = [item for item in report.result or () if isinstance(item, pytest.Function)]
    if tests and concern.any_may_be_gated(collector, tests, collector.config.stash[OURS]):
        from .collection import collecting

        collecting.examine(report, tests)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put tests that share a model next to each other, for those who pick tests by the order in which they run."""
    if ASKED in config.stash:
        from .collection import ordering

        ordering.arrange(config, items)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Settle what each test asks for and the order, now that every hook of the project has had its say.

    The controller of pytest-xdist learns what the tests of this worker need before it sends any.
    """
    config = session.config
    if ASKED not in config.stash and not concern.are_marked(session.items, config.stash[OURS]):
        return
    from .collection import collecting, ordering, rules

    requests = ordering.requests_of(config, session.items)
    if collecting.examine_again(session, requests):
        requests = ordering.requests_of(config, session.items)
    requests = rules.told_apart(session, session.items, requests)
    ordering.arrange(config, session.items, requests)
    collecting.settle(config, requests)
    if config.option.collectonly:
        return
    try:
        _prepare(session, requests)
    except pytest.UsageError as error:
        if not hasattr(config, "workerinput"):
            raise
        collecting.refuse(session, str(error))


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the settings that were given, and where; nothing when none was."""
    given = config.stash[SETTINGS].given if SETTINGS in config.stash else ()
    if not given:
        return None
    from .workers.controller import remarks

    return f"vlmgpu: {'; '.join([', '.join(given), *remarks(config)])}"


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """Count gated tests and models."""
    if ASKED not in config.stash and SETTINGS not in config.stash:
        return None
    from .results import reporting

    return reporting.collected(config, items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run nothing where only a plan was asked for; collection errors end the run as always."""
    summary: Summary | None = session.config.pluginmanager.get_plugin(_SUMMARY)
    if summary is None or not summary.is_plan or session.testsfailed:
        return None
    summary.plan(session)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker loaded to the controller."""
    if hasattr(session.config, "workeroutput"):
        from .results import reporting

        reporting.hand_over(session)


def _prepare(session: pytest.Session, requests: Sequence[Examined | None]) -> None:
    """Register what gated and watched tests need while they run: nothing that only lists tests has to import it."""
    config = session.config
    asked = {id(examined): examined for examined in requests if examined is not None}.values()
    from .collection import collecting, ordering

    collecting.give_requests(session.items, requests)
    if any(examined.watched for examined in asked):
        from .watching import watch

        watch.register(config)
    if not any(examined.gated for examined in asked):
        return
    from .results import reporting

    collecting.give_models(session.items, requests)
    ordering.note(config, session.items, requests)
    reporting.register(config)
    if hasattr(config, "workerinput"):
        from .workers.worker import hand_in

        hand_in(config, session.items)
    elif not config.pluginmanager.has_plugin(_SUMMARY):
        # pytest has begun to call this hook already, and calls nobody who came since.
        _add_summary(config).pytest_collection_finish(session)


def _add_summary(config: pytest.Config) -> Summary:
    summary: Summary | None = config.pluginmanager.get_plugin(_SUMMARY)
    if summary is None:
        from .results.summary import Summary
        from .watching.memory_summary import MemorySummary

        summary = Summary(config)
        config.pluginmanager.register(summary, _SUMMARY)
        config.pluginmanager.register(MemorySummary(config), "vlmgpu-memory")
    return summary
