"""Code that a checkpoint brings, traced without a GPU: only where it is trusted, and never in this process."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vlm_doctor import Policy, Workload, load_machine, load_profile, plan
from vlm_doctor.cli import main
from vlm_doctor.planner.traced_footprint import trace_request
from vlm_doctor.sources.catalogue import catalogue
from vlm_doctor.sources.trace import trace
from vlm_doctor.trace import TOWER
from vlm_doctor.tracing import Tracing, trace_model

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import tiny_remote  # noqa: E402

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

MACHINE = load_machine("80GiB,80GiB")


@pytest.fixture(scope="module", autouse=True)
def _traces(tmp_path_factory: pytest.TempPathFactory, copied_code: Path) -> Iterator[None]:
    """Where traces are kept."""
    kept = tmp_path_factory.mktemp("traces")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlm_doctor.sources.trace.default_folder", lambda: kept)
        yield


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny_remote.write("chatglm", tmp_path_factory.mktemp("chatglm"))
    return folder


def changed(folder: Path, target: Path, text: str) -> Path:
    """A copy whose code begins with more."""
    shutil.copytree(folder, target)
    code = target / "modeling_chatglm.py"
    code.write_text(code.read_text().replace("from torch import nn\n", f"from torch import nn\n{text}\n", 1))
    return target


def traced(folder: Path, **fields: Any) -> Tracing:
    workload = Workload(**{"images": 0, "text_tokens": 64, "new_tokens": 4} | fields)
    return trace_model(str(folder), load_profile(str(folder)), MACHINE, workload, trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "family", "more"),
    [
        ("THUDM/glm-4v-9b", "chatglm", {}),
        ("THUDM/cogvlm2-llama3-chat-19B", "cogvlm2", {"num_multi_query_heads": 8, "tie_word_embeddings": False}),
        ("OpenGVLab/InternVL3-8B", "internvl_chat", {}),
    ],
)
def test_stand_ins_at_true_size_need_what_formulas_say(
    name: str, family: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """The logits that come back included; the formula of InternVL's tower says more than its stand-in takes."""
    tiny_remote.write_config(family, tmp_path)
    classes = {key: json.loads((tmp_path / "config.json").read_text())[key] for key in ("architectures", "auto_map")}
    config = {**catalogue()[name].config, **more, **classes}
    profile = msgspec.structs.replace(load_profile(name, allow_network=False), architecture=classes["architectures"][0])
    workload = Workload(images=1, text_tokens=500, new_tokens=64)

    found = trace(trace_request(profile, workload, MACHINE), config, folder=tmp_path)

    assert found.weights_bytes == pytest.approx(profile.stored_bytes, rel=1e-5)
    assert any(event.place == TOWER for event in found.runs[0].events)
    by_trace = plan(profile, MACHINE, workload, Policy(min_gpus=2), traces=found)
    by_formula = plan(profile, MACHINE, workload, Policy(min_gpus=2))
    assert by_trace.tier == "traced"
    assert f"Activations: traced: {profile.architecture} of the checkpoint's own code, transformers" in str(by_trace.notes)
    if family != "internvl_chat":
        peaks, others = ([stage.peak_bytes for stage in made.stages] for made in (by_trace, by_formula))
        assert sum(peaks) == pytest.approx(sum(others), rel=0.005)
        assert [told(stage) for stage in by_trace.stages] == [told(stage) for stage in by_formula.stages]


def told(stage: Any) -> list[str]:
    """When its activations are largest."""
    return [line.label for line in stage.ledger if line.kind == "activations"]


@pytest.mark.parametrize(
    ("family", "logits"), [("internvl_chat", "generate"), ("internvl_chat", "forward"), ("kimi_vl", "generate")]
)
def test_a_model_that_generates_by_its_text_model_has_its_passes(family: str, logits: Any, tmp_path: Path) -> None:
    folder = tiny_remote.write(family, tmp_path / family)
    size = 56 if family == "kimi_vl" else None
    found = traced(folder, images=1, image_height=size, logits=logits)
    assert found.reason is None
    assert found.traces is not None
    for run in found.traces.runs:
        assert len(run.passes) == (2 if logits == "generate" else 1)
        assert any(event.place == TOWER for event in run.events)


def test_it_runs_where_it_is_trusted_and_in_a_process_of_its_own(
    chatglm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "ran"
    folder = changed(
        chatglm, tmp_path / "model", f"import os, pathlib\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    words = ["plan", str(folder), "--machine", "2x24GiB", "--images", "0", "--text-tokens", "64", "--trace", "--json"]

    def answer(*more: str) -> dict[str, Any]:
        with pytest.raises(SystemExit):
            main([*words, *more])
        made: dict[str, Any] = json.loads(capsys.readouterr().out)["plan"]
        return made

    without = answer()
    assert not mark.exists()
    assert without["tier"] == "formulas"
    assert "read it, and if you trust it, add --trust-remote-code" in without["notes"][-1]
    trusted = answer("--trust-remote-code")
    assert trusted["tier"] == "traced"
    assert int(mark.read_text()) != os.getpid()
    assert not (tmp_path / "modules").exists(), "copies of the code do not stay"
    mark.unlink()
    assert answer("--trust-remote-code")["tier"] == "traced"
    assert not mark.exists(), "traces of the same code are kept"
    (folder / "modeling_chatglm.py").write_text((folder / "modeling_chatglm.py").read_text() + "\n")
    assert answer("--trust-remote-code")["tier"] == "traced"
    assert mark.exists()


def test_what_the_code_lacks_is_the_reason(chatglm: Path, tmp_path: Path) -> None:
    """A method that transformers dropped in 4.49, called where the published code calls it."""
    folder = changed(chatglm, tmp_path / "model", "")
    code = folder / "modeling_chatglm.py"
    more = (
        "\n    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **more):\n"
        "        return self._extract_past_from_model_output(outputs)\n"
    )
    code.write_text(code.read_text() + more)
    found = traced(folder)
    assert found.traces is None
    assert found.reason is not None
    assert found.reason.startswith(
        "its own code calls _extract_past_from_model_output: with transformers 4.49 and newer, AttributeError at the first "
        "generate, and "
    )
    assert "(AttributeError: " in found.reason
    # A plain forward pass does without.
    assert traced(folder, logits="forward").traces is not None


def test_an_import_that_fails_is_the_reason(chatglm: Path, tmp_path: Path) -> None:
    found = traced(changed(chatglm, tmp_path / "model", "import no_such_package_here"))
    assert found.reason is not None
    assert "no_such_package_here" in found.reason


def test_images_that_nobody_knows_how_to_give(tmp_path: Path) -> None:
    folder = tiny_remote.write("phi3_v", tmp_path / "phi3_v")
    assert traced(folder, images=1).reason == "LookupError: it is not known how its code takes images"
    assert traced(folder).traces is not None
