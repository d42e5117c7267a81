"""Rules of users: from a file, from a package, and what is said of nonsense."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_doctor import Workload
from vlm_doctor.cli import main
from vlm_doctor.errors import ModelError, UsageError
from vlm_doctor.planner.layer_work import coefficient_of
from vlm_doctor.planner.vision_work import tower_coefficient
from vlm_doctor.sources import user_families
from vlm_doctor.sources.model_files import load_profile
from vlm_doctor.sources.user_families import families_of_user, family_of_package

Write = Callable[..., Path]
PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("tomllib") is None, reason="Python 3.10 may lack tomli")

CONFIG = {
    "model_type": "my_vlm",
    "architectures": ["MyVlm"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "vision_config": {
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 28,
    },
}
TENSORS = {
    "tower.embed.weight": ("F16", [4, 4]),
    **{f"tower.stack.{n}.mlp.fc1.weight": ("F16", [6, 4]) for n in range(2)},
    "bridge.up.weight": ("F16", [8, 4]),
    "net.tokens.weight": ("F16", [32, 8]),
    **{f"net.blocks.{n}.mlp.up_proj.weight": ("F16", [16, 8]) for n in range(3)},
    "net.norm.weight": ("F16", [8]),
    "lm_head.weight": ("F16", [32, 8]),
}


def file(folder: Path, text: str) -> Path:
    path = folder / "families.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as raised:
        families_of_user(path)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_the_example_of_the_page_describes_its_model(
    write_checkpoint: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(CONFIG, TENSORS, folder=tmp_path / "model")
    without = load_profile(str(folder))
    assert not any(unit.role == "vision" for unit in without.units)

    found = load_profile(str(folder), families=file(tmp_path, EXAMPLE))
    assert [(unit.key, unit.role) for unit in found.units] == [
        ("model.tower", "vision"),
        ("bridge", "projector"),
        ("model.text.tokens", "embedding"),
        ("model.text.rope", "other"),
        *((f"model.text.layers.{n}", "layer") for n in range(3)),
        ("model.text.norm", "norm"),
        ("lm_head", "head"),
    ]
    assert [part.key for part in found.units[0].parts] == [
        "model.tower.embed", "model.tower.rope", "model.tower.stack.0", "model.tower.stack.1",
    ]  # fmt: skip
    assert found.stored_bytes == without.stored_bytes
    assert found.image is not None
    assert (found.image.kind, found.image.extra_tokens) == ("merge", 2)
    assert found.text_multiples == (3.0, 3.1)
    text, vision = coefficient_of(found), tower_coefficient(found)
    assert (text.intermediate_multiple, text.hidden_multiple) == (3.0, 3.1)
    assert (vision.intermediate_multiple, vision.hidden_multiple) == (3.0, 4.0)
    assert "your own rules" in text.text
    assert Workload().images
    monkeypatch.setenv("VLM_DOCTOR_FAMILIES", str(tmp_path / "families.toml"))
    assert load_profile(str(folder)) == found


def test_plan_and_check_map_take_the_file(
    write_checkpoint: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(CONFIG, TENSORS, folder=tmp_path / "model")
    own = str(file(tmp_path, EXAMPLE))
    (tmp_path / "map.json").write_text('{"": 0}', encoding="utf-8")
    monkeypatch.setenv("VLM_DOCTOR_FAMILIES", str(tmp_path / "nowhere.toml"))

    def answered(*words: str) -> Any:
        with pytest.raises(SystemExit) as caught:
            main([*words, "--machine", "2xL4", "--json", "--families", own])
        assert caught.value.code == 0
        return json.loads(capsys.readouterr().out)

    assert answered("plan", str(folder))["plan"]["stages"][0]["keys"][0] == "model.tower"
    best = answered("check-map", str(tmp_path / "map.json"), "--model", str(folder))["map_check"]["best"]
    assert best["stages"][0]["keys"][0] == "model.tower"


def test_the_name_of_the_class_and_built_in_families_work_too(write_checkpoint: Write, tmp_path: Path) -> None:
    folder = write_checkpoint(CONFIG, TENSORS, folder=tmp_path / "model")
    found = load_profile(str(folder), families=file(tmp_path, EXAMPLE.replace("my_vlm", "MyVlm")))
    assert found.units[0].key == "model.tower"
    folder = write_checkpoint(folder=tmp_path / "llava")
    plain = load_profile(str(folder))
    changed = load_profile(str(folder), families=file(tmp_path, "[families.llava]\nis_tower_whole = true"))
    assert plain.units[0].parts
    assert not changed.units[0].parts
    assert [unit.key for unit in changed.units] == [unit.key for unit in plain.units]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", "is not TOML (Expected '=' after a key in a key/value pair (at end of document)); docs/models.md shows one."),
        ("", "Object missing required field `families`; docs/models.md shows one."),
        ("families = 3", "Expected `object`, got `int` - at `$.families`; docs/models.md shows one."),
        ("[families.x]\nrename = []", "families.x: Object contains unknown field `rename`; docs/models.md shows one."),
        ("families.x = 1", "Expected `object`, got `int` - at `$.families[...]`; docs/models.md shows one."),
        (
            "[families.x]\nvision = ['']",
            "families.x: Expected `str` of length >= 1 - at `$.vision[0]`; docs/models.md shows one.",
        ),
        (
            "[families.x]\ntext_multiples = [nan, 1.0]",
            "families.x: Expected `float` > 0.0 - at `$.text_multiples[0]`; docs/models.md shows one.",
        ),
        (
            "[families.x.image]\nkind = 'big'",
            "families.x: Invalid enum value 'big' - at `$.image.kind`; docs/models.md shows one.",
        ),
        (
            "[families.x]\nrenames = [['a..b', 'c']]",
            "families.x: renames has 'a..b' to 'c', which are not dotted names with at most one #; "
            "docs/models.md shows one.",
        ),
        (
            "[families.x]\nrenames = [['a', 'c.#']]",
            "families.x: renames has 'a' to 'c.#', which are not dotted names with at most one #; "
            "docs/models.md shows one.",
        ),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    assert refusal(file(tmp_path, text)) == expected


def test_a_file_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path / "nowhere.toml") == "no such file; correct --families or VLM_DOCTOR_FAMILIES."
    path = file(tmp_path, "")
    path.write_bytes(b"\xff")
    assert refusal(path) == "is not UTF-8 text (byte 0); save it as UTF-8."
    monkeypatch.setattr(user_families, "MAX_BYTES", 10)
    path.write_bytes(b"#" * 11)
    with pytest.raises(UsageError, match=r" has more than 10 bytes, which is too large for a file of families; correct --"):
        families_of_user(path)
    monkeypatch.setenv("VLM_DOCTOR_FAMILIES", "")
    assert families_of_user() == {}


def entry(value: str, name: str = "my_vlm") -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, user_families.GROUP)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(*points: importlib.metadata.EntryPoint) -> None:
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda **wanted: points if wanted else ())

    return install


RULES = {"layers": "model.text.layers", "renames": [["net.blocks", "model.text.layers"]]}
WRONG = {"layers": 3}


def test_a_package_may_bring_rules(write_checkpoint: Write, tmp_path: Path, install: Callable[..., None]) -> None:
    folder = write_checkpoint(CONFIG, TENSORS, folder=tmp_path / "model")
    install(entry(f"{__name__}:WRONG", "other"), entry(f"{__name__}:RULES"))
    assert "model.text.layers.1" in {unit.key for unit in load_profile(str(folder)).units}
    assert family_of_package("unheard_of") == {}
    # A file outdoes it, and for a family that is built in no package is asked.
    plain = load_profile(str(folder), families=file(tmp_path, "[families.my_vlm]"))
    assert "net.blocks.1" in {unit.key for unit in plain.units}
    install(entry("nowhere:X", "llava"))
    load_profile(str(write_checkpoint(folder=tmp_path / "llava")))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("nowhere.at.all:X", "cannot be loaded (ModuleNotFoundError: No module named 'nowhere'); repair or uninstall its"),
        (f"{__name__}:WRONG", "Expected `str`, got `int` - at `$.layers`; docs/models.md shows one."),
        (f"{__name__}:PAGE", "Expected `object`, got `str`; docs/models.md shows one."),
    ],
)
def test_a_broken_package_is_named(install: Callable[..., None], value: str, expected: str) -> None:
    install(entry(value))
    with pytest.raises(UsageError) as raised:
        family_of_package("my_vlm")
    assert str(raised.value).startswith(f"entry point my_vlm = {value}: {expected}")


SCALARS = st.integers() | st.text("ab#.$", max_size=5) | st.booleans() | st.floats()
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(st.sampled_from(sorted(user_families._Family.__struct_fields__)), VALUES)
def test_any_value_gives_rules_or_a_usage_error(write_checkpoint: Write, tmp_path: Path, field: str, value: Any) -> None:
    text = f"[families.llava]\n{field} = {repr(value).replace('True', 'true').replace('False', 'false')}"
    path = file(tmp_path, text)
    folder = tmp_path / "model"
    if not folder.exists():
        write_checkpoint(folder=folder)
    with suppress(UsageError, ModelError):
        load_profile(str(folder), families=os.fspath(path))
