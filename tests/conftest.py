"""For all tests: no law is timed, and where coverage is measured it gets the same examples each time."""

from __future__ import annotations

import importlib.util
import sys

# Tests on GPUs need no hypothesis, and run where it is not installed.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("shared", deadline=None, derandomize=sys.gettrace() is not None)
    settings.load_profile("shared")
