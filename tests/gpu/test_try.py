"""``vlm-doctor try`` on real GPUs: what was planned is what happens. Run by hand: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from pytest_vlmgpu.testing import make_tiny_vlm  # noqa: E402
from vlm_doctor import Policy, Workload, load_machine, load_profile, plan  # noqa: E402
from vlm_doctor.probes.trial_run import Trier  # noqa: E402
from vlm_doctor.trial_verdict import explain  # noqa: E402
from vlm_doctor.visibility import visible_gpus  # noqa: E402

if torch.cuda.device_count() < 1:
    pytest.skip("needs a GPU", allow_module_level=True)


def tried(folder: Path, *words: str) -> tuple[int, Any]:
    command = [sys.executable, "-m", "vlm_doctor", "try", str(folder), "--json", "--text-tokens", "60", *words]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ran.stderr == ""
    return ran.returncode, json.loads(ran.stdout)["trial"]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "glm4v", "internvl"])
@pytest.mark.parametrize("count", [1, 2])
def test_it_is_where_the_plan_says_and_takes_no_more(family: str, count: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip("needs two GPUs")
    size = "112x56" if family != "llava" else "64x64"

    status, trial = tried(make_tiny_vlm(tmp_path, family), "--min-gpus", str(count), "--image-size", size)

    (attempt,) = trial["attempts"]
    assert (status, attempt["state"]) == (0, "ran"), attempt["traceback"]
    assert (attempt["astray_count"], attempt["cut_count"]) == (0, 0)
    assert (attempt["is_finite"], attempt["is_repeatable"]) == (True, True)
    assert set(attempt["held_bytes"]) == {f"cuda:{ordinal}" for ordinal in range(count)}
    assert len(attempt["peaks"]) == count
    for peak in attempt["peaks"]:
        assert peak["gpu"] is not None
        assert peak["planned_reserved_bytes"] is not None
    assert trial["findings"] == []


def test_auto_stands_beside_it(tmp_path: Path) -> None:
    _, trial = tried(make_tiny_vlm(tmp_path, "llava"), "--beside-auto")

    assert [attempt["route"] for attempt in trial["attempts"]] == ["plan", "auto"]
    assert trial["attempts"][1]["device_map"] or trial["attempts"][1]["held_bytes"]
    assert all(peak["gpu"] is not None for peak in trial["attempts"][1]["peaks"])


def test_running_out_of_memory_is_a_result(tmp_path: Path) -> None:
    """Ballast takes the GPU after the plan was made."""
    folder = make_tiny_vlm(tmp_path, "llava")
    profile, machine, call = load_profile(str(folder)), load_machine("live"), Workload(text_tokens=60, new_tokens=4)
    made = plan(profile, machine, call, Policy(gpus=(visible_gpus(machine).gpus[0],)))
    torch.cuda.init()
    ballast = torch.empty(torch.cuda.mem_get_info(0)[0] - 64 * 2**20, dtype=torch.uint8, device="cuda:0")
    try:
        attempt = Trier(str(folder), profile, call, deadline_s=300.0).by_plan(made)
        status, trial = tried(folder, "--gpus", str(made.stages[0].gpu))
    finally:
        del ballast
        torch.cuda.empty_cache()

    told = explain(attempt, made, [made.stages[0].gpu])
    assert told.state == "raised"
    assert told.error is not None
    assert told.error.cause is not None
    assert told.error.cause.code == "VLM010", told.traceback
    assert (status, trial["attempts"]) == (1, []), "a plan made now does not fit"
