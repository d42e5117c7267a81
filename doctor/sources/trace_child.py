"""Child program: runs a true-size model of the installed transformers without GPU, weights and arithmetic.

It builds the class from its config, runs ``generate`` (prompt and decode steps) or one plain forward pass on tensors that
have no data, and answers with every allocation and every end of one, in the order of the program, beside the module at
work. Reads no weights, creates no CUDA context, and asks no network; runs code of a checkpoint where it is told to.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any


def main(
    say: Callable[..., None],
    *,
    config: dict[str, Any],
    architecture: str,
    dtype: str,
    attention: str,
    layers: list[str],
    tower: list[str],
    runs: list[dict[str, Any]],
    folder: str | None = None,
    code: str | None = None,
    cudnn_width: int = 0,
) -> None:
    """Trace some runs of one model.

    Args:
        say: Answers.
        config: What config.json holds.
        architecture: Name of the class.
        dtype: torch's word for the type of the weights.
        attention: transformers' ``attn_implementation``.
        layers: Module paths of the text layers, in order.
        tower: Module paths of what reads images.
        runs: What to trace: ``tokens`` (of the whole prompt), ``batch``, ``steps`` (tokens to generate; 0: one plain
            forward pass), ``pictures`` (the fields of :class:`.Pictures`, or None), ``marked`` (places for image features,
            where the tower is not asked for their number).
        folder: The checkpoint, for its image processor, and for its code.
        code: Where in that code the class is, in the words of ``auto_map``; ``None`` for a class of transformers.
        cudnn_width: The widest head for which fused attention is cuDNN's.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.setrecursionlimit(10_000)
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from ..trace import Pictures
    from .trace_model import Tracer

    transformers.utils.logging.set_verbosity_error()
    answer: dict[str, Any] = {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}
    say("import transformers", answer)
    # A cycle that is collected some time later would end a tensor at a place of chance.
    gc.disable()
    tracer = Tracer(
        config,
        architecture,
        dtype=dtype,
        attention=attention,
        layers=layers,
        tower=tower,
        folder=folder,
        code=code,
        cudnn_width=cudnn_width,
    )
    answer["modules"] = tracer.module_names
    answer["weights_bytes"] = tracer.weights_bytes
    answer["runs"] = []
    say("build", {**answer, "runs": []})
    for run in runs:
        pictures = Pictures(**run["pictures"]) if run["pictures"] else None
        answer["runs"].append(_brief(tracer.trace(**{**run, "pictures": pictures}), answer["runs"]))
    say("trace", answer, is_final=True)


def _brief(run: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """A run whose events differ from an earlier one's in sizes alone is told by its sizes."""
    events = run["events"]
    for number, other in enumerate(earlier):
        if len(other.get("events", ())) == len(events) and all(
            one[0] == two[0] and one[2:] == two[2:] and (one[1] > 0) - (one[1] < 0) == (two[1] > 0) - (two[1] < 0)
            for one, two in zip(events, other["events"], strict=True)
        ):
            return {**run, "events": [], "same_as": number, "sizes": [event[1] for event in events if event[1]]}
    return run
