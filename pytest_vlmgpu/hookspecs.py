"""Hooks that a conftest or another plugin may implement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vlm_doctor.machine import Machine

    from .requirements import VlmSpec
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


@pytest.hookspec
def pytest_vlmgpu_loaded(config: pytest.Config, spec: VlmSpec, loaded: Any) -> None:
    """Called after a model was loaded and checked; ``loaded`` is the value of the fixture ``vlm``."""
