"""Every option, ini key and marker, as pytest lists them. Small on purpose: each pytest run of each project reads it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

HELP = {
    "gpus": "GPUs for tests that use vlm markers or fixtures: auto (all visible ones, default), none (run models on the "
    "CPU), a count (2), positions among the visible GPUs (0,2 or 2,), or UUIDs (GPU-…)",
    "model": "model (folder or hub id) for tests that use the fixture vlm and name none",
    "machine": "decide for a recorded or made-up machine (snapshot file, or a spec such as 2xL4) and run no gated test; "
    "default: this machine, live",
    "wait": "seconds to wait (or 90s, 10m, 1h) for GPUs that other runs have leased and for memory that others hold; "
    "default: 0, with strict 120",
    "slots": "1 (default): one model is loaded at a time; fit: models that fit together stay loaded together",
    "lease_dir": "folder in which runs on this machine lease GPUs; default: /tmp/pytest-vlmgpu-leases; off: no leases",
    "strict": "report the plugin's own skips as errors, with the same VLM7xx codes",
}
"""Name of each setting to its help: ``--vlm-NAME``, ini ``vlm_NAME``, environment ``PYTEST_VLMGPU_NAME``."""
ENVIRONMENT_PREFIX = "PYTEST_VLMGPU_"
MARKERS = (
    "vlm(*names, dtype=None, trust_remote_code=False): Name the model (folder or hub id) that the fixture vlm loads; "
    "several names run the test with each.",
    "vlm_requires(*, gpus=1, vram_gib=None, total_vram_gib=None, capability=None, bf16=False, fp8=False): Skip unless GPUs "
    'can do it: so many, free memory on each and in all (GiB, or text such as "80GB"), capability.',
)
"""The lines of ``pytest --markers``; :mod:`markers` holds the functions of these signatures."""
MARKER_PREFIXES = ("vlm", "vml")
"""What a marker of ours begins with, typed right or wrong."""
GATED_FIXTURES = frozenset({"vlm", "vlm_gpus"})
"""Fixtures that make a test a gated one."""
_METAVARS = {"gpus": "SPEC", "model": "ID", "machine": "FILE|SPEC", "wait": "TIME", "slots": "1|fit", "lease_dir": "FOLDER"}


def add_options(parser: pytest.Parser) -> None:
    """Declare command-line options and ini keys. Each default is ``None``, so that "not given" can be told."""
    group = parser.getgroup("vlmgpu", "tests with vision-language models on GPUs")
    for name, text in HELP.items():
        option, dest = f"--vlm-{name.replace('_', '-')}", f"vlm_{name}"
        if name == "strict":
            group.addoption(option, dest=dest, action="store_true", default=None, help=text)
            parser.addini(dest, text, type="bool", default=None)
        else:
            group.addoption(option, dest=dest, metavar=_METAVARS[name], default=None, help=text)
            parser.addini(dest, text, type="string", default=None)


def is_anything_given(config: pytest.Config) -> bool:
    """True when a setting is given anywhere, right or wrong."""
    for name in HELP:
        if config.getoption(f"vlm_{name}") is not None or os.environ.get(f"{ENVIRONMENT_PREFIX}{name.upper()}"):
            return True
        try:
            if config.getini(f"vlm_{name}") is not None:
                return True
        except Exception:  # noqa: BLE001 - pytest cannot convert it, and its versions raise different errors
            return True
    return False


def may_be_gated(item: pytest.Function) -> bool:
    """True when a test uses a fixture of ours, or a marker that looks like one of ours."""
    if not GATED_FIXTURES.isdisjoint(item.fixturenames):
        return True
    return any(mark.name.startswith(MARKER_PREFIXES) for mark in item.iter_markers())
