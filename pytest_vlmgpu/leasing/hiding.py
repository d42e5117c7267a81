"""``vlm_hide_gpu_from_cpu_tests``: a test without a marker or fixture of the plugin sees no GPU, as far as that can be had.

A process reads CUDA_VISIBLE_DEVICES once, when CUDA is started in it. So GPUs can be hidden from a test until then, and
from the processes that it starts at any time; and a test that starts CUDA while they are hidden takes them from the gated
tests that follow in its process.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import pytest

from ..state import GATED_TEST, WATCHED_TEST
from . import masks

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextlib import AbstractContextManager

NAME = "vlmgpu-hider"
"""Under which it is registered."""
_HIDDEN = {masks.VARIABLE: "-1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""No GPU; not "", which some libraries take for unset. And torch's ``is_available`` asks NVML, which starts no CUDA."""
_OUR_FIXTURES = "vlm"
"""What the names of the plugin's fixtures begin with."""


class Hider:
    """Hides GPUs from each test that is none of ours, while it runs."""

    def __init__(self) -> None:
        self.started_by = ""
        """The first test that started CUDA while GPUs were hidden from it."""
        self.has_hidden = False
        """True once GPUs were hidden from a test."""
        self._restore: Callable[[], None] | None = None
        self._has_warned = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Hide them from before the first fixture of a test to after its last one."""
        if _is_ours(item):
            return (yield)
        was_started = masks.is_cuda_started()
        if was_started and not self._has_warned:
            self._warn(item)
        self._hide()
        self.has_hidden = True
        try:
            return (yield)
        finally:
            self._show()
            if not was_started and not self.started_by and masks.is_cuda_started():
                self.started_by = item.nodeid

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Show the GPUs to the plugin itself, whoever asks it."""
        if self._restore is None:
            yield
            return
        self._show()
        try:
            yield
        finally:
            self._hide()

    def _hide(self) -> None:
        self._restore = masks.apply(_HIDDEN)

    def _show(self) -> None:
        if self._restore is not None:
            self._restore()
        self._restore = None

    def _warn(self, item: pytest.Item) -> None:
        self._has_warned = True
        text = (
            "vlmgpu: vlm_hide_gpu_from_cpu_tests: CUDA was started in this process before this test, so it and later ones "
            "without a marker of the plugin see GPUs; with pytest-xdist and one worker more than GPUs they do not."
        )
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # with -W error it would end the run
            warnings.warn_explicit(pytest.PytestWarning(text), None, str(item.path), (item.location[1] or 0) + 1)


def lifted(config: pytest.Config) -> AbstractContextManager[None]:
    """Show the GPUs to the plugin itself, whoever asks it."""
    hider = hider_of(config)
    return nullcontext() if hider is None else hider.lifted()


def hider_of(config: pytest.Config) -> Hider | None:
    """The hider of a run; ``None`` where nothing is to be hidden."""
    hider: Hider | None = config.pluginmanager.get_plugin(NAME)
    return hider


def _is_ours(item: pytest.Item) -> bool:
    if GATED_TEST in item.stash or WATCHED_TEST in item.stash:
        return True
    return any(name.startswith(_OUR_FIXTURES) for name in getattr(item, "fixturenames", ()))
