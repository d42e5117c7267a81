"""What is wrong with GPUs and links, as the planner sees it; the checks' words for it are tested with them."""

from __future__ import annotations

import msgspec
import pytest

from tests.doctor.planner.profiles import glm41v_9b, machine
from vlm_doctor.checks import diagnose
from vlm_doctor.health import fault_of_gpu, fault_of_link
from vlm_doctor.machine import Fabric, Link, Machine
from vlm_doctor.planner import plan
from vlm_doctor.topology import hop_rank
from vlm_doctor.workload import Policy

UP = Fabric(state="completed", status=0)


def with_gpu(there: Machine, index: int, **fields: object) -> Machine:
    gpus = tuple(msgspec.structs.replace(gpu, **fields) if gpu.index == index else gpu for gpu in there.gpus)
    return msgspec.structs.replace(there, gpus=gpus)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, None),
        ({"recovery_action": "none", "ecc_uncorrected": 0, "fabric": UP}, None),
        ({"fabric": Fabric(state="completed", status=0, health_mask=0b01 << 4)}, None),
        ({"remap_failed": True}, "row remapping has failed"),
        ({"remap_pending": True, "ecc_uncorrected": 2}, "row remapping is pending, 2 uncorrectable ECC errors"),
        ({"recovery_action": "drain_and_reset"}, "the driver asks for a reset of the GPU when it is idle"),
        ({"fabric": Fabric(state="in_progress")}, "its NVSwitch fabric is not up: in progress"),
        ({"fabric": Fabric(state="completed", status=999)}, "its NVSwitch fabric failed with NVML error 999"),
    ],
)
def test_faults_of_a_gpu(fields: dict[str, object], fault: str | None) -> None:
    gpu = with_gpu(machine([24]), 0, **fields).gpus[0]
    assert fault_of_gpu(gpu) == fault


@pytest.mark.parametrize(
    "fields",
    [
        {"remap_failed": True},
        {"ecc_uncorrected": 1},
        {"recovery_action": "reset_gpu"},
        {"fabric": Fabric(state="not_started")},
    ],
)
def test_what_the_planner_avoids_is_what_the_checks_report(fields: dict[str, object]) -> None:
    there = with_gpu(machine([24, 24]), 0, **fields)
    assert [finding.code for finding in diagnose(there).findings if finding.gpus == (0,)] in (["VLM111"], ["VLM403"])
    made = plan(glm41v_9b(), there)
    assert [stage.gpu for stage in made.stages] == [1]


@pytest.mark.parametrize(
    ("link", "fields", "fault"),
    [
        (Link(a=0, b=1, nvlinks=4), {}, None),
        (Link(a=0, b=1, path="PHB", p2p_read="chipset_not_supported"), {}, None),
        (Link(a=0, b=1, nvlinks=18), {"fabric": Fabric(state="completed", health_mask=0b10_10_10_01)}, None),
        (Link(a=0, b=1, path="PHB"), {"recovery_action": "drain_p2p"},
         "the driver asks for an end of peer traffic of GPU 1"),
        (Link(a=0, b=1, nvlinks=18), {"fabric": Fabric(state="completed", health_mask=0b01 << 4)},
         "in the NVSwitch fabric of GPU 1 a route is unhealthy"),
        (Link(a=0, b=1, path="PHB"), {"fabric": Fabric(state="completed", health_mask=0b01 << 4)}, None),
    ],
)  # fmt: skip
def test_faults_of_a_link(link: Link, fields: dict[str, object], fault: str | None) -> None:
    there = with_gpu(machine([24, 24, 24], links=[link]), 1, **fields)
    assert fault_of_link(there, 0, 1) == fault_of_link(there, 1, 0) == fault
    assert (hop_rank(there, 0, 1) is None) == (fault is not None)
    assert fault_of_link(there, 0, 2) is None


def test_hops_are_ordered_from_nvlink_to_the_host() -> None:
    links = [
        Link(a=0, b=1, nvlinks=18, p2p_read="ok"),
        Link(a=0, b=2, nvlinks=4),
        Link(a=0, b=3, path="PIX"),
        Link(a=0, b=4, path="SYS"),
        Link(a=0, b=5, path="PIX", p2p_read="chipset_not_supported"),
        Link(a=0, b=6, nvlinks=4, path="SYS", p2p_write="disabled_by_regkey"),
    ]
    there = machine([24] * 8, links=links)
    ranks = [hop_rank(there, 0, other) for other in range(1, 7)]
    assert None not in ranks
    assert ranks == sorted(ranks, key=lambda rank: rank or 0)
    assert len(set(ranks)) == 6
    # Fifteen hops inside an NVLink island are better than one outside it.
    assert 15 * (ranks[1] or 0) < (ranks[2] or 0)


def test_a_split_stays_in_the_nvlink_island() -> None:
    pairs = [(0, 1), (1, 2), (3, 4), (4, 5)]
    links = [Link(a=a, b=b, nvlinks=4 if (a, b) in pairs else None, path="PIX") for a in range(6) for b in range(a + 1, 6)]
    made = plan(glm41v_9b(), machine([10] * 6, links=links))
    assert len(made.stages) == 3
    assert {cut.link for cut in made.cuts} == {"NV4"}


def test_stages_are_never_neighbors_over_a_faulty_link() -> None:
    there = machine(
        [14, 14, 14], links=[Link(a=0, b=1, nvlinks=18), Link(a=0, b=2, path="SYS"), Link(a=1, b=2, path="SYS")]
    )
    ill = with_gpu(there, 0, fabric=Fabric(state="completed", status=0, health_mask=0b01 << 4))
    assert [stage.gpu for stage in plan(glm41v_9b(), there).stages] == [0, 1]
    made = plan(glm41v_9b(), ill)
    assert [stage.gpu for stage in made.stages] == [0, 2]
    assert "GPU 0 and GPU 1 are never neighbors: in the NVSwitch fabric of GPU 0 a route is unhealthy." in made.reasons


def test_a_faulty_gpu_is_left_alone_where_the_others_suffice() -> None:
    there = with_gpu(machine([60, 14, 14]), 0, remap_failed=True)
    made = plan(glm41v_9b(), there)
    assert [stage.gpu for stage in made.stages] == [1, 2]
    assert "GPU 0 is left out: row remapping has failed, and the others suffice." in made.reasons
    needed = plan(glm41v_9b(), with_gpu(machine([60, 8]), 0, remap_failed=True))
    assert [stage.gpu for stage in needed.stages] == [0]
    assert "GPU 0 is used although row remapping has failed: the others do not suffice." in needed.reasons
    pinned = plan(glm41v_9b(), there, policy=Policy(pins=(("model.visual", 0),)))
    assert [stage.gpu for stage in pinned.stages] == [0]
