"""What layers keep between tokens, by kind and by release of transformers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.machine import Libraries, Package
from vlm_doctor.model import LayerCache
from vlm_doctor.planner import plan
from vlm_doctor.planner.kv_cache import Cached, cached, kept_elements
from vlm_doctor.planner.release import Release, is_before_5, release_of
from vlm_doctor.workload import Workload

from .profiles import glm41v_9b, machine

GQA = msgspec.structs.replace(glm41v_9b().text, sliding_window=1024, attention_chunk=100)
LATENT = msgspec.structs.replace(
    GQA, heads=16, kv_heads=16, head_dim=160, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128
)
KINDS: tuple[LayerCache, ...] = ("full", "sliding", "chunked", "linear", "cross", "none")


def kept(kind: LayerCache, *, text: Any = GQA, tokens: int = 5000, release: Release = None, **fields: Any) -> Cached:
    workload = Workload(**{"new_tokens": 200, **fields})
    return cached(kind, text, workload, item_bytes=2, tokens=tokens, features=576, release=release)


def test_each_kind_of_layer() -> None:
    token = 2 * 2 * 128 * 2
    assert kept("full") == (5000 * token, 5200 * token)
    assert kept("full", batch=3) == (15000 * token, 15600 * token)
    assert kept("cross") == (576 * token, 576 * token)
    assert kept("none") == (0, 0)
    state = 4 * 256 * 4096
    assert kept("linear") == (state, state)
    assert kept("linear", tokens=1, batch=2) == (2 * state, 2 * state)


def test_a_window_is_kept_whole_until_the_next_token() -> None:
    token = 2 * 2 * 128 * 2
    assert kept("sliding") == (5000 * token, 1024 * token)
    assert kept("sliding", tokens=700) == (700 * token, 900 * token)
    assert kept("chunked", tokens=90) == (90 * token, 100 * token)


def test_layers_with_full_attention_may_have_heads_of_their_own() -> None:
    """Gemma 4: the others see a window, so that at length these are most of the cache."""
    text = msgspec.structs.replace(GQA, full_head_dim=512, full_kv_heads=1)
    assert kept("full", text=text, tokens=10).prefill == 10 * 2 * 512 * 2
    assert kept("sliding", text=text, tokens=10) == kept("sliding", tokens=10)


@pytest.mark.parametrize(("release", "elements"), [((5, 23), 512 + 64), (None, 512 + 64), ((4, 57), 16 * (128 + 64 + 128))])
def test_latent_attention_is_kept_compressed_since_transformers_5(release: Release, elements: int) -> None:
    # DeepSeek-V2-Lite and its kind: vLLM reports 31,104 bytes a token for 27 layers of 576 elements.
    assert sum(kept_elements("full", LATENT, release)) == elements
    assert kept("full", text=LATENT, tokens=10, release=release).prefill == elements * 20
    # As the profile of such a model says the expanded cache.
    assert 2 * LATENT.kv_heads * LATENT.head_dim == 16 * (128 + 64 + 128)


def test_the_release_is_that_of_the_machine() -> None:
    def with_version(version: str) -> Release:
        packages = (Package(name="transformers", version=version),)
        return release_of(machine([8], libraries=Libraries(python="3.12", executable="python", packages=packages)))

    assert with_version("4.57.6") == (4, 57)
    assert with_version("5.23.0.dev0") == (5, 23)
    assert with_version("nonsense") is None
    assert release_of(machine([8])) is None
    assert [is_before_5(release) for release in ((4, 57), (5, 0), None)] == [True, False, False]


@given(
    st.sampled_from(KINDS),
    st.sampled_from([GQA, LATENT]),
    st.integers(0, 100_000),
    st.integers(0, 5_000),
    st.integers(1, 8),
    st.sampled_from([None, (4, 57), (5, 23)]),
)
def test_more_tokens_or_prompts_keep_no_less(
    kind: LayerCache, text: Any, tokens: int, new_tokens: int, batch: int, release: Release
) -> None:
    def of(more: int, others: int) -> Cached:
        return kept(kind, text=text, tokens=tokens + more, new_tokens=new_tokens, batch=batch + others, release=release)

    here = of(0, 0)
    for other in (of(1, 0), of(0, 1)):
        assert other.prefill >= here.prefill
        assert other.final >= here.final


@pytest.mark.parametrize(
    ("transformers", "told"),
    [
        ("4.57.6", "layers x 5120 x bytes x tokens x batch (transformers 4 keeps keys and values expanded)"),
        ("5.23.0", "layers x 576 x bytes x tokens x batch (transformers 5 keeps them compressed)"),
    ],
)
def test_the_ledger_says_what_is_kept_of_a_latent_cache(transformers: str, told: str) -> None:
    """Expanded: 16 heads with keys of 128 + 64 and values of 128; compressed: 512 and the rotary part, 64."""
    packages = (Package(name="transformers", version=transformers),)
    libraries = Libraries(python="3.12", executable="python", packages=packages)
    made = plan(glm41v_9b(text=LATENT), machine([40], libraries=libraries), Workload(images=0))
    (stage,) = made.stages
    (line,) = [line for line in stage.ledger if line.kind == "kv_cache"]
    assert line.source == told
    elements = int(told.split()[2])
    assert line.size_bytes == pytest.approx(40 * elements * 2 * (512 + 256), rel=0.001)
