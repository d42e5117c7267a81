"""Hooks that a conftest or another plugin may implement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.placement import Plan

    from .requirements import Estimate, VlmSpec
    from .results.evidence import RunReport
    from .verdicts import Verdict


@pytest.hookspec(firstresult=True)
def pytest_vlmgpu_inventory(config: pytest.Config) -> Machine | None:
    """Return the machine as it is now, in place of what the doctor reads (a remote one, a made-up one for a test).

    Called each time that free memory matters, in the controller of pytest-xdist too.
    """


@pytest.hookspec(firstresult=True)
def pytest_vlmgpu_verdict(item: pytest.Item, verdict: Verdict) -> Verdict | None:
    """See what was decided about a gated test, before it is set up; return another verdict to replace it.

    ``--vlm-strict`` is applied afterwards. Refusals while a model is loaded (memory taken, weights offloaded) are not
    asked about: there is nothing to run then.
    """


@pytest.hookspec(firstresult=True)
def pytest_vlmgpu_estimate(config: pytest.Config, spec: VlmSpec) -> Estimate | None:
    """Say what a model needs that the planner is not to place, because an engine places it itself.

    The gate then asks for that much free memory, and the loader gets ``plan=None``: implement ``pytest_vlmgpu_load`` or
    override ``vlm_loader`` beside it.
    """


@pytest.hookspec(firstresult=True)
def pytest_vlmgpu_load(config: pytest.Config, spec: VlmSpec, plan: Plan | None, gpus: tuple[Gpu, ...]) -> Any:
    """Load a model in place of the fixture ``vlm_loader`` and return it, or ``None`` to leave it to that fixture.

    For plugins that bring an engine; a project overrides the fixture. ``gpus`` are those the model may use, in CUDA order:
    those of the plan, or without one all that meet the requirements; empty on a CPU run. Failures that are expected are
    raised as ``pytest_vlmgpu.LoadFailure``.
    """


@pytest.hookspec
def pytest_vlmgpu_lease(
    config: pytest.Config, event: Literal["taken", "refused", "given_back"], gpus: tuple[str, ...], reason: str
) -> None:
    """Called when GPUs of this machine were leased, were not to be had, or were given back.

    With pytest-xdist the controller leases, and calls it. ``gpus`` are UUIDs, ``reason`` says with its code why there are
    none. It is not called where no GPU may be used, nor in a process that is killed.
    """


@pytest.hookspec
def pytest_vlmgpu_unload(config: pytest.Config, spec: VlmSpec, loaded: Any) -> None:
    """Called when no test needs a model any more, before it is let go; one that a hook loaded is stopped here."""


@pytest.hookspec
def pytest_vlmgpu_loaded(config: pytest.Config, spec: VlmSpec, loaded: Any) -> None:
    """Called after a model was loaded and checked; ``loaded`` is the value of the fixture ``vlm``."""


@pytest.hookspec
def pytest_vlmgpu_report(config: pytest.Config, report: RunReport, extra: dict[str, Any]) -> None:
    """Called with ``--vlm-report`` when the run has ended, on the controller; put into ``extra`` what the file is to hold.

    ``report`` is a record, for reading. Values in ``extra`` must be such that JSON can hold them.
    """
