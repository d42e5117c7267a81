"""The profile as the machine's libraries will hold it: modules as they name them, towers as they run them."""

from __future__ import annotations

from itertools import chain

import msgspec

from ..data.activations import (
    KEPT_STATES,
    KEPT_STATES_BEFORE_5,
    NEVER_FUSED,
    OUTPUT_KEPT,
    OUTPUT_LET_GO,
    REFUSE_SDPA_BEFORE,
    STATES_LET_GO,
)
from ..data.families import NORM_OUTSIDE_BEFORE
from ..data.joins import TOWER_WINDOWED
from ..machine import Machine
from ..model import LinearWeights, ModelProfile, Unit
from .quantized import unpacked
from .quantized_rules import why_not_unpacked
from .release import Release, is_before_5, release_for, release_of

_NEWEST = (998, 0)


def as_loaded(profile: ModelProfile, machine: Machine) -> ModelProfile:
    """The profile as this machine will hold it, if its transformers is known; as the newest would, if not."""
    release = release_of(machine)
    found = _with_less_kept(_with_kept_states(_with_own_attention(profile, release), release), release)
    found = _with_norm_outside(_with_whole_tower(found, release), release)
    if is_before_5(release_for(profile, machine)):
        found = _with_single_experts(found)
    if is_before_5(release):
        found = _with_packed_words(found)
    why = why_not_unpacked(found, release)
    return unpacked(found if why is None else msgspec.structs.replace(found, one_gpu=why), machine)


def _with_single_experts(profile: ModelProfile) -> ModelProfile:
    """Experts that are linear layers, which bitsandbytes quantizes."""
    if not any(unit.expert_linear.tensors for unit in profile.units):
        return profile
    return msgspec.structs.replace(profile, units=tuple(map(_with_expert_layers, profile.units)))


def _with_expert_layers(unit: Unit) -> Unit:
    parts = tuple(map(_with_expert_layers, unit.parts))
    linear = unit.linear + unit.expert_linear
    return msgspec.structs.replace(unit, linear=linear, expert_linear=LinearWeights(), parts=parts)


def _with_packed_words(profile: ModelProfile) -> ModelProfile:
    """Weights that compressed-tensors has unpacked, and the words they were packed in."""
    if not any(unit.packed_bytes for unit in profile.units):
        return profile
    return msgspec.structs.replace(profile, units=tuple(map(_with_words, profile.units)))


def _with_words(unit: Unit) -> Unit:
    kept = (unit.kept_bytes or 0) + unit.packed_bytes
    return msgspec.structs.replace(unit, kept_bytes=kept, packed_bytes=0, parts=tuple(map(_with_words, unit.parts)))


def _with_whole_tower(profile: ModelProfile, release: Release) -> ModelProfile:
    """A tower that sorts its patches into windows loses its parts unless transformers is known to be 5.

    4.57 sorts them by an index that stays with the inputs (modeling_qwen2_5_vl.py), so that the merger behind the last
    block would have to be where the first is.
    """
    if profile.model_type not in TOWER_WINDOWED or not (release is None or is_before_5(release)):
        return profile
    units = tuple(msgspec.structs.replace(unit, parts=()) if unit.parts else unit for unit in profile.units)
    return msgspec.structs.replace(profile, units=units)


def _with_own_attention(profile: ModelProfile, release: Release) -> ModelProfile:
    """A body that has no fused attention there, and a class that refuses the word."""
    if profile.refuses_sdpa or profile.is_remote_code:
        return profile
    now = release or _NEWEST
    since, before = NEVER_FUSED.get(profile.text.body, (now, now))
    if not since <= now < before:
        is_refused = now < REFUSE_SDPA_BEFORE.get(profile.model_type, now)
        return msgspec.structs.replace(profile, refuses_sdpa=True) if is_refused else profile
    note = (
        f"This transformers has no fused attention for {profile.text.body}: it runs eager, and the scores of all pairs of "
        "tokens count."
    )
    text = msgspec.structs.replace(profile.text, is_never_fused=True)
    return msgspec.structs.replace(profile, text=text, refuses_sdpa=True, notes=(*profile.notes, note))


def _with_kept_states(profile: ModelProfile, release: Release) -> ModelProfile:
    """A tower that keeps what each of its blocks gives, as older releases do."""
    vision, family = profile.vision, profile.model_type
    if vision is None or vision.keeps_states or release is None or release >= STATES_LET_GO:
        return profile
    if family not in KEPT_STATES and not (family in KEPT_STATES_BEFORE_5 and is_before_5(release)):
        return profile
    return msgspec.structs.replace(profile, vision=msgspec.structs.replace(vision, keeps_states=True))


def _with_less_kept(profile: ModelProfile, release: Release) -> ModelProfile:
    """A model that holds less of what its tower gives, as older releases do."""
    if release is None or release >= OUTPUT_KEPT or profile.is_remote_code:
        return profile
    vision = profile.vision
    if vision is not None and profile.model_type in OUTPUT_LET_GO:
        vision = msgspec.structs.replace(vision, lets_go=True)
    script = profile.older_tower_script or profile.tower_script
    if vision == profile.vision and script == profile.tower_script:
        return profile
    return msgspec.structs.replace(profile, vision=vision, tower_script=script)


def _with_norm_outside(profile: ModelProfile, release: Release) -> ModelProfile:
    """An embedding whose norm is a module beside it in older releases."""
    rule = NORM_OUTSIDE_BEFORE.get(profile.model_type)
    if rule is None or release is None or release >= rule.release or any(unit.key == rule.norm for unit in profile.units):
        return profile
    cut = ((unit,) if unit.key != rule.embedding else _cut(unit, rule.norm, profile.text.hidden) for unit in profile.units)
    return msgspec.structs.replace(profile, units=tuple(chain.from_iterable(cut)))


def _cut(unit: Unit, norm: str, elements: int) -> tuple[Unit, Unit]:
    """A unit without a norm of so many elements, and the norm; it has the unit's commonest type."""
    dtype = max(unit.parameters, key=lambda name: unit.parameters[name])
    size = unit.stored_bytes * elements // unit.elements
    rest = msgspec.structs.replace(
        unit,
        parameters={**unit.parameters, dtype: unit.parameters[dtype] - elements},
        stored_bytes=unit.stored_bytes - size,
        small_elements=max(0, unit.small_elements - elements),
    )
    return rest, Unit(
        key=norm,
        role="embedding",
        parameters={dtype: elements},
        stored_bytes=size,
        largest_tensor_elements=elements,
        small_elements=elements,
    )
