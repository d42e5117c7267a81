"""What a project's own fixtures and hooks give in the place of the plugin's: as it has to be, or one sentence."""

from __future__ import annotations

import reprlib
import traceback
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from .requirements import Estimate, VlmSpec

if TYPE_CHECKING:
    import pytest


def check_value(value: object, kind: type | tuple[type, ...], *, origin: str, wanted: str) -> None:
    """Refuse a value that a fixture or a hook cannot mean.

    Args:
        value: Of the fixture, or what the function that it gave has returned.
        kind: What it has to be.
        origin: Whose it is: ``fixture vlm_policy``, ``hook pytest_vlmgpu_verdict``.
        wanted: What it has to give: ``a vlm_doctor.Policy``.

    Raises:
        UsageError: It is something else.
    """
    if not isinstance(value, kind):
        from vlm_doctor.errors import UsageError

        raise UsageError(f"the {origin} gives {reprlib.repr(value)}; let it give {wanted}.")


def check_function(value: Any, *, origin: str, arguments: str) -> None:
    """Refuse a fixture whose value has to be a function and is none.

    Raises:
        UsageError: It cannot be called.
    """
    if not callable(value):
        from vlm_doctor.errors import UsageError

        wanted = f"a function of ({arguments})"
        raise UsageError(f"the {origin} gives {reprlib.repr(value)}; let it give {wanted}.")


def estimate_of(config: pytest.Config, spec: VlmSpec) -> Estimate | None:
    """What an engine that places a model itself says that it needs (``pytest_vlmgpu_estimate``); ``None`` for the others.

    Raises:
        UsageError: The hook gives something else, or fails.
    """
    try:
        estimate = config.hook.pytest_vlmgpu_estimate(config=config, spec=spec)
    except Exception as error:
        # Tests are still being put in order: pytest would take it for an error of its own.
        from vlm_doctor.errors import UsageError

        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        raise UsageError(f"the hook pytest_vlmgpu_estimate fails for {spec.name}: {what}; correct it.") from error
    check_value(estimate, (Estimate, NoneType), origin="hook pytest_vlmgpu_estimate", wanted="an Estimate or None")
    return estimate  # type: ignore[no-any-return]  # was just looked at
