"""3xx about torch's memory allocator: is what was set for it read?"""

from __future__ import annotations

import re
import shlex

from ..findings import Finding, Fix
from ..likeness import nearest
from ..visibility import quote
from ._check import Check, Facts, Result, found, skipped

_OLD_NAME, _NEW_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
_READS_NEW_NAME = "2.10"
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
    old_torch = _torch_before(facts, _READS_NEW_NAME)
    kept = _NEW_NAME if _NEW_NAME in given and old_torch is None else _OLD_NAME
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
        message = f"torch {old_torch} does not use {_NEW_NAME}, only {_OLD_NAME}"
        text = "Set the name that this torch reads."
    else:
        return None
    value = next((good for name in (kept, *others) if (good := _repaired(given.get(name, "")))), None)
    commands = [f"unset {name}" for name in (others if kept in given else ())]
    commands.append(f"unset {kept}" if value is None else f"export {kept}={shlex.quote(value)}")
    evidence = facts.evidence(f"environment.{_OLD_NAME}", f"environment.{_NEW_NAME}", "libraries.torch_build.version")
    return found("warning", f"{message}.", evidence=evidence, fix=Fix(text=text, commands=tuple(commands)))


def _torch_before(facts: Facts, release: str) -> str | None:
    """Version of the installed torch where it is older than a release; a build of that counts as the release."""
    from packaging.version import InvalidVersion, Version

    libraries = facts.machine.libraries
    build = libraries.torch_build if libraries is not None else None
    try:
        version = Version(Version(build.version).public) if build is not None else None
    except InvalidVersion:
        return None
    return str(version) if version is not None and version < Version(release) else None


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


CHECKS = (Check(code="VLM311", title="allocator settings not read", run=allocator_settings, needs=("gpus",)),)
