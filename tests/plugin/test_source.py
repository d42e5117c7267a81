"""The name of a model, read as the planner reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vlmgpu.models.failures import LoadFailure
from pytest_vlmgpu.models.source import Source, find_source

COMMIT = "0123456789012345678901234567890123456789"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("org/model", Source("org/model", "main")),
        (f"org/model@{COMMIT}", Source("org/model", COMMIT)),
        ("org/model@refs/pr/1", Source("org/model", "refs/pr/1")),
        ("glm-4v-9b", Source("THUDM/glm-4v-9b", "main")),
        ("thudm/GLM-4V-9B", Source("THUDM/glm-4v-9b", "main")),
    ],
)
def test_names_of_the_hub_and_the_catalogue(name: str, source: Source) -> None:
    assert find_source(name) == source


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert find_source("org/model").name == str(Path("org/model"))
    assert find_source("~/org/model").name == str(tmp_path / "org" / "model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such", "there is no folder /no/such: check the path of the checkpoint."),
        ("./here", "there is no folder here: check the path of the checkpoint."),
        ("a file.txt", "there is no folder a file.txt: check the path of the checkpoint."),
        ("a b\nc", "'a b\\nc' is no folder, catalogue name or hub id (org/name): check the name."),
        ("org/model@", "'org/model@' is no folder, catalogue name or hub id (org/name): check the name."),
    ],
)
def test_what_names_no_model(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file.txt").touch()

    with pytest.raises(LoadFailure) as caught:
        find_source(name)

    assert (caught.value.code, caught.value.message) == ("VLM713", message)


@pytest.mark.parametrize("name", ["x\0y", "n" * 5000])
def test_what_the_file_system_refuses_is_one_sentence(name: str) -> None:
    with pytest.raises(LoadFailure, match=r"^VLM713: '.*$") as caught:
        find_source(name)

    assert len(caught.value.message) < 400
