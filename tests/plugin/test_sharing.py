"""Workers and runs share one machine: each model is loaded once, no GPU has two masters, nobody is kept out in silence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

import vlm_doctor.machine as m
from vlm_doctor.codec import from_json, to_json
from vlm_doctor.units import GIB

from ..until import LIMIT_S, is_running, until
from .projects import ONE_MODEL, SLOW, UUIDS, finish, read_until, with_workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from .projects import Project

TWO_MODELS = """
import pytest
@pytest.mark.vlm("org/a")
@pytest.mark.parametrize("n", range(3))
def test_a(vlm, n): assert vlm.name == "org/a"
@pytest.mark.parametrize("n", range(8))
def test_free(n): pass
@pytest.mark.vlm("org/b")
@pytest.mark.parametrize("n", range(3))
def test_b(vlm, n): assert vlm.name == "org/b"
"""


@with_workers
@pytest.mark.parametrize("options", ["", "--vlm-gpus=auto", "--dist=worksteal", "--dist=loadgroup"])
def test_two_workers_load_each_model_once_on_gpus_of_their_own(make: Callable[..., Project], options: str) -> None:
    project = make()

    text, counts = project.run("-n2", *options.split(), test_x=TWO_MODELS)

    assert counts == {"passed": 14}, text
    assert project.models() == ["org/a", "org/b"]
    assert sorted((load["gpus"], load["sees"]) for load in project.loads()) == [("0", UUIDS[0]), ("1", UUIDS[1])]
    assert len({load["worker"] for load in project.loads()}) == 2


@with_workers
def test_a_model_that_needs_all_gpus_gets_them_and_the_others_share_them(make: Callable[..., Project]) -> None:
    project = make()

    text, counts = project.run(
        "-n2",
        test_x=TWO_MODELS,
        test_y="import pytest\n@pytest.mark.vlm('org/wide')\n@pytest.mark.vlm_requires(gpus=2)\ndef test_wide(vlm): pass",
    )

    assert counts == {"passed": 15}, text
    assert project.models() == ["org/a", "org/b", "org/wide"]
    assert {load["worker"] for load in project.loads()} == {"gw0"}


@with_workers
def test_with_three_gpus_two_are_for_the_wide_model(make: Callable[..., Project]) -> None:
    project = make(gpus=3)

    _, counts = project.run(
        "-n3",
        test_x=TWO_MODELS,
        test_y="import pytest\n@pytest.mark.vlm('org/wide')\n@pytest.mark.vlm_requires(gpus=2)\ndef test_wide(vlm): pass",
    )

    assert counts == {"passed": 15}
    by_model = {load["model"]: load for load in project.loads()}
    assert len(by_model) == 3
    assert by_model["org/wide"]["worker"] == "gw0"
    used = [set(load["gpus"].split(",")) for load in (by_model["org/wide"], by_model["org/a"])]
    assert used[0].isdisjoint(used[1])


@with_workers
@pytest.mark.parametrize("found_first", ["vlmgpu", "xdist"])
def test_as_many_workers_as_gpus_with_auto(make: Callable[..., Project], found_first: str) -> None:
    text, counts = make(gpus=3).run("-p", found_first, "-nauto", "--vlm-gpus=auto", "-v", test_x=TWO_MODELS)

    assert counts == {"passed": 14}
    assert "3 workers" in text


@with_workers
@pytest.mark.parametrize(("said", "workers"), [("2", "2 workers"), ("None", "3 workers")])
def test_a_conftest_may_say_how_many_workers_auto_means(make: Callable[..., Project], said: str, workers: str) -> None:
    project = make(gpus=3)
    project.conftest = f"def pytest_xdist_auto_num_workers(config): return {said}\n"

    text, _ = project.run("-nauto", "--vlm-gpus=auto", "-v", test_x=TWO_MODELS)

    assert workers in text


@with_workers
@pytest.mark.parametrize(
    ("visible", "workers", "indices"),
    [("1", 2, {"1"}), (UUIDS[1], 2, {"1"}), ("GPU-00000002", 2, {"2"}), ("2,1", 2, {"1", "2"})],
)
def test_what_is_hidden_from_the_run_stays_hidden(
    make: Callable[..., Project], visible: str, workers: int, indices: set[str]
) -> None:
    project = make(gpus=3, CUDA_VISIBLE_DEVICES=visible)

    text, counts = project.run(f"-n{workers}", "--vlm-gpus=auto", test_x=TWO_MODELS)

    assert counts == {"passed": 14}, text
    assert {load["gpus"] for load in project.loads()} == indices
    assert {load["sees"] for load in project.loads()} == {UUIDS[int(index)] for index in indices}


@with_workers
@pytest.mark.parametrize(("visible", "outcome"), [("", "skipped"), ("nonsense", "error")])
def test_where_every_gpu_is_hidden_nothing_is_leased(make: Callable[..., Project], visible: str, outcome: str) -> None:
    project = make(CUDA_VISIBLE_DEVICES=visible)

    text, counts = project.run("-n2", "--vlm-gpus=auto", test_x=TWO_MODELS)

    assert counts == {"passed": 8, outcome: 6}, text
    assert project.loads() == []
    assert not (project.shared / "leases").exists()


@with_workers
def test_the_replacement_of_a_crashed_worker_gets_its_gpus_and_its_tests(make: Callable[..., Project]) -> None:
    project = make()

    text, counts = project.run(
        "-n2",
        test_x=TWO_MODELS,
        test_y="""
