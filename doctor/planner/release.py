"""Which transformers will run the model: it decides what is cached and how experts run."""

from __future__ import annotations

import re

from ..machine import Machine

Release = tuple[int, int] | None
"""Major and minor number; ``None`` when it is unknown, and then taken to be 5."""


def release_of(machine: Machine) -> Release:
    """The release of transformers that is installed on a machine."""
    version = machine.libraries.version("transformers") if machine.libraries is not None else None
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


def is_before_5(release: Release) -> bool:
    """Whether transformers is known to be of the fourth generation or older."""
    return release is not None and release < (5, 0)
