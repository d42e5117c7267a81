"""Time of the doctor beside other tools that look at an environment, in one interleaved run.

    python benchmarks/doctor_beside_others.py [--rounds 5] [--bin FOLDER]

Every command is a process of its own; the order is shuffled anew in each round, so that all meet the same noise, and a
first round that warms the disk does not count. Printed are the median wall time, the median CPU time (user and system,
with children), and both as ratios to ``import torch`` in the same round: the ratios are what carries over to other
machines. ``--bin`` names the folder of an environment that has ``cuda-doctor``, ``env-doctor`` and ``mlenvdoctor``; a tool
that is not there is left out, and said so. The doctor is measured as its own command: first verdict (what a terminal shows
before torch has answered), a complete run that asks torch anew, and one that remembers torch's answer.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = "import torch"
FIRST = "vlm-doctor --no-torch (first verdict)"


def commands(folder: Path | None) -> dict[str, list[str]]:
    """Name to words; commands that are not installed are left out."""
    python = [sys.executable]
    doctor = [*python, "-m", "vlm_doctor"]
    found = {
        "python -c pass": [*python, "-c", "pass"],
        BARE: [*python, "-c", "import torch"],
        FIRST: [*doctor, "--no-torch"],
        "vlm-doctor --fresh-torch (complete)": [*doctor, "--fresh-torch"],
        "vlm-doctor (torch remembered)": doctor,
        "vlm-doctor --json --fresh-torch": [*doctor, "--json", "--fresh-torch"],
        "python -m torch.utils.collect_env": [*python, "-m", "torch.utils.collect_env"],
    }
    beside = Path(sys.executable).parent
    for name, words in (
        ("nvidia-smi", ["nvidia-smi"]),
        ("transformers env", ["transformers", "env"]),
        ("accelerate env", ["accelerate", "env"]),
        ("hf env", ["hf", "env"]),
        ("cuda-doctor diagnose", ["cuda-doctor", "diagnose"]),
        ("env-doctor check", ["env-doctor", "check"]),
        ("mlenvdoctor doctor", ["mlenvdoctor", "doctor"]),
    ):
        path = next((p for p in (folder, beside) if p is not None and (p / words[0]).exists()), None)
        program = str(path / words[0]) if path is not None else shutil.which(words[0])
        if program is None:
            print(f"not installed: {words[0]}")
        else:
            found[name] = [program, *words[1:]]
    return found


def spend(words: list[str], environment: dict[str, str]) -> tuple[float, float, int, int]:
    """Wall and CPU seconds, exit status, lines printed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, capture_output=True, env=environment, stdin=subprocess.DEVNULL, timeout=300, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, done.returncode, done.stdout.count(b"\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bin", type=Path)
    options = parser.parse_args()
    known = commands(options.bin)
    seen: dict[str, list[tuple[float, float, int, int]]] = {name: [] for name in known}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        for round_number in range(options.rounds + 1):
            names = list(known)
            random.shuffle(names)
            for name in names:
                spent = spend(known[name], environment)
                if round_number:
                    seen[name].append(spent)
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, {options.rounds} rounds, medians")
    print(f"{'command':<40}{'wall s':>8}{'CPU s':>8}{'wall/torch':>12}{'CPU/torch':>11}{'exit':>6}{'lines':>7}")
    for name, runs in seen.items():
        ratios = [[mine[part] / bare[part] for mine, bare in zip(runs, seen[BARE], strict=True)] for part in (0, 1)]
        wall, cpu = (statistics.median(run[part] for run in runs) for part in (0, 1))
        print(
            f"{name:<40}{wall:>8.2f}{cpu:>8.2f}{statistics.median(ratios[0]):>12.2f}{statistics.median(ratios[1]):>11.2f}"
            f"{runs[-1][2]:>6}{runs[-1][3]:>7}"
        )


if __name__ == "__main__":
    main()
