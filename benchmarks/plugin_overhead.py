"""What the plugin costs: `python benchmarks/plugin_overhead.py [runs]`, or `... --large [runs]` for 10,000 tests.

Runs `pytest --co -q` with and without the plugin (`-p no:vlmgpu`), in turns and in changing order so that both meet the
same noise. Use an environment in which the package is installed from its wheel. Other plugins are switched off. CPU time is
user and system time of the whole process; the least of each variant counts.

Where valgrind is installed, `--instructions` counts those that each variant executes: the same in every run, however busy
the machine is. "as ms" is their difference at the rate of the run without the plugin (least CPU time by its instructions).

The small suites are three files of ten tests, measured with and without PYTHONDONTWRITEBYTECODE, under which pytest may
compile plugins anew in each run. With `--large` the suites are ten files of a thousand tests, each against one that asks
the same of pytest alone: as many markers that are registered and mean nothing, and a session fixture that depends on as
many others as ours does, with `indirect` parameters where a test names two models. What pytest spends on those is not the
plugin's, and stands in the column of the bare run. "10,000 tests" is the difference less what the plugin costs once, which
is measured on the same suite with ten tests.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SMALL = {
    "tests without markers": "def test_{n}(): pass\n",
    "gated tests": '@pytest.mark.vlm("org/a")\n@pytest.mark.vlm_requires(gpus=2)\ndef test_{n}(vlm): pass\n',
}
PLAIN = "def test_{n}(): pass\n"
LARGE = {
    "unmarked": (PLAIN, PLAIN),
    "vlm_requires": (
        "@pytest.mark.theirs(gpus=2)\n" + PLAIN,
        "@pytest.mark.vlm_requires(gpus=2)\n" + PLAIN,
    ),
    "vlm": (
        '@pytest.mark.theirs("org/a")\ndef test_{n}(own): pass\n',
        '@pytest.mark.vlm("org/a")\ndef test_{n}(vlm): pass\n',
    ),
    "vlm, models in turns": (
        '@pytest.mark.theirs("org/{m}")\ndef test_{n}(own): pass\n',
        '@pytest.mark.vlm("org/{m}")\ndef test_{n}(vlm): pass\n',
    ),
    "vlm, two models each": (
        '@pytest.mark.parametrize("own", ["org/a", "org/b"], indirect=True, scope="session")\ndef test_{n}(own): pass\n',
        '@pytest.mark.vlm("org/a", "org/b")\ndef test_{n}(vlm): pass\n',
    ),
}
"""Suite to the body of a test without the plugin, and with it."""
CONFTEST = """import pytest
@pytest.fixture(scope="session")
def own_loader(request): pass
@pytest.fixture(scope="session")
def own_residents(request, own_loader): pass
@pytest.fixture(scope="session")
def own(request, own_loader, own_residents): pass
"""
BARE, PLUGIN = ("-p", "no:vlmgpu"), ()
OTHER_PLUGINS = ("anyio", "hypothesispytest", "xdist", "xdist.looponfail", "pytest_cov", "timeout")
"""Switched off, so that they add no noise."""
COUNTER = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")


class Variant(NamedTuple):
    """One way to run pytest."""

    folder: Path
    arguments: tuple[str, ...]
    writes_bytecode: bool = True

    def run(self, *prefix: str) -> str:
        """Run it in a process of its own; returns what it wrote to standard error."""
        command = [*prefix, sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider", *self.arguments]
        command += [word for name in OTHER_PLUGINS for word in ("-p", f"no:{name}")]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONHASHSEED"] = "0"
        if not self.writes_bytecode:
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        run = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(f"pytest failed:\n{run.stdout}{run.stderr}")
        return run.stderr

    def cpu_ms(self) -> float:
        """CPU time of one run."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def instructions(self) -> int:
        """Instructions of one run, in millions."""
        lines = [line for line in self.run(*COUNTER).splitlines() if "refs:" in line]
        return int(lines[0].split(":")[1].replace(",", "")) // 1_000_000


