"""5xx, third part: limits of this process, and places where files go."""

from __future__ import annotations

import re

from ..findings import Fix
from ..units import GIB, MIB, format_gib
from ._check import Check, Facts, Result, found, label, names, plain, skipped
from ._remedy import ROOMY, largest_last, shell_path, start_anew

_TASKS = 256
"""A few times what torch starts: one thread a processor for itself and as many for each data loader."""
_TMP_BYTES, _TMP_LITTLE_BYTES = 128 * MIB, GIB
"""Compilers of kernels (triton, torch.compile) write there, and pip unpacks there."""
_SLOW_FILESYSTEMS = ("9p", "cifs", "drvfs", "fuse.gcsfuse", "fuse.s3fs", "fuse.sshfs", "nfs", "nfs4", "smb3", "v9fs")
_OLD_KERNEL = (5, 5)
"""Below this accelerate warns that processes can hang. Source: accelerate, `utils/other.py`, check_os_kernel."""


def drives_display(facts: Facts) -> Result:
    """A visible GPU drives a display.

    ## What it checks
    Whether a display is active on a visible GPU, while others have none.

    ## Why it matters
    Desktop and browser take memory that comes and goes, and a long kernel makes the screen stutter.

    ## Example
    `info VLM506 GPU 0 (NVIDIA GeForce RTX 4090) drives a display: leave it some memory.`

    ## What to do
    Nothing, or plan with more headroom (`--headroom`).

    ## When it is fine
    Always: it is only mentioned.

    ## Sources
    nvmlDeviceGetDisplayActive.
    """
    shown = [gpu for gpu in facts.visible if gpu.display_active]
    if not shown:
        return ()
    whose = label(shown[0]) if len(shown) == 1 else names(shown)
    verb, them = ("drives", "it") if len(shown) == 1 else ("drive", "them")
    return (
        found(
            "info",
            f"{whose} {verb} a display: leave {them} some memory.",
            evidence=facts.evidence(*(facts.path(gpu, "display_active") for gpu in shown[:4])),
            gpus=shown,
        ),
    )


def process_limits(facts: Facts) -> Result:
    """This process is not allowed enough address space or threads.

    ## What it checks
    `ulimit -v`, and how many processes and threads the control group still allows.

    ## Why it matters
    CUDA reserves addresses for all memory of all GPUs and of the host: with a limit it fails with "out of memory" while
    the GPUs are empty. Without threads left, torch and data loaders die with "can't start new thread".

    ## Example
    `warning VLM507 This process may use 64.0 GiB of addresses (ulimit -v), and CUDA reserves more than 180.0 GiB.`

    ## What to do
    `ulimit -v unlimited`; for threads raise `pids.max` (docker: `--pids-limit`).

    ## When it is fine
    Where no GPU is used.

    ## Sources
    getrlimit(2), `pids.max` and `pids.current`; CUDA programming guide, unified virtual address space.
    """
    host = facts.machine.host
    space, left = (host.address_space_limit_bytes, host.tasks_left) if host is not None else (None, None)
    findings = []
    reserved = sum(gpu.memory_total_bytes or 0 for gpu in facts.visible) + ((host and host.memory_total_bytes) or 0)
    if space is not None and space < reserved:
        findings.append(
            found(
                "warning",
                f"This process may use {format_gib(space)} of addresses (ulimit -v), and CUDA reserves more than "
                f"{format_gib(reserved)}.",
                cause="CUDA gives all memory of GPUs and host one range of addresses.",
                evidence=facts.evidence("host.address_space_limit_bytes", "host.memory_total_bytes"),
                fix=Fix(
                    text="Lift the limit; where it is a hard one, ask the administrator.", commands=("ulimit -v unlimited",)
                ),
            )
        )
    if left is not None and left < _TASKS:
        findings.append(
            found(
                "warning",
                f"This process may start {left} more processes and threads.",
                cause="The control group of the container or job limits them (pids.max).",
                evidence=facts.evidence("host.tasks_left"),
                fix=start_anew(facts, "Raise the limit of the container.", "--pids-limit=-1")
                if facts.container is not None
                else Fix(
                    text="Raise TasksMax of the user's slice, or ask the scheduler.",
                    commands=('sudo systemctl set-property "user-$(id -u).slice" TasksMax=infinity',),
                    who="administrator",
                ),
            )
        )
    return tuple(findings)


def little_tmp(facts: Facts) -> Result:
    """There is little room for temporary files.

    ## What it checks
    Free space of the folder for temporary files.

    ## Why it matters
    torch.compile and triton put kernels there, pip unpacks wheels there: both fail with "No space left on device".

    ## Example
    `warning VLM508 /tmp has 12 MiB of free disk space.`

    ## What to do
    Clean it, or `export TMPDIR=…`.

    ## When it is fine
    Where nothing is compiled or installed: up to 1 GiB it is only mentioned.

    ## Sources
    statvfs of TMPDIR, or of /tmp.
    """
    host = facts.machine.host
    free = host.tmp_free_bytes if host is not None else None
    if free is None or free >= _TMP_LITTLE_BYTES:
        return ()
    where = plain((host.tmp if host is not None else None) or "/tmp")
    return (
        found(
            "warning" if free < _TMP_BYTES else "info",
            f"{where} has {format_gib(free)} of free disk space.",
            evidence=facts.evidence("host.tmp_free_bytes", "host.tmp"),
            fix=Fix(
                text=f"Clean {where} (largest last), or use another folder ({ROOMY} stands for yours).",
                commands=(largest_last(where), f"export TMPDIR={ROOMY}"),
            ),
        ),
    )


