"""Hold GPU memory so that each GPU has only so much free: ``python ballast.py 23.5 12`` (GiB free on GPU 0, 1, ...).

Prints one line that begins with ``ready`` and holds until its standard input ends. Real cards of 24 GiB cannot be had on
every machine; a large card with the rest of its memory taken shows the same free memory to NVML, torch and accelerate.
"""

from __future__ import annotations

import sys

GIB = 2**30


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