def write_suite(folder: Path, body: str, files: int, tests: int) -> Path:
    """A project of so many files with so many tests each."""
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  theirs: ours\n  vlm: ours\n  vlm_requires: ours\n")
    (folder / "conftest.py").write_text(CONFTEST)
    for number in range(files):
        source = "".join(body.format(n=n, m="ab"[n % 2]) for n in range(tests))
        (folder / f"test_{number}.py").write_text(f"import pytest\n{source}")
    return folder


def times(variants: tuple[Variant, Variant], runs: int) -> tuple[list[float], list[float]]:
    """CPU times of both, in turns; the first round warms the disk, writes bytecode and does not count."""
    measured: tuple[list[float], list[float]] = ([], [])
    for round_number in range(runs + 1):
        for which in (0, 1) if round_number % 2 else (1, 0):
            spent = variants[which].cpu_ms()
            if round_number:
                measured[which].append(spent)
    return measured


def row(label: str, variants: tuple[Variant, Variant], runs: int, *, counts: bool) -> tuple[float, float]:
    """Print one line of figures; returns how much more the plugin needs: CPU time in ms, and instructions as ms."""
    bare, plugin = times(variants, runs)
    ratio = statistics.median(after / before for before, after in zip(bare, plugin, strict=True))
    more, as_ms = min(plugin) - min(bare), 0.0
    line = f"{label:<38}{min(bare):>9.0f}{min(plugin):>8.0f}{more:>7.1f}{ratio:>8.3f}"
    if counts:
        before, after = (variant.instructions() for variant in variants)
        as_ms = (after - before) / before * min(bare)
        line += f"{before:>10}{after:>8}{after - before:>7}{as_ms:>8.1f}"
    print(line, flush=True)
    return more, as_ms


def print_small(runs: int, folder: Path, *, counts: bool) -> None:
    """The table of small suites."""
    for suite, body in SMALL.items():
        project = write_suite(folder / suite.replace(" ", "-"), body, 3, 10)
        for writes in (True, False):
            label = f"{suite}, bytecode {'written' if writes else 'not written'}"
            row(label, (Variant(project, BARE, writes), Variant(project, PLUGIN, writes)), runs, counts=counts)


def print_large(runs: int, folder: Path, *, counts: bool) -> None:
    """The table of `--large`."""
    for suite, bodies in LARGE.items():
        each = 500 if "each" in suite else 1000
        costs = []
        for size, files, tests in (("10", 1, each // 100), ("10,000", 10, each)):
            variants = []
            for name, body, arguments in (("bare", bodies[0], BARE), ("with", bodies[1], PLUGIN)):
                project = write_suite(folder / f"{suite}-{size}-{name}", body, files, tests)
                variants.append(Variant(project, arguments))
            costs.append(row(f"{size} {suite}", (variants[0], variants[1]), runs, counts=counts))
        once, all_tests = costs
        line = f"  10,000 tests: {all_tests[0] - once[0]:.0f} ms by CPU time"
        print(line + (f", {all_tests[1] - once[1]:.0f} ms by instructions" if counts else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=int)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--instructions", action="store_true")
    given = parser.parse_args()
    if given.instructions and shutil.which("valgrind") is None:
        raise SystemExit("--instructions needs valgrind, which is not installed")
    runs = given.runs or (5 if given.large else 30)
    print(f"CPU time in ms (least of {runs} runs, median of ratios), instructions in millions")
    print(f"{'suite':<38}{'bare':>9}{'with':>8}{'more':>7}{'ratio':>8}", end="")
    print(f"{'bare':>10}{'with':>8}{'more':>7}{'as ms':>8}" if given.instructions else "")
    with tempfile.TemporaryDirectory() as name:
        (print_large if given.large else print_small)(runs, Path(name), counts=given.instructions)


if __name__ == "__main__":
    main()
