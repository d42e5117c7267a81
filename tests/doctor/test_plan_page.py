"""What docs/plan.md shows is what the program prints. ``VLM_UPDATE_GOLDEN=1`` puts the real text there."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from vlm_doctor import cli

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "plan.md"
EXAMPLE = re.compile(r"```console\n\$ vlm-doctor (?P<words>plan [^\n]+)\n(?P<text>.*?)```", re.DOTALL)


def test_every_example_is_real(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = PAGE.read_text(encoding="utf-8")

    def real(match: re.Match[str]) -> str:
        with pytest.raises(SystemExit):
            cli.main(shlex.split(match["words"]))
        text = re.sub(r"Took [\d.]+ s", "Took 0.50 s", capsys.readouterr().out)
        return f"```console\n$ vlm-doctor {match['words']}\n{text}```"

    written, count = EXAMPLE.subn(real, page)
    assert count == 2
    if os.environ.get("VLM_UPDATE_GOLDEN") == "1":
        PAGE.write_text(written, encoding="utf-8")
    assert written == page or os.environ.get("VLM_UPDATE_GOLDEN") == "1"
