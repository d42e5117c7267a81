from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_doctor.machine import Driver, Gap, Gpu, Machine, MigDevice, PciDevice, TorchDevice, TorchView
from vlm_doctor.visibility import Counts, Visibility, counts, quote, visible_gpus

A = "GPU-aaaa1111-0000-0000-0000-000000000000"
B = "GPU-bbbb2222-0000-0000-0000-000000000001"
C = "GPU-bbbb3333-0000-0000-0000-000000000002"
SLICES = ("MIG-11111111-0000-0000-0000-000000000000", "MIG-22222222-0000-0000-0000-000000000000")


def gpu(index: int, uuid: str, name: str = "NVIDIA L4", **changes: Any) -> Gpu:
    changes.setdefault("bus_id", f"0000:0{index + 1}:00.0")
    return Gpu(index=index, uuid=uuid, name=name, **changes)


def machine(value: str | None, *gpus: Gpu, order: str | None = None, **changes: Any) -> Machine:
    environment = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    if order is not None:
        environment["CUDA_DEVICE_ORDER"] = order
    changes.setdefault("origin", "recorded")
    return Machine(description="test", gpus=gpus or (gpu(0, A), gpu(1, B), gpu(2, C)), environment=environment, **changes)


TRUTH_TABLE = [
    # value, GPUs seen, cut by, corrected
    (None, (0, 1, 2), None, None),
    ("0", (0,), None, None),
    ("2,0", (2, 0), None, None),
    (" 0 , 1 ", (0, 1), None, None),
    ("+1", (1,), None, None),
    ("01", (1,), None, None),
    ("0,1,", (0, 1), None, None),
    ("0,-1", (0,), None, None),
    ("0,1,2,-1", (0, 1, 2), None, None),
    ("", (), "''", "0,1,2"),
    ("   ", (), "'   '", "0,1,2"),
    (",0", (), "''", "0"),
    ("-1", (), "'-1'", "0,1,2"),
    ("-1,0", (), "'-1'", "0"),
    ("none", (), "'none'", "0,1,2"),
    ("all", (), "'all'", "0,1,2"),
    ("void", (), "'void'", "0,1,2"),
    ("NoDevFiles", (), "'NoDevFiles'", "0,1,2"),
    ("cuda:0", (), "'cuda:0'", "0"),
    ("0,-1,1", (0,), "'-1'", "0,1"),
    ("0,a,1", (0,), "'a'", "0,1"),
    ("0,,1", (0,), "''", "0,1"),
    ("0,9", (0,), "'9'", "0"),
    ("9,0", (), "'9'", "0"),
    ("0,4294967296", (0,), "'4294967296'", "0"),
    ("0,99999999999999999999", (0,), "'99999999999999999999'", "0"),
    ("0,0", (), "'0'", "0"),
    ("0,1,2,0", (), "'0'", "0,1,2"),
    ("0,1,2,1,5", (), "'1'", "0,1,2"),
    ("0 1", (0,), None, "0,1"),
    ("0;1", (0,), None, "0,1"),
    ("0.0", (0,), None, "0"),
    ("1gpu2,2ampere", (1, 2), None, "1,2"),
    ("[0,1]", (), "'[0'", "0,1"),
    ("'0,1'", (), '"\'0"', "0,1"),
    ("٠", (), "'\\u0660'", "0,1,2"),
    ("²", (), "'\\xb2'", "0,1,2"),
    ("0\0,1", (0, 1), None, "0,1"),
    ("\x1b[31m0", (), "'\\x1b[31m0'", "0,1,2"),
    (A, (0,), None, None),
    (f"{C},{A}", (2, 0), None, None),
    ("GPU-aaaa", (0,), None, None),
    ("GPU-bbbb", (), "'GPU-bbbb'", "0,1,2"),
    ("GPU-bbbb2,GPU-bbbb", (1,), "'GPU-bbbb'", B),
    ("GPU-ffff", (), "'GPU-ffff'", "0,1,2"),
    (f"{A},GPU-ffff,{B}", (0,), "'GPU-ffff'", f"{A},{B}"),
    (f"{A},{A}", (), f"'{A}'", A),
    (f"{A},GPU-aaaa", (), "'GPU-aaaa'", A),
    (f"{A}, {B}", (0,), f"' {B}'", f"{A},{B}"),
    (f"{A} ", (), f"'{A} '", A),
    (A.lower(), (), f"'{A.lower()}'", A),
    (f"0,{B}", (0,), f"'{B}'", f"{A},{B}"),
    (f"{A},1", (0,), "'1'", f"{A},{B}"),
    (f" {A}", (), f"' {A}'", A),
    ("MIG-11111111", (), "'MIG-11111111'", "0,1,2"),
]


