from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.codec import machine_from_json, to_json
from vlm_doctor.data.gpus import ALIASES, GPUS, find_gpu
from vlm_doctor.errors import MachineError
from vlm_doctor.machine import Fabric
from vlm_doctor.sources.synthetic import parse_machine
from vlm_doctor.units import GIB, MIB


def labels(spec: str) -> list[str]:
    return [link.label for link in parse_machine(spec).links]


def test_two_l4() -> None:
    machine = parse_machine("2xL4")
    assert (machine.origin, machine.description, machine.driver.nvml_state) == ("synthetic", "2xL4", "ok")
    assert (machine.torch.state, machine.torch.message) == ("not_asked", "this machine is made up")
    assert [gpu.name for gpu in machine.gpus] == ["NVIDIA L4"] * 2
    gpu = machine.gpus[1]
    assert (gpu.index, gpu.uuid, gpu.bus_id) == (1, "GPU-00000001-0000-0000-0000-000000000001", "0000:02:00.0")
    assert gpu.memory_total_bytes == 23034 * MIB
    assert gpu.memory_free_bytes == (23034 - 475) * MIB
    assert (gpu.memory_used_bytes, gpu.memory_reserved_bytes, gpu.compute_capability) == (0, 475 * MIB, (8, 9))
    assert labels("2xL4") == ["PHB"]


def test_h200_is_as_measured() -> None:
    gpu = parse_machine("H200").gpus[0]
    assert (gpu.memory_total_bytes, gpu.memory_reserved_bytes) == (150754820096, 644939776)


def test_bare_sizes_are_free_memory_exactly_as_written() -> None:
    machine = parse_machine("24GiB, 12GiB,2x80GB")
    assert [gpu.memory_free_bytes for gpu in machine.gpus] == [24 * GIB, 12 * GIB, 80 * 10**9, 80 * 10**9]
    assert {gpu.compute_capability for gpu in machine.gpus} == {None}


def test_cards_of_several_kinds() -> None:
    assert [gpu.name for gpu in parse_machine("L4+2xA10").gpus] == ["NVIDIA L4", "NVIDIA A10", "NVIDIA A10"]


def test_nvswitch_joins_all_by_all_links() -> None:
    assert set(labels("8xH100:nvswitch")) == {"NV18"}
    assert len(labels("8xH100:nvswitch")) == 28
    assert parse_machine("8xH100:nvswitch").gpus[0].fabric == Fabric(
        state="completed", status=0, health_mask=0, clique_id=0
    )
    assert set(labels("8xA100:nvswitch")) == {"NV12"}
    assert parse_machine("8xA100:nvswitch").gpus[0].fabric == Fabric(state="not_supported")


def test_bridges_join_the_pairs_named() -> None:
    assert labels("4x3090:nvlink=0-1,3-2") == ["NV4", "PHB", "PHB", "PHB", "PHB", "NV4"]
    assert [link.p2p_read for link in parse_machine("3x3090:nvlink=0-1").links] == ["ok", None, None]


def test_bridges_share_the_ports_of_a_card() -> None:
    assert set(labels("4xV100:nvlink")) == {"NV2"}
    assert labels("3xA100:nvlink=0-1,1-2") == ["NV6", "PHB", "NV6"]


@pytest.mark.parametrize(
    ("spec", "granted"),
    [
        ("3xL4", [None, None, None]),
        ("3xL4:p2p", ["ok", "ok", "ok"]),
        ("3xL4:p2p=off", ["topology_not_supported"] * 3),
        ("3xL4:p2p=2-1", ["topology_not_supported", "topology_not_supported", "ok"]),
        ("2x24GiB:p2p", ["ok"]),
        ("3x3090:nvlink=0-1:p2p=off", ["ok", "topology_not_supported", "topology_not_supported"]),
        ("4090+L4", ["gpu_not_supported"]),
        ("2x5090", ["gpu_not_supported"]),
        ("2x4090:p2p", ["ok"]),
    ],
)
def test_peer_access_is_what_is_said_or_what_the_cards_never_have(spec: str, granted: list[str | None]) -> None:
    links = parse_machine(spec).links
    assert [link.p2p_read for link in links] == [link.p2p_write for link in links] == granted


