"""A package that is broken is told from a defect of the doctor, whichever package it is."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_doctor import __version__
from vlm_doctor.own_failure import own_failure

BROKEN = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "is of another Python": ("def (", "SyntaxError: invalid syntax (__init__.py, line 1)"),
    "is empty": ("", "has no attribute|No module named"),
    "lacks a part": ("import missing_part_of_it", "ModuleNotFoundError: No module named 'missing_part_of_it'"),
}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "vlm_doctor", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder)},
        check=False,
    )


@pytest.mark.parametrize("package", ["msgspec", "rich"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_package_is_named_with_its_repair(tmp_path: Path, package: str, how: str) -> None:
    code, reason = BROKEN[how]
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(code)

    text = run(tmp_path, "--machine", "2xL4")

    assert (text.returncode, text.stderr.count("\n")) == (3, 1), text.stderr
    assert text.stderr.startswith(f"vlm-doctor: The Python package {package} is broken (")
    assert any(part in text.stderr for part in reason.split("|"))
    repair = f"run {shlex.quote(sys.executable)} -m pip install --force-reinstall {package}."
    assert text.stderr.rstrip("\n").endswith(repair)


def test_json_is_json_even_where_what_writes_it_is_broken(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise RuntimeError('\x1bé\\n')", encoding="utf-8")

    ran = run(tmp_path, "--machine", "2xL4", "--json")

    assert (ran.returncode, ran.stderr) == (3, "")
    told = json.loads(ran.stdout)
    assert (told["exit_status"], told["error"]["type"]) == (3, "BrokenPackageError")
    assert told["error"]["message"].startswith("The Python package msgspec is broken (RuntimeError: ")
    assert "\x1b" not in told["error"]["message"]


def raised(code: str) -> Exception:
    try:
        # No name of a file: what measures coverage would look for the source.
        exec(compile(code, "<made up>", "exec"), {"__name__": "vlm_doctor.made_up"})
    except (KeyError, ValueError, AttributeError, ImportError, SyntaxError) as error:
        return error
    raise AssertionError(code)


@pytest.mark.parametrize(
    "code",
    [
        "def f(): {}['x']\nf()",
        "import json\njson.loads('{')",
        "(5).x",
        "import vlm_doctor\nvlm_doctor.nothing",
        "raise ImportError('who knows')",
        "compile('(', '', 'exec')",
    ],
)
def test_what_no_package_did_is_a_defect(code: str) -> None:
    kind, sentence = own_failure(raised(code))
    assert kind == "InternalError"
    assert sentence.startswith(f"This is a defect of vlm-doctor {__version__}, please report it: ")
    assert sentence.endswith(").")


def test_the_name_that_pip_knows_is_given() -> None:
    sentence = own_failure(raised("raise ImportError('x', name='markdown_it.token')")).sentence
    assert "The Python package markdown_it is broken (ImportError: x)" in sentence
    assert sentence.endswith("--force-reinstall markdown-it-py.")


def test_a_file_that_is_no_python_is_told_by_its_package(tmp_path: Path) -> None:
    """pip would install whatever somebody published under the name of a part."""
    inner = tmp_path / "whole" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").touch()
    for file, package in ((inner / "part.py", "whole"), (inner / "__init__.py", "whole"), (tmp_path / "alone.py", "alone")):
        sentence = own_failure(raised(f"compile('(', {str(file)!r}, 'exec')")).sentence
        assert f"package {package} is broken" in sentence
        assert sentence.endswith(f"--force-reinstall {package}.")


def test_a_file_of_ours_that_is_no_python_is_a_defect() -> None:
    ours = Path(own_failure.__code__.co_filename).with_name("cli.py")
    assert own_failure(raised(f"compile('(', {str(ours)!r}, 'exec')")).kind == "InternalError"
