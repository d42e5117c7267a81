"""3xx about what goes with torch: built for the same torch and CUDA, complete, and without known defects?"""

from __future__ import annotations

import re
import shlex

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ..data.known_defects import KNOWN_DEFECTS, KnownDefect
from ..findings import Finding, Fix
from ..machine import Libraries, TorchBuild
from ._check import Check, Facts, Result, found, names, plain, skipped, unknown
from .torch_build import torch_command

_ABSENT = "torch is not installed"
_FOR_CUDA = re.compile(r"\+cu(?P<cuda>\d{2,3})$", re.ASCII)
"""Local version of wheels of the torch project and of xformers: ``0.28.0+cu130``."""
_FOR_TORCH = re.compile(r"\+cu\d+torch(?P<torch>\d+\.\d+)", re.ASCII)
"""Local version of flash-attn's wheels: ``2.8.3+cu12torch2.7cxx11abiTRUE``."""
_OF_TORCH_PROJECT = ("torchaudio", "torchcodec", "torchvision", "xformers")
_ATTENTION = (8, 0)
"""What FlashAttention-2 needs. Source: flash-attention, README, "NVIDIA CUDA Support" (Ampere and newer)."""
_RUNTIMES = ("nvidia-cudnn", "nvidia-nccl")
"""Wheels whose cu12 and cu13 forms put files of the same names into one folder (``nvidia/cudnn/lib`` …)."""
_VIDEO = ("av", "decord", "torchcodec", "qwen-vl-utils")


def built_for_another(facts: Facts) -> Result:
    """A package was built for another torch or another CUDA than the installed one.

    ## What it checks
    The local part of versions (`+cpu`, `+cu126`, `+cu12torch2.7…`) of torchvision, torchaudio, torchcodec, xformers and
    flash-attn against torch. Requirements that they declare are VLM309's.

    ## Why it matters
    Importing them fails with `undefined symbol: _ZN3c10…` or "operator torchvision::nms does not exist", which
    transformers reports as "Failed to import transformers.models…".

    ## Example
    `error VLM313 flash-attn 2.8.3+cu12torch2.7cxx11abiTRUE was built for torch 2.7, and torch 2.13.0+cu130 is installed.`

    ## What to do
    Reinstall the package from the same index as torch, or remove it: transformers then uses torch's own attention.

    ## When it is fine
    Never for flash-attn; a torchvision for the CPU works until an operation on a GPU is asked of it.

    ## Sources
    Versions in the package metadata; flash-attention issue 1717, llama-cookbook issue 710.
    """
    libraries = facts.machine.libraries
    build = libraries.torch_build if libraries is not None else None
    if libraries is None or build is None:
        return skipped(_ABSENT)
    findings = [_flash_attention(facts, libraries, build)]
    findings += [_companion(facts, libraries, build, name) for name in _OF_TORCH_PROJECT]
    return tuple(finding for finding in findings if finding is not None)


def _flash_attention(facts: Facts, libraries: Libraries, build: TorchBuild) -> Finding | None:
    version = libraries.version("flash-attn")
    built = _FOR_TORCH.search(version or "")
    if version is None or built is None or build.version.startswith((f"{built['torch']}.", f"{built['torch']}+")):
        return None
    return found(
        "error",
        f"flash-attn {plain(version)} was built for torch {built['torch']}, and torch {plain(build.version)} is installed.",
        cause="Its library is bound to the C++ interface of one torch.",
        evidence=facts.evidence("libraries.torch_build.version") | {"libraries.packages": f"flash-attn {plain(version)}"},
        fix=Fix(
            text='Remove it (transformers then uses attn_implementation="sdpa"), or build it anew.',
            commands=("python -m pip uninstall -y flash-attn",),
        ),
    )


