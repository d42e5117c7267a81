"""The replay of ``device_map="auto"`` on trees made by hand; tests/models/test_auto_exact.py asks the libraries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.model import Registered, Unit
from vlm_doctor.planner.auto_replay import AutoError, Device, Mode, Route, balanced_memory, replay
from vlm_doctor.planner.auto_tree import Node, largest_layer, tree

ROUTES: tuple[Route, ...] = get_args(Route)


def item(key: str, elements: int, *, block: str = "", is_parameter: bool = False) -> Registered:
    unit = Unit(key=key, role="other", parameters={"U8": elements}, stored_bytes=elements)
    return Registered(unit=unit, owner=key, block=block, is_parameter=is_parameter)


def of(*items: Registered) -> Node:
    return tree(items, lambda one: one.unit.elements)


def layers(count: int, size: int, *, block: str = "Block") -> list[Registered]:
    return [item(f"model.layers.{number}", size, block=block) for number in range(count)]


def decoder(count: int = 6, size: int = 10, table: int = 20) -> Node:
    return of(item("model.embed", table), *layers(count, size), item("model.norm", 1), item("head", table))


def test_the_tree_sums_up_and_keeps_the_order() -> None:
    root = decoder()

    assert root.size_bytes == 101
    assert [node.name for node in root.children] == ["model", "head"]
    assert [leaf.name for leaf in root.leaves()][-2:] == ["model.norm", "head"]


def test_bare_parameters_are_no_layers() -> None:
    root = of(item("a.bare", 90, is_parameter=True), item("a.linear", 5), item("b", 7))

    assert largest_layer(root.children) == (7, {"b"})
    assert largest_layer(of(item("bare", 90, is_parameter=True), item("b", 7)).children) == (90, {"bare"})
    assert largest_layer([]) == (0, set())


def test_all_fits_on_the_first_gpu_when_it_is_alone_and_large() -> None:
    placed = replay(decoder(), {0: 1000, "cpu": 1000}, [], route="5.18")

    assert placed.device_map == {"": 0}


@pytest.mark.parametrize(("route", "first"), [("4", 40), ("5", 40), ("5.18", 50)])
def test_two_gpus_share_and_the_margin_decides_where(route: Route, first: int) -> None:
    """Share 50; margin 12 for the largest block, 25 for the largest leaf; the largest leaf, 20, is kept free on GPU 0."""
    placed = replay(decoder(), {0: 1000, 1: 1000, "cpu": 1000}, [], route=route)

    used = [leaf for leaf in decoder().leaves() if placed.devices[leaf.name] == 0]
    assert sum(leaf.size_bytes for leaf in used) == first
    assert "model.embed" in placed.device_map
    assert placed.device_map["head"] == 1


def test_the_first_block_of_a_class_stands_for_all_in_accelerate_alone() -> None:
    root = of(*layers(2, 10), *[item(f"model.moe.{number}", 40, block="Block") for number in range(2)])
    memory: dict[Device, float] = {0: 1000, 1: 1000}

    assert balanced_memory(root, memory, route="4", is_low_zero=False)[0] == 50 + 12
    assert balanced_memory(root, memory, route="5", is_low_zero=False)[0] == 50 + 50


def test_blocks_of_several_classes_that_cannot_be_told_apart_count_at_their_largest() -> None:
    root = of(*layers(2, 10, block="A|B"), item("model.layers.2", 30, block="A|B"))

    assert balanced_memory(root, {0: 1000, 1: 1000}, route="4", is_low_zero=False)[0] == 25 + 37


def test_without_blocks_the_mean_leaf_is_the_margin() -> None:
    root = of(item("a.bare", 8, is_parameter=True), item("a.x", 4), item("b", 12))

    assert balanced_memory(root, {0: 1000, 1: 1000}, route="4", is_low_zero=False)[0] == 12 + 10


def test_without_gpus_all_goes_to_the_cpu_and_then_to_disk() -> None:
    assert replay(decoder(), {"cpu": 1000}, [], route="5.18").device_map == {"": "cpu"}
    placed = replay(decoder(), {"cpu": 60}, [], route="4").devices
    assert placed["model.embed"] == "cpu"
    assert placed["head"] == "disk"


def test_transformers_5_leaves_a_tenth_of_the_host_alone() -> None:
    memory: dict[Device, float] = {0: 0, "cpu": 105}

    assert replay(decoder(), memory, [], route="4").device_map == {"": "cpu"}
    assert "disk" in replay(decoder(), memory, [], route="5.18").devices.values()


def test_what_torch_holds_without_using_it_counts_as_free() -> None:
    memory: dict[Device, float] = {0: 100, "cpu": 1000}

    for route in ("4", "5"):
        assert replay(decoder(), memory, [], route=route, mode="sequential").device_map != {"": 0}
        assert replay(decoder(), memory, [], route=route, mode="sequential", cached_bytes=2).device_map == {"": 0}


def test_low_zero_leaves_the_first_gpu_empty_where_the_others_suffice() -> None:
    memory: dict[Device, float] = {0: 1000, 1: 1000, 2: 1000}

    assert 0 not in replay(decoder(), memory, [], route="5.18", mode="balanced_low_0").devices.values()
    assert replay(decoder(), {0: 1000}, [], route="5.18", mode="balanced_low_0").device_map == {"": 0}


@pytest.mark.parametrize("route", ROUTES)
def test_a_tied_head_goes_where_the_embedding_goes(route: Route) -> None:
    root = of(item("model.embed", 20), *layers(6, 10), item("model.norm", 1), item("head", 0))
    placed = replay(root, {0: 1000, 1: 1000}, [["head.weight", "model.embed.weight"]], route=route)

    assert placed.devices["head"] == placed.devices["model.embed"] == 0
    assert placed.devices["model.layers.5"] == 1


def test_a_tied_module_that_is_too_large_is_split() -> None:
    """``head`` comes first and is tied to something deep in ``model``, which as a whole fits nowhere."""
    root = of(item("head", 5), item("model.embed", 5), *layers(4, 10))
    placed = replay(root, {0: 30, 1: 1000}, [["head.weight", "model.embed.weight"]], route="5.18", mode="sequential")

    assert placed.devices["head"] == placed.devices["model.embed"]
    assert set(placed.devices) == {leaf.name for leaf in root.leaves()}


def test_tied_to_what_cannot_be_split_transformers_5_splits_what_fits_alone() -> None:
    root = of(item("model.first", 10), item("model.embed", 20), item("head", 25))
    memory: dict[Device, float] = {0: 65, 1: 100}
    ties = [["head.weight", "model.embed.weight"]]

    assert replay(root, memory, ties, route="4", mode="sequential").device_map == {"": 1}
    assert replay(root, memory, ties, route="5.18", mode="sequential").devices["model.first"] == 0


def test_a_module_tied_twice_counts_once() -> None:
    root = of(item("a", 10), item("b", 20), item("c", 1))
    ties = [["a.weight", "b.weight"], ["a.bias", "b.bias"]]

    assert replay(root, {0: 30, 1: 100}, ties, route="5.18", mode="sequential").devices == {"a": 1, "b": 1, "c": 1}
    assert replay(root, {0: 60, 1: 100}, ties, route="5.18", mode="sequential").devices == {"a": 0, "b": 0, "c": 0}


def test_where_the_libraries_raise_so_does_the_replay() -> None:
    """They look for the module of a tied parameter, and find none when the parameter stands alone."""
    root = of(item("a", 5), item("b.bare", 5, is_parameter=True), item("b.x", 100))

    with pytest.raises(AutoError, match=r"b\.bare"):
        replay(root, {0: 150, 1: 1000}, [["a.weight", "b.bare"]], route="5.18", mode="sequential")


@st.composite
def models(draw: st.DrawFn) -> Node:
    sizes = st.integers(1, 40)
    blocks = draw(st.lists(sizes, min_size=1, max_size=8))
    items = [item("vision.bare", draw(sizes), is_parameter=True), item("vision.proj", draw(sizes))]
    items += [item(f"vision.blocks.{n}.{part}", draw(sizes)) for n in range(draw(st.integers(0, 3))) for part in "ab"]
    items += [item("model.embed", draw(sizes))]
    items += [item(f"model.layers.{n}", size, block="Block") for n, size in enumerate(blocks)]
    return of(*items, item("model.norm", 1), item("head", draw(sizes)))


@given(
    root=models(),
    gpus=st.lists(st.integers(0, 200), min_size=0, max_size=5),
    cpu=st.integers(0, 300),
    route=st.sampled_from(ROUTES),
    mode=st.sampled_from(get_args(Mode)),
)
def test_everything_is_placed_once_in_order_and_no_gpu_gets_more_than_it_has(
    root: Node, gpus: list[int], cpu: int, route: Route, mode: Mode
) -> None:
    memory: dict[Device, float] = {**dict(enumerate(gpus)), "cpu": cpu}
    placed = replay(root, memory, [], route=route, mode=mode)

    order = [*range(len(gpus)), "cpu", "disk"]
    ranks = [order.index(device) for device in placed.devices.values()]
    assert list(placed.devices) == [leaf.name for leaf in root.leaves()]
    assert ranks == sorted(ranks)
    for gpu, size in enumerate(gpus):
        assert sum(leaf.size_bytes for leaf in root.leaves() if placed.devices[leaf.name] == gpu) <= size
    assert {leaf.name: device for leaf, device in expanded(root, placed.device_map)} == placed.devices


def expanded(root: Node, device_map: dict[str, Device]) -> Iterator[tuple[Node, Device]]:
    for leaf in root.leaves():
        (device,) = [device for key, device in device_map.items() if not key or f"{leaf.name}.".startswith(f"{key}.")]
        yield leaf, device
