"""pytorch_model.bin: what torch.save wrote is described exactly, and what it would run is not run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlm_doctor.errors import ModelError, ModelFileError
from vlm_doctor.sources import tensor_pickle
from vlm_doctor.sources.checkpoint import StoredTensor
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.sources.tensor_pickle import tensors_of_pickle
from vlm_doctor.sources.torch_archive import TorchFile, read_torch_file

from .conftest import LLAVA_CONFIG, llava_tensors

F4 = "torch FloatStorage"
BAD_SHAPE = "its pickle is damaged (a tensor has no valid shape); download it again."


def program(*, name: str = "a", storage: str = F4, key: str = "0", count: int = 6, shape: str = "K\x02K\x03\x86") -> bytes:
    """What torch.save writes for a state dict of one tensor, in torch's own instructions."""
    head, tail = storage.split(" ")
    return (
        b"\x80\x02ccollections\nOrderedDict\n)R("
        + b"X" + len(name).to_bytes(4, "little") + name.encode()
        + b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage" + f"c{head}\n{tail}\n".encode()
        + b"X" + len(key).to_bytes(4, "little") + key.encode() + b"X\x03\x00\x00\x00cpuJ"
        + count.to_bytes(4, "little", signed=True)
        + b"tQK\x00" + shape.encode("latin-1") + b"K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtRu."
    )  # fmt: skip


def archive(path: Path, data: bytes | None = None, storages: dict[str, int] | None = None, **changes: Any) -> Path:
    with zipfile.ZipFile(path, "w", changes.get("compression", zipfile.ZIP_STORED)) as file:
        if data is None or data:
            file.writestr("m/data.pkl", program() if data is None else data)
        for key, size in ({"0": 24} if storages is None else storages).items():
            file.writestr(f"m/data/{key}", bytes(size))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as raised:
        read_torch_file(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_one_tensor_is_described(tmp_path: Path) -> None:
    assert read_torch_file(archive(tmp_path / "x.bin")) == TorchFile({"a": StoredTensor("F32", (2, 3), 24)}, {})


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch EVIL",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_is_named_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "x.bin", pickle.dumps({"a": _Evil()}, protocol=protocol))
    assert refusal(path) == (
        f"x.bin: its pickle calls for '{os.system.__module__}.system', which no plain checkpoint does; do not load it "
        "unless you trust its origin, and then convert it to safetensors."
    )
    assert not (tmp_path / "EVIL").exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is an archive without data.pkl, so no file of torch.save; download it again."),
        (b"\x80\x02", "its pickle is damaged (pickle exhausted before seeing STOP); download it again."),
        (b"\x80\x02.", "its pickle is damaged (pop from empty list); download it again."),
        (b"\x80\x02}.", "is no state dict, a mapping from names to tensors; save the model with save_pretrained."),
        (b"\x80\x02K\x01.", "is no state dict, a mapping from names to tensors; save the model with save_pretrained."),
        (b"\x80\x02h\x05.", "its pickle is damaged (5); download it again."),
        (b"\x80\x02K\x01K\x02u.", "its pickle is damaged (pop from empty list); download it again."),
        (b"\x80\x02(]K\x01a]u.", "its pickle is damaged (list index out of range); download it again."),
        (b"\x80\x02}(]K\x01u.", "its pickle is damaged (a key is no text); download it again."),
        (b"\x80\x02](K\x01K\x02u.", "its pickle is damaged (it fills what is no dict); download it again."),
        (b"\x80\x02}(K\x01e.", "its pickle is damaged (it fills what is no list); download it again."),
        (b"\x80\x02K\x01)R.", "its pickle is damaged (it calls what is no name); download it again."),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "its pickle is damaged (it calls torch.FloatStorage); download it again."),
        (b"\x80\x02(K\x01Q.", "its pickle is damaged (cannot unpack non-iterable int object); download it again."),
        (
            b"\x80\x02(i__main__\nX\n.",
            "its pickle uses INST, which no plain checkpoint does; do not trust it, or convert it to safetensors.",
        ),
        (program(storage="torch Size"), "its pickle is damaged ('Size'); download it again."),
        (program(count=-1), "its pickle is damaged (it describes no storage); download it again."),
        (program(shape="K\x02\x85"), BAD_SHAPE),
        (program(name="a\nb"), "tensor 'a\\nb' has no name of a parameter; convert the checkpoint."),
        (
            program(shape="K\x02J\xff\xff\xff\xff\x86"),
            "its pickle is damaged (a tensor has no valid shape); download it again.",
        ),
        (program(key="../0"), "tensor 'a' has no storage of its size in the archive; download it again."),
        (program(count=7), "tensor 'a' has no storage of its size in the archive; download it again."),
        (program(shape="K\x03K\x03\x86"), "tensor 'a' does not lie inside its storage; download it again."),
    ],
)
def test_a_damaged_pickle_is_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    assert refusal(archive(tmp_path / "x.bin", data)) == f"x.bin: {expected}"


