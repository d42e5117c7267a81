"""Loaded models, judged and moved. GPUs that are not there keep to their devices, and answers must not change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vlm_doctor import Policy, Workload, load_machine, load_profile, plan
from vlm_doctor.errors import MapError
from vlm_doctor.placement import Plan
from vlm_doctor.planner.budget import CONTEXT_BYTES
from vlm_doctor.planner.map_check import check_placed

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

import transformers  # noqa: E402
from accelerate import dispatch_model  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from pytest_vlmgpu.testing import TINY_FAMILIES  # noqa: E402
from vlm_doctor import live_model  # noqa: E402
from vlm_doctor.live_model import _Move, check_model, in_safe_order, joined, profile_of, redistribute  # noqa: E402

from .fake_devices import FakeDevices, place_of  # noqa: E402
from .test_map_truth import Subject  # noqa: E402

IS_OLD = transformers.__version__.startswith("4.")
needs_5 = pytest.mark.skipif(IS_OLD, reason="4.57 makes masks with torch.vmap, in which the fakes lose their devices")
MACHINE = load_machine("80GiB,80GiB,80GiB")
GPUS = [torch.device("cuda", number) for number in range(3)]


@pytest.fixture(scope="module")
def subjects(tiny_vlms: Mapping[str, Path]) -> dict[str, Subject]:
    return {family: Subject(folder) for family, folder in tiny_vlms.items()}


@pytest.fixture
def llava(subjects: dict[str, Subject]) -> Any:
    return copy.deepcopy(subjects["llava"].model)


def plan_for(subject: Subject, gpus: int) -> Plan:
    planned: Plan = plan(subject.profile, MACHINE, Workload(), Policy(min_gpus=gpus, max_gpus=gpus))
    return planned


def answer(model: Any, inputs: Mapping[str, Any], device: Any) -> Any:
    with torch.no_grad():
        logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
    return logits.as_subclass(torch.Tensor)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_live_model_is_described_like_its_files(family: str, subjects: dict[str, Subject]) -> None:
    live, stored = profile_of(subjects[family].model), subjects[family].profile

    assert [unit.key for unit in live.units] == [unit.key for unit in stored.units]
    assert [unit.elements for unit in live.units] == [unit.elements for unit in stored.units]
    # 4.57 ties the head unless it is told not to.
    assert live.tied == stored.tied or IS_OLD
    assert (live.text, live.model_type) == (stored.text, stored.model_type)
    assert live.vision is not None
    assert stored.vision is not None
    assert (live.vision.layers, live.vision.hidden) == (stored.vision.layers, stored.vision.hidden)


@needs_5
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_model_that_is_moved_gives_the_same_answer(family: str, subjects: dict[str, Subject]) -> None:
    subject = subjects[family]
    model = copy.deepcopy(subject.model)
    expected = answer(model, subject.inputs, "cpu")
    ties = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}

    with FakeDevices():
        for gpus in (1, 3, 2, 3):
            planned = plan_for(subject, gpus)
            assert redistribute(model, planned, devices=GPUS[:gpus]) is model
            where = {name: place_of(tensor) for name, tensor in model.named_parameters()}
            assert set(where.values()) == set(GPUS[:gpus])
            assert torch.allclose(answer(model, subject.inputs, GPUS[0]), expected)
            checked = check_model(model, machine=MACHINE)
            assert [finding.code for finding in checked.findings] == ["VLM625"] * (gpus > 1)
        redistribute(model, plan_for(subject, 1), devices=["cpu"])

    assert torch.equal(answer(model, subject.inputs, "cpu"), expected)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)} == ties


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_model_is_judged_by_where_its_hook_takes_what_it_is_given(
    order: tuple[int, int], llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the first stage of a plan, also where a map alone would mean another GPU."""
    asked = []

    def judged(*args: Any, main: Any) -> Any:
        asked.append(main)
        return check_placed(*args, main=main)

    monkeypatch.setattr(live_model, "check_placed", judged)
    planned = plan(profile_of(llava), MACHINE, Workload(), Policy(min_gpus=2, max_gpus=2))
    with FakeDevices():
        redistribute(llava, planned, devices=[GPUS[number] for number in order])
        checked = check_model(llava, machine=MACHINE)
        redistribute(llava, plan(profile_of(llava), MACHINE), devices=GPUS[:1])
        check_model(llava, machine=MACHINE)

    assert asked == [order[0], None]
    assert [finding.code for finding in checked.findings] == ["VLM625"]


