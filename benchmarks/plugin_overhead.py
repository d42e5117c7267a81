"""What the plugin costs a project that does not use it: `python benchmarks/plugin_overhead.py [runs]`.

Runs `pytest --co -q` on three files of ten tests with and without the plugin, in turns and in changing order so that both
meet the same noise. Each suite is measured with and without PYTHONDONTWRITEBYTECODE, under which pytest may compile plugins
anew in each run. Of CPU time (user and system) it prints the least of each variant, their difference, and the median and
quartiles of the differences of neighbors: where the quartiles are far apart, the machine was busy and the least times tell
most. Use an environment in which the package is installed from its wheel. Other plugins are switched off.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SUITES = {
    "tests without markers": "def test_{n}(): pass\n",
    "gated tests": 'import pytest\n@pytest.mark.vlm("org/a")\n@pytest.mark.vlm_requires(gpus=2)\ndef test_{n}(vlm): pass\n',
}
BARE, PLUGIN = ["-p", "no:vlmgpu"], []
OTHER_PLUGINS = ("anyio", "hypothesispytest", "xdist", "xdist.looponfail", "pytest_cov", "timeout")
"""Switched off, so that they add no noise."""


def cpu_ms(folder: Path, arguments: list[str], *, writes_bytecode: bool) -> float:
    """CPU time of one pytest process of its own."""
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider", *arguments]
    command += [word for name in OTHER_PLUGINS for word in ("-p", f"no:{name}")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if not writes_bytecode:
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise SystemExit(f"pytest failed:\n{run.stdout}{run.stderr}")
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(body: str, runs: int, *, writes_bytecode: bool) -> tuple[list[float], list[float]]:
    """Times without and with the plugin; the first round warms the disk and does not count."""
    bare: list[float] = []
    plugin: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  vlm: ours\n  vlm_requires: ours\n")
        for number in range(3):
            (folder / f"test_{number}.py").write_text("".join(body.format(n=n) for n in range(10)))
        for round_number in range(runs + 1):
            variants = [(bare, BARE), (plugin, PLUGIN)]
            for times, arguments in variants if round_number % 2 else reversed(variants):
                spent = cpu_ms(folder, arguments, writes_bytecode=writes_bytecode)
                if round_number:
                    times.append(spent)
    return bare, plugin


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    print(f"CPU time in ms, {runs} runs each")
    print(f"{'suite':<24}{'bytecode':<12}{'least bare':>12}{'with':>8}{'more':>7}   {'median (quartiles) of differences'}")
    for suite, body in SUITES.items():
        for writes_bytecode in (True, False):
            bare, plugin = measure(body, runs, writes_bytecode=writes_bytecode)
            low, median, high = statistics.quantiles(
                (after - before for before, after in zip(bare, plugin, strict=True)), n=4
            )
            print(
                f"{suite:<24}{'written' if writes_bytecode else 'not written':<12}{min(bare):>12.1f}{min(plugin):>8.1f}"
                f"{min(plugin) - min(bare):>7.1f}   {median:.1f} ({low:.1f} to {high:.1f})"
            )


if __name__ == "__main__":
    main()
