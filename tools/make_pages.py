"""Write docs/codes, one page a code and an index: ``python tools/make_pages.py``. A test fails when they are stale."""

from __future__ import annotations

from pathlib import Path

from vlm_doctor.codes import all_codes, explain

FOLDER = Path(__file__).parent.parent / "docs" / "codes"

FAMILIES = {
    "0": "The doctor itself, and errors that only a log shows",
    "1": "Driver and devices",
    "2": "Visibility and containers",
    "3": "Python libraries",
    "4": "Links and topology",
    "5": "Memory and host",
    "6": "Model and plan",
    "7": "Tests (pytest plugin)",
}


def pages() -> dict[str, str]:
    """File name to text."""
    return {f"{code}.md": explain(code) for code in all_codes()} | {"README.md": index()}


def index() -> str:
    """The list of all codes, by family."""
    lines = [
        "# Codes",
        "",
        "A code keeps its meaning for ever. `vlm-doctor explain VLM501` prints the same page offline.",
        "These pages are made by `python tools/make_pages.py` from the checks' docstrings and `doctor/data/pages`.",
    ]
    family = ""
    for code, title in all_codes().items():
        if code[3] != family:
            family = code[3]
            lines += ["", f"## {family}xx: {FAMILIES[family]}", ""]
        lines.append(f"- [{code}]({code}.md) {title}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the pages, and remove those of codes that are gone."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(wanted)} pages in {FOLDER}")


if __name__ == "__main__":
    main()
