"""3xx: is what is installed enough for images, fit for these GPUs, and without known defects?"""

from __future__ import annotations

from ..data.known_defects import KNOWN_DEFECTS, KnownDefect
from ..findings import Finding, Fix
from ..machine import Libraries
from ._check import Check, Facts, Result, found, names, plain, skipped, unknown
from ._remedy import pip
from ._wheels import index_of, torch_command

_ATTENTION = (8, 0)
"""What FlashAttention-2 needs. Source: flash-attention, README, "NVIDIA CUDA Support" (Ampere and newer)."""
_VIDEO = ("av", "decord", "torchcodec", "qwen-vl-utils")


def image_packages(facts: Facts) -> Result:
    """Packages that prepare images or videos are missing.

    ## What it checks
    pillow and torchvision, which image processors need, and a reader of videos.

    ## Why it matters
    `AutoProcessor.from_pretrained` fails with "requires the PIL library" or "requires the Torchvision library", after the
    weights have been loaded.

    ## Example
    `warning VLM319 pillow is not installed: image processors of transformers need it.`

    ## What to do
    `python -m pip install pillow torchvision`; for videos `av`, or `torchcodec`.

    ## When it is fine
    A reader of videos is only mentioned.

    ## Sources
    transformers, `image_processing_utils_fast.py` and `video_utils.py`; package metadata.
    """
    libraries = facts.machine.libraries
    if libraries is None or libraries.torch_build is None or libraries.version("transformers") is None:
        return skipped("transformers or torch is not installed")
    missing = [name for name in ("pillow", "torchvision") if libraries.version(name) is None]
    findings = []
    if missing:
        words, index = list(missing), index_of(libraries.torch_build)
        if "torchvision" in missing:
            # Each torchvision asks for one torch: the installed one is named, so that pip does not replace it.
            words += [f"torch=={libraries.torch_build.version}", *(("--extra-index-url", index) if index else ())]
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        findings.append(
            found(
                "warning",
                f"{' and '.join(missing)} {verb} not installed: image processors of transformers need {them}.",
                evidence={"libraries.packages": f"without {', '.join(missing)}"},
                fix=Fix(text="Install what is missing.", commands=(pip(facts, "install", *words),)),
            )
        )
    if not any(libraries.version(name) for name in _VIDEO):
        findings.append(
            found(
                "info",
                "No reader of videos is installed (av, torchcodec, decord).",
                evidence={"libraries.packages": f"without {', '.join(_VIDEO)}"},
                fix=Fix(text="Install one if you need videos.", commands=(pip(facts, "install", "av"),)),
            )
        )
    return tuple(findings)


def known_defects(facts: Facts) -> Result:
    """An installed version is known to harm vision-language models or their placement.

    ## What it checks
    Versions of torch and transformers against a short list, each entry with its thread.

    ## Why it matters
    Nothing fails, but memory, speed or the map is not what it should be.

    ## Example
    `warning VLM320 torch 2.9.0 runs Conv3d in bfloat16 without cuDNN: patch embeddings become 10 to 20 times slower.`

    ## What to do
    Install the version that the finding names, or pass an explicit `device_map` (`vlm-doctor plan MODEL` makes one).

    ## When it is fine
    Where the models you use are not of the kind that it names.

    ## Sources
    The thread in the finding; `doctor/data/known_defects.py`.
    """
    libraries = facts.machine.libraries
    if libraries is None or not any(libraries.version(defect.package) for defect in KNOWN_DEFECTS):
        return skipped("neither torch nor transformers is installed")
    # Late, here and below: what reads specifiers takes as long to import as ten checks.
    from packaging.version import InvalidVersion

    findings, unread = [], []
    for defect in KNOWN_DEFECTS:
        if defect.needs_several_gpus and len(facts.visible) < 2:
            continue
        try:
            if _has(libraries, defect):
                findings.append(_known(facts, libraries, defect))
        except InvalidVersion as error:
            unread.append(plain(str(error)))
    return tuple(findings) or (unknown(unread[0]) if unread else ())


def _has(libraries: Libraries, defect: KnownDefect) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    version = libraries.version(defect.package)
    if version is None or not SpecifierSet(defect.versions).contains(Version(version), prereleases=True):
        return False
    cures = [found_ for name in defect.cured_by if (found_ := libraries.version(name)) is not None]
    return not defect.cured_by or (bool(cures) and all(Version(cure) < Version(defect.cured_from) for cure in cures))


def _known(facts: Facts, libraries: Libraries, defect: KnownDefect) -> Finding:
    version = plain(libraries.version(defect.package) or "")
    position = next(at for at, package in enumerate(libraries.packages) if package.name == defect.package)
    is_torch = defect.package == "torch"
    command = torch_command(facts, defect.wanted) if is_torch else pip(facts, "install", defect.wanted)
    return found(
        defect.severity,
        f"{defect.package} {version} {defect.effect}.",
        evidence=facts.evidence(f"libraries.packages[{position}].version"),
        fix=Fix(text=f"Install a {defect.package} without this defect.", commands=(command,)),
        links=(defect.thread,),
    )


def attention_too_new(facts: Facts) -> Result:
    """The installed flash-attn does not run on a visible GPU.

    ## What it checks
    flash-attn against the compute capability of each visible GPU: it needs 8.0 (Ampere).

    ## Why it matters
    `attn_implementation="flash_attention_2"` loads, and the first step fails: "FlashAttention only supports Ampere GPUs or
    newer".

    ## Example
    `info VLM322 flash-attn 2.8.3 does not run on GPU 0: it needs compute capability 8.0.`

    ## What to do
    `attn_implementation="sdpa"`.

    ## When it is fine
    Where flash-attention is not asked for: it is only mentioned.

    ## Sources
    flash-attention, README; nvmlDeviceGetCudaComputeCapability.
    """
    libraries = facts.machine.libraries
    version = libraries.version("flash-attn") if libraries is not None else None
    if version is None:
        return skipped("flash-attn is not installed")
    old = [gpu for gpu in facts.visible if (gpu.compute_capability or _ATTENTION) < _ATTENTION]
    if not old:
        return ()
    return (
        found(
            "info",
            f"flash-attn {plain(version)} does not run on {names(old)}: it needs compute capability 8.0.",
            evidence=facts.evidence(*(facts.path(gpu, "compute_capability") for gpu in old[:4])),
            fix=Fix(text='Load with attn_implementation="sdpa".'),
            gpus=old,
        ),
    )


CHECKS = (
    Check(
        code="VLM319",
        title="image or video packages missing",
        run=image_packages,
        needs=("gpus", "libraries"),
        explained_by=("VLM301", "VLM302", "VLM308"),
    ),
    Check(code="VLM320", title="version with a known defect", run=known_defects, needs=("gpus", "libraries")),
    Check(
        code="VLM322",
        title="flash-attn newer than a GPU",
        run=attention_too_new,
        needs=("gpus[].compute_capability", "libraries"),
    ),
)