def test_path_and_free_memory() -> None:
    machine = parse_machine("2x4090:pcie=sys:free=12GiB")
    assert [link.label for link in machine.links] == ["SYS"]
    assert [gpu.memory_free_bytes for gpu in machine.gpus] == [12 * GIB] * 2
    for gpu in machine.gpus:
        sizes = (gpu.memory_free_bytes, gpu.memory_used_bytes, gpu.memory_reserved_bytes)
        assert sum(size or 0 for size in sizes) == gpu.memory_total_bytes
    apart = parse_machine("2x4090:free=12GiB,20GiB")
    assert [gpu.memory_free_bytes for gpu in apart.gpus] == [12 * GIB, 20 * GIB]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx 4090", "NVIDIA GeForce RTX 4090"),
        ("RTX-4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("A100-40GB", "NVIDIA A100-SXM4-40GB"),
        ("rtx6000ada", "NVIDIA RTX 6000 Ada Generation"),
        ("RTX A6000", "NVIDIA RTX A6000"),
        ("Tesla T4", "Tesla T4"),
        ("l40s", "NVIDIA L40S"),
    ],
)
def test_names_as_people_write_them(written: str, name: str) -> None:
    assert parse_machine(f"2x{written}").gpus[0].name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' is not a machine: write live, a snapshot file, or GPUs, such as 2xL4 or 24GiB,12GiB."),
        ("L4+", "'L4+' is not a machine: write live, a snapshot file, or GPUs, such as 2xL4 or 24GiB,12GiB."),
        ("2xL5", "2xL5: 'L5' is not a GPU of the catalogue; did you mean L4?"),
        ("4xA1000", "4xA1000: 'A1000' is not a GPU of the catalogue; did you mean A100 or A100-80 or A100-40?"),
        ("2x24", "2x24: '24' has no unit; write 24GiB."),
        ("12.5G", "12.5G: '12.5G' has no unit; write 12.5GiB."),
        ("2xL4@free=12", "2xL4@free=12: 'L4@free=12' is not a GPU; options stand behind a colon, such as 2xL4:free=12GiB."),
        ("LIVE", "LIVE: this machine is called live, in small letters and alone."),
        ("0xL4", "0xL4: a made-up machine has 1 to 64 GPUs."),
        ("65xL4", "65xL4: a made-up machine has 1 to 64 GPUs."),
        ("60xL4+5xA10", "60xL4+5xA10: a made-up machine has 1 to 64 GPUs."),
        ("99999999999xL4", "99999999999xL4: a made-up machine has 1 to 64 GPUs."),
        ("L4:fast", "L4:fast: 'fast' is not an option; there are nvswitch, nvlink, p2p, pcie and free."),
        (
            "8xH100:nvswitch=yes",
            "8xH100:nvswitch=yes: 'nvswitch=yes' is not an option; there are nvswitch, nvlink, p2p, pcie and free.",
        ),
        ("2xL4:pcie=USB", "2xL4:pcie=USB: 'USB' is not a PCIe path; there are PIX, PXB, PHB, NODE, SYS, INTERNAL."),
        ("2x3090:nvlink=0-2", "2x3090:nvlink=0-2: '0-2' is not a pair of two of the GPUs 0 to 1, such as 0-1."),
        ("2x3090:nvlink=0-0", "2x3090:nvlink=0-0: '0-0' is not a pair of two of the GPUs 0 to 1, such as 0-1."),
        ("2x3090:nvlink=a-b", "2x3090:nvlink=a-b: 'a-b' is not a pair of two of the GPUs 0 to 1, such as 0-1."),
        ("2xL4:nvlink", "2xL4:nvlink: GPU 0 (NVIDIA L4) has no NVLink ports, too few for 1 neighbour."),
        ("8x3090:nvlink", "8x3090:nvlink: GPU 0 (NVIDIA GeForce RTX 3090) has 4 NVLink ports, too few for 7 neighbours."),
        ("2x3090:nvswitch", "2x3090:nvswitch: GPU 0 (NVIDIA GeForce RTX 3090) does not exist with NVSwitch."),
        ("2xH100:nvswitch:nvlink", "2xH100:nvswitch:nvlink: nvlink is said twice."),
        ("2xL4:free=1GiB:free=2GiB", "2xL4:free=1GiB:free=2GiB: free is said twice."),
        ("2xL4:free=23GiB", "2xL4:free=23GiB: GPU 0 (NVIDIA L4) cannot have 23.0 GiB free, only 22.0 GiB."),
        (
            "2xL4:free=1GiB,2GiB,3GiB",
            "2xL4:free=1GiB,2GiB,3GiB: free has 3 sizes for 2 GPUs; write one for all or one for each.",
        ),
        ("2xL4:free=12", "2xL4:free=12: '12' is not a size; write a number and a unit, such as 24GiB or 80GB."),
        ("0GiB", "0GiB: 0GiB is not a size that a GPU can have."),
        ("999999999TiB", "999999999TiB: 999999999TiB is not a size that a GPU can have."),
        ("a1\x1b", "'a1\\x1b': 'a1\\x1b' is not a GPU of the catalogue; did you mean A10 or A10G or A100?"),
        ("x" * 2001, "A machine spec has at most 2,000 characters, this one 2,001."),
    ],
)
def test_spec_that_cannot_be_understood(spec: str, message: str) -> None:
    with pytest.raises(MachineError) as caught:
        parse_machine(spec)
    assert str(caught.value) == message


def test_name_like_no_other_lists_the_catalogue() -> None:
    with pytest.raises(MachineError) as caught:
        parse_machine("quux")
    assert all(name in str(caught.value) for name in [*GPUS, *ALIASES])


@given(st.text(max_size=60) | st.from_regex(r"\A[0-9]{0,3}x?(L4|3090|H100|24GiB)([:+,][a-z0-9=,\-]{0,12}){0,3}\Z"))
def test_any_text_is_a_machine_or_one_sentence(spec: str) -> None:
    try:
        machine = parse_machine(spec)
    except MachineError as error:
        sentence = str(error)
    else:
        assert machine_from_json(to_json(machine).encode(), where="test") == machine
        assert 1 <= len(machine.gpus) <= 64
        return
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence


@pytest.mark.parametrize("name", [*GPUS, *ALIASES])
def test_every_name_of_the_catalogue_is_found(name: str) -> None:
    model = find_gpu(name)
    assert model is not None
    assert find_gpu(model.name) == model
    assert 0 < model.memory_reserved_bytes < model.memory_total_bytes // 20
    assert model.compute_capability >= (7, 0)
