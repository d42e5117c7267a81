"""For all tests: a slow machine is no failure, and laws get the same examples each time, so that a commit has one verdict.

`tox -e fuzz` looks for new examples. Tests on GPUs need no hypothesis, and run where it is not installed.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    settings.register_profile(
        "search", settings.get_profile("patient"), derandomize=False, max_examples=1000, print_blob=True
    )
    settings.load_profile("patient")
