from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vlm_doctor.sources import host as host_module
from vlm_doctor.sources.environment import read_environment, shown
from vlm_doctor.sources.host import hf_cache_folder, read_host
from vlm_doctor.units import GIB, MIB

HOME = {"HOME": "/home/ada"}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_host_of_a_plain_server(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:   263998500 kB\nMemFree: 1 kB\nMemAvailable:  200000000 kB\nHugePages_Total: 0\n",
            "proc/sys/kernel/osrelease": "6.8.0-45-generic\n",
            "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
            "proc/cpuinfo": "processor : 0\nflags\t\t: fpu vme de\n",
            "dev/shm/x": "",
        },
    )
    host = read_host(tmp_path, HOME)
    assert (host.os, host.kernel) == ("Ubuntu 24.04.3 LTS", "6.8.0-45-generic")
    assert (host.memory_total_bytes, host.memory_available_bytes) == (263998500 * 1024, 200000000 * 1024)
    assert (host.cgroup_limit_bytes, host.container, host.is_wsl, host.is_virtual_machine) == (None, None, False, False)
    assert host.hf_cache == "~/.cache/huggingface/hub"
    assert host.hf_cache_free_bytes is not None
    assert host.hf_cache_free_bytes > 0
    assert host.shm_total_bytes is not None
    assert host.cpu_count is not None
    assert host.cpu_count >= 1


def test_empty_file_system_is_all_unknown(tmp_path: Path) -> None:
    host = read_host(tmp_path / "nothing", {})
    assert (host.os, host.kernel) == ("unknown", "unknown")
    assert (host.memory_total_bytes, host.memory_available_bytes, host.cgroup_limit_bytes) == (None, None, None)
    assert (host.hf_cache, host.hf_cache_free_bytes, host.container, host.is_virtual_machine) == (None, None, None, None)


def test_cgroup_2_limit_is_the_tightest_of_all_ancestors(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: {64 * MIB} kB\nMemAvailable: {60 * MIB} kB\n",
            "proc/self/cgroup": "0::/kubepods/pod1/c1\n",
            "sys/fs/cgroup/kubepods/pod1/c1/memory.max": "max\n",
            "sys/fs/cgroup/kubepods/pod1/c1/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/kubepods/pod1/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/kubepods/pod1/memory.current": f"{10 * GIB}\n",
            "sys/fs/cgroup/kubepods/pod1/memory.stat": f"anon 1\ninactive_file {4 * GIB}\n",
            "sys/fs/cgroup/kubepods/memory.max": f"{32 * GIB}\n",
            "sys/fs/cgroup/kubepods/memory.current": f"{31 * GIB}\n",
        },
    )
    host = read_host(tmp_path, HOME)
    assert host.cgroup_limit_bytes == 16 * GIB
    # The pod has 16 - (10 - 4 of page cache) = 10 GiB left, but all pods together only 32 - 31.
    assert host.memory_available_bytes == 1 * GIB


def test_cgroup_1_limit_and_its_mark_for_none(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: {64 * MIB} kB\nMemAvailable: {60 * MIB} kB\n",
            "proc/self/cgroup": "12:cpu,cpuacct:/slurm/job_7\n9:memory:/slurm/job_7\n",
            "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory/slurm/job_7/memory.usage_in_bytes": f"{5 * GIB}\n",
            "sys/fs/cgroup/memory/slurm/job_7/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    host = read_host(tmp_path, HOME)
    assert (host.cgroup_limit_bytes, host.memory_available_bytes) == (8 * GIB, 4 * GIB)


def test_container_whose_group_names_folders_of_the_host_uses_what_is_mounted(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../system.slice/docker-1234.scope\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{5 * GIB}\n",
        },
    )
    host = read_host(tmp_path, HOME)
    assert (host.cgroup_limit_bytes, host.memory_available_bytes) == (4 * GIB, 0)


def test_limit_above_the_memory_of_the_machine_is_no_limit(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: {8 * MIB} kB\nMemAvailable: {6 * MIB} kB\n",
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{16 * GIB}\n",
        },
    )
    host = read_host(tmp_path, HOME)
    assert (host.cgroup_limit_bytes, host.memory_available_bytes) == (None, 6 * GIB)


