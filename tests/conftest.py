"""For all tests: a slow machine is no failure; where coverage is measured, laws get the same examples each time.

Only so the bar of coverage cannot waver. Tests on GPUs need no hypothesis, and run where it is not installed.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

if find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=sys.gettrace() is not None
    )
    settings.load_profile("patient")
