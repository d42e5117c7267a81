"""The section of ``docs/architectures.md`` about families that bring code of their own; see ``make_architectures.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_doctor.data.image_rules import IMAGE_RULES
from vlm_doctor.data.removed_calls import BREAKS, NATIVE, PUBLISHED, Break

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "remote.json"
OTHERS = ("remote-4.json", "2xh200-remote.json")
"""Beside it, with other releases of the libraries, and on GPUs (as the benchmark wrote it): a line each."""
_MAPS = ("plan", "accelerate", "auto", "quarters")
_BAD = ("crashes", "fails", "differs")
_FAMILY = {"cogvlm2": "cogvlm"}
"""Row to its family in the doctor's tables."""
_HEAD = """
## Code of their own

Families whose class comes with the checkpoint (`trust_remote_code=True`). Tiny checkpoints with published module names,
order of registration and keys of config.json, and with code written anew (`benchmarks/remote_code/`), were run in the same
way ({versions}; devices: {devices}); "four" is
accelerate's map for four devices, a quarter of the weights each. What joins tensors of two devices does so in the published
code, too; a newer revision of a checkpoint may not.

{counts}

| family | class | planner | accelerate | auto | four | images |
| --- | --- | --- | --- | --- | --- | --- |
"""
_NEEDS = """
What the code, as first published, relies on and transformers has dropped (or asks for since), and what transformers can do
itself instead. A plan says so in a note, `vlm-doctor check` as VLM321 for checkpoints in the cache; both search the text of
the code where it is at hand, and never run it.

| family | breaks from | by | source | instead |
| --- | --- | --- | --- | --- |
"""


def section(results: dict[str, Any] | None = None) -> str:
    """The section, from the committed results or others."""
    results = json.loads(RESULTS.read_text()) if results is None else results
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    rows = results["rows"]
    head = _HEAD.format(versions=versions, devices=results["devices"], counts=_counts(rows))
    others = [_line(path) for path in map(RESULTS.with_name, OTHERS) if path.exists()]
    needs = map(_need, sorted(PUBLISHED))
    return "".join([head, *map(_row, rows), *others, _NEEDS, *needs])


def _line(path: Path) -> str:
    """How the same went with another release."""
    results = json.loads(path.read_text())
    if any(isinstance(row["plan"], dict) for row in results["rows"]):
        results = brief(results)
    rows = results["rows"]
    equal = sum(row["plan"] == "equal" for row in rows)
    theirs = [row["family"] for row in rows if any(row[name].startswith(_BAD) for name in _MAPS[1:])]
    release = results["versions"]["transformers"]
    where = "" if results["devices"] == "fake" else " on two H200s"
    return (
        f"\nWith transformers {release}{where} the planner's map is equal for {equal} of {len(rows)}, and a map of the "
        f"libraries fails on {len(theirs)}.\n"
    )


def brief(results: dict[str, Any]) -> dict[str, Any]:
    """What the section needs of what ``all_architectures.py --remote`` wrote."""
    rows = [
        {
            "family": row["family"],
            "architecture": row["architecture"],
            "cuts": len(row.get("cuts", ())),
            **{name: _word(row.get(name, {})) for name in _MAPS},
        }
        for row in results["rows"]
    ]
    return {"devices": results["devices"], "versions": results["versions"], "rows": rows}


def _word(entry: dict[str, Any]) -> str:
    if "runs" not in entry:
        return f"fails ({entry['failed'].partition(':')[0]})" if entry.get("failed") else "-"
    codes = ", ".join(sorted({*entry["check"]["errors"], *entry["check"]["warned"]}))
    if entry["crashes"]:
        return f"crashes ({codes if entry['named'] else 'not seen'})"
    word = "equal" if entry["equal"] else "differs"
    return f"{word} (false alarm: {', '.join(entry['check']['errors'])})" if entry["check"]["errors"] else word


def _row(row: dict[str, Any]) -> str:
    family = _FAMILY.get(row["family"], row["family"])
    rule = IMAGE_RULES.get(family)
    kind = "assumed" if rule is None else f"{rule.kind}, at most" if rule.is_bound else rule.kind
    return f"| `{row['family']}` | {row['architecture']} | {' | '.join(row[name] for name in _MAPS)} | {kind} |\n"


def _counts(rows: list[dict[str, Any]]) -> str:
    theirs = [row["family"] for row in rows if any(row[name].startswith(_BAD) for name in _MAPS[1:])]
    ours = [row["family"] for row in rows if row["plan"].startswith(_BAD)]
    cuts = sum(row["cuts"] for row in rows)
    return (
        f"Of {len(rows)} families the planner's map fails on {len(ours)} (all {cuts} cuts that it may make were run); a "
        f"map of accelerate or transformers fails on {len(theirs)}."
    )


def _need(family: str) -> str:
    found = sorted((BREAKS[name] for name in PUBLISHED[family]), key=lambda entry: entry.since)
    first = found[0]
    since = f"{first.since[0]}.{first.since[1]}"
    what = "; ".join(f"{_releases(entry)}: {entry.says}" for entry in found)
    native = NATIVE.get(family)
    instead = "-" if native is None else f"{native.model}, since {native.since[0]}.{native.since[1]}"
    return f"| `{family}` | {since} | {what} | {first.source} | {instead} |\n"


def _releases(entry: Break) -> str:
    since = f"{entry.since[0]}.{entry.since[1]}"
    return since if entry.until is None else f"{since} until {entry.until[0]}.{entry.until[1]}"


__all__ = ["RESULTS", "brief", "section"]
