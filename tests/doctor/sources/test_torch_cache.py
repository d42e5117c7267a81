from __future__ import annotations

import os
import time
from pathlib import Path

import platformdirs
import pytest

from vlm_doctor.machine import TorchView
from vlm_doctor.sources.cache_files import default_folder
from vlm_doctor.sources.torch_cache import MAX_AGE_S, TorchCache, key_parts

OK = TorchView(state="ok", version="2.13.0+cpu", is_available=False, device_count=0, seconds=1.5)


def entry(folder: Path) -> Path:
    (path,) = folder.glob("torch-*.json")
    return path


def test_answer_comes_back_marked_as_cached(tmp_path: Path) -> None:
    cache = TorchCache(tmp_path / "made", ["a"])
    assert cache.load() is None
    cache.store(OK)
    loaded = TorchCache(tmp_path / "made", ["a"]).load()
    assert loaded is not None
    assert loaded.is_cached
    assert (loaded.version, loaded.seconds) == ("2.13.0+cpu", 1.5)
    assert [path.name for path in (tmp_path / "made").iterdir()] == [entry(tmp_path / "made").name]


def test_another_state_of_the_machine_has_another_answer(tmp_path: Path) -> None:
    TorchCache(tmp_path, ["a", "b"]).store(OK)
    assert TorchCache(tmp_path, ["a", "c"]).load() is None
    assert TorchCache(tmp_path, ["ab"]).load() is None


@pytest.mark.parametrize(
    "view",
    [
        TorchView(state="failed", message="ImportError: x"),
        TorchView(state="crashed"),
        TorchView(state="timed_out"),
        TorchView(state="ok", cuda="13.0", is_available=False),
        TorchView(state="ok", cuda="13.0"),
    ],
)
def test_answers_that_name_a_trouble_are_not_kept(tmp_path: Path, view: TorchView) -> None:
    TorchCache(tmp_path, ["a"]).store(view)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("age_s", [MAX_AGE_S + 5, -3600])
def test_answer_is_not_used_when_it_is_old_or_from_the_future(tmp_path: Path, age_s: float) -> None:
    cache = TorchCache(tmp_path, ["a"])
    cache.store(OK)
    moment = time.time() - age_s
    os.utime(entry(tmp_path), (moment, moment))
    assert cache.load() is None


def test_old_answers_are_cleared_away(tmp_path: Path) -> None:
    TorchCache(tmp_path, ["old"]).store(OK)
    os.utime(entry(tmp_path), (0, 0))
    (tmp_path / "unrelated").touch()
    os.utime(tmp_path / "unrelated", (0, 0))
    TorchCache(tmp_path, ["new"]).store(OK)
    assert len(list(tmp_path.glob("torch-*"))) == 1
    assert (tmp_path / "unrelated").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"state": "sick"}', b'{"state": "crashed"}'])
def test_damaged_answer_is_no_answer(tmp_path: Path, data: bytes) -> None:
    cache = TorchCache(tmp_path, ["a"])
    cache.store(OK)
    entry(tmp_path).write_bytes(data)
    assert cache.load() is None


def test_links_folders_and_pipes_are_not_read(tmp_path: Path) -> None:
    cache = TorchCache(tmp_path, ["a"])
    cache.store(OK)
    path = entry(tmp_path)
    real = path.rename(tmp_path / "real")
    path.symlink_to(real)
    assert cache.load() is None
    path.unlink()
    path.mkdir()
    assert cache.load() is None
    path.rmdir()
    os.mkfifo(path)
    assert cache.load() is None


def test_answer_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TorchCache(tmp_path, ["a"])
    cache.store(OK)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cache.load() is None


def test_nothing_is_written_through_a_link_that_somebody_left(tmp_path: Path) -> None:
    cache = TorchCache(tmp_path, ["a"])
    cache.store(OK)
    path = entry(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.with_suffix(f".{os.getpid()}").symlink_to(victim)
    cache.store(OK)
    assert victim.read_text() == "precious"


def test_folder_that_cannot_be_made_or_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    cache = TorchCache(tmp_path / "file/below", ["a"])
    cache.store(OK)
    assert cache.load() is None

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    TorchCache(tmp_path, ["a"]).store(OK)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_user_without_a_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object, **__: object) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(platformdirs, "user_cache_dir", homeless)
    assert default_folder() is None


def test_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "vlm-doctor"


def test_key_holds_what_the_answer_depends_on(tmp_path: Path) -> None:
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").touch()
    os.utime(torch / "version.py", ns=(1, 1))
    boot = tmp_path / "proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True)
    boot.write_text("b1")

    def key(
        *,
        executable: str = "/usr/bin/python",
        environment: dict[str, str] | None = None,
        driver: str | None = "580.1",
        files: tuple[str, ...] = ("/dev/nvidia0",),
    ) -> list[str]:
        return key_parts(
            torch_location=str(torch),
            executable=executable,
            environment=environment or {},
            kernel_module_version=driver,
            device_files=files,
            root=tmp_path,
        )

    first = key()
    assert key(environment={"PATH": "/bin", "HF_TOKEN": "x"}) == first
    others = [
        key(executable="/other"),
        key(driver=None),
        key(files=()),
        key(environment={"CUDA_VISIBLE_DEVICES": "0"}),
        key(environment={"LD_LIBRARY_PATH": "/x"}),
        key(environment={"PYTHONPATH": "/x"}),
    ]
    os.utime(torch / "version.py", ns=(2, 2))
    others.append(key())
    boot.write_text("b2")
    others.append(key())
    assert len({tuple(parts) for parts in [first, *others]}) == len(others) + 1
