from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.findings import Outcome
from vlm_doctor.machine import Gap, GpuProcess
from vlm_doctor.units import GIB, MIB

from .asking import Ask, Load, Said


def process(pid: int, used: int | None, **changes: Any) -> GpuProcess:
    return GpuProcess(pid=pid, kind="compute", used_bytes=used, **changes)


def fixed_by(outcome: Outcome) -> tuple[str, ...]:
    fix = outcome.findings[0].fix
    assert fix is not None
    return fix.commands


def test_held_by_another_process(ask: Ask, said: Said) -> None:
    outcome = ask("VLM501", "2xa10-half-taken")

    assert said(outcome) == [
        ("warning", "GPU 1 (NVIDIA A10): 11.0 GiB of 22.5 GiB are held by pid 4711 (ana, python, 11.0 GiB, 3 h).")
    ]
    assert outcome.findings[0].gpus == (1,)
    assert outcome.findings[0].evidence == {
        "gpus[1].memory_used_bytes": "11.0 GiB",
        "gpus[1].memory_free_bytes": "11.1 GiB",
        "gpus[1].processes[0].pid": "4711",
    }
    assert fixed_by(outcome) == ("ps -o pid,user,etime,args -p 4711",)
    assert ask("VLM501", "2xl4-idle").state == "passed"
    assert ask("VLM501", "masked").reason == "explained by VLM201"


@pytest.mark.parametrize(
    ("used", "severity"), [(255 * MIB, None), (256 * MIB, "info"), (2 * GIB, "info"), (3 * GIB, "warning")]
)
def test_little_is_not_much(used: int, severity: str | None, ask: Ask) -> None:
    fields = {"memory_used_bytes": used, "processes": (process(7, used),)}

    assert [f.severity for f in ask("VLM501", "2xl4-idle", gpu=(0, fields)).findings] == ([severity] if severity else [])


def test_many_processes_are_named_largest_first(ask: Ask) -> None:
    processes = tuple(process(pid, pid * GIB, user="ana", command="python") for pid in (1, 2, 3, 4, 5, 6))
    fields = {"memory_used_bytes": 21 * GIB, "processes": processes}

    outcome = ask("VLM501", "2xl4-idle", gpu=(0, fields))

    assert outcome.findings[0].message == (
        "GPU 0 (NVIDIA L4): 21.0 GiB of 22.5 GiB are held by pid 6 (ana, python, 6.0 GiB), pid 5 (ana, python, 5.0 GiB), "
        "pid 4 (ana, python, 4.0 GiB), pid 3 (ana, python, 3.0 GiB) and 2 more."
    )
    assert fixed_by(outcome) == ("ps -o pid,user,etime,args -p 6,5,4,3,2,1",)


def test_processes_that_are_not_visible_from_here(ask: Ask) -> None:
    fields = {"memory_used_bytes": 9 * GIB, "processes": (process(0, None),)}

    outcome = ask("VLM501", "2xl4-idle", gpu=(0, fields))

    assert outcome.findings[0].message == (
        "GPU 0 (NVIDIA L4): 9.0 GiB of 22.5 GiB are held by a process (not visible from here)."
    )
    assert fixed_by(outcome) == ("nvidia-smi",)
    assert ask("VLM502", "2xl4-idle", gpu=(0, fields)).state == "passed"
    # ps would know nothing of a process of another container either.
    elsewhere = ask("VLM501", "2xl4-idle", gpu=(0, fields | {"processes": (process(683, 9 * GIB),)}))
    assert fixed_by(elsewhere) == ("nvidia-smi",)


def test_sizes_that_are_partly_unknown(ask: Ask) -> None:
    fields = {"memory_used_bytes": None, "memory_total_bytes": None, "processes": (process(7, 2 * GIB), process(8, None))}

    assert ask("VLM501", "2xl4-idle", gpu=(0, fields)).findings[0].message == (
        "GPU 0 (NVIDIA L4): 2.0 GiB are held by pid 7 (not visible from here, 2.0 GiB), pid 8 (not visible from here)."
    )


