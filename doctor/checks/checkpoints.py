"""Checkpoints in the cache: whole, and with code that the installed transformers can run?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..data.removed_calls import BREAKS
from ..findings import Finding, Fix
from ..machine import Checkpoint
from ._check import Check, Facts, Result, found, plain, skipped
from ._remedy import python

_REPO = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)
"""A name that a shell takes as it stands; a snapshot may hold any text."""
_MOST_SHOWN = 5


def lost_calls(facts: Facts) -> Result:
    """A checkpoint's own code relies on what the installed transformers no longer has.

    ## What it checks
    The text of the code of checkpoints in the cache (it is never run) against the files of the installed transformers:
    methods and imports that are gone (`_extract_past_from_model_output`, `get_max_length`, `LlamaFlashAttention2`,
    `is_torch_fx_available` and others), and what is asked for since (`post_init`, buffers that no file stores).

    ## Why it matters
    Such a model fails when it is loaded, or minutes later at the first `generate`: "'ChatGLMForConditionalGeneration'
    object has no attribute '_extract_past_from_model_output'". With buffers that transformers 5 leaves as memory was it
    answers nonsense without an error. CogVLM2, CogAgent, GLM-4V, InternVL-Chat, MiniCPM-V, DeepSeek-VL2, Kimi-VL, Molmo and
    Phi-3-vision are such models.

    ## Example
    `warning VLM321 The code of THUDM/glm-4v-9b calls _extract_past_from_model_output, and transformers 5.23.0 lacks it.`

    ## What to do
    An older transformers in an environment of its own (the fix names the newest that will do), a newer revision of the
    checkpoint, or a model that transformers knows itself: [the page of architectures](../architectures.md) names them.

    ## When it is fine
    Where the checkpoint is not used any more, or runs through an engine with classes of its own (vLLM, SGLang, LMDeploy).

    ## Sources
    Files of cache and package; zai-org/GLM-4 issue 716, zai-org/CogVLM2 issue 218, zai-org/CogVLM issue 517, transformers
    issues 36071, 39124, 43883 and 44561, DeepSeek-VL2 issues 45 and 87.
    """
    libraries = facts.machine.libraries
    version = libraries.version("transformers") if libraries is not None else None
    if version is None:
        return skipped("transformers is not installed")
    groups: dict[tuple[str, ...], list[Checkpoint]] = {}
    for checkpoint in facts.machine.checkpoints:
        if checkpoint.lost_calls:
            groups.setdefault(checkpoint.lost_calls, []).append(checkpoint)
    return tuple(_lost(facts, group, version) for group in list(groups.values())[:_MOST_SHOWN])


def _lost(facts: Facts, group: Sequence[Checkpoint], version: str) -> Finding:
    # A snapshot may hold any text.
    lost = group[0].lost_calls
    known = sorted((BREAKS[call] for call in lost if call in BREAKS), key=lambda entry: entry.since)
    calls = plain(", ".join(call for call in lost if call not in BREAKS))
    does = [entry.says for entry in known] + ([f"calls {calls}"] if calls else [])
    more = f" and {len(group) - _MOST_SHOWN} more" if len(group) > _MOST_SHOWN else ""
    whose = ", ".join(plain(checkpoint.repo) for checkpoint in group[:_MOST_SHOWN]) + more
    positions = [facts.machine.checkpoints.index(checkpoint) for checkpoint in group[:_MOST_SHOWN]]
    pin = f"transformers<{known[0].since[0]}.{known[0].since[1]}" if known else ""
    return found(
        "warning",
        f"The code of {whose} {' and '.join(does)}, and transformers {plain(version)} "
        + ("asks for more." if known and known[0].is_new else "lacks it." if len(does) == 1 else "has moved on."),
        cause=f"It was written for an older transformers: {known[0].then}."
        if known
        else "It was written for an older transformers.",
        evidence=facts.evidence(*(f"checkpoints[{position}].lost_calls" for position in positions)),
        fix=Fix(
            text="Use an older transformers in an environment of its own, a newer revision of the checkpoint, or a model "
            "that transformers knows itself.",
            commands=(
                f"{python(facts)} -m venv older-transformers",
                f"older-transformers/bin/python -m pip install '{pin}' accelerate torch torchvision pillow",
            )
            if pin
            else (),
        ),
    )


def incomplete_download(facts: Facts) -> Result:
    """A checkpoint in the cache is incomplete.

    ## What it checks
    Downloads that were cut off, and files of the newest snapshot that are gone.

    ## Why it matters
    Online, the next load downloads the rest without a word, which takes a while; offline, it fails.

    ## Example
    `warning VLM511 2 files of Qwen/Qwen2.5-VL-7B-Instruct are incomplete, and HF_HUB_OFFLINE is set.`

    ## What to do
    `HF_HUB_OFFLINE=0 hf download REPO`, on a computer that has a network and this cache.

    ## When it is fine
    While a download is under way. Online it is only mentioned.

    ## Sources
    `blobs/*.incomplete` and links of the snapshot; huggingface_hub, "Understand caching".
    """
    cut = [checkpoint for checkpoint in facts.machine.checkpoints if checkpoint.missing_files]
    value = facts.machine.environment.get("HF_HUB_OFFLINE", "")
    is_offline = value.lower() in ("1", "true", "yes", "on")
    return tuple(_cut(facts, checkpoint, is_offline=is_offline) for checkpoint in cut[:_MOST_SHOWN])


def _cut(facts: Facts, checkpoint: Checkpoint, *, is_offline: bool) -> Finding:
    count, position = checkpoint.missing_files, facts.machine.checkpoints.index(checkpoint)
    verb = "files of {} are" if count != 1 else "file of {} is"
    tail = ", and HF_HUB_OFFLINE is set" if is_offline else ""
    return found(
        "warning" if is_offline else "info",
        f"{count} {verb.format(plain(checkpoint.repo))} incomplete{tail}.",
        cause="A download was cut off, or is still under way.",
        evidence=facts.evidence(f"checkpoints[{position}].missing_files", "environment.HF_HUB_OFFLINE"),
        fix=Fix(
            text="Download the rest where there is a network, into this cache.",
            commands=(f"HF_HUB_OFFLINE=0 hf download {checkpoint.repo}",) if _REPO.fullmatch(checkpoint.repo) else (),
        ),
    )


CHECKS = (
    Check(code="VLM321", title="checkpoint code too old", run=lost_calls, needs=("gpus", "libraries")),
    Check(code="VLM511", title="checkpoint incomplete", run=incomplete_download, needs=("gpus", "host")),
)
