from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_doctor.errors import ModelError, ModelFileError, ModelNotFoundError
from vlm_doctor.sources import checkpoint_folder
from vlm_doctor.sources.model_files import load_profile

from .conftest import LLAVA_CONFIG

Write = Callable[..., Path]


def refusal(name: object) -> str:
    """Why a model is refused; the folder in front of the name of a file is left out."""
    with pytest.raises(ModelError) as raised:
        load_profile(str(name), allow_network=False)
    message = str(raised.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert not Path(str(name)).is_dir() or str(name) in message
    return message.removeprefix(f"{name}/").removeprefix(f"{name}: ")


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_folder_gives_the_same_units_however_it_is_sharded(write_checkpoint: Write, tmp_path: Path, shards: int) -> None:
    whole = load_profile(str(write_checkpoint(folder=tmp_path / "whole")))
    cut = load_profile(str(write_checkpoint(folder=tmp_path / "cut", shards=shards)))
    assert cut.units == whole.units
    assert cut.origin == "checkpoint"
    assert cut.name == str(tmp_path / "cut")
    assert len(cut.files) == shards
    assert cut.notes == ()


def test_bytes_are_those_of_the_headers(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert load_profile(str(folder)).stored_bytes == size - 8 - header


def test_home_is_followed(write_checkpoint: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(folder=tmp_path / "llava")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_profile("~/llava").name == str(tmp_path / "llava")


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == "there is no such folder; correct the path, or give a hub id (org/name)."


def test_a_file_is_no_folder(write_checkpoint: Write) -> None:
    path = write_checkpoint() / "config.json"
    assert refusal(path) == "is a file; name the folder that holds config.json and the safetensors files."


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(name: str) -> None:
    assert refusal(name) == "The name of the model is empty; give a folder, a catalogue name or a hub id (org/name)."


@pytest.mark.parametrize("name", ["~nobody-at-all/x", "/" + "x" * 5000, "a\0b/c"])
def test_a_name_that_cannot_be_a_path_is_not_found(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        load_profile(name, allow_network=False)


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "has no config.json; name the folder of a checkpoint."


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("[1]", "config.json: is not a JSON object; download it again."),
        ("", "config.json: is not JSON (Expecting value: line 1 column 1 (char 0)); download it again."),
        ({}, "config.json has no model_type; use the config.json that belongs to this checkpoint."),
        ({"model_type": "new"}, "config.json has no architectures; use the config.json that belongs to this checkpoint."),
    ],
)
def test_a_config_that_is_none_is_refused(write_checkpoint: Write, config: Any, expected: str) -> None:
    assert refusal(write_checkpoint(config)) == expected


def test_a_deeply_nested_config_is_refused(write_checkpoint: Write) -> None:
    assert refusal(write_checkpoint("[" * 200_000)).startswith("config.json: is not JSON (")


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_config_without_a_needed_key_names_it(write_checkpoint: Write, llava_config: dict[str, Any], key: str) -> None:
    llava_config["text_config"]["model_type"] = "unheard_of"
    del llava_config["text_config"][key]
    expected = f"config.json has no text_config.{key}; use the config.json that belongs to this checkpoint."
    assert refusal(write_checkpoint(llava_config)) == expected


@pytest.mark.parametrize("value", ["8", -8, 0, 2**31, True, 1.5, [8, 9], {}, float("nan")])
def test_a_dimension_that_is_no_number_is_refused(
    write_checkpoint: Write, llava_config: dict[str, Any], value: Any
) -> None:
    llava_config["text_config"]["hidden_size"] = value
    message = refusal(write_checkpoint(llava_config))
    assert message.startswith("config.json: text_config.hidden_size is ")
    assert message.endswith(", not a positive integer; correct it.")


def test_a_config_part_that_is_no_object_is_refused(write_checkpoint: Write, llava_config: dict[str, Any]) -> None:
    llava_config["text_config"] = [1]
    assert refusal(write_checkpoint(llava_config)) == (
        "config.json: text_config is not a JSON object; use the config.json that belongs to this checkpoint."
    )


def test_a_config_of_another_width_is_refused(write_checkpoint: Write, llava_config: dict[str, Any]) -> None:
    llava_config["text_config"]["hidden_size"] = 16
    assert refusal(write_checkpoint(llava_config)) == (
        "config.json says hidden_size 16 and the embedding is 8 wide; use the config.json that belongs to this checkpoint."
    )


def test_a_checkpoint_with_fewer_layers_than_promised_is_incomplete(
    write_checkpoint: Write, llava_config: dict[str, Any]
) -> None:
    llava_config["text_config"]["num_hidden_layers"] = 2**31 - 1
    assert refusal(write_checkpoint(llava_config)) == (
        "config.json promises 2147483647 text layers and the checkpoint lacks number 12; complete the download, "
        "or use the config.json that belongs to this checkpoint."
    )


def test_more_layers_than_promised_are_noted(write_checkpoint: Write, llava_config: dict[str, Any]) -> None:
    llava_config["text_config"]["num_hidden_layers"] = 11
    profile = load_profile(str(write_checkpoint(llava_config)))
    assert profile.notes == ("The checkpoint stores 12 text layers, config.json names 11: all are counted.",)


def test_a_file_that_only_claims_to_be_torchs_is_refused(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder) == "pytorch_model.bin: is no file of torch.save; download it again."


def test_no_weights_at_all_are_an_incomplete_download(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == "has config.json but no safetensors file; complete the download."


def test_a_single_file_of_another_name_is_read_and_noted(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    (folder / "model.safetensors").rename(folder / "llava.safetensors")
    assert load_profile(str(folder)).notes == (
        "llava.safetensors is read as the checkpoint; transformers looks for model.safetensors.",
    )


def test_shards_without_an_index_are_an_incomplete_download(write_checkpoint: Write) -> None:
    folder = write_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    expected = "has 2 safetensors files and no model.safetensors.index.json; complete the download."
    assert refusal(folder) == expected


def test_a_shard_that_the_index_lists_must_be_there(write_checkpoint: Write) -> None:
    folder = write_checkpoint(shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert (
        refusal(folder) == f"{shard.name}: is missing, though model.safetensors.index.json lists it; complete the download."
    )


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "a\\..\\x", "C:x", "", ".", "a//b", "x\n"]
)
def test_an_index_may_not_lead_out_of_the_folder(write_checkpoint: Write, name: str) -> None:
    folder = write_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    assert refusal(folder) == (
        f"model.safetensors.index.json: lists the file {name!r}, which is not a name inside the folder; do not trust it."
    )


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_weight_map_is_refused(write_checkpoint: Write, index: str) -> None:
    folder = write_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    assert refusal(folder) == "model.safetensors.index.json: has no weight_map from tensors to files; download it again."


def test_a_tensor_in_two_shards_is_refused(write_checkpoint: Write) -> None:
    folder = write_checkpoint(shards=2)
    (folder / "model-00002-of-00002.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    assert refusal(folder) == (
        "model-00002-of-00002.safetensors: holds tensor 'language_model.model.embed_tokens.weight', which "
        "model-00001-of-00002.safetensors holds too; download both again."
    )


def test_a_checkpoint_without_tensors_is_refused(write_checkpoint: Write) -> None:
    folder = write_checkpoint(tensors={})
    assert refusal(folder) == "its files hold no tensors; download the checkpoint again."


@pytest.mark.parametrize("name", ["a..b", ".a", "a.", ""])
def test_a_tensor_that_is_not_named_like_a_parameter_is_refused(write_checkpoint: Write, name: str) -> None:
    assert refusal(write_checkpoint(tensors={name: ("F32", [1])})) == (
        f"tensor {name!r} is not named like a parameter of a model; convert the checkpoint."
    )


def test_the_processor_narrows_the_bounds_on_pixels(write_checkpoint: Write) -> None:
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "vision_config": {"depth": 1, "embed_dim": 4, "num_heads": 2},
    }
    tensors = {
        "visual.blocks.0.mlp.fc1.weight": ("BF16", [16, 4]),
        "model.embed_tokens.weight": ("BF16", [32, 8]),
        "model.layers.0.mlp.up_proj.weight": ("BF16", [16, 8]),
    }
    folder = write_checkpoint(config, tensors)
    bounds = []
    for processor in (None, '{"min_pixels": 100, "max_pixels": 5000}', '{"size": {"longest_edge": 700}}', "not json", "[]"):
        if processor is not None:
            (folder / "preprocessor_config.json").write_text(processor, encoding="utf-8")
        image = load_profile(str(folder)).image
        assert image is not None
        bounds.append((image.min_pixels, image.max_pixels))
    assert bounds == [(3136, 12845056), (100, 5000), (3136, 3136), (3136, 12845056), (3136, 12845056)]


def test_an_index_that_cannot_be_read_is_refused(write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(shards=2)
    index = folder / "model.safetensors.index.json"
    monkeypatch.setattr(checkpoint_folder, "MAX_JSON_BYTES", 3000)
    index.write_bytes(b" " * 3001)
    assert refusal(folder) == f"{index.name}: more than 3,000 bytes are no model.safetensors.index.json; download it again."
    index.unlink()
    index.mkdir()
    assert refusal(folder) == f"{index.name}: not a regular file; download it again."
    monkeypatch.setattr(Path, "is_file", lambda path: path == folder / "config.json" or path == index)
    assert refusal(folder) == f"{index.name}: not a regular file; download it again."


def test_nothing_but_a_model_error_leaves(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelFileError):
        load_profile(str(tmp_path))


def test_half_a_character_in_the_config_is_refused(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    (folder / "config.json").write_text('{"model_type": "\\ud800"}')

    assert refusal(folder).startswith("config.json: is not JSON (")


def test_a_whole_character_written_as_two_halves_is_well(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "\U0001f600"}))

    assert load_profile(str(folder)).units


def test_a_shard_with_a_name_that_no_disk_takes_is_refused(write_checkpoint: Write) -> None:
    folder = write_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))

    assert refusal(folder) == "cannot be read (File name too long); correct the name."


