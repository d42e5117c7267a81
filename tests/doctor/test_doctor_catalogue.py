"""The table of failures names real codes, every failure once, and every check of machines somewhere."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_doctor.checks import CHECKS
from vlm_doctor.data.by_hand_machine import BY_HAND_MACHINE

TEXT = (Path(__file__).parents[2] / "docs" / "doctor-catalogue.md").read_text("utf-8")
ROWS = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", TEXT, re.MULTILINE)
FAILURES = 114


def test_every_failure_stands_there_once() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, FAILURES + 1))


def test_codes_are_checks_and_what_has_none_says_why() -> None:
    codes = {check.code for check in CHECKS}
    for number, _, seen_by, how in ROWS:
        named = re.findall(r"VLM\d{3}", seen_by)
        assert named or seen_by.strip() == "-", number
        assert set(named) <= codes, number
        assert len(how.strip()) > 3, number


def test_every_check_of_machines_is_named() -> None:
    named = set(re.findall(r"VLM\d{3}", TEXT))
    assert {check.code for check in CHECKS if not check.code.startswith("VLM6")} <= named


def test_how_to_look_by_hand_is_about_checks() -> None:
    assert set(BY_HAND_MACHINE) <= {check.code for check in CHECKS}
    assert all(text.startswith("`") and text.endswith(".") for text in BY_HAND_MACHINE.values())
