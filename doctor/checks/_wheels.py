"""Which published torch runs here: machine code for these GPUs, and a CUDA that this driver supports."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..data.versions import EMBEDDED_CAPABILITIES, TORCH_INDEX, TORCH_WHEELS
from ..machine import TorchBuild
from ._check import Facts
from ._remedy import pip

Capability = tuple[int, int]
COMPANIONS = ("torchvision", "torchaudio", "torchcodec", "xformers")
"""Packages of which each release is built for one torch."""
_TOGETHER = ("torchvision", "torchaudio")
"""Those of the torch project's own index that every torch has: they move with it."""


def has_code(archs: Sequence[str], capability: Capability) -> bool:
    """Tell whether code for these architectures (``sm_90``) runs on a GPU."""
    return any(_runs(arch, capability) for arch in archs)


def _runs(arch: str, capability: Capability) -> bool:
    """Tell whether code for ``arch`` runs on a GPU.

    ``sm_86`` runs on the same major version from that minor version on, ``sm_90a`` on exactly that GPU,
    ``compute_90`` (PTX) on every later one. Source: CUDA C++ programming guide, binary and PTX compatibility.
    """
    match = re.fullmatch(r"(sm|compute)_([0-9]{1,3})([0-9])([af]?)", arch, re.ASCII)
    if match is None:
        return False
    built = (int(match[2]), int(match[3]))
    if match[4] or built in EMBEDDED_CAPABILITIES or capability in EMBEDDED_CAPABILITIES:
        return built == capability
    return built <= capability and (match[1] == "compute" or built[0] == capability[0])


def best_index(facts: Facts) -> str | None:
    """Index of the torch wheels which this driver can run and which have code for these GPUs.

    Of the published CUDA versions it takes the newest that the driver supports outright, else the oldest that
    minor-version compatibility allows; ``None`` where the driver is unknown or nothing fits.
    """
    capabilities = [gpu.compute_capability for gpu in facts.visible or facts.working if gpu.compute_capability]
    driver = facts.machine.driver.cuda_version
    fitting = [
        cuda
        for cuda, archs in sorted(TORCH_WHEELS.items())
        if driver is not None
        and cuda[0] <= driver[0]
        and all(has_code([f"sm_{major}{minor}" for major, minor in archs], capability) for capability in capabilities)
    ]
    if not fitting or driver is None:
        return None
    outright = [cuda for cuda in fitting if cuda <= driver]
    major, minor = outright[-1] if outright else fitting[0]
    return f"{TORCH_INDEX}/cu{major}{minor}"


def index_of(build: TorchBuild) -> str | None:
    """Index of the wheels that go with an installed torch; ``None`` for a build that is on none."""
    if build.version.endswith("+cpu"):
        return f"{TORCH_INDEX}/cpu"
    cuda = (build.cuda or "").replace(".", "")
    return f"{TORCH_INDEX}/cu{cuda}" if re.fullmatch(r"[0-9]{3}", cuda, re.ASCII) else None


def torch_command(facts: Facts, requirement: str = "torch", *, is_there: bool = True) -> str:
    """Command that installs a torch for this machine, with those of its companions that are installed.

    Args:
        facts: What is known.
        requirement: What to ask pip for.
        is_there: Whether another build of torch is installed, which pip would otherwise be content with. Where none is,
            torchvision comes along: image processors need it.
    """
    libraries = facts.machine.libraries
    companions = [name for name in _TOGETHER if libraries is not None and libraries.version(name)]
    if not is_there and not companions:
        companions = ["torchvision"]
    index = best_index(facts)
    where = ("--index-url", index) if index is not None else ()
    return pip(facts, "install", *(("--force-reinstall",) if is_there else ()), requirement, *companions, *where)