import os, pathlib, pytest, signal
@pytest.mark.vlm("org/c")
def test_before(vlm): pass
@pytest.mark.vlm("org/c")
def test_crash(vlm): os.kill(os.getpid(), signal.SIGKILL)
@pytest.mark.vlm("org/c")
def test_after(vlm): pass
""",
    )

    assert counts == {"passed": 16, "failed": 1}, text
    loads = [load for load in project.loads() if load["model"] == "org/c"]
    assert len(loads) == 2
    assert loads[0]["worker"] != loads[1]["worker"]
    assert loads[0]["sees"] == loads[1]["sees"]
    others = {load["sees"] for load in project.loads() if load["model"] != "org/c" and load["worker"] != loads[0]["worker"]}
    assert loads[0]["sees"] not in others - {
        load["sees"] for load in project.loads() if load["worker"] == loads[1]["worker"]
    }


@with_workers
@pytest.mark.parametrize("options", ["", "--vlm-gpus=auto"])
def test_under_another_scheduler_no_gpu_is_used_by_two_workers(make: Callable[..., Project], options: str) -> None:
    project = make(SHARED_PROJECT_LOAD_S="1")

    text, counts = project.run(
        "-n2", "--dist=loadfile", *options.split(), test_x=ONE_MODEL, test_y=ONE_MODEL.replace("org/a", "org/b")
    )

    assert counts == {"passed": 4}, text
    by_worker = {load["worker"]: load["gpus"] for load in project.loads()}
    assert len(by_worker) == len(set(by_worker.values()))
    assert "--dist=loadfile" in text


@with_workers
def test_a_worker_without_a_gpu_says_so_and_skips_nothing(make: Callable[..., Project]) -> None:
    files = {f"test_{name}": ONE_MODEL.replace("def test_a(vlm)", f"def test_{name}(vlm)") for name in "pqr"}

    text, counts = make().run("-n3", "--dist=loadfile", "--vlm-gpus=auto", **files)

    assert counts.get("skipped", 0) == 0
    assert counts["passed"] + counts["error"] == 6, text
    if counts["error"]:
        assert "VLM732: this test needs a GPU. This worker has 0 of the 2 that this run has leased" in text


def test_two_runs_take_a_gpu_each_and_a_third_is_told_who_has_them(make: Callable[..., Project]) -> None:
    first, second, third = make("first"), make("second"), make("third")
    one, two = first.start(test_x=SLOW), None
    try:
        until((first.folder / "started").exists)
        two = second.start("--vlm-gpus=1", test_x=SLOW)
        until((second.folder / "started").exists)
        text, counts = third.run("--vlm-gpus=1", test_x=ONE_MODEL)
        assert counts == {"passed": 1, "error": 1}, text
        assert f"GPU 0 (NVIDIA L4) is leased by pid {one.pid} (" in text
        assert f"GPU 1 (NVIDIA L4) is leased by pid {two.pid} (" in text
        assert "VLM730: 1 GPU is wanted, and other runs have leased those that may be used" in text
        assert "Traceback" not in text

        waiting = third.start("--vlm-gpus=1", "--vlm-wait=300", test_x=ONE_MODEL)
        before = read_until(waiting, "vlmgpu: waiting")
        (first.folder / "go").touch()
        text, counts = finish(waiting, before)
        assert counts == {"passed": 2}, text
    finally:
        for project in (first, second):
            (project.folder / "go").touch()
        assert finish(one)[1] == {"passed": 1}
        if two is not None:
            assert finish(two)[1] == {"passed": 1}
    assert [load["gpus"] for load in first.loads()] == ["0", "1", "0"]


def test_after_a_sigkill_the_next_run_starts_at_once(make: Callable[..., Project]) -> None:
    killed, after = make("killed"), make("after")
    run = killed.start("--vlm-gpus=2", test_x=SLOW)
    until((killed.folder / "started").exists)
    run.send_signal(signal.SIGKILL)
    run.communicate()

    text, counts = after.run("--vlm-gpus=2", test_x=ONE_MODEL)

    assert counts == {"passed": 2}, text


@with_workers
def test_after_a_sigkill_of_the_controller_its_workers_go_too(make: Callable[..., Project]) -> None:
    killed, after = make("killed"), make("after")
    run = killed.start("-n2", test_x=SLOW)
    until((killed.folder / "started").exists)
    holders = [int(path.suffix[1:]) for path in (killed.shared / "memory").iterdir()]
    run.send_signal(signal.SIGKILL)
    run.communicate()

    text, counts = after.run("--vlm-gpus=2", test_x=ONE_MODEL)

    assert counts == {"passed": 2}, text
    assert [pid for pid in holders if is_running(pid)] == []


@with_workers
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_worker_is_bound_to_its_controller_before_it_can_use_a_gpu(make: Callable[..., Project]) -> None:
    body = f"""
