"""A worker of pytest-xdist: what its tests need goes up to the controller, which GPUs it has comes down.

Both travel as files in the run's own temporary folder, since the protocol of pytest-xdist has no room for them. Nothing is
written before a gated test was collected.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..collection.groups import group_tests
from ..leasing.shares import Share
from ..state import WORKER_INPUT, gate_of
from .lifetime import end_with

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence


class Worker:
    """Applies a worker's share before its first test; registered when gated tests were collected."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._is_done = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """Show CUDA this worker's GPUs alone, before any test, gated or not, can start it, and before they are hidden."""
        if not self._is_done:
            self._is_done = True
            share = share_of_worker(self._config)
            if share is not None:
                gate_of(self._config).own.accept(share)
        return (yield)


def hand_in(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Write down what the tests of a worker need, where the controller looks."""
    told = getattr(config, "workerinput", {}).get(WORKER_INPUT)
    if told is None:
        return
    name = f"needs-{getattr(config, 'workerinput', {}).get('workerid', os.getpid())}.json"
    try:
        write(Path(told["folder"]) / name, group_tests(items).to_json())
    except OSError as error:
        warn(f"{told['folder']} cannot be written ({error.strerror}), so this worker leases GPUs for itself")
    end_with(told["controller"])
    config.pluginmanager.register(Worker(config), "vlmgpu-worker")


def share_of_worker(config: pytest.Config) -> Share | None:
    """What the controller gave this worker; ``None`` when it gave nothing, or this is no worker."""
    told = getattr(config, "workerinput", {}).get(WORKER_INPUT)
    if told is None:
        return None
    try:
        text = (Path(told["folder"]) / f"share-{told['slot']}.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return Share.from_json(json.loads(text))


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def warn(sentence: str) -> None:
    """Say that workers have to do without the controller."""
    warnings.warn(pytest.PytestWarning(f"vlmgpu: {sentence}: a model may be loaded by several workers."), stacklevel=2)
