from __future__ import annotations

import msgspec
import pytest

from vlm_doctor.errors import ModelFileError
from vlm_doctor.planner.constraints import chain

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
