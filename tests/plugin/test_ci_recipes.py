"""The recipes of examples/ci: their commands run, pass on the machine that they are for, and fail on a lesser one."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

FOLDER = Path(__file__).parents[2] / "examples" / "ci"
GPU_TEST = "import pytest\n@pytest.mark.vlm_requires(gpus=2, vram_gib=20)\ndef test_two(): pass\n"


def steps_of_github() -> list[str]:
    jobs = yaml.safe_load((FOLDER / "github-actions.yml").read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def steps_of_gitlab() -> list[str]:
    jobs = yaml.safe_load((FOLDER / "gitlab-ci.yml").read_text())
    return [line for job in jobs.values() if isinstance(job, dict) for line in job["script"]]


def steps_of_jenkins() -> list[str]:
    return [line.replace(".venv/bin/", "") for line in re.findall(r"sh '(.*)'", (FOLDER / "Jenkinsfile").read_text())]


def steps_of_slurm() -> list[str]:
    return [(FOLDER / "slurm.sbatch").read_text()]


def steps_of_tox() -> list[str]:
    recipe = configparser.ConfigParser()
    recipe.read(FOLDER / "tox.ini")
    return [recipe[name]["commands"].replace("{posargs}", "") for name in ("testenv", "testenv:gpu")]


RECIPES = {
    "github": steps_of_github,
    "gitlab": steps_of_gitlab,
    "jenkins": steps_of_jenkins,
    "slurm": steps_of_slurm,
    "tox": steps_of_tox,
}


def run(step: str, folder: Path, gpus: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("VLMGPU_", "PYTEST_", "SLURM_"))
    }
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTEST_ADDOPTS": f"--vlm-fake-gpus={gpus} -p no:cacheprovider -p no:hypothesispytest",
        "VLMGPU_TESTING": "1",
    }
    return subprocess.run(
        ["bash", "-c", step], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_a_recipe_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(GPU_TEST)
    steps = [step for step in RECIPES[name]() if "pytest tests" in step]
    strict = [step for step in steps if "--vlm-strict" in step]
    assert strict

    for step in steps:
        good = run(step, tmp_path, "2xL4")
        assert good.returncode == 0, good.stdout + good.stderr
    for step in strict:
        lost_one = run(step, tmp_path, "L4")
        assert lost_one.returncode == 69, lost_one.stdout + lost_one.stderr


@pytest.mark.parametrize(
    "source",
    [
        GPU_TEST.replace("pass", "assert False"),
        GPU_TEST.replace("pass", "pass\n@pytest.mark.vlm_requires(gpus=3)\ndef test_three(): pass"),
        "import pytest\npytest.skip('gone', allow_module_level=True)",
    ],
    ids=["fails", "skips", "vanishes"],
)
def test_a_gpu_job_is_not_green_without_having_tested(source: str, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(source)
    (step,) = [step for step in steps_of_github() if "--vlm-strict" in step]

    assert run(step, tmp_path, "2xL4").returncode == 1


def test_the_files_that_a_recipe_keeps_are_written(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(GPU_TEST)

    for name in ("github", "gitlab", "jenkins"):
        kept = re.findall(r"(?:gpu-report\.json|junit\.xml)", "".join(RECIPES[name]()))
        for step in RECIPES[name]():
            if "--vlm-strict" in step:
                run(step, tmp_path, "2xL4")
        for file in set(kept):
            assert (tmp_path / file).stat().st_size > 0
            (tmp_path / file).unlink()


@pytest.mark.parametrize(("machine", "status", "written"), [("2xL4", 0, "true"), ("L4", 1, "false")])
def test_the_gate_of_the_github_recipe(machine: str, status: int, written: str, tmp_path: Path) -> None:
    (step,) = [step for step in steps_of_github() if step.startswith("vlm-doctor gate")]
    command = [sys.executable, "-m", "vlm_doctor", *step.split()[1:], "--machine", machine]
    output = tmp_path / "output.txt"

    if subprocess.run([*command[:3], "gate", "--help"], capture_output=True, check=False).returncode:
        pytest.skip("this version of vlm-doctor has no command gate")
    done: Any = subprocess.run(
        command, env={**os.environ, "GITHUB_OUTPUT": str(output)}, capture_output=True, text=True, check=False
    )

    assert done.returncode == status, done.stderr
    outputs = dict(re.findall(r"^(\S+)<<(?:\S+)\n(.*)$", output.read_text(), flags=re.MULTILINE))
    assert outputs["run-gpu-tests"] == written
    jobs = yaml.safe_load((FOLDER / "github-actions.yml").read_text())["jobs"]
    assert set(jobs["gate"]["outputs"]) <= set(outputs)
