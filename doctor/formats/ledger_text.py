"""Where the memory of each GPU goes: one bar a GPU, and one table that adds up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, get_args

from ..placement import LedgerKind, LedgerLine, Stage
from ..units import GIB, format_gib
from .machine_text import short_name
from .page import Column, Page, Piece, inert

_HUNDREDTH_BYTES = GIB / 100
_LABEL_COLUMNS = 30
_FIGURE_COLUMNS = 8
_LAYER_COUNT = re.compile(r"\d+ layers?")


class Segment(NamedTuple):
    """One kind of memory in a bar."""

    letter: str
    """Shown in the bar, so that the bar can be read without color."""
    meaning: str
    style: str


_TAKEN = Segment("o", "driver and other processes", "dim")
_CONTEXT = Segment("c", "CUDA context and workspace", "magenta")
_VISION = Segment("V", "vision weights", "bold green")
_PROJECTOR = Segment("P", "projector weights", "bold blue")
_EMBEDDING = Segment("E", "embedding weights", "blue")
_LAYERS = Segment("L", "layer weights", "green")
_HEAD = Segment("H", "head weights", "bold magenta")
_OTHER_WEIGHTS = Segment("W", "other weights", "bold cyan")
_KV_CACHE = Segment("K", "KV cache", "cyan")
_ACTIVATIONS = Segment("A", "activations", "yellow")
_RESERVE = Segment("r", "reserve", "dim")
_FREE = Segment(".", "free", "dim")
_MODEL = (_VISION, _PROJECTOR, _EMBEDDING, _LAYERS, _HEAD, _OTHER_WEIGHTS, _KV_CACHE, _ACTIVATIONS)
_SEGMENTS = (_TAKEN, _CONTEXT, *_MODEL, _RESERVE, _FREE)
"""In the order of the bar."""
_BY_KIND: dict[LedgerKind, Segment] = {
    "driver": _TAKEN,
    "others": _TAKEN,
    "context": _CONTEXT,
    "workspace": _CONTEXT,
    "kv_cache": _KV_CACHE,
    "activations": _ACTIVATIONS,
    "training": _ACTIVATIONS,
    "fragmentation": _RESERVE,
    "headroom": _RESERVE,
    "left": _FREE,
}
_BY_WORD = (("vision", _VISION), ("projector", _PROJECTOR), ("embedding", _EMBEDDING), ("layer", _LAYERS), ("head", _HEAD))


def _segment(line: LedgerLine) -> Segment:
    if line.kind != "weights":
        return _BY_KIND[line.kind]
    return next((segment for word, segment in _BY_WORD if word in line.label), _OTHER_WEIGHTS)


def rounded_to_sum(sizes: Sequence[int], step: float) -> list[int]:
    """Round sizes to whole steps so that the rounded ones still add up to the rounded sum (largest remainder).

    Args:
        sizes: Bytes, also negative.
        step: Bytes of one step.

    Returns:
        Steps, in the order of ``sizes``; each differs from its exact value by less than one step.
    """
    exact = [size / step for size in sizes]
    steps = [int(value // 1) for value in exact]
    missing = round(sum(sizes) / step) - sum(steps)
    for index in sorted(range(len(sizes)), key=lambda index: steps[index] - exact[index])[:missing]:
        steps[index] += 1
    return steps


def write_bars(page: Page, stages: Sequence[Stage]) -> None:
    """Write one bar a GPU and, below, what the letters mean."""
    shown: set[Segment] = set()
    for stage in stages:
        left = stage.left_bytes
        margin = f"{format_gib(left)} left" if left >= 0 else (f"{format_gib(-left)} missing", "bold red")
        sizes = f"{format_gib(stage.total_bytes)}, {format_gib(stage.peak_bytes)} peak of the model, "
        page.text((f"GPU {stage.gpu}", "bold"), f"  {short_name(stage.name)}: {sizes}", margin, indent=2)
        cells = bar(stage, page.width - 4)
        shown.update(cells)
        edge = len(cells) if left >= 0 else len(cells) * stage.total_bytes // (stage.total_bytes - left)
        beyond: list[Piece] = [("!", "bold red"), ("".join(cell.letter for cell in cells[edge:]), "red")]
        inside = [("".join(cell.letter for cell in run), segment.style) for segment, run in groupby(cells[:edge])]
        page.text(*inside, *(beyond if edge < len(cells) else ()), indent=2)
    legend = [f"{segment.letter} {segment.meaning}" for segment in _SEGMENTS if segment in shown]
    if any(stage.left_bytes < 0 for stage in stages):
        legend.append("! end of the memory")
    page.legend(legend, indent=2)


def bar(stage: Stage, columns: int) -> list[Segment]:
    """Fill ``columns`` cells in proportion to the memory needed and left; what is there at all gets at least one cell."""
    sizes: dict[Segment, int] = {}
    for line in stage.ledger:
        if line.size_bytes > 0:
            sizes[_segment(line)] = sizes.get(_segment(line), 0) + line.size_bytes
    if not sizes:
        return []
    ordered = [segment for segment in _SEGMENTS if segment in sizes]
    cells = rounded_to_sum([sizes[segment] for segment in ordered], sum(sizes.values()) / columns)
    for index, number in enumerate(cells):
        if not number:
            cells[index] = 1
            cells[cells.index(max(cells))] -= 1
    return [segment for segment, number in zip(ordered, cells, strict=True) for _ in range(number)]


def write_ledger(page: Page, stages: Sequence[Stage]) -> None:
    """Write the ledgers side by side, in GiB; every column adds up to the memory of its GPU."""
    gpus_per_table = max(1, (page.width - _LABEL_COLUMNS) // _FIGURE_COLUMNS)
    for start in range(0, len(stages), gpus_per_table):
        page.gap()
        _write_ledger_table(page, stages[start : start + gpus_per_table])


def _write_ledger_table(page: Page, stages: Sequence[Stage]) -> None:
    lines = [line for stage in stages for line in stage.ledger]
    labels = list(dict.fromkeys(_row(line) for kind in get_args(LedgerKind) for line in lines if line.kind == kind))
    columns = []
    for stage in stages:
        steps = rounded_to_sum([line.size_bytes for line in stage.ledger], _HUNDREDTH_BYTES)
        column: dict[str, int] = {}
        for line, number in zip(stage.ledger, steps, strict=True):
            column[_row(line)] = column.get(_row(line), 0) + number
        columns.append(column)
    rows: list[list[Piece]] = [
        [inert(label, limit=_LABEL_COLUMNS), *(_hundredths(column.get(label)) for column in columns)] for label in labels
    ]
    total: list[Piece] = [("total", "bold"), *(_hundredths(sum(column.values())) for column in columns)]
    headings = [Column("GiB", is_flexible=True), *(Column(f"GPU {stage.gpu}", "right") for stage in stages)]
    page.table(headings, [*rows, total])


def _row(line: LedgerLine) -> str:
    """Label without what differs from GPU to GPU, such as the number of layers, so that GPUs share a row."""
    if line.kind in ("activations", "kv_cache"):
        return _BY_KIND[line.kind].meaning
    return _LAYER_COUNT.sub("layers", line.label) if line.kind == "weights" else line.label


def _hundredths(steps: int | None) -> str:
    return "-" if steps is None else f"{steps / 100:.2f}"


def write_sources(page: Page, stages: Sequence[Stage]) -> None:
    """Write where each figure comes from."""
    for label, source in dict.fromkeys((line.label, line.source) for stage in stages for line in stage.ledger):
        page.item("-", f"{label}: {source}", indent=2)
