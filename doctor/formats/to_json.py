"""A report as JSON, its JSON Schema, and errors as JSON: with ``--json`` there is JSON on stdout whatever happens."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from .. import codec
from ..report import REPORT_SCHEMA, Report
from .look import Look

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def render(report: Report, look: Look) -> str:
    """Write a report as JSON, keys in the order of the records; where the output is not UTF-8, as ASCII with escapes."""
    text = codec.to_json(report)
    # Beyond ASCII there are only characters inside strings, so that an escape is right wherever it is put.
    if look.is_unicode:
        return text
    import json

    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)


def error_json(kind: str, message: str, exit_status: int) -> str:
    """Write what stopped the run: ``{"error": {"type": ..., "message": ...}, "exit_status": ...}``."""
    import json

    return json.dumps({"error": {"type": kind, "message": message}, "exit_status": exit_status}, indent=2) + "\n"


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a report; ``docs/report.schema.json`` is this."""
    return {
        "$schema": _DRAFT,
        "title": f"Report of vlm-doctor, schema {REPORT_SCHEMA}",
        **without_indentation(msgspec.json.schema(Report)),
    }


def explanation_schema() -> dict[str, Any]:
    """JSON Schema of what ``explain --json`` writes; ``docs/explain.schema.json`` is this."""
    from ..codes import CodeList, Explanation

    references, definitions = msgspec.json.schema_components((Explanation, CodeList), ref_template="#/$defs/{name}")
    return {
        "$schema": _DRAFT,
        "title": "A code of vlm-doctor explained, or without a code the list of all",
        "oneOf": list(references),
        "$defs": without_indentation(definitions),
    }


def without_indentation(value: Any) -> Any:
    """Descriptions without the indentation of docstrings, which Python keeps before 3.13 and msgspec takes as it is."""
    import inspect

    if isinstance(value, dict):
        return {
            key: inspect.cleandoc(item) if key == "description" and isinstance(item, str) else without_indentation(item)
            for key, item in value.items()
        }
    return [without_indentation(item) for item in value] if isinstance(value, list) else value
