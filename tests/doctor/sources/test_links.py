from __future__ import annotations

import pytest

from vlm_doctor.machine import Fabric, Gap, Gpu, NvLink
from vlm_doctor.sources.links import Pair, count_nvlinks, join


def gpu(index: int, *ports: NvLink, fabric: Fabric | None = None, bus_id: str | None = "") -> Gpu:
    address = f"0000:{index + 1:02x}:00.0" if bus_id == "" else bus_id
    return Gpu(index=index, uuid=f"GPU-{index}", name="GPU", bus_id=address, nvlinks=ports, fabric=fabric)


def port(link: int, remote: str, address: str | None, *, is_active: bool = True) -> NvLink:
    kind = "switch" if remote == "switch" else "gpu" if remote == "gpu" else "unknown"
    return NvLink(link=link, is_active=is_active, remote=kind, remote_bus_id=address)  # type: ignore[arg-type]


def switched(index: int, count: int, fabric: Fabric | None = None) -> Gpu:
    return gpu(index, *(port(link, "switch", "ffff:ff:ff.0") for link in range(count)), fabric=fabric)


def test_bridge_is_counted_by_matching_addresses() -> None:
    a = gpu(0, port(0, "gpu", "0000:02:00.0"), port(1, "gpu", "0000:02:00.0"), port(2, "gpu", "0000:03:00.0"))
    b = gpu(1, port(0, "gpu", "0000:01:00.0"), port(1, "gpu", "0000:01:00.0"))
    assert count_nvlinks(a, b) == 2
    assert count_nvlinks(b, a) == 2


def test_bridge_seen_from_one_end_counts() -> None:
    assert count_nvlinks(gpu(0), gpu(1, port(0, "gpu", "0000:01:00.0"))) == 1


def test_far_end_of_unknown_kind_still_matches_by_address() -> None:
    assert count_nvlinks(gpu(0, port(0, "unknown", "0000:02:00.0")), gpu(1)) == 1


def test_inactive_ports_do_not_count() -> None:
    assert count_nvlinks(gpu(0, port(0, "gpu", "0000:02:00.0", is_active=False)), gpu(1)) == 0


def test_unknown_addresses_never_match_each_other() -> None:
    assert count_nvlinks(gpu(0, port(0, "gpu", None), bus_id=None), gpu(1, port(0, "gpu", None), bus_id=None)) == 0


def test_switch_joins_by_the_smaller_number_of_ports() -> None:
    up = Fabric(state="completed", status=0, clique_id=0)
    assert count_nvlinks(switched(0, 18, up), switched(1, 16, up)) == 16


def test_switch_reaches_no_gpu_without_switch_ports() -> None:
    assert count_nvlinks(switched(0, 18), gpu(1)) == 0


@pytest.mark.parametrize("state", ["not_supported", "unknown"])
def test_machines_without_a_fabric_state_are_taken_by_their_ports(state: str) -> None:
    fabric = Fabric(state=state)  # type: ignore[arg-type]
    assert count_nvlinks(switched(0, 12, fabric), switched(1, 12, None)) == 12


@pytest.mark.parametrize(
    "fabric",
    [
        Fabric(state="not_started"),
        Fabric(state="in_progress"),
        Fabric(state="completed", status=999),
        Fabric(state="completed", status=0, clique_id=7),
    ],
)
def test_links_that_trained_carry_nothing_while_the_fabric_is_down_or_split(fabric: Fabric) -> None:
    up = Fabric(state="completed", status=0, clique_id=0)
    assert count_nvlinks(switched(0, 18, up), switched(1, 18, fabric)) == 0


def test_peer_access_over_nvlink_without_a_match_is_an_unknown_number() -> None:
    assert count_nvlinks(gpu(0), gpu(1), "ok") is None
    assert count_nvlinks(gpu(0), gpu(1), "not_supported") == 0


def test_pairs_of_unknown_gpus_and_reversed_pairs_are_left_out() -> None:
    pairs = [Pair(a=0, b=5), Pair(a=5, b=0), Pair(a=1, b=0), Pair(a=0, b=0), Pair(a=0, b=1, path="PIX")]
    assert [(link.a, link.b, link.label) for link in join([gpu(0), gpu(1)], pairs)] == [(0, 1, "PIX")]


@pytest.mark.parametrize(
    ("path", "nvlinks"),
    [
        ("gpus[1].nvlinks", None),
        ("gpus[1].nvlinks[3]", None),
        ("gpus[1].nvlinks[3].remote_bus_id", None),
        ("gpus[1].nvlinks[3].version", 0),
        ("gpus[11].nvlinks", 0),
        ("gpus[1].memory_free_bytes", 0),
    ],
)
def test_only_gaps_about_ports_make_the_count_unknown(path: str, nvlinks: int | None) -> None:
    links = join([gpu(0), gpu(1)], [Pair(a=0, b=1)], [Gap(path=path, reason="NVML: Unknown Error")])
    assert [link.nvlinks for link in links] == [nvlinks]
