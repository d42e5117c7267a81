"""Modules are placed by the names that the installed transformers has for them."""

from __future__ import annotations

import pytest

from vlm_doctor.machine import Libraries, Machine, Package
from vlm_doctor.planner.installed import as_loaded

from .profiles import llava_13b

EMBEDDING, NORM = "model.language_model.embed_tokens", "model.language_model.embed_norm"


def machine(version: str) -> Machine:
    packages = (Package(name="transformers", version=version),)
    return Machine(
        origin="synthetic", description="x", libraries=Libraries(python="3.12.3", executable="python", packages=packages)
    )


@pytest.mark.parametrize(("version", "is_outside"), [("5.17.0", True), ("5.18.0", False), ("5.23.0", False)])
def test_a_norm_is_placed_with_the_embedding_it_was_cut_from(version: str, is_outside: bool) -> None:
    profile = llava_13b(model_type="inkling_mm_model")

    loaded = as_loaded(profile, machine(version))

    keys = [unit.key for unit in loaded.units]
    assert (NORM in keys) == is_outside
    assert (loaded.elements, loaded.stored_bytes) == (profile.elements, profile.stored_bytes)
    if is_outside:
        norm = next(unit for unit in loaded.units if unit.key == NORM)
        assert (norm.elements, keys.index(NORM)) == (profile.text.hidden, keys.index(EMBEDDING) + 1)
        assert as_loaded(loaded, machine(version)) is loaded
    else:
        assert loaded is profile
