"""Which transformers will run the model: it decides what is cached and how experts run."""

from __future__ import annotations

import re

from ..machine import Machine
from ..model import ModelProfile

_LAST_OF_4 = (4, 57)

Release = tuple[int, int] | None
"""Major and minor number; ``None`` when it is unknown, and then taken to be 5."""


def release_of(machine: Machine) -> Release:
    """The release of transformers that is installed on a machine."""
    return read_release(machine.libraries.version("transformers") if machine.libraries is not None else None)


def read_release(version: str | None) -> Release:
    """The release that a version belongs to."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


def release_for(profile: ModelProfile, machine: Machine) -> Release:
    """The release whose manners a model has: with code of its own, experts and latent attention go as before 5.

    Such code loops over its experts and caches keys and values expanded (``modeling_deepseek.py`` of DeepSeek-VL2,
    ``modeling_kimi_vl.py``); what transformers 5 does instead is done in its own classes alone.
    """
    text = profile.text
    if profile.is_remote_code and (text.experts or text.kv_lora_rank is not None):
        return _LAST_OF_4
    return release_of(machine)


def is_before_5(release: Release) -> bool:
    """Whether transformers is known to be of the fourth generation or older."""
    return release is not None and release < (5, 0)