@pytest.mark.parametrize(
    ("age", "text"), [(-1.0, "0 s"), (59.0, "59 s"), (90.0, "1 min"), (7200.0, "2 h"), (200_000.0, "2 d")]
)
def test_age(age: float, text: str, ask: Ask) -> None:
    one = process(7, 9 * GIB, user="ana", started_s_ago=age)

    message = ask("VLM501", "2xl4-idle", gpu=(0, {"memory_used_bytes": 9 * GIB, "processes": (one,)})).findings[0].message

    assert message.endswith(f"pid 7 (ana, 9.0 GiB, {text}).")


def test_a_hostile_command_is_printed_safely(ask: Ask) -> None:
    one = process(7, 9 * GIB, user="a\x1b[31m", command="x\n" * 1000)

    message = ask("VLM501", "2xl4-idle", gpu=(0, {"memory_used_bytes": 9 * GIB, "processes": (one,)})).findings[0].message

    assert message.isprintable()
    assert len(message) < 200


def test_memory_without_a_process(ask: Ask, said: Said) -> None:
    outcome = ask("VLM502", "orphaned-memory")

    assert said(outcome) == [
        ("warning", "GPU 0 (NVIDIA L4): 9.0 GiB are in use, but no process is listed that holds them.")
    ]
    assert outcome.findings[0].cause == "A dead process left it behind."
    assert fixed_by(outcome) == ("sudo fuser -v /dev/nvidia*",)
    assert ask("VLM502", "2xl4-idle").state == "passed"


def test_memory_that_processes_account_for_in_part(ask: Ask) -> None:
    fields = {"processes": (process(7, 2 * GIB, user="ana"),)}

    assert ask("VLM502", "orphaned-memory", gpu=(0, fields)).findings[0].message == (
        "GPU 0 (NVIDIA L4): 7.0 GiB are in use, but no process is listed that holds them all."
    )


def test_memory_held_outside_the_container(ask: Ask, said: Said) -> None:
    outcome = ask("VLM502", "container-hidden-pids")

    assert said(outcome) == [
        ("warning", "GPU 1 (NVIDIA L4): 9.0 GiB are in use, but who holds them is not visible from here.")
    ]
    assert outcome.findings[0].cause == "Processes outside this container or machine are not listed."
    assert fixed_by(outcome) == ("nvidia-smi",)


def test_memory_held_outside_a_virtual_machine(ask: Ask, load: Load) -> None:
    host = load("2xl4-idle").host
    assert host is not None

    finding = ask("VLM502", "orphaned-memory", host=replace(host, is_virtual_machine=True)).findings[0]

    assert finding.message.endswith("who holds them is not visible from here.")
    assert ask("VLM502", "orphaned-memory", host=None).findings[0].message.endswith("no process is listed that holds them.")


def test_processes_that_could_not_be_read(ask: Ask) -> None:
    gaps = (Gap(path="gpus[0].processes", reason="NVML: Insufficient Permissions"),)

    assert ask("VLM502", "orphaned-memory", gaps=gaps).findings[0].message == (
        "GPU 0 (NVIDIA L4): 9.0 GiB are in use, but who holds them could not be read (NVML: Insufficient Permissions)."
    )
    assert ask("VLM501", "orphaned-memory", gaps=gaps).reason == "gpus[0].processes: NVML: Insufficient Permissions"


def test_a_context_is_not_an_orphan(ask: Ask) -> None:
    assert ask("VLM502", "2xl4-idle", gpu=(0, {"memory_used_bytes": 900 * MIB})).state == "passed"


def test_memory_that_is_shared_with_the_host_is_not_judged(ask: Ask) -> None:
    fields = {"memory_used_bytes": 9 * GIB, "processes": (process(7, 9 * GIB),), "has_unified_memory": True}

    assert ask("VLM501", "2xl4-idle", gpu=(0, fields)).state == "passed"
    assert ask("VLM502", "orphaned-memory", gpu=(0, {"has_unified_memory": True})).state == "passed"


def test_memory_unread(ask: Ask) -> None:
    assert ask("VLM502", "gb10-unified").reason == "gpus[0].memory_used_bytes: NVML: Not Supported"


def test_a_made_up_machine_has_no_orphans(ask: Ask) -> None:
    assert ask("VLM502", "orphaned-memory", origin="synthetic").reason == "a made-up machine has no processes"
