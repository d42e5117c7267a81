"""YAML that every reader reads as the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.errors import UsageError
from vlm_doctor.formats import render
from vlm_doctor.formats.to_yaml import scalar
from vlm_doctor.machine import Libraries, Package
from vlm_doctor.placement import Offload
from vlm_doctor.report import Report


def read(text: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with transformers")
    return yaml.safe_load(text)


def with_plan(report: Report, **changes: object) -> Report:
    assert report.plan is not None
    return msgspec.structs.replace(report, plan=msgspec.structs.replace(report.plan, **changes))


def test_whole_text(plan_report: Report, golden: Callable[[str, str], None]) -> None:
    golden("yaml/plan_report.yaml", render(plan_report, "yaml"))


def test_whole_text_of_a_misfit(misfit_report: Report, golden: Callable[[str, str], None]) -> None:
    golden("yaml/misfit_report.yaml", render(misfit_report, "yaml"))


def test_a_machine_report_has_no_plan(check_report: Report) -> None:
    with pytest.raises(UsageError, match="--format yaml: only a plan"):
        render(msgspec.structs.replace(check_report, plan=None), "yaml")


@pytest.mark.models
def test_pyyaml_reads_the_plan(plan_report: Report) -> None:
    plan = plan_report.plan
    assert plan is not None
    data = read(render(plan_report, "yaml"))

    assert list(data["device_map"].items()) == list(plan.device_map.items())
    assert data["max_memory"] == plan.max_memory
    assert data["environment"] == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": plan.cuda_visible_devices,
    }
    assert (data["model"], data["dtype"], data["fits"]) == (plan.model, "bfloat16", True)


@pytest.mark.models
def test_the_whole_model_on_one_gpu_keeps_its_empty_key(plan_report: Report) -> None:
    assert read(render(with_plan(plan_report, device_map={"": 0}), "yaml"))["device_map"] == {"": 0}


@pytest.mark.models
def test_offload_revision_quantization_and_allocator_are_written(plan_report: Report) -> None:
    assert plan_report.plan is not None
    workload = msgspec.structs.replace(
        plan_report.plan.workload, quantization="nf4", attention="flash", allocator="expandable"
    )
    offloaded = Offload(keys=("lm_head",), weights_bytes=123, copy_bytes=1, host_left_bytes=None, reason="", cost="")
    data = read(
        render(
            with_plan(
                plan_report, revision="v1.0", workload=workload, offloaded=offloaded, device_map={"": 0, "lm_head": "cpu"}
            ),
            "yaml",
        )
    )

    assert data["revision"] == "v1.0"
    assert data["quantization"] == "nf4"
    assert data["attn_implementation"] == "flash_attention_2"
    assert data["environment"]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert data["device_map"]["lm_head"] == "cpu"
    assert data["max_memory"]["cpu"] == 123


@pytest.mark.models
@given(
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**12), 10**12),
        st.text(),
        st.sampled_from(
            ["no", "Off", "1e3", "0x1F", "1_000", "~", "12:30:45", ".inf", "a: b", "- a", "#", "null", "2024-01-01"]
        ),
    )
)
def test_pyyaml_reads_every_scalar_back(value: Any) -> None:
    # Lone surrogates are no text in any encoding.
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        return
    assert read(f"{scalar('k')}: {scalar(value)}\n") == {"k": value}
    # YAML reads a key on the line of its colon up to 1,024 characters; names of modules are far shorter.
    if isinstance(value, str) and len(scalar(value)) < 1_000:
        assert read(f"{scalar(value)}: 1\n") == {value: 1}


def test_plain_words_stay_plain_and_doubtful_ones_are_quoted() -> None:
    assert [scalar(text) for text in ("model.layers.1", "zai-org/GLM", "no", "", "1", "a b", 'q"', "\u2028")] == [
        "model.layers.1", "zai-org/GLM", '"no"', '""', '"1"', '"a b"', '"q\\""', '"\\u2028"',
    ]  # fmt: skip
    assert scalar("\x07\U0001f600\n") == '"\\x07\\U0001F600\\n"'


@pytest.mark.models
def test_what_must_be_unpacked_while_it_loads_is_written(plan_report: Report) -> None:
    parted = {"model": 0, "lm_head": 1}
    data = read(render(with_plan(plan_report, needs_quantization="compressed-tensors", device_map=parted), "yaml"))
    whole = read(render(with_plan(plan_report, needs_quantization="compressed-tensors", device_map={"": 0}), "yaml"))

    assert data["dequantize"] is True
    assert "dequantize" not in whole


@pytest.mark.parametrize(("version", "is_written"), [("4.57.6", False), ("5.23.0", True)])
def test_an_argument_that_the_installed_transformers_does_not_know_is_not_written(
    plan_report: Report, version: str, is_written: bool
) -> None:
    parted = with_plan(plan_report, needs_quantization="compressed-tensors", device_map={"model": 0, "lm_head": 1})
    packages = (Package(name="transformers", version=version),)
    libraries = Libraries(python="3.12", executable="python", packages=packages)
    machine = msgspec.structs.replace(parted.machine, libraries=libraries)

    text = render(msgspec.structs.replace(parted, machine=machine), "yaml")

    assert ("dequantize" in text) == is_written
