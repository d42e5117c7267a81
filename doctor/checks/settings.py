"""3xx about variables: do they still do what they were set for?"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Literal

from ..findings import Finding, Fix, Severity
from ..visibility import quote
from ._check import Check, Facts, Result, found, plain, skipped
from ._remedy import without_folders

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")
_SWITCHES: tuple[tuple[str, Literal["warning", "info"], str], ...] = (
    ("ACCELERATE_USE_CPU", "warning", "accelerate ignores the GPUs"),
    ("CUDA_DISABLE_PTX_JIT", "info", "kernels that were not built for a GPU cannot be made for it"),
    ("CUDA_FORCE_PTX_JIT", "info", "every kernel is made anew, which takes minutes"),
    ("CUDA_LAUNCH_BLOCKING", "info", "every kernel is waited for, which is slow and hides what overlaps"),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "warning", "torch asks the driver for each tensor: slow, and plans do not hold"),
    ("TORCH_USE_CUDA_DSA", "info", "kernels check themselves, which is slow"),
)
"""Switches for finding faults, and what they do when they are left on. Sources: torch, environment variables; CUDA
programming guide, environment variables; accelerate, environment variables."""
_WRONG_VERSION = ("undefined symbol", "not found (required by", "version incompatib")
"""What the loader, and torch of cuDNN, say of a library of another version. Sources: glibc, elf/dl-lookup.c and
dl-version.c; pytorch, aten/src/ATen/cuda/detail/CUDAHooks.cpp. That a library cannot be found is another fault."""
_PRESENCE_COUNTS = ("PYTORCH_NO_CUDA_MEMORY_CACHING",)
"""Tested for being set, whatever the value. Source: torch, c10/cuda/CUDAAllocatorConfig and CUDACachingAllocator.cpp."""


def left_on(facts: Facts) -> Result:
    """A switch for finding faults was left on.

    ## What it checks
    Variables that make CUDA, torch or accelerate slow, careful or blind to GPUs.

    ## Why it matters
    They stay in a shell profile or a container image after the fault was found, and change times and memory of everything.

    ## Example
    `warning VLM312 ACCELERATE_USE_CPU='true' is set: accelerate ignores the GPUs.`

    ## What to do
    `unset ACCELERATE_USE_CPU`, and take it out of profile or image.

    ## When it is fine
    While you look for a fault.

    ## Sources
    torch, CUDA environment variables; CUDA programming guide, environment variables; accelerate, environment variables.
    """
    environment = facts.machine.environment
    findings = []
    for name, severity, effect in _SWITCHES:
        value = environment.get(name)
        if value is None or (value.strip().lower() in _FALSE and name not in _PRESENCE_COUNTS):
            continue
        findings.append(_switch(facts, name, severity, f"{name}={quote(value)} is set: {effect}."))
    if environment.get("CUDA_MODULE_LOADING", "").strip().upper() == "EAGER":
        message = "CUDA_MODULE_LOADING='EAGER' is set: every kernel is loaded at once, which takes memory of each GPU."
        findings.append(_switch(facts, "CUDA_MODULE_LOADING", "info", message))
    return tuple(findings)


def _switch(facts: Facts, name: str, severity: Severity, message: str) -> Finding:
    fix = Fix(text=f"Unset {name}.", commands=(f"unset {name}",))
    return found(severity, message, evidence=facts.evidence(f"environment.{name}"), fix=fix)


def foreign_libraries(facts: Facts) -> Result:
    """LD_LIBRARY_PATH names CUDA libraries that torch brings itself.

    ## What it checks
    Folders of LD_LIBRARY_PATH for libraries that torch's wheel brings, too: cuDNN, NCCL, cuBLAS, nvJitLink and others.

    ## Why it matters
    When the loader takes the wrong one, torch fails with `undefined symbol: ncclCommRegister`,
    `__nvJitLinkCreate_12_8`, or "cuDNN version incompatibility".

    ## Example
    `error VLM316 torch cannot be imported: LD_LIBRARY_PATH puts /usr/lib64/libcudnn.so.9 before its own library.`

    ## What to do
    `unset LD_LIBRARY_PATH`: torch's wheels need none.

    ## When it is fine
    While torch can be imported, or fails for another reason, it is only mentioned: its own libraries mostly win.

    ## Sources
    Files in the folders of LD_LIBRARY_PATH; pytorch issues 119932 and 152783, NVIDIA/nccl issue 1180.
    """
    libraries = facts.machine.libraries
    others = libraries.foreign_cuda_libraries if libraries is not None else ()
    if not others:
        return ()
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    guilty = _named_in_error(facts, others)
    if guilty is not None:
        message = f"torch cannot be imported: LD_LIBRARY_PATH puts {plain(guilty)} before its own library."
        cause = f"The error is {plain(facts.machine.torch.message or '').rstrip('.')}."
    else:
        message = f"LD_LIBRARY_PATH brings other CUDA libraries than torch's: {plain(', '.join(others[:3]))}{more}."
        cause = "Which of two libraries of one name is loaded depends on the order of folders."
    return (
        found(
            "info" if guilty is None else "error",
            message,
            cause=cause,
            evidence=facts.evidence("environment.LD_LIBRARY_PATH", "libraries.foreign_cuda_libraries", "torch.state"),
            fix=Fix(
                text="Take their folders out of LD_LIBRARY_PATH: torch's wheels need none.",
                commands=(_without_foreign(facts, others),),
            ),
        ),
    )


def _without_foreign(facts: Facts, libraries: Sequence[str]) -> str:
    return without_folders(facts, tuple({f"{path.rpartition('/')[0]}/" for path in libraries}))


def _named_in_error(facts: Facts, libraries: Sequence[str]) -> str | None:
    """The foreign library that torch's import error speaks of, by its file or by a symbol of it; ``None`` when none is."""
    torch = facts.machine.torch
    said = (torch.message or "").lower() if torch.state == "failed" else ""
    if not any(sign in said for sign in _WRONG_VERSION):
        return None
    for path in libraries:
        stem = re.match(r"lib([a-z]+)", path.rpartition("/")[2].lower(), re.ASCII)
        if stem is not None and stem[1] in said:
            return path
    return None


