"""For all tests: where coverage is measured, laws get the same examples each time, so that its bar cannot waver."""

from __future__ import annotations

import sys

from hypothesis import settings

if sys.gettrace() is not None:
    settings.register_profile("traced", derandomize=True)
    settings.load_profile("traced")
