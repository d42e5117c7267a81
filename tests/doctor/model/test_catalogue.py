from __future__ import annotations

import math

import pytest

from vlm_doctor.errors import ModelNotFoundError
from vlm_doctor.model import ModelProfile
from vlm_doctor.sources.catalogue import catalogue, expand, find_entry
from vlm_doctor.sources.model_files import load_profile

NAMES = [
    "THUDM/cogvlm-chat-hf",
    "THUDM/cogvlm2-llama3-chat-19B",
    "THUDM/glm-4v-9b",
    "zai-org/GLM-4.1V-9B-Thinking",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen/Qwen2.5-VL-32B-Instruct",
    "Qwen/Qwen2.5-VL-72B-Instruct",
    "llava-hf/llava-1.5-7b-hf",
    "llava-hf/llava-1.5-13b-hf",
    "OpenGVLab/InternVL3-8B",
    "OpenGVLab/InternVL3-8B-hf",
]

BUFFERS = {"THUDM/cogvlm-chat-hf": 32 * 64}
"""Stored elements that a count of parameters leaves out: inv_freq of each layer."""


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


def profile(name: str) -> ModelProfile:
    return load_profile(name, allow_network=False)


def test_the_catalogue_holds_these_models() -> None:
    assert set(catalogue()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_totals_equal_the_published_figures(name: str) -> None:
    published = catalogue()[name].published
    found = profile(name)
    if published.parameters is not None:
        assert found.elements - BUFFERS.get(name, 0) == published.parameters
    if published.total_size is not None:
        assert found.stored_bytes == published.total_size


@pytest.mark.parametrize(
    ("name", "stored_bytes"),
    [
        ("THUDM/cogvlm-chat-hf", 35_279_374_848),
        ("THUDM/cogvlm2-llama3-chat-19B", 39_006_214_656),
        ("THUDM/glm-4v-9b", 27_812_641_856),
        ("zai-org/GLM-4.1V-9B-Thinking", 20_585_554_944),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 16_584_333_312),
        ("Qwen/Qwen2.5-VL-32B-Instruct", 66_905_436_672),
        ("Qwen/Qwen2.5-VL-72B-Instruct", 146_821_554_688),
        ("llava-hf/llava-1.5-7b-hf", 14_126_854_144),
        ("llava-hf/llava-1.5-13b-hf", 26_702_989_312),
        ("OpenGVLab/InternVL3-8B", 15_888_747_520),
        ("OpenGVLab/InternVL3-8B-hf", 15_888_747_520),
    ],
)
def test_sizes_do_not_change_by_accident(name: str, stored_bytes: int) -> None:
    assert profile(name).stored_bytes == stored_bytes


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_can_be_planned(name: str) -> None:
    found = profile(name)
    assert found.origin == "catalogue"
    assert found.vision is not None
    assert found.image is not None
    assert found.notes == ()
    assert [unit.layer for unit in found.units if unit.role == "layer"] == list(range(found.text.layers))
    assert {"vision", "embedding", "layer", "norm", "head"} <= {unit.role for unit in found.units}
    assert catalogue()[name].source


def image_tokens(name: str) -> int:
    """Tokens of one image at the model's own size: of one tile where it cuts tiles."""
    rule = profile(name).image
    assert rule is not None
    return (rule.size // rule.patch // rule.merge) ** 2 + (rule.extra_tokens if rule.kind == "fixed" else 0)


def test_images_become_as_many_tokens_as_the_model_cards_say() -> None:
    assert image_tokens("llava-1.5-7b") == 576
    assert image_tokens("glm-4v-9b") == 1600 + 2
    assert image_tokens("cogvlm-chat-hf") == 1225 + 2
    assert image_tokens("cogvlm2-19b") == 2304 + 2
    assert image_tokens("InternVL3-8B") == image_tokens("InternVL3-8B-hf") == 256
    assert image_tokens("qwen2.5-vl-7b") == image_tokens("glm-4.1v-9b") == 36 * 36


@pytest.mark.parametrize(
    ("name", "kv_heads", "head_dim", "tower_width"),
    [
        ("cogvlm-chat-hf", 32, 128, 15360),
        ("cogvlm2-19b", 8, 128, 15360),
        ("glm-4v-9b", 2, 128, 15360),
        ("glm-4.1v-9b", 2, 128, 4096),
    ],
)
def test_dimensions_that_the_config_hides_are_read_from_the_tensors(
    name: str, kv_heads: int, head_dim: int, tower_width: int
) -> None:
    found = profile(name)
    assert found.vision is not None
    assert (found.text.kv_heads, found.text.head_dim, found.vision.intermediate) == (kv_heads, head_dim, tower_width)


def test_remote_code_keeps_its_names() -> None:
    keys = {unit.key for unit in profile("glm-4v-9b").units if unit.role != "layer"}
    assert keys == {
        "transformer.vision",
        "transformer.rotary_pos_emb",
        "transformer.embedding.word_embeddings",
        "transformer.encoder.final_layernorm",
        "transformer.output_layer",
    }
    assert profile("glm-4v-9b").is_remote_code


def test_inner_generate_is_known_for_internvl_chat_only() -> None:
    assert [name for name in NAMES if profile(name).runs_inner_generate] == ["OpenGVLab/InternVL3-8B"]
    remote = [name for name in NAMES if profile(name).is_remote_code]
    assert remote == ["THUDM/cogvlm-chat-hf", "THUDM/cogvlm2-llama3-chat-19B", "THUDM/glm-4v-9b", "OpenGVLab/InternVL3-8B"]


@pytest.mark.parametrize("alias", ["llava-1.5-7b", "LLAVA-1.5-7B-HF", "llava-hf/llava-1.5-7b-hf"])
def test_aliases_find_the_same_model(alias: str) -> None:
    entry = find_entry(alias)
    assert entry is not None
    assert entry.name == "llava-hf/llava-1.5-7b-hf"
    assert profile(alias).name == entry.name


def test_aliases_are_unique() -> None:
    names = [name.lower() for entry in catalogue().values() for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))


def test_a_misspelt_name_is_answered_with_the_near_ones() -> None:
    with pytest.raises(ModelNotFoundError) as raised:
        profile("lava-1.5-7b")
    assert str(raised.value) == (
        "'lava-1.5-7b': no folder, catalogue name or hub id (org/name) of that name; "
        "did you mean llava-1.5-7b or llava-1.5-7b-hf?"
    )


def test_ranges_expand_in_order() -> None:
    assert list(expand("a.{0..2}.b")) == ["a.0.b", "a.1.b", "a.2.b"]
    assert list(expand("{0..1}.{8..9}")) == ["0.8", "0.9", "1.8", "1.9"]
    assert list(expand("plain")) == ["plain"]


def test_expanded_bytes_are_elements_times_width() -> None:
    for entry in catalogue().values():
        for tensor in entry.checkpoint().tensors.values():
            assert tensor.stored_bytes == 2 * math.prod(tensor.shape)