def _companion(facts: Facts, libraries: Libraries, build: TorchBuild, name: str) -> Finding | None:
    version = libraries.version(name)
    if version is None or build.cuda is None:
        return None
    cuda = _FOR_CUDA.search(version)
    if cuda is None and not version.endswith("+cpu"):
        return None
    if cuda is not None and cuda["cuda"] == build.cuda.replace(".", ""):
        return None
    kind = "the CPU only" if cuda is None else f"CUDA {cuda['cuda'][:-1]}.{cuda['cuda'][-1]}"
    index = torch_command(facts).partition("--index-url ")[2]
    command = f"python -m pip install --force-reinstall --no-deps {name}" + (f" --index-url {index}" if index else "")
    return found(
        "warning",
        f"{name} {plain(version)} was built for {kind}, and torch {plain(build.version)} for CUDA {plain(build.cuda)}.",
        cause="They were installed from different indexes.",
        evidence=facts.evidence("libraries.torch_build.cuda") | {"libraries.packages": f"{name} {plain(version)}"},
        fix=Fix(text="Reinstall it from the index of torch.", commands=(command,)),
    )


def bitsandbytes_without_cuda(facts: Facts) -> Result:
    """The installed bitsandbytes has no library for torch's CUDA.

    ## What it checks
    The files `libbitsandbytes_cudaXXX.so` that bitsandbytes brings, against the CUDA version of torch.

    ## Why it matters
    Loading in 4 or 8 bit fails, or says that bitsandbytes was compiled without GPU support.

    ## Example
    `warning VLM314 bitsandbytes 0.45.0 has no library for CUDA 13.0 (it has 11.8, 12.6).`

    ## What to do
    `python -m pip install --upgrade bitsandbytes`. By hand: `python -m bitsandbytes`.

    ## When it is fine
    Where nothing is loaded in 4 or 8 bit.

    ## Sources
    Files of the package; bitsandbytes, `cextension.py`, which falls back within one major version of CUDA.
    """
    libraries = facts.machine.libraries
    build = libraries.torch_build if libraries is not None else None
    if libraries is None or libraries.bitsandbytes_cuda is None:
        return skipped("bitsandbytes is not installed")
    if build is None or build.cuda is None:
        return skipped("torch has no CUDA")
    major = build.cuda.partition(".")[0]
    if any(version.partition(".")[0] == major for version in libraries.bitsandbytes_cuda):
        return ()
    version = plain(libraries.version("bitsandbytes") or "")
    has = f"it has {', '.join(libraries.bitsandbytes_cuda[:8])}" if libraries.bitsandbytes_cuda else "it has none for CUDA"
    return (
        found(
            "warning",
            f"bitsandbytes {version} has no library for CUDA {plain(build.cuda)} ({has}).",
            evidence=facts.evidence("libraries.bitsandbytes_cuda", "libraries.torch_build.cuda"),
            fix=Fix(text="Install a newer one.", commands=("python -m pip install --upgrade bitsandbytes",)),
        ),
    )


def runtimes_mixed(facts: Facts) -> Result:
    """CUDA libraries for two major versions are installed over each other.

    ## What it checks
    Whether cuDNN or NCCL is installed for CUDA 12 and for CUDA 13.

    ## Why it matters
    Both wheels put files of the same names into one folder: the one that was installed last wins, and torch may load the
    other's.

    ## Example
    `warning VLM315 nvidia-cudnn-cu12 and nvidia-cudnn-cu13 are installed over each other.`

    ## What to do
    Remove the one that torch does not use, and reinstall the other; best in a new environment.

    ## When it is fine
    Never quite: it works by accident.

    ## Sources
    Package metadata; the folders `nvidia/cudnn` and `nvidia/nccl` of both wheels.
    """
    libraries = facts.machine.libraries
    build = libraries.torch_build if libraries is not None else None
    if libraries is None or build is None:
        return skipped(_ABSENT)
    both = [name for name in _RUNTIMES if libraries.version(f"{name}-cu12") and libraries.version(f"{name}-cu13")]
    if not both:
        return ()
    used = "cu12" if (build.cuda or "").startswith("12") else "cu13"
    unused = "cu13" if used == "cu12" else "cu12"
    pairs = "; ".join(f"{name}-cu12 and {name}-cu13" for name in both)
    return (
        found(
            "warning",
            f"{pairs} are installed over each other.",
            cause="Two packages were installed that want different versions of CUDA.",
            evidence=facts.evidence("libraries.torch_build.cuda")
            | {"libraries.packages": ", ".join(f"{name}-cu12, {name}-cu13" for name in both)},
            fix=Fix(
                text="Remove what torch does not use, then reinstall what it does.",
                commands=(
                    f"python -m pip uninstall -y {' '.join(f'{name}-{unused}' for name in both)}",
                    f"python -m pip install --force-reinstall --no-deps {' '.join(_pin(libraries, n, used) for n in both)}",
                ),
            ),
        ),
    )


