from __future__ import annotations

from pathlib import Path

import pytest

from vlm_doctor.machine import Checkpoint
from vlm_doctor.sources import checkpoints
from vlm_doctor.sources.checkpoints import read_checkpoints

COMMIT = "a" * 40
CALL = "def f(self, outputs):\n    return self._extract_past_from_model_output(outputs)\n"


def repo(cache: Path, name: str, *, code: str = "", ref: str | None = COMMIT, **blobs: str) -> Path:
    """A repository as huggingface_hub lays it out; a blob whose value is empty is missing."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True)
    if ref is not None:
        (folder / "refs/main").write_text(ref)
    if code:
        (snapshot / "modeling_x.py").write_text(code)
    for file, text in blobs.items():
        if text:
            (folder / "blobs" / file).write_text(text)
        (snapshot / f"{file}.safetensors").symlink_to(folder / "blobs" / file)
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "transformers"
    (folder / "generation").mkdir(parents=True)
    (folder / "generation/utils.py").write_text("class GenerationMixin: ...\n")
    return folder


def test_only_what_needs_a_word_is_recorded(tmp_path: Path, package: Path) -> None:
    cache = tmp_path / "hub"
    repo(cache, "good/model", one="x")
    repo(cache, "THUDM/glm-4v-9b", code=CALL, one="x")
    repo(cache, "cut/off", one="x", two="")
    (repo(cache, "half/way", ref=None) / "blobs/abc.incomplete").write_text("x")
    (cache / "version.txt").write_text("1")
    assert read_checkpoints(cache, package) == (
        Checkpoint(repo="THUDM/glm-4v-9b", lost_calls=("_extract_past_from_model_output",)),
        Checkpoint(repo="cut/off", missing_files=1),
        Checkpoint(repo="half/way", missing_files=1),
    )


def test_code_that_the_installed_version_can_run_is_fine(tmp_path: Path, package: Path) -> None:
    repo(tmp_path / "hub", "THUDM/glm-4v-9b", code=CALL)
    (package / "generation/utils.py").write_text("    def _extract_past_from_model_output(self, outputs):\n")
    assert read_checkpoints(tmp_path / "hub", package) == ()
    assert read_checkpoints(tmp_path / "hub", None) == ()
    assert read_checkpoints(tmp_path / "hub", tmp_path / "none") == ()


def test_odd_caches(tmp_path: Path, package: Path) -> None:
    assert read_checkpoints(tmp_path / "none", package) == ()
    cache = tmp_path / "hub"
    (cache / "models--empty--repo").mkdir(parents=True)
    (cache / "models--file--repo").write_text("not a folder")
    repo(cache, "escapes/up", ref="../../..", code=CALL)
    assert [found.repo for found in read_checkpoints(cache, package)] == ["escapes/up"]


def test_a_slow_disk_is_told(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo(tmp_path / "hub", "a/b")
    monkeypatch.setattr(checkpoints, "_DEADLINE_S", -1.0)
    with pytest.raises(TimeoutError, match="not all checkpoints"):
        read_checkpoints(tmp_path / "hub", package)
