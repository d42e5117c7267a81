from __future__ import annotations

from itertools import combinations

import pytest

from vlm_doctor.machine import Gap, Gpu, Link, LinkPath, Machine, NvLink
from vlm_doctor.topology import WORST_RANK, describe, islands, link_rank


def machine(count: int, *links: Link, remote: str = "gpu", gaps: tuple[Gap, ...] = ()) -> Machine:
    port = NvLink(link=0, is_active=True, remote="switch" if remote == "switch" else "gpu")
    gpus = tuple(Gpu(index=i, uuid=f"GPU-{i}", name="GPU", nvlinks=(port,)) for i in range(count))
    return Machine(origin="recorded", description="test", gpus=gpus, links=links, gaps=gaps)


def link(a: int, b: int, nvlinks: int | None = 0, path: LinkPath | None = "PHB") -> Link:
    return Link(a=a, b=b, nvlinks=nvlinks, path=path)


def bridged(count: int, *groups: tuple[int, ...], path: LinkPath = "SYS") -> list[Link]:
    return [
        link(a, b, 4 if any(a in group and b in group for group in groups) else 0, path)
        for a, b in combinations(range(count), 2)
    ]


def test_links_are_ranked_from_nvlink_to_unknown() -> None:
    ranked = [
        link(0, 1, 40),
        link(0, 1, 18),
        link(0, 1, 4),
        link(0, 1, 1),
        link(0, 1, 0, "INTERNAL"),
        link(0, 1, 0, "PIX"),
        link(0, 1, None, "PXB"),
        link(0, 1, 0, "PHB"),
        link(0, 1, 0, "NODE"),
        link(0, 1, 0, "SYS"),
        link(0, 1, 0, None),
    ]

    ranks = [link_rank(one) for one in ranked]

    assert ranks == sorted(set(ranks))
    assert (ranks[0], ranks[-1], link_rank(None)) == (0, WORST_RANK, WORST_RANK)


@pytest.mark.parametrize(
    ("count", "links", "expected"),
    [
        (0, [], ()),
        (1, [], ((0,),)),
        (3, [], ((0,), (1,), (2,))),
        (2, [link(0, 1, 18)], ((0, 1),)),
        (2, [link(0, 1, None)], ((0,), (1,))),
        (4, bridged(4, (0, 1), (2, 3)), ((0, 1), (2, 3))),
        (4, bridged(4, (0, 2), (1, 3)), ((0, 2), (1, 3))),
        (4, [link(0, 3, 2), link(2, 3, 2)], ((0, 2, 3), (1,))),
        (5, [link(0, 1, 2), link(1, 2, 2), link(2, 3, 2), link(0, 3, 2)], ((0, 1, 2, 3), (4,))),
    ],
)
def test_islands(count: int, links: list[Link], expected: tuple[tuple[int, ...], ...]) -> None:
    assert islands(machine(count, *links)) == expected


def test_an_island_of_some_gpus_is_not_joined_through_others() -> None:
    chain = machine(3, link(0, 1, 2), link(1, 2, 2))

    assert islands(chain) == ((0, 1, 2),)
    assert islands(chain, [2, 0]) == ((0,), (2,))


def test_64_gpus_behind_switches() -> None:
    pod = machine(64, *(link(a, b, 18) for a, b in combinations(range(64), 2)), remote="switch")

    assert islands(pod) == (tuple(range(64)),)
    assert describe(pod) == "64 GPUs joined by NV18 through NVSwitch: any split may cross them freely."


@pytest.mark.parametrize(
    ("whole", "sentence"),
    [
        (machine(0), "No GPU, so there are no links."),
        (machine(1), "1 GPU: nothing to split over, no link matters."),
        (machine(2, link(0, 1, 4)), "2 GPUs joined by NV4: any split may cross them freely."),
        (
            machine(3, link(0, 1, 2), link(0, 2, 1), link(1, 2, 2)),
            "3 GPUs joined by NVLink (NV1 to NV2): any split may cross them, best where there are most links.",
        ),
        (
            machine(3, link(0, 1, 2), link(1, 2, 2), link(0, 2)),
            "3 GPUs joined by NVLink, not every pair directly: keep neighboring stages on joined pairs.",
        ),
        (
            machine(4, *bridged(4, (0, 1), (2, 3))),
            "4 GPUs with two NVLink pairs (0-1, 2-3): keep a split inside one pair; between pairs a hop crosses "
            "PCIe (SYS).",
        ),
        (
            machine(4, *bridged(4, (1, 3), path="PHB")),
            "4 GPUs with one NVLink pair (1-3); GPUs 0, 2 without NVLink: keep a split inside that pair; "
            "outside it a hop crosses PCIe (PHB).",
        ),
        (
            machine(3, *bridged(3, (0, 1))),
            "3 GPUs with one NVLink pair (0-1); GPU 2 without NVLink: keep a split inside that pair; "
            "outside it a hop crosses PCIe (SYS).",
        ),
        (
            machine(8, *bridged(8, (0, 1, 2, 3), (4, 5, 6, 7))),
            "8 GPUs with two NVLink islands (0-3, 4-7): keep a split inside one island; between islands a hop "
            "crosses PCIe (SYS).",
        ),
        (
            machine(6, *bridged(6, (0, 2, 4), (1, 3, 5))),
            "6 GPUs with two NVLink islands (0+2+4, 1+3+5): keep a split inside one island; "
            "between islands a hop crosses PCIe (SYS).",
        ),
        (
            machine(10, *bridged(10, (0, 1), (2, 3), (4, 5), (6, 7), (8, 9))),
            "10 GPUs with 5 NVLink pairs (0-1, 2-3, 4-5, 6-7, 8-9): keep a split inside one pair; "
            "between pairs a hop crosses PCIe (SYS).",
        ),
        (
            machine(3, link(0, 1), link(0, 2, path="SYS"), link(1, 2, path="NODE")),
            "3 GPUs without NVLink: a split crosses PCIe (PHB to SYS) at each border, so use few GPUs.",
        ),
        (
            machine(3, link(0, 1)),
            "3 GPUs without NVLink, as far as is known: a split crosses PCIe (PHB) at each border, so use few GPUs.",
        ),
        (
            machine(4, link(0, 1, 4), link(2, 3, 4)),
            "4 GPUs with two NVLink pairs (0-1, 2-3): keep a split inside one pair; between pairs a hop crosses PCIe.",
        ),
        (machine(2), "2 GPUs, and how they are joined is unknown."),
        (
            machine(2, Link(a=0, b=1), gaps=(Gap(path="links", reason="NVML: Unknown Error"),)),
            "2 GPUs, and how they are joined is unknown (NVML: Unknown Error).",
        ),
    ],
)
def test_one_sentence_says_what_the_links_mean(whole: Machine, sentence: str) -> None:
    assert describe(whole) == sentence


def test_some_of_the_gpus() -> None:
    four = machine(4, *bridged(4, (0, 1), (2, 3)))

    assert describe(four, [2, 3]) == "2 GPUs joined by NV4: any split may cross them freely."