import ctypes, pytest
def fate():
    signal = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(signal), 0, 0, 0)  # PR_GET_PDEATHSIG
    return signal.value
WHILE_COLLECTING = fate()
@pytest.mark.vlm("org/a")
def test_a(vlm): assert WHILE_COLLECTING == fate() == {int(signal.SIGKILL)}
"""

    text, counts = make().run("-n2", "--vlm-gpus=auto", test_x=body)

    assert counts == {"passed": 1}, text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_worker_whose_controller_is_gone_already_ends_too() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from pytest_vlmgpu.workers.lifetime import end_with; end_with({gone.pid}); print('alive')",
        ],
        check=False,
        capture_output=True,
    )

    assert (run.returncode, run.stdout) == (-signal.SIGKILL, b"")


@with_workers
def test_positions_count_as_the_run_sees_them_in_every_worker(make: Callable[..., Project]) -> None:
    project = make(gpus=3)

    text, counts = project.run(
        "-n3", "--vlm-gpus=2,", "--dist=loadfile", test_x=ONE_MODEL, test_y=ONE_MODEL, test_z=ONE_MODEL
    )

    assert counts.get("skipped", 0) == 0, text
    assert "VLM720" not in text
    assert {load["gpus"] for load in project.loads()} <= {"2"}


TELLS = """
def pytest_vlmgpu_lease(config, event, gpus, reason):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    log(f"LEASE {worker} {event} {','.join(gpu[-1] for gpu in [uuid[:12] for uuid in gpus])} {reason[:6]}")
"""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], ["main taken 0 ", "main given_back 0 "]),
        (["--vlm-gpus=2"], ["main taken 0,1 ", "main given_back 0,1 "]),
        pytest.param(
            ["-n2", "--vlm-gpus=auto"], ["main taken 0,1 ", "main given_back 1 ", "main given_back 0 "], marks=with_workers
        ),
        (["--vlm-gpus=none"], []),
        (["--vlm-lease-dir=/proc/x"], ["main refused  VLM731"]),
    ],
)
def test_a_hook_is_told_about_leases(make: Callable[..., Project], options: list[str], told: list[str]) -> None:
    project = make()
    project.conftest = TELLS

    project.run(*options, test_x=ONE_MODEL)

    log = (project.shared / "log.txt").read_text().splitlines()
    assert [line.removeprefix("LEASE ") for line in log if line.startswith("LEASE")] == told


def test_slices_of_one_gpu_are_leased_one_by_one(make: Callable[..., Project]) -> None:
    slices = ("MIG-aaaaaaaa-0000-0000-0000-000000000000", "MIG-bbbbbbbb-0000-0000-0000-000000000000")
    visible = (*slices, slices[0])
    first, second, third = (
        make(name, gpus=1, CUDA_VISIBLE_DEVICES=uuid) for name, uuid in zip("pqr", visible, strict=True)
    )
    machine = from_json((first.shared / "machine.json").read_bytes(), m.Machine, where="machine.json")
    devices = tuple(m.MigDevice(uuid=uuid, memory_total_bytes=10 * GIB, memory_free_bytes=10 * GIB) for uuid in slices)
    gpu = replace(machine.gpus[0], mig_enabled=True, mig_devices=devices)
    (first.shared / "machine.json").write_text(to_json(replace(machine, gpus=(gpu,))))

    holder = first.start(test_x=SLOW)
    try:
        until((first.folder / "started").exists)
        beside, counts = second.run(test_x=ONE_MODEL)
        assert counts == {"passed": 2}, beside
        same, counts = third.run(test_x=ONE_MODEL)
        assert counts == {"passed": 1, "error": 1}, same
        assert "VLM730: 1 GPU is wanted, and other runs have leased those that may be used: GPU 0 (slice of NVI" in same, (
            same
        )
        assert f"by pid {holder.pid} (" in same, same
    finally:
        (first.folder / "go").touch()
        finish(holder)
    assert [load["sees"] for load in first.loads()] == list(slices)


@with_workers
def test_without_a_file_between_them_workers_lease_for_themselves_and_say_so(make: Callable[..., Project]) -> None:
    project = make(SHARED_PROJECT_LOAD_S="1")
    plugin = """
