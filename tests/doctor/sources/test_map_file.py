"""Maps as people have them, and everything that is no map: one sentence, in bounded time."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.errors import MapError
from vlm_doctor.sources.map_dict import MAX_KEYS
from vlm_doctor.sources.map_file import MAX_MAP_BYTES, MapText, parse_map, read_map

MAP: dict[str, int | str] = {"model.visual": 0, "model.language_model.layers.0": 1, "lm_head": "cpu"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(MAP), MAP),
        (str(MAP), MAP),
        ("device_map = {'a': 0, 'b': 'disk',}", {"a": 0, "b": "disk"}),
        ("OrderedDict({'a': 0})", {"a": 0}),
        ("OrderedDict([('a', 0), ('b', device(type='cpu')),\n ('', 'cuda:1')])", {"a": 0, "b": "cpu", "": "cuda:1"}),
        ("device_map = collections.OrderedDict([('a', 0)])", {"a": 0}),
        ("[('a', 0),]", {"a": 0}),
        ("# of the old machine\n\n# {'b': 1}\n{'a': 0}", {"a": 0}),
        ("{'a': device(type='cuda', index=1), 'b': torch.device('cuda:2'), 'c': device(type='cpu')}",
         {"a": "cuda:1", "b": "cuda:2", "c": "cpu"}),
        ("{'a': 0,  # the tower\n 'b': 1}", {"a": 0, "b": 1}),
        ("a.b: 0\nc: cuda:1  # head\n'd': \"cpu\"\n", {"a.b": 0, "c": "cuda:1", "d": "cpu"}),
        ("---\n# mine\ndevice_map:\n  a: 0\n  '': 1\n...\n", {"a": 0, "": 1}),
        ('{"": "0"}', {"": "0"}),
        ("{'a': -1}", {"a": -1}),
        ('{"hf_device_map": {"a": 1}}', {"a": 1}),
        ("\ufeff".lstrip("\ufeff") + '{"a": 0}', {"a": 0}),
    ],
)  # fmt: skip
def test_all_spellings_give_the_same_map(text: str, expected: dict[str, int | str]) -> None:
    assert parse_map(text, where="map") == MapText(expected)


@pytest.mark.parametrize(
    ("text", "expected", "visible"),
    [
        ("import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '1,0'\n\ndevice_map = {\n  'a': 0,\n"
         "  **{f\"b.{i}\": 0 for i in range(2)},\n"
         "  **{'c.' + str(i): \"cpu\" for i in range(3, 5)},\n}\nmodel = load(device_map)\n",
         {"a": 0, "b.0": 0, "b.1": 0, "c.3": "cpu", "c.4": "cpu"}, "1,0"),
        ("device_map = {**{f'b.{n}': 1 for n in range(1)}}", {"b.0": 1}, None),
        ("model: x\nenvironment:\n  CUDA_VISIBLE_DEVICES: \"2\"\n"
         "device_map:  # here\n  a: 0\n\n  b: 1\nmax_memory:\n  0: 5\n",
         {"a": 0, "b": 1}, "2"),
        ("x: [1, 2]\ndevice_map:\n  a: 0", {"a": 0}, None),
        ("device_map = {'a': 0}\nmodel = load(device_map)\n", {"a": 0}, None),
        ("def f():\n    device_map: dict[str, int] = {\n        # tower\n        'a': 0,\n"
         "        # layers\n        **{f'b.{i}': 1 for i in range(1)},\n    }\n    return device_map\n",
         {"a": 0, "b.0": 1}, None),
        ("import os\nos.environ['CUDA_VISIBLE_DEVICES'] = \"2, 3\"\ndevice_map = {'a': 0}", {"a": 0}, "2, 3"),
        ("import os\n# os.environ['CUDA_VISIBLE_DEVICES'] = '2'\ndevice_map = {'a': 0}", {"a": 0}, None),
        ("env:\n  CUDA_VISIBLE_DEVICES: 2,3  # two\ndevice_map:\n  a: 0\n", {"a": 0}, "2,3"),
        ("{'a': 0}  # all of it\n# no more", {"a": 0}, None),
        ("from x import y\ndevice_map = OrderedDict([('a', 0)])\nmodel = y(device_map)", {"a": 0}, None),
    ],
)  # fmt: skip
def test_a_map_is_found_in_a_script_and_among_other_keys(
    text: str, expected: dict[str, int | str], visible: str | None
) -> None:
    assert parse_map(text, where="map") == MapText(expected, visible=visible)


def test_a_plan_says_which_gpus_its_numbers_mean() -> None:
    report = {"plan": {"device_map": {"a": 0, "b": 1}, "stages": [{"gpu": 3}, {"gpu": 1}]}}

    assert parse_map(json.dumps(report), where="plan") == MapText({"a": 0, "b": 1}, (3, 1))
    assert parse_map(json.dumps({"map_check": {"device_map": {"a": 0}, "gpus": [2]}}), where="map").gpus == (2,)


@pytest.mark.parametrize("stages", [[{"gpu": 1}, {"gpu": 1}], [{"gpu": "1"}], [3], "x", []])
def test_stages_that_make_no_sense_are_not_followed(stages: Any) -> None:
    assert parse_map(json.dumps({"plan": {"device_map": {"a": 0}, "stages": stages}}), where="plan").gpus is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "map is empty; write"),
        ("{}", "map: the map has 0 keys; give one with 1 to 20,000."),
        ("# nothing\n", "map: the map has 0 keys; give one with 1 to 20,000."),
        ('{"a": 0, "a": 1}', "map: the key 'a' stands twice; keep one of them."),
        ("{'a': 0,\n 'a': 1}", "map, line 2, column 2: the key 'a' stands twice; keep one of them."),
        ("a: 0\nb: 1\na: 2", "map, line 3, column 1: the key 'a' stands twice; keep one of them."),
        ("{'a': 0 'b': 1}", "map, line 1, column 9: ',' is expected, and \"'b': 1}\" is there; write"),
        ("{'a' 0}", "map, line 1, column 6: ':' is expected, and '0}' is there; write"),
        ("{0: 0}", "map, line 1, column 3: a module name in quotation marks is expected, and ': 0}' is there; write"),
        ("{'a': f(0)}", "map, line 1, column 7: a text or a whole number is expected, and 'f(0)}' is there; write"),
        ("{'a': 0} + x", "map, line 1, column 10: the end is expected, and '+ x' is there; write"),
        ("{'a': 0", "map, line 1, column 8: ',' is expected, and the end is there; write"),
        ("OrderedDict([('a', 0, 1)])", "map, line 1, column 21: ')' is expected, and ', 1)])' is there; write"),
        ("OrderedDict([(0, 0)])", "map, line 1, column 16: a module name in quotation marks is expected, and"),
        ("{**x}", "map, line 1, column 2: a text or a whole number is expected, and '**x}' is there; write"),
        ("import os\ndevice_map = {'a' 0}", "map, line 2, column 19: ':' is expected, and '0}' is there; write"),
        ("a: x\ndevice_map:\n  b\n", "map, line 3: 'b' is not 'module: device'; write"),
        ("a 0", "map, line 1: 'a 0' is not 'module: device'; write"),
        ("a:\nb: 1", "map, line 1: 'a' has no device; write the number of a GPU, cpu or disk behind the colon."),
        ('{"a": [1]}', "map: the device of 'a' is a list; write the number of a GPU, cpu or disk."),
        ('{"a": true}', "map: the device of 'a' is true; write the number of a GPU, cpu or disk."),
        ('{"a": 1.5}', "map: the device of 'a' is 1.5; write the number of a GPU, cpu or disk."),
        ('{"a": {"b": 0}}', "map: the device of 'a' is a nested object; write the number of a GPU, cpu or disk."),
        ('{"a": 10000}', "map: the device of 'a' is out of range; write the number of a GPU."),
        ('{"a b": 0}', "map: 'a b' is not the name of a module; write"),
        ('{"plan": {"device_map": {}}}',
         "map: its device_map is empty, as that of a plan that does not fit; there is nothing to judge."),
    ],
)  # fmt: skip
def test_what_is_no_map_is_one_sentence_with_its_place(text: str, message: str) -> None:
    with pytest.raises(MapError) as refused:
        parse_map(text, where="map")
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' + "[" * 200_000,
        "{" + "#x   \n" * 5_000 + "?",
        "{'a': 0}" + " " * 100_000 + "?",
        "{'a': 0}" + " # #" * 30_000 + "\n?",
        "device_map:" + " " * 100_000 + "= [",
        "CUDA_VISIBLE_DEVICES=" * 50_000 + "'",
        "{'" + "\\" * 100_000,
        "{'a': " + "9" * 100_000 + "}",
        '{"a": ' + "9" * 100_000 + "}",
        "a: " + " " * 100_000 + "'",
        "a" * 1_000_000,
        "{" + "**{f'a{i}': 0 for i in range(99999)}, " * 50_000 + "}",
        "device_map: \n" * 300_000,
        "OrderedDict([" + "('a', 0), " * 50_000 + "])",
        "OrderedDict(" + " " * 100_000 + "x",
        "# \n" * 100_000 + "?",
        "{" + ", ".join(f"'k{n}': 0" for n in range(MAX_KEYS + 1)) + "}",
        "\n".join(f"k{n}: 0" for n in range(MAX_KEYS + 1)),
        json.dumps({f"k{n}": 0 for n in range(MAX_KEYS + 1)}),
    ],
)
def test_hostile_text_is_refused_in_bounded_time(text: str) -> None:
    started = time.process_time()
    with pytest.raises(MapError):
        parse_map(text, where="map")
    assert time.process_time() - started < 5


@given(st.dictionaries(st.text("abz019._-", max_size=20), st.integers(-1, 9999) | st.sampled_from(["cpu", "cuda:3"])))
def test_what_python_and_json_print_is_read_back(device_map: dict[str, int | str]) -> None:
    pairs = f"OrderedDict({list(device_map.items())})"
    for text in (str(device_map), pairs, json.dumps(device_map), json.dumps(device_map, indent=1)):
        if device_map:
            found = parse_map(text, where="map").device_map
            assert found == device_map or set(device_map) & {"device_map", "plan", "hf_device_map", "map_check"}


@given(st.text(max_size=60))
def test_any_text_is_a_map_or_a_sentence(text: str) -> None:
    with contextlib.suppress(MapError):
        assert parse_map(text, where="map").device_map


def test_a_file_and_standard_input_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(MAP), encoding="utf-8-sig")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"lm_head: 1")))

    lines = tmp_path / "map.yaml"
    lines.write_bytes(b"device_map:\r\n  a: 0\r\nother: x\r\n")

    assert read_map(str(path)).device_map == MAP
    assert read_map(str(lines)).device_map == {"a": 0}
    assert read_map("-").device_map == {"lm_head": 1}


def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big, binary = tmp_path / "big", tmp_path / "binary"
    with big.open("wb") as file:
        file.truncate(MAX_MAP_BYTES + 1)
    binary.write_bytes(b"{\xff")
    monkeypatch.setattr("sys.stdin", None)
    for name, words in (
        (str(tmp_path), "is a folder; name a device_map in it."),
        (str(tmp_path / "none"), "no such file; name the file of a device_map, or - for standard input."),
        (str(big), f"has more than {MAX_MAP_BYTES:,} bytes, which is too large for a device_map"),
        (str(binary), "is not UTF-8 text (byte 1); save the map as UTF-8."),
        ("/dev/null", "is not a regular file; name the file of a device_map, or - for standard input."),
        ("a\0b", "cannot be read (embedded null byte); name the file of a device_map, or - for standard input."),
        ("x" * 5000, "cannot be read (File name too long); correct the name."),
        ("-", "standard input is empty;"),
        (" ", "The name of the map is empty; name the file of a device_map, or - for standard input."),
    ):
        with pytest.raises(MapError, match=r"(?s).*") as refused:
            read_map(name)
        assert words in str(refused.value)
