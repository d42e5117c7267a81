"""What the plugin costs a project that does not use it: `python benchmarks/plugin_overhead.py [runs]`.

Runs `pytest --co -q` on three files of ten tests with and without the plugin, one after the other so that both meet the
same noise, and prints the median of the differences. Other plugins are switched off.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SUITES = {
    "tests without markers": "def test_{n}(): pass\n",
    "gated tests": 'import pytest\n@pytest.mark.vlm("org/a")\n@pytest.mark.vlm_requires(gpus=2)\ndef test_{n}(vlm): pass\n',
}
VARIANTS = {"without": ["-p", "no:vlmgpu"], "with": []}
OTHER_PLUGINS = ("anyio", "hypothesispytest", "xdist", "xdist.looponfail", "pytest_cov", "timeout")
"""Switched off, so that they add no noise."""


def cpu_and_wall_ms(folder: Path, arguments: list[str]) -> tuple[float, float]:
    """Time of one pytest process of its own."""
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider", *arguments]
    command += [word for name in OTHER_PLUGINS for word in ("-p", f"no:{name}")]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "cache")}
    # Compiling would be measured instead of importing.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise SystemExit(f"pytest failed:\n{run.stdout}{run.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu * 1000, wall * 1000


def measure(body: str, runs: int) -> dict[str, list[tuple[float, float]]]:
    """Times of each variant, taken in turns; the first round warms the disk and does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  vlm: ours\n  vlm_requires: ours\n")
        for number in range(3):
            (folder / f"test_{number}.py").write_text("".join(body.format(n=n) for n in range(10)))
        for round_number in range(runs + 1):
            for variant, arguments in VARIANTS.items():
                found = cpu_and_wall_ms(folder, arguments)
                if round_number:
                    times[variant].append(found)
    return times


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print(
        f"{'suite':<24}{'without':>12}{'with':>12}{'median difference':>22}{'spread':>16}   (CPU / wall, ms; {runs} runs)"
    )
    for suite, body in SUITES.items():
        times = measure(body, runs)
        columns = [tuple(statistics.median(values) for values in zip(*times[variant], strict=True)) for variant in VARIANTS]
        pairs = list(zip(times["without"], times["with"], strict=True))
        differences = [[after[kind] - before[kind] for before, after in pairs] for kind in (0, 1)]
        median = [statistics.median(values) for values in differences]
        quartiles = [statistics.quantiles(values, n=4) for values in differences]
        print(
            f"{suite:<24}"
            + "".join(f"{cpu:>6.0f}/{wall:<5.0f}" for cpu, wall in columns)
            + f"{median[0]:>14.1f} / {median[1]:<5.1f}"
            + f"{quartiles[0][0]:>9.1f} to {quartiles[0][2]:<6.1f}"
        )


if __name__ == "__main__":
    main()
