"""What plans say of published models beside what two H200s were read to allocate (``benchmarks/published_on_gpu.py``)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]

if int(pytest.importorskip("transformers").__version__.split(".")[0]) < 5:
    pytest.skip("the benchmark makes its checkpoints of the classes of transformers 5", allow_module_level=True)

from published_on_gpu import planned_again  # noqa: E402 - of the benchmarks

ROWS = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "2xh200-published.json").read_text())
MOST = {"": 0.01, "forward": 0.01, "eager": 0.025}
WORST_TOO_LOW = 0.009
MORE = {"aya-vision-8b": 0.013, "internvl3-1b": 0.06, "llava-onevision-0.5b": 0.045, "smolvlm2-2.2b": 0.025}
"""What is told too much of some, small ones most: the final norm is counted where the tied head is, and a mask of pixels
that processors give in int64 was given in bool."""


def rows_of(model: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if row["model"] == model]


@pytest.mark.parametrize("model", sorted(Counter(row["model"] for row in ROWS)))
def test_plans_say_what_was_read(model: str) -> None:
    found = planned_again(model, rows_of(model))
    # A better choice may change a map, but not nearly all of them.
    assert len(found) >= len(rows_of(model)) / 2
    for row in found:
        for stage in row["stages"]:
            error = stage["told"] / stage["measured"] - 1
            most = max(MOST.get(row["workload"], MOST[""]), MORE.get(model, 0))
            assert -WORST_TOO_LOW < error < most, (model, row["workload"], stage)
