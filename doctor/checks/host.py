"""5xx, second half: does the computer around the GPUs have room?"""

from __future__ import annotations

from ..findings import Fix
from ..units import GIB, MIB, format_gib
from ._check import Check, Facts, Result, found, plain
from ._remedy import ROOMY, largest_last, start_anew

_SHM_BYTES = GIB
"""NCCL and data loaders with workers want this much; docker gives 64 MiB. Source: NCCL, Troubleshooting, shared memory."""
_SHM_FREE_BYTES = 64 * MIB
_FAR_BELOW_SHARE = 0.5
_TMP = ("host.tmp_free_bytes", "host.tmp")
_CACHE_BYTES = 20 * GIB
"""Room for one checkpoint of 9 billion parameters in 16 bit (20.6 GB, measured)."""


def small_shm(facts: Facts) -> Result:
    """/dev/shm is too small.

    ## What it checks
    Size and free space of the shared memory file system.

    ## Why it matters
    Data loaders with workers and NCCL exchange data through it: with docker's default of 64 MiB they die with "bus
    error" or hang.

    ## Example
    `warning VLM503 /dev/shm has 64 MiB: data loaders with workers and NCCL want 1.0 GiB or more.`

    ## What to do
    `docker run --shm-size=8g …`; in Kubernetes mount an emptyDir with `medium: Memory`. Full: remove what dead
    processes left (`ls -la /dev/shm`).

    ## When it is fine
    With one GPU and no worker processes: it is only mentioned.

    ## Sources
    statvfs of /dev/shm; NCCL, "Troubleshooting"; docker run reference.
    """
    host = facts.machine.host
    total = host.shm_total_bytes if host is not None else None
    free = host.shm_free_bytes if host is not None else None
    if total is None or (total >= _SHM_BYTES and (free is None or free >= _SHM_FREE_BYTES)):
        return ()
    if total < _SHM_BYTES:
        message = (
            f"/dev/shm has {format_gib(total)}: data loaders with workers and NCCL want {format_gib(_SHM_BYTES)} or more."
        )
    else:
        message = f"/dev/shm is full: {format_gib(free or 0)} of {format_gib(total)} are free."
    if facts.container is not None:
        fix = start_anew(
            facts,
            "Mount an emptyDir with medium: Memory at /dev/shm."
            if facts.container == "kubernetes"
            else "Start the container with more shared memory.",
            "--shm-size=8g",
        )
    else:
        fix = Fix(text="Make /dev/shm larger.", commands=("sudo mount -o remount,size=8G /dev/shm",), who="administrator")
    return (
        found(
            "warning" if len(facts.visible) > 1 else "info",
            message,
            cause="docker's default is 64 MiB." if facts.container is not None else None,
            evidence=facts.evidence("host.shm_total_bytes", "host.shm_free_bytes"),
            fix=fix,
        ),
    )


def memory_limit(facts: Facts) -> Result:
    """The container may use far less memory than the computer has.

    ## What it checks
    The memory limit of the control group against the memory of the host.

    ## Why it matters
    accelerate and many tools read the host's figure, plan to keep weights on the CPU, and the process is killed
    without a traceback when it reaches the limit.

    ## Example
    `warning VLM504 This container may use 16.0 GiB of the host's 251.0 GiB, less than one GPU holds (44.5 GiB).`

    ## What to do
    Raise the limit, or pass `max_memory={"cpu": …}` when weights are to be offloaded. Plans of vlm-doctor place
    nothing on the CPU.

    ## When it is fine
    Where the limit is larger than any GPU: it is only mentioned.

    ## Sources
    memory.max (cgroup v2), memory.limit_in_bytes (v1); vllm issue 45086.
    """
    host = facts.machine.host
    limit = host.cgroup_limit_bytes if host is not None else None
    total = host.memory_total_bytes if host is not None else None
    if limit is None or total is None or limit >= _FAR_BELOW_SHARE * total:
        return ()
    largest = max((gpu.memory_total_bytes or 0 for gpu in facts.visible), default=0)
    is_tight = limit < largest
    what = "container" if facts.container is not None else "job"
    rest = f", less than one GPU holds ({format_gib(largest)})" if is_tight else ""
    return (
        found(
            "warning" if is_tight else "info",
            f"This {what} may use {format_gib(limit)} of the host's {format_gib(total)}{rest}.",
            cause="accelerate and other tools plan with the host's figure.",
            evidence=facts.evidence("host.cgroup_limit_bytes", "host.memory_total_bytes", "host.memory_available_bytes"),
            fix=start_anew(facts, "Raise the limit (to 64 GiB, for instance), or keep weights off the CPU.", "--memory=64g")
            if facts.container is not None
            else Fix(text="Ask the scheduler for more memory, or keep weights off the CPU."),
        ),
    )


def little_disk(facts: Facts) -> Result:
    """There is little room where checkpoints are kept.

    ## What it checks
    Free space of the file system that holds the Hugging Face cache.

    ## Why it matters
    A download that fills the disk ends half-way; huggingface_hub only warns.

    ## Example
    `warning VLM505 The checkpoint cache ~/.cache/huggingface/hub has 4.2 GiB of free disk space.`

    ## What to do
    Remove what is no longer used (`hf cache --help`), or let `HF_HUB_CACHE` put the cache elsewhere.

    ## When it is fine
    When every checkpoint you need is already there.

    ## Sources
    statvfs of HF_HUB_CACHE; huggingface_hub, environment variables.
    """
    host = facts.machine.host
    free = host.hf_cache_free_bytes if host is not None else None
    if free is None or free >= _CACHE_BYTES:
        return ()
    where = facts.evidence("host.hf_cache")["host.hf_cache"]
    # To the byte the same room is the same disk: VLM508 then has nothing to add.
    has_tmp = host is not None and host.tmp_free_bytes == free
    tmp = f" and {plain((host.tmp if host is not None else None) or '/tmp')}" if has_tmp else ""
    return (
        found(
            "warning",
            f"The checkpoint cache {where}{tmp} {'have' if has_tmp else 'has'} {format_gib(free)} of free disk space"
            f"{', on one disk' if has_tmp else ''}.",
            evidence=facts.evidence("host.hf_cache_free_bytes", "host.hf_cache", *_TMP[: 2 * has_tmp]),
            fix=Fix(
                text=f"Remove what is no longer used (largest last), or move the cache ({ROOMY} stands for yours).",
                commands=(largest_last(where), f"export HF_HUB_CACHE={ROOMY}"),
            ),
        ),
    )


CHECKS = (
    Check(code="VLM503", title="/dev/shm too small", run=small_shm, needs=("gpus", "host.shm_total_bytes")),
    Check(
        code="VLM504", title="memory limit far below the host", run=memory_limit, needs=("gpus", "host.memory_total_bytes")
    ),
    Check(
        code="VLM505",
        title="little disk space for checkpoints",
        run=little_disk,
        needs=("gpus", "host.hf_cache_free_bytes"),
    ),
)
