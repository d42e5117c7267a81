"""Limits of a process, from folders that look like /proc and /sys."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest

from vlm_doctor.machine import NumaNode
from vlm_doctor.sources.host import read_host
from vlm_doctor.sources.limits import filesystem_of, mps, numa_nodes, read_limits, tasks_left


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_numa_nodes_and_what_of_them_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 9}, raising=False)
    folder = "sys/devices/system/node"
    write(
        tmp_path,
        {
            f"{folder}/node0/cpulist": "0-3,8\n",
            f"{folder}/node1/cpulist": "4-7,9",
            f"{folder}/node2/cpulist": "\n",  # memory without processors
            f"{folder}/node3/cpulist": "zero,1-",
            f"{folder}/possible": "0-3",
        },
    )
    assert numa_nodes(tmp_path) == (
        NumaNode(node=0, cpu_count=5, allowed_cpu_count=2),
        NumaNode(node=1, cpu_count=5, allowed_cpu_count=1),
    )
    monkeypatch.delattr(os, "sched_getaffinity")
    assert numa_nodes(tmp_path)[0] == NumaNode(node=0, cpu_count=5, allowed_cpu_count=5)
    assert numa_nodes(tmp_path / "none") == ()


def test_a_hostile_cpu_list_is_bounded(tmp_path: Path) -> None:
    write(tmp_path, {"sys/devices/system/node/node0/cpulist": "0-99999," * 50})
    assert numa_nodes(tmp_path)[0].cpu_count == 65_537


def test_tasks_left_is_the_least_of_all_groups_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "1:memory:/x\n0::/a/../b\n",
            f"{group}/pids.max": "max",
            f"{group}/a/pids.max": "500",
            f"{group}/a/pids.current": "100",
            f"{group}/a/b/pids.max": "1000",
            f"{group}/a/b/pids.current": "2000",
        },
    )
    assert tasks_left(tmp_path) == 0
    assert tasks_left(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, "absent"),
        ({"tmp/nvidia-mps/control": ""}, "running"),
        ({"tmp/nvidia-mps/control": "", "tmp/nvidia-mps/nvidia-cuda-mps-control.pid": "77", "proc/77/stat": ""}, "running"),
        ({"tmp/nvidia-mps/control": "", "tmp/nvidia-mps/nvidia-cuda-mps-control.pid": "78"}, "dead"),
    ],
)
def test_mps(tmp_path: Path, files: dict[str, str], state: str) -> None:
    write(tmp_path, files)
    assert mps(tmp_path, {}) == state
    assert mps(tmp_path, {"CUDA_MPS_PIPE_DIRECTORY": "/elsewhere"}) == "absent"


def test_file_system_of_the_longest_mount(tmp_path: Path) -> None:
    mounts = "/dev/a / ext4 rw 0 0\nserver:/d /data nfs4 rw 0 0\nx /data/my\\040disk tmpfs rw 0 0\nbroken\n"
    write(tmp_path, {"proc/self/mounts": mounts})
    assert filesystem_of(tmp_path, "/home/ada") == "ext4"
    assert filesystem_of(tmp_path, "/database") == "ext4"
    assert filesystem_of(tmp_path, "/data") == "nfs4"
    assert filesystem_of(tmp_path, "/data/my disk/hub") == "tmpfs"
    assert filesystem_of(tmp_path / "none", "/data") is None


def test_address_space_interfaces_and_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"sys/class/net/eth0/x": "", "sys/class/net/lo/x": ""})
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**36, -1))
    found = read_limits(tmp_path, {"TMPDIR": "/home/ada/tmp", "HOME": "/home/ada"})
    assert (found["address_space_limit_bytes"], found["network_interfaces"], found["tmp"]) == (
        2**36,
        ("eth0", "lo"),
        "~/tmp",
    )
    monkeypatch.setattr(resource, "getrlimit", lambda which: (-1, -1))
    assert read_limits(tmp_path, {})["address_space_limit_bytes"] is None
    monkeypatch.setitem(sys.modules, "resource", None)
    assert read_limits(tmp_path, {})["address_space_limit_bytes"] is None


def test_cache_is_writable_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"data/hub/x": "", "tmp/x": ""})
    host = read_host(tmp_path, {"HF_HUB_CACHE": "/data/hub"})
    assert (host.hf_cache_is_writable, host.tmp) == (True, "/tmp")
    assert host.tmp_free_bytes is not None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert read_host(tmp_path, {"HF_HUB_CACHE": "/data/hub/new"}).hf_cache_is_writable is False
    assert read_host(tmp_path, {}).hf_cache_is_writable is None
