"""Codes of errors that no look at a machine can find, since they happen in a program: what their pages say.

Which texts are recognized, examples and sources come from the known texts themselves.
"""

from __future__ import annotations

from typing import NamedTuple


class ErrorCode(NamedTuple):
    """The page of one code."""

    code: str
    title: str
    why: str
    """Why it matters for a vision-language model on several GPUs."""
    look: str
    """How to look by hand."""
    do: str
    fine: str


ERROR_CODES: tuple[ErrorCode, ...] = (
    ErrorCode(
        "VLM010",
        "error: GPU out of memory",
        "A split model runs out on one GPU while others are half empty: the GPU with vision and embeddings also holds the "
        'images\' activations, the last one the logits. `device_map="auto"` counts weights only.',
        "The message's own figures: `Tried to allocate`, `is free`, `reserved by PyTorch but unallocated`. During a run: "
        "`nvidia-smi --query-gpu=index,memory.used,memory.total --format=csv -l 1`.",
        "`vlm-doctor plan MODEL` with the images and the prompt of the call shows what each GPU needs. Large free "
        "pieces that are "
        "not in use want `expandable_segments:True`; memory of other processes wants another GPU.",
        "Never; a retry with a smaller batch hides that the placement has no room.",
    ),
    ErrorCode(
        "VLM011",
        "error: host out of memory",
        "Weights pass through the host's memory while they are loaded; a container's limit is often far below what "
        "`psutil` reports, and a process that is killed leaves no traceback.",
        "`cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.peak`, `sudo dmesg | grep -i oom`.",
        'Raise the limit, load safetensors (they are mapped, not copied), lower `max_memory["cpu"]`.',
        "Never.",
    ),
    ErrorCode(
        "VLM012",
        "error: device-side assert",
        "A kernel was given an index that does not exist. On one GPU that is a token or position the model does not "
        "have; on "
        "several it may be data that a peer copy scrambled. All later CUDA calls of the process fail with the same text.",
        "`CUDA_LAUNCH_BLOCKING=1` shows the line; the same prompt on one GPU shows whether the copies are at fault.",
        "Compare the largest input id with the size of the embedding. If one GPU works and several do not, test peer "
        "access "
        "(VLM404): turn off ACS or the IOMMU's translation in the BIOS.",
        "Never.",
    ),
    ErrorCode(
        "VLM013",
        "error: illegal memory access",
        "A kernel touched memory that is not its own. Extensions built for another torch do that, and so do pointers that "
        "arrive scrambled from another GPU.",
        "`CUDA_LAUNCH_BLOCKING=1 python YOUR_PROGRAM`; `compute-sanitizer python YOUR_PROGRAM`; `sudo dmesg | grep -i "
        "xid`.",
        "Leave out flash-attn and other extensions first, then try one GPU, then look at the GPU's memory (VLM111).",
        "Never.",
    ),
    ErrorCode(
        "VLM014",
        "error: CUDA used after a fork",
        "Test runners and data loaders fork. A process that has asked CUDA anything, even "
        "`torch.cuda.is_available()`, cannot "
        "be forked and then use a GPU; one such call at collection spoils a whole run.",
        "`python -c 'import torch; print(torch.cuda.is_initialized())'` in the parent, after its imports.",
        "Use the start method `spawn`, ask NVML instead of CUDA (`PYTORCH_NVML_BASED_CUDA_CHECK=1`), and touch CUDA "
        "in fixtures "
        "only.",
        "Never.",
    ),
    ErrorCode(
        "VLM015",
        "error: no GPU of that number",
        "CUDA counts the visible GPUs from 0. A device_map or `cuda:3` written for eight GPUs fails where two are visible.",
        "`echo \"$CUDA_VISIBLE_DEVICES\"`; `python -c 'import torch; print(torch.cuda.device_count())'`.",
        "Write positions among the visible GPUs, or show more GPUs. `vlm-doctor check-map` judges a map against them.",
        "Never.",
    ),
    ErrorCode(
        "VLM016",
        "error: wrong driver library",
        "libcuda.so comes with the driver. One from a toolkit's stubs folder or a cuda-compat package is found first "
        "and does "
        "not fit: no GPU can be used, whatever nvidia-smi says.",
        '`ldconfig -p | grep libcuda.so`; `echo "$LD_LIBRARY_PATH"`; `ls /usr/local/cuda*/compat`.',
        "Take stubs and compat folders out of the library path; on data center GPUs cuda-compat is right, elsewhere never.",
        "Never.",
    ),
    ErrorCode(
        "VLM017",
        "error: MPS daemon",
        "Where CUDA_MPS_PIPE_DIRECTORY is set, every CUDA program goes through that daemon and fails with it.",
        '`echo get_server_list | nvidia-cuda-mps-control`; `ls "$CUDA_MPS_PIPE_DIRECTORY"`.',
        "Start the daemon again, or unset the variable.",
        "Never.",
    ),
    ErrorCode(
        "VLM018",
        "error: CUDA does not start",
        "NVML and nvidia-smi can be well while CUDA is not: they do not need the module nvidia_uvm.",
        "`lsmod | grep nvidia_uvm`; `ls -l /dev/nvidia-uvm`; `python -c 'import torch; torch.cuda.init()'`.",
        "Load or reload nvidia_uvm; in a container pass /dev/nvidia-uvm. Set CUDA_VISIBLE_DEVICES in the shell, not "
        "in the program.",
        "Never.",
    ),
    ErrorCode(
        "VLM020",
        "error: tensors on different devices",
        "A cut through a block, a vision tower away from the embeddings that take its output, bare parameters that no "
        "hook moves, "
        "or an inner `generate`: all of them can be told from the map before anything loads.",
        "`print(model.hf_device_map)`: the modules that the traceback names should have one device.",
        "`vlm-doctor check-map MAP --model MODEL` names the places and gives a map that works.",
        "Never.",
    ),
    ErrorCode(
        "VLM021",
        "error: a part of the model has no weights",
        "The part stayed on the device `meta`: the map sent it to the disk, did not name it, or the checkpoint lacks it.",
        "`[name for name, p in model.named_parameters() if p.device.type == 'meta']`.",
        "Let the map name every module, on GPUs; `vlm-doctor check-map` names what is missing.",
        "Never.",
    ),
    ErrorCode(
        "VLM022",
        "error: a placed model was moved",
        'A model with a device_map is on several devices; `.to("cuda")` would put all of it on one.',
        "Look for `.to(`, `.cuda()` and trainers that call them; `print(model.hf_device_map)`.",
        "Leave the call out and move the inputs only.",
        "Never.",
    ),
    ErrorCode(
        "VLM023",
        "error: the class cannot be split",
        "transformers splits only classes that say which blocks must stay whole (`_no_split_modules`); code of checkpoints "
        "often does not.",
        "`print(type(model)._no_split_modules)`.",
        "Give an explicit map: `vlm-doctor plan MODEL --format python` makes one without that list.",
        "Never.",
    ),
    ErrorCode(
        "VLM024",
        "error: types differ",
        "Processors give pixels in float32, the weights are bfloat16; text alone works, images do not.",
        "`print(model.dtype, inputs['pixel_values'].dtype)`.",
        "`inputs = inputs.to(model.device, model.dtype)`: BatchFeature casts floating tensors only.",
        "Never.",
    ),
    ErrorCode(
        "VLM025",
        "error: logits are not numbers",
        "Either a type overflows (float16), or data is scrambled between GPUs, which no other error shows.",
        "The same prompt in bfloat16, in float32, and on one GPU.",
        "If one GPU is right and several are wrong, peer copies are broken: see VLM404, turn off ACS or the IOMMU's "
        "translation.",
        "Never.",
    ),
    ErrorCode(
        "VLM026",
        "error: image places and features differ",
        "The prompt was truncated, its template is not the model's, or pixels come from another call of the processor.",
        "`(inputs.input_ids == model.config.image_token_id).sum()` against the number in the message.",
        "Make text and pixels in one call, with `apply_chat_template`; raise `max_length`.",
        "Never.",
    ),
    ErrorCode(
        "VLM030",
        "error: flash-attn or xformers cannot be used",
        "It is built for one torch, one CUDA and one Python; with another it fails on import, and takes the model's "
        "module with "
        "it. It needs compute capability 8.0.",
        "`python -c 'import flash_attn'`; `python -m pip show flash-attn torch`.",
        '`attn_implementation="sdpa"` is as good for most models; otherwise take the wheel whose name has your '
        "torch and CUDA.",
        "Where sdpa is used: uninstall it.",
    ),
    ErrorCode(
        "VLM031",
        "error: bitsandbytes cannot be used",
        "4-bit and 8-bit loading needs its library for the CUDA version of torch.",
        "`python -m bitsandbytes` runs its own test.",
        "Update it; without CUDA in torch it cannot work (VLM303).",
        "Never, where quantization is wanted.",
    ),
    ErrorCode(
        "VLM032",
        "error: torchvision of another torch",
        "Processors of vision-language models import torchvision; one of another torch fails, and transformers "
        "reports it as its "
        "own import error.",
        "`python -c 'import torchvision'`; `python -m pip show torch torchvision`.",
        "Install both in one command, from one index.",
        "Never.",
    ),
    ErrorCode(
        "VLM033",
        "error: package missing",
        "Vision-language models need more than transformers: pillow, torchvision, video decoders, helpers of their "
        "authors.",
        "`python -m pip show NAME`, with the Python that runs the model.",
        "Install it there.",
        "Never.",
    ),
    ErrorCode(
        "VLM034",
        "error: built for NumPy 1",
        "Image and video packages built for NumPy 1 crash or fail with NumPy 2.",
        "`python -c 'import numpy; print(numpy.__version__)'`; the traceback names the package.",
        "Update that package; until then `numpy<2`.",
        "Never.",
    ),
    ErrorCode(
        "VLM035",
        "error: checkpoint in pickle format",
        "Loading a pickle runs code. torch from 2.6 on refuses one that holds more than tensors, and transformers "
        "refuses pickles with "
        "an older torch.",
        "`ls CHECKPOINT`: *.bin and *.pt are pickles, *.safetensors are not.",
        "Use the safetensors files. Load a pickle with `weights_only=False` only if you trust who wrote it.",
        "Never.",
    ),
    ErrorCode(
        "VLM036",
        "error: the checkpoint's code does not fit transformers",
        "CogVLM, GLM-4V, MiniCPM-V and others bring their own classes. They call names of transformers that later "
        "versions renamed or "
        "removed.",
        "`python -m pip show transformers`; `transformers_version` in the checkpoint's config.json.",
        "Take a newer revision of the checkpoint, a version of the model that transformers knows itself, or the "
        "transformers it was "
        "written for in an environment of its own.",
        "Never.",
    ),
    ErrorCode(
        "VLM037",
        "error: unknown kind of model",
        "Each model type needs a transformers that knows it.",
        "`python -c 'import transformers; print(transformers.__version__)'`; `model_type` in config.json.",
        "Update transformers.",
        "Never.",
    ),
    ErrorCode(
        "VLM038",
        "error: argument renamed",
        "Arguments of from_pretrained change between versions; a test suite for two versions meets both.",
        "`python -m pip show transformers`.",
        "Use the name of the installed version; `vlm-doctor plan MODEL --format python` writes it.",
        "Never.",
    ),
    ErrorCode(
        "VLM039",
        "error: checkpoint cannot be fetched",
        "The name is wrong, the model is gated, or the network is off (HF_HUB_OFFLINE).",
        "`hf auth whoami`; `hf download MODEL config.json`.",
        "Correct the name, accept the terms on the model's page and log in, or fetch it beforehand.",
        "Never.",
    ),
    ErrorCode(
        "VLM040",
        "error: checkpoint file damaged",
        "A download was cut short, the disk was full, or Git LFS left a pointer of some hundred bytes.",
        "`ls -lL` in the snapshot's folder; `vlm-doctor plan FOLDER` reads every header.",
        "Fetch it again.",
        "Never.",
    ),
    ErrorCode(
        "VLM041",
        "error: no compiler",
        "triton compiles kernels when they are first used, also for quantized models.",
        "`cc --version`; `python -c 'import sysconfig; print(sysconfig.get_paths()[\"include\"])'`.",
        "Install a compiler and Python's headers, or do without torch.compile.",
        "Never.",
    ),
    ErrorCode(
        "VLM042",
        "error: UUID read as a number",
        "Schedulers name GPUs by UUID; some libraries read CUDA_VISIBLE_DEVICES with `int()`.",
        '`echo "$CUDA_VISIBLE_DEVICES"`; `nvidia-smi -L`.',
        "Give the same GPUs as indices, with CUDA_DEVICE_ORDER=PCI_BUS_ID; or update the library.",
        "Never.",
    ),
    ErrorCode(
        "VLM043",
        "error: NCCL failed",
        "NCCL needs shared memory, an interface between the ranks, and GPUs that can reach each other.",
        "`NCCL_DEBUG=INFO`, the first line with WARN; `df -h /dev/shm`; `env | grep NCCL`; /etc/nccl.conf and "
        "~/.nccl.conf.",
        "Repair what that line names.",
        "Never.",
    ),
    ErrorCode(
        "VLM044",
        "error: two ranks on one GPU",
        "NCCL refuses two ranks on one GPU: LOCAL_RANK was not used, or CUDA_VISIBLE_DEVICES shows fewer GPUs than ranks.",
        "`print(os.environ['LOCAL_RANK'], torch.cuda.current_device())` in each rank.",
        "`torch.cuda.set_device(int(os.environ['LOCAL_RANK']))` first of all.",
        "Never.",
    ),
    ErrorCode(
        "VLM045",
        "error: another rank failed or hangs",
        "This rank waited for one that died or took another path; its own message is no cause. If no rank died, "
        "copies between "
        "the GPUs hang.",
        "The first error in time over all ranks: `torchrun --tee 3 --log-dir logs`; `py-spy dump --pid PID`.",
        "Repair the first error. If there is none, try `NCCL_P2P_DISABLE=1`: if that helps, peer access is broken "
        "(VLM404).",
        "Never.",
    ),
)
