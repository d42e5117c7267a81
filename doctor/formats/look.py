"""How text for people is to look."""

from __future__ import annotations

import msgspec

DEFAULT_WIDTH = 80
"""Columns when the output is not a terminal."""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of the output that the text has to respect, and how much of it is wanted."""

    width: int = DEFAULT_WIDTH
    """Columns."""
    color: bool = False
    is_unicode: bool = True
    """False where the output cannot show more than ASCII."""
    verbose: bool = False
    machine_option: str = ""
    """What commands in the report need to name the same machine, such as `` --machine 2xL4``."""