def test_gradients_move_along(llava: Any) -> None:
    planned = plan(profile_of(llava), MACHINE)
    for parameter in llava.parameters():
        parameter.grad = torch.ones_like(parameter)

    with FakeDevices():
        redistribute(llava, planned, devices=GPUS[:1])
        assert {place_of(parameter.grad) for parameter in llava.parameters()} == {GPUS[0]}


@needs_5
def test_a_model_in_parts_without_hooks_is_an_error(llava: Any) -> None:
    with FakeDevices():
        for name, parameter in llava.named_parameters():
            parameter.data = parameter.data.to(GPUS[1] if "lm_head" in name else GPUS[0])
        for module in llava.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.to(GPUS[0])
        checked = check_model(llava, machine=MACHINE)

    assert [finding.code for finding in checked.findings if finding.severity == "error"] == ["VLM626"]
    assert checked.device_map == {"model": 0, "lm_head": 1}


def test_a_model_that_left_its_map_is_judged_by_its_tensors(llava: Any) -> None:
    with FakeDevices():
        redistribute(llava, plan(profile_of(llava), MACHINE), devices=GPUS[:1])
        llava.lm_head.weight.data = llava.lm_head.weight.data.to(GPUS[1])
        checked = check_model(llava, machine=MACHINE)

    assert checked.device_map == {"model": 0, "lm_head": 1}
    assert checked.notes[0] == "Tensors are not where hf_device_map says: the map shown is that of the tensors."


def test_an_offloaded_model_is_judged_by_its_map(llava: Any) -> None:
    device_map = {"model": 0, "lm_head": "cpu"}
    with FakeDevices():
        for _, tensor in llava.named_parameters():
            tensor.data = tensor.data.to(GPUS[0])
    llava.lm_head.weight = torch.nn.Parameter(llava.lm_head.weight.data.to("meta"))
    llava.hf_device_map = device_map
    with FakeDevices():
        for module in llava.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.to(GPUS[0])
        checked = check_model(llava, machine=MACHINE)
        assert checked.device_map == device_map
        assert "VLM619" in [finding.code for finding in checked.findings]
        with pytest.raises(MapError, match=r"lm_head.weight is offloaded \(on the meta device\); load the model again"):
            redistribute(llava, plan(profile_of(llava), MACHINE), devices=GPUS[:1])


