"""What the plugin costs: `python benchmarks/plugin_overhead.py [runs]`, or `... --large [runs]` for 10,000 tests.

Runs `pytest --co -q` on three files of ten tests with and without the plugin, in turns and in changing order so that both
meet the same noise. Each suite is measured with and without PYTHONDONTWRITEBYTECODE, under which pytest may compile plugins
anew in each run. Of CPU time (user and system) it prints the least of each variant, their difference, and the median and
quartiles of the differences of neighbors: where the quartiles are far apart, the machine was busy and the least times tell
most. With `--large` the suites are ten files of a thousand tests, each against one that asks the same of pytest alone:
markers of no meaning and a session fixture, without the plugin. Use an environment in which the package is installed from
its wheel. Other plugins are switched off.
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
LARGE = {
    "10,000 unmarked": ("def test_{n}(): pass\n", "def test_{n}(): pass\n"),
    "10,000 vlm_requires": (
        "import pytest\n@pytest.mark.theirs(gpus=2)\ndef test_{n}(): pass\n",
        "import pytest\n@pytest.mark.vlm_requires(gpus=2)\ndef test_{n}(): pass\n",
    ),
    "10,000 vlm": (
        'import pytest\n@pytest.mark.theirs("org/a")\ndef test_{n}(own): pass\n',
        'import pytest\n@pytest.mark.vlm("org/a")\ndef test_{n}(vlm): pass\n',
    ),
}
"""Suite to the body of a test without the plugin, and with it."""
CONFTEST = """import pytest
@pytest.fixture(scope="session")
def own_loader(): pass
@pytest.fixture(scope="session")
def own_residents(): pass
@pytest.fixture(scope="session")
def own(own_loader, own_residents): pass
"""
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


def measure_large(bodies: tuple[str, str], runs: int) -> tuple[list[float], list[float]]:
    """Times of both bodies, in turns; bytecode is written, and the first round writes it."""
    times: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / "bare", Path(name) / "with"]
        for folder, body in zip(folders, bodies, strict=True):
            folder.mkdir()
            (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  theirs: ours\n")
            (folder / "conftest.py").write_text(CONFTEST)
            for number in range(10):
                (folder / f"test_{number}.py").write_text("".join(body.format(n=n) for n in range(1000)))
        for round_number in range(runs + 1):
            for which in (0, 1) if round_number % 2 else (1, 0):
                spent = cpu_ms(folders[which], (BARE, PLUGIN)[which], writes_bytecode=True)
                if round_number:
                    times[which].append(spent)
    return times


def print_large(runs: int) -> None:
    """The table of `--large`."""
    print(f"CPU time in ms of collection, {runs} runs each")
    print(f"{'suite':<22}{'least bare':>12}{'with':>9}{'more':>8}{'ratio':>8}{'median of ratios':>19}")
    for suite, bodies in LARGE.items():
        bare, plugin = measure_large(bodies, runs)
        ratio = statistics.median(after / before for before, after in zip(bare, plugin, strict=True))
        least, most = min(bare), min(plugin)
        print(f"{suite:<22}{least:>12.0f}{most:>9.0f}{most - least:>8.0f}{most / least:>8.3f}{ratio:>19.3f}")


def main() -> None:
    if "--large" in sys.argv:
        sys.argv.remove("--large")
        print_large(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
        return
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
