"""For all tests: where coverage is measured, laws get the same examples each time, so that its bar cannot waver."""

from __future__ import annotations

import sys

if sys.gettrace() is not None:
    # Not at the top: tests on GPUs need no hypothesis, and run where it is not installed.
    from hypothesis import settings

    settings.register_profile("traced", derandomize=True)
    settings.load_profile("traced")
