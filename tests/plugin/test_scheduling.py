"""The scheduler alone, with workers that only write down what they are sent; and what it takes of pytest-xdist."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vlmgpu.collection.groups import Groups
from pytest_vlmgpu.state import CONTROLLER
from pytest_vlmgpu.workers.scheduling import VlmScheduling, make

pytest.importorskip("xdist", reason="pytest-xdist is not installed")

IDS = [f"test_x.py::test_{number}" for number in range(12)]


class Node:
    """A worker that runs nothing."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.sent: list[int] = []
        self.shutting_down = False
        self.gateway = SimpleNamespace(id=f"gw{slot}", spec=object())

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down, "sent to a worker that was told to go home"
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


class Controller:
    """What the scheduler asks of the real one."""

    def __init__(self, groups: Groups | None, owners: dict[int, int], workers: int) -> None:
        self._groups, self._owners, self.workers = groups, owners, workers
        self.hides_gpus = False
        self.not_run: list[str] = []

    def report_not_run(self, nodeid: str, node: Node) -> None:
        self.not_run.append(nodeid)

    def groups(self) -> Groups | None:
        return self._groups

    def assign(self, groups: Groups) -> dict[int, int]:
        return self._owners

    def slot_of(self, node: Node) -> int:
        return node.slot


class Config:
    """The least that pytest-xdist's schedulers want."""

    def __init__(self, workers: int) -> None:
        self.stash = pytest.Stash()
        self.option = SimpleNamespace(loadscopereorder=False, debug=False)
        self._values = {"tx": ["popen"] * workers, "maxschedchunk": None, "dist": "load"}

    def getvalue(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    getoption = getvalue


def scheduler(group_of: dict[int, int], owners: dict[int, int], workers: int = 2, **bound: Any) -> VlmScheduling:
    from xdist.scheduler import LoadScheduling

    groups = Groups([], group_of, bound.get("bound", {})) if group_of else None
    inner = LoadScheduling(Config(workers))
    controller = Controller(groups, owners, workers)
    controller.hides_gpus = bound.get("hides", False)
    return VlmScheduling(controller, inner)  # type: ignore[arg-type]


def started(schedule: VlmScheduling, workers: int = 2) -> list[Node]:
    nodes = [Node(slot) for slot in range(workers)]
    for node in nodes:
        schedule.add_node(node)
    for node in nodes:
        schedule.add_node_collection(node, IDS)
    assert schedule.collection_is_completed
    schedule.schedule()
    return nodes


def work_off(schedule: VlmScheduling, nodes: list[Node]) -> dict[int, int]:
    """Run all tests, as the workers do: the last one only when there is nothing after it. Position to worker."""
    ran: dict[int, int] = {}
    progress = True
    while progress:
        progress = False
        for node in nodes:
            done = sum(slot == node.slot for slot in ran.values())
            if done < len(node.sent) and (done + 1 < len(node.sent) or node.shutting_down):
                ran[node.sent[done]] = node.slot
                schedule.mark_test_complete(node, node.sent[done])
                progress = True
    return ran


def test_each_model_has_one_worker_and_the_rest_is_for_all() -> None:
    schedule = scheduler({0: 0, 3: 0, 6: 0, 1: 1, 4: 1}, {0: 0, 1: 1})

    ran = work_off(schedule, started(schedule))

    assert len(ran) == len(IDS)
    assert {ran[position] for position in (0, 3, 6)} == {0}
    assert {ran[position] for position in (1, 4)} == {1}
    assert schedule.tests_finished
    assert not schedule.has_pending


@given(
    st.dictionaries(st.integers(0, 11), st.integers(0, 3), min_size=1),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.integers(1, 4),
    st.dictionaries(st.integers(0, 11), st.sampled_from("xy")),
    st.booleans(),
)
def test_every_test_runs_once_with_its_owner(
    group_of: dict[int, int], owners: list[int], workers: int, bound: dict[int, str], hides: bool
) -> None:
    owner_of = {number: owner % workers for number, owner in enumerate(owners)}
    bound = {position: name for position, name in bound.items() if position not in group_of}
    schedule = scheduler(group_of, owner_of, workers, bound=bound, hides=hides)
    nodes = started(schedule, workers)
    with_gpus = set(owner_of.values())

    ran = work_off(schedule, nodes)

    assert sorted(position for node in nodes for position in node.sent) == list(range(12)), "lost, or run twice"
    assert sorted(ran) == list(range(12)), "a worker waits for ever"
    assert all(ran[position] == owner_of[group] for position, group in group_of.items())
    for name in "xy":
        assert len({ran[position] for position, of in bound.items() if of == name}) <= 1
    if hides and len(with_gpus) < workers:
        assert with_gpus.isdisjoint(ran[position] for position in range(12) if position not in group_of)
    for node in nodes:
        own = [position for position in node.sent if position in group_of]
        assert own == sorted(own), "tests of a worker's models are out of order"
    assert schedule.tests_finished


def test_without_gated_tests_the_usual_scheduler_does_everything() -> None:
    schedule = scheduler({}, {})
    nodes = started(schedule)

    assert work_off(schedule, nodes).keys() == set(range(12))
    assert schedule.tests_finished
    for node in nodes:
        assert schedule.remove_node(node) is None
    assert schedule.nodes == []


def test_a_crashed_worker_gives_its_tests_to_its_replacement() -> None:
    schedule = scheduler({position: position % 2 for position in range(6)}, {0: 0, 1: 1})
    first, second = started(schedule)
    assert first.sent[:3] == [0, 2, 4]
    schedule.mark_test_complete(first, 0)

    assert schedule.remove_node(first) == IDS[2]
    assert not schedule.tests_finished
    replacement = Node(0)
    schedule.add_node(replacement)
    schedule.add_node_collection(replacement, IDS)
    schedule.schedule()

    ran = work_off(schedule, [second, replacement])
    assert 4 in replacement.sent
    assert 2 not in replacement.sent
    assert {position for position in ran if position < 6} == {1, 3, 4, 5}
    assert schedule.tests_finished


def test_a_crashed_test_can_be_run_again() -> None:
    schedule = scheduler({0: 0, 1: 0}, {0: 0})
    first, second = started(schedule)

    crashed = schedule.remove_node(first)
    assert crashed == IDS[0]
    schedule.mark_test_pending(crashed)
    replacement = Node(0)
    schedule.add_node(replacement)
    schedule.add_node_collection(replacement, IDS)
    schedule.schedule()

    assert replacement.sent[:2] == [0, 1]
    assert work_off(schedule, [second, replacement]).keys() == set(range(12))


def test_a_replacement_that_collected_other_tests_gets_none() -> None:
    schedule = scheduler({0: 0}, {0: 0})
    first, _ = started(schedule)
    schedule.remove_node(first)
    stranger = Node(0)

    schedule.add_node(stranger)
    schedule.add_node_collection(stranger, ["other"])
    schedule.schedule()

    assert stranger.sent == []
    assert stranger.shutting_down


@pytest.mark.parametrize("is_other_at_work", [True, False])
def test_what_a_replacement_cannot_run_is_run_by_another_worker_or_fails(*, is_other_at_work: bool) -> None:
    schedule = scheduler({position: position for position in range(4)}, {0: 0, 1: 0, 2: 0, 3: 1})
    first, second = started(schedule)
    if not is_other_at_work:
        second.shutting_down = True
    assert schedule.remove_node(first) == IDS[0]
    stranger = Node(0)

    schedule.add_node(stranger)
    schedule.add_node_collection(stranger, ["other"])
    schedule.schedule()

    not_run = schedule._controller.not_run  # type: ignore[attr-defined]
    ran = work_off(schedule, [second])
    assert {position for position in ran if position < 4} == ({1, 2, 3} if is_other_at_work else {3})
    assert {IDS[position] for position in ran} | {IDS[0], *not_run} == set(IDS)
    assert not_run == ([] if is_other_at_work else [IDS[n] for n in range(1, 12) if n not in ran])
    schedule.remove_node(second)
    assert schedule.tests_finished


def test_workers_that_collected_different_tests_are_left_to_pytest_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = scheduler({0: 0}, {0: 0})
    reports: list[Any] = []
    hook = SimpleNamespace(pytest_collectreport=lambda **report: reports.append(report["report"]))
    monkeypatch.setattr(Config, "hook", hook, raising=False)
    nodes = [Node(0), Node(1)]
    for node, ids in zip(nodes, (IDS, IDS[1:]), strict=True):
        schedule.add_node(node)
        schedule.add_node_collection(node, ids)
    schedule.schedule()

    assert [node.sent for node in nodes] == [[], []]
    assert "Different tests were collected" in reports[0].longrepr


@pytest.mark.parametrize("dist", ["each", "loadfile", "loadscope"])
def test_the_users_choice_of_another_scheduler_counts(dist: str) -> None:
    config: Any = Config(2)
    config._values["dist"] = dist
    shared: list[bool] = []
    config.stash[CONTROLLER] = SimpleNamespace(is_local=True, share_out_evenly=lambda: shared.append(True))

    assert make(config, None) is None
    assert shared == [True]


@pytest.mark.parametrize("dist", ["load", "loadgroup", "worksteal"])
def test_the_contract_with_this_version_of_pytest_xdist(dist: str) -> None:
    """What is used of pytest-xdist is there: its protocol is ours, member for member, and so are the calls between us."""
    from xdist import newhooks, scheduler, workermanage

    config: Any = Config(2)
    config._values["dist"] = dist
    config.stash[CONTROLLER] = SimpleNamespace(is_local=True)
    assert isinstance(make(config, None), VlmScheduling)

    # Before 3.6 the protocol had no name of its own: the scheduler of --dist load is it.
    theirs = getattr(scheduler, "Scheduling", scheduler.LoadScheduling)
    protocol = {name for name in vars(theirs) if not name.startswith("_") and name != "check_schedule"}
    assert protocol <= {name for name in vars(VlmScheduling) if not name.startswith("_")}
    for name in protocol:
        wanted, ours = getattr(theirs, name), getattr(VlmScheduling, name)
        assert isinstance(wanted, property) == isinstance(ours, property)
        if not isinstance(wanted, property):
            assert list(inspect.signature(wanted).parameters) == list(inspect.signature(ours).parameters)
    sources = Path(inspect.getfile(newhooks)).parent
    asked = set((sources / "dsession.py").read_text().split("self.sched.")[1:])
    assert {part.split("(")[0].split()[0].split(".")[0].rstrip(":,)") for part in asked} <= {
        *vars(VlmScheduling),
        "__class__",
    }

    assert {"pytest_xdist_setupnodes", "pytest_configure_node", "pytest_xdist_make_scheduler"} <= vars(newhooks).keys()
    assert "pytest_xdist_auto_num_workers" in vars(newhooks)
    for name in ("send_runtest_some", "shutdown", "shutting_down"):
        assert hasattr(workermanage.WorkerController, name)
    assert "workerid" in (sources / "remote.py").read_text()
