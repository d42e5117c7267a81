"""Entry point of the pytest plugin: hooks only. Nothing here imports the doctor, torch or NVML."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from . import collecting, fixtures, markers, options, reporting
from .state import SETTINGS, gate_of

if TYPE_CHECKING:
    from collections.abc import Generator


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare options and ini keys."""
    options.add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks that others may implement."""
    from . import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the settings; register fixtures, markers and, where reports arrive, the summary."""
    config.stash[SETTINGS] = options.resolve(config)
    if config.stash[SETTINGS].machine != "live":
        gate_of(config)  # a machine that cannot be read ends the run here
    config.pluginmanager.register(fixtures, "vlmgpu-fixtures")
    for line in markers.describe():
        config.addinivalue_line("markers", line)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(reporting.Summary(config), "vlmgpu-summary")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make the models a test names a session-wide parameter: pytest then keeps one loaded at a time."""
    collecting.parametrize(metafunc)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Read what each collected test asks for; a wrong marker makes the collection of its module fail."""
    report = yield
    collecting.examine(report)
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put tests that share a model next to each other."""
    collecting.arrange(config, items)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the settings that were given."""
    return reporting.header(config.stash[SETTINGS])


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    """Count gated tests and models."""
    return reporting.collected(config, items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach properties to the report of a gated test, and put a skip at the test's own line."""
    reporting.attach(item, call)
    report = yield
    reporting.correct(item, report)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker loaded to the controller."""
    reporting.hand_over(session.config)