HUGE = "1" + "0" * 30


@pytest.mark.parametrize("text", ["1e999", "NaN", "-Infinity", HUGE, "-" + HUGE, '"12"', "[12, 13]", "{}", "true", "1.5"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "num_attention_heads"])
def test_a_number_that_is_none_is_named(write_checkpoint: Write, key: str, text: str) -> None:
    config = json.dumps({**LLAVA_CONFIG, "text_config": {**LLAVA_CONFIG["text_config"], key: "@"}}).replace('"@"', text)
    message = refusal(write_checkpoint(config))
    assert message.startswith(f"config.json: text_config.{key} is ")
    assert message.endswith(", not a positive integer; correct it.")


@pytest.mark.parametrize(
    ("config", "flaw"),
    [
        ('{"a": ' + "9" * 5000 + "}", "is not JSON (a number in it is too long); download it again."),
        ('{"a": ' + "[" * 100_000, "is not JSON (it is nested too deeply); download it again."),
        ("[1", "is not JSON (Expecting ',' delimiter: line 1 column 3 (char 2)); download it again."),
        ("version https://git-lfs.github.com/spec/v1\n",
         "is a pointer of Git LFS, not the file itself; fetch that with git lfs pull."),
    ],
)  # fmt: skip
def test_what_is_no_json_is_said_without_the_words_of_python(write_checkpoint: Write, config: str, flaw: str) -> None:
    assert refusal(write_checkpoint(config)) == f"config.json: {flaw}"


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        ('{"base_model_name_or_path": " "}', ""),
        ('{"base_model_name_or_path": "org/vlm"}', " of org/vlm"),
        ('{"base_model_name_or_path": "a\\nb"}', ""),
        ('{"base_model_name_or_path": 5}', ""),
        ("[]", ""),
    ],
)
def test_an_adapter_is_no_model(tmp_path: Path, adapter: str, named: str) -> None:
    (tmp_path / "adapter_config.json").write_text(adapter)
    assert refusal(tmp_path) == f"holds an adapter{named} and no model; name the model that it belongs to."


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("target", ["itself", "/dev/zero", "/dev/stdin", ".", "nowhere"])
def test_a_link_to_anything_but_a_file_is_refused(write_checkpoint: Write, name: str, target: str) -> None:
    folder = write_checkpoint()
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name if target == "itself" else target)
    assert refusal(folder).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            "model.gguf",
            "has 'model.gguf' but no safetensors file, nor pytorch_model.bin; name a checkpoint of transformers.",
        ),
        ("notes.txt", "has config.json but no safetensors file; complete the download."),
    ],
)
def test_weights_of_another_format_are_named(write_checkpoint: Write, other: str, words: str) -> None:
    folder = write_checkpoint()
    (folder / "model.safetensors").rename(folder / other)
    assert refusal(folder) == words


