"""Every image-text-to-text architecture of the installed transformers on two devices, by the planner's maps and others'.

On two GPUs, in two minutes and a half (no network; torch, transformers and accelerate are all that is needed)::

    python benchmarks/all_architectures.py --out FOLDER --devices cuda:0,cuda:1 --jobs 16 --each 60 --budget 150

On two GPUs that are not there, in an hour of CPU::

    python benchmarks/all_architectures.py --out FOLDER --each 600

``--remote`` does the same for the families that bring code of their own (``tiny_remote.py``).

Each architecture gets a tiny checkpoint with random weights, a profile from its headers, a plan over two devices about in
half, and the maps of accelerate for half and half. Each map is loaded; logits and greedy tokens, for a text and for an
image, are compared with those of one device; and ``check_map`` is asked about each map before. Workers are processes of
their own that take one architecture after another: a crash or a hang loses that architecture alone. Writes
``rows/NAME.json`` as things become known, ``results.json``, ``table.md``, and what the libraries printed in ``logs/``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from architecture_trial import FAKE, Row, Trial, said  # noqa: E402 - they lie beside this file

_STARTS = 90
"""Seconds for importing the libraries."""
MAPS = {"plan": "planner", "accelerate": "accelerate, half and half", "auto": "device_map='auto'"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and the table")
    parser.add_argument("--devices", default=FAKE, help="'fake', or two devices such as cuda:0,cuda:1")
    parser.add_argument("--each", type=float, default=120, help="seconds for one architecture")
    parser.add_argument("--jobs", type=int, default=2, help="architectures at a time")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds in all; what is left then is said to be left")
    parser.add_argument("--cuts", action="store_true", help="also every other cut that the planner may make")
    parser.add_argument("--turned", action="store_true", help="also each map with its two devices exchanged")
    parser.add_argument("--remote", action="store_true", help="the families that bring code of their own instead")
    parser.add_argument("families", nargs="*", help="model_type; all when none is given")
    options = parser.parse_args()
    for name in ("rows", "logs"):
        (options.out / name).mkdir(parents=True, exist_ok=True)
    pool = Pool(options)
    pool.run()
    found = [_row(options.out / "rows" / f"{family}.json", family, pool.ends.get(family, "")) for family in pool.families]
    results = {"devices": options.devices, "versions": pool.versions, "rows": found}
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    table = render(results)
    (options.out / "table.md").write_text(table)
    print(table)
    return 0


def _row(path: Path, family: str, end: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"family": family}
    return {**row, "end": end} if end else row


class Worker(NamedTuple):
    """A process that runs architectures."""

    process: Any
    line: Any
    """Connection: names go in; what it knows, and names that are done, come out."""


class Pool:
    """Workers, and what they are at."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.budget
        self.families: list[str] = list(options.families)
        self.waiting: list[str] | None = list(options.families) or None
        """``None``: the first worker that is ready will say."""
        self.versions: dict[str, str] = {}
        self.ends: dict[str, str] = {}
        """What became of the architectures that were not done."""
        self.at: dict[Worker, tuple[str, float]] = {}
        """Worker to its architecture (none while it starts) and when it must be done."""
        self._started = 0

    def run(self) -> None:
        """Until all are done or the time is over."""
        for _ in range(self.options.jobs):
            self.start()
        while self.at and time.monotonic() < self.deadline:
            ready = multiprocessing.connection.wait([worker.line for worker in self.at], timeout=0.2)
            for worker in [worker for worker in self.at if worker.line in ready]:
                self.hear(worker)
            for worker, (_, limit) in list(self.at.items()):
                if time.monotonic() > limit:
                    self.stop(worker, f"not done after {self.options.each:.0f} s")
        for worker in list(self.at):
            self.stop(worker, "no time left", starts_next=False)
        self.ends.update(dict.fromkeys(self.waiting or (), "no time left"))

    def start(self) -> None:
        """One more worker. Spawned, not forked: CUDA does not survive a fork."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        log = self.options.out / "logs" / f"{self._started}.txt"
        self._started += 1
        process = context.Process(target=work, args=(there, self.options, log), daemon=True)
        process.start()
        there.close()
        self.at[Worker(process, here)] = "", time.monotonic() + _STARTS

    def hear(self, worker: Worker) -> None:
        """A worker is ready, has done one, or is dead."""
        try:
            message = worker.line.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            self.stop(worker, f"died ({worker.process.exitcode})")
            return
        if isinstance(message, dict):
            self.versions = message["versions"]
            if self.waiting is None:
                self.families = list(message["families"])
                self.waiting = list(self.families)
        else:
            print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)
        if self.waiting:
            family = self.waiting.pop(0)
            (self.options.out / "rows" / f"{family}.json").unlink(missing_ok=True)
            worker.line.send(family)
            self.at[worker] = family, time.monotonic() + self.options.each
        else:
            worker.line.close()
            worker.process.join(5)
            self.stop(worker, "", starts_next=False)

    def stop(self, worker: Worker, why: str, *, starts_next: bool = True) -> None:
        """End a worker, and say what became of its architecture."""
        family, _ = self.at.pop(worker)
        worker.line.close()
        if worker.process.is_alive():
            worker.process.kill()
        if family and why:
            self.ends[family] = why
            print(f"{time.strftime('%H:%M:%S')} {family}: {why}", flush=True)
        # A worker that does not even start is not tried again and again.
        if starts_next and family and self.waiting and self.deadline - time.monotonic() > 20:
            self.start()


def work(line: Any, options: argparse.Namespace, log: Path) -> None:
    """In a process of its own: run what is asked for, until nothing is."""
    with log.open("w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    warnings.simplefilter("ignore")
    import accelerate
    import tiny_architectures
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    # The same sums on one device as on two.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    versions = {module.__name__: str(module.__version__) for module in (torch, transformers, accelerate)}
    families, trial = tiny_architectures.families(), Trial
    if options.remote:
        import tiny_remote
        from remote_trial import RemoteTrial

        families, trial = tuple(tiny_remote.FAMILIES), RemoteTrial
    line.send({"versions": versions, "families": families})
    while True:
        try:
            family = line.recv()
        except EOFError:
            return
        row = Row(options.out / "rows" / f"{family}.json", family)
        try:
            trial(family, options, row).run()
        except Exception as error:  # noqa: BLE001 - whatever it raises is the row's result
            row.add(failed=said(error), where=traceback.format_exc(limit=-3))
        line.send(family)
        if row.get("is_lost"):
            return


def render(results: dict[str, Any]) -> str:
    """The table and the counts."""
    rows = results["rows"]
    lines = [f"{len(rows)} architectures, {results['versions']}, devices {results['devices']}", ""]
    lines += ["| architecture | inputs | plan | accelerate's map | auto | note |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [_line(row) for row in rows]
    return "\n".join([*lines, "", *_counts(rows)]) + "\n"


def _word(entry: dict[str, Any] | None) -> str:
    if not entry:
        return "-"
    if entry.get("failed"):
        return f"failed: {entry['failed'][:60]}"
    if entry.get("whole"):
        return "kept on one GPU"
    if "runs" not in entry:
        return f"no split ({', '.join(map(str, entry.get('devices', [])))})"
    flagged = ", ".join(entry["check"]["errors"]) or "clean"
    what = "CRASHES" if entry["crashes"] else "equal" if entry["equal"] else "DIFFERS"
    named = (", named" if entry["named"] else ", not named") if entry["crashes"] else ""
    return f"{what} {entry['share']:.2f} (check: {flagged}{named})"


def _line(row: dict[str, Any]) -> str:
    note = row.get("end") or row.get("failed") or "; ".join(f"{k}: {v}" for k, v in row.get("no_inputs", {}).items())
    bad = [cut for cut in row.get("cuts", ()) if cut["crashes"] or not cut["equal"] or cut["check"]["errors"]]
    if bad:
        note += f" {len(bad)} of {len(row['cuts'])} cuts are bad"
    cells = [row["family"], ", ".join(row.get("inputs", ())), *(_word(row.get(k)) for k in ("plan", "accelerate", "auto"))]
    return f"| {' | '.join(cells)} | {note.replace('|', '/')[:140]} |"


def _counts(rows: list[dict[str, Any]]) -> list[str]:
    """How many, and which."""
    lost = {r["family"]: r.get("end") or r.get("failed", "") for r in rows if "seconds" not in r or r.get("end")}
    lines = [f"done: {len(rows) - len(lost)} of {len(rows)}", *(f"  not done: {name}: {why}" for name, why in lost.items())]
    for name, words in MAPS.items():
        lines += ["", f"{words}:"]
        kinds: dict[str, list[str]] = {}
        for row in rows:
            kinds.setdefault(_kind(row, name), []).append(row["family"])
        lines += [f"  {kind}: {len(kinds[kind])}" + _names(kind, kinds[kind]) for kind in sorted(kinds)]
        ran = [(row["family"], row[name]) for row in rows if "runs" in row.get(name, {})]
        crashed = [(family, entry) for family, entry in ran if entry["crashes"]]
        # A warning that names the module counts: some revisions of a checkpoint's own code, or some calls, do not crash.
        seen = [family for family, entry in crashed if entry["check"]["errors"] or entry["named"]]
        missed = [family for family, entry in crashed if family not in seen]
        false = [family for family, entry in ran if not entry["crashes"] and entry["check"]["errors"]]
        named = sum(entry["named"] for _, entry in crashed)
        lines.append(
            f"  check-map: {len(seen)} of {len(crashed)} crashes said before ({named} by module)"
            f"{_names('missed', missed, ', missed')}; false alarms {len(false)}{_names('false', false)}"
        )
    return lines + _counts_of_cuts(rows)


def _kind(row: dict[str, Any], name: str) -> str:
    entry = row.get(name)
    if not entry:
        return "not run"
    if entry.get("whole"):
        return "kept on one GPU"
    if "runs" not in entry:
        return "no map" if entry.get("failed") else "does not split"
    if entry["crashes"]:
        return "crash"
    if any("note" in run for run in entry["runs"].values()):
        return "fails on one device too"
    if entry["equal"]:
        return "equal"
    return "differ" if all(row.get("repeats", {"": True}).values()) else "differ, but so does one device from itself"


def _names(kind: str, families: list[str], word: str = "") -> str:
    return f"{word} ({', '.join(families)})" if families and kind != "equal" else ""


def _counts_of_cuts(rows: list[dict[str, Any]]) -> list[str]:
    cuts = [cut for row in rows for cut in row.get("cuts", ())]
    if not cuts:
        return []
    crashed = [cut for cut in cuts if cut["crashes"]]
    differ = sum(not cut["equal"] and not cut["crashes"] for cut in cuts)
    return [f"other cuts of the planner: {len(cuts)}, {len(crashed)} crash, {differ} differ."]


if __name__ == "__main__":
    sys.exit(main())
