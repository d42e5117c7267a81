"""What `--vlm-warm` saves: a model that is loaded, against one that is attached to.

``python benchmarks/warm_models.py [rounds]`` on a CPU, with a tiny model and one of 1.6 GB whose files are in the page
cache. Each round starts a new process for each way, in turns, so that both meet the same noise. "model" is the time from
when torch and transformers are imported, with the code of the family, to a model all of whose weights were read; "process"
is all of it, as a developer waits for it. With ``--dtype bfloat16`` the checkpoint (float32) has to be converted when it is
loaded.

On a GPU: ``pytest -m gpu tests/gpu/test_warm.py -rA`` prints the times of whole runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("load", "attach")
LEASES = "benchmark"
"""Instead of a folder of leases: hosts of this benchmark are apart from all others."""


def child(way: str, folder: str, dtype: str | None) -> dict[str, float]:
    """One way, in this process; seconds by name."""
    import torch
    import transformers

    from pytest_vlmgpu.leasing.holders import pid_namespace
    from pytest_vlmgpu.models.loading import load
    from pytest_vlmgpu.models.source import find_source
    from pytest_vlmgpu.warm.attaching import _constructed, assembled, borrow
    from pytest_vlmgpu.warm.facts import digest_of, facts_of
    from pytest_vlmgpu.warm.places import Place, folder_for
    from pytest_vlmgpu.warm.records import Attach

    source = find_source(folder)
    # The code of the family is imported by whoever constructs one of its models, in both ways.
    _constructed(transformers, source)
    started = time.perf_counter()
    if way == "load":
        loaded = load(folder, None, dtype=dtype)
    else:
        place = Place(folder_for(LEASES), digest_of(facts_of(folder, None, None, dtype)))
        request = Attach(place.digest, pid_namespace(), 600.0)
        loan = borrow(place, request, lambda _: None, lambda: None)
        loaded = assembled(loan, folder, source, None, ordinals=None, started=started)
    ready = time.perf_counter() - started
    with torch.inference_mode():
        for parameter in loaded.model.parameters():
            parameter.view(-1).view(torch.uint8)[::4096].sum()
    return {"model": time.perf_counter() - started, "until it is there": ready}


def run_child(way: str, folder: str, dtype: str | None) -> dict[str, float]:
    started = time.perf_counter()
    command = [sys.executable, __file__, "--child", way, folder, *(["--dtype", dtype] if dtype else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "process": time.perf_counter() - started}


def measure(name: str, folder: Path, rounds: int, dtype: str | None) -> None:
    from pytest_vlmgpu.warm.facts import digest_of, facts_of
    from pytest_vlmgpu.warm.hosts import Hosts
    from pytest_vlmgpu.warm.places import Place, folder_for
    from pytest_vlmgpu.warm.records import Order
    from pytest_vlmgpu.warm.starting import start

    facts = facts_of(str(folder), None, None, dtype)
    place = Place(folder_for(LEASES), digest_of(facts))
    order = Order(
        digest=place.digest,
        facts=facts,
        label=name,
        name=str(folder),
        dtype=dtype,
        plan=None,
        lease_dir=LEASES,
        ttl_s=600.0,
    )
    start(order, place)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        for way in WAYS:  # not counted: the host loads, files come into the page cache
            run_child(way, str(folder), dtype)
        for number in range(rounds):
            for way in WAYS if number % 2 else WAYS[::-1]:
                found[way].append(run_child(way, str(folder), dtype))
    finally:
        Hosts(place.folder).end_digest(place.digest)
    for what in ("until it is there", "model", "process"):
        load, attach = (statistics.median(one[what] for one in found[way]) for way in WAYS)
        print(f"{name}, {what}: load {load:.3f} s, attach {attach:.3f} s, ratio {load / attach:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=7)
    parser.add_argument("--dtype")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child, arguments.dtype)))
        return
    import torch
    from reload_or_copy import large_model

    from pytest_vlmgpu.testing import make_tiny_vlm

    print(f"torch {torch.__version__}, medians of {arguments.rounds}, dtype {arguments.dtype or 'of the checkpoint'}")
    with tempfile.TemporaryDirectory() as place:
        tiny, large = Path(place).resolve() / "tiny", Path(place).resolve() / "large"
        make_tiny_vlm(tiny, "qwen2_5_vl")
        size = large_model(large)
        measure("tiny", tiny, arguments.rounds, arguments.dtype)
        measure(f"{size / 1e9:.1f} GB", large, arguments.rounds, arguments.dtype)


if __name__ == "__main__":
    main()
