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
    "VLM711": "`nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv`.",
    "VLM712": "`vlm-doctor`; `nvidia-smi`; `sudo dmesg | grep -iE 'nvrm|xid'`.",
    "VLM713": "`vlm-doctor plan MODEL`; `ls -lL` in the snapshot's folder.",
    "VLM714": "`print(model.hf_device_map)`.",
    "VLM715": "`nvidia-smi -l 1` beside the test; `torch.cuda.memory_summary()` in it.",
    "VLM716": "`print(model.hf_device_map)` beside `vlm-doctor plan MODEL --json`.",
    "VLM720": "`pytest --markers`; `pytest --help` under vlmgpu.",
}
