"""Start the process that keeps a model, so that it outlives the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .facts import NotKept
from .serving import BUSY

if TYPE_CHECKING:
    from .places import Place
    from .records import Order

_LIMIT_S = 60.0
"""Until the process can be asked: it imports nothing heavy before. Two seconds on a busy machine."""
_BOOT = (
    "import sys; sys.path[:] = [place for place in sys.path if place] + {paths!r}; "
    "from pytest_vlmgpu.warm.serving import main; raise SystemExit(main())"
)
"""The current folder is not searched: what a project calls ``types.py`` is not to be imported there."""
_OWN_VARIABLES = ("PYTEST_", "COV_", "COVERAGE_")
"""What a host must not inherit of a run; coverage measures the processes of a run by its own."""


def start(order: Order, place: Place) -> None:
    """Start a host, detached, in a session of its own; it can be asked when this returns.

    Raises:
        NotKept: It did not start.
    """
    import vlm_doctor

    packages = [str(Path(__file__).parents[2]), str(Path(vlm_doctor.__file__).parents[1])]
    command = [sys.executable, "-c", _BOOT.format(paths=packages), f"warm host of {order.label}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_VARIABLES)}
    try:
        log = place.open_log()
    except OSError as error:
        raise NotKept(f"{place.log} cannot be written ({error.strerror})") from None
    try:
        process = subprocess.run(
            command,
            input=msgspec.json.encode(order),
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotKept(f"its host could not be started ({type(error).__name__})") from None
    finally:
        os.close(log)
    if process.returncode not in (0, BUSY):
        raise NotKept(f"its host could not be started (status {process.returncode}; see {place.log})")
