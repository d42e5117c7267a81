"""Variables and packages around torch: what the machines of tests/machines do not show already."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.checks import CHECKS, diagnose
from vlm_doctor.checks._check import Facts, examine
from vlm_doctor.machine import FileSetting, KernelEvent, Libraries, Machine, NumaNode, Package, TorchBuild, TorchView

from .asking import Ask, Load, Said, commands


def libraries(load: Load, build: str = "2.13.0+cu130", cuda: str | None = "13.0", **versions: str) -> Libraries:
    """The usual packages with others, and a torch of this version."""
    base = load("2xl4-idle").libraries
    assert base is not None
    assert base.torch_build is not None
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    kept = tuple(one for one in base.packages if one.name not in named)
    added = tuple(Package(name=name, version=version) for name, version in named.items())
    return replace(base, packages=(*kept, *added), torch_build=replace(base.torch_build, version=build, cuda=cuda))


@pytest.mark.parametrize(
    ("environment", "torch", "messages"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "2.9.1", []),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync, max_split_size_mb:128,"}, "2.13.0", []),
        ({"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:[256:1,512:2,>:4]"}, "2.13.0", []),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "2.10.0", []),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "not a version", []),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            "2.9.1+cu130",
            ["torch 2.9.1 does not use PYTORCH_ALLOC_CONF, only PYTORCH_CUDA_ALLOC_CONF."],
        ),
        (
            {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "a:1"},
            "2.13.0",
            [
                "PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF='a:1': torch knows no option 'a', and fails at the first "
                "use of a GPU.",
            ],
        ),
        (
            {
                "PYTORCH_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:64",
                "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:true",
            },
            "2.13.0",
            [],
        ),
    ],
)
def test_allocator(environment: dict[str, str], torch: str, messages: list[str], ask: Ask, load: Load) -> None:
    outcome = ask("VLM311", "2xl4-idle", environment=environment, libraries=libraries(load, torch))
    assert [finding.message for finding in outcome.findings] == messages
    assert outcome.state == ("found" if messages else "passed")


@pytest.mark.parametrize(
    ("old", "new", "torch", "advice"),
    [
        # The name that this torch reads is kept, with what is good of its value.
        ("expandable_segments=True", None, "2.13.0", ["export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]),
        (None, "expandible-segments: True,x:1", "2.13.0", ["export PYTORCH_ALLOC_CONF=expandable_segments:True"]),
        (None, "a:1", "2.13.0", ["unset PYTORCH_ALLOC_CONF"]),
        ("a:1", "a:1", "2.13.0", ["unset PYTORCH_CUDA_ALLOC_CONF", "unset PYTORCH_ALLOC_CONF"]),
        (
            "max_split_size_mb:64",
            "a:1",
            "2.13.0",
            ["unset PYTORCH_CUDA_ALLOC_CONF", "export PYTORCH_ALLOC_CONF=max_split_size_mb:64"],
        ),
        (
            "max_split_size_mb:64",
            "max_split_size_mb:32",
            "2.13.0",
            ["unset PYTORCH_CUDA_ALLOC_CONF", "export PYTORCH_ALLOC_CONF=max_split_size_mb:32"],
        ),
        (
            "roundup_power2_divisions:[256:1,512:2],x",
            "max_split_size_mb:32",
            "2.9.1",
            ["unset PYTORCH_ALLOC_CONF", "export PYTORCH_CUDA_ALLOC_CONF='roundup_power2_divisions:[256:1,512:2]'"],
        ),
    ],
)
def test_one_advice_for_both_allocator_variables(
    old: str | None, new: str | None, torch: str, advice: list[str], ask: Ask, load: Load
) -> None:
    named = {"PYTORCH_CUDA_ALLOC_CONF": old, "PYTORCH_ALLOC_CONF": new}
    environment = {name: value for name, value in named.items() if value is not None}
    found = libraries(load, torch)

    outcome = ask("VLM311", "2xl4-idle", environment=environment, libraries=found)

    assert len(outcome.findings) == 1
    assert commands(outcome) == tuple(advice)
    # What the commands leave behind is fine.
    for command in advice:
        verb, _, rest = command.partition(" ")
        name, _, value = rest.partition("=")
        environment = {key: kept for key, kept in environment.items() if key != name}
        if verb == "export":
            environment[name] = shlex.split(value)[0]
    assert ask("VLM311", "2xl4-idle", environment=environment, libraries=found).state in ("passed", "skipped")


def test_allocator_of_a_torch_that_is_not_there(ask: Ask) -> None:
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert ask("VLM311", "2xl4-idle", environment=environment, libraries=None).state == "passed"
    assert ask("VLM311", "2xl4-idle").state == "skipped"


def test_the_value_is_quoted_in_the_command(ask: Ask, load: Load) -> None:
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:$(reboot)"}
    outcome = ask("VLM311", "2xl4-idle", environment=environment, libraries=libraries(load, "2.9.1"))
    expected = "export PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True,max_split_size_mb:$(reboot)'"
    assert commands(outcome) == (expected,)


@pytest.mark.parametrize(
    ("environment", "severities"),
    [
        ({"ACCELERATE_USE_CPU": "False"}, []),
        ({"CUDA_LAUNCH_BLOCKING": "0"}, []),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": ""}, ["warning"]),
        ({"CUDA_MODULE_LOADING": "LAZY"}, []),
        ({"CUDA_MODULE_LOADING": "eager"}, ["info"]),
    ],
)
def test_switches(environment: dict[str, str], severities: list[str], ask: Ask) -> None:
    outcome = ask("VLM312", "2xl4-idle", environment=environment)
    assert [finding.severity for finding in outcome.findings] == severities


def test_foreign_libraries_are_counted(ask: Ask, said: Said, load: Load) -> None:
    expected = (
        "LD_LIBRARY_PATH brings other CUDA libraries than torch's: /usr/local/cuda/lib64/libcudnn.so.9, "
        "/opt/lib/libnccl.so.0, /opt/lib/libnccl.so.1 and 1 more."
    )
    machine = load("foreign-cudnn")
    assert said(ask("VLM316", replace(machine, torch=load("2xl4-idle").torch))) == [("info", expected)]


@pytest.mark.parametrize(
    ("message", "guilty"),
    [
        ("ImportError: libtorch_cuda.so: undefined symbol: ncclCommRegister", "/opt/lib/libnccl.so.0"),
        ("RuntimeError: cuDNN version incompatibility: compiled against (9, 1, 0)", "/usr/local/cuda/lib64/libcudnn.so.9"),
        ("ImportError: libtorch_cuda.so: undefined symbol: cublasLtCreate", None),
        ("ImportError: libcudnn.so.9: cannot open shared object file: No such file or directory", None),
    ],
)
def test_a_foreign_library_that_the_error_names_is_the_cause(message: str, guilty: str | None, load: Load) -> None:
    machine = replace(load("foreign-cudnn"), torch=TorchView(state="failed", message=message))

    errors = [finding for finding in diagnose(machine).findings if finding.severity != "info"]

    assert [finding.code for finding in errors] == ["VLM316" if guilty else "VLM304"]
    if guilty:
        assert f"LD_LIBRARY_PATH puts {guilty} before its own library." in errors[0].message
        assert [outcome.code for outcome in diagnose(machine).symptoms("VLM316")] == ["VLM304"]


@pytest.mark.parametrize(
    ("version", "environment", "state"),
    [
        ("5.23.0", {"TRANSFORMERS_CACHE": "/x", "HF_HOME": "/y"}, "passed"),
        ("4.57.6", {"TRANSFORMERS_CACHE": "/x"}, "passed"),
        ("unknown", {"TRANSFORMERS_CACHE": "/x"}, "passed"),
        ("5.23.0", {"HF_HUB_ENABLE_HF_TRANSFER": "1"}, "passed"),
        ("5.23.0", {"TRANSFORMERS_OFFLINE": "ON"}, "found"),
    ],
)
def test_hub_variables(version: str, environment: dict[str, str], state: str, ask: Ask, load: Load) -> None:
    installed = libraries(load, transformers=version)
    assert ask("VLM318", "2xl4-idle", environment=environment, libraries=installed).state == state


def test_without_transformers_its_variables_do_not_matter(ask: Ask) -> None:
    environment = {"TRANSFORMERS_CACHE": "/x"}
    assert ask("VLM318", "transformers-missing", environment=environment).state == "skipped"
    assert ask("VLM320", "2xl4-idle", libraries=None).state == "unknown"


@pytest.mark.parametrize(
    ("versions", "torch", "cuda", "count"),
    [
        ({"torchvision": "0.28.0"}, "2.13.0+cu130", "13.0", 0),
        ({"torchvision": "0.28.0+cpu"}, "2.13.0+cpu", None, 0),
        ({"torchvision": "0.28.0+cu130", "torchaudio": "2.13.0+cu126"}, "2.13.0+cu130", "13.0", 1),
        ({"flash_attn": "2.8.3+cu12torch2.13cxx11abiTRUE"}, "2.13.0+cu130", "13.0", 0),
        ({"flash_attn": "2.8.3+cu12torch2.1cxx11abiTRUE"}, "2.13.0+cu130", "13.0", 1),
        ({"flash_attn": "2.8.3"}, "2.13.0+cu130", "13.0", 0),
    ],
)
def test_companions(versions: dict[str, str], torch: str, cuda: str | None, count: int, ask: Ask, load: Load) -> None:
    installed = libraries(load, torch, cuda, **versions)
    assert len(ask("VLM313", "2xl4-idle", libraries=installed).findings) == count


def test_a_companion_is_taken_from_the_index_of_torch(ask: Ask, load: Load) -> None:
    outcome = ask("VLM313", "2xl4-idle", libraries=libraries(load, torchaudio="2.13.0+cpu"))
    index = "https://download.pytorch.org/whl/cu130"
    assert commands(outcome) == (
        f"python -m pip install --force-reinstall --no-deps torchaudio==2.13.0 --index-url {index}",
    )


def test_torchvision_for_a_cpu_build_comes_from_its_index(ask: Ask, load: Load) -> None:
    # That of PyPI is built for CUDA.
    bare = libraries(load, "2.13.0+cpu", None)
    missing = replace(bare, packages=tuple(package for package in bare.packages if package.name != "torchvision"))
    (finding,) = (f for f in ask("VLM319", "2xl4-idle", libraries=missing).findings if f.severity == "warning")
    assert finding.fix is not None
    (command,) = finding.fix.commands
    assert command.endswith(" torchvision torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu")


def test_bitsandbytes(ask: Ask, load: Load, said: Said) -> None:
    base = libraries(load, bitsandbytes="0.41.0")
    none = "bitsandbytes 0.41.0 has no library for CUDA 13.0 (it has none for CUDA)."
    assert said(ask("VLM314", "2xl4-idle", libraries=replace(base, bitsandbytes_cuda=()))) == [("warning", none)]
    assert ask("VLM314", "2xl4-idle", libraries=replace(base, bitsandbytes_cuda=("13.1",))).state == "passed"
    not_cuda = examine(
        next(one for one in CHECKS if one.code == "VLM314"), Facts.of(load("cpu-torch", libraries=cpu(base)))
    )
    assert not_cuda.reason == "torch has no CUDA"


def cpu(base: Libraries) -> Libraries:
    return replace(base, bitsandbytes_cuda=(), torch_build=TorchBuild(version="2.13.0+cpu"))


def test_cuda_libraries_of_the_version_that_torch_uses_are_kept(ask: Ask, load: Load) -> None:
    versions = {"nvidia_nccl_cu12": "2.27.5", "nvidia_nccl_cu13": "2.28.9"}
    outcome = ask("VLM315", "2xl4-idle", libraries=libraries(load, "2.9.1+cu128", "12.8", **versions))
    assert commands(outcome) == (
        "python -m pip uninstall -y nvidia-nccl-cu13",
        "python -m pip install --force-reinstall --no-deps nvidia-nccl-cu12==2.27.5",
    )


def test_one_missing_image_package(ask: Ask, load: Load, said: Said) -> None:
    base = libraries(load)
    installed = replace(base, packages=tuple(one for one in base.packages if one.name != "pillow"))
    expected = ("warning", "pillow is not installed: image processors of transformers need it.")
    assert said(ask("VLM319", "2xl4-idle", libraries=installed)) == [expected]


@pytest.mark.parametrize(
    ("versions", "torch", "found"),
    [
        ({"torch": "2.9.0+cu128"}, "2.9.0+cu128", True),
        ({"torch": "2.9.1+cu128", "nvidia_cudnn_cu12": "9.10.2.21"}, "2.9.1+cu128", True),
        ({"torch": "2.9.1+cu128", "nvidia_cudnn_cu12": "9.15.1.9"}, "2.9.1+cu128", False),
        ({"torch": "2.9.1+cu128"}, "2.9.1+cu128", False),
        ({"torch": "2.10.0+cu130", "nvidia_cudnn_cu13": "9.13.0"}, "2.10.0", False),
        ({"transformers": "4.57.6"}, "2.13.0", True),
        ({"transformers": "5.4.0"}, "2.13.0", True),
        ({"transformers": "5.14.0"}, "2.13.0", False),
    ],
)
def test_known_defects(versions: dict[str, str], torch: str, found: bool, ask: Ask, load: Load) -> None:
    assert bool(ask("VLM320", "2xl4-idle", libraries=libraries(load, torch, **versions)).findings) is found


def test_defects_of_what_is_not_installed(ask: Ask, load: Load) -> None:
    none = replace(libraries(load), packages=())
    assert ask("VLM320", "2xl4-idle", libraries=none).reason == "neither torch nor transformers is installed"


def test_defects_of_placement_need_several_gpus(ask: Ask, load: Load) -> None:
    installed = libraries(load, transformers="5.3.0")
    assert ask("VLM320", "exclusive-process", libraries=installed).state == "passed"
    odd = ask("VLM320", "2xl4-idle", libraries=libraries(load, transformers="five"))
    assert (odd.state, odd.reason) == ("unknown", "Invalid version: 'five'")


def test_known_defect_names_its_thread(ask: Ask) -> None:
    finding = ask("VLM320", "slow-conv3d").findings[0]
    assert finding.links == ("https://github.com/pytorch/pytorch/issues/166643",)


@pytest.mark.parametrize(
    ("value", "fires"),
    [("eno", False), ("=eno1", False), ("=eno", True), ("^docker", False), ("ib0,eth", True), ("", False)],
)
def test_interfaces_of_nccl(value: str, fires: bool, ask: Ask) -> None:
    outcome = ask("VLM407", "2xl4-idle", environment={"NCCL_SOCKET_IFNAME": value})
    assert bool(outcome.findings) is fires


@pytest.mark.parametrize(
    ("environment", "severities"),
    [
        ({"NCCL_P2P_DISABLE": "0"}, []),
        ({"NCCL_P2P_DISABLE": "1"}, ["info"]),
        ({"NCCL_P2P_LEVEL": "loc"}, ["info"]),
        ({"NCCL_P2P_LEVEL": "NVL"}, []),
        ({"NCCL_VERSION": "2.28"}, []),
    ],
)
def test_peer_settings_of_nccl(environment: dict[str, str], severities: list[str], ask: Ask) -> None:
    outcome = ask("VLM407", "2xl4-idle", environment=environment)
    assert [finding.severity for finding in outcome.findings] == severities


def test_the_environment_comes_before_the_files(ask: Ask, load: Load) -> None:
    settings = (FileSetting(name="NCCL_P2P_DISABLE", value="1", file="/etc/nccl.conf"),)
    both = ask("VLM407", "2xl4-idle", nccl_settings=settings, environment={"NCCL_P2P_DISABLE": "0"})
    assert both.state == "passed"
    assert ask("VLM407", "exclusive-process", nccl_settings=settings).state == "skipped"
    own = FileSetting(name="NCCL_P2P_DISABLE", value="0", file="~/.nccl.conf")
    assert ask("VLM407", "2xl4-idle", nccl_settings=(own, *settings)).state == "passed"
    host = load("2xl4-idle").host
    assert host is not None
    named = {"NCCL_SOCKET_IFNAME": "eth9"}
    assert ask("VLM407", "2xl4-idle", environment=named, host=replace(host, network_interfaces=())).state == "passed"


def test_far_gpus(ask: Ask, load: Load, said: Said) -> None:
    host = load("8xa100-nvswitch").host
    assert host is not None
    nodes = (NumaNode(node=0, cpu_count=8, allowed_cpu_count=8), NumaNode(node=1, cpu_count=8, allowed_cpu_count=0))
    half = ask("VLM408", "8xa100-nvswitch", host=replace(host, numa_nodes=nodes))
    expected = "GPUs 4, 5, 6, 7 belong to NUMA node 1, and this process may only run on node 0."
    assert said(half) == [("info", expected)]
    one = load("8xa100-nvswitch", gpu=(4, {"numa_node": None}))
    assert ask("VLM408", one).state == "passed"
    nowhere = replace(one, gpus=tuple(replace(gpu, numa_node=None) for gpu in one.gpus))
    assert ask("VLM408", nowhere).reason == "the NUMA node of no visible GPU is known"


def test_peer_copies_behind_an_unknown_iommu(ask: Ask, load: Load) -> None:
    host = load("2xa6000-translating-iommu").host
    assert host is not None
    outcome = ask("VLM406", "2xa6000-translating-iommu", host=replace(host, iommu="unknown"))
    assert (outcome.state, outcome.reason) == ("unknown", "what the IOMMU does is not known")
    assert ask("VLM406", "2xa6000-translating-iommu", host=replace(host, iommu="passthrough")).state == "passed"
    assert ask("VLM406", "2xa6000-translating-iommu", host=None).state == "skipped"


def test_nvlink_errors_that_are_not_told(ask: Ask, load: Load) -> None:
    machine = load("new-nvlink-replays")
    silent = replace(machine, gpus=tuple(replace(gpu, nvlink_errors=None) for gpu in machine.gpus))
    assert ask("VLM409", silent).reason == "NVLink errors are not told"


@pytest.mark.parametrize(
    ("environment", "state"),
    [
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, "passed"),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, "passed"),
        ({"NVIDIA_VISIBLE_DEVICES": ""}, "passed"),
        ({"NVIDIA_VISIBLE_DEVICES": "0"}, "passed"),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-1234,GPU-5678"}, "found"),
    ],
)
def test_variable_of_the_container_runtime(environment: dict[str, str], state: str, ask: Ask, load: Load) -> None:
    host = load("container-short-of-a-gpu").host
    assert ask("VLM208", "container-short-of-a-gpu", host=host, environment=environment).state == state


def test_gpus_of_the_container_that_this_process_may_not_open_are_only_mentioned(ask: Ask, said: Said, load: Load) -> None:
    machine = load("8xh200-recorded")
    two = replace(machine, gpus=machine.gpus[:2], links=machine.links[:1])
    kept = ("/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl", "/dev/nvidia-uvm")
    forbidden = tuple(f"/dev/nvidia{index}" for index in range(2, 8))
    text = "NVIDIA_VISIBLE_DEVICES='0,1,2,3,4,5,6,7' names 8 GPUs, but this container has 2"

    gone = replace(two, driver=replace(two.driver, device_files=kept))
    refused = replace(two, driver=replace(two.driver, forbidden_device_files=forbidden))

    assert said(ask("VLM208", machine)) == []
    assert said(ask("VLM208", gone)) == said(ask("VLM208", refused)) == [("info", f"{text}, as many as it may open.")]
    assert said(ask("VLM208", two)) == [("warning", f"{text}.")]


def test_variable_of_the_container_runtime_outside(ask: Ask, said: Said) -> None:
    outcome = ask("VLM208", "2xl4-idle", environment={"NVIDIA_VISIBLE_DEVICES": "0"})
    assert said(outcome) == [("info", "NVIDIA_VISIBLE_DEVICES='0' has no effect outside a container.")]


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({"SLURM_JOB_GPUS": "2"}, "export CUDA_VISIBLE_DEVICES=2"),
        ({"SLURM_STEP_GPUS": "1", "SLURM_JOB_GPUS": "0,1,2,3"}, "export CUDA_VISIBLE_DEVICES=1"),
        ({"SLURM_JOB_GPUS": "6,7"}, "export CUDA_VISIBLE_DEVICES=0,1"),
        ({"SLURM_JOB_GPUS": ""}, None),
        ({"SLURM_JOB_GPUS": "0,1,2,3"}, None),
    ],
)
def test_grants(environment: dict[str, str], command: str | None, ask: Ask) -> None:
    outcome = ask("VLM207", "slurm-unmasked", environment=environment)
    assert (commands(outcome) if outcome.findings else (None,)) == (command,)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"libcuda_path": "/usr/local/cuda/compat/libcuda.so.580.95.05"}, "passed"),
        ({"libcuda_path": "/usr/lib/libcuda.so.1"}, "passed"),
        ({"kernel_module_version": None}, "passed"),
        ({"libcuda_path": None}, "skipped"),
    ],
)
def test_libcuda_that_may_be_right(changes: dict[str, Any], state: str, ask: Ask, load: Load) -> None:
    machine = load("library-of-the-image")
    assert ask("VLM112", replace(machine, driver=replace(machine.driver, **changes))).state == state


def test_closed_modules(ask: Ask, load: Load, said: Said) -> None:
    machine = load("5090-closed-modules")
    only_said = replace(machine, pci_devices=tuple(replace(one, device_id="2204") for one in machine.pci_devices))
    expected = "A GPU needs the open kernel modules, and the closed ones are loaded."
    assert said(ask("VLM113", only_said)) == [("error", expected)]
    odd = replace(machine.driver, kernel_module_version="unknown", kernel_events=None)
    assert commands(ask("VLM113", replace(machine, driver=odd))) == ("sudo reboot",)
    none = replace(machine.driver, kernel_module_version=None)
    assert ask("VLM113", replace(machine, driver=none)).state == "skipped"


def test_ages_of_events(ask: Ask, load: Load) -> None:
    machine = load("xid-48")
    events = machine.driver.kernel_events or ()
    unknown_age = replace(machine.driver, kernel_events=(replace(events[0], last_s_ago=None, bus_id="0000:09:00.0"),))
    finding = ask("VLM114", replace(machine, driver=unknown_age)).findings[0]
    assert finding.message == "The kernel log has Xid 48 of 0000:09:00.0 (1 time): an uncorrectable memory error."
    assert (finding.severity, finding.gpus) == ("info", ())


def test_the_kernel_log_gives_the_cause_of_a_lost_gpu(ask: Ask, load: Load) -> None:
    finding = ask("VLM108", "xid-79").findings[0]
    assert finding.cause == "The kernel log has Xid 79 of it (2 times, 5 min ago): the GPU has fallen off the bus."
    machine = load("gpu-off-the-bus")
    events = (
        KernelEvent(kind="iommu_fault", bus_id="0000:5d:00.0"),
        KernelEvent(kind="xid", code=79),
        KernelEvent(kind="init_failed", bus_id="0000:5d:00.0"),
    )
    failed = replace(machine, driver=replace(machine.driver, kernel_events=events))
    cause = ask("VLM107", failed).findings[0].cause
    assert cause == "The kernel log has a failed start of it (1 time): the driver could not start the GPU."
    assert ask("VLM107", machine).findings[0].cause == "It fell off the bus or failed to start."


def test_a_kernel_log_that_cannot_be_read(ask: Ask, load: Load) -> None:
    hidden = ask("VLM114", "sandbox-that-hides-much")
    assert hidden.state == "unknown"
    assert hidden.reason is not None
    assert hidden.reason.startswith("the kernel log could not be read (PermissionError: ")
    machine = load("2xl4-idle")
    unread = replace(machine, driver=replace(machine.driver, kernel_events=None))
    assert ask("VLM114", unread).reason == "the kernel log could not be read"
    assert ask("VLM114", "laptop-no-gpu").reason == "no GPU"


def test_kernels(ask: Ask, load: Load) -> None:
    host = load("2xl4-idle").host
    assert host is not None
    assert ask("VLM512", "2xl4-idle", host=replace(host, kernel="unknown")).state == "skipped"
    assert ask("VLM512", "exclusive-process", host=replace(host, kernel="4.18")).state == "passed"


def test_several_displays_and_several_old_gpus(ask: Ask, load: Load, said: Said) -> None:
    machine = load("2xl4-idle")
    both = replace(machine, gpus=tuple(replace(gpu, display_active=True) for gpu in machine.gpus))
    assert said(ask("VLM506", both)) == [("info", "GPUs 0, 1 drive a display: leave them some memory.")]
    masked = load("t4-beside-a10", environment={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert commands(ask("VLM122", masked)) == ("nvidia-smi --query-gpu=name,compute_cap --format=csv",)


def test_shared_memory_without_a_host(ask: Ask, said: Said, load: Callable[..., Machine]) -> None:
    assert said(ask("VLM123", "gb10-unified", host=None)) == [
        ("info", "GPU 0 (NVIDIA GB10) has no memory of its own: it shares the host's.")
    ]


def test_variables_of_several_makers(ask: Ask, said: Said) -> None:
    environment = {"HIP_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "0"}
    expected = "HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES are set, which say nothing to NVIDIA GPUs."
    assert said(ask("VLM210", "2xl4-idle", environment=environment)) == [("info", expected)]
