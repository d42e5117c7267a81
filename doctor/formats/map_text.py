"""The judgement of a ``device_map`` as terminal text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from ..device_map import DeviceUse, MapCheck
from ..findings import Finding, Severity
from ..placement import Plan
from ..units import format_gib
from .finding_text import write_findings
from .key_runs import runs
from .page import Column, Page, Piece
from .to_python import literal


def write_map_check(page: Page, checked: MapCheck, *, verbose: bool = False) -> None:
    """Write the verdict, the findings, what is on each device, and the map that would do."""
    page.text((map_verdict(checked), "bold green" if checked.is_clean else "bold red"))
    page.item(("Model", "dim"), checked.model, indent=2, marker_width=9)
    page.item(("Machine", "dim"), checked.machine, indent=2, marker_width=9)
    write_findings(page, checked.findings, verbose=verbose)
    _write_devices(page, checked.devices)
    if checked.corrected is not None:
        page.gap()
        page.text(("Corrected map", "bold"))
        for change in checked.changes:
            page.item("-", change, indent=2)
        page.gap()
        _write_source(page, checked.corrected)
    else:
        for change in checked.changes:
            page.gap()
            page.text(change)
    _write_best(page, checked)
    if verbose and checked.notes:
        page.gap()
        page.text(("Assumed", "bold"))
        for note in checked.notes:
            page.item("-", note, indent=2)


def map_verdict(checked: MapCheck) -> str:
    """``This map fails: 3 errors, 1 warning.`` or ``This map loads, runs and fits.``."""
    counted = [
        f"{number} {severity}{'s' if number > 1 else ''}"
        for severity in ("error", "warning")
        if (number := _count(checked.findings, severity))
    ]
    if not checked.is_clean:
        return f"This map fails: {', '.join(counted)}."
    return f"This map loads, runs and fits{f'; {counted[0]}' if counted else ''}."


def _count(findings: tuple[Finding, ...], severity: Severity) -> int:
    return sum(found.severity == severity for found in findings)


def _write_devices(page: Page, devices: tuple[DeviceUse, ...]) -> None:
    if not devices:
        return
    page.gap()
    columns = [
        Column("device"),
        Column("holds", is_flexible=True),
        Column("weights", "right"),
        Column("need", "right"),
        Column("has", "right"),
    ]
    rows: list[list[Piece]] = []
    for use in devices:
        holds = [*use.parts, *([f"{use.layers} {'layer' if use.layers == 1 else 'layers'}"] if use.layers else [])]
        where = use.device if use.gpu is None or use.device == f"cuda:{use.gpu}" else f"{use.device} (GPU {use.gpu})"
        is_over = use.need_bytes is not None and use.available_bytes is not None and use.need_bytes > use.available_bytes
        rows.append(
            [
                where,
                ", ".join(holds) or "buffers",
                format_gib(use.weights_bytes),
                ("-" if use.need_bytes is None else format_gib(use.need_bytes), "bold red" if is_over else ""),
                "-" if use.available_bytes is None else format_gib(use.available_bytes),
            ]
        )
    page.table(columns, rows)


def _write_source(page: Page, device_map: Mapping[str, int | str]) -> None:
    for line in map_source(device_map).splitlines():
        page.verbatim(line, indent=0)


def _write_best(page: Page, checked: MapCheck) -> None:
    """Write the planner's own answer in two lines."""
    best: Plan | None = checked.best
    if best is None or not best.fits:
        return
    page.gap()
    page.text(("The planner's own map", "bold"))
    for stage in best.stages:
        keys = ", ".join(run.label for run in runs(stage.keys)) if len(best.stages) > 1 else "the whole model"
        page.item(f"GPU {stage.gpu}", f"{format_gib(stage.left_bytes)} left: {keys}", indent=2)


def map_source(device_map: Mapping[str, int | str]) -> str:
    """Write ``device_map = {...}`` in Python, numbered neighbors of one device on one line."""
    entries = []
    for device, items in groupby(device_map.items(), key=lambda item: item[1]):
        value = literal(device) if isinstance(device, str) else str(device)
        for run in runs(key for key, _ in items):
            if run.first is None or run.last is None:
                entries.append(f"{literal(run.prefix)}: {value}")
            else:
                entries.append(f"**{{{literal(run.prefix)} + str(i): {value} for i in range({run.first}, {run.last + 1})}}")
    if len(entries) == 1:
        return f"device_map = {{{entries[0]}}}"
    return "\n".join(["device_map = {", *(f"    {entry}," for entry in entries), "}"])
