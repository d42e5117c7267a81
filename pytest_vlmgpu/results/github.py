"""What GitHub Actions shows beside a run: annotations of lines, and a table on the page of the job. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .evidence import Broken, GatedRecord

_ANNOTATIONS = 10
"""GitHub shows this many errors of one step. Source: its documentation of workflow commands, limits of annotations."""
_ROWS = 200
"""A page of a job holds 1 MiB; more rows than this nobody reads."""


def is_here(environment: Mapping[str, str]) -> bool:
    """True on a runner of GitHub Actions, or of what imitates it."""
    return environment.get("GITHUB_ACTIONS") == "true"


def commands(tests: Mapping[str, GatedRecord], broken: Sequence[Broken]) -> list[str]:
    """Workflow commands: what the run did not keep, then gated tests that the gate or the plugin refused."""
    return list(_commands(tests, broken))[:_ANNOTATIONS]


def _commands(tests: Mapping[str, GatedRecord], broken: Sequence[Broken]) -> Iterator[str]:
    for one in broken:
        yield f"::error title={_property(one.code)}::{_data(one.message)}"
    for record in tests.values():
        if record.outcome in ("error", "failed") and record.code:
            place = f"file={_property(record.file or '')},line={record.line or 1},"
            yield f"::error {place}title={_property(record.code)}::{_data(record.reason or record.nodeid)}"


def table(tests: Mapping[str, GatedRecord], broken: Sequence[Broken]) -> str:
    """Markdown: one row a gated test, those that did not pass first."""
    order = sorted(tests.values(), key=lambda record: record.outcome in ("passed", "xfailed"))
    lines = ["### GPU tests", ""]
    lines += [f"> **{one.code}** {_cell(one.message)}" + "\n" for one in broken]
    lines += [
        "| test | outcome | code | model | GPUs | need | peak | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in order[:_ROWS]:
        cells = (
            f"`{_cell(record.nodeid)}`",
            f"{record.outcome}, {record.offloaded_gib:.1f} GiB off the GPUs" if record.offloaded_gib else record.outcome,
            record.code or "",
            _cell(record.model or ""),
            str(len(record.gpus) or ""),
            f"{record.need_gib:.1f} GiB" if record.need_gib else "",
            f"{record.peak_gib:.1f} GiB" if record.peak_gib else "",
            f"{record.duration_s:.1f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    if len(order) > _ROWS:
        lines.append(f"\n{len(order) - _ROWS} more are in the report.")
    return "\n".join(lines) + "\n\n"


def _data(text: str) -> str:
    """Text of a command. Source of the escapes: toolkit, packages/core/src/command.ts."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