def test_elements_that_repeat_are_refused(tmp_path: Path) -> None:
    data = program(shape="J\x00\x00\x00\x40K\x03\x86").replace(b"K\x03K\x01\x86\x89", b"K\x00K\x01\x86\x89")
    expected = "x.bin: tensor 'a' shows more than its storage holds; save the checkpoint again."
    assert refusal(archive(tmp_path / "x.bin", data)) == expected


def test_an_endless_pickle_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_pickle, "MAX_INSTRUCTIONS", 100)
    assert refusal(archive(tmp_path / "x.bin", b"\x80\x02" + b"N" * 200 + b".")) == (
        "x.bin: its pickle has more than 100 instructions; do not trust it."
    )


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for content, expected in (
        (b"", "x.bin: is no file of torch.save; download it again."),
        (b"<html>", "x.bin: is a web page, not the file itself; download it again."),
        (b"PK\3\4", "x.bin: truncated, the list of its contents is not there; download it again."),
        (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
            "x.bin: is in the format of torch before 1.6, which is not read; load it with torch where you trust its "
            "origin, and save it with save_pretrained.",
        ),
    ):
        path.write_bytes(content)
        assert refusal(path) == expected
    archive(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert refusal(path) == "x.bin: truncated, the list of its contents is not there; download it again."
    path.write_bytes(whole[: -22 + 12] + b"\xff\xff\xff\x7f" + whole[-22 + 16 :])
    assert refusal(path) == "x.bin: the list of its contents would have 2,147,483,647 bytes; download it again."
    archive(path, compression=zipfile.ZIP_DEFLATED)
    assert refusal(path).startswith("x.bin: its data.pkl is compressed")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("m/data.pkl", b"")
    assert refusal(path) == "x.bin: its archive has two entries of one name; do not trust it."


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.bin")
    assert refusal(tmp_path / "x.bin") == f"{tmp_path / 'x.bin'}: not a regular file; download it again."
    assert refusal(tmp_path / "y.bin").endswith("y.bin: cannot be read (No such file or directory); complete the download.")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data())
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = archive(tmp_path / "x.bin")
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with suppress(ModelError):
        assert read_torch_file(path).tensors


@example(b"\\\x00\n", 3)
@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 60))
def test_any_pickle_is_read_or_refused(tail: bytes, keep: int) -> None:
    with suppress(ModelError):
        assert tensors_of_pickle(program()[:keep] + tail, where="x")


def write_folder(folder: Path, config: dict[str, Any], files: dict[str, Any]) -> Path:
    torch = pytest.importorskip("torch")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, contents in files.items():
        torch.save(contents, folder / name)
    return folder


def state_dict() -> OrderedDict[str, Any]:
    torch = pytest.importorskip("torch")
    return OrderedDict((name, torch.zeros(shape, dtype=torch.float16)) for name, (_, shape) in llava_tensors().items())


