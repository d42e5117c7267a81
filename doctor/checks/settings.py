"""3xx about variables: do they still do what they were set for?"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Literal

from packaging.version import InvalidVersion, Version

from ..findings import Finding, Fix, Severity
from ..likeness import nearest
from ..visibility import quote
from ._check import Check, Facts, Result, found, plain, skipped
from ._remedy import without_folders

_OLD_NAME, _NEW_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
_READS_NEW_NAME = Version("2.10")
"""torch 2.9.1 ignores the new name for CUDA, older ones do not know it. Source: pytorch issue 183387."""
_OPTIONS = frozenset(
    {
        "backend",
        "expandable_segments",
        "garbage_collection_threshold",
        "graph_capture_record_stream_reuse",
        "large_segment_size_mb",
        "max_non_split_rounding_mb",
        "max_split_size_mb",
        "per_process_memory_fraction",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "roundup_power2_divisions",
        "throw_on_cudamalloc_oom",
    }
)
"""Options of torch's caching allocators. Source: torch 2.13, notes on CUDA semantics, and the names in its libraries."""
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


def allocator_settings(facts: Facts) -> Result:
    """Settings of torch's memory allocator are not read, or refused.

    ## What it checks
    PYTORCH_CUDA_ALLOC_CONF and its successor PYTORCH_ALLOC_CONF: which of them the installed torch reads, whether they
    disagree, and whether torch knows each option.

    ## Why it matters
    torch 2.9 says that the old name is deprecated, and ignores the new one: expandable segments are then off, and long
    prompts run out of memory. An option that torch does not know is an error at the first use of a GPU.

    ## Example
    `warning VLM311 torch 2.9.1 does not use PYTORCH_ALLOC_CONF, only PYTORCH_CUDA_ALLOC_CONF.`

    ## What to do
    Set the value that the finding gives.

    ## When it is fine
    The old name works up to and with torch 2.13.

    ## Sources
    torch, notes on CUDA semantics (memory management); pytorch issue 183387.
    """
    environment = facts.machine.environment
    old, new = environment.get(_OLD_NAME), environment.get(_NEW_NAME)
    if old is None and new is None:
        return skipped("not set")
    finding = _allocator(facts, {name: value for name, value in ((_OLD_NAME, old), (_NEW_NAME, new)) if value is not None})
    return () if finding is None else (finding,)


def _allocator(facts: Facts, given: dict[str, str]) -> Finding | None:
    """One finding for both variables: two pieces of advice would contradict each other."""
    version = _torch_version(facts)
    is_old_torch = version is not None and version < _READS_NEW_NAME
    kept = _NEW_NAME if _NEW_NAME in given and not is_old_torch else _OLD_NAME
    others = [name for name in given if name != kept]
    differ = len(given) > 1 and len({*map(_normal, given.values())}) > 1
    wrong = next(((name, option) for name, value in given.items() if (option := _unknown_option(value)) is not None), None)
    both = f"{_OLD_NAME} and {_NEW_NAME}"
    if wrong is not None:
        name, option = wrong
        shown = f"{both if others and not differ else name}={quote(given[name])}"
        tail = f"; {both} differ" if differ else ""
        message = f"{shown}: torch knows no option {quote(option)}, and fails at the first use of a GPU{tail}"
        text = f"Write option:value, with commas between{', in one of the variables' if others else ''}."
    elif differ:
        message, text = f"{both} have different values", "Keep one of them."
    elif kept not in given:
        message = f"torch {version} does not use {_NEW_NAME}, only {_OLD_NAME}"
        text = "Set the name that this torch reads."
    else:
        return None
    value = next((good for name in (kept, *others) if (good := _repaired(given.get(name, "")))), None)
    commands = [f"unset {name}" for name in (others if kept in given else ())]
    commands.append(f"unset {kept}" if value is None else f"export {kept}={shlex.quote(value)}")
    evidence = facts.evidence(f"environment.{_OLD_NAME}", f"environment.{_NEW_NAME}", "libraries.torch_build.version")
    return found("warning", f"{message}.", evidence=evidence, fix=Fix(text=text, commands=tuple(commands)))


def _torch_version(facts: Facts) -> Version | None:
    libraries = facts.machine.libraries
    build = libraries.torch_build if libraries is not None else None
    try:
        return Version(Version(build.version).public) if build is not None else None
    except InvalidVersion:
        return None


def _unknown_option(value: str) -> str | None:
    # Lists in brackets have colons and commas of their own: roundup_power2_divisions:[256:1,512:2].
    for part in re.sub(r"\[[^\]]*\]", "", value[:4096]).split(","):
        name = part.partition(":")[0].strip()
        if part.strip() and name not in _OPTIONS:
            return name[:100]
    return None


def _repaired(value: str) -> str:
    """The options that torch knows, or that were plainly meant, each as option:value; empty when there is none."""
    kept = []
    for part in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", value[:400]):
        match = re.fullmatch(r"\s*([A-Za-z0-9_-]+)\s*[:=]\s*(.*\S)\s*", part, re.ASCII)
        if match is None:
            continue
        name = match[1].lower().replace("-", "_")
        meant = [name] if name in _OPTIONS else nearest(name, _OPTIONS, most=1, cutoff=0.8)
        kept += [f"{one}:{match[2]}" for one in meant]
    return ",".join(kept)


def _normal(value: str) -> str:
    return ",".join(sorted("".join(value[:4096].split()).lower().split(",")))


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
    fix = Fix(text="Unset it.", commands=(f"unset {name}",))
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
            fix=Fix(text="Take these folders out: torch's wheels need none.", commands=(_without_foreign(facts, others),)),
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
        fix = Fix(text="Set its successor.", commands=(f"export HF_HUB_CACHE={shlex.quote(old[:400])}",))
        evidence = facts.evidence("environment.TRANSFORMERS_CACHE", "host.hf_cache")
        findings.append(found("warning", message, evidence=evidence, fix=fix))
    hub = libraries.version("huggingface-hub") if libraries is not None else None
    if environment.get("HF_HUB_ENABLE_HF_TRANSFER", "").lower() in _TRUE and hub is not None and _major(hub) >= 1:
        message = (
            f"huggingface_hub {plain(hub)} does not use HF_HUB_ENABLE_HF_TRANSFER any more: downloads go through hf_xet."
        )
        evidence = facts.evidence("environment.HF_HUB_ENABLE_HF_TRANSFER")
        fix = Fix(text="Unset it.", commands=("unset HF_HUB_ENABLE_HF_TRANSFER",))
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
    Check(code="VLM311", title="allocator settings not read", run=allocator_settings, needs=("gpus",)),
    Check(code="VLM312", title="switch for finding faults left on", run=left_on, needs=("gpus",)),
    Check(code="VLM316", title="foreign CUDA libraries", run=foreign_libraries, needs=("gpus", "libraries")),
    Check(code="VLM317", title="packages from outside the environment", run=outside_environment, needs=("libraries",)),
    Check(code="VLM318", title="Hugging Face variables without effect", run=hub_variables, needs=("gpus", "libraries")),
)