def hub_variables(facts: Facts) -> Result:
    """Variables of the Hugging Face libraries have no effect, or keep them off the network.

    ## What it checks
    TRANSFORMERS_CACHE, HF_HUB_ENABLE_HF_TRANSFER, HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE against the installed versions.

    ## Why it matters
    transformers 5 no longer reads TRANSFORMERS_CACHE: checkpoints are downloaded again, into the home directory. Offline,
    a model that is not in the cache cannot be loaded.

    ## Example
    `warning VLM318 transformers 5.23.0 does not read TRANSFORMERS_CACHE: checkpoints go to ~/.cache/huggingface/hub.`

    ## What to do
    `export HF_HUB_CACHE=…` in its place.

    ## When it is fine
    Offline mode is only mentioned.

    ## Sources
    transformers 5, MIGRATION_GUIDE_V5.md; huggingface_hub, environment variables.
    """
    libraries, environment = facts.machine.libraries, facts.machine.environment
    version = libraries.version("transformers") if libraries is not None else None
    if version is None:
        return skipped("transformers is not installed")
    findings = []
    old = environment.get("TRANSFORMERS_CACHE")
    is_replaced = any(name in environment for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))
    if old and not is_replaced and _major(version) >= 5:
        where = facts.evidence("host.hf_cache")["host.hf_cache"]
        message = f"transformers {plain(version)} does not read TRANSFORMERS_CACHE: checkpoints go to {where}."
        fix = Fix(text="Set HF_HUB_CACHE in its place.", commands=(f"export HF_HUB_CACHE={shlex.quote(old[:400])}",))
        evidence = facts.evidence("environment.TRANSFORMERS_CACHE", "host.hf_cache")
        findings.append(found("warning", message, evidence=evidence, fix=fix))
    hub = libraries.version("huggingface-hub") if libraries is not None else None
    if environment.get("HF_HUB_ENABLE_HF_TRANSFER", "").lower() in _TRUE and hub is not None and _major(hub) >= 1:
        message = (
            f"huggingface_hub {plain(hub)} does not use HF_HUB_ENABLE_HF_TRANSFER any more: downloads go through hf_xet."
        )
        evidence = facts.evidence("environment.HF_HUB_ENABLE_HF_TRANSFER")
        fix = Fix(text="Unset HF_HUB_ENABLE_HF_TRANSFER.", commands=("unset HF_HUB_ENABLE_HF_TRANSFER",))
        findings.append(found("info", message, evidence=evidence, fix=fix))
    offline = [n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if environment.get(n, "").lower() in _TRUE]
    if offline:
        message = f"{offline[0]} is set: only checkpoints that are in the cache can be loaded."
        findings.append(found("info", message, evidence=facts.evidence(f"environment.{offline[0]}")))
    return tuple(findings)


def _major(version: str) -> int:
    match = re.match(r"[0-9]{1,4}", version, re.ASCII)
    return int(match[0]) if match else 0


def outside_environment(facts: Facts) -> Result:
    """Packages come from the home directory instead of the virtual environment.

    ## What it checks
    Where torch, transformers and accelerate were found, when Python runs in a virtual environment.

    ## Why it matters
    A package in `~/.local` wins or loses against the environment's by the order of folders: versions then differ from one
    shell to the next, and reinstalling in the environment changes nothing.

    ## Example
    `info VLM317 torch comes from ~/.local/lib/python3.12/site-packages, not from the virtual environment.`

    ## What to do
    `export PYTHONNOUSERSITE=1`, and look at PYTHONPATH.

    ## When it is fine
    Always, as long as the versions are the ones you want: it is only mentioned.

    ## Sources
    Locations in the package metadata; Python documentation, `site`.
    """
    libraries = facts.machine.libraries
    if libraries is None or not libraries.is_virtual_environment:
        return skipped("not in a virtual environment")
    chosen = ("torch", "transformers", "accelerate")
    outside = [p for p in libraries.packages if p.name in chosen and "/.local/lib/python" in (p.location or "")]
    if not outside:
        return ()
    which = ", ".join(package.name for package in outside)
    verb = "comes" if len(outside) == 1 else "come"
    position = libraries.packages.index(outside[0])
    return (
        found(
            "info",
            f"{which} {verb} from {plain(outside[0].location or '')}, not from the virtual environment.",
            evidence=facts.evidence(f"libraries.packages[{position}].location", "libraries.executable"),
            fix=Fix(text="Leave the home directory's packages out.", commands=("export PYTHONNOUSERSITE=1",)),
        ),
    )


CHECKS = (
    Check(code="VLM312", title="switch for finding faults left on", run=left_on, needs=("gpus",)),
    Check(code="VLM316", title="foreign CUDA libraries", run=foreign_libraries, needs=("gpus", "libraries")),
    Check(code="VLM317", title="packages from outside the environment", run=outside_environment, needs=("libraries",)),
    Check(code="VLM318", title="Hugging Face variables without effect", run=hub_variables, needs=("gpus", "libraries")),
)
