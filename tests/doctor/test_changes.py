"""What changed since it last worked: every fact that breaks things, and nothing when nothing did."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from vlm_doctor import codec
from vlm_doctor.answer import check_report
from vlm_doctor.answers import Change, Changes
from vlm_doctor.changes import Saved, compare, with_changes
from vlm_doctor.errors import UsageError
from vlm_doctor.formats import render
from vlm_doctor.formats.look import Look
from vlm_doctor.formats.to_terminal import head, tail
from vlm_doctor.machine import Fabric, Link, Machine, Package, TorchBuild
from vlm_doctor.redaction import redact
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.saved_report import read_saved
from vlm_doctor.units import GIB

MACHINES = Path(__file__).parents[1] / "machines"
NAMES = sorted(path.stem for path in MACHINES.glob("*.json"))


def machine(name: str = "2xl4-idle") -> Machine:
    return load_machine(str(MACHINES / f"{name}.json"))


def saved(one: Machine) -> Saved:
    report = check_report(one)
    return Saved("good.json", one, report.diagnosis, report.exit_status)


def texts(before: Machine, after: Machine) -> list[str]:
    return [change.text for change in compare(saved(before), check_report(after)).changes]


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_has_not_changed_since_itself(name: str) -> None:
    assert texts(machine(name), machine(name)) == []


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_what_is_new_one_way_is_gone_the_other_way(first: str, second: str) -> None:
    there = compare(saved(machine(first)), check_report(machine(second))).changes
    back = compare(saved(machine(second)), check_report(machine(first))).changes

    assert len(there) == len(back)
    assert sum(change.before is None for change in there) == sum(change.after is None for change in back)


def changed(**fields: Any) -> list[str]:
    before = machine()
    return texts(before, replace(before, **fields))


def test_driver_libraries_environment_and_host() -> None:
    one = machine()
    assert one.libraries is not None
    assert one.host is not None
    build = TorchBuild(version="2.13.0+cpu")
    packages = (*one.libraries.packages[1:], Package(name="xformers", version="0.0.35"))

    assert changed(driver=replace(one.driver, driver_version="590.48.01")) == ["driver: 580.95.05 → 590.48.01"]
    libraries = texts(one, replace(one, libraries=replace(one.libraries, packages=packages)))
    assert "xformers: 0.0.35 (new)" in libraries
    gone = one.libraries.packages[0]
    assert f"{gone.name}: {gone.version} (gone)" in libraries
    assert "CUDA of torch: 13.0 → none" in changed(libraries=replace(one.libraries, torch_build=build))
    assert changed(environment={"NCCL_P2P_DISABLE": "1", "OMP_NUM_THREADS": "x" * 500}) == [
        "NCCL_P2P_DISABLE: 1 (new)",
        f"OMP_NUM_THREADS: {'x' * 120}... (new)",
    ]
    assert changed(host=replace(one.host, shm_total_bytes=8 * GIB)) == ["/dev/shm: 125.0 GiB → 8.0 GiB"]
    assert changed(host=None) == []
    assert changed(libraries=None) == []


def test_an_empty_variable_is_shown() -> None:
    assert changed(environment={"CUDA_VISIBLE_DEVICES": ""})[-1] == "CUDA_VISIBLE_DEVICES: '' (new)"


def test_gpus_that_went_or_came_and_their_facts() -> None:
    one = machine("2xh200-nvswitch")
    lost = replace(one, gpus=one.gpus[:1], links=())
    other = replace(one.gpus[1], fabric=Fabric(state="not_started"), nvlinks=one.gpus[1].nvlinks[1:], error="GPU is lost")

    assert f"GPU 1 (NVIDIA H200): {one.gpus[1].uuid} (gone)" in texts(one, lost)
    assert f"GPU 1 (NVIDIA H200): {one.gpus[1].uuid} (new)" in texts(lost, one)
    found = texts(one, replace(one, gpus=(one.gpus[0], other)))
    assert "GPU 1 (NVIDIA H200) active NVLinks: 18 → 17" in found
    assert "GPU 1 (NVIDIA H200) error: GPU is lost (new)" in found
    assert "GPU 1 (NVIDIA H200) fabric: completed → not_started" in found


def test_links_are_compared_by_the_gpus_they_join() -> None:
    one = machine("2xl4-idle")
    swapped = replace(
        one, gpus=tuple(replace(gpu, index=1 - gpu.index) for gpu in one.gpus), links=(Link(a=0, b=1, nvlinks=4),)
    )

    assert "GPU 0 to GPU 1: PHB → NV4" in texts(one, swapped)
    refused = replace(one, links=(replace(one.links[0], p2p_read="chipset_not_supported"),))
    assert texts(one, refused) == ["GPU 0 to GPU 1: PHB → PHB, peer access chipset_not_supported"]


def test_free_memory_counts_from_a_gigabyte_on() -> None:
    one = machine("2xl4-idle")

    def with_free(size: int) -> Machine:
        return replace(one, gpus=(replace(one.gpus[0], memory_free_bytes=size), one.gpus[1]))

    assert texts(with_free(20 * GIB), with_free(21 * GIB - 1)) == []
    assert texts(with_free(20 * GIB), with_free(21 * GIB)) == ["GPU 0 (NVIDIA L4) free memory: 20.0 GiB → 21.0 GiB"]


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file; write one with vlm-doctor --save FILE"):
        read_saved(tmp_path / "pipe")


def test_a_redacted_file_is_matched_by_place_and_name() -> None:
    one = machine()

    assert texts(redact(one), one) == []


def test_what_was_found_comes_first() -> None:
    changes = compare(saved(machine()), check_report(machine("cpu-torch"))).changes

    assert (changes[0].subject, changes[0].after) == ("torch without CUDA (VLM303)", "error")


def test_findings_are_compared_only_with_findings() -> None:
    bare = Saved("machine.json", machine())

    assert {change.kind for change in compare(bare, check_report(machine("cpu-torch"))).changes} == {"library"}


def test_a_demoted_finding_has_not_gone() -> None:
    one = machine("cpu-torch")

    assert compare(saved(one), check_report(one, ignore=("VLM303",))).changes == ()


def test_without_a_file_nothing_is_compared() -> None:
    report = check_report(machine())

    assert with_changes(report, None) is report
    assert with_changes(report, saved(machine())).changes is not None


def test_the_page_begins_with_what_changed() -> None:
    report = with_changes(check_report(machine("cpu-torch")), saved(machine()))

    lines = render(report, "terminal").splitlines()

    assert lines[2] == "Changed since 2026-11-22T12:00:00Z, when it was usable"
    assert lines[3] == "  - torch without CUDA (VLM303): error (new)"


def test_the_second_part_of_a_page_says_only_what_is_new() -> None:
    first = with_changes(check_report(machine()), saved(machine()))
    final = with_changes(check_report(machine("cpu-torch")), saved(machine()))
    both = with_changes(check_report(machine("cpu-torch")), saved(machine("2xa10-half-taken")))

    assert "Nothing has changed since" in head(first, Look())
    assert "torch without CUDA (VLM303): error (new)" in tail(final, Look(), earlier=first)
    assert "Changed since" not in tail(both, Look(), earlier=both)


def test_many_changes_are_listed_with_verbose() -> None:
    changes = tuple(Change(kind="library", subject=f"p{number}", before="1", after="2") for number in range(30))
    report = replace(check_report(machine()), changes=Changes(where="a.json", changes=changes, saved_exit_status=1))

    short, long = render(report, "terminal"), render(report, "terminal", verbose=True)

    assert "Changed since a.json, when it was not usable either" in short
    assert "and 10 more (--verbose lists them)" in short
    assert "p29: 1 → 2" in long


# --- the file ---


def test_a_saved_report_and_a_snapshot_are_read(tmp_path: Path) -> None:
    report = check_report(machine("cpu-torch"))
    (tmp_path / "report.json").write_text(codec.to_json(report), "utf-8")
    (tmp_path / "machine.json").write_text(codec.to_json(machine("cpu-torch")), "utf-8")

    whole, bare = read_saved(tmp_path / "report.json"), read_saved(tmp_path / "machine.json")

    assert (whole.machine, whole.diagnosis, whole.exit_status) == (report.machine, report.diagnosis, 1)
    assert (bare.machine, bare.diagnosis, bare.exit_status) == (report.machine, None, None)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "not a report of vlm-doctor; write one with vlm-doctor --save FILE."),
        (b"[]", "not a report of vlm-doctor"),
        (b'{"machine": 3}', "not a report of vlm-doctor"),
        (b'{"error": {}}', "not a report of vlm-doctor"),
        (b"\xff", "not a report of vlm-doctor"),
    ],
)
def test_a_file_that_is_neither_is_one_sentence(tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / "x.json").write_bytes(data)

    with pytest.raises(UsageError, match=sentence):
        read_saved(tmp_path / "x.json")


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no such file; write one with vlm-doctor --save FILE\."):
        read_saved(tmp_path / "x.json")
    with pytest.raises(UsageError, match=r"is a folder; name a report of vlm-doctor in it\."):
        read_saved(tmp_path)
    monkeypatch.setattr("vlm_doctor.sources.saved_report.MAX_SNAPSHOT_BYTES", 4)
    (tmp_path / "x.json").write_bytes(b"123456789")
    with pytest.raises(UsageError, match=r"has more than 8 bytes, which is too large for a report of vlm-doctor; write"):
        read_saved(tmp_path / "x.json")
