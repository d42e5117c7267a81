"""The gate's decisions, one machine after the other: what runs, what is skipped, what is an error, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu.gating import peers
from pytest_vlmgpu.gating.selection import judge, judge_without_gpus, keep_from_acting
from pytest_vlmgpu.options import GpuChoice, parse_gpus
from pytest_vlmgpu.requirements import Requirements
from pytest_vlmgpu.verdicts import Verdict
from vlm_doctor.machine import Driver, Gap, GpuProcess, Host, Libraries, Link, TorchBuild
from vlm_doctor.placement import Shortage
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.synthetic import parse_machine
from vlm_doctor.units import GIB

from .made_up_plans import plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlm_doctor.machine import Gpu, Machine

    MakeGpu = Callable[..., Gpu]
    MakeMachine = Callable[..., Machine]

MACHINES = Path(__file__).parents[1] / "machines"
AUTO = GpuChoice()
ANY = Requirements()


def choice(text: str) -> GpuChoice:
    return parse_gpus(text, "--vlm-gpus")


def decide(machine: Machine, requirements: Requirements = ANY, **options: Any) -> tuple[str, str]:
    verdict = judge(requirements, machine, options.pop("choice", AUTO), **options)
    return verdict.action, verdict.text


# No GPU: absent or broken?

ADVICE = "Run vlm-doctor to see the fix; if no GPU is to be used here, say --vlm-gpus=none."


def test_a_machine_without_gpu_skips(machine: MakeMachine) -> None:
    assert decide(machine()) == ("skip", "VLM701: this machine has no NVIDIA GPU.")


def test_an_installed_library_without_driver_is_no_sign_of_a_gpu(machine: MakeMachine) -> None:
    driver = Driver(nvml_state="error", nvml_error_code=9, nvml_message="Driver Not Loaded")

    assert decide(machine(driver=driver))[0] == "skip"


@pytest.mark.parametrize(
    ("driver", "why"),
    [
        (Driver(nvml_state="error", nvml_error_code=999, nvml_message="Unknown Error"), "NVML error: Unknown Error"),
        (Driver(nvml_state="crashed", nvml_message="SIGSEGV"), "NVML crashed: SIGSEGV"),
        (Driver(nvml_state="timed_out"), "NVML timed_out"),
        (Driver(nvml_state="ok", kernel_module_version="580.1", device_files=("/dev/nvidiactl",)), "NVML ok"),
    ],
)
def test_a_driver_that_gives_no_plain_answer_is_an_error(machine: MakeMachine, driver: Driver, why: str) -> None:
    assert decide(machine(driver=driver)) == ("error", f"VLM712: the driver lists no GPU ({why}). {ADVICE}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("driver-missing", "VLM102 2 NVIDIA GPUs are on the PCI bus"),
        ("nouveau", "VLM103 0000:01:00.0 belongs to the kernel driver nouveau"),
        ("driver-mismatch", "VLM104 NVML refuses to work"),
        ("nvml-crashed", "VLM105 NVML crashed"),
        ("device-files-forbidden", "VLM106 This user may not open"),
        ("container-no-injection", "VLM205 This docker container was started without GPUs"),
        ("pynvml-shadowed", "VLM310 The module pynvml"),
        ("cpu-torch", "VLM303 torch"),
        ("container-lacks-compute", "VLM205 This docker container has the GPUs but not libcuda"),
        ("old-driver", "VLM306 torch"),
        ("torch-half-installed", "VLM302 torch"),
        ("torch-missing", "VLM301 torch"),
        ("v100-missing-sm", "VLM307 torch"),
    ],
)
def test_a_recorded_fault_is_an_error_in_the_doctors_words(name: str, text: str) -> None:
    action, told = decide(load_machine(str(MACHINES / f"{name}.json")), needs_torch=True)

    assert action == "error"
    assert told.startswith(f"VLM712: {text}")


@pytest.mark.parametrize("name", ["laptop-no-gpu", "ci-container", "masked"])
def test_a_recorded_absence_skips(name: str) -> None:
    action, told = decide(load_machine(str(MACHINES / f"{name}.json")), needs_torch=True)

    assert (action, told[:6]) == ("skip", "VLM701")


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("gpu-lost", "error"),
        ("gpu-off-the-bus", "error"),
        ("out-of-range", "error"),
        # Facts, not faults: a job, a container or a mask that was given some of the GPUs.
        ("scheduled-job", "skip"),
        ("container-with-some-gpus", "skip"),
        ("some-hidden", "skip"),
        ("one-gpu-passed-through", "skip"),
    ],
)
def test_too_few_gpus_on_a_recorded_machine(name: str, action: str) -> None:
    assert decide(load_machine(str(MACHINES / f"{name}.json")), Requirements(gpus=9))[0] == action


# Which GPUs: CUDA_VISIBLE_DEVICES and --vlm-gpus


def test_auto_takes_all_visible_gpus_in_cuda_order(machine: MakeMachine, gpu: MakeGpu) -> None:
    found = machine(gpu(0), gpu(1), gpu(2), environment={"CUDA_VISIBLE_DEVICES": "2,0"})

    assert judge(ANY, found, AUTO) == Verdict("run", gpus=(2, 0))


@pytest.mark.parametrize(
    ("text", "gpus"),
    [("2", (2, 0)), ("0,", (2,)), ("2,0", (1, 2)), ("GPU-00000001,GPU-00000000", (1, 0)), ("3", (2, 0, 1))],
)
def test_a_choice_counts_within_the_visible_gpus(
    machine: MakeMachine, gpu: MakeGpu, text: str, gpus: tuple[int, ...]
) -> None:
    found = machine(gpu(0), gpu(1), gpu(2), environment={"CUDA_VISIBLE_DEVICES": "2,0,1"})

    assert judge(ANY, found, choice(text)).gpus == gpus


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,5", "--vlm-gpus=0,5: there is no GPU 5; 2 GPUs are visible, counted from 0."),
        ("GPU-7", "--vlm-gpus=GPU-7: no GPU has the UUID GPU-7; see nvidia-smi -L."),
        ("GPU-0", "--vlm-gpus=GPU-0: GPU-0 is the beginning of 3 UUIDs; see nvidia-smi -L."),
        (
            "GPU-00000002",
            "--vlm-gpus=GPU-00000002: CUDA_VISIBLE_DEVICES hides GPU 2 (NVIDIA L4); see nvidia-smi -L.",
        ),
        (
            "GPU-00000001,GPU-00000001-",
            "--vlm-gpus=GPU-00000001,GPU-00000001-: GPU 1 (NVIDIA L4) is named twice; see nvidia-smi -L.",
        ),
    ],
)
def test_a_choice_that_names_no_visible_gpu_is_an_error(
    machine: MakeMachine, gpu: MakeGpu, text: str, message: str
) -> None:
    found = machine(gpu(0), gpu(1), gpu(2), environment={"CUDA_VISIBLE_DEVICES": "0,1"})

    assert decide(found, choice=choice(text)) == ("error", f"VLM720: {message}")


def test_one_visible_gpu_is_counted_in_the_singular(machine: MakeMachine, gpu: MakeGpu) -> None:
    assert decide(machine(gpu(0)), choice=choice("1,"))[1].endswith("there is no GPU 1; 1 GPU is visible, counted from 0.")


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_gpus_hidden_on_purpose_skip(machine: MakeMachine, gpu: MakeGpu, value: str) -> None:
    action, text = decide(machine(gpu(0), environment={"CUDA_VISIBLE_DEVICES": value}))

    assert action == "skip"
    assert text.startswith(f"VLM701: CUDA_VISIBLE_DEVICES={value!r} ")


def test_gpus_hidden_by_a_mistake_are_an_error(machine: MakeMachine, gpu: MakeGpu) -> None:
    action, text = decide(machine(gpu(0), environment={"CUDA_VISIBLE_DEVICES": "5"}))

    assert action == "error"
    assert text.startswith("VLM712: VLM201 CUDA_VISIBLE_DEVICES='5'")


def test_a_choice_of_more_gpus_than_there_are_skips(machine: MakeMachine, gpu: MakeGpu) -> None:
    assert decide(machine(gpu(0)), choice=choice("2")) == (
        "skip",
        "VLM702: 2 GPUs are wanted, 1 can be used (--vlm-gpus=2).",
    )


def test_without_gpus_models_run_and_requirements_skip() -> None:
    assert judge_without_gpus(choice("none"), wants_gpus=False) == Verdict("run")
    assert judge_without_gpus(choice("none"), wants_gpus=True).text == (
        "VLM701: a GPU is wanted, and --vlm-gpus=none allows none."
    )


# Permanent facts: skips with every unmet requirement


def test_requirements_met_exactly_run(machine: MakeMachine, gpu: MakeGpu) -> None:
    wanted = Requirements(gpus=2, vram_bytes=22 * GIB, total_vram_bytes=44 * GIB, capability=(8, 9))

    assert judge(wanted, machine(gpu(0), gpu(1)), AUTO) == Verdict("run", gpus=(0, 1))


def test_only_gpus_that_meet_the_requirements_are_given(machine: MakeMachine, gpu: MakeGpu) -> None:
    found = machine(
        gpu(0, name="NVIDIA T4", total_gib=15, free_gib=14, compute_capability=(7, 5)),
        gpu(1),
        gpu(2, free_gib=5),
        environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    )

    assert judge(Requirements(capability=(8, 0)), found, AUTO).gpus == (1, 2)
    assert judge(Requirements(vram_bytes=10 * GIB), found, AUTO).gpus == (0, 1)


def test_too_few(machine: MakeMachine, gpu: MakeGpu) -> None:
    assert decide(machine(gpu(0)), Requirements(gpus=2)) == ("skip", "VLM702: 2 GPUs are wanted, 1 can be used.")


def test_too_small(machine: MakeMachine, gpu: MakeGpu) -> None:
    found = machine(gpu(0), gpu(1), gpu(2, name="NVIDIA T4", total_gib=15))

    assert decide(found, Requirements(gpus=2, vram_bytes=30 * GIB)) == (
        "skip",
        "VLM703: 30.0 GiB is wanted on each of 2 GPUs, 2 x NVIDIA L4 have 22.0 GiB, GPU 2 (NVIDIA T4) has 14.5 GiB.",
    )


def test_the_drivers_own_share_is_never_free(machine: MakeMachine, gpu: MakeGpu) -> None:
    assert decide(machine(gpu(0)), Requirements(vram_bytes=int(22.1 * GIB)))[1].startswith("VLM703")


def test_a_number_of_gb_is_pointed_out(machine: MakeMachine, gpu: MakeGpu) -> None:
    found = machine(gpu(0, name="NVIDIA H100 80GB HBM3", total_gib=79.7, free_gib=79))

    assert decide(found, Requirements(vram_bytes=80 * GIB)) == (
        "skip",
        "VLM703: 80.0 GiB is wanted on one GPU, GPU 0 (NVIDIA H100 80GB HBM3) has 79.2 GiB "
        '(for a "80 GB" card write "80GB").',
    )
    assert decide(found, Requirements(vram_bytes=80 * 10**9))[0] == "run"


def test_too_small_in_all(machine: MakeMachine, gpu: MakeGpu) -> None:
    assert decide(machine(gpu(0), gpu(1)), Requirements(total_vram_bytes=50 * GIB)) == (
        "skip",
        "VLM703: 50.0 GiB is wanted in all, 2 x NVIDIA L4 have 22.0 GiB.",
    )


def test_too_old(machine: MakeMachine, gpu: MakeGpu) -> None:
    assert decide(machine(gpu(0)), Requirements(capability=(9, 0))) == (
        "skip",
        "VLM704: compute capability 9.0 is wanted on one GPU, GPU 0 (NVIDIA L4) has 8.9.",
    )


def test_every_unmet_requirement_is_named(machine: MakeMachine, gpu: MakeGpu) -> None:
    wanted = Requirements(gpus=2, vram_bytes=int(30.5 * GIB), capability=(9, 0))

    assert decide(machine(gpu(0)), wanted) == (
        "skip",
        "VLM702: 2 GPUs are wanted, 1 can be used; 30.5 GiB is wanted on each of 2 GPUs, GPU 0 (NVIDIA L4) has 22.0 GiB; "
        "compute capability 9.0 is wanted on each of 2 GPUs, GPU 0 (NVIDIA L4) has 8.9.",
    )


def test_requirements_must_be_met_by_the_same_gpus(machine: MakeMachine, gpu: MakeGpu) -> None:
    found = machine(gpu(0), gpu(1, name="Tesla V100", total_gib=32, free_gib=31, compute_capability=(7, 0)))

    assert decide(found, Requirements(vram_bytes=30 * GIB, capability=(8, 0))) == (
        "skip",
        "VLM703: memory and compute capability together are met by 0 of 1 GPUs.",
    )


# Right now: taken memory is an error with its holders


def test_taken_memory_is_an_error_that_names_holders(machine: MakeMachine, gpu: MakeGpu) -> None:
    processes = (
        GpuProcess(pid=7, kind="compute"),
        GpuProcess(pid=4242, kind="compute", used_bytes=18 * GIB, user="alice", command="python train.py"),
    )
    found = machine(gpu(0, free_gib=4, processes=processes), gpu(1, free_gib=3))

    assert decide(found, Requirements(gpus=2, vram_bytes=20 * GIB)) == (
        "error",
        "VLM711: 20.0 GiB free is wanted on each of 2 GPUs: GPU 0 (NVIDIA L4) has 4.0 GiB of 22.0 GiB free, held by "
        "pid 4242 (alice, python train.py) 18.0 GiB, pid 7 (user not visible); "
        "GPU 1 (NVIDIA L4) has 3.0 GiB of 22.0 GiB free, no holder is visible from here.",
    )


def test_taken_memory_in_all_is_an_error(machine: MakeMachine, gpu: MakeGpu) -> None:
    action, text = decide(machine(gpu(0, free_gib=4), gpu(1)), Requirements(total_vram_bytes=40 * GIB))

    assert action == "error"
    assert text.startswith("VLM711: 40.0 GiB free is wanted in all: GPU 0 (NVIDIA L4) has 4.0 GiB of 22.0 GiB free")


def test_taken_memory_does_not_matter_where_it_is_decided_later(machine: MakeMachine, gpu: MakeGpu) -> None:
    verdict = judge(Requirements(vram_bytes=20 * GIB), machine(gpu(0, free_gib=4)), AUTO, is_busy_decided_later=True)

    assert verdict == Verdict("run", gpus=(0,))


def test_unified_memory_is_the_hosts(machine: MakeMachine, gpu: MakeGpu) -> None:
    host = Host(os="Linux", kernel="6", memory_total_bytes=120 * GIB, memory_available_bytes=100 * GIB)
    shared = gpu(0, has_unified_memory=True, memory_total_bytes=None, memory_free_bytes=None, memory_reserved_bytes=None)

    assert decide(machine(shared, host=host), Requirements(vram_bytes=100 * GIB))[0] == "run"
    assert decide(machine(shared, host=host), Requirements(vram_bytes=110 * GIB))[1].startswith("VLM711")


# Faults and unknowns: never skips


def test_a_lost_gpu_is_never_a_skip(machine: MakeMachine, gpu: MakeGpu) -> None:
    found = machine(gpu(0), gpu(1, error="GPU is lost"))

    assert decide(found, Requirements(gpus=2)) == (
        "error",
        "VLM712: 2 GPUs are wanted, 1 can be used. VLM108 GPU 1 (NVIDIA L4) fails when asked: GPU is lost.",
    )
    assert judge(ANY, found, AUTO) == Verdict("run", gpus=(0,))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"recovery_action": "reset_gpu"}, "VLM111 GPU 0 (NVIDIA L4): the driver asks for a reset of the GPU."),
        ({"compute_mode": "prohibited"}, "VLM109 GPU 0 (NVIDIA L4) takes no process: its compute mode is prohibited."),
        ({"mig_enabled": True}, "VLM110 GPU 0 (NVIDIA L4) is in MIG mode without any slice, so CUDA cannot use it."),
    ],
)
def test_a_gpu_that_no_process_can_use(machine: MakeMachine, gpu: MakeGpu, fields: dict[str, Any], text: str) -> None:
    assert decide(machine(gpu(0, **fields))) == ("error", f"VLM712: {text}")
    assert decide(machine(gpu(0, **fields), gpu(1)))[0] == "run"
    assert decide(machine(gpu(0, **fields), gpu(1)), choice=choice("0,")) == ("error", f"VLM712: --vlm-gpus=0,: {text}")


def test_a_worn_gpu_is_no_reason_for_too_few(machine: MakeMachine, gpu: MakeGpu) -> None:
    assert decide(machine(gpu(0, remap_failed=True)), Requirements(gpus=2))[0] == "skip"


def test_a_broken_gpu_that_was_asked_for(machine: MakeMachine, gpu: MakeGpu) -> None:
    found = machine(gpu(0), gpu(1, error="GPU is lost"))

    assert decide(found, choice=choice("GPU-00000001")) == (
        "error",
        "VLM712: --vlm-gpus=GPU-00000001: VLM108 GPU 1 (NVIDIA L4) fails when asked: GPU is lost.",
    )


@pytest.mark.parametrize(
    ("fields", "requirements", "missing"),
    [
        ({"compute_capability": None}, Requirements(capability=(8, 0)), "compute_capability"),
        ({"memory_total_bytes": None}, Requirements(vram_bytes=1), "memory_total_bytes"),
        ({"memory_free_bytes": None}, Requirements(total_vram_bytes=1), "memory_free_bytes"),
    ],
)
def test_what_could_not_be_read_is_an_error(
    machine: MakeMachine, gpu: MakeGpu, fields: dict[str, Any], requirements: Requirements, missing: str
) -> None:
    gap = Gap(path=f"gpus[0].{missing}", reason="NVML: Not Supported")

    assert decide(machine(gpu(0, **fields)), requirements) == (
        "error",
        f"VLM712: GPU 0 (NVIDIA L4): {missing} could not be read.",
    )
    assert decide(machine(gpu(0, **fields), gaps=(gap,)), requirements)[1].endswith(
        " could not be read (NVML: Not Supported)."
    )
    assert decide(machine(gpu(0, **fields)))[0] == "run"


def test_a_torch_that_cannot_use_the_gpus_matters_where_a_model_is_loaded(machine: MakeMachine, gpu: MakeGpu) -> None:
    build = TorchBuild(version="2.13.0+cpu")
    found = machine(gpu(0), libraries=Libraries(python="3.11", executable="python", torch_build=build))

    assert decide(found, needs_torch=True) == (
        "error",
        "VLM712: VLM303 torch 2.13.0+cpu is built for the CPU only, and this machine has 1 GPU.",
    )
    assert decide(found, needs_torch=False)[0] == "run"


def test_a_torch_that_lacks_one_of_the_gpus_can_use_the_other(machine: MakeMachine, gpu: MakeGpu) -> None:
    build = TorchBuild(version="2.13.0", cuda="13.0", archs=("sm_80", "sm_90"))
    libraries = Libraries(python="3.11", executable="python", torch_build=build)
    old = gpu(0, name="Tesla V100", compute_capability=(7, 0))

    assert decide(machine(old, gpu(1), libraries=libraries), needs_torch=True)[0] == "run"
    assert decide(machine(old, gpu(1), libraries=libraries), choice=choice("GPU-00000000"), needs_torch=True)[0] == "error"


def test_a_torch_with_cuda_is_fine(machine: MakeMachine, gpu: MakeGpu) -> None:
    build = TorchBuild(version="2.13.0", cuda="13.0")
    libraries = Libraries(python="3.11", executable="python", torch_build=build)

    assert decide(machine(gpu(0), libraries=libraries), needs_torch=True)[0] == "run"
    assert decide(machine(gpu(0)), needs_torch=True)[0] == "run"


# The model


def test_a_model_that_fits_runs(machine: MakeMachine, gpu: MakeGpu) -> None:
    assert judge(ANY, machine(gpu(0)), AUTO, plan=plan(fits=True)) == Verdict("run", gpus=(0,))


def test_a_model_that_never_fits_skips(machine: MakeMachine, gpu: MakeGpu) -> None:
    shortage = Shortage(missing_bytes=1, message="9.0 GiB are missing on GPU 0.", is_permanent=True)

    assert decide(machine(gpu(0)), plan=plan(fits=False, shortage=shortage)) == (
        "skip",
        "VLM705: 9.0 GiB are missing on GPU 0.",
    )
    assert decide(machine(gpu(0)), plan=plan(fits=False)) == ("skip", "VLM705: org/a does not fit.")


def test_a_model_that_others_keep_out_is_an_error(machine: MakeMachine, gpu: MakeGpu) -> None:
    shortage = Shortage(missing_bytes=1, message="9.0 GiB are missing on GPU 0.", is_permanent=False)
    found = machine(gpu(0, free_gib=2))

    assert decide(found, plan=plan(fits=False, shortage=shortage)) == (
        "error",
        "VLM711: 9.0 GiB are missing on GPU 0. GPU 0 (NVIDIA L4) has 2.0 GiB of 22.0 GiB free, "
        "no holder is visible from here.",
    )
    assert decide(found, plan=plan(fits=False, shortage=shortage), is_busy_decided_later=True)[0] == "run"


# A machine that is not this one


def test_nothing_runs_on_a_machine_that_is_not_live(machine: MakeMachine, gpu: MakeGpu) -> None:
    made_up = machine(gpu(0), gpu(1), origin="synthetic", description="2xL4")

    assert keep_from_acting(Verdict("run", gpus=(0, 1)), made_up) == Verdict(
        "skip", None, "would run on GPU 0, 1 of 2xL4, which is synthetic, not live."
    )
    assert keep_from_acting(Verdict("run"), made_up).text == "would run on the CPU of 2xL4, which is synthetic, not live."
    assert keep_from_acting(Verdict("error", "VLM711", "taken."), made_up).action == "error"
    assert keep_from_acting(Verdict("run"), machine(gpu(0))) == Verdict("run")


def test_strict_turns_skips_and_only_skips_into_errors() -> None:
    skip = Verdict("skip", "VLM702", "2 GPUs are wanted, 1 can be used.")

    assert skip.made_strict() == Verdict(
        "error", "VLM702", "2 GPUs are wanted, 1 can be used. (An error because of --vlm-strict.)"
    )
    assert Verdict("run", gpus=(1,)).made_strict() == Verdict("run", gpus=(1,))


def link(a: int, b: int, granted: str | None = "ok", *, nvlinks: int = 0) -> Link:
    return Link(a=a, b=b, nvlinks=nvlinks, path="PHB", p2p_read=granted, p2p_write=granted)


PEERS = Requirements(gpus=2, p2p=True)


def test_gpus_that_reach_each_other(gpu: MakeGpu, machine: MakeMachine) -> None:
    gpus = [gpu(index) for index in range(4)]
    ok = [link(0, 2), link(0, 3, nvlinks=4, granted=None), link(2, 3)]
    no = [link(0, 1, "chipset_not_supported"), link(1, 2, "not_supported"), link(1, 3, "not_supported")]
    found = machine(*gpus, links=(*ok, *no), environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})

    assert judge(PEERS, found, AUTO).gpus == (0, 2, 3)
    assert judge(Requirements(gpus=3, p2p=True), found, AUTO).gpus == (0, 2, 3)
    four = judge(Requirements(gpus=4, p2p=True, reason="all to all"), found, GpuChoice())
    assert (four.action, four.text) == (
        "skip",
        "VLM706: 4 GPUs that reach each other's memory are wanted, GPU 0 (NVIDIA L4) and GPU 1 (NVIDIA L4) do not "
        "(chipset_not_supported) (all to all).",
    )
    three = machine(*gpus[:3], links=(link(0, 1), link(0, 2, "not_supported"), link(1, 2)))
    assert "GPU 0 (NVIDIA L4) and GPU 2 (NVIDIA L4) do not" in judge(Requirements(gpus=3, p2p=True), three, AUTO).text
    two = machine(gpu(0), gpu(1), links=(link(0, 1, "not_supported"),))
    assert judge(PEERS, two, AUTO).code == "VLM706"
    assert judge(Requirements(p2p=True), two, AUTO).gpus == (0,)


def test_a_link_of_which_one_direction_is_missing(gpu: MakeGpu, machine: MakeMachine) -> None:
    one = Link(a=0, b=1, path="PIX", p2p_read="ok", p2p_write="disabled_by_regkey")

    verdict = judge(PEERS, machine(gpu(0), gpu(1), links=(one,)), AUTO)

    assert verdict.text.endswith("GPU 0 (NVIDIA L4) and GPU 1 (NVIDIA L4) do not (disabled_by_regkey).")


@pytest.mark.parametrize("links", [(), (link(0, 1, None),)])
def test_a_link_that_could_not_be_read_is_an_error(gpu: MakeGpu, machine: MakeMachine, links: tuple[Link, ...]) -> None:
    assert decide(machine(gpu(0), gpu(1), links=links), PEERS) == (
        "error",
        "VLM712: whether GPU 0 (NVIDIA L4) and GPU 1 (NVIDIA L4) reach each other's memory (p2p) could not be read; "
        "look at nvidia-smi topo -p2p r.",
    )
    assert peers.told([gpu(0)], machine(gpu(0))) == "there are 1"


def test_a_link_that_could_not_be_read_is_named_with_its_gap(gpu: MakeGpu, machine: MakeMachine) -> None:
    gaps = (Gap(path="links[0-1].p2p_read", reason="NVML: no permission"),)
    found = machine(gpu(0), gpu(1), links=(link(0, 1, "unknown"),), gaps=gaps)

    assert "(p2p) could not be read (NVML: no permission); look at" in judge(PEERS, found, AUTO).text


def test_what_nobody_could_read_matters_only_where_too_few_gpus_are_known_to_reach_each_other(
    gpu: MakeGpu, machine: MakeMachine
) -> None:
    three = machine(gpu(0), gpu(1), gpu(2), links=(link(0, 1, None), link(0, 2, None), link(1, 2, nvlinks=4)))

    assert judge(PEERS, three, AUTO).gpus == (1, 2)
    assert judge(Requirements(gpus=3, p2p=True), three, AUTO).code == "VLM712"
    assert judge(Requirements(gpus=4, p2p=True), three, AUTO).code == "VLM702"


def test_a_card_of_which_only_the_size_was_said_has_no_known_capability() -> None:
    assert decide(parse_machine("24GiB"), Requirements(capability=(8, 0))) == (
        "error",
        "VLM720: the compute capability of GPU 0 (GPU with 24.0 GiB) is not said of the made-up machine 24GiB: name a card "
        "of the catalogue there, such as L4.",
    )


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        ("2xL4:p2p", ("run", "")),
        ("2x24GiB:p2p", ("run", "")),
        ("2xA6000:nvlink", ("run", "")),
        (
            "2xL4:p2p=off",
            ("skip", "VLM706: 2 GPUs that reach each other's memory are wanted, GPU 0 (NVIDIA L4) and GPU 1 "),
        ),
        (
            "2x4090",
            ("skip", "VLM706: 2 GPUs that reach each other's memory are wanted, GPU 0 (NVIDIA GeForce RTX 4090) and "),
        ),
        (
            "2xL4",
            (
                "error",
                "VLM720: whether GPU 0 (NVIDIA L4) and GPU 1 (NVIDIA L4) reach each other's memory (p2p) is not said of "
                "the made-up machine 2xL4: write 2xL4:p2p, or 2xL4:p2p=off.",
            ),
        ),
    ],
)
def test_a_described_machine_says_who_reaches_whom(spec: str, answer: tuple[str, str]) -> None:
    action, text = decide(parse_machine(spec), PEERS)

    assert action == answer[0]
    assert text.startswith(answer[1])


def test_peers_that_are_taken_are_busy_and_the_other_ones_are_used(gpu: MakeGpu, machine: MakeMachine) -> None:
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    islands = tuple(
        link(a, b, "ok" if (a, b) in ((0, 1), (2, 3)) else "not_supported") for a in range(4) for b in range(a + 1, 4)
    )
    needs = Requirements(gpus=2, p2p=True, vram_bytes=10 * GIB)
    first = machine(gpu(0), gpu(1, free_gib=1), gpu(2), gpu(3), links=islands, environment=order)
    both = machine(gpu(0), gpu(1, free_gib=1), gpu(2), gpu(3, free_gib=1), links=islands, environment=order)

    assert judge(needs, first, AUTO).gpus == (2, 3)
    taken = judge(needs, both, GpuChoice())
    assert taken.code == "VLM711"
    assert taken.reason.startswith(
        "2 free GPUs that reach each other's memory are wanted: GPU 1 (NVIDIA L4) has 1.0 GiB of "
    )


def test_a_gpu_to_oneself(gpu: MakeGpu, machine: MakeMachine) -> None:
    mine, theirs = (GpuProcess(pid=pid, kind="compute", used_bytes=GIB, user="ana") for pid in (1, 2))
    found = machine(gpu(0, processes=(mine,)), gpu(1, processes=(theirs,)), environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    alone, both = Requirements(exclusive=True), Requirements(gpus=2, exclusive=True)

    assert judge(alone, found, GpuChoice(), own_pid=1).gpus == (0,)
    assert judge(both, found, GpuChoice(), own_pid=1).text == (
        "VLM711: 2 GPUs without any other process wanted: GPU 1 (NVIDIA L4) has 22.0 GiB of 22.0 GiB free, held by pid 2 "
        "(ana) 1.0 GiB."
    )
    assert judge(alone, found, GpuChoice(), own_pid=3).reason.startswith("1 GPU without any other process wanted: ")
    assert judge(both, found, GpuChoice(), own_pid=1, is_busy_decided_later=True).gpus == (0, 1)


def test_reasons_of_several_markers_are_all_told() -> None:
    joined = Requirements.strictest(
        [Requirements(reason="a"), Requirements(gpus=2), Requirements(reason="b"), Requirements(reason="a")]
    )

    assert joined == Requirements(gpus=2, reason="a; b")
    assert Requirements.strictest([Requirements(p2p=True), Requirements(exclusive=True)]) == Requirements(
        p2p=True, exclusive=True
    )
