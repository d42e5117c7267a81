"""What makes another model of a checkpoint, and which models are not kept at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as replaced

from pytest_vlmgpu.models.loads import Load
from pytest_vlmgpu.models.source import Source
from pytest_vlmgpu.requirements import VlmSpec
from pytest_vlmgpu.results.summary_text import load_line
from pytest_vlmgpu.warm import facts
from pytest_vlmgpu.warm.facts import NotKept, difference, digest_of, facts_of, is_stale
from pytest_vlmgpu.warm.run import _becomes, _has_room, _refusal, duration
from vlm_doctor.placement import Offload
from vlm_doctor.units import GIB

from .made_up_plans import plan as make_plan
from .made_up_plans import stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlm_doctor.placement import Plan

SPEC = VlmSpec("org/a")
OFFLOAD = Offload(keys=("lm_head",), weights_bytes=1, reason="", host_left_bytes=1, copy_bytes=1, cost="")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    (place / "onnx").mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(b"weights")
    (place / "onnx" / "more.bin").write_bytes(b"more")
    return place


def rewrite(folder: Path) -> None:
    copy = folder / "copy"
    shutil.copy2(folder / "model.safetensors", copy)  # the same name, size and time
    copy.replace(folder / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text("{ }"),
        lambda folder: os.utime(folder / "model.safetensors", (1, 1)),
        rewrite,
        lambda folder: (folder / "adapter_config.json").touch(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "onnx" / "more.bin").write_bytes(b"less"),
    ],
)
def test_a_changed_file_makes_another_checkpoint(folder: Path, change: Callable[[Path], object]) -> None:
    before = facts_of(str(folder), None, None, None)
    assert facts_of(str(folder), None, None, None) == before

    change(folder)

    assert difference(before, facts_of(str(folder), None, None, None)) == ["checkpoint"]


def test_dtype_placement_and_variables_make_another_model(
    folder: Path, gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(dtype: str | None = None, plan: Plan | None = None) -> dict[str, str]:
        return facts_of(str(folder), None, plan, dtype)

    monkeypatch.delenv("HF_HOME", raising=False)
    before = told()
    assert difference(before, told("float16")) == ["dtype"]
    monkeypatch.setenv("HF_HOME", "/secret")
    assert difference(before, told()) == ["variable HF_HOME"]
    assert "/secret" not in str(told())
    monkeypatch.delenv("HF_HOME")
    # torch sets the last ones itself, when it starts CUDA or a test compiles.
    by_torch = ("CUDA_MODULE_LOADING", "TORCHINDUCTOR_CACHE_DIR", "TORCH_WARM_POOL", "CUDA_HOME", "CUBLAS_WORKSPACE_CONFIG")
    for name in ("HF_TOKEN", "CUDA_VISIBLE_DEVICES", "HOME", *by_torch):
        monkeypatch.setenv(name, "anything")
    assert told() == before

    first = make_plan(fits=True, device_map={"": 0}, stages=(stage(gpu(0), GIB),))
    second = replaced(first, stages=(stage(gpu(1), GIB),))
    assert set(difference(before, told(plan=first))) == {"dtype", "placement", "attention"}
    assert difference(told(plan=first), told(plan=second)) == ["placement"]
    assert difference(told(plan=first), told(plan=replaced(first, device_map={"model": 0}))) == ["placement"]


def test_versions_and_code_are_among_the_facts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts_of(str(folder), None, None, None)
    assert {"torch", "transformers", "accelerate", "python", "loader code"} <= set(before)
    monkeypatch.setattr(metadata, "version", lambda name: "0.0" if name == "transformers" else before[name])

    assert difference(before, facts_of(str(folder), None, None, None)) == ["transformers"]


def test_a_model_of_the_hub_is_that_of_the_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotKept, match="not on this machine yet") as caught:
        facts_of("org/a", "main", None, None)
    assert not caught.value.is_for_good

    told = []
    for commit in ("a" * 40, "b" * 40):
        snapshot = tmp_path / "models--org--a" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "models--org--a" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--org--a" / "refs" / "main").write_text(commit)
        told.append(facts_of("org/a", "main", None, None))

    assert difference(*told) == ["checkpoint"]


@given(st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.text()))
def test_a_digest_tells_facts_apart(one: dict[str, str], other: dict[str, str]) -> None:
    assert (digest_of(one) == digest_of(other)) == (one == other) == (difference(one, other) == [])
    assert digest_of(dict(reversed(one.items()))) == digest_of(one)


@pytest.mark.parametrize(
    ("config", "is_quantized"),
    [
        ("{}", False),
        ("[]", False),
        ('{"quantization_config": {"bits": 4}}', True),
        ('{"text_config": {"quantization_config": {}}, "model_type": "x"}', True),
        ('{"text_config": {"hidden_size": 1}}', False),
    ],
)
def test_a_quantized_checkpoint_is_known_by_its_config(folder: Path, config: str, is_quantized: bool) -> None:
    (folder / "config.json").write_text(config)
    assert facts.is_quantized(str(folder), None) == is_quantized

    (folder / "config.json").unlink()
    assert not facts.is_quantized(str(folder), None)


def test_a_driver_is_given_time_to_take_memory_back() -> None:
    answers = iter([False, False, True])
    assert _becomes(lambda: next(answers), 10)
    assert not _becomes(lambda: False, 0)


def test_a_folder_has_no_revision() -> None:
    assert facts.revision_of(Source("/models/a")) is None
    assert facts.revision_of(Source("org/a", "v1")) == "v1"


@pytest.mark.parametrize(
    ("spec", "fields", "environment", "reason"),
    [
        (SPEC, {}, {}, ""),
        (dataclasses.replace(SPEC, trust_remote_code=True), {}, {}, "it runs code of its checkpoint"),
        (dataclasses.replace(SPEC, device_map="auto"), {}, {}, 'device_map="auto" places it anew'),
        (SPEC, {"offloaded": OFFLOAD}, {}, "part of it is in host memory"),
        (SPEC, {"stages": "MIG-1"}, {}, "its GPU is a MIG slice"),
        (
            SPEC,
            {},
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments: True"},
            "PYTORCH_CUDA_ALLOC_CONF",
        ),
        (SPEC, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "PYTORCH_ALLOC_CONF has expandable_segments on"),
        (SPEC, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, ""),
        (SPEC, {}, {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, "PYTORCH_ALLOC_CONF has cudaMallocAsync"),
    ],
)
def test_what_would_not_be_sound_on_gpus_is_refused(
    spec: VlmSpec,
    fields: dict[str, Any],
    environment: dict[str, str],
    reason: str,
    gpu: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    uuid = fields.pop("stages", None)
    stages = (stage(gpu(0, uuid=uuid) if uuid else gpu(0), GIB),)
    found = _refusal(spec, make_plan(fits=True, **{"stages": stages, **fields}), "machine", is_on_cpu=False)

    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_gpus_without_leases_or_plan_are_refused(gpu: Callable[..., Any]) -> None:
    plan = make_plan(fits=True, stages=(stage(gpu(0), GIB),))

    assert _refusal(SPEC, plan, "run", is_on_cpu=False) == "other runs do not learn who has the GPUs (--vlm-lease=run)"
    assert _refusal(SPEC, None, "machine", is_on_cpu=False) == "it has no plan"
    assert _refusal(SPEC, None, "off", is_on_cpu=True) == ""


def test_room_is_what_is_really_free(gpu: Callable[..., Any], machine: Callable[..., Any]) -> None:
    here = machine(gpu(0, free_gib=10), gpu(1, free_gib=4))
    plan = make_plan(fits=True, stages=(stage(gpu(0), 8 * GIB), stage(gpu(1), 3 * GIB)))

    assert _has_room(plan, here, 0)
    assert _has_room(plan, here, GIB)
    assert not _has_room(plan, here, 2 * GIB)
    assert not _has_room(None, here, 0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (720, "12 min"), (5400, "1.5 h"), (28800, "8.0 h")]
)
def test_durations_are_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_summary_says_what_came_of_it() -> None:
    load = Load("org/a", "GPU 0", 0.8, warm="attached", attached_age_s=720.0, saved_seconds=40.5)
    told = "org/a: attached in 0.8 s to a model loaded 12 min ago on GPU 0"

    assert load_line(load, 3) == f"{told}, which saved 40.5 s; 3 tests"
    assert load_line(dataclasses.replace(load, saved_seconds=0.04), 1) == f"{told}; 1 test"
    cold = Load("org/a", "the CPU", 2.0, warm="not kept: it is quantized")
    assert load_line(cold, 1) == "org/a: loaded in 2.0 s on the CPU (not kept: it is quantized); 1 test"


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ({"checkpoint": "2"}, True),
        ({"torch": "2"}, True),
        ({"python": "2"}, True),
        ({"dtype": "2"}, False),
        ({"environment": "2"}, False),
        ({"environment": "2", "torch": "2", "loader code": "2"}, False),
        ({"environment": "2", "checkpoint": "2"}, True),
    ],
)
def test_two_environments_live_beside_each_other_and_what_was_installed_anew_is_stale(
    changed: dict[str, str], stale: bool
) -> None:
    before = dict.fromkeys(("checkpoint", "torch", "python", "environment", "loader code", "dtype"), "1")

    assert is_stale(before, {**before, **changed}) is stale
    assert is_stale(before, before) is False


def test_an_environment_is_told_by_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts_of(str(folder), None, None, None)
    monkeypatch.setattr("sys.prefix", "/another/venv")

    assert difference(before, facts_of(str(folder), None, None, None)) == ["environment"]