import pytest
@pytest.hookimpl(trylast=True, optionalhook=True)
def pytest_configure_node(node): node.workerinput["vlmgpu"]["folder"] = "/proc/full"
"""

    text, counts = project.run(
        "-n2", "-p", "break_it", break_it=plugin, test_x=ONE_MODEL, test_y=ONE_MODEL.replace("org/a", "org/b")
    )

    assert counts["passed"] + counts.get("error", 0) == 4, text
    assert "vlmgpu: /proc/full cannot be written" in text
    by_worker = {load["worker"]: load["gpus"] for load in project.loads()}
    assert len(by_worker) == len(set(by_worker.values())), "a GPU has two masters"


@with_workers
def test_rounds_of_sigkill_at_random_moments(make: Callable[..., Project]) -> None:
    project = make()
    program = Path(__file__).parents[2] / "benchmarks" / "kill_rounds.py"

    run = subprocess.run(
        [sys.executable, str(program), "--fake", "--rounds", "3", "--seed", "5"],
        env={**os.environ, **project.environment},
        text=True,
        capture_output=True,
        check=False,
        timeout=10 * LIMIT_S,
    )

    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("options", [[], pytest.param(["-n2"], marks=with_workers)])
def test_a_folder_for_leases_that_cannot_be_used_is_an_error_of_gpu_tests_alone(
    make: Callable[..., Project], options: list[str]
) -> None:
    project = make(PYTEST_VLMGPU_LEASE_DIR="/proc/nowhere")

    text, counts = project.run(*options, test_x=ONE_MODEL)

    assert counts == {"passed": 1, "error": 1}, text
    assert "VLM731: The folder for leases /proc/nowhere cannot be made or read" in text
    assert "Traceback" not in text
    assert project.loads() == []


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        ("run", "GPUs are shared out among the processes of this run and not leased: other runs may use them too"),
        ("off", "GPUs are not leased: whatever else runs may use them too"),
    ],
)
def test_leases_that_do_not_hold_for_the_machine_are_said_and_need_no_folder(
    make: Callable[..., Project], scope: str, said: str
) -> None:
    project = make(PYTEST_VLMGPU_LEASE_DIR="/proc/nowhere")

    text, counts = project.run(f"--vlm-lease={scope}", test_x=ONE_MODEL)

    assert counts == {"passed": 2}
    assert f"vlmgpu: --vlm-lease={scope}; {said}" in text
    assert f"\n{said}\n" in text.partition("= vlmgpu =")[2], text


@with_workers
@pytest.mark.parametrize("dist", ["load", "loadfile"])
def test_with_leases_of_the_run_its_workers_have_gpus_of_their_own(make: Callable[..., Project], dist: str) -> None:
    project = make(PYTEST_VLMGPU_LEASE_DIR="/proc/nowhere", SHARED_PROJECT_LOAD_S="1")

    text, counts = project.run(
        "-n2", f"--dist={dist}", "--vlm-lease=run", test_x=ONE_MODEL, test_y=ONE_MODEL.replace("org/a", "org/b")
    )

    assert counts == {"passed": 4}, text
    assert sorted((load["gpus"], load["sees"]) for load in project.loads()) == [("0", UUIDS[0]), ("1", UUIDS[1])]


@with_workers
def test_without_leases_workers_see_every_gpu_and_a_model_is_loaded_once(make: Callable[..., Project]) -> None:
    project = make(PYTEST_VLMGPU_LEASE_DIR="/proc/nowhere")

    text, counts = project.run("-n2", "--vlm-gpus=auto", "--vlm-lease=off", test_x=TWO_MODELS)

    assert counts == {"passed": 14}, text
    assert project.models() == ["org/a", "org/b"]
    assert {load["sees"] for load in project.loads()} == {"all"}
    assert len({load["worker"] for load in project.loads()}) == 2


def test_another_run_is_not_kept_off_by_leases_of_the_run(make: Callable[..., Project]) -> None:
    first, second = make("first", gpus=1), make("second", gpus=1)
    holder = first.start("--vlm-lease=run", test_x=SLOW)
    try:
        until((first.folder / "started").exists)
        text, counts = second.run(test_x=ONE_MODEL)
    finally:
        (first.folder / "go").touch()
        finish(holder)

    assert counts == {"passed": 2}, text


@pytest.mark.parametrize("options", [["-k", "free"], pytest.param(["-n2", "-k", "free"], marks=with_workers)])
def test_without_gated_tests_nothing_is_leased(make: Callable[..., Project], options: list[str]) -> None:
    project = make()

    _, counts = project.run(*options, test_x=ONE_MODEL)

    assert counts["passed"] == 1
    assert not (project.shared / "leases").exists()


def test_taken_memory_is_waited_for_and_its_holder_named(make: Callable[..., Project]) -> None:
    project = make(gpus=1)
    ballast = project.hold(0, 20, os.getpid())

    text, counts = project.run(test_x=ONE_MODEL)
    assert counts == {"passed": 1, "error": 1}, text
    assert f"VLM711: org/a needs 4 GiB. GPU 0 (NVIDIA L4) has 2.0 GiB of 22.0 GiB free, held by pid {os.getpid()}" in text

    run = project.start("--vlm-wait=300", test_x=ONE_MODEL)
    before = read_until(run, "vlmgpu: waiting")
    ballast.unlink()
    text, counts = finish(run, before)
    assert counts == {"passed": 2}, text
    assert re.search(rf"vlmgpu: waiting \d+ of 300 s: .*pid {os.getpid()}", text)


def test_a_gpu_that_is_taken_in_mid_run_is_busy_and_not_skipped(make: Callable[..., Project]) -> None:
    project = make(gpus=1)
    body = f"""
