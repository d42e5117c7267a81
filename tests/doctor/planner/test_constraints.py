from __future__ import annotations

import msgspec
import pytest

from vlm_doctor.errors import ModelFileError
from vlm_doctor.model import Unit
from vlm_doctor.planner.constraints import can_break_tower, chain

from .profiles import BODY, glm41v_9b, unit

ANCHOR = ("model.visual", f"{BODY}.embed_tokens", f"{BODY}.rotary_emb")


def keys(profile_chain: object) -> list[tuple[str, ...]]:
    return [tuple(unit.key for unit in atom.units) for atom in profile_chain.atoms]  # type: ignore[attr-defined]


def test_the_chain_begins_with_the_anchor_and_ends_with_norm_and_head() -> None:
    found = chain(glm41v_9b())
    atoms = keys(found)
    assert atoms[0] == ANCHOR
    assert atoms[1:41] == [(f"{BODY}.layers.{number}",) for number in range(40)]
    assert atoms[41:] == [(f"{BODY}.norm", "lm_head")]
    assert [atom.layers for atom in found.atoms] == [0, *[1] * 40, 0]
    assert [atom.has_head for atom in found.atoms] == [*[False] * 41, True]
    assert found.constraints == (
        "Vision tower, projector and token embedding stay on one GPU: image features are written into the embeddings.",
    )


def test_a_tied_head_joins_the_embedding_and_its_norm_stays_with_the_last_layer() -> None:
    found = chain(glm41v_9b(tied=((f"{BODY}.embed_tokens", "lm_head"),)))
    atoms = keys(found)
    assert atoms[0] == (*ANCHOR, "lm_head")
    assert atoms[-1] == (f"{BODY}.layers.39", f"{BODY}.norm")
    assert found.constraints[-1] == f"Tied weights share a GPU: {BODY}.embed_tokens, lm_head."


def test_an_inner_generate_brings_head_norm_and_last_layer_to_the_inputs() -> None:
    found = chain(glm41v_9b(runs_inner_generate=True, architecture="InternVLChatModel"))
    atoms = keys(found)
    assert atoms[0] == (*ANCHOR, f"{BODY}.layers.39", f"{BODY}.norm", "lm_head")
    assert len(atoms) == 40
    assert found.constraints[-1] == (
        "Norm, head and last layer stay on the first GPU: InternVLChatModel runs an inner generate, "
        "which leaves the logits where the head is."
    )


def test_tied_layers_share_the_place_of_the_first() -> None:
    atoms = keys(chain(glm41v_9b(tied=((f"{BODY}.layers.3", f"{BODY}.layers.30"),))))
    assert (f"{BODY}.layers.3", f"{BODY}.layers.30") in atoms
    assert len(atoms) == 41


def test_a_text_model_without_tower_names_no_vision_constraint() -> None:
    full = glm41v_9b()
    text = msgspec.structs.replace(full, units=full.units[1:])
    assert chain(text).constraints == ()


def test_bare_layers_make_a_chain_of_their_own() -> None:
    layers = tuple(unit(f"layers.{number}", "layer", 10, layer=number) for number in range(3))
    assert keys(chain(glm41v_9b(units=layers))) == [("layers.0",), ("layers.1",), ("layers.2",)]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelFileError) as refused:
        chain(glm41v_9b(units=(unit("model.visual", "vision", 10),)))
    assert str(refused.value) == (
        "zai-org/GLM-4.1V-9B-Thinking: no text layers were found in the checkpoint, so there is nothing to place."
    )


def test_a_tie_to_nothing_is_refused() -> None:
    with pytest.raises(ModelFileError) as refused:
        chain(glm41v_9b(tied=(("lm_head", "model.gone"),)))
    assert str(refused.value) == (
        "zai-org/GLM-4.1V-9B-Thinking: model.gone is tied, but no such unit was found in the checkpoint."
    )


def tower(*names: tuple[str, int | None]) -> Unit:
    parts = tuple(unit(f"model.visual.{name}", "vision", 10, layer=number) for name, number in names)
    return msgspec.structs.replace(unit("model.visual", "vision", 10 * len(parts)), parts=parts)


def test_a_tower_that_may_be_cut_is_cut_between_its_blocks() -> None:
    names = (("patch_embed", None), ("blocks.0", 0), ("extra", None), ("blocks.1", 1), ("merger", None), ("boi", None))
    whole = glm41v_9b(units=(tower(*names), *glm41v_9b().units[1:]))
    assert can_break_tower(whole)
    assert not can_break_tower(glm41v_9b())
    assert keys(chain(whole))[0] == ANCHOR
    assert chain(whole).atoms[0].has_tower
    assert chain(whole).atoms[0].has_embedding
    assert chain(glm41v_9b(), breaks_tower=True) == chain(glm41v_9b())
    found = chain(whole, breaks_tower=True)
    assert found.is_tower_broken
    assert keys(found)[:4] == [
        ("model.visual.patch_embed", "model.visual.blocks.0"),
        ("model.visual.extra", "model.visual.blocks.1"),
        ("model.visual.merger", "model.visual.boi", *ANCHOR[1:]),
        (f"{BODY}.layers.0",),
    ]
    assert [(atom.has_tower, atom.has_embedding) for atom in found.atoms[:4]] == [
        (True, False), (True, False), (True, True), (False, False),
    ]  # fmt: skip
    assert found.constraints[0].startswith("The vision tower is cut between its blocks")


def test_without_anything_behind_the_blocks_the_embedding_has_no_tower() -> None:
    whole = glm41v_9b(units=(tower(("blocks.0", 0), ("blocks.1", 1)), *glm41v_9b().units[1:]))
    found = chain(whole, breaks_tower=True)
    assert [(atom.has_tower, atom.has_embedding) for atom in found.atoms[:3]] == [
        (True, False), (True, False), (False, True),
    ]  # fmt: skip


def test_without_an_embedding_the_last_block_is_where_its_output_is_met() -> None:
    layers = glm41v_9b().units[3:]
    found = chain(glm41v_9b(units=(tower(("blocks.0", 0), ("blocks.1", 1)), *layers)), breaks_tower=True)
    assert [(atom.has_tower, atom.has_embedding) for atom in found.atoms[:3]] == [
        (True, False), (True, True), (False, False),
    ]  # fmt: skip
