"""3xx about what goes with torch: is it built for the same torch and the same CUDA?"""

from __future__ import annotations

import re

from ..findings import Finding, Fix
from ..machine import Libraries, TorchBuild
from ._check import Check, Facts, Result, found, plain, skipped
from ._remedy import pip
from ._wheels import COMPANIONS, index_of
from .libraries import is_violated

_ABSENT = "torch is not installed"
_FOR_CUDA = re.compile(r"\+cu(?P<cuda>\d{2,3})$", re.ASCII)
"""Local version of wheels of the torch project and of xformers: ``0.28.0+cu130``."""
_FOR_TORCH = re.compile(r"\+cu\d+torch(?P<torch>\d+\.\d+)", re.ASCII)
"""Local version of flash-attn's wheels: ``2.8.3+cu12torch2.7cxx11abiTRUE``."""
_RUNTIMES = ("nvidia-cudnn", "nvidia-nccl")
"""Wheels whose cu12 and cu13 forms put files of the same names into one folder (``nvidia/cudnn/lib`` …)."""


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
    findings += [_companion(facts, libraries, build, name) for name in sorted(COMPANIONS)]
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
            text='Remove flash-attn (transformers then uses attn_implementation="sdpa"), or build it anew.',
            commands=(pip(facts, "uninstall", "flash-attn"),),
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
    index = index_of(build)
    where = ("--index-url", index) if index is not None else ()
    # The same release: without --no-deps pip would take torch along, and another release is made for another torch.
    command = pip(facts, "install", "--force-reinstall", "--no-deps", f"{name}=={version.partition('+')[0]}", *where)
    return found(
        "warning",
        f"{name} {plain(version)} was built for {kind}, and torch {plain(build.version)} for CUDA {plain(build.cuda)}.",
        cause="They were installed from different indexes.",
        # A release for another torch is VLM309's to say: the same package, and one repair.
        evidence=facts.evidence(*_broken_rules(libraries, name), "libraries.torch_build.cuda")
        | {"libraries.packages": f"{name} {plain(version)}"},
        fix=Fix(text=f"Reinstall {name} from the index of torch.", commands=(command,)),
    )


def _broken_rules(libraries: Libraries, name: str) -> list[str]:
    """Field paths of what a package asks of torch and does not get."""
    rules = enumerate(libraries.rules)
    return [f"libraries.rules[{at}].requirement" for at, r in rules if r.requirer == name and is_violated(libraries, r)]


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
            fix=Fix(text="Install a newer bitsandbytes.", commands=(pip(facts, "install", "--upgrade", "bitsandbytes"),)),
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
                    pip(facts, "uninstall", *(f"{name}-{unused}" for name in both)),
                    pip(facts, "install", "--force-reinstall", "--no-deps", *(_pin(libraries, n, used) for n in both)),
                ),
            ),
        ),
    )


def _pin(libraries: Libraries, name: str, kind: str) -> str:
    return f"{name}-{kind}=={libraries.version(f'{name}-{kind}')}"


_NO_TORCH = ("VLM301", "VLM302")

CHECKS = (
    Check(
        code="VLM313",
        title="built for another torch or CUDA",
        run=built_for_another,
        needs=("gpus", "libraries"),
        explained_by=(*_NO_TORCH, "VLM303"),
        told_by=("VLM309",),
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
)
