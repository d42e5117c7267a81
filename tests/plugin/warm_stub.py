"""A warm host whose model is nothing, in a process of its own: ``python warm_stub.py FOLDER``, with an order to read.

Files in FOLDER tell it what to do: it loads while ``loading`` is there, its weights are changed once ``changed`` is, and
its memory cannot be given away once ``unlendable`` is. On a made-up machine that projects share (SHARED_PROJECT) it takes
memory as a model would.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import msgspec

from pytest_vlmgpu.warm.facts import NotKept
from pytest_vlmgpu.warm.records import Lent, Order
from pytest_vlmgpu.warm.serving import serve

FOLDER = Path(sys.argv[1])


class Stub:
    def __init__(self, order: Order) -> None:
        self.is_for_one = bool(order.gpus)
        self.age_s = 720.0
        self.weights = dict.fromkeys(order.gpus, 20 * 2**30)
        self._memory = os.memfd_create("stub")
        os.write(self._memory, b"weights")
        shared = os.environ.get("SHARED_PROJECT")
        for uuid in order.gpus if shared else ():
            (Path(shared or "") / "memory").mkdir(exist_ok=True)
            (Path(shared or "") / "memory" / f"{uuid}.{os.getpid()}").write_text(str(20 * 2**30))

    def is_intact(self) -> bool:
        return not (FOLDER / "changed").exists()

    def close(self) -> None:
        (FOLDER / "closed").touch()

    def lend(self) -> tuple[Lent, list[int]]:
        if (FOLDER / "unlendable").exists():
            raise RuntimeError("CUDA error: operation not supported\nand more")
        lent = Lent(b"skeleton", (), (), 7, is_dispatched=False, load_seconds=41.0, age_s=self.age_s)
        return lent, [self._memory]


def load(order: Order) -> Stub:
    with (FOLDER / "loads").open("a") as file:
        file.write("x")
    while (FOLDER / "loading").exists():
        time.sleep(0.01)
    if (FOLDER / "broken").exists():
        raise RuntimeError("a disk was full\nand more")
    if (FOLDER / "odd").exists():
        raise NotKept("it is odd", is_for_good=True)
    return Stub(order)


sys.exit(serve(msgspec.json.decode(sys.stdin.buffer.read(), type=Order), load))  # type: ignore[arg-type]