import pathlib, pytest
@pytest.mark.vlm("org/a")
def test_a(vlm): pathlib.Path({str(project.shared / "memory" / f"{UUIDS[0]}.{os.getpid()}")!r}).write_text(str(20 * 2**30))
@pytest.mark.vlm("org/b")
def test_b(vlm): pass
"""

    text, counts = project.run("-rs", test_x=body)

    assert counts == {"passed": 1, "error": 1}, text
    assert "VLM711: org/b needs 5 GiB." in text


def test_models_that_fit_together_stay_and_the_one_nobody_needs_goes(make: Callable[..., Project]) -> None:
    project = make(gpus=1)
    body = "import pytest\n" + "\n".join(
        f"@pytest.mark.vlm('org/{name}')\ndef test_{number}(vlm): pass" for number, name in enumerate("abca")
    )

    _, counts = project.run("--vlm-slots=fit", test_x=body)
    assert counts == {"passed": 4}
    log = [line.split(" gpus")[0] for line in (project.shared / "log.txt").read_text().splitlines()]
    assert log == ["LOAD org/a", "LOAD org/b", "LOAD org/c", "UNLOAD org/c", "UNLOAD org/b", "UNLOAD org/a"]

    (project.shared / "log.txt").unlink()
    project.hold(0, 12.5, os.getpid())
    text, counts = project.run("--vlm-slots=fit", test_x=body)
    assert counts == {"passed": 4}, text
    log = [line.split(" gpus")[0] for line in (project.shared / "log.txt").read_text().splitlines()]
    assert log == ["LOAD org/a", "LOAD org/b", "UNLOAD org/a", "UNLOAD org/b", "LOAD org/c", "UNLOAD org/c"] or log == [
        "LOAD org/a",
        "LOAD org/b",
        "UNLOAD org/a",
        "LOAD org/c",
        "UNLOAD org/c",
        "UNLOAD org/b",
    ]


def test_memory_that_does_not_come_back_is_reported(make: Callable[..., Project]) -> None:
    project = make(gpus=1)
    body = ONE_MODEL.replace("org/a", "org/sticky") + ONE_MODEL.replace("test_a", "test_next").replace(
        "test_free", "test_other"
    )

    text, counts = project.run(test_x=body)

    assert counts == {"passed": 4}, text
    assert re.search(r"org/sticky: loaded .*; 7.0 GiB of GPU memory did not come back after it was unloaded; 1 test", text)


def test_a_gpu_that_is_lost_between_collection_and_setup_is_an_error(make: Callable[..., Project]) -> None:
    project = make(gpus=2)
    machine = m.Machine(
        origin="live",
        description="2 GPUs",
        driver=m.Driver(nvml_state="ok"),
        gpus=(m.Gpu(index=0, name="NVIDIA L4", uuid=UUIDS[0], error="GPU is lost"),),
    )
    body = f"""
import pathlib, pytest
@pytest.mark.vlm("org/a")
def test_a(vlm): pathlib.Path({str(project.shared / "machine.json")!r}).write_text({to_json(machine)!r})
@pytest.mark.vlm("org/b")
def test_b(vlm): pass
"""

    text, counts = project.run("-rs", test_x=body)

    assert counts == {"passed": 1, "error": 1}, text
    assert "VLM712" in text


@pytest.mark.parametrize(
    ("options", "device"), [(["--vlm-gpus=1,"], "cuda:0"), (["--vlm-gpus=1,", "--vlm-lease=off"], "cuda:1")]
)
def test_the_first_device_is_named_as_cuda_counts_in_this_process(
    make: Callable[..., Project], options: list[str], device: str
) -> None:
    project = make(gpus=2)

    text, counts = project.run(
        *options, test_x=f"def test_x(vlm_device, vlm_gpus): assert (vlm_device, vlm_gpus[0].index) == ({device!r}, 1)"
    )

    assert counts == {"passed": 1}, text
