"""What a checkpoint's own code needs that the transformers of a machine does not give it, in a sentence."""

from __future__ import annotations

from ..data.removed_calls import BREAKS, NATIVE, PUBLISHED, is_broken
from ..machine import Machine
from ..model import ModelProfile
from .release import release_of

_NEWEST = (999, 0)


def about_own_code(profile: ModelProfile, machine: Machine) -> tuple[str, ...]:
    """One sentence, or none where nothing is known to be missing.

    Args:
        profile: Where its code was not at hand, what its family publishes counts.
        machine: A machine without a known transformers is taken to have the newest.
    """
    if not profile.is_remote_code:
        return ()
    names = PUBLISHED.get(profile.model_type, ()) if profile.broken_calls is None else profile.broken_calls
    release = release_of(machine)
    found = [name for name in names if is_broken(name, release or _NEWEST)]
    if not found:
        return ()
    first = min((BREAKS[name] for name in found), key=lambda entry: entry.since)
    since = _text(first.since)
    code = "Its own code" if profile.broken_calls is not None else "Its own code, as published,"
    also = "".join(f", {BREAKS[name].says}" for name in found if BREAKS[name] is not first)
    fix = f"Use transformers<{since} in an environment of its own, or newer code"
    native = NATIVE.get(profile.model_type)
    if native is not None:
        fix += f", or {native.model}, which is a class of transformers itself since {_text(native.since)}"
    source = first.source.partition(",")[0]
    return (f"{code} {first.says}{also}: with transformers {since} and newer, {first.then} ({source}). {fix}.",)


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
