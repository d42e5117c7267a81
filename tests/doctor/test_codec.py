from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.codec import MAX_SNAPSHOT_BYTES, from_json, machine_from_json, to_json
from vlm_doctor.errors import MachineError
from vlm_doctor.machine import Gap, Gpu, GpuProcess, Link, Machine
from vlm_doctor.redaction import redact
from vlm_doctor.workload import Workload

UUID = "GPU-0efff5b2-d110-bffb-58c1-6c442888ba3f"


def two_gpus() -> Machine:
    process = GpuProcess(pid=4711, kind="compute", used_bytes=2**30, user="ada", command="/home/ada/train.py --lr 1")
    return Machine(
        origin="live",
        description="2 x NVIDIA L4",
        gpus=(
            Gpu(
                index=0,
                uuid=UUID,
                name="NVIDIA L4",
                memory_total_bytes=2**34,
                memory_free_bytes=2**33,
                processes=(process,),
            ),
            Gpu(index=1, uuid=UUID.replace("0eff", "1eff"), name="NVIDIA L4"),
        ),
        links=(Link(a=0, b=1, nvlinks=0, path="PHB"),),
        environment={
            "CUDA_VISIBLE_DEVICES": f"{UUID},1",
            "HF_HOME": "/home/ada/hf",
            "LD_LIBRARY_PATH": "/root/lib:/opt/rootless",
        },
        gaps=(
            Gap(path="gpus[1].memory_free_bytes", reason="NVML: Unknown Error"),
            Gap(path="host", reason="/proc is not mounted"),
        ),
    )


def change(**fields: Any) -> bytes:
    data = json.loads(to_json(two_gpus()))
    for path, value in fields.items():
        *parents, last = path.split("__")
        target = data
        for name in parents:
            target = target[int(name) if name.isdigit() else name]
        target[last] = value
    return json.dumps(data).encode()


def test_bytes_that_are_no_text_are_replaced() -> None:
    machine = Machine(origin="live", description="\udcff pc", environment={"CUDA_\udcfe": "0"}, tool_version="\ud800")

    data = json.loads(to_json(machine))

    assert data["description"].endswith("\ufffd pc")
    assert [key.strip("\ufffd") for key in data["environment"]] == ["CUDA_"]


def test_a_snapshot_comes_back_equal_and_is_no_longer_live() -> None:
    machine = two_gpus()

    again = machine_from_json(to_json(machine).encode(), where="m.json")

    assert again == msgspec.structs.replace(machine, origin="recorded")
    assert machine_from_json(to_json(again, indent=0).encode(), where="m.json") == again


def test_links_and_gaps_are_found_by_what_they_are_about() -> None:
    machine = two_gpus()

    assert machine.link(1, 0) is machine.links[0]
    assert machine.link(0, 2) is None
    assert machine.links[0].label == "PHB"
    assert Link(a=0, b=1, nvlinks=18).label == "NV18"
    assert Link(a=0, b=1).label == "?"
    assert machine.gap("host.kernel") is machine.gaps[1]
    assert machine.gap("hostess") is None
    assert machine.gpus[0].label == "GPU 0 (NVIDIA L4)"


def test_a_snapshot_of_a_newer_version_asks_for_that() -> None:
    with pytest.raises(MachineError) as caught:
        machine_from_json(change(schema=2), where="m.json")
    assert str(caught.value) == "m.json: snapshot schema 2, this version reads 1; update vlm-doctor."


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "not a readable machine: Input data was truncated"),
        (b"[]", "not a readable machine: Expected `object`, got `array`"),
        (b"{}", "not a readable machine: Object missing required field `origin`"),
        (change(schema=0), "snapshot schema 0, this version reads 1"),
        (change(gpus__1__index=0), "GPU index 0 is given twice or out of range"),
        (change(gpus__0__index=-1), "GPU index -1 is given twice or out of range"),
        (change(links__0__b=7), "link 0-7 does not join two of its GPUs in rising order"),
        (change(links__0__a=1), "link 1-1 does not join two of its GPUs in rising order"),
        (change(links=[{"a": 0, "b": 1}] * 2), "link 0-1 is given twice"),
        (change(gpus__0__memory_free_bytes=2**35), "GPU 0 has more free memory than memory"),
        (change(gpus__0__memory_total_bytes=-1), "GPU 0 has a memory size out of range"),
        (change(gpus__0__name=5), "not a readable machine: Expected `str`, got `int` - at `$.gpus[0].name`"),
    ],
)
def test_a_bad_snapshot_gets_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(MachineError) as caught:
        machine_from_json(data, where="m.json")

    assert str(caught.value) == f"m.json: {sentence}; record it again with vlm-doctor collect."


def test_more_gpus_than_a_machine_can_have_are_refused() -> None:
    gpus = tuple(Gpu(index=index, uuid=f"GPU-{index}", name="NVIDIA L4") for index in range(257))
    data = to_json(Machine(origin="recorded", description="cluster", gpus=gpus)).encode()

    with pytest.raises(MachineError) as caught:
        machine_from_json(data, where="m.json")

    assert (
        str(caught.value)
        == "m.json: 257 GPUs are too many for one machine (at most 256); record it again with vlm-doctor collect."
    )


def test_a_long_value_is_not_quoted_in_full() -> None:
    with pytest.raises(MachineError) as caught:
        machine_from_json(change(origin="x" * 10_000), where="m.json")

    assert len(str(caught.value)) < 400
    assert str(caught.value).endswith("; record it again with vlm-doctor collect.")


def test_a_huge_file_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(MachineError, match=r"^m\.json: 16,777,217 bytes is too large for a snapshot"):
        machine_from_json(b" " * (MAX_SNAPSHOT_BYTES + 1), where="m.json")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_machine_or_one_sentence(data: bytes) -> None:
    with pytest.raises(MachineError):
        machine_from_json(data, where="m.json")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(MachineError):
        machine_from_json(b'{"environment":' + b"[" * 100_000 + b"]" * 100_000 + b"}", where="m.json")


def test_other_records_are_read_too() -> None:
    assert from_json(to_json(Workload(images=2)), Workload, where="w") == Workload(images=2)


def test_redaction_hides_people_and_keeps_references_whole() -> None:
    machine = redact(two_gpus())
    text = to_json(machine)

    assert "ada" not in text
    assert "0efff5b2" not in text
    assert machine.gpus[0].processes[0] == GpuProcess(pid=4711, kind="compute", used_bytes=2**30)
    assert machine.environment["CUDA_VISIBLE_DEVICES"] == f"{machine.gpus[0].uuid},1"
    assert machine.environment["HF_HOME"] == "~/hf"
    assert machine.environment["LD_LIBRARY_PATH"] == "~/lib:/opt/dir1"
    assert machine.gpus[0].uuid != machine.gpus[1].uuid
    assert redact(machine).gpus[0].processes == machine.gpus[0].processes
