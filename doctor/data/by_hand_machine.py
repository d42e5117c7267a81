"""How to look without the doctor at what its checks of kernel, settings, companions, transport and limits look at.

One paragraph a code, as in ``by_hand.py``.
"""

from __future__ import annotations

_ENVIRONMENT = "`env | grep -E '^(CUDA|NCCL|PYTORCH|TORCH|ACCELERATE|HF|TRANSFORMERS)_'`."
_PIP = "`python -m pip list | grep -iE 'torch|transformers|accelerate|flash|bitsandbytes|xformers|nvidia-'`."

BY_HAND_MACHINE: dict[str, str] = {
    "VLM112": "`ldconfig -p | grep libcuda`; `echo $LD_LIBRARY_PATH`; `cat /proc/driver/nvidia/version`.",
    "VLM113": '`cat /proc/driver/nvidia/version` says "Open Kernel Module" or not; `sudo dmesg | grep -i nvrm`.',
    "VLM114": "`sudo dmesg -T | grep -iE 'nvrm|xid'`, or `journalctl -k | grep -i nvrm`.",
    "VLM115": "`nvidia-smi --query-gpu=index,pcie.link.width.current,pcie.link.width.max --format=csv`.",
    "VLM116": "`nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`.",
    "VLM117": "`nvidia-smi -q | grep -iE 'virtualization mode|license'`.",
    "VLM118": "`nvidia-smi conf-compute -grs`.",
    "VLM119": "`ls -l ${CUDA_MPS_PIPE_DIRECTORY:-/tmp/nvidia-mps}`; `pgrep -a nvidia-cuda-mps`.",
    "VLM120": "`nvidia-smi --query-gpu=index,persistence_mode --format=csv`.",
    "VLM121": "`nvidia-smi; echo $?` prints a warning and 14.",
    "VLM122": "`nvidia-smi --query-gpu=index,name,compute_cap --format=csv`: 8.0 and more have bfloat16.",
    "VLM123": '`nvidia-smi` shows "Not Supported" for memory; `free -h` has what there is.',
    "VLM207": "`echo $SLURM_STEP_GPUS $SLURM_JOB_GPUS` beside `nvidia-smi -L` and `echo $CUDA_VISIBLE_DEVICES`.",
    "VLM208": "`echo $NVIDIA_VISIBLE_DEVICES` beside `ls /dev/nvidia*` and `nvidia-smi -L`.",
    "VLM209": "`uname -r` ends in microsoft-standard-WSL2; `nvidia-smi topo -m` has nothing to show.",
    "VLM210": "`env | grep -E '^(HIP|ROCR)_|^GPU_DEVICE'`.",
    "VLM311": "`env | grep ALLOC_CONF`; with a GPU "
    "`python -c 'import torch; torch.zeros(1).cuda(); print(torch.cuda.memory._snapshot()[\"allocator_settings\"])'`.",
    "VLM312": _ENVIRONMENT,
    "VLM313": _PIP,
    "VLM314": "`python -m bitsandbytes`; `python -m pip show -f bitsandbytes | grep libbitsandbytes_cuda`.",
    "VLM315": "`python -m pip list | grep -E 'nvidia-(cudnn|nccl)'`: each should be there once.",
    "VLM316": "`echo $LD_LIBRARY_PATH`; `ls` of its folders; "
    "`python -c \"import torch; print([l.split()[-1] for l in open('/proc/self/maps') if 'cudnn' in l][:1])\"`.",
    "VLM317": "`python -c 'import torch, sys; print(torch.__file__, sys.prefix)'`.",
    "VLM318": _ENVIRONMENT,
    "VLM319": "`python -c 'import PIL, torchvision'`.",
    "VLM320": _PIP,
    "VLM321": "`grep -l _extract_past_from_model_output ~/.cache/huggingface/hub/models--*/snapshots/*/modeling_*.py`.",
    "VLM322": "`nvidia-smi --query-gpu=index,name,compute_cap --format=csv`: flash-attention needs 8.0.",
    "VLM406": "`cat /sys/kernel/iommu_groups/*/type | sort | uniq -c` (identity passes through, DMA translates); "
    "`sudo dmesg | grep -iE 'dmar|amd-vi'`; `nvidia-smi topo -p2p r`.",
    "VLM407": "`env | grep ^NCCL_`; `cat /etc/nccl.conf ~/.nccl.conf`; `ip -br link`.",
    "VLM408": "`numactl --show`; `nvidia-smi topo -m` has the NUMA affinity of each GPU.",
    "VLM409": "`nvidia-smi nvlink -e`, before and after a run.",
    "VLM506": "`nvidia-smi --query-gpu=index,display_active --format=csv`.",
    "VLM507": "`ulimit -v`; `cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids.current`.",
    "VLM508": "`df -h ${TMPDIR:-/tmp}`.",
    "VLM509": "`ls -ld ${HF_HUB_CACHE:-~/.cache/huggingface/hub}`; `id`.",
    "VLM510": "`df -T ${HF_HUB_CACHE:-~/.cache/huggingface/hub}`.",
    "VLM511": "`find ~/.cache/huggingface/hub -name '*.incomplete'`; `find -L ~/.cache/huggingface/hub -type l`.",
    "VLM512": "`uname -r`.",
}
