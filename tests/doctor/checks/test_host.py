from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.machine import Checkpoint
from vlm_doctor.units import GIB, MIB

from .asking import Ask, Load, Said, commands


def host(load: Load, name: str = "2xl4-idle", **fields: Any) -> dict[str, Any]:
    found = load(name).host
    assert found is not None
    return {"host": replace(found, **fields)}


@pytest.mark.parametrize(
    ("repo", "lines"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", ("HF_HUB_OFFLINE=0 hf download Qwen/Qwen2.5-VL-7B-Instruct",)),
        ("--token=x/y; rm -rf ~", ()),
    ],
)
def test_the_rest_of_a_checkpoint_is_downloaded(repo: str, lines: tuple[str, ...], ask: Ask) -> None:
    cut = (Checkpoint(repo=repo, missing_files=2),)
    assert commands(ask("VLM511", "offline-without-a-shard", checkpoints=cut)) == lines


def test_small_shm(ask: Ask, said: Said) -> None:
    outcome = ask("VLM503", "small-shm")

    assert said(outcome) == [("warning", "/dev/shm has 64 MiB: data loaders with workers and NCCL want 1.0 GiB or more.")]
    assert outcome.findings[0].cause == "docker's default is 64 MiB."
    assert commands(outcome) == ("docker run --gpus all --shm-size=8g IMAGE",)
    assert ask("VLM503", "2xl4-idle").state == "passed"
    assert ask("VLM503", "ci-container").reason == "no GPU"


def test_small_shm_outside_a_container(ask: Ask, load: Load) -> None:
    outcome = ask("VLM503", "2xl4-idle", **host(load, shm_total_bytes=500 * MIB))

    assert commands(outcome) == ("sudo mount -o remount,size=8G /dev/shm",)
    assert outcome.findings[0].cause is None


def test_small_shm_beside_one_gpu_is_only_mentioned(ask: Ask, load: Load) -> None:
    assert ask("VLM503", "wsl2", **host(load, shm_total_bytes=64 * MIB)).findings[0].severity == "info"


def test_full_shm(ask: Ask, load: Load) -> None:
    outcome = ask("VLM503", "2xl4-idle", **host(load, shm_total_bytes=8 * GIB, shm_free_bytes=MIB))

    assert outcome.findings[0].message == "/dev/shm is full: 1 MiB of 8.0 GiB are free."


def test_shm_of_unknown_room(ask: Ask, load: Load) -> None:
    assert ask("VLM503", "2xl4-idle", **host(load, shm_free_bytes=None)).state == "passed"
    assert ask("VLM503", "2xl4-idle", **host(load, shm_total_bytes=None)).reason == "host.shm_total_bytes is not known"


def test_memory_limit(ask: Ask, said: Said) -> None:
    outcome = ask("VLM504", "cgroup-limit")

    assert said(outcome) == [
        (
            "warning",
            "This container may use 16.0 GiB of the host's 251.0 GiB, less than one GPU holds (45.0 GiB).",
        )
    ]
    assert commands(outcome) == ("docker run --gpus all --memory=64g IMAGE",)
    assert ask("VLM504", "2xl4-idle").state == "passed"
    assert ask("VLM504", "laptop-no-gpu").reason == "no GPU"


def test_memory_limit_of_a_job_that_is_larger_than_a_gpu_is_only_mentioned(ask: Ask, load: Load, said: Said) -> None:
    outcome = ask("VLM504", "2xl4-idle", **host(load, cgroup_limit_bytes=64 * GIB))

    assert said(outcome) == [("info", "This job may use 64.0 GiB of the host's 251.0 GiB.")]
    assert commands(outcome) == ()


@pytest.mark.parametrize("limit", [None, 126 * GIB, 2**62])
def test_a_generous_limit(limit: int | None, ask: Ask, load: Load) -> None:
    assert ask("VLM504", "2xl4-idle", **host(load, cgroup_limit_bytes=limit)).state == "passed"


def test_host_unread(ask: Ask) -> None:
    for code in ("VLM503", "VLM504", "VLM505"):
        assert ask(code, "2xl4-idle", host=None).state == "unknown"


def test_little_disk(ask: Ask, said: Said) -> None:
    outcome = ask("VLM505", "full-disk")

    assert said(outcome) == [("warning", "The checkpoint cache ~/.cache/huggingface/hub has 4.2 GiB of free disk space.")]
    assert commands(outcome) == (
        "du -sh ~/.cache/huggingface/hub/* 2> /dev/null | sort -h",
        "export HF_HUB_CACHE=/path/with/room",
    )
    assert ask("VLM505", "2xl4-idle").state == "passed"
    assert ask("VLM505", "laptop-no-gpu").reason == "no GPU"
