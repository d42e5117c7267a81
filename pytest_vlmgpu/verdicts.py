"""What the gate answers for one test: run it, skip it, or report an error.

Only permanent facts of the machine are skips. A GPU that is busy, lost or misconfigured, or a model that cannot be
read or does not land where it should, is an error: a run must not turn green because a machine broke.
``vlm-doctor explain CODE`` explains each code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Literal

NO_GPU: Final = "VLM701"
TOO_FEW: Final = "VLM702"
TOO_SMALL: Final = "VLM703"
TOO_OLD: Final = "VLM704"
DOES_NOT_FIT: Final = "VLM705"
NO_PEERS: Final = "VLM706"
BUSY: Final = "VLM711"
FAULT: Final = "VLM712"
UNREADABLE: Final = "VLM713"
OFFLOADED: Final = "VLM714"
OUT_OF_MEMORY: Final = "VLM715"
MISPLACED: Final = "VLM716"
WRONG: Final = "VLM720"
LEASED: Final = "VLM730"
NO_LEASES: Final = "VLM731"
NOT_SHARED: Final = "VLM732"
EXPECTATION: Final = "VLM740"
TOO_FEW_RAN: Final = "VLM741"
DID_NOT_RUN: Final = "VLM742"
OWN_SKIP: Final = "VLM743"
UNWRITABLE: Final = "VLM744"
NOWHERE: Final = "VLM745"
MUTATED: Final = "VLM750"
OVER_LIMIT: Final = "VLM751"
OUT_OF_MEMORY_IN_TEST: Final = "VLM752"
LEFT_BY_MODEL: Final = "VLM753"
LEFT_BY_TEST: Final = "VLM754"
"""74x are about the run as a whole, and about what a test does beside the gate."""


class GateCode(str, Enum):
    """Codes of verdicts, for a hook or a conftest that asks for one: ``verdict.code == GateCode.BUSY``."""

    NO_GPU = NO_GPU
    TOO_FEW = TOO_FEW
    TOO_SMALL = TOO_SMALL
    TOO_OLD = TOO_OLD
    DOES_NOT_FIT = DOES_NOT_FIT
    NO_PEERS = NO_PEERS
    BUSY = BUSY
    FAULT = FAULT
    UNREADABLE = UNREADABLE
    OFFLOADED = OFFLOADED
    OUT_OF_MEMORY = OUT_OF_MEMORY
    MISPLACED = MISPLACED
    WRONG = WRONG
    LEASED = LEASED
    NO_LEASES = NO_LEASES
    NOT_SHARED = NOT_SHARED

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Verdict:
    """The gate's answer for one test."""

    action: Literal["run", "skip", "error"]
    code: str | None = None
    """``VLM7xx``; ``None`` for ``run``, and for a test that would run on a machine that is not this one."""
    reason: str = ""
    """One sentence or more, with what was wanted and what was found."""
    gpus: tuple[int, ...] = ()
    """Indices of the GPUs that meet the requirements; empty on a CPU run."""
    details: str = ""
    """For those who look closer (``pytest -v``): the traceback of the library that failed, as text."""

    @property
    def text(self) -> str:
        """Code and reason, as reports show them."""
        return f"{self.code}: {self.reason}" if self.code else self.reason

    def made_strict(self) -> Verdict:
        """Turn a skip into an error with the same code (``--vlm-strict``)."""
        if self.action != "skip":
            return self
        return replace(self, action="error", reason=f"{self.reason} (An error because of --vlm-strict.)")