@pytest.mark.parametrize("content", [b"[", b"null", b"\xff", None])
def test_settings_of_images_that_cannot_be_read_are_told(write_checkpoint: Write, content: bytes | None) -> None:
    folder = write_checkpoint()
    path = folder / "preprocessor_config.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    told = [note for note in load_profile(str(folder)).notes if note.startswith("preprocessor_config.json is left out, ")]
    assert len(told) == 1
    assert told[0].endswith("; download it again.")


def test_a_damaged_file_is_named_with_its_model(write_checkpoint: Write) -> None:
    folder = write_checkpoint("[]")
    with pytest.raises(ModelError, match=re.escape(f"{folder}/config.json: is not a JSON object; download it again.")):
        load_profile(f"{folder}/")


def test_a_link_out_of_the_folder_shows_nothing_of_what_it_names(write_checkpoint: Write, tmp_path: Path) -> None:
    folder = write_checkpoint(folder=tmp_path / "model")
    secret = tmp_path / "secret"
    secret.write_text("password of somebody", encoding="utf-8")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
        assert "password" not in refusal(folder)
        folder = write_checkpoint(folder=tmp_path / "other")


def test_an_index_that_lists_itself_is_refused(write_checkpoint: Write) -> None:
    folder = write_checkpoint(shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}), encoding="utf-8")
    assert refusal(folder).startswith(f"{index.name}: not a safetensors file, its header would have ")


def test_json_of_more_values_than_any_checkpoint_has_is_not_decoded(write_checkpoint: Write) -> None:
    folder = write_checkpoint('{"a": [' + "[]," * 2_000_001 + "[]]}")
    assert refusal(folder) == "config.json: more than 2,000,000 values are no config.json; download it again."
    (write_checkpoint() / "model.safetensors").write_bytes((8_000_012).to_bytes(8, "little") + b"," * 8_000_012)
    assert refusal(folder) == (
        "model.safetensors: its header has more than 4,000,000 values, as no checkpoint; download it again."
    )


def test_a_key_given_twice_counts_once_or_leaves_a_hole(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    entry = '"a":{"dtype":"U8","shape":[4],"data_offsets":[%d,%d]}'
    header = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert refusal(folder) == "model.safetensors: tensor 'a' leaves a hole before it; download it again."
