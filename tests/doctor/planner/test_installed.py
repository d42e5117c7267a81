"""Modules are placed by the names that the installed transformers has for them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vlm_doctor import Workload, plan
from vlm_doctor.formats.to_python import attention_word, snippet
from vlm_doctor.machine import Libraries, Machine, Package
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.installed import as_loaded
from vlm_doctor.planner.memory import Footprint

from .profiles import llava_13b
from .profiles import machine as roomy

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


@pytest.mark.parametrize(
    ("body", "version", "is_eager"),
    [
        ("gemma2", "5.20.1", False),
        ("gemma2", "5.21.0", True),
        ("gemma2", None, True),
        ("gpt_oss", "5.17.0", True),
        ("git", "4.57.6", True),
        ("udop", "4.57.6", True),
        ("udop", "5.23.0", False),
        ("udop", None, False),
        ("llama", "5.23.0", False),
    ],
)
def test_bodies_without_fused_attention_pay_for_scores(body: str, version: str | None, is_eager: bool) -> None:
    text = msgspec.structs.replace(llava_13b().text, body=body)
    profile, where = llava_13b(text=text, model_type="paligemma"), roomy([80.0]) if version is None else machine(version)

    loaded = as_loaded(profile, where)

    assert (loaded.text.is_never_fused, loaded.refuses_sdpa) == (is_eager, is_eager)
    assert any(f"no fused attention for {body}" in note for note in loaded.notes) == is_eager
    assert as_loaded(loaded, where) is loaded
    count, workload = 2048, Workload(images=0, text_tokens=2048)
    fused, asked = (
        Footprint(one, work, image_load(one, work), chain(one).atoms).detail(2, 3, count).activations_bytes
        for one, work in ((loaded, workload), (loaded, msgspec.structs.replace(workload, attention="eager")))
    )
    assert (fused == asked) == is_eager
    assert asked > 40 * count**2 * (6 if body == "gpt_oss" else 10)


def test_an_ocr_model_refuses_the_word_of_what_its_body_has() -> None:
    loaded = as_loaded(llava_13b(model_type="got_ocr2"), machine("5.23.0"))
    assert (loaded.refuses_sdpa, loaded.text.is_never_fused) == (True, False)
    assert not as_loaded(llava_13b(model_type="got_ocr2", is_remote_code=True), machine("5.23.0")).refuses_sdpa


@pytest.mark.parametrize(
    ("model_type", "attention", "word"),
    [
        ("got_ocr2", "sdpa", None),
        ("got_ocr2", "eager", "eager"),
        ("llava", "sdpa", "sdpa"),
        ("llava", "flash", "flash_attention_2"),
    ],
)
def test_the_snippet_does_not_name_attention_that_a_class_refuses(
    model_type: str, attention: Any, word: str | None
) -> None:
    profile = llava_13b(model_type=model_type)
    made = plan(profile, roomy([80.0]), Workload(images=0, text_tokens=64, attention=attention))
    assert made.refuses_sdpa == (model_type == "got_ocr2")
    assert attention_word(made) == word
    assert ("attn_implementation" in snippet(made)) == (word is not None)
    assert word is None or f'attn_implementation="{word}",' in snippet(made)
