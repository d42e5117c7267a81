"""Error texts of placing, loading and calling a model: transformers, accelerate, the code of checkpoints, the hub."""

from __future__ import annotations

from .known_texts import KnownText

_PIN = "python -m pip install 'transformers{wanted}'"
_REMOTE = "The checkpoint brings its own code, written for another version of transformers: "
_RELOAD = "python -c 'from transformers import AutoConfig; AutoConfig.from_pretrained(\"MODEL\")'"

TEXTS: tuple[KnownText, ...] = (
    KnownText(
        name="tensors-apart",
        code="VLM020",
        anchors=("expected all tensors to be on the same device", "indices should be either on cpu or on the same device"),
        pattern=r"Expected all tensors to be on the same device"
        r"(?:[^\n]{0,60}found at least two devices, (?P<device_a>[a-z]{2,6}(?::\d{1,3})?)(?: and |, "
        r")(?P<device_b>[a-z]{2,6}(?::\d{1,3})?))?"
        r"(?:[^\n]{0,20}but got (?P<argument>\w{1,40}) is on (?P<device_c>[a-z]{2,6}(?::\d{1,3})?), different from other "
        r"tensors on "
        r"(?P<device_d>[a-z]{2,6}(?::\d{1,3})?))?"
        r"|indices should be either on cpu or on the same device as the indexed tensor",
        example="RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
        "and cuda:1!",
        says="Two tensors of one operation are on different devices: the device_map cuts where it must not.",
        fix="Take the map that the planner makes, or let it judge yours.",
        commands=("vlm-doctor check-map MAP --model MODEL", "vlm-doctor plan MODEL --format python"),
        verify="vlm-doctor check-map MAP --model MODEL",
        source="CogVLM2 #10, GLM-4 #32, #93, #350, transformers #33816, InternVL #118, LlamaFactory #6910",
    ),
    KnownText(
        name="meta-tensor",
        code="VLM021",
        anchors=("meta is not on the expected device", "cannot copy out of meta tensor", "meta tensor"),
        pattern=r"Tensor on device meta is not on the expected device (?P<device>[a-z]{2,6}(?::\d{1,3})?)"
        r"|Cannot copy out of meta tensor|is a meta tensor",
        example="RuntimeError: Tensor on device meta is not on the expected device cuda:0!",
        says="A part of the model has no weights: it was offloaded, or the map or the checkpoint does not name it.",
        fix="Let the map name every module, and keep all of them on GPUs.",
        commands=("vlm-doctor check-map MAP --model MODEL",),
        verify="vlm-doctor check-map MAP --model MODEL",
        source="torch/_refs, accelerate hooks; transformers #31676",
    ),
    KnownText(
        name="map-incomplete",
        code="VLM611",
        anchors=("doesn't have any device set", "does not give any device"),
        pattern=r"(?P<module>[\w.]{1,120})? ?doesn't have any device set"
        r"|does not give any device for the following parameters: (?P<parameters>[^\n]{1,200})",
        example="ValueError: model.visual.merger.mlp.0.weight doesn't have any device set.",
        says="The device_map gives no device to a part of the model.",
        fix="Let the map name every module of this version of the model.",
        commands=("vlm-doctor check-map MAP --model MODEL",),
        verify="vlm-doctor check-map MAP --model MODEL",
        source="accelerate, check_device_map; InternVL #688, #774",
    ),
    KnownText(
        name="map-spills",
        code="VLM619",
        anchors=("dispatched on the cpu or the disk", "offload_folder", "offload_dir", "offload the whole model"),
        pattern=r"Some modules are dispatched on the CPU or the disk|Please provide an? `offload_folder`"
        r"|We need an `offload_dir`|trying to offload the whole model to the disk",
        example="ValueError: Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to "
        "fit the "
        "quantized model.",
        says="The GPUs have no room for the whole model, so a part was put on the CPU or the disk.",
        fix="Free memory, quantize, or use more GPUs; the planner says what is missing.",
        commands=("vlm-doctor plan MODEL --suggest-gpus",),
        verify="vlm-doctor plan MODEL",
        checks=("VLM501", "VLM502", "VLM201", "VLM203"),
        source="transformers, quantizer_bnb_4bit.py; accelerate, dispatch_model; Qwen3-VL #1131",
    ),
    KnownText(
        name="placed-model-moved",
        code="VLM022",
        anchors=(
            "can't move a model that has some modules offloaded",
            "dispatched using accelerate hooks",
            "`.to` is not supported",
        ),
        pattern=r"can't move a model that has some modules offloaded|shouldn't move a model that is dispatched using "
        r"accelerate hooks"
        r"|`\.to` is not supported for `?(?:4|8)-bit`?",
        example="RuntimeError: You can't move a model that has some modules offloaded to cpu or disk.",
        says="model.to(...) or .cuda() was called on a model that accelerate had already placed.",
        fix="Leave out .to() and .cuda() where device_map was given, and move only the inputs: inputs.to(model.device).",
        verify="python YOUR_PROGRAM",
        source="accelerate, big_modeling.py; transformers, modeling_utils.py",
    ),
    KnownText(
        name="class-cannot-be-split",
        code="VLM023",
        anchors=("does not support `device_map", "does not support device_map"),
        pattern=r"(?P<model_class>\w{1,80}) does not support `?device_map",
        example="ValueError: CogVLMForCausalLM does not support `device_map='auto'`. To implement support, the model "
        "class needs to "
        "implement the `_no_split_modules` attribute.",
        says="The model's class does not say which blocks must stay whole, so transformers does not split it.",
        fix="Give an explicit map; the planner makes one from the module names.",
        commands=("vlm-doctor plan MODEL --format python",),
        verify="vlm-doctor check-map MAP --model MODEL",
        source="transformers, _get_device_map",
    ),
    KnownText(
        name="dtypes-differ",
        code="VLM024",
        anchors=("must have the same dtype", "expected scalar type", "should be the same", "expected m1 and m2"),
        pattern=r"must have the same dtype|expected scalar type (?P<expected>\w{1,20}) but found (?P<found>\w{1,20})"
        r"|Input type \((?P<input>[\w.]{1,40})\) and (?:weight|bias) type \((?P<weight>[\w.]{1,40})\) should be the same",
        example="RuntimeError: Input type (torch.cuda.FloatTensor) and weight type (torch.cuda.BFloat16Tensor) should "
        "be the same",
        says="Inputs and weights have different types; most often the pixels were left in float32.",
        fix="Cast the pixels to the model's type: inputs['pixel_values'].to(model.dtype).",
        verify="python YOUR_PROGRAM",
        source="torch, convolution and matmul; transformers, processors give float32 pixels",
    ),
    KnownText(
        name="nonsense-probabilities",
        code="VLM025",
        anchors=("probability tensor contains",),
        pattern=r"probability tensor contains either `?inf`?, `?nan`? or element < 0",
        example="RuntimeError: probability tensor contains either `inf`, `nan` or element < 0",
        says="The logits are not numbers: float16 overflowed, or data was scrambled between GPUs.",
        fix="Try bfloat16, then once on one GPU; if one GPU is right and two are wrong, peer copies are broken.",
        commands=("CUDA_VISIBLE_DEVICES=0 python YOUR_PROGRAM", "nvidia-smi topo -p2p r"),
        verify="python YOUR_PROGRAM",
        checks=("VLM404", "VLM406"),
        source="torch.multinomial; accelerate #4036, pytorch #84803, transformers #47942",
    ),
    KnownText(
        name="image-tokens-differ",
        code="VLM026",
        anchors=("image features and image tokens do not match", "image tokens do not match", "number of image tokens"),
        pattern=r"[Ii]mage features and image tokens do not match(?:[^\n]{0,40}?tokens: (?P<tokens>\d{1,9}),? "
        r"features:? (?P<features>\d{1,9}))?",
        example="ValueError: Image features and image tokens do not match: tokens: 1296, features 1305",
        says="The prompt has another number of image places than the vision tower gives features.",
        fix="Make text and pixels in one call of the processor, with the chat template, and do not truncate.",
        verify="python YOUR_PROGRAM",
        source="transformers, get_placeholder_mask of the model classes",
    ),
    KnownText(
        name="remote-code-needs-consent",
        code="VLM603",
        anchors=("trust_remote_code",),
        pattern=r"requires you to execute the (?:configuration|modeling|model) file|contains custom code which must "
        r"be executed"
        r"|set the option `trust_remote_code=True`",
        example="ValueError: The repository THUDM/cogvlm2-llama3-chat-19B contains custom code which must be executed "
        "to correctly "
        "load the model. Please pass the argument `trust_remote_code=True` to allow custom code to be run.",
        says="The model's class is code of the checkpoint, and nobody allowed it to run.",
        fix="Read that code; if you trust it, pass trust_remote_code=True and pin revision.",
        verify="python YOUR_PROGRAM",
        checks=("VLM321",),
        source="transformers, dynamic_module_utils.py, resolve_trust_remote_code",
    ),
    KnownText(
        name="remote-code-past",
        code="VLM036",
        anchors=("_extract_past_from_model_output",),
        pattern=r"'(?P<model_class>\w{1,80})' object has no attribute '_extract_past_from_model_output'",
        example="AttributeError: 'CogVLMForCausalLM' object has no attribute '_extract_past_from_model_output'",
        says=_REMOTE + "4.49 removed _extract_past_from_model_output.",
        fix="Load a newer revision of the checkpoint, or install the transformers it was written for.",
        commands=(_PIN.format(wanted="<4.49"),),
        verify="python YOUR_PROGRAM",
        checks=("VLM321",),
        source="CogVLM2 #218, GLM-4 #715, #716, CogAgent #42",
    ),
    KnownText(
        name="remote-code-padding-side",
        code="VLM036",
        anchors=("'padding_side'",),
        pattern=r"(?P<tokenizer_class>\w{1,80})\._pad\(\) got an unexpected keyword argument 'padding_side'"
        r"|_pad\(\) got an unexpected keyword argument 'padding_side'",
        example="TypeError: ChatGLM4Tokenizer._pad() got an unexpected keyword argument 'padding_side'",
        says=_REMOTE + "4.45 passes padding_side to the tokenizer's _pad.",
        fix="Load a newer revision of the checkpoint, or install the transformers it was written for.",
        commands=(_PIN.format(wanted="<4.45"),),
        verify="python YOUR_PROGRAM",
        checks=("VLM321",),
        source="GLM-4 #577, #578, #732, ms-swift #2151",
    ),
    KnownText(
        name="remote-code-cache",
        code="VLM036",
        anchors=(
            "'str' object has no attribute 'shape'",
            "'dynamiccache' object",
            "'nonetype' object has no attribute 'shape'",
            "get_usable_length",
            "seen_tokens",
            "get_max_length",
        ),
        pattern=r"'(?:str|NoneType)' object has no attribute 'shape'"
        r"|'(?P<cache_class>\w{0,30}Cache)' object has no attribute "
        r"'(?P<missing>seen_tokens|get_max_length|get_usable_length|key_cache)'"
        r"|'(?P<other_class>\w{0,30}Cache)' object is not subscriptable",
        example="AttributeError: 'str' object has no attribute 'shape'",
        says=_REMOTE + "its cache of keys and values (past_key_values) has another form today.",
        fix="Load a newer revision of the checkpoint, or install the transformers it was written for.",
        commands=(_PIN.format(wanted="<4.42"),),
        verify="python YOUR_PROGRAM",
        checks=("VLM321",),
        source="CogVLM #504, #516, CogVLM2 #142, #156 (4.40 and 4.41 work); transformers, cache_utils.py",
    ),
    KnownText(
        name="remote-code-names",
        code="VLM036",
        anchors=(
            "cannot import name",
            "has no attribute 'generate'",
            "all_tied_weights_keys",
            "_initialize_weights",
            "_supports_sdpa",
            "has no setter",
            "can't set attribute",
        ),
        pattern=r"cannot import name '(?P<missing>\w{1,80})' from '(?P<module>transformers[\w.]{0,120})'"
        r"|'(?P<model_class>\w{1,80})' object has no attribute "
        r"'(?P<attribute>generate|all_tied_weights_keys|_initialize_weights|_supports_sdpa)'"
        r"|property '(?P<property>\w{1,60})' of '(?P<owner>\w{1,80})' object has no setter",
        example="ImportError: cannot import name 'is_flash_attn_greater_or_equal_2_10' from 'transformers.utils' "
        "(/opt/venv/lib/python3.12/site-packages/transformers/utils/__init__.py)",
        says="Code uses a name that the installed transformers does not have: it was written for another version.",
        fix="Load a newer revision of the checkpoint or the package, or install the transformers that it names.",
        commands=("python -m pip show transformers", _RELOAD),
        verify="python YOUR_PROGRAM",
        checks=("VLM309", "VLM321"),
        source="transformers, MIGRATION_GUIDE_V5; ComfyUI_CogView4_Wrapper #6",
    ),
    KnownText(
        name="model-type-unknown",
        code="VLM037",
        anchors=(
            "does not recognize this architecture",
            "unrecognized configuration class",
            "unrecognized model in",
            "keyerror: '",
        ),
        pattern=r"model type `?(?P<model_type>[\w.-]{1,60})`? but Transformers does not recognize this architecture"
        r"|Unrecognized configuration class|Unrecognized model in"
        r"|KeyError: '(?P<key>(?:qwen\d?|glm\d?|internvl|mllama|llava|gemma|idefics|paligemma|minicpm|pixtral"
        r"|mistral)\w{0,30})'",
        example="ValueError: The checkpoint you are trying to load has model type `glm4v` but Transformers does not "
        "recognize this "
        "architecture.",
        says="The installed transformers does not know this kind of model; most often it is older than the model.",
        fix="Update transformers; if the newest does not know it either, the checkpoint brings its own code.",
        commands=("python -m pip install --upgrade transformers",),
        verify=_RELOAD,
        checks=("VLM309", "VLM308"),
        source="transformers, configuration_auto.py",
    ),
    KnownText(
        name="argument-renamed",
        code="VLM038",
        anchors=("got an unexpected keyword argument",),
        pattern=r"got an unexpected keyword argument "
        r"'(?P<argument>load_in_8bit|load_in_4bit|dtype|torch_dtype|use_flash_attention_2)'",
        example="TypeError: Qwen2VLForConditionalGeneration.__init__() got an unexpected keyword argument 'load_in_8bit'",
        says="An argument of from_pretrained was renamed: this transformers does not know it.",
        fix="Write quantization_config=BitsAndBytesConfig(...) for load_in_8bit, dtype= from 4.56 on and torch_dtype= "
        "before, "
        "attn_implementation= for use_flash_attention_2.",
        commands=("python -m pip show transformers",),
        verify="python YOUR_PROGRAM",
        source="transformers 5.23, MIGRATION_GUIDE_V5",
    ),
    KnownText(
        name="hub-access",
        code="VLM039",
        anchors=(
            "gated repo",
            "401 client error",
            "403 client error",
            "not a valid model identifier",
            "couldn't connect to",
            "offline mode is enabled",
            "localentrynotfound",
            "repositorynotfound",
        ),
        pattern=r"(?:Cannot access|trying to access a) gated repo|40[13] Client Error"
        r"|is not a local folder and is not a valid model identifier"
        r"|couldn't connect to '?https://huggingface\.co|offline mode is "
        r"enabled|LocalEntryNotFoundError|RepositoryNotFoundError",
        example="OSError: You are trying to access a gated repo. 401 Client Error. Cannot access gated repo for url "
        "https://huggingface.co/meta-llama/Llama-3.2-11B-Vision/resolve/main/config.json.",
        says="The checkpoint cannot be fetched: the name is wrong, access was not granted, or the network is off.",
        fix="Check the name, log in, accept the model's terms, or fetch it before HF_HUB_OFFLINE is set.",
        commands=("hf auth whoami", "hf download MODEL config.json"),
        verify="hf download MODEL config.json",
        source="huggingface_hub, errors.py",
    ),
    KnownText(
        name="checkpoint-damaged",
        code="VLM040",
        anchors=(
            "deserializing header",
            "safetensorerror",
            "unable to load weights from",
            "pytorchstreamreader",
            "unexpected eof",
        ),
        pattern=r"Error while deserializing header: ?(?P<reason>\w{0,40})|SafetensorError|Unable to load weights from"
        r"|PytorchStreamReader failed|unexpected EOF",
        example="safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer",
        says="A file of the checkpoint is cut short, or a pointer of Git LFS was fetched in its place.",
        fix="Fetch the file again.",
        commands=("ls -lL CHECKPOINT", "hf download MODEL --force-download"),
        verify="vlm-doctor plan CHECKPOINT",
        checks=("VLM505", "VLM511"),
        source="safetensors, SafeTensorError; torch, inline_container.cc",
    ),
    KnownText(
        name="weights-only",
        code="VLM035",
        anchors=("weights only load failed", "weights_only", "serious vulnerability issue in `torch.load`"),
        pattern=r"Weights only load failed|serious vulnerability issue in `torch\.load`"
        r"|Unsupported (?:global|operand)[^\n]{0,80}weights_only",
        example="_pickle.UnpicklingError: Weights only load failed. This file can still be loaded, to do so you have "
        "two options",
        says="A checkpoint in pickle format holds more than tensors, or torch is too old to read such a file safely.",
        fix="Take the safetensors files of the same checkpoint; or torch 2.6 or later for a file of plain tensors.",
        commands=("hf download MODEL --include '*.safetensors' --include '*.json'",),
        verify="vlm-doctor plan MODEL",
        source="torch 2.6, torch.load (weights_only=True by default); transformers, check_torch_load_is_safe "
        "(CVE-2025-32434)",
    ),
    KnownText(
        name="accelerate-drops-a-gpu",
        code="VLM108",
        anchors=("seems unavailable, proceeding to check",),
        pattern=r"Device (?P<device>\d{1,4}) seems unavailable, Proceeding to check subsequent devices",
        example="Device 1 seems unavailable, Proceeding to check subsequent devices.",
        says="accelerate could not use a GPU and leaves it out of device_map='auto' without an error.",
        fix="Find out why this GPU fails, or hide it.",
        commands=("CUDA_VISIBLE_DEVICES=1 python -c 'import torch; torch.empty(1, device=0)'",),
        checks=("VLM108", "VLM109", "VLM111", "VLM501"),
        source="accelerate, utils/modeling.py, get_max_memory",
    ),
    KnownText(
        name="map-key-unknown-to-loader",
        code="VLM611",
        anchors=("keyerror: '",),
        pattern=r"KeyError: '(?P<parameter>(?:model|lm_head|language_model|visual|vision_model"
        r"|transformer)[\w.]{0,160}\.(?:weight|bias))'",
        example="KeyError: 'model.language_model.embed_tokens.weight'",
        says="The device_map does not name a module of this version of the model: the names have changed.",
        fix="Let the map name every module of the installed version.",
        commands=("vlm-doctor check-map MAP --model MODEL",),
        verify="vlm-doctor check-map MAP --model MODEL",
        source="seen with transformers 4.57 and a map of 4.51; InternVL #688, #774",
    ),
    KnownText(
        name="parts-offloaded",
        code="VLM619",
        anchors=("on the meta device because they were offloaded",),
        pattern=r"on the meta device because they were offloaded to the (?P<where>cpu|disk)",
        example="Some parameters are on the meta device because they were offloaded to the cpu.",
        says="The GPUs have no room for the whole model, and a part runs from the host's memory or the disk.",
        fix="Free memory, quantize, or use more GPUs; the planner says what is missing.",
        commands=("vlm-doctor plan MODEL --suggest-gpus",),
        verify="vlm-doctor plan MODEL",
        checks=("VLM501", "VLM502", "VLM201", "VLM203"),
        source="accelerate, big_modeling.py; GLM-4 #577",
        rank="symptom",
    ),
)
