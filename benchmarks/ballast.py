"""Hold GPU memory so that each GPU has only so much free: ``python ballast.py 23.5 12`` (GiB free on GPU 0, 1, ...).

Prints one line that begins with ``ready`` and holds until its standard input ends. Real cards of 24 GiB cannot be had on
every machine; a large card with the rest of its memory taken shows the same free memory to NVML, torch and accelerate.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

GIB = 2**30


@contextmanager
def held(free_gib: Iterable[float | str]) -> Iterator[str]:
    """Only so much is free on each GPU while this lasts; gives what the process says that holds the rest.

    Raises:
        OSError: It holds nothing.
    """
    command = [sys.executable, __file__, *map(str, free_gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            line = holder.stdout.readline().strip()
            if not line.startswith("ready"):
                raise OSError(f"ballast.py did not start: {line or 'no answer'}")
            yield line
        finally:
            holder.stdin.close()


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("needs CUDA, not run", flush=True)
        return 3
    held = []
    for ordinal, wanted_gib in enumerate(map(float, sys.argv[1:])):
        # The context comes first: it takes memory too.
        held.append(torch.ones(1, device=f"cuda:{ordinal}"))
        surplus_bytes = int(torch.cuda.mem_get_info(ordinal)[0] - wanted_gib * GIB)
        if surplus_bytes > 0:
            held.append(torch.empty(surplus_bytes, dtype=torch.uint8, device=f"cuda:{ordinal}"))
    free = [torch.cuda.mem_get_info(ordinal)[0] / GIB for ordinal in range(len(sys.argv) - 1)]
    print("ready", *(f"{gib:.2f}" for gib in free), flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
