"""Every command that a finding gives: a stuck user can paste it as it is, here or where it says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.checks import diagnose
from vlm_doctor.checks._check import Facts
from vlm_doctor.checks._remedy import largest_last, pip, python, shell_path, start_anew, without_folders
from vlm_doctor.findings import Finding, Fix
from vlm_doctor.machine import Host, Libraries, Machine

from .asking import Load

MACHINES = Path(__file__).parents[2] / "machines"
NAMES = sorted(path.stem for path in MACHINES.glob("*.json"))
PLACEHOLDERS = re.compile(r"\b(IMAGE|NAME|POD|USER|GROUP|PACKAGE)\b|/path/with/room")
"""Words that only the user can replace."""
OF_THE_HOST = re.compile(r"\b(sudo|docker|podman|kubectl|apptainer|systemctl|dmesg|modprobe|reboot|poweroff)\b")
"""What a container does not have, or must not do."""
HOSTILE = "/opt/an env; touch x/$(x)/bin/python"


def variants(machine: Machine) -> Iterator[Machine]:
    """The same machine in each kind of container, on other systems, and with other Pythons."""
    yield machine
    if isinstance(machine.host, Host):
        for kind in ("docker", "podman", "kubernetes", "apptainer", "lxc"):
            yield replace(machine, host=replace(machine.host, container=kind))
        for name in ("Fedora Linux 42", "Arch Linux"):
            yield replace(machine, host=replace(machine.host, os=name))
    if isinstance(machine.libraries, Libraries):
        for changes in (
            {"is_virtual_environment": True, "executable": HOSTILE},
            {"is_virtual_environment": True, "executable": HOSTILE, "has_pip": False},
            {"is_virtual_environment": False, "executable": "/usr/bin/python3", "is_externally_managed": True},
        ):
            yield replace(machine, libraries=replace(machine.libraries, **changes))


@pytest.fixture(scope="module")
def findings(load: Load) -> list[tuple[str, Machine, Finding]]:
    told = []
    for name in NAMES:
        for machine in variants(load(name)):
            told += [(name, machine, finding) for finding in diagnose(machine).findings]
    return told


Findings = list[tuple[str, Machine, Finding]]


def fixes(findings: Findings) -> Iterator[tuple[str, Machine, Finding, Fix]]:
    for name, machine, finding in findings:
        if finding.fix is not None:
            yield f"{name} {finding.code}", machine, finding, finding.fix


def test_every_command_is_one_that_a_shell_reads(findings: Findings) -> None:
    commands = {command for *_, fix in fixes(findings) for command in fix.commands}
    assert len(commands) > 100
    assert all("\n" not in command and command.isprintable() for command in commands)

    bash = shutil.which("bash")
    assert bash is not None
    read = subprocess.run([bash, "-n"], input="\n".join(sorted(commands)), capture_output=True, text=True, check=False)

    assert (read.returncode, read.stderr) == (0, "")


def test_what_stands_for_something_else_is_explained(findings: Findings) -> None:
    for where, _, _, fix in fixes(findings):
        for command in fix.commands:
            for word in PLACEHOLDERS.findall(command):
                assert (word or "/path/with/room") in fix.text, (where, fix)


def test_commands_of_the_host_are_not_shown_as_if_they_belonged_into_the_container(findings: Findings) -> None:
    for where, machine, _, fix in fixes(findings):
        if machine.host is not None and machine.host.container is not None:
            assert fix.place == "host" or not any(map(OF_THE_HOST.search, fix.commands)), (where, fix)
        else:
            assert fix.place == "here", (where, fix)


def test_no_command_undoes_another(findings: Findings) -> None:
    for where, machine, _, _ in fixes(findings):
        told = [f.fix for f in diagnose(machine).findings if f.fix is not None and f.severity != "info"]
        done: dict[str, str] = {}
        for command in dict.fromkeys(command for fix in told for command in fix.commands):
            verb, _, rest = command.partition(" ")
            if verb in ("export", "unset"):
                name = rest.partition("=")[0]
                assert done.setdefault(name, command) == command, (where, command)


def test_a_command_for_another_distribution_is_not_given(findings: Findings) -> None:
    for where, machine, _, fix in fixes(findings):
        system = machine.host.os if machine.host is not None else ""
        text = " ".join(fix.commands)
        if system.startswith("Fedora"):
            assert not re.search(r"\b(apt|dpkg|update-initramfs|update-grub)\b", text), (where, fix)
        if system.startswith("Ubuntu"):
            assert not re.search(r"\b(dnf|rpm|dracut|grubby)\b", text), (where, fix)


def test_a_command_that_cannot_be_shown_as_it_is_is_not_given(load: Load) -> None:
    machine = load("pynvml-shadowed")
    assert machine.libraries is not None
    odd = replace(machine, libraries=replace(machine.libraries, pynvml_owners=("nvidia-ml-py", "py\u202envml")))

    (finding,) = (finding for finding in diagnose(odd).findings if finding.code == "VLM310")

    assert finding.fix is not None
    assert finding.fix.commands == ("python -m pip install --force-reinstall nvidia-ml-py",)


def facts(load: Load, environment: dict[str, str] | None = None, **changes: Any) -> Facts:
    machine = load("2xl4-idle")
    assert machine.libraries is not None
    return Facts.of(
        replace(machine, environment=environment or {}, libraries=replace(machine.libraries, **changes)),
    )


@pytest.mark.parametrize(
    ("environment", "changes", "expected"),
    [
        ({}, {}, "python"),
        ({}, {"is_virtual_environment": False}, "/usr/bin/python3"),
        ({}, {"is_virtual_environment": True, "executable": "~/my env/bin/python"}, "~/'my env/bin/python'"),
        (
            {"VIRTUAL_ENV": "~/env/"},
            {"is_virtual_environment": True, "executable": "~/env/bin/python"},
            "python",
        ),
        (
            {"VIRTUAL_ENV": "~/env"},
            {"is_virtual_environment": True, "executable": "~/env2/bin/python"},
            "~/env2/bin/python",
        ),
        ({}, {"is_virtual_environment": False, "executable": ""}, "python"),
    ],
)
def test_the_python_that_was_examined(
    environment: dict[str, str], changes: dict[str, Any], expected: str, load: Load
) -> None:
    assert python(facts(load, environment, **changes)) == expected


def test_pip_or_what_stands_in_for_it(load: Load) -> None:
    assert pip(facts(load), "install", "a<2", "b") == "python -m pip install 'a<2' b"
    assert pip(facts(load), "uninstall", "a") == "python -m pip uninstall -y a"
    of_uv = facts(load, has_pip=False, is_virtual_environment=True, executable="/x/bin/python")
    assert pip(of_uv, "uninstall", "a") == "uv pip uninstall --python /x/bin/python a"
    of_debian = facts(load, is_externally_managed=True, is_virtual_environment=False)
    assert pip(of_debian, "install", "a") == "/usr/bin/python3 -m pip install --break-system-packages a"


@pytest.mark.parametrize(
    ("path", "expected"),
    [("~", "~"), ("~/", "'~/'"), ("~/a b", "~/'a b'"), ("/a", "/a"), ("/a;b", "'/a;b'"), ("~root/x", "'~root/x'")],
)
def test_paths_in_commands(path: str, expected: str) -> None:
    assert shell_path(path) == expected
    assert shlex.split(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "unset LD_LIBRARY_PATH"),
        ("/usr/local/cuda/lib64/stubs", "unset LD_LIBRARY_PATH"),
        ("/usr/local/cuda/lib64/stubs/:/usr/local/nvidia/lib64", "export LD_LIBRARY_PATH=/usr/local/nvidia/lib64"),
        ("~/a:/x/stubs:/b c:", "export LD_LIBRARY_PATH=~/a:'/b c'"),
    ],
)
def test_only_what_is_wrong_is_taken_out_of_the_path(value: str, expected: str, load: Load) -> None:
    assert without_folders(facts(load, {"LD_LIBRARY_PATH": value}), ("/stubs/",)) == expected


def test_the_largest_stand_last(tmp_path: Path) -> None:
    for name, size in (("small", 10), ("large", 3_000_000)):
        (tmp_path / "a folder").mkdir(exist_ok=True)
        (tmp_path / "a folder" / name).write_bytes(b"x" * size)

    listed = subprocess.run(
        ["bash", "-c", largest_last(f"{tmp_path}/a folder")], capture_output=True, text=True, check=True
    )

    assert [line.rpartition("/")[2] for line in listed.stdout.splitlines()] == ["small", "large"]


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("docker", "docker run --gpus all --shm-size=8g IMAGE"),
        ("podman", "podman run --device nvidia.com/gpu=all --shm-size=8g IMAGE"),
        ("apptainer", "apptainer exec --nv IMAGE vlm-doctor"),
        ("kubernetes", "kubectl edit deployment NAME"),
    ],
)
def test_each_container_in_the_words_of_what_runs_it(kind: str, command: str, load: Load) -> None:
    host = load("2xl4-idle").host
    assert host is not None
    inside = Facts.of(load("2xl4-idle", host=replace(host, container=kind)))

    fix = start_anew(inside, "Start it anew.", "--shm-size=8g")

    assert fix.commands == (command,)
    assert fix.label == "Fix (on the host)"
    assert fix.request.startswith("On the host: Start it anew (")


def test_labels() -> None:
    say: Callable[..., Fix] = lambda **changes: Fix(text="Do.", **changes)  # noqa: E731 - one line says it

    assert say().label == "Fix"
    assert say(who="administrator").label == "Fix (administrator)"
    assert say(who="administrator", place="host").label == "Fix (administrator, on the host)"
    assert say(who="administrator", place="host").request == "Ask your administrator: On the host: Do."