@pytest.mark.parametrize(("value", "seen", "cut_by", "corrected"), TRUTH_TABLE, ids=[ascii(row[0]) for row in TRUTH_TABLE])
def test_truth_table(value: str | None, seen: tuple[int, ...], cut_by: str | None, corrected: str | None) -> None:
    result = visible_gpus(machine(value))

    assert (result.gpus, result.cut_by, result.corrected) == (seen, cut_by, corrected)
    assert (result.problem is None) is (corrected is None)
    assert result.is_order_certain


@pytest.mark.parametrize(("value", "seen", "cut_by", "corrected"), TRUTH_TABLE, ids=[ascii(row[0]) for row in TRUTH_TABLE])
def test_a_corrected_value_needs_no_correction(
    value: str | None, seen: tuple[int, ...], cut_by: str | None, corrected: str | None
) -> None:
    again = visible_gpus(machine(corrected))

    assert again.problem is None
    assert again.gpus


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "CUDA_VISIBLE_DEVICES='' hides every GPU."),
        ("-1", "CUDA_VISIBLE_DEVICES='-1' hides every GPU."),
        (
            "all",
            "CUDA_VISIBLE_DEVICES='all' is not a GPU index or UUID (a word of NVIDIA_VISIBLE_DEVICES), so every "
            "GPU is hidden.",
        ),
        ("0,x,1", "CUDA_VISIBLE_DEVICES='0,x,1': 'x' is not a GPU index or UUID, so only GPU 0 can be seen."),
        (
            "1,0,9",
            "CUDA_VISIBLE_DEVICES='1,0,9': '9' names a GPU that does not exist: the last index is 2, so only "
            "GPUs 1, 0 can be seen.",
        ),
        ("0,0", "CUDA_VISIBLE_DEVICES='0,0': '0' is there twice, so every GPU is hidden."),
        ("0 1", "CUDA_VISIBLE_DEVICES='0 1': '0 1' is read as 0."),
        ("1gpu2,2ampere", "CUDA_VISIBLE_DEVICES='1gpu2,2ampere': '1gpu2' is read as 1; '2ampere' is read as 2."),
        ("GPU-bbbb", "CUDA_VISIBLE_DEVICES='GPU-bbbb' is the beginning of 2 GPU UUIDs, so every GPU is hidden."),
        ("GPU-f", "CUDA_VISIBLE_DEVICES='GPU-f' matches no GPU of this machine, so every GPU is hidden."),
        (
            "0,GPU-a",
            "CUDA_VISIBLE_DEVICES='0,GPU-a': 'GPU-a' is a UUID behind a number or a space, where CUDA expects a number, "
            "so only GPU 0 can be seen.",
        ),
        (
            "GPU-a,1",
            "CUDA_VISIBLE_DEVICES='GPU-a,1': '1' is not a GPU UUID like the first, so only GPU 0 can be seen.",
        ),
    ],
)
def test_says_what_is_wrong(value: str, problem: str) -> None:
    assert visible_gpus(machine(value)).problem == problem


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000_000, "," * 10_000_000, "0," * 5_000_000, "0" * 10_000_000, "GPU-" * 2_500_000, "\0" * 10_000_000],
    ids=["word", "commas", "repeated", "digits", "uuid", "nul"],
)
def test_a_huge_value_costs_nothing(value: str) -> None:
    result = visible_gpus(machine(value))

    assert result.gpus == ()
    assert len(result.value or "") == 4096
    assert len(result.problem or "") < 600


@pytest.mark.parametrize(
    ("value", "seen", "problem"),
    [
        (SLICES[0], (0,), None),
        ("MIG-2222", (0,), None),
        (
            ",".join(SLICES),
            (0,),
            f"CUDA_VISIBLE_DEVICES={quote(','.join(SLICES))}: one process sees one MIG slice only: the first.",
        ),
        (
            f"MIG-{A}/1/0",
            (0,),
            f"CUDA_VISIBLE_DEVICES='MIG-{A}/1/0': 'MIG-{A}/1/0' is the old form of drivers before 470: name the "
            f"slice by its own "
            "MIG UUID.",
        ),
        ("MIG-ffff", (), "CUDA_VISIBLE_DEVICES='MIG-ffff' matches no MIG slice of this machine, so every GPU is hidden."),
        (
            "MIG-GPU-ffff/1/0",
            (),
            "CUDA_VISIBLE_DEVICES='MIG-GPU-ffff/1/0' matches no GPU of this machine, so every GPU is hidden.",
        ),
    ],
)
def test_mig(value: str, seen: tuple[int, ...], problem: str | None) -> None:
    parts = tuple(MigDevice(uuid=uuid) for uuid in SLICES)

    result = visible_gpus(machine(value, gpu(0, A, mig_enabled=True, mig_devices=parts)))

    assert (result.gpus, result.problem) == (seen, problem)