def cache_not_writable(facts: Facts) -> Result:
    """Checkpoints cannot be stored where they would be downloaded to.

    ## What it checks
    Whether this user may write into the Hugging Face cache, or into the nearest folder above it that exists.

    ## Why it matters
    A download fails with "Permission denied"; a lock file that cannot be made stops even a load from the cache.

    ## Example
    `warning VLM509 This user may not write into the checkpoint cache /data/hub.`

    ## What to do
    Correct the permissions, or `export HF_HUB_CACHE=…`.

    ## When it is fine
    With HF_HUB_OFFLINE and a cache that others fill: it is only mentioned.

    ## Sources
    access(2) of HF_HUB_CACHE; huggingface_hub, environment variables.
    """
    host = facts.machine.host
    if host is None or host.hf_cache_is_writable is not False:
        return ()
    is_offline = facts.machine.environment.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    where = facts.evidence("host.hf_cache")["host.hf_cache"]
    return (
        found(
            "info" if is_offline else "warning",
            f"This user may not write into the checkpoint cache {where}.",
            evidence=facts.evidence("host.hf_cache_is_writable", "host.hf_cache"),
            fix=Fix(
                text=f"Make the cache yours, or use another folder ({ROOMY} stands for it).",
                commands=(f'sudo chown -R "$(id -un)" {shell_path(where)}', f"export HF_HUB_CACHE={ROOMY}")
                if where.startswith("~/")
                else (f"ls -ld {shell_path(where)}", f"export HF_HUB_CACHE={ROOMY}"),
            ),
        ),
    )


def cache_on_slow_disk(facts: Facts) -> Result:
    """Checkpoints are kept on a network disk, or in memory.

    ## What it checks
    The type of the file system that holds the Hugging Face cache.

    ## Why it matters
    Weights are read by mapping files into memory: over a network, or from a disk of Windows inside WSL2, that takes many
    times longer. In a tmpfs they take the host's memory for as long as they lie there.

    ## Example
    `info VLM510 The checkpoint cache ~/.cache/huggingface/hub is on a network disk (nfs4): loading takes longer.`

    ## What to do
    Copy what you use to a local disk and set HF_HUB_CACHE.

    ## When it is fine
    Always: it is only mentioned.

    ## Sources
    `/proc/self/mounts`; safetensors, memory mapping.
    """
    host = facts.machine.host
    kind = host.hf_cache_filesystem if host is not None else None
    if kind in _SLOW_FILESYSTEMS:
        says = f"is on a network disk ({plain(kind)}): loading takes longer"
    elif kind in ("ramfs", "tmpfs"):
        says = f"is in memory ({plain(kind)}): it takes from what the host has"
    else:
        return ()
    where = facts.evidence("host.hf_cache")["host.hf_cache"]
    return (
        found(
            "info",
            f"The checkpoint cache {where} {says}.",
            evidence=facts.evidence("host.hf_cache_filesystem", "host.hf_cache"),
            fix=Fix(
                text=f"Keep what you use on a local disk ({ROOMY} stands for a folder there).",
                commands=(f"export HF_HUB_CACHE={ROOMY}",),
            ),
        ),
    )


def old_kernel(facts: Facts) -> Result:
    """The Linux kernel is so old that several processes can hang.

    ## What it checks
    The kernel's version, with several visible GPUs.

    ## Why it matters
    accelerate warns of hanging processes below 5.5.

    ## Example
    `info VLM512 Linux 4.18.0-553.el8 is older than 5.5: accelerate warns that several processes can hang on it.`

    ## What to do
    Update the operating system.

    ## When it is fine
    Distributions that carry fixes back (RHEL 8) mostly work: it is only mentioned.

    ## Sources
    uname(2); accelerate, `check_os_kernel`.
    """
    host = facts.machine.host
    match = re.match(r"([0-9]{1,3})\.([0-9]{1,3})", host.kernel, re.ASCII) if host is not None else None
    if host is None or match is None:
        return skipped("the kernel's version is not known")
    if len(facts.visible) < 2 or (int(match[1]), int(match[2])) >= _OLD_KERNEL:
        return ()
    return (
        found(
            "info",
            f"Linux {plain(host.kernel)} is older than 5.5: accelerate warns that several processes can hang on it.",
            evidence=facts.evidence("host.kernel"),
            fix=Fix(text="Update the operating system.", who="administrator"),
        ),
    )


CHECKS = (
    Check(code="VLM506", title="GPU drives a display", run=drives_display, needs=("gpus[].display_active",)),
    Check(code="VLM507", title="process limits", run=process_limits, needs=("gpus", "host")),
    Check(
        code="VLM508",
        title="little room for temporary files",
        run=little_tmp,
        needs=("gpus", "host.tmp_free_bytes"),
        told_by=("VLM505",),
    ),
    Check(
        code="VLM509",
        title="checkpoint cache not writable",
        run=cache_not_writable,
        needs=("gpus", "host.hf_cache_is_writable"),
    ),
    Check(
        code="VLM510",
        title="checkpoint cache on a slow disk",
        run=cache_on_slow_disk,
        needs=("gpus", "host.hf_cache_filesystem"),
    ),
    Check(code="VLM512", title="old kernel", run=old_kernel, needs=("gpus", "host")),
)
