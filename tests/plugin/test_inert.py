"""A project that does not use the plugin pays nothing for it, and one that does imports nothing heavy to collect."""

from __future__ import annotations

import json
from typing import Any

import pytest

HEAVY = ("torch", "transformers", "accelerate", "pynvml", "psutil", "rich", "typer")
LATE = tuple(
    f"pytest_vlmgpu.{name}"
    for name in (
        *("collection", "gating", "leasing", "models", "results", "warm", "watching", "workers"),
        *("markers", "options", "requirements"),
    )
)
"""Parts of the plugin that are read when the first gated test or setting is met."""
CONFTEST = """
import json, sys
from pathlib import Path

def pytest_unconfigure(config):
    Path("modules.json").write_text(json.dumps(sorted(sys.modules)))
"""


def modules(pytester: pytest.Pytester, *arguments: str) -> set[str]:
    """Modules that a pytest run of its own has imported."""
    pytester.makeconftest(CONFTEST)
    # Other plugins of this environment are no concern here.
    pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:anyio", "-p", "no:xdist", *arguments)
    return set(json.loads((pytester.path / "modules.json").read_text()))


def test_a_run_without_gated_tests_imports_nothing_of_the_doctor(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_x(): pass")

    for arguments in (["--co"], []):
        found = modules(pytester, *arguments)
        assert found.isdisjoint({*HEAVY, "msgspec", *LATE})
        assert {name for name in found if name.partition(".")[0] == "vlm_doctor"} == set()
        assert "doctor" not in found


def test_no_module_is_compiled_anew_where_no_bytecode_may_be_written(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    pytester.makepyfile("def test_x(): pass")
    pytester.makeconftest(
        """
        import sys
        def pytest_unconfigure(config):
            loaders = {type(m.__loader__).__name__ for n, m in sys.modules.items() if n.startswith("pytest_vlmgpu.")}
            print("loaders:", *loaders)
        """
    )

    result = pytester.runpytest_subprocess("-s")

    result.stdout.fnmatch_lines(["loaders: SourceFileLoader"])


def test_collecting_gated_tests_imports_no_torch_and_asks_no_machine(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.vlm("org/a", dtype="float16")
        @pytest.mark.vlm_requires(gpus=2, vram_gib="20GB")
        def test_x(vlm, vlm_gpus): pass
        """
    )

    found = modules(pytester, "--co", "--vlm-gpus=auto")

    assert found.isdisjoint({*HEAVY, "msgspec", "vlm_doctor.machine"})


def test_the_plugin_can_be_switched_off(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_x(): pass")

    found = modules(pytester, "-p", "no:vlmgpu")

    assert {name for name in found if name.startswith("pytest_vlmgpu.")} == set()


def test_no_file_and_no_output_without_gated_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_VLMGPU_GPUS", raising=False)
    pytester.makepyfile(test_x="def test_x(): pass")
    before = sorted(path.name for path in pytester.path.iterdir())

    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")

    assert sorted(path.name for path in pytester.path.iterdir() if path.name != "__pycache__") == before
    assert "vlmgpu:" not in result.stdout.str()


def test_a_project_with_a_package_named_doctor_is_not_disturbed(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(**{"doctor/__init__": "NAME = 'theirs'", "doctor/machine": "X = 1"})
    pytester.makeini("[pytest]\npythonpath = .")
    pytester.makepyfile(
        test_x="from doctor.machine import X\nimport doctor\ndef test_x(): assert (doctor.NAME, X) == ('theirs', 1)"
    )

    result: Any = pytester.runpytest_subprocess()

    result.assert_outcomes(passed=1)


def test_workers_of_a_project_that_does_not_use_the_plugin_cost_it_no_doctor(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    pytester.makepyfile("def test_x(): pass\ndef test_y(): pass")
    pytester.makeconftest(
        """
        import sys
        from pathlib import Path
        def pytest_unconfigure(config):
            name = getattr(config, "workerinput", {}).get("workerid", "controller")
            Path(f"{name}.txt").write_text(" ".join(sys.modules))
        """
    )

    pytester.runpytest_subprocess("-n2", "-p", "no:hypothesispytest", "-p", "no:anyio").assert_outcomes(passed=2)

    for name in ("controller", "gw0", "gw1"):
        found = set((pytester.path / f"{name}.txt").read_text().split())
        assert found.isdisjoint({"torch", "transformers", "pynvml", "msgspec", "vlm_doctor.machine", "ctypes.util"})
    assert not list(pytester.path.glob("**/needs-*"))
