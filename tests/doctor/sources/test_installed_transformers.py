"""What the installed transformers calls its modules, read from its file without importing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_doctor.sources.installed_transformers import families_with_stored_names, has_flat_towers

OMNI = {"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"}
FLAT = '"CLIPVisionModel": [PrefixChange(prefix_to_remove="vision_model")]\n'
NESTED = '"qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration"\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "transformers"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "transformers", raising=False)
    return folder


@pytest.mark.parametrize(
    ("text", "is_flat", "stored"),
    [(None, False, OMNI), ("", False, OMNI), (FLAT, True, OMNI), (FLAT + NESTED, True, set())],
)
def test_names_follow_the_release(package: Path, text: str | None, is_flat: bool, stored: set[str]) -> None:
    if text is not None:
        (package / "conversion_mapping.py").write_text(text)

    assert has_flat_towers() is is_flat
    assert families_with_stored_names() == stored


def test_without_transformers_the_newest_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    assert has_flat_towers()
    assert families_with_stored_names() == frozenset()


def test_a_transformers_that_cannot_be_looked_for_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: str) -> None:
        raise ValueError("transformers.__spec__ is None")

    monkeypatch.setattr("importlib.util.find_spec", refuses)

    assert has_flat_towers()