@pytest.mark.models
def test_a_folder_of_torch_files_is_the_same_model_as_one_of_safetensors(
    tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    state = state_dict()
    same = load_profile(str(write_checkpoint(folder=tmp_path / "safe")))
    (tmp_path / "one").mkdir()
    one = load_profile(str(write_folder(tmp_path / "one", LLAVA_CONFIG, {"pytorch_model.bin": state})))
    assert one.units == same.units
    assert one.files == ("pytorch_model.bin",)

    (tmp_path / "two").mkdir()
    names = list(state)
    parts = {f"pytorch_model-0000{n + 1}-of-00002.bin": {key: state[key] for key in names[n::2]} for n in range(2)}
    folder = write_folder(tmp_path / "two", LLAVA_CONFIG, parts)
    index = {"weight_map": {key: file for file, part in parts.items() for key in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    two = load_profile(str(folder))
    assert {unit.key: unit for unit in two.units} == {unit.key: unit for unit in same.units}
    assert two.files == tuple(parts)
    index["weight_map"]["x"] = "../x.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"two/pytorch_model.bin.index.json: lists the file '../x.bin', which is not"):
        load_profile(str(folder))


@pytest.mark.models
@pytest.mark.parametrize(("ties", "bytes_of_head"), [(True, 0), (False, 512), (None, 512)])
def test_a_shared_tensor_counts_once_unless_the_config_forbids_it(
    tmp_path: Path, ties: bool | None, bytes_of_head: int
) -> None:
    state = state_dict()
    table, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    state[head] = state[table]
    config = {**LLAVA_CONFIG, "tie_word_embeddings": ties}
    config["text_config"] = {**config["text_config"], "tie_word_embeddings": ties}
    found = load_profile(str(write_folder(tmp_path, config, {"pytorch_model.bin": state})))
    assert found.units[-1].key == "lm_head"
    assert found.units[-1].stored_bytes == bytes_of_head
    assert bool(found.tied) == (bytes_of_head == 0)


@pytest.mark.models
def test_every_kind_of_tensor_is_described_exactly(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.zeros(6, 4, dtype=torch.bfloat16)
    kinds = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
             torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16)  # fmt: skip
    state = {
        "base": base,
        "same": base,
        "turned": base.t(),
        "part": base[2:4],
        "parameter": torch.nn.Parameter(torch.zeros(3)),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 3),
        "number": 3,
        **{str(kind): torch.zeros(2, 5).to(kind) for kind in kinds},
    }
    module = torch.nn.BatchNorm1d(3)
    for number, contents in enumerate((state, module.state_dict())):
        path = tmp_path / f"{number}.bin"
        torch.save(contents, path)
        found = read_torch_file(path)
        tensors = {name: value for name, value in contents.items() if isinstance(value, torch.Tensor)}
        assert found.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found.tensors[name].shape == tuple(tensor.shape), name
            assert found.tensors[name].stored_bytes == tensor.numel() * tensor.element_size(), name
        assert found.shared == ({} if number else {"same": "base"})
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.bin").write_bytes(buffer.getvalue())
    assert refusal(tmp_path / "old.bin").startswith("old.bin: is in the format of torch before 1.6")


@pytest.mark.models
def test_what_transformers_saves_and_loads_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("llava", **{k: v for k, v in LLAVA_CONFIG.items() if k.endswith("_config")})
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "safe")
    from safetensors.torch import load_file

    (tmp_path / "torch").mkdir()
    torch.save(load_file(tmp_path / "safe" / "model.safetensors"), tmp_path / "torch" / "pytorch_model.bin")
    (tmp_path / "torch" / "config.json").write_bytes((tmp_path / "safe" / "config.json").read_bytes())
    safe, plain = load_profile(str(tmp_path / "safe")), load_profile(str(tmp_path / "torch"))
    assert {unit.key: unit for unit in plain.units} == {unit.key: unit for unit in safe.units}
    assert sum(parameter.numel() for parameter in model.parameters()) == plain.elements
