"""``vlm_hide_gpu_from_cpu_tests``: a test without a marker or fixture of the plugin sees no GPU, as far as that can be had.

A process reads CUDA_VISIBLE_DEVICES once, when CUDA is started in it. So GPUs can be hidden from a test until then, and
from the processes that it starts at any time; and a test that starts CUDA, or tries to, while they are hidden takes them
from the gated tests that follow in its process: torch and the CUDA runtime remember that there were none (torch 2.11).
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import pytest

from .. import verdicts
from ..state import GATED_TEST, WATCHED_TEST
from ..verdicts import Verdict
from . import masks
from .attempts import Attempts, counted_gpus

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
        """The first test that started CUDA while GPUs were hidden from it, so that this process has none any more."""
        self._suspect = ""
        """The first test that tried, or may have: it need not have taken the GPUs."""
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
            if was_started or self._suspect:  # there is nothing to find out
                return (yield)
            return (yield from self._watch(item.nodeid))
        finally:
            self._show()

    def _watch(self, name: str) -> Generator[None, object, object]:
        """Run a test, and note whether it started CUDA, or tried."""
        was_loaded = masks.is_driver_loaded()
        attempts = Attempts()
        try:
            with attempts:
                return (yield)
        finally:
            if masks.is_cuda_started():
                self._suspect = self.started_by = name
            elif attempts.has_failed or (masks.is_driver_loaded() and not was_loaded):
                self._suspect = name

    def refusal(self) -> Verdict | None:
        """The error for every gated test once another test took the GPUs from this process.

        Where one tried to start CUDA, torch is asked for its GPUs, which starts it: this process' GPUs are settled before.
        """
        if self._suspect and not self.started_by and self._restore is None:
            gpus = counted_gpus()
            if gpus == 0:
                self.started_by = self._suspect
            elif gpus is not None:
                self._suspect = ""
        if not self.started_by:
            return None
        return Verdict(
            "error",
            verdicts.FAULT,
            f"{self.started_by}, which has no marker of the plugin, started CUDA while GPUs were hidden from it "
            "(vlm_hide_gpu_from_cpu_tests), so this process sees none any more: give that test @pytest.mark.vlm_requires, "
            "run with pytest-xdist and one worker more than there are GPUs, or leave the option away. (The first "
            ".backward() of a process starts CUDA, on the CPU too.)",
        )

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
            "vlmgpu: vlm_hide_gpu_from_cpu_tests: CUDA was started in this process before this test, so this and later "
            "ones without a marker of the plugin can use its GPUs, whatever torch.cuda.is_available() tells them; with "
            "pytest-xdist and one worker more than GPUs they cannot."
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