@pytest.mark.parametrize("text", ["", "max", "-5", "9" * 40, "12 34", "\x00\xff"])
def test_nonsense_in_cgroup_files_is_no_limit(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/\nbroken\n::::\n", "sys/fs/cgroup/memory.max": text})
    assert read_host(tmp_path, HOME).cgroup_limit_bytes is None


@pytest.mark.parametrize(
    ("files", "environment", "kind"),
    [
        ({".dockerenv": ""}, {}, "docker"),
        ({"run/.containerenv": ""}, {}, "podman"),
        ({".dockerenv": ""}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ({}, {"APPTAINER_NAME": "x.sif"}, "apptainer"),
        ({}, {"container": "lxc"}, "lxc"),
        ({"proc/1/cgroup": "1:name=systemd:/kubepods/burstable/pod1\n"}, {}, "kubernetes"),
        ({"proc/1/cgroup": "0::/system.slice/containerd.service/x\n"}, {}, "container"),
        ({"proc/1/cgroup": "0::/init.scope\n"}, {}, None),
    ],
)
def test_container_is_told_by_its_marks(
    tmp_path: Path, files: dict[str, str], environment: dict[str, str], kind: str | None
) -> None:
    write(tmp_path, files)
    assert read_host(tmp_path, environment).container == kind


def test_wsl_and_virtual_machine(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2\n",
            "proc/cpuinfo": "flags\t: fpu hypervisor\n" + "x" * 100_000,
        },
    )
    host = read_host(tmp_path, {})
    assert (host.is_wsl, host.is_virtual_machine) == (True, True)


def test_processor_without_flags_leaves_the_virtual_machine_open(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "processor: 0\nFeatures: fp asimd\n"})
    assert read_host(tmp_path, {}).is_virtual_machine is None


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, None),
        ({"HOME": "/home/ada"}, "/home/ada/.cache/huggingface/hub"),
        ({"HOME": "/home/ada", "XDG_CACHE_HOME": "/scratch"}, "/scratch/huggingface/hub"),
        ({"HOME": "/home/ada", "XDG_CACHE_HOME": "/scratch", "HF_HOME": "~/hf"}, "/home/ada/hf/hub"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": "/models"}, "/models"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": ""}, "/hf/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"}, "/old"),
    ],
)
def test_checkpoint_folder_follows_the_variables_of_the_hub(environment: dict[str, str], folder: str | None) -> None:
    assert hf_cache_folder(environment) == (Path(folder) if folder else None)


def test_dead_network_file_system_costs_a_second_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    real = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        if "huggingface" in str(path):
            release.wait(30)
        return real("/")

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(host_module, "_DISK_DEADLINE_S", 0.05)
    host = read_host(tmp_path, HOME)
    release.set()
    assert host.hf_cache == "~/.cache/huggingface/hub"
    assert host.hf_cache_free_bytes is None


def test_checkpoint_folder_below_a_file_is_on_the_disk_of_that_file(tmp_path: Path) -> None:
    write(tmp_path, {"data/models": "not a folder"})
    assert read_host(tmp_path, {"HF_HOME": "/data/models"}).hf_cache_free_bytes is not None


def test_file_system_without_any_folder_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def statvfs(path: Any) -> os.statvfs_result:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert read_host(tmp_path, HOME).shm_free_bytes is None


def test_lines_without_a_figure_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: lots\nMemAvailable:\n\nnothing\n"})
    assert read_host(tmp_path, HOME).memory_total_bytes is None


def test_unreadable_disk_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def statvfs(path: Any) -> os.statvfs_result:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "statvfs", statvfs)
    host = read_host(tmp_path, HOME)
    assert (host.shm_total_bytes, host.hf_cache_free_bytes) == (None, None)


def test_environment_keeps_the_variables_on_the_list_only() -> None:
    environment = {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "NCCL_P2P_DISABLE": "1",
        "HF_TOKEN": "hf_secret",
        "HF_HOME": "/home/ada/hf",
        "NCCL_AUTH_KEY": "secret",
        "TRANSFORMERS_API_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "PATH": "/usr/bin",
        "HOME": "/home/ada",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_SOMETHING": "x",
    }
    assert read_environment(environment) == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HF_HOME": "~/hf",
        "NCCL_P2P_DISABLE": "1",
        "NVIDIA_VISIBLE_DEVICES": "all",
    }


def test_environment_values_are_fit_for_a_snapshot() -> None:
    kept = read_environment({"CUDA_X": "a\udcffb", "CUDA_Y": "y" * 10_000, "CUDA_VISIBLE_DEVICES": ""})
    assert kept["CUDA_X"] == "a�b"
    assert len(kept["CUDA_Y"]) == 4096
    assert kept["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("text", "home", "expected"),
    [
        ("/home/ada/hf", "/home/ada", "~/hf"),
        ("/home/ada", "/home/ada/", "~"),
        ("/home/adam/x:/home/ada/lib:/home/ada", "/home/ada", "/home/adam/x:~/lib:~"),
        ("/usr/lib", "/home/ada", "/usr/lib"),
        ("/usr/lib", "/", "/usr/lib"),
        ("/usr/lib", "", "/usr/lib"),
        ("a b", " ", "a b"),
    ],
)
def test_home_is_written_as_tilde(text: str, home: str, expected: str) -> None:
    assert shown(text, home) == expected
