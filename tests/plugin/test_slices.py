"""MIG slices: each is a GPU of its own, chosen by its UUID, leased by its UUID, and the only one that a process sees."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

import vlm_doctor.machine as m
from pytest_vlmgpu.gating.selection import judge
from pytest_vlmgpu.gating.slices import is_slice, unfold
from pytest_vlmgpu.leasing.sets import Need, demands_of, divide
from pytest_vlmgpu.options import GpuChoice, parse_gpus
from pytest_vlmgpu.requirements import Requirements
from vlm_doctor.codec import from_json, to_json
from vlm_doctor.sources import load_machine
from vlm_doctor.units import GIB
from vlm_doctor.visibility import visible_gpus

from ..until import until
from .projects import ONE_MODEL, SLOW, finish, with_workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from .projects import Project

RECORDED = Path(__file__).parents[1] / "machines" / "a100-mig.json"
A, B = "MIG-aaaaaaaa-0000-0000-0000-000000000000", "MIG-bbbbbbbb-0000-0000-0000-000000000000"
WHOLE = "GPU-00000000-0000-0000-0000-000000000000"
AUTO = GpuChoice()


def sliced(gpu: m.Gpu, *uuids: str, free_gib: float | None = 10) -> m.Gpu:
    free = None if free_gib is None else int(free_gib * GIB)
    parts = tuple(m.MigDevice(uuid=uuid, memory_total_bytes=10 * GIB, memory_free_bytes=free) for uuid in uuids)
    return replace(gpu, mig_enabled=True, mig_devices=parts)


def choice(text: str) -> GpuChoice:
    return parse_gpus(text, "--vlm-gpus")


def test_a_machine_without_slices_is_left_alone(gpu: Any, machine: Any) -> None:
    found = machine(gpu(0), gpu(1, mig_enabled=True))

    assert unfold(found) is found


def test_each_slice_is_a_gpu(gpu: Any, machine: Any) -> None:
    holder = m.GpuProcess(pid=7, kind="compute")
    gpus = (sliced(gpu(0, processes=(holder,)), A, B), gpu(1), sliced(gpu(2, processes=(holder,)), "MIG-cc"))
    gaps = (
        m.Gap(path="gpus[0].mig_devices[1].memory_free_bytes", reason="not permitted"),
        m.Gap(path="gpus[1].compute_mode", reason="not supported"),
        m.Gap(path="host.memory_total_bytes", reason="not read"),
    )

    found = unfold(machine(*gpus, gaps=gaps, links=(m.Link(a=0, b=1, nvlinks=4),)))

    assert [(one.index, one.uuid, is_slice(one)) for one in found.gpus] == [
        (0, A, True),
        (3, B, True),
        (1, gpus[1].uuid, False),
        (2, "MIG-cc", True),
    ]
    assert found.gpus[0].memory_total_bytes == 10 * GIB
    assert [one.processes for one in found.gpus] == [(), (), (), (holder,)], "whose they are is known of the last alone"
    assert {gap.path for gap in found.gaps} == {
        "gpus[0].processes",
        "gpus[1].processes",
        "gpus[1].memory_free_bytes",
        "gpus[2].compute_mode",
        "host.memory_total_bytes",
    }
    assert found.links == ()
    assert unfold(found) is found


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, [A, B, "MIG-cc"]),
        ("0", [A, B]),
        ("1", ["MIG-cc"]),
        ("1,0", ["MIG-cc", A, B]),
        ("2", []),
        ("", []),
        (WHOLE, [A, B]),
        (B, [B]),
        ("MIG-bb", [B]),
        ("MIG-cc,MIG-aa", ["MIG-cc", A]),
        ("MIG-aa,MIG-aa", [A]),
        ("MIG-", []),
        ("MIG-zz", []),
        ("MIG-GPU-00000001-0000-0000-0000-000000000000/1/0", ["MIG-cc"]),
        (f"MIG-{WHOLE}/1/0", []),
    ],
)
def test_a_mask_shows_the_slices_it_names_or_all_of_the_gpus_it_names(
    gpu: Any, machine: Any, value: str | None, shown: list[str]
) -> None:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}

    found = unfold(machine(sliced(gpu(0), A, B), sliced(gpu(1), "MIG-cc"), environment=environment))

    by_index = {one.index: one.uuid for one in found.gpus}
    assert [by_index[index] for index in visible_gpus(found).gpus] == shown


def test_torch_counts_one_slice_which_is_no_fault(gpu: Any, machine: Any) -> None:
    seen = m.TorchView(state="ok", device_count=1, is_available=True, version="2.9.0+cu130", cuda="13.0")
    found = unfold(machine(sliced(gpu(0), A, B), torch=seen))

    assert judge(Requirements(), found, AUTO, needs_torch=True).gpus == (0, 1)


@pytest.mark.parametrize(
    ("text", "needs", "answer"),
    [
        ("auto", Requirements(vram_bytes=9 * GIB), ("run", None, (0, 1))),
        ("MIG-bb", Requirements(vram_bytes=10 * GIB), ("run", None, (1,))),
        ("1,", Requirements(), ("run", None, (1,))),
        ("1", Requirements(), ("run", None, (0,))),
        ("auto", Requirements(vram_bytes=11 * GIB), ("skip", "VLM703: 11.0 GiB is wanted on one GPU, 2 x ", ())),
        ("auto", Requirements(total_vram_bytes=15 * GIB), ("skip", "VLM703: 15.0 GiB is wanted on one GPU, 2 x ", ())),
        (
            "auto",
            Requirements(gpus=2),
            ("skip", "VLM702: 2 GPUs are wanted, and a process sees one MIG slice, and no GPU beside it.", ()),
        ),
        (
            "auto",
            Requirements(exclusive=True),
            (
                "error",
                "VLM712: GPU 0 (slice of NVIDIA L4): processes could not be read (the driver names the processes of a GPU, "
                "and not on which of its slices they are).",
                (),
            ),
        ),
        ("MIG-zz", Requirements(), ("error", "VLM720: --vlm-gpus=MIG-zz: no MIG slice has the UUID MIG-zz; see nv", ())),
    ],
)
def test_the_gate_asks_of_a_slice_what_one_process_can_have(
    gpu: Any, machine: Any, text: str, needs: Requirements, answer: tuple[str, str | None, tuple[int, ...]]
) -> None:
    # "MIG-zz" is no UUID, and none that a user could type: the option refuses it before.
    chosen = choice(text) if text != "MIG-zz" else GpuChoice("uuids", uuids=(text,), text=f"--vlm-gpus={text}")

    verdict = judge(needs, unfold(machine(sliced(gpu(0), A, B))), chosen)

    assert (verdict.action, verdict.gpus) == (answer[0], answer[2])
    assert answer[1] is None or verdict.text.startswith(answer[1])


def test_memory_of_a_slice_that_could_not_be_read_is_an_error(gpu: Any, machine: Any) -> None:
    found = unfold(machine(sliced(gpu(0), A, free_gib=None)))

    assert judge(Requirements(vram_bytes=GIB), found, AUTO).text == (
        "VLM712: GPU 0 (slice of NVIDIA L4): memory_free_bytes could not be read."
    )


def test_whole_gpus_come_first_and_slices_where_they_are_named(gpu: Any, machine: Any) -> None:
    found = unfold(machine(sliced(gpu(0), A, B), gpu(1), environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}))

    assert judge(Requirements(), found, AUTO).gpus == (1,)
    assert judge(Requirements(), found, choice(B)).gpus == (2,)
    mixed = judge(Requirements(), found, GpuChoice("positions", positions=(0, 2), text="--vlm-gpus=0,2"))
    assert mixed.text == (
        "VLM720: --vlm-gpus=0,2 names a MIG slice beside a GPU: a process sees one MIG slice, and no GPU beside it."
    )


def test_a_slice_is_named_where_there_is_none(gpu: Any, machine: Any) -> None:
    verdict = judge(Requirements(), machine(gpu(0)), choice("MIG-1a"))

    assert verdict.text == (
        "VLM720: --vlm-gpus=MIG-1a: there is no MIG slice MIG-1a: no GPU here is divided; see nvidia-smi -L."
    )


def test_a_worker_gets_one_slice(gpu: Any, machine: Any) -> None:
    need = Need((), (Requirements(),), takes_all=True)

    demands = demands_of(need, unfold(machine(sliced(gpu(0), A, B))), AUTO, lambda *_: None)

    assert [demand.gpus for demand in demands] == [1]
    assert divide(["a", "b", "c"], [1, 1], 2, most=1) == [("a",), ("b",)]


def test_the_recorded_machine_is_planned_for(suite: Any) -> None:
    suite.folder.joinpath("conftest.py").unlink()
    first, second = (part.uuid for part in load_machine(str(RECORDED)).gpus[0].mig_devices)

    result = suite.run(
        "--vlm-plan",
        f"--vlm-machine={RECORDED}",
        f"--vlm-gpus={second[:12]}",
        test_x="""
        import pytest
        @pytest.mark.vlm("llava-hf/llava-1.5-7b-hf")
        def test_fits(vlm): pass
        @pytest.mark.vlm("llava-hf/llava-1.5-13b-hf")
        def test_does_not_fit(vlm): pass
        @pytest.mark.vlm_requires(gpus=2)
        def test_two(): pass
        """,
    )

    text = result.stdout.str()
    assert "1 gated test would run, 2 would skip, 0 errors; 1 load" in text
    assert "1. load llava-hf/llava-1.5-7b-hf on GPU 1 (" in text
    assert "skip: test_x.py::test_does_not_fit: VLM705: " in text
    assert "a process sees one MIG slice" in text
    assert first not in text


def test_torch_knows_a_slice_by_its_own_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from pytest_vlmgpu.models.loading import torch_ordinals

    names = ["NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda ordinal: SimpleNamespace(name=names[ordinal], uuid=f"{ordinal}a2b")
    )

    assert torch_ordinals() == {"MIG-0a2b": 0, "GPU-1a2b": 1}


def sliced_project(make: Callable[..., Project], *names: str, **variables: str) -> list[Project]:
    projects = [make(name, gpus=1, **variables) for name in names]
    file = projects[0].shared / "machine.json"
    machine = from_json(file.read_bytes(), m.Machine, where="machine.json")
    file.write_text(to_json(replace(machine, gpus=(sliced(machine.gpus[0], A, B),))))
    return projects


@with_workers
@pytest.mark.parametrize("options", [["--vlm-gpus=auto"], [f"--vlm-gpus={B},{A}"], []])
def test_each_worker_has_a_slice_of_its_own(make: Callable[..., Project], options: list[str]) -> None:
    (project,) = sliced_project(make, "p")

    text, counts = project.run("-n2", *options, test_x=ONE_MODEL, test_y=ONE_MODEL.replace("org/a", "org/b"))

    assert counts == {"passed": 4}, text
    assert sorted(load["sees"] for load in project.loads()) == [A, B]
    assert len({load["worker"] for load in project.loads()}) == 2


def test_a_run_takes_a_slice_that_no_other_run_has(make: Callable[..., Project]) -> None:
    first, second, third = sliced_project(make, "p", "q", "r")
    holder = first.start(f"--vlm-gpus={A}", test_x=SLOW)
    try:
        until((first.folder / "started").exists)
        beside, counts = second.run(f"--vlm-gpus={A},{B}", test_x=ONE_MODEL)
        assert counts == {"passed": 2}, beside
        same, counts = third.run(f"--vlm-gpus={A}", test_x=ONE_MODEL)
        assert counts == {"passed": 1, "error": 1}, same
        assert "VLM730: 1 GPU is wanted, and other runs have leased those that may be used: GPU 0 (slice of NV" in same, (
            same
        )
    finally:
        (first.folder / "go").touch()
        finish(holder)
    assert [load["sees"] for load in first.loads()] == [A, B]


@pytest.mark.parametrize("options", [["--vlm-gpus=2"], ["--vlm-gpus=0,1"], [f"--vlm-gpus={A},{B}"]])
def test_one_process_takes_one_slice_however_many_it_may_use(make: Callable[..., Project], options: list[str]) -> None:
    (project,) = sliced_project(make, "p")

    text, counts = project.run(*options, test_x=ONE_MODEL)

    assert counts == {"passed": 2}, text
    assert "1 GPU leased" in text
    assert [load["sees"] for load in project.loads()] == [A]


@pytest.mark.parametrize("lease", ["machine", "run", "off"])
def test_a_process_sees_the_slice_it_may_use_leased_or_not(make: Callable[..., Project], lease: str) -> None:
    (project,) = sliced_project(make, "p")

    text, counts = project.run(f"--vlm-lease={lease}", f"--vlm-gpus={B}", test_x=ONE_MODEL)

    assert counts == {"passed": 2}, text
    assert [load["sees"] for load in project.loads()] == [B]
    assert (project.shared / "leases").exists() == (lease == "machine")


@pytest.mark.parametrize(("slice_", "outcome"), [(A, "passed"), (B, "error")])
def test_a_process_that_has_started_cuda_uses_the_slice_it_sees_and_no_other(
    make: Callable[..., Project], slice_: str, outcome: str
) -> None:
    (project,) = sliced_project(make, "p")
    project.conftest = "\nfrom pytest_vlmgpu.leasing import masks\nmasks.is_cuda_started = lambda: True\n"

    text, counts = project.run(f"--vlm-gpus={slice_}", test_x="def test_x(vlm_device): assert vlm_device == 'cuda:0'")

    assert counts == {outcome: 1}, text
    assert ("1 GPU leased" in text) == (outcome == "passed"), text
    assert outcome == "passed" or f"VLM712: CUDA was started in this process before its MIG slice was chosen ({B})" in text
