"""How many examples a law is tried with."""

from __future__ import annotations

import sys

TRACED_SHARE = 4


def examples(count: int) -> int:
    """All of them, or a quarter where coverage traces each line: the planner then takes three to four times as long, and
    the environments of the other Pythons try all of them.
    """
    return count if sys.gettrace() is None else max(3, count // TRACED_SHARE)
