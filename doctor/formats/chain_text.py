"""The stages of a plan as a chain, with the links between them, and what ``device_map="auto"`` would have done."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..placement import AutoPlacement, Plan, Stage
from ..units import format_gib
from .key_runs import runs
from .page import Column, Page, Piece

_LAYER_COUNT = re.compile(r"(\d+) layers?")
_SHORT = {"vision tower": "vision", "final norm": "norm"}
_INDENT = 2


def write_chain(page: Page, plan: Plan) -> None:
    """Write ``GPU 0 [vision, embedding, layers 0-9] --NV18--> GPU 1 [layers 10-39, norm, head]``.

    A line ends before an arrow, or between two parts where one stage is too long for a line.
    """
    links = [cut.link for cut in plan.cuts]
    stages = [(f"GPU {stage.gpu}", parts_of(stage)) for stage in plan.stages]
    if plan.offloaded is not None:
        stages.append(("CPU", parts_of_keys(plan.offloaded.keys)))
        links.append("host")
    if len(stages) < 2:
        return
    page.gap()
    page.text(("Chain", "bold"))
    room = page.width - _INDENT
    line: list[tuple[str, str]] = []
    for number, (name, parts) in enumerate(stages):
        words = _words(name, parts, links[number - 1] if number else None)
        if line and _columns(line) + 1 + _columns(words) > room:
            page.text(*_spaced(line), indent=_INDENT)
            line = []
        for word in words:
            if line and _columns(line) + 1 + len(word[0]) > room:
                page.text(*_spaced(line), indent=_INDENT)
                line = [("   ", "")]
            line.append(word)
    page.text(*_spaced(line), indent=_INDENT)


def _words(name: str, parts: list[str], link: str | None) -> list[tuple[str, str]]:
    """What is never broken: an arrow with the stage it leads to, and each part."""
    arrow = [] if link is None else [(f"--{link}-->", "dim")]
    opened = [*parts] or ["nothing"]
    opened[0] = f"[{opened[0]}"
    texts = [f"{part}," for part in opened[:-1]] + [f"{opened[-1]}]"]
    return [*arrow, (name, "bold"), *((text, "") for text in texts)]


def _columns(words: Iterable[tuple[str, str]]) -> int:
    texts = [text for text, _ in words]
    return sum(map(len, texts)) + max(0, len(texts) - 1)


def _spaced(words: Iterable[tuple[str, str]]) -> list[Piece]:
    pieces: list[Piece] = []
    for word in words:
        pieces += [" ", word] if pieces else [word]
    return pieces


def parts_of(stage: Stage) -> list[str]:
    """What a stage holds, in words of one column each: ``vision``, ``embedding``, ``layers 0-9``, ``head``."""
    labels = [line.label.removeprefix("weights: ") for line in stage.ledger if line.kind == "weights"]
    numbered = _numbered(stage.keys)
    parts: list[str] = []
    for label in labels:
        match = _LAYER_COUNT.fullmatch(label)
        if match:
            numbers = next((found for found in numbered.values() if len(found) == int(match[1])), None)
            parts.append(label if numbers is None else _ranges("layer", numbers))
        elif label == "vision tower":
            blocks = [found for found in numbered.values() if not _is_text(found, labels)]
            parts.append(_ranges("vision block", blocks[0]) if blocks else "vision")
        elif label != "other":
            parts.append(_SHORT.get(label, label))
    return parts


def parts_of_keys(keys: Iterable[str]) -> list[str]:
    """The same from keys alone, for layers in host memory."""
    keys = tuple(keys)
    numbered = _numbered(keys)
    others = [key.rpartition(".")[2] for key in keys if not key.rpartition(".")[2].isdecimal()]
    return [*(_ranges("layer", numbers) for numbers in numbered.values()), *others]


def _numbered(keys: Iterable[str]) -> dict[str, list[int]]:
    """Numbers of the keys that are items of a list, by list."""
    found: dict[str, list[int]] = {}
    for key in keys:
        head, _, last = key.rpartition(".")
        if head and last.isascii() and last.isdecimal():
            found.setdefault(head, []).append(int(last))
    return found


def _is_text(numbers: list[int], labels: Iterable[str]) -> bool:
    """Whether these are the text layers: the ledger counts those."""
    return any((match := _LAYER_COUNT.fullmatch(label)) and int(match[1]) == len(numbers) for label in labels)


def _ranges(noun: str, numbers: list[int]) -> str:
    found = [run.label for run in runs((f"n.{number}" for number in sorted(numbers)), shortest=2)]
    return f"{noun}{'' if len(numbers) == 1 else 's'} {' and '.join(label.removeprefix('n.') for label in found)}"


def write_auto(page: Page, auto: AutoPlacement | None) -> None:
    """Write what ``auto`` would do: why that is worse or equal, and what each GPU would get."""
    if auto is None:
        return
    page.gap()
    page.text(('What device_map="auto" would do', "bold"), (f" ({auto.library})", "dim"))
    page.text(auto.verdict, indent=_INDENT)
    if not auto.shares:
        return
    page.gap()
    rows: list[list[Piece]] = [
        [
            f"GPU {share.gpu}",
            str(share.layers),
            format_gib(share.weights_bytes),
            format_gib(share.need_bytes),
            (format_gib(share.left_bytes), "" if share.left_bytes >= 0 else "bold red"),
        ]
        for share in auto.shares
    ]
    for name, size_bytes in (("CPU", auto.cpu_bytes), ("disk", auto.disk_bytes)):
        if size_bytes:
            rows.append([(name, "bold red"), "", (format_gib(size_bytes), "bold red"), "", ""])
    headings = ("layers", "weights", "needs", "left")
    page.table([Column(""), *(Column(heading, "right") for heading in headings)], rows)
