"""Try the doctor, the planner and the plugin on two real GPUs, with a 10.3-billion-parameter VLM of random weights.

``python benchmarks/glm4v_two_h200.py --out FOLDER [--tiny] [--budget SECONDS] [STEP ...]``

The model is made here (GLM-4.1V's dimensions, tokenizer and processor of ``pytest_vlmgpu.testing``); cards of 24 GiB are
emulated by ``ballast.py``. Every step runs in a process of its own with a time limit, and a step that fails does not stop
the others. Needs two GPUs of 80 GiB or more, torch, transformers, accelerate, pytest, 25 GB of disk and ten minutes. With
``--tiny`` every step that can be tried without a GPU is, and the others say so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast import held

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STEPS = {"build": 120, "doctor": 70, "pytest": 150, "busy": 60, "accuracy": 90, "even": 120, "uneven": 160}
"""Step to its time limit in seconds: see the functions of the same names."""
EVEN, UNEVEN, FULL = ("23.5", "23.5"), ("12", "23.5"), ("4", "4")
"""GiB left free on each GPU."""


class Trial:
    """What all steps share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.is_tiny: bool = options.tiny
        self.family: str = options.family
        self.out: Path = options.out
        self.model: Path = options.model
        self.deadline = time.monotonic() + options.budget
        self.results: dict[str, Any] = {}

    def run(self, step: str) -> None:
        """One step; what it says or why it failed is its result."""
        limit = min(STEPS[step], self.deadline - time.monotonic())
        print(f"\n=== {step} ({limit:.0f} s)", flush=True)
        started = time.monotonic()
        try:
            if limit < 10:
                raise TimeoutError("no time left")
            result = getattr(self, step)(time.monotonic() + limit)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            result = {"failed": f"{type(error).__name__}: {error}"[:500]}
        self.results[step] = {**result, "step_seconds": round(time.monotonic() - started, 1)}
        print(json.dumps(self.results[step])[:2000], flush=True)
        (self.out / "trial.json").write_text(json.dumps(self.results, indent=1))

    def build(self, deadline: float) -> dict[str, Any]:
        """The checkpoint."""
        return self._child(deadline, "build", options=["--family", self.family])

    def doctor(self, deadline: float) -> dict[str, Any]:
        """What vlm-doctor says about the machine as it is, and how long it takes."""
        result: dict[str, Any] = {}
        commands = {
            "collect": ["collect", "--output", str(self.out / "snapshot.json")],
            "check": ["check", "--verbose"],
            "check again": ["check"],
            "check without torch": ["check", "--no-torch"],
            "plan": ["plan", str(self.model), "--offline"],
            "plan for the snapshot": ["plan", str(self.model), "--offline", "--machine", str(self.out / "snapshot.json")],
            "plan as python": ["plan", str(self.model), "--offline", "--min-gpus", "2", "--format", "python"],
        }
        with (self.out / "doctor.txt").open("w") as log:
            for name, arguments in commands.items():
                command = [sys.executable, "-m", "vlm_doctor", *arguments]
                started = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, timeout=self._left(deadline), check=False)
                seconds = round(time.perf_counter() - started, 3)
                result[name] = {"exit": done.returncode, "seconds": seconds}
                log.write(
                    f"\n$ vlm-doctor {' '.join(arguments)}\n{done.stdout}{done.stderr}[{done.returncode}] {seconds} s\n"
                )
        return result

    def pytest(self, deadline: float) -> dict[str, Any]:
        """The tests of tests/gpu through the plugin, on two emulated cards of 24 GiB, then with the first half taken."""
        results = {}
        for name, free in (("even", EVEN), ("uneven", UNEVEN)):
            with self._ballast(free):
                results[name] = self._pytest(deadline, f"pytest-{name}.txt")
        return {name: f"exit {result['exit']}: {result['last_line']}" for name, result in results.items()}

    def busy(self, deadline: float) -> dict[str, Any]:
        """The same tests with almost no memory free: errors with code VLM711, never skips."""
        if self.is_tiny:
            return {"not_run": "needs CUDA, not run"}
        with self._ballast(FULL):
            result = self._pytest(deadline, "busy.txt")
        return {**result, "names_VLM711": "VLM711" in (self.out / "busy.txt").read_text()}

    def accuracy(self, deadline: float) -> dict[str, Any]:
        """Two emulated cards of 24 GiB: predicted against measured peak."""
        with self._ballast(EVEN):
            return self._child(deadline, "accuracy", ",".join(EVEN))

    def even(self, deadline: float) -> dict[str, Any]:
        """Two emulated cards of 24 GiB: the longest prompt of each map."""
        return self._longest(deadline, EVEN)

    def uneven(self, deadline: float) -> dict[str, Any]:
        """The same with the first card half taken."""
        return self._longest(deadline, UNEVEN)

    def _longest(self, deadline: float, free_gib: tuple[str, ...]) -> dict[str, Any]:
        with self._ballast(free_gib):
            careless = self._child(time.monotonic() + 0.3 * self._left(deadline), "auto", ",".join(free_gib))
            return {**careless, **self._child(deadline, "frontier", ",".join(free_gib))}

    def summary(self) -> str:
        """The readings as Markdown."""
        lines = ["# Trial on real GPUs", "", "| step | seconds | result |", "| --- | --- | --- |"]
        for step, result in self.results.items():
            short = {key: value for key, value in result.items() if isinstance(value, (str, int, float, bool))}
            lines.append(f"| {step} | {short.pop('step_seconds')} | {short} |")
        lines += ["", "| command | exit | seconds |", "| --- | --- | --- |"]
        for name, reading in self.results.get("doctor", {}).items():
            if isinstance(reading, dict):
                lines.append(f"| vlm-doctor {name} | {reading['exit']} | {reading['seconds']} |")
        lines += [
            "",
            "| prompt | GPU | predicted GiB | measured GiB | ratio | without weights | reserved GiB | outside torch GiB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in self.results.get("accuracy", {}).get("rows", []):
            if "gpu" in row:
                sizes = [
                    f"{row[key] / 2**30:.2f}"
                    for key in ("predicted_bytes", "measured_bytes", "reserved_bytes", "outside_torch_bytes")
                ]
                lines.append(
                    f"| {row['prompt']} | {row['gpu']} | {sizes[0]} | {sizes[1]} | {row['ratio']} | "
                    f"{row['ratio_without_weights']} | {sizes[2]} | {sizes[3]} |"
                )
        lines += ["", "| free GiB | predicted | plan | auto | cuts that beat the plan |", "| --- | --- | --- | --- | --- |"]
        for step, free in (("even", EVEN), ("uneven", UNEVEN)):
            found = self.results.get(step, {})
            better = {cut: tokens for cut, tokens in found.get("cuts", {}).items() if tokens}
            lines.append(
                f"| {' / '.join(free)} | {found.get('predicted_without_headroom')} | {found.get('plan_tokens')} | "
                f"{found.get('auto_tokens')} | {better or 'none'} |"
            )
        return "\n".join(lines) + "\n"

    def _left(self, deadline: float) -> float:
        return max(1.0, deadline - time.monotonic())

    def _child(self, deadline: float, step: str, free: str = "", options: Sequence[str] = ()) -> dict[str, Any]:
        """A step of ``glm4v_steps.py`` in a process of its own, so that its memory is gone afterwards."""
        answer = Path(tempfile.mkdtemp()) / "answer.json"
        machine = ",".join(f"{gib}GiB" for gib in free.split(",")) if self.is_tiny else "live"
        left = self._left(deadline)
        arguments = [
            "--child",
            step,
            "--answer",
            str(answer),
            "--machine",
            machine,
            "--budget",
            str(max(1.0, left - 15)),
            *options,
        ]
        command = [sys.executable, __file__, *arguments, "--model", str(self.model), *(["--tiny"] if self.is_tiny else [])]
        try:
            status = f"exit {subprocess.run(command, timeout=left, check=False).returncode}"
        except subprocess.TimeoutExpired:
            status = "no time left"
        # A step saves what it has as it goes, so that a late failure loses little.
        result: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
        return result if status == "exit 0" else {**result, "failed": status}

    def _pytest(self, deadline: float, log: str) -> dict[str, Any]:
        gpus = "none" if self.is_tiny else "auto"
        # The project need not be installed. Warnings of other versions of transformers are not the question here.
        plugin = [] if _is_installed() else ["-p", "pytest_vlmgpu.plugin"]
        command = [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "-W", "default", "-m", "gpu"]
        command += [str(ROOT / "tests" / "gpu"), f"--vlm-gpus={gpus}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTEST_VLMGPU_MODEL": str(self.model)}
        with (self.out / log).open("w") as file:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=self._left(deadline),
                env=environment,
                check=False,
                cwd=ROOT,
            )
        text = (self.out / log).read_text()
        print(text[-4000:], flush=True)
        return {"exit": done.returncode, "last_line": text.strip().splitlines()[-1] if text.strip() else ""}

    def _ballast(self, free_gib: tuple[str, ...]) -> AbstractContextManager[str]:
        """Only so much memory free on each GPU."""
        return nullcontext("") if self.is_tiny else held(free_gib)


def _is_installed() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("pytest-vlmgpu")
    except PackageNotFoundError:
        return False
    return True


def _run_child(options: argparse.Namespace) -> None:
    import glm4v_steps

    deadline = time.monotonic() + options.budget
    answer = glm4v_steps.Answer(options.answer)
    if options.child == "build":
        glm4v_steps.build(options.model, options.family, answer, is_tiny=options.tiny)
    else:
        getattr(glm4v_steps, options.child)(options.model, options.machine, answer, deadline)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"default: all of {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "trial")))
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "glm4v-random")
    parser.add_argument("--family", default="glm4v", choices=("glm4v", "qwen2_5_vl"), help="dimensions of the model")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="tiny model, no GPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--machine", default="live", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _run_child(options)
        return 0
    unknown = [step for step in options.steps if step not in STEPS]
    if unknown:
        parser.error(f"no such step: {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    trial = Trial(options)
    for step in options.steps or STEPS:
        trial.run(step)
    summary = trial.summary()
    (options.out / "summary.md").write_text(summary)
    print("\n" + summary, flush=True)
    return int('"failed"' in json.dumps(trial.results))


if __name__ == "__main__":
    sys.exit(main())
