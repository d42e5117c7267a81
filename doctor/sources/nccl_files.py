"""NCCL's settings files, which no list of environment variables shows. Source: NCCL, Environment Variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..machine import FileSetting
from .environment import is_secret, shown
from .regular_file import read_text

_MAX_BYTES = 64 * 1024
_MAX_SETTINGS = 100
_MAX_VALUE_CHARS = 300


def read_nccl_files(root: Path, environment: Mapping[str, str]) -> tuple[FileSetting, ...]:
    """Settings in /etc/nccl.conf and ``~/.nccl.conf``, or in what NCCL_CONF_FILE names instead of the latter.

    The order is NCCL's: it takes the first that sets a variable, and the environment before either.
    """
    home = environment.get("HOME", "")
    own = environment.get("NCCL_CONF_FILE") or (f"{home}/.nccl.conf" if home else "")
    if own.startswith("~/"):
        own = home + own[1:]
    found: list[FileSetting] = []
    for path in filter(None, (own, "/etc/nccl.conf")):
        text = read_text(root / path.lstrip("/"), _MAX_BYTES) or ""
        for line in text.splitlines():
            name, sign, value = line.partition("#")[0].partition("=")
            name = name.strip()
            if sign and name.startswith("NCCL_") and not is_secret(name):
                kept = shown(value.strip(), home)[:_MAX_VALUE_CHARS]
                found.append(FileSetting(name=name[:_MAX_VALUE_CHARS], value=kept, file=shown(path, home)))
    return tuple(found[:_MAX_SETTINGS])
