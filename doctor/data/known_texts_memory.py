"""Error texts of memory that ran out: of a GPU, of the host, of /dev/shm, of a disk."""

from __future__ import annotations

from .known_texts import KnownText

TEXTS: tuple[KnownText, ...] = (
    KnownText(
        name="gpu-out-of-memory",
        code="VLM010",
        anchors=("out of memory", "cuda_error_out_of_memory", "outofmemoryerror"),
        pattern=r"(?:CUDA|HIP) out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|OutOfMemoryError",
        example="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity "
        "of 23.64 GiB "
        "of which 1.04 GiB is free. Including non-PyTorch memory, this process has 22.59 GiB memory in use. Of the "
        "allocated "
        "memory 21.88 GiB is allocated by PyTorch, and 250.91 MiB is reserved by PyTorch but unallocated.",
        says="A GPU has less free memory than the program asked for.",
        fix="Place the model so that this GPU has room for the largest call, or make the call smaller.",
        commands=("vlm-doctor plan MODEL",),
        verify="vlm-doctor plan MODEL",
        checks=("VLM501", "VLM502"),
        source="torch, CUDACachingAllocator.cpp; pytorch documentation, CUDA semantics, memory management",
    ),
    KnownText(
        name="library-out-of-memory",
        code="VLM010",
        anchors=("cublas_status_alloc_failed", "cublas_status_not_initialized", "cudnn_status_"),
        pattern=r"CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_(?:NOT_INITIALIZED|ALLOC_FAILED)",
        example="RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        says="cuBLAS or cuDNN could not allocate its workspace: the GPU is full.",
        fix="Leave some hundred MiB free on each GPU beside the weights.",
        commands=("vlm-doctor plan MODEL",),
        verify="vlm-doctor plan MODEL",
        checks=("VLM501", "VLM502"),
        source="cuBLAS documentation, cublasStatus_t; accelerate #1798",
    ),
    KnownText(
        name="attention-out-of-memory",
        code="VLM010",
        anchors=("mha_graph.execute",),
        pattern=r"Expected mha_graph\.execute\([^)]{0,120}\(?\)?\)\.is_good\(\) to be true",
        example="RuntimeError: Expected mha_graph.execute(handle, variant_pack, workspace_ptr.get()).is_good() to be true, "
        "but got false.",
        says="cuDNN's attention could not start; seen where torch had taken nearly all of the GPU and another process the "
        "rest, so that nothing was left for its kernel.",
        fix="Leave some hundred MiB free on each GPU beside the model. If there are, "
        "torch.backends.cuda.enable_cudnn_sdp(False) takes another kernel.",
        commands=("vlm-doctor plan MODEL",),
        verify="vlm-doctor plan MODEL",
        checks=("VLM501", "VLM502"),
        source="torch, aten/src/ATen/native/cudnn/MHA.cpp; seen on two H200s, torch 2.11",
    ),
    KnownText(
        name="host-out-of-memory",
        code="VLM011",
        anchors=(
            "can't allocate memory",
            "cannot allocate memory",
            "oom-kill",
            "out of memory: killed",
            "exitcode: -9",
            "exit code -9",
            "oomkilled",
            "sigkill",
            "exit code 137",
            "memoryerror",
            "oom_kill event",
            "by signal: killed",
        ),
        pattern=r"DefaultCPUAllocator: (?:can't|not enough) |Cannot allocate memory|oom-kill|Out of memory: Killed process"
        r"|exit ?code:? +-9\b|exit code 137\b|OOMKilled|Signal 9 \(SIGKILL\)|\bMemoryError\b"
        r"|oom_kill event|is killed by signal: Killed",
        example="RuntimeError: [enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory: "
        "you tried to "
        "allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)",
        says="The host, or the memory limit of the container or job, had no memory left.",
        fix="Raise the limit, load fewer shards at once, or lower max_memory['cpu'].",
        commands=("cat /sys/fs/cgroup/memory.max", "sudo dmesg | grep -i oom"),
        checks=("VLM504",),
        source="Linux, SIGKILL by the OOM killer; Slurm, oom_kill events; ComfyUI #14938, vllm #45086, tabicl #145",
    ),
    KnownText(
        name="killed",
        code="VLM011",
        anchors=("killed",),
        pattern=r"^Killed$|: line \d{1,6}: {1,4}\d{1,9} Killed(?: |$)",
        example="./run.sh: line 12: 48213 Killed                  python train.py",
        says="The process was killed (SIGKILL), as the kernel does when the host or the container has no memory left.",
        fix="See whether it was the kernel; then raise the limit, load fewer shards at once, or lower max_memory['cpu'].",
        commands=("sudo dmesg | grep -iE 'oom|killed process'", "cat /sys/fs/cgroup/memory.max"),
        checks=("VLM504",),
        source="bash, the message of a job that was killed; Linux, SIGKILL by the OOM killer",
        rank="symptom",
    ),
    KnownText(
        name="cudnn-internal",
        code="VLM010",
        anchors=("cudnn_status_internal_error",),
        pattern=r"CUDNN_STATUS_INTERNAL_ERROR",
        example="RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        says="cuDNN failed inside: as a rule the GPU has no room for its workspace, else two versions of cuDNN are mixed.",
        fix="Leave some hundred MiB free on each GPU; if it stays, try it without LD_LIBRARY_PATH.",
        commands=("vlm-doctor plan MODEL",),
        verify="vlm-doctor plan MODEL",
        checks=("VLM501", "VLM502", "VLM315", "VLM316"),
        source="cuDNN documentation, cudnnStatus_t; pytorch #81620",
        rank="symptom",
    ),
    KnownText(
        name="shared-memory",
        code="VLM503",
        anchors=("bus error", "shared memory", "/dev/shm", "shm_open", "ncclshmopen"),
        pattern=r"Bus error|out of shared memory|unable to (?:open|mmap|allocate) shared memory|ncclShmOpen"
        r"|(?:creating|attaching to) shared memory segment|No space left on device[^\n]{0,80}/dev/shm"
        r"|/dev/shm[^\n]{0,120}No space left on device",
        example="RuntimeError: DataLoader worker (pid 1234) is killed by signal: Bus error. It is possible that "
        "dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit.",
        says="/dev/shm is full or too small for what workers or NCCL exchange through it.",
        fix="Give the container more: --shm-size=8g or --ipc=host; remove left-over files.",
        commands=("df -h /dev/shm", "ls -la /dev/shm"),
        verify="df -h /dev/shm",
        checks=("VLM503",),
        source="NCCL troubleshooting; pytorch/tutorials #2475",
    ),
    KnownText(
        name="disk-full",
        code="VLM505",
        anchors=("no space left on device", "not enough free disk space", "disk quota exceeded"),
        pattern=r"No space left on device|Not enough free disk space to download|Disk quota exceeded",
        example="OSError: [Errno 28] No space left on device: '/root/.cache/huggingface/hub/tmp'",
        says="A disk is full: the cache of checkpoints, the offload folder or /tmp.",
        fix="Make room, or put the cache elsewhere with HF_HOME.",
        commands=("df -h ~/.cache/huggingface /tmp", "hf cache ls"),
        verify="df -h",
        checks=("VLM505", "VLM503", "VLM508", "VLM509"),
        source="errno 28, 122; huggingface_hub, file_download.py",
    ),
)
