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
TOO_LOW_OF_WORK = 0.04
"""Share of what is not weights."""
MORE = {"aya-vision-8b": 0.013, "internvl3-1b": 0.06, "llava-onevision-0.5b": 0.045, "smolvlm2-2.2b": 0.025}
"""What is told too much of some, small ones most: the final norm is counted where the tied head is, and a mask of pixels
that processors give in int64 was given in bool."""


def rows_of(model: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if row["model"] == model]


@pytest.mark.parametrize("model", sorted(Counter(row["model"] for row in ROWS)))
def test_plans_say_what_was_read(model: str) -> None:
    found = planned_again(model, rows_of(model))
    # A better choice may change a map now and then.
    assert len(found) >= len(rows_of(model)) - 1
    for row in found:
        for stage in row["stages"]:
            most = max(MOST.get(row["workload"], MOST[""]), MORE.get(model, 0))
            assert stage["told"] < (1 + most) * stage["measured"], (row["workload"], stage)
            work = stage["measured"] - stage["weights"]
            assert stage["told"] > stage["measured"] - TOO_LOW_OF_WORK * work, (row["workload"], stage)
