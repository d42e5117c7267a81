"""Error texts of NCCL and of torch.distributed."""

from __future__ import annotations

from .known_texts import KnownText

TEXTS: tuple[KnownText, ...] = (
    KnownText(
        name="nccl-duplicate-gpu",
        code="VLM044",
        anchors=("duplicate gpu detected",),
        pattern=r"Duplicate GPU detected : rank (?P<rank_a>\d{1,5}) and rank (?P<rank_b>\d{1,5}) both on CUDA device "
        r"(?P<device>\w{1,12})",
        example="ncclInvalidUsage: This usually reflects invalid usage of NCCL library. Last error: Duplicate GPU "
        "detected : rank 1 "
        "and rank 0 both on CUDA device 1000",
        says="Two ranks use the same GPU.",
        fix="Give each rank its own: torch.cuda.set_device(int(os.environ['LOCAL_RANK'])) before anything else.",
        verify="torchrun --nproc-per-node=2 YOUR_PROGRAM",
        checks=("VLM201", "VLM202", "VLM203", "VLM407"),
        source="NCCL, init.cc; PyTorch, distributed tutorial",
    ),
    KnownText(
        name="nccl-no-interface",
        code="VLM043",
        anchors=("no socket interface found", "no interface found"),
        pattern=r"no socket interface found|No interface found (?:starting with|matching|in the list)",
        example="NCCL WARN Bootstrap : no socket interface found",
        says="NCCL_SOCKET_IFNAME names a network interface that this machine does not have.",
        fix="Unset it, or name an interface that exists; look also in /etc/nccl.conf and ~/.nccl.conf.",
        commands=("ip -br link", "unset NCCL_SOCKET_IFNAME", "cat /etc/nccl.conf ~/.nccl.conf"),
        verify="NCCL_DEBUG=INFO torchrun --nproc-per-node=2 YOUR_PROGRAM",
        checks=("VLM407",),
        source="NCCL, environment variables",
    ),
    KnownText(
        name="nccl-cuda-failure",
        code="VLM043",
        anchors=("nccl warn",),
        pattern=r"NCCL WARN Cuda failure (?:\d{1,4} )?'?(?P<cuda_error>[^'\n]{1,60})",
        example="NCCL WARN Cuda failure 'out of memory'",
        says="A CUDA call inside NCCL failed.",
        fix="Look at the CUDA error it names; free memory or start NCCL before the model is loaded.",
        verify="NCCL_DEBUG=INFO torchrun --nproc-per-node=2 YOUR_PROGRAM",
        checks=("VLM501", "VLM502", "VLM404", "VLM403", "VLM407"),
        source="NCCL, checks.h",
        rank="symptom",
    ),
    KnownText(
        name="nccl-connection",
        code="VLM043",
        anchors=(
            "call to connect",
            "connection refused",
            "socketstartconnect",
            "connection reset by peer",
            "connection closed by",
        ),
        pattern=r"(?:NCCL|nccl)[^\n]{0,120}Connection refused|socketStartConnect|Call to connect (?:to|returned)"
        r"|(?:NCCL|nccl)[^\n]{0,120}Connection (?:reset by peer|closed by)",
        example="NCCL WARN socketStartConnect: Connect to 172.17.0.2<43211> failed : Connection refused",
        says="A rank cannot reach another: it has died, or the network between them is not the one NCCL chose.",
        fix="Look for the rank that failed first; on one machine, try NCCL_SOCKET_IFNAME=lo.",
        commands=("NCCL_DEBUG=INFO NCCL_SOCKET_IFNAME=lo torchrun --nproc-per-node=2 YOUR_PROGRAM",),
        verify="NCCL_DEBUG=INFO torchrun --nproc-per-node=2 YOUR_PROGRAM",
        checks=("VLM407",),
        source="NCCL, socket.cc; NCCL troubleshooting",
        rank="consequence",
    ),
    KnownText(
        name="nccl-timeout",
        code="VLM045",
        anchors=(
            "watchdog caught collective operation timeout",
            "collective operation timeout",
            "nccl communicator was aborted",
        ),
        pattern=r"[Cc]ollective operation timeout(?:: WorkNCCL\((?P<work>[^)\n]{1,120}))?|NCCL communicator was aborted",
        example="[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE, NumelIn=1, "
        "NumelOut=1, Timeout(ms)=600000) ran for 600012 milliseconds before timing out.",
        says="Ranks waited for each other in vain: one failed or left the path, or copies between the GPUs hang.",
        fix="Look for the rank that stopped first; then try without peer copies.",
        commands=("NCCL_P2P_DISABLE=1 torchrun --nproc-per-node=2 YOUR_PROGRAM",),
        verify="NCCL_P2P_DISABLE=1 torchrun --nproc-per-node=2 YOUR_PROGRAM",
        checks=("VLM404", "VLM402", "VLM403", "VLM407"),
        source="torch, ProcessGroupNCCL.cpp; club-3090 #902, nccl #2335",
        rank="symptom",
    ),
    KnownText(
        name="nccl-remote-died",
        code="VLM045",
        anchors=("ncclremoteerror", "remote process exited"),
        pattern=r"ncclRemoteError|remote process exited or there was a network error",
        example="torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2021, remote process exited "
        "or there was a "
        "network error, NCCL version 2.21.5",
        says="Another rank has died; its error is the cause.",
        fix="Look for the first error of another rank.",
        commands=("torchrun --tee 3 --log-dir logs --nproc-per-node=2 YOUR_PROGRAM",),
        verify="torchrun --nproc-per-node=2 YOUR_PROGRAM",
        checks=("VLM407",),
        source="NCCL, ncclResult_t",
        rank="consequence",
    ),
    KnownText(
        name="nccl-error",
        code="VLM043",
        anchors=(
            "unhandled system error",
            "unhandled cuda error",
            "ncclinternalerror",
            "ncclsystemerror",
            "ncclunhandledcudaerror",
        ),
        pattern=r"unhandled (?:system|cuda) error|ncclInternalError|ncclSystemError|ncclUnhandledCudaError",
        example="torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled system error "
        "(run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.21.5",
        says="NCCL failed, and its own log names the reason: shared memory, the network or a CUDA error.",
        fix="Run it once with NCCL_DEBUG=INFO and look for the first line with WARN.",
        commands=("NCCL_DEBUG=INFO torchrun --nproc-per-node=2 YOUR_PROGRAM 2>&1 | grep -m3 WARN",),
        verify="NCCL_DEBUG=INFO torchrun --nproc-per-node=2 YOUR_PROGRAM",
        checks=("VLM503", "VLM404", "VLM402", "VLM403", "VLM407"),
        source="NCCL troubleshooting",
        rank="symptom",
    ),
    KnownText(
        name="rank-failed",
        code="VLM045",
        anchors=("childfailederror", "failed (exitcode", "root cause"),
        pattern=r"ChildFailedError|failed \(exitcode: *(?P<exit_code>-?\d{1,4})\)"
        r"|Root Cause \(first observed failure\)|See root cause above",
        example="torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
        says="The launcher reports that a rank or engine failed; its own error is the cause.",
        fix="Read the traceback of the rank that it names as the first.",
        commands=("torchrun --tee 3 --log-dir logs --nproc-per-node=2 YOUR_PROGRAM",),
        verify="torchrun --nproc-per-node=2 YOUR_PROGRAM",
        source="torch.distributed.elastic, errors",
        rank="consequence",
    ),
)