def test_the_live_machine_is_looked_at_when_none_is_given(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_doctor.sources.Collection.without_torch", lambda _: load_machine("L4"))

    checked = check_model(llava)

    assert checked.machine == "L4"
    assert checked.device_map == {"": "cpu"}
    assert checked.is_clean


def test_what_this_process_holds_does_not_count_against_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load_machine("2xL4")
    full = msgspec.structs.replace(
        machine, gpus=tuple(msgspec.structs.replace(gpu, memory_free_bytes=2**30) for gpu in machine.gpus)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: (3 * 2**30, 0)[number])

    freed = [gpu.memory_free_bytes for gpu in live_model._without_this_process(full).gpus]

    assert freed == [4 * 2**30 + CONTEXT_BYTES, 2**30]


def test_what_cannot_be_moved_is_refused_before_anything_moves(llava: Any) -> None:
    planned = plan(profile_of(llava), MACHINE)
    other = plan(load_profile("Qwen/Qwen2.5-VL-7B-Instruct", allow_network=False), MACHINE, policy=Policy(min_gpus=2))
    short = plan(load_profile("Qwen/Qwen2.5-VL-72B-Instruct", allow_network=False), load_machine("L4"))
    holes = msgspec.structs.replace(planned, device_map={"model": 0})
    before = {name: tensor.data_ptr() for name, tensor in llava.named_parameters()}

    for wanted, words in (
        (other, "is not for this model: LlavaForConditionalGeneration has no module 'model.visual'"),
        (short, "does not fit, so it has no map to follow"),
        (holes, "it names no device for lm_head.weight"),
        (planned, "The plan wants GPU 0 (GPU-"),
    ):
        with pytest.raises(MapError) as refused:
            redistribute(llava, wanted)
        assert words in str(refused.value)
    with pytest.raises(MapError, match="1 stages and 2 devices were given"):
        redistribute(llava, planned, devices=GPUS[:2])
    llava.is_quantized = True
    with pytest.raises(MapError, match="is quantized, and quantized weights are not moved"):
        redistribute(llava, planned, devices=GPUS[:1])
    with pytest.raises(MapError, match="dict is no torch module"):
        redistribute({}, planned)
    assert {name: tensor.data_ptr() for name, tensor in llava.named_parameters()} == before


def test_memory_that_runs_out_on_the_way_is_one_sentence(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(profile_of(llava), MACHINE)
    with FakeDevices():
        monkeypatch.setattr(live_model, "_moves", lambda model, targets: [_Move("lm_head.weight", _Full(), GPUS[0], 1)])
        with pytest.raises(MapError, match=r"lm_head.weight could not be moved to cuda:0 \(CUDA out of memory\)"):
            redistribute(llava, planned, devices=GPUS[:1])


class _Full:
    device = torch.device("cpu")
    grad = None

    def to(self, _: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_a_tensor_that_does_not_arrive_is_said(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_model, "_moves", lambda model, targets: [])
    with FakeDevices(), pytest.raises(MapError, match="did not arrive on cuda:0; load the model again"):
        redistribute(llava, plan(profile_of(llava), MACHINE), devices=GPUS[:1])


def test_gpus_are_found_by_their_uuid(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(profile_of(llava), MACHINE)
    uuids = ["11111111-0000", planned.stages[0].uuid.removeprefix("GPU-").upper()]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: type("P", (), {"uuid": uuids[n]}))

    with FakeDevices():
        redistribute(llava, planned)
        assert {place_of(tensor) for tensor in llava.parameters()} == {GPUS[1]}


def test_what_is_no_model_is_one_sentence() -> None:
    with pytest.raises(MapError, match="Linear is no transformers model: it has no config"):
        check_model(torch.nn.Linear(1, 1))
    empty = torch.nn.Module()
    empty.config = type("C", (), {"to_dict": lambda self: {}})()
    with pytest.raises(MapError, match="Module has no tensors"):
        check_model(empty)


def test_a_map_of_devices_is_as_short_as_can_be() -> None:
    assert joined({"a.b.w": 0, "a.c.w": 0, "a.c.v": 0}) == {"": 0}
    assert joined({"a.b.w": 0, "a.c.w": 1, "d.e": 1}) == {"a.b": 0, "a.c": 1, "d": 1}


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 50)), max_size=40),
    st.lists(st.integers(0, 100), min_size=4, max_size=4),
)
def test_no_device_ever_holds_more_than_it_must(moves: list[tuple[int, int, int]], staying: list[int]) -> None:
    class Tensor:
        def __init__(self, device: int) -> None:
            self.device = device

    planned = [_Move(str(n), Tensor(a), b, size) for n, (a, b, size) in enumerate(moves) if a != b]
    before = dict(enumerate(staying))
    for move in planned:
        before[move.tensor.device] += move.size_bytes
    after = dict(before)
    for move in planned:
        after[move.tensor.device] -= move.size_bytes
        after[move.target] += move.size_bytes
    largest = max((move.size_bytes for move in planned), default=0)
    now = dict(before)
    done = 0
    for move in in_safe_order(planned, before):
        # The copy exists twice for a moment.
        now[move.target] += move.size_bytes
        assert now[move.target] <= max(before[move.target], after[move.target]) + largest
        now[move.tensor.device] -= move.size_bytes
        done += 1
    assert (now, done) == (after, len(planned))


@needs_5
def test_accelerates_own_dispatch_is_clean(llava: Any) -> None:
    with FakeDevices():
        device_map = {"model": GPUS[0], "lm_head": GPUS[1]}
        dispatch_model(llava, device_map, main_device=GPUS[0], skip_keys=llava._skip_keys_device_placement)
        checked = check_model(llava, machine=MACHINE)

    assert checked.device_map == {"model": 0, "lm_head": 1}
    assert checked.is_clean