def test_several_mig_slices_are_corrected_to_the_first() -> None:
    parts = tuple(MigDevice(uuid=uuid) for uuid in SLICES)

    assert visible_gpus(machine(",".join(SLICES), gpu(0, A, mig_devices=parts))).corrected == SLICES[0]


@pytest.mark.parametrize(("count", "corrected"), [(1, SLICES[0]), (2, "0")])
def test_an_old_mig_name_is_corrected_when_there_is_one_slice(count: int, corrected: str) -> None:
    parts = tuple(MigDevice(uuid=uuid) for uuid in SLICES[:count])

    assert visible_gpus(machine(f"MIG-{A}/1/0", gpu(0, A, mig_devices=parts))).corrected == corrected


def test_names_and_numbers_mixed_with_a_slice_are_corrected_to_gpus() -> None:
    whole = machine(f"0,{B},{SLICES[0]}", gpu(0, A), gpu(1, B, mig_devices=(MigDevice(uuid=SLICES[0]),)))

    assert visible_gpus(whole).corrected == f"{A},{B}"


def test_unset_on_a_mig_machine_is_not_certain() -> None:
    assert not visible_gpus(machine(None, gpu(0, A, mig_enabled=True), gpu(1, B))).is_order_certain


def mixed(value: str | None = None, order: str | None = None, **changes: Any) -> Machine:
    slow = gpu(0, A, "RTX 3090", compute_capability=(8, 6))
    fast = gpu(1, B, "RTX 4090", compute_capability=(8, 9))
    return machine(value, slow, fast, order=order, **changes)


def test_mixed_models_are_guessed_fastest_first_and_said_to_be_a_guess() -> None:
    assert visible_gpus(mixed()) == Visibility(value=None, gpus=(1, 0), is_order_certain=False)
    assert visible_gpus(mixed("0")).gpus == (1,)


def test_pci_order_is_certain() -> None:
    assert visible_gpus(mixed(order="PCI_BUS_ID")) == Visibility(value=None, gpus=(0, 1), is_order_certain=True)


def test_only_the_exact_word_makes_pci_order() -> None:
    assert not visible_gpus(mixed(order="pci_bus_id")).is_order_certain


def test_uuids_are_certain_whatever_the_models() -> None:
    assert visible_gpus(mixed(f"{A},{B}")) == Visibility(value=f"{A},{B}", gpus=(0, 1), is_order_certain=True)


def test_pci_order_goes_by_address_not_by_index() -> None:
    whole = machine(None, gpu(0, A, bus_id="0000:81:00.0"), gpu(1, B, bus_id="0000:01:00.0"), order="PCI_BUS_ID")

    assert visible_gpus(whole).gpus == (1, 0)


def test_pci_order_goes_by_index_where_an_address_is_missing() -> None:
    whole = machine(None, gpu(0, A, bus_id=None), gpu(1, B, bus_id="0000:01:00.0"))

    assert visible_gpus(whole).gpus == (0, 1)


def torch(*uuids: str | None) -> TorchView:
    devices = tuple(TorchDevice(ordinal=ordinal, uuid=uuid) for ordinal, uuid in enumerate(uuids))
    return TorchView(state="ok", device_count=len(uuids), devices=devices)


def test_torch_tells_the_true_order() -> None:
    whole = mixed(torch=torch(A.removeprefix("GPU-"), B))

    assert visible_gpus(whole) == Visibility(value=None, gpus=(0, 1), is_order_certain=True)


@pytest.mark.parametrize(
    "view",
    [torch(A), torch(A, None), torch(A, "GPU-unknown"), torch(A, A), torch()],
    ids=["fewer", "unnamed", "unknown", "twice", "none"],
)
def test_torch_is_not_the_truth_when_it_does_not_name_every_gpu(view: TorchView) -> None:
    assert visible_gpus(mixed(torch=view)) == Visibility(value=None, gpus=(1, 0), is_order_certain=False)