def _pin(libraries: Libraries, name: str, kind: str) -> str:
    return shlex.quote(f"{name}-{kind}=={libraries.version(f'{name}-{kind}')}")


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
        command = f"python -m pip install {' '.join(missing)}"
        if "torchvision" in missing and "--index-url" in torch_command(facts):
            command += f" --extra-index-url {torch_command(facts).partition('--index-url ')[2]}"
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        findings.append(
            found(
                "warning",
                f"{' and '.join(missing)} {verb} not installed: image processors of transformers need {them}.",
                evidence={"libraries.packages": f"without {', '.join(missing)}"},
                fix=Fix(text="Install what is missing.", commands=(command,)),
            )
        )
    if not any(libraries.version(name) for name in _VIDEO):
        findings.append(
            found(
                "info",
                "No reader of videos is installed (av, torchcodec, decord).",
                evidence={"libraries.packages": f"without {', '.join(_VIDEO)}"},
                fix=Fix(text="Install one if you need videos.", commands=("python -m pip install av",)),
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
    version = libraries.version(defect.package)
    if version is None or not SpecifierSet(defect.versions).contains(Version(version), prereleases=True):
        return False
    cures = [found_ for name in defect.cured_by if (found_ := libraries.version(name)) is not None]
    return not defect.cured_by or (bool(cures) and all(Version(cure) < Version(defect.cured_from) for cure in cures))


def _known(facts: Facts, libraries: Libraries, defect: KnownDefect) -> Finding:
    version = plain(libraries.version(defect.package) or "")
    position = next(at for at, package in enumerate(libraries.packages) if package.name == defect.package)
    return found(
        defect.severity,
        f"{defect.package} {version} {defect.effect}.",
        evidence=facts.evidence(f"libraries.packages[{position}].version"),
        fix=Fix(text="Install a version without it.", commands=(f"python -m pip install {shlex.quote(defect.wanted)}",)),
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


_NO_TORCH = ("VLM301", "VLM302")

CHECKS = (
    Check(
        code="VLM313",
        title="built for another torch or CUDA",
        run=built_for_another,
        needs=("gpus", "libraries"),
        explained_by=(*_NO_TORCH, "VLM303"),
    ),
    Check(
        code="VLM314",
        title="bitsandbytes without torch's CUDA",
        run=bitsandbytes_without_cuda,
        needs=("gpus", "libraries"),
        explained_by=(*_NO_TORCH, "VLM303"),
    ),
    Check(
        code="VLM315",
        title="CUDA libraries of two versions",
        run=runtimes_mixed,
        needs=("gpus", "libraries"),
        explained_by=_NO_TORCH,
    ),
    Check(
        code="VLM319",
        title="image or video packages missing",
        run=image_packages,
        needs=("gpus", "libraries"),
        explained_by=(*_NO_TORCH, "VLM308"),
    ),
    Check(code="VLM320", title="version with a known defect", run=known_defects, needs=("gpus", "libraries")),
    Check(
        code="VLM322",
        title="flash-attn newer than a GPU",
        run=attention_too_new,
        needs=("gpus[].compute_capability", "libraries"),
    ),
)
