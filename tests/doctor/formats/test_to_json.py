"""JSON: what is written validates against the published schema, and reads back as the same report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import msgspec
import pytest

from vlm_doctor import codec
from vlm_doctor.errors import UsageError
from vlm_doctor.formats import render
from vlm_doctor.formats.to_json import error_json, explanation_schema, schema
from vlm_doctor.report import Report

PUBLISHED = Path(__file__).parents[3] / "docs" / "report.schema.json"
REPORTS = ["check_report", "plan_report", "misfit_report"]


@pytest.mark.parametrize("name", REPORTS)
def test_whole_json(name: str, request: pytest.FixtureRequest, golden: Callable[[str, str], None]) -> None:
    golden(f"json/{name}.json", render(request.getfixturevalue(name), "json"))


@pytest.mark.parametrize("name", REPORTS)
def test_json_validates_and_reads_back(name: str, request: pytest.FixtureRequest) -> None:
    report: Report = request.getfixturevalue(name)

    text = render(report, "json")

    jsonschema.Draft202012Validator(json.loads(PUBLISHED.read_text())).validate(json.loads(text))
    assert codec.from_json(text, Report, where="report") == report


def test_published_schema_is_that_of_the_records(golden: Callable[[str, str], None]) -> None:
    golden("../../docs/report.schema.json", json.dumps(schema(), indent=2) + "\n")


def test_published_schema_of_explanations(golden: Callable[[str, str], None]) -> None:
    golden("../../docs/explain.schema.json", json.dumps(explanation_schema(), indent=2) + "\n")
    jsonschema.Draft202012Validator.check_schema(explanation_schema())


def test_published_schema_is_a_schema_and_refuses_what_is_no_report() -> None:
    validator = jsonschema.Draft202012Validator(schema())

    validator.check_schema(schema())
    assert not validator.is_valid({"version": "0.1.0"})


def test_json_for_a_stream_that_is_not_utf8_is_ascii(check_report: Report) -> None:
    machine = msgspec.structs.replace(check_report.machine, description="Grafikkarte für 🐘 → \u2028")
    report = msgspec.structs.replace(check_report, machine=machine)

    text = render(report, "json", is_unicode=False)

    assert text.isascii()
    assert codec.from_json(text, Report, where="report") == report


def test_errors_are_json_too() -> None:
    assert json.loads(error_json("UsageError", 'no "such"\n', 2)) == {
        "error": {"type": "UsageError", "message": 'no "such"\n'},
        "exit_status": 2,
    }


def test_unknown_format_is_refused(check_report: Report) -> None:
    with pytest.raises(UsageError) as caught:
        render(check_report, "xml")

    assert str(caught.value) == (
        "--format: 'xml' is not a format; choose one of terminal, json, python, yaml, github, junit, sarif, markdown."
    )


def test_every_format_renders_the_same_plan(plan_report: Report) -> None:
    for format_ in ("terminal", "json", "python", "yaml"):
        assert "zai-org/GLM-4.1V-9B-Thinking" in render(plan_report, format_)
