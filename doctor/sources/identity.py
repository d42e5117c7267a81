"""Names of this computer and of who uses it: words that must not be in what is published."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import PurePath

_VARIABLES = ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "SUDO_USER")


def private_words(environment: Mapping[str, str]) -> tuple[str, ...]:
    """User and host names, the host's also without its domain."""
    host = platform.node()
    words = [environment.get(name, "") for name in _VARIABLES]
    words += [host, host.partition(".")[0], PurePath(environment.get("HOME", "")).name]
    return tuple(dict.fromkeys(word for word in words if word and word != "root"))
