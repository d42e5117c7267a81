"""Error texts of Python packages that do not fit each other or the machine."""

from __future__ import annotations

from .known_texts import KnownText

_SDPA = "Use attn_implementation='sdpa', or install the build for this torch, CUDA and Python."

TEXTS: tuple[KnownText, ...] = (
    KnownText(
        name="flash-attn-broken",
        code="VLM030",
        anchors=("flash_attn", "flashattention", "flash attention"),
        pattern=r"flash_attn[\w./-]{0,160}: undefined symbol|FlashAttention2 has been toggled on, but it cannot be used"
        r"|No module named 'flash_attn\w{0,20}(?:\.\w{1,40})?'|FlashAttention only supports Ampere GPUs or newer"
        r"|[Ff]lash[_ ]?[Aa]ttention[^\n]{0,80}not (?:installed|available|supported)",
        example="ImportError: /venv/site-packages/flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so: undefined "
        "symbol: _ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
        says="flash-attn is missing, was built for another torch, or the GPU is older than Ampere.",
        fix=_SDPA,
        commands=("python -m pip uninstall -y flash-attn", "python -m pip install flash-attn --no-build-isolation"),
        verify="python -c 'import flash_attn'",
        checks=("VLM313", "VLM322"),
        source="flash-attention #975, #1644, #1717, #1783, #2219; transformers, _flash_attn_2_can_dispatch",
    ),
    KnownText(
        name="bitsandbytes-broken",
        code="VLM031",
        anchors=("bitsandbytes",),
        pattern=r"libbitsandbytes\w{0,30}\.so: (?:undefined symbol|cannot open)|CUDA Setup failed despite "
        r"(?:GPU|CUDA) being available"
        r"|bitsandbytes was compiled without GPU support|bitsandbytes library load error|Configured (?:CUDA|ROCm) "
        r"binary not found"
        r"|No package metadata was found for bitsandbytes|requires the latest version of bitsandbytes"
        r"|Using `bitsandbytes`[^\n]{0,60}requires",
        example="RuntimeError: Configured CUDA binary not found at /opt/venv/lib/python3.12/site-packages/bitsandbytes/"
        "libbitsandbytes_cuda130.so",
        says="bitsandbytes is missing, or has no library for the CUDA version of torch.",
        fix="Update bitsandbytes; it then has a library for today's CUDA versions.",
        commands=("python -m pip install --upgrade bitsandbytes",),
        verify="python -m bitsandbytes",
        checks=("VLM303", "VLM309", "VLM314"),
        source="bitsandbytes 0.50, cextension.py and diagnostics; transformers, quantizer_bnb_4bit.py",
    ),
    KnownText(
        name="torchvision-mismatch",
        code="VLM032",
        anchors=("torchvision::nms", "torchvision/_c", "libtorchaudio", "torchvision"),
        pattern=r"operator torchvision::\w{1,30} does not exist|torchvision[\w./-]{0,160}\.so: undefined symbol"
        r"|libtorchaudio\.so: undefined symbol",
        example="RuntimeError: operator torchvision::nms does not exist",
        says="torchvision or torchaudio was built for another torch.",
        fix="Install both from the same index in one command.",
        commands=("python -m pip install --force-reinstall torch torchvision",),
        verify="python -c 'import torchvision; print(torchvision.__version__)'",
        checks=("VLM309", "VLM313"),
        source="llama-cookbook #710, vllm-metal #102, tt-forge #890",
    ),
    KnownText(
        name="package-missing",
        code="VLM033",
        anchors=(
            "no module named '",
            "library but it was not found",
            "requires the pil",
            "importerror: this modeling file requires",
        ),
        pattern=r"No module named '(?P<package>qwen_vl_utils|av|decord|torchcodec|PIL|torchvision|einops|timm"
        r"|tiktoken|sentencepiece"
        r"|xformers|peft|accelerate|transformers|safetensors|tokenizers|triton)(?:\.[\w.]{1,60})?'"
        r"|requires the (?P<library>[\w. -]{1,40}?) library but it was not found"
        r"|This modeling file requires the following packages[^\n]{0,60}: (?P<packages>[\w, .-]{1,120}?)\.? Run",
        example="ImportError: Qwen2VLImageProcessorFast requires the Torchvision library but it was not found in your "
        "environment.",
        says="A package that the model or its processor needs is not installed.",
        fix="Install it into the environment that runs the model.",
        commands=("python -m pip install PACKAGE",),
        verify="python YOUR_PROGRAM",
        checks=("VLM308", "VLM319"),
        source="transformers, import_utils.py",
    ),
    KnownText(
        name="torch-missing",
        code="VLM301",
        anchors=("no module named 'torch'", "pytorch was not found", "none of pytorch"),
        pattern=r"No module named 'torch'|None of PyTorch[^\n]{0,60}have been found|requires the PyTorch library but "
        r"it was not found",
        example="ModuleNotFoundError: No module named 'torch'",
        says="torch is not installed in the Python that runs.",
        fix="Install torch, or start the program with the Python that has it.",
        commands=("python -m pip install torch",),
        verify="python -c 'import torch; print(torch.__file__)'",
        checks=("VLM301", "VLM302"),
        source="Python, ModuleNotFoundError; transformers, import_utils.py",
    ),
    KnownText(
        name="accelerate-too-old",
        code="VLM309",
        anchors=("requires accelerate", "requires `accelerate`", "pip install accelerate", "pip install 'accelerate"),
        pattern=r"requires `?accelerate`?|requires Accelerate|pip install '?accelerate",
        example="ValueError: Using a `device_map`, `tp_plan`, `torch.device` context manager or setting "
        "`torch.set_default_device(device)` requires `accelerate`. You can install it with `pip install accelerate`",
        says="accelerate is missing, or older than this transformers accepts: the message is the same.",
        fix="Update accelerate; it may well be installed already.",
        commands=("python -m pip install --upgrade accelerate",),
        verify="python -m pip show accelerate",
        checks=("VLM308", "VLM309"),
        source="transformers 5.23, ACCELERATE_MIN_VERSION; seen with accelerate 1.0.1",
    ),
    KnownText(
        name="version-rule",
        code="VLM309",
        anchors=("normal functioning of this module", "disabling pytorch because"),
        pattern=r"(?P<rule>[\w.,<>=! -]{3,80}) is required for a normal functioning of this module, but found "
        r"(?P<found>[\w.=-]{1,60})"
        r"|Disabling PyTorch because (?P<wanted>PyTorch[^\n]{1,30}) is required but found (?P<torch>[\w.+]{1,30})",
        example="ImportError: tokenizers>=0.23.1,<0.24 is required for a normal functioning of this module, but found "
        "tokenizers==0.22.1.",
        says="A package is not in the range of versions that transformers asks for.",
        fix="Install what it asks for.",
        commands=("python -m pip install --upgrade transformers",),
        verify="python -m pip check",
        checks=("VLM309",),
        source="transformers, dependency_versions_check.py, import_utils.py",
    ),
    KnownText(
        name="torch-libraries-shadowed",
        code="VLM304",
        anchors=(
            "undefined symbol",
            "cudnn version incompatibility",
            "cannot open shared object file",
            "glibc",
            "_array_api",
        ),
        pattern=r"undefined symbol: (?P<symbol>ncclComm\w{1,40}|__nvJitLink\w{1,60}|cudnn\w{1,60}|cublas\w{1,60})"
        r"|cuDNN version incompatibility: PyTorch was compiled {1,3}against \((?P<built>[\d, ]{1,20})\) but "
        r"(?:linked against|found runtime version) \((?P<linked>[\d, ]{1,20})\)"
        r"|(?P<library>lib(?:cudnn|cublas|cudart|nccl|cusparse|cufft|curand|nvJitLink|nvrtc|torch|c10)[\w.-]{0,40}): "
        r"cannot open shared object"
        r"|version `(?P<glibc>GLIBC(?:XX)?_[\d.]{1,10})' not found",
        example="ImportError: /opt/venv/lib/python3.12/site-packages/torch/lib/libtorch_cuda.so: undefined symbol: "
        "ncclCommRegister",
        says="A CUDA library of another version is found before the one torch was built with, or none is found.",
        fix="Try it without LD_LIBRARY_PATH; if that helps, unset it, otherwise reinstall torch.",
        commands=("env -u LD_LIBRARY_PATH python -c 'import torch'",),
        verify="python -c 'import torch'",
        checks=("VLM304", "VLM302", "VLM315", "VLM316"),
        source="pytorch #80637, #119072, #119932, #152783; nccl #1180; cugraph #4465",
    ),
    KnownText(
        name="numpy-abi",
        code="VLM034",
        anchors=("_array_api not found", "compiled using numpy 1", "numpy.dtype size changed"),
        pattern=r"_ARRAY_API not found|compiled using NumPy 1\.x cannot be run in|numpy\.dtype size changed",
        example="A module that was compiled using NumPy 1.x cannot be run in NumPy 2.2.6 as it may crash.",
        says="A package was built for NumPy 1 and meets NumPy 2.",
        fix="Update the package that the traceback names; until then, install numpy<2.",
        commands=("python -m pip install 'numpy<2'",),
        verify="python YOUR_PROGRAM",
        source="NumPy 2 migration guide",
    ),
    KnownText(
        name="pynvml-shadowed",
        code="VLM310",
        anchors=("pynvml", "nvmldevicegetgpufabricinfov"),
        pattern=r"module 'pynvml' has no attribute '(?P<missing>\w{1,60})'|No module named 'pynvml'"
        r"|Function (?:Not Found|nvml\w{1,60})|function 'nvml\w{1,60}' not found",
        example="AttributeError: module 'pynvml' has no attribute 'nvmlDeviceGetGpuFabricInfoV'",
        says="The old package pynvml stands in the place of nvidia-ml-py.",
        fix="Remove pynvml and install nvidia-ml-py anew.",
        commands=("python -m pip uninstall -y pynvml", "python -m pip install --force-reinstall nvidia-ml-py"),
        checks=("VLM310",),
        source="codecarbon #933, uv #11700, dlrover #1699",
    ),
    KnownText(
        name="no-compiler",
        code="VLM041",
        anchors=(
            "failed to find c compiler",
            "python.h",
            "cuda_home environment variable is not set",
            "libcuda.so cannot found",
            "cuda_home",
        ),
        pattern=r"Failed to find C compiler|Python\.h: No such file|CUDA_HOME environment variable is not set"
        r"|libcuda\.so cannot (?:be )?found",
        example="RuntimeError: Failed to find C compiler. Please specify via CC environment variable.",
        says="triton or an extension compiles code when it is first used, and finds no compiler, headers or toolkit.",
        fix="Install a C compiler and the headers of Python; or do without torch.compile and that extension.",
        commands=("sudo apt-get install build-essential python3-dev", "export TORCHDYNAMO_DISABLE=1"),
        verify="cc --version",
        source="triton, runtime/build.py; torch.utils.cpp_extension",
    ),
    KnownText(
        name="lazy-import-failed",
        code="VLM309",
        anchors=("because of the following error", "could not import module"),
        pattern=r"Failed to import (?P<module>[\w.]{1,120}) because of the following error"
        r"|Could not import module '(?P<name>\w{1,80})'\. Are this object's requirements defined correctly",
        example="RuntimeError: Failed to import transformers.models.auto.processing_auto because of the following "
        "error (look up to "
        "see its traceback):",
        says="transformers could not import a part of itself; the error before this one says why.",
        fix="Read the first error of the chain: most often a package of another version.",
        commands=("python -m pip check",),
        verify="python -m pip check",
        checks=("VLM309", "VLM308"),
        source="transformers, import_utils.py, _LazyModule",
        rank="symptom",
    ),
    KnownText(
        name="process-crashed",
        code="VLM305",
        anchors=("segmentation fault", "sigsegv", "signal 11", "exitcode: -11", "core dumped"),
        pattern=r"Segmentation fault|SIGSEGV|exit ?code:? +-11\b",
        example="Fatal Python error: Segmentation fault",
        says="A library crashed the process: most often one built for another torch or CUDA.",
        fix="See where it happens, then reinstall that library.",
        commands=("python -X faulthandler YOUR_PROGRAM",),
        verify="python -X faulthandler YOUR_PROGRAM",
        checks=("VLM305", "VLM304"),
        source="Python, faulthandler",
        rank="symptom",
    ),
    KnownText(
        name="xformers-broken",
        code="VLM030",
        anchors=("xformers",),
        pattern=r"xFormers can't load C\+\+/CUDA extensions|xFormers was built for|xformers[\w./-]{0,160}\.so: "
        r"undefined symbol",
        example="WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for:",
        says="xformers was built for another torch, CUDA or Python.",
        fix="Install the xformers of this torch, or do without: torch's own sdpa is as good for most models.",
        commands=("python -m pip install --upgrade xformers", "python -m pip uninstall -y xformers"),
        verify="python -m xformers.info",
        checks=("VLM313",),
        source="xformers 0.0.35, _cpp_lib.py",
    ),
)
