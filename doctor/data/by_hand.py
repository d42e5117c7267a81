"""How to look at what a code is about without the doctor: one paragraph a code, put into its page.

A page that has this heading itself keeps its own.
"""

from __future__ import annotations

_MAP = "`print(model.hf_device_map)` after loading; before it, `print(json.load(open(MAP)))` beside "
_NAMES = _MAP + "`[name for name, _ in model.named_modules()]` of a model made on the device meta."
_SMI = "`nvidia-smi --query-gpu=index,name,memory.total,memory.free,compute_cap --format=csv`"
_PYTEST = "`pytest --collect-only -q` lists the tests, `pytest -rs` their reasons; the GPUs are those of "
_TORCH = "`python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())'`"

BY_HAND: dict[str, str] = {
    "VLM001": "`vlm-doctor --verbose` names the check and the error.",
    "VLM002": "`vlm-doctor --json` has the reason in `machine.gaps` and the time of each source in `machine.seconds`.",
    "VLM101": "`lspci -d 10de:` and `ls /dev/nvidia*`: both are empty where there is no NVIDIA GPU.",
    "VLM102": "`lsmod | grep nvidia`, `cat /proc/driver/nvidia/version`, `sudo modprobe nvidia` and its message; "
    "`mokutil --sb-state`.",
    "VLM103": "`lspci -k -d 10de:` names the kernel driver in use.",
    "VLM104": "`nvidia-smi` says it itself; `cat /sys/module/nvidia/version` beside `ldconfig -p | grep nvidia-ml`.",
    "VLM105": "`nvidia-smi; echo $?`; `sudo dmesg | grep -iE 'nvrm|xid'`; in a container `ls -l /dev/nvidia*`.",
    "VLM106": "`ls -l /dev/nvidia*`, `id`, and `python -c \"open('/dev/nvidiactl', 'r+b')\"`.",
    "VLM107": "`lspci -d 10de: | wc -l` beside `nvidia-smi -L | wc -l`; `sudo dmesg | grep -i xid`.",
    "VLM108": "`nvidia-smi -i INDEX -q`; `sudo dmesg | grep -i xid`.",
    "VLM109": "`nvidia-smi --query-gpu=index,compute_mode --format=csv`.",
    "VLM110": "`nvidia-smi -L` lists MIG devices below their GPU; `nvidia-smi --query-gpu=index,mig.mode.current "
    "--format=csv`.",
    "VLM111": "`nvidia-smi -q -d ECC,ROW_REMAPPER,PAGE_RETIREMENT`; `sudo dmesg | grep -i xid`.",
    "VLM201": '`echo "${CUDA_VISIBLE_DEVICES-not set}"`; `env -u CUDA_VISIBLE_DEVICES python -c \'import torch; '
    "print(torch.cuda.device_count())'`.",
    "VLM202": '`echo "$CUDA_VISIBLE_DEVICES"` beside `nvidia-smi -L`; `python -c \'import torch; '
    "print(torch.cuda.device_count())'`.",
    "VLM203": '`echo "$CUDA_VISIBLE_DEVICES"` beside `nvidia-smi -L`.',
    "VLM204": "`nvidia-smi -L` beside `python -c 'import torch; [print(i, torch.cuda.get_device_properties(i)) for i in "
    "range(torch.cuda.device_count())]'`.",
    "VLM205": "`env | grep NVIDIA_`, `ls /dev/nvidia*`, `ldconfig -p | grep -E 'libcuda|nvidia-ml'` in the container; "
    "`docker inspect` outside of it.",
    "VLM206": f"{_TORCH} and `python -c 'import torch; torch.cuda.init()'`, which says why.",
    "VLM301": "`python -m pip show torch`, with the Python that runs the model.",
    "VLM302": "`python -c 'import torch; print(torch.__file__)'`: a folder without a file is a torso; `python -m pip "
    "check`.",
    "VLM303": f"{_TORCH}: the CUDA version is None.",
    "VLM304": "`python -c 'import torch'`, then `env -u LD_LIBRARY_PATH python -c 'import torch'`.",
    "VLM305": "`timeout 60 python -X faulthandler -c 'import torch'; echo $?`: 139 is a crash, 124 a hang.",
    "VLM306": "`nvidia-smi` shows the newest CUDA version of the driver; `python -c 'import torch; "
    "print(torch.version.cuda)'`.",
    "VLM307": f"`python -c 'import torch; print(torch.cuda.get_arch_list())'` beside {_SMI}.",
    "VLM308": "`python -m pip show transformers accelerate`.",
    "VLM309": "`python -m pip check`; `python -c 'import transformers'`. The rules stand in "
    "`transformers/dependency_versions_table.py`.",
    "VLM310": "`python -m pip list | grep -iE 'pynvml|nvidia-ml-py'`; `python -c 'import pynvml; print(pynvml.__file__)'`.",
    "VLM401": "`nvidia-smi topo -m`.",
    "VLM402": "`nvidia-smi nvlink -s`: links that are `<inactive>`; `nvidia-smi nvlink -e` counts errors.",
    "VLM403": "`nvidia-smi -q | grep -A6 Fabric`; `systemctl status nvidia-fabricmanager`.",
    "VLM404": "`nvidia-smi topo -p2p r`; `python -c 'import torch; print(torch.cuda.can_device_access_peer(0, 1))'`.",
    "VLM405": '`nvidia-smi topo -m` beside `echo "$CUDA_VISIBLE_DEVICES"`.',
    "VLM501": "`nvidia-smi --query-compute-apps=gpu_uuid,pid,process_name,used_memory --format=csv`; `ps -o "
    "user,etime,args -p PID`.",
    "VLM502": "`nvidia-smi` shows memory in use and no process; `sudo fuser -v /dev/nvidia*` finds who has the "
    "devices open.",
    "VLM503": "`df -h /dev/shm`.",
    "VLM504": "`cat /sys/fs/cgroup/memory.max` beside `free -h`.",
    "VLM505": "`df -h ~/.cache/huggingface`; `hf cache ls`.",
    "VLM601": f"Add up the sizes of the checkpoint's files (`ls -l *.safetensors`) and compare with {_SMI}; images "
    "and the prompt "
    "come on top.",
    "VLM602": f"{_SMI}: total would do, free does not.",
    "VLM603": "`auto_map` in the checkpoint's config.json, and the *.py files beside it.",
    "VLM610": _NAMES,
    "VLM611": _NAMES,
    "VLM612": "Look for a key that is the beginning of another, up to a dot.",
    "VLM613": "Look for a key that is the beginning of another name without a dot after it, such as `layers.1` and "
    "`layers.10`.",
    "VLM614": _MAP + "`model._no_split_modules`: no block of such a class may have parts on two devices.",
    "VLM615": "Follow the tensors through `forward` in the model's file: operands of `+`, `torch.cat` and "
    "`masked_scatter`.",
    "VLM616": "`[(a, b) for ...]` with equal `data_ptr()`; `model.config.tie_word_embeddings`.",
    "VLM617": "`python -c 'import torch; print(torch.cuda.device_count())'` beside the map's numbers.",
    "VLM618": 'Look at the values of the map: `0` and `"cuda:0"` are devices, `"0"` is not.',
    "VLM619": _MAP + '`"cpu"` and `"disk"` among its values.',
    "VLM620": f"`nvidia-smi -l 1` while the model is loaded and called; {_SMI}.",
    "VLM621": "Write the devices down in the order of `forward`, not of the map: each change is a copy.",
    "VLM622": "`nvidia-smi topo -m` beside the order of the stages.",
    "VLM623": "`print(outputs.logits.device, inputs.input_ids.device)`.",
    "VLM624": _MAP + "the first block after each change of the device.",
    "VLM625": f"Add up the weights of the model and compare with one card of {_SMI}.",
    "VLM626": "`{p.device for p in model.parameters()}` has several, and `hasattr(model, '_hf_hook')` is False.",
    "VLM701": _PYTEST + "`nvidia-smi -L`.",
    "VLM702": _PYTEST + '`nvidia-smi -L`, less what `echo "$CUDA_VISIBLE_DEVICES"` hides.',
    "VLM703": _PYTEST + _SMI + ".",
    "VLM704": _PYTEST + _SMI + ".",
    "VLM705": "`vlm-doctor plan MODEL`.",
    "VLM706": "`nvidia-smi topo -p2p r`.",
    "VLM711": "`nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv`.",
    "VLM712": "`vlm-doctor`; `nvidia-smi`; `sudo dmesg | grep -iE 'nvrm|xid'`.",
    "VLM713": "`vlm-doctor plan MODEL`; `ls -lL` in the snapshot's folder.",
    "VLM714": "`print(model.hf_device_map)`.",
    "VLM715": "`nvidia-smi -l 1` beside the test; `torch.cuda.memory_summary()` in it.",
    "VLM716": "`print(model.hf_device_map)` beside `vlm-doctor plan MODEL --json`.",
    "VLM720": "`pytest --markers`; `pytest --help` under vlmgpu.",
    "VLM112": "`ldconfig -p | grep libcuda.so`; `ls -l $(ldconfig -p | grep -m1 libcuda.so.1 | sed 's/.*=> //')` "
    "beside `cat /sys/module/nvidia/version`.",
    "VLM113": "`cat /proc/driver/nvidia/version` says Open Kernel Module or not; `sudo dmesg | grep -i nvrm`.",
    "VLM114": "`sudo dmesg | grep -iE 'nvrm|xid'`; `journalctl -k | grep -i xid`.",
    "VLM115": "`nvidia-smi --query-gpu=index,pcie.link.width.current,pcie.link.width.max --format=csv`; `sudo lspci "
    "-vv -d 10de: | grep LnkSta`.",
    "VLM116": "`nvidia-smi -q -d PERFORMANCE`.",
    "VLM117": "`nvidia-smi -q | grep -iE 'virtualization|licen'`.",
    "VLM118": "`nvidia-smi conf-compute -f`; `nvidia-smi conf-compute -grs`.",
    "VLM119": '`echo get_server_list | nvidia-cuda-mps-control`; `echo "$CUDA_MPS_PIPE_DIRECTORY"`.',
    "VLM120": "`nvidia-smi --query-gpu=index,persistence_mode --format=csv`.",
    "VLM121": "`nvidia-smi -q | grep -i inforom`.",
    "VLM122": "`nvidia-smi --query-gpu=index,name,compute_cap --format=csv`: bfloat16 needs 8.0.",
    "VLM123": "`nvidia-smi --query-gpu=name,memory.total --format=csv`; `free -h`.",
    "VLM207": "`env | grep -E 'SLURM.*GPUS|CUDA_VISIBLE_DEVICES'`; `scontrol show job $SLURM_JOB_ID`.",
    "VLM208": "`env | grep NVIDIA_`; `ls /dev/nvidia*`.",
    "VLM209": "`uname -r`; `nvidia-smi -L`.",
    "VLM210": "`env | grep -E 'HIP|ROCR|CUDA'`.",
    "VLM311": "`env | grep ALLOC_CONF`; `python -m pip show torch`.",
    "VLM312": "`env | grep -E 'CUDA_LAUNCH_BLOCKING|TORCH_USE_CUDA_DSA|PYTORCH_NO_CUDA_MEMORY_CACHING'`.",
    "VLM313": "`python -m pip list | grep -iE 'torch|flash|xformers'`; `python -m xformers.info`.",
    "VLM314": "`python -m bitsandbytes`.",
    "VLM315": "`python -m pip list | grep nvidia-`.",
    "VLM316": '`echo "$LD_LIBRARY_PATH"`; `python -c \'import torch; print(open("/proc/self/maps").read())\' | grep '
    "-E 'nccl|cudnn'`.",
    "VLM317": "`python -c 'import sys, torch; print(sys.prefix, torch.__file__, *sys.path, sep=\"\\n\")'`.",
    "VLM318": "`env | grep -E 'HF_|TRANSFORMERS_'`; `hf env`.",
    "VLM319": "`python -m pip show pillow torchvision av`.",
    "VLM320": "`python -m pip list | grep -iE 'torch|transformers|accelerate'` beside the thread that the finding names.",
    "VLM321": "`auto_map` and `transformers_version` in the checkpoint's config.json; `python -m pip show transformers`.",
    "VLM322": "`nvidia-smi --query-gpu=index,compute_cap --format=csv`; `python -m pip show flash-attn`.",
    "VLM406": "`ls /sys/class/iommu`; `cat /sys/kernel/iommu_groups/*/type | sort | uniq -c`; `cat /proc/cmdline`; "
    "`sudo lspci -vvv | grep ACSCtl`.",
    "VLM407": "`env | grep NCCL`; `cat /etc/nccl.conf ~/.nccl.conf`; `ip -br link`.",
    "VLM408": "`nvidia-smi topo -m`: CPU affinity; `taskset -pc $$`.",
    "VLM409": "`nvidia-smi nvlink -e`.",
    "VLM506": "`nvidia-smi --query-gpu=index,display_active --format=csv`.",
    "VLM507": "`ulimit -a`; `cat /sys/fs/cgroup/pids.max`.",
    "VLM508": "`df -h /tmp`.",
    "VLM509": "`touch ~/.cache/huggingface/hub/x && rm ~/.cache/huggingface/hub/x`.",
    "VLM510": "`df -T ~/.cache/huggingface`.",
    "VLM511": "`ls -lL` in the snapshot's folder; `find ~/.cache/huggingface/hub -name '*.incomplete'`.",
    "VLM512": "`uname -r`.",
    "VLM730": "`nvidia-smi --query-compute-apps=pid,process_name --format=csv`; `ps` for other pytest runs.",
    "VLM731": "`ls -ld` of the folder that the message names.",
    "VLM732": "`env | grep -E 'PYTEST_XDIST|CUDA_VISIBLE_DEVICES'`.",
    "VLM740": "`nvidia-smi -L | wc -l` beside the number that was expected.",
    "VLM741": "`pytest -rs`: the reasons of the skips.",
    "VLM742": "`pytest --collect-only -q` beside the list of before.",
    "VLM743": "Look for `pytest.skip` and `skipif` in the test that is named.",
    "VLM744": "`ls -ld` of the folder that the message names; `df -h`.",
    "VLM745": "`pytest --vlm-plan --vlm-machine=SPEC` for one runner after the other.",
    "VLM750": "`{name: p.sum().item() for name, p in model.named_parameters()}` before and after the test.",
    "VLM751": "`torch.cuda.max_memory_allocated()` in the test.",
    "VLM752": "`torch.cuda.memory_summary()` in the test; `nvidia-smi -l 1` beside it.",
    "VLM753": "`torch.cuda.memory_allocated()` after `del model; gc.collect()`; `gc.get_referrers(model)` before.",
    "VLM754": "`torch.cuda.memory_allocated()` before and after the test.",
}
