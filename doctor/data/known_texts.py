"""What a known error text is, and the one list of all of them.

Each comes with the code that explains it, a real text as it is seen in logs, and where it was seen. Patterns are searched
in one line at a time, without regard to case, and only in lines that hold one of the ``anchors``; they have no nested
repetition, so that a hostile line costs no more than its length.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Rank = Literal["cause", "symptom", "consequence"]
RANKS: tuple[Rank, ...] = ("cause", "symptom", "consequence")
"""A cause names what is wrong; a symptom has several causes; a consequence follows from the failure of something else."""


class KnownText(NamedTuple):
    """One error text that is recognized."""

    name: str
    code: str
    """Whose page explains it."""
    anchors: tuple[str, ...]
    """Lower case; a line without any of them is not searched."""
    pattern: str
    """Regular expression; its named groups become facts of the answer, and may stand in ``says`` and ``commands``."""
    example: str
    """A real text."""
    says: str
    """What happened, in one sentence."""
    fix: str
    """What to do, one sentence, imperative."""
    source: str
    """Where it was seen or is explained."""
    commands: tuple[str, ...] = ()
    who: Literal["you", "administrator"] = "you"
    verify: str = "vlm-doctor"
    checks: tuple[str, ...] = ()
    """Codes of the checks that see the same trouble on a machine."""
    rank: Rank = "cause"


def all_known_texts() -> tuple[KnownText, ...]:
    """Every known text. Late, since only a pasted log needs them."""
    from . import known_texts_cuda, known_texts_libraries, known_texts_memory, known_texts_model, known_texts_nccl

    return (
        *known_texts_cuda.TEXTS,
        *known_texts_memory.TEXTS,
        *known_texts_nccl.TEXTS,
        *known_texts_model.TEXTS,
        *known_texts_libraries.TEXTS,
    )
