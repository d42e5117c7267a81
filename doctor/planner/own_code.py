"""What a checkpoint's own code needs that the transformers of a machine does not give it, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.removed_calls import BREAKS, NATIVE, PUBLISHED, Break, is_broken
from ..machine import Machine
from ..model import ModelProfile
from .release import Release, read_release, release_of

_NEWEST = (999, 0)


def about_own_code(profile: ModelProfile, machine: Machine) -> tuple[str, ...]:
    """One sentence, or none where nothing is known to be missing.

    Args:
        profile: Where its code was not at hand, what its family publishes counts.
        machine: A machine without a known transformers is taken to have the newest.
    """
    found = _broken(profile, release_of(machine))
    if not found:
        return ()
    since = _text(found[0].since)
    fix = f"Use transformers<{since} in an environment of its own, or newer code"
    native = NATIVE.get(profile.model_type)
    if native is not None:
        fix += f", or {native.model}, which is a class of transformers itself since {_text(native.since)}"
    source = found[0].source.partition(",")[0]
    return (f"Its own code{_why(profile, found)} ({source}). {fix}.",)


def why_broken(profile: ModelProfile, version: str) -> str | None:
    """Why a checkpoint's own code fails with a version of transformers, as a phrase; ``None`` where nothing is known."""
    found = _broken(profile, read_release(version))
    return f"its own code{_why(profile, found)}, and {version} is installed" if found else None


def _broken(profile: ModelProfile, release: Release) -> list[Break]:
    """What the code relies on and a release lacks, what broke first before the rest."""
    if not profile.is_remote_code:
        return []
    names = PUBLISHED.get(profile.model_type, ()) if profile.broken_calls is None else profile.broken_calls
    found = [BREAKS[name] for name in names if is_broken(name, release or _NEWEST)]
    return sorted(found, key=lambda entry: entry.since)


def _why(profile: ModelProfile, found: Sequence[Break]) -> str:
    """What it does, and what comes of that."""
    published = ", as published," if profile.broken_calls is None else ""
    does = ", ".join(entry.says for entry in found)
    return f"{published} {does}: with transformers {_text(found[0].since)} and newer, {found[0].then}"


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
