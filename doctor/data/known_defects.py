"""Versions of libraries that are known to harm vision-language models or their placement, each with its thread.

Only what no library declares itself belongs here. A version was looked at, not guessed: the first one without the defect
was found in the released packages.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class KnownDefect(NamedTuple):
    """A defect of a range of versions."""

    package: str
    versions: str
    """PEP 440 specifier of the versions that have it."""
    effect: str
    """End of a sentence that begins with package and version."""
    wanted: str
    """What to install, for pip."""
    thread: str
    """Where it is discussed."""
    severity: Literal["warning", "info"] = "info"
    cured_by: tuple[str, ...] = ()
    """Packages of which any, from :attr:`cured_from` on, takes the defect away; it is only said where one is older."""
    cured_from: str = ""
    needs_several_gpus: bool = False


_CONV3D = (
    "runs Conv3d in bfloat16 without cuDNN: patch embeddings (Qwen-VL, GLM-4V) become 10 to 20 times slower "
    "and take several times the memory"
)

KNOWN_DEFECTS = (
    KnownDefect(
        package="torch",
        versions=">=2.9.1,<2.10",
        effect=f"with this cuDNN {_CONV3D}",
        wanted="torch>=2.10",
        thread="https://github.com/pytorch/pytorch/issues/166643",
        severity="warning",
        cured_by=("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
        cured_from="9.15",
    ),
    KnownDefect(
        package="torch",
        versions="==2.9.0",
        effect=_CONV3D,
        wanted="torch>=2.10",
        thread="https://github.com/pytorch/pytorch/issues/174051",
        severity="warning",
    ),
    KnownDefect(
        package="transformers",
        versions="<5.4",
        effect='counts memory that torch keeps too late: device_map="auto" gives another map at each load in one process, '
        "and may run out of memory",
        wanted="transformers>=5.4",
        thread="https://github.com/huggingface/transformers/pull/44565",
        needs_several_gpus=True,
    ),
    KnownDefect(
        package="transformers",
        versions=">=5.0,<5.14",
        effect='sizes blocks by the first of their kind: device_map="auto" misplaces models whose layers differ in size',
        wanted="transformers>=5.14",
        thread="https://github.com/huggingface/transformers/pull/47203",
        needs_several_gpus=True,
    ),
)
"""Newest first within a package. transformers 5.3.0 has the third and 5.4.0 does not; 5.13.1 has the fourth and 5.14.0 does
not (``integrations/accelerate.py`` of the released wheels)."""