def test_a_failing_gpu_is_not_counted_and_makes_the_order_uncertain() -> None:
    whole = machine(None, gpu(0, A), Gpu(index=1, uuid="", name="unknown GPU", error="GPU is lost"))

    assert visible_gpus(whole) == Visibility(value=None, gpus=(0,), is_order_certain=False)


def test_only_failing_gpus() -> None:
    whole = machine("0", Gpu(index=0, uuid="", name="unknown GPU", error="GPU is lost"))

    assert visible_gpus(whole).problem == (
        "CUDA_VISIBLE_DEVICES='0' names a GPU that does not exist: there is none, so every GPU is hidden."
    )
    assert visible_gpus(whole).corrected is None


def test_nothing_to_judge_without_gpus() -> None:
    whole = Machine(origin="live", description="laptop", environment={"CUDA_VISIBLE_DEVICES": "0"})

    result = visible_gpus(whole)

    assert (result.gpus, result.problem, result.corrected) == ((), None, None)


def pci(count: int) -> tuple[PciDevice, ...]:
    return tuple(PciDevice(bus_id=f"0000:0{index + 1}:00.0", device_id="27b8") for index in range(count))


def test_four_counts_and_who_was_lost_where() -> None:
    whole = machine("0,2", driver=Driver(nvml_state="ok"), pci_devices=pci(4), torch=torch(A))

    assert counts(whole) == Counts(
        pci=4, driver=3, visible=2, torch=1, lost_by_driver=("0000:04:00.0",), hidden=(1,), lost_by_torch=(2,)
    )


def test_a_bus_that_shows_nothing_beside_gpus_is_unknown_not_zero() -> None:
    assert counts(machine(None)).pci is None


def test_a_laptop_counts_zero() -> None:
    whole = Machine(origin="live", description="laptop", torch=TorchView(state="ok", device_count=0))

    assert counts(whole) == Counts(pci=0, driver=0, visible=0, torch=0)


def test_an_unreadable_bus_is_unknown() -> None:
    whole = Machine(origin="live", description="x", gaps=(Gap(path="pci_devices", reason="PermissionError"),))

    assert counts(whole).pci is None


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver(nvml_state="error", nvml_error_code=9), 0),
        (Driver(nvml_state="error", nvml_error_code=18, kernel_module_version="570.1"), None),
        (Driver(nvml_state="crashed"), None),
        (Driver(nvml_state="no_binding"), None),
        (Driver(nvml_state="ok"), 0),
    ],
)
def test_a_driver_that_does_not_answer_is_unknown(driver: Driver, expected: int | None) -> None:
    result = counts(Machine(origin="live", description="x", pci_devices=pci(1), driver=driver))

    assert (result.driver, result.visible) == (expected, expected)
    assert result.lost_by_driver == (() if expected is None else ("0000:01:00.0",))


def test_no_gpu_is_called_lost_where_addresses_are_missing() -> None:
    whole = machine(None, gpu(0, A, bus_id=None), pci_devices=pci(2))

    assert counts(whole).lost_by_driver == ()


def test_a_failing_gpu_is_not_called_hidden() -> None:
    whole = machine(None, gpu(0, A), Gpu(index=1, uuid="", name="unknown GPU", error="GPU is lost"))

    assert counts(whole).hidden == ()


ENTRY = st.one_of(
    st.sampled_from([A, B, C, "GPU-", "GPU-b", "MIG-1", "-1", "", " ", "all", "0;1"]),
    st.integers(-2, 5).map(str),
    st.text(),
)


@settings(database=None, deadline=None)
@given(st.lists(ENTRY, max_size=6).map(",".join))
def test_any_value_selects_distinct_gpus_and_its_correction_is_right(value: str) -> None:
    whole = machine(value)

    result = visible_gpus(whole)

    assert set(result.gpus) <= {0, 1, 2}
    assert len(set(result.gpus)) == len(result.gpus)
    assert (result.problem or "").isprintable()
    if result.problem:
        assert visible_gpus(machine(result.corrected)).problem is None


@pytest.mark.models
@pytest.mark.parametrize("value", [row[0] for row in TRUTH_TABLE if row[0] and row[0].isascii() and "\0" not in row[0]])
def test_torch_counts_as_many(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import cuda

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setattr(cuda, "_raw_device_count_nvml", lambda: 3)
    monkeypatch.setattr(cuda, "_raw_device_uuid_nvml", lambda: [A, B, C])

    # -1: torch leaves MIG to the CUDA runtime.
    assert cuda._device_count_nvml() in (-1, len(visible_gpus(machine(value)).gpus))
