from __future__ import annotations

import importlib
import re
from pathlib import Path

import msgspec
import pytest

from vlm_doctor import codes
from vlm_doctor.checks import CHECKS, RETIRED
from vlm_doctor.codes import all_codes, explain, explanation, list_text
from vlm_doctor.data.by_hand import BY_HAND
from vlm_doctor.data.error_codes import ERROR_CODES
from vlm_doctor.errors import UsageError
from vlm_doctor.planner.map_question import TITLES
from vlm_doctor.trial_verdict import TITLES as TRIAL_TITLES

ROOT = Path(__file__).parents[2]
DOCTOR = [f"VLM00{number}" for number in range(1, 7)]
ERRORS = [one.code for one in ERROR_CODES]
MAP = list(TITLES)
TRIAL = list(TRIAL_TITLES)
SECTIONS = [
    "What it checks",
    "Why it matters",
    "Example",
    "How to look by hand",
    "What to do",
    "When it is fine",
    "Sources",
]
GATE = ["VLM701", "VLM702", "VLM703", "VLM704", "VLM705", "VLM706"] + [f"VLM71{n}" for n in range(1, 7)] + ["VLM720"]
LEASES = ["VLM730", "VLM731", "VLM732"]
RUN = [f"VLM74{n}" for n in range(6)]
GUARDS = [f"VLM75{n}" for n in range(5)]


def test_every_check_and_every_verdict_has_a_page() -> None:
    assert list(all_codes()) == sorted(
        [*DOCTOR, *ERRORS, *(check.code for check in CHECKS), *MAP, *TRIAL, *GATE, *LEASES, *RUN, *GUARDS]
    )
    assert all(title and not title.endswith(".") for title in all_codes().values())


def test_pages_about_maps_have_the_titles_of_the_findings() -> None:
    assert {code: all_codes()[code] for code in MAP} == TITLES
    assert {code: all_codes()[code] for code in TRIAL} == TRIAL_TITLES


@pytest.mark.parametrize("code", all_codes())
def test_every_page_has_every_section(code: str) -> None:
    page = explain(code)

    assert page.startswith(f"# {code}: {all_codes()[code]}\n\n")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == SECTIONS, f"{code}: see doctor/data/by_hand.py"
    assert re.search(r"^## .+\n+(?=## |\Z)", page, re.MULTILINE) is None, f"{code}: an empty section"


def test_how_to_look_by_hand_is_about_codes() -> None:
    assert all(re.fullmatch(r"VLM\d{3}", code) and text.endswith(".") for code, text in BY_HAND.items())


def test_a_page_keeps_its_own_way_to_look_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "# VLM001: a\n\n## How to look by hand\nSo.\n\n## What to do\nThis.\n"

    assert codes._with_section(page, "Other.") == page
    assert codes._with_section("no such heading", "Other.") == "no such heading"


@pytest.mark.parametrize("code", all_codes())
def test_every_page_in_its_parts(code: str) -> None:
    parts = msgspec.to_builtins(explanation(code))

    assert (parts["code"], parts["title"]) == (code, all_codes()[code])
    assert parts["summary"]
    assert [key for key in parts if key not in ("code", "title", "summary")] == [
        heading.lower().replace(" ", "_") for heading in SECTIONS
    ]
    for heading in SECTIONS:
        assert f"## {heading}\n{parts[heading.lower().replace(' ', '_')]}" in explain(code)


def test_a_retired_code_has_only_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RETIRED, "VLM998", "Dropped in 0.2.0: VLM997 says it.")

    assert msgspec.to_builtins(explanation("998")) == {
        "code": "VLM998",
        "title": "no longer used",
        "retired": "Dropped in 0.2.0: VLM997 says it.",
    }


def test_the_list_names_every_code() -> None:
    assert re.findall(r"^- (VLM\d{3}): .+$", list_text(), re.MULTILINE) == list(all_codes())


@pytest.mark.parametrize("code", [*GATE, *GUARDS])
def test_pages_of_the_gate_say_what_strictness_changes(code: str) -> None:
    assert "--vlm-strict" in explain(code)


def test_the_plugin_gives_only_codes_that_can_be_explained() -> None:
    given = set(
        re.findall(r'"(VLM\d{3})"', "".join(path.read_text("utf-8") for path in (ROOT / "pytest_vlmgpu").rglob("*.py")))
    )

    assert given
    assert given <= set(all_codes())


def test_codes_that_pages_mention_exist() -> None:
    for code in all_codes():
        assert set(re.findall(r"VLM\d{3}", explain(code))) <= set(all_codes()), code


@pytest.mark.parametrize("spelling", ["VLM501", "vlm501", "501", " 501 "])
def test_a_code_may_be_spelled_loosely(spelling: str) -> None:
    assert explain(spelling).startswith("# VLM501: GPU memory held by other processes\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("VLM51", "There is no code 'VLM51'; name one of VLM510 to VLM512, which vlm-doctor explain lists."),
        ("vlm5", "There is no code 'vlm5'; name one of VLM501 to VLM512, which vlm-doctor explain lists."),
        ("VML403", "There is no code 'VML403'; did you mean VLM403?"),
        ("VLM999", "There is no code 'VLM999'; codes are VLM and three digits, such as VLM501."),
        ("", "There is no code ''; codes are VLM and three digits, such as VLM501."),
        ("x" * 10_000_000, f"There is no code '{'x' * 20}'; codes are VLM and three digits, such as VLM501."),
        ("\x1b[31m", "There is no code '\\x1b[31m'; codes are VLM and three digits, such as VLM501."),
        ("../../etc/passwd", "There is no code '../../etc/passwd'; codes are VLM and three digits, such as VLM501."),
        ("٥٠١", "There is no code '\\u0665\\u0660\\u0661'; codes are VLM and three digits, such as VLM501."),
    ],
)
def test_an_unknown_code(code: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain(code)

    assert str(caught.value) == message


def test_a_retired_code_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RETIRED, "VLM199", "Gone since 2.0: the driver tells it itself.")

    assert explain("199") == "# VLM199: no longer used\n\nGone since 2.0: the driver tells it itself.\n"


def test_a_page_without_a_heading_has_no_title(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "_pages", lambda: {"VLM000": "text"})

    assert all_codes() == {"VLM000": ""}


def test_docs_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    wanted = importlib.import_module("make_pages").pages()
    found = {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "codes").glob("*.md")}

    assert found == wanted, "run python tools/make_pages.py"
