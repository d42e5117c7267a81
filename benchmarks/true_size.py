"""GLM-4V-9B and CogVLM2-19B at true size, as remote code of our own: ``device_map="auto"`` beside the planner's map.

    python benchmarks/true_size.py --out FOLDER [--free 23.5,23.5] [--budget SECONDS] [glm4v] [cogvlm2]
    python benchmarks/true_size.py --out FOLDER --tiny            # here, without a GPU: shapes, plan, one call on the CPU

Names, shapes and order of registration are those of the published checkpoints (``remote_code/modeling_true_size.py``).
The weights are zeros in sparse files, so that nothing is written and ``from_pretrained`` takes its usual way.
``ballast.py`` holds the memory beyond ``--free`` GiB. Every step runs in a process of its own. For each map: does it load,
what is on which GPU, is a block cut, what does ``check-map`` say before, what does a call say, and what is the longest
prompt with and without an image.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
NAMES = {"glm4v": "THUDM/glm-4v-9b", "cogvlm2": "THUDM/cogvlm2-llama3-chat-19B"}
CLASSES = {"glm4v": "ChatGLMForConditionalGeneration", "cogvlm2": "CogVLMForCausalLM"}
IMAGE_PLACES = {"glm4v": 1602, "cogvlm2": 2306}
"""Tokens of one image with its two marks: (1120 / 14 / 2)^2 and (1344 / 14 / 2)^2."""
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--free", default="23.5,23.5", help="GiB left free on each GPU")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("models", nargs="*", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step:
        folder, mode, seconds = options.step.split("|")
        answer = measure(options.models[0], Path(folder), mode, time.monotonic() + float(seconds), is_tiny=options.tiny)
        (options.out / "step.json").write_text(json.dumps(answer))
        return 0
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Both maps of every model, each in a process of its own."""
    deadline = time.monotonic() + options.budget
    models = options.models or list(NAMES)
    results: dict[str, Any] = {}
    ballast = None if options.tiny else hold(options.free.split(","))
    try:
        for model in models:
            folder = Path(tempfile.mkdtemp(prefix=f"{model}-"))
            build(model, folder, is_tiny=options.tiny)
            for left, mode in zip((4, 3, 2, 1)[-2 * (len(models) - models.index(model)) :], ("auto", "plan"), strict=False):
                seconds = max(20.0, (deadline - time.monotonic()) / left)
                results[f"{model} {mode}"] = step(options, model, folder, mode, seconds)
                (options.out / "true_size.json").write_text(json.dumps(results, indent=1) + "\n")
                print(model, mode, json.dumps(results[f"{model} {mode}"])[:1500], flush=True)
            shutil.rmtree(folder)
    finally:
        if ballast is not None:
            ballast.communicate()
    return 0


def hold(free: list[str]) -> subprocess.Popen[str]:
    """Take the memory beyond what shall be free."""
    command = [sys.executable, str(HERE / "ballast.py"), *free]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    print(process.stdout.readline().strip(), flush=True)
    return process


def step(options: argparse.Namespace, model: str, folder: Path, mode: str, seconds: float) -> dict[str, Any]:
    """One map of one model, in a process of its own."""
    found = options.out / "step.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", str(options.out), "--step", f"{folder}|{mode}|{seconds - 15}", model]
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if options.tiny else [])], capture_output=True, text=True, timeout=seconds, check=False
        )
        if found.exists():
            answer: dict[str, Any] = json.loads(found.read_text())
        else:
            answer = {"failed": f"exit {done.returncode}", "stderr": done.stderr[-800:]}
    except subprocess.TimeoutExpired:
        answer = {"failed": f"not done after {seconds:.0f} s"}
    return {**answer, "step_seconds": round(time.monotonic() - started, 1)}


def build(model: str, folder: Path, *, is_tiny: bool) -> None:
    """config.json, the code, and weights of zeros in sparse files."""
    from vlm_doctor.sources.catalogue import catalogue

    config = dict(catalogue()[NAMES[model]].config)
    module = "modeling_true_size"
    classes = {"AutoConfig": f"{module}.TrueSizeConfig", "AutoModelForCausalLM": f"{module}.{CLASSES[model]}"}
    config.update(architectures=[CLASSES[model]], auto_map=classes, torch_dtype="bfloat16")
    if is_tiny:
        config = shrunk(config)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(HERE / "remote_code" / f"{module}.py", folder)
    write_zeros(folder / "model.safetensors", shapes(folder))


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same names at a hundredth of the width, four layers and three blocks."""
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_layers": 4, "vocab_size": 256, "padded_vocab_size": 256}
    small |= {"intermediate_size": 96, "ffn_hidden_size": 96, "num_attention_heads": 8, "kv_channels": 8}
    tower = {"num_hidden_layers": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "image_size": 112}
    found = {key: small.get(key, value) for key, value in config.items()}
    return {**found, "vision_config": {**config["vision_config"], **tower, "num_positions": 65}}


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Parameters of the class, made without data."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def write_zeros(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16 whose data are a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        size = 2
        for edge in shape:
            size *= edge
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def measure(model: str, folder: Path, mode: str, deadline: float, *, is_tiny: bool) -> dict[str, Any]:
    """All about one map."""
    import torch
    import transformers

    from vlm_doctor import Policy, Workload, collect, load_machine, load_profile, plan
    from vlm_doctor.planner.map_check import check_map

    profile = load_profile(str(folder))
    machine = load_machine("24GiB,24GiB") if is_tiny else collect(with_torch=False)
    workload = Workload(images=1, text_tokens=256, new_tokens=4)
    planned = plan(profile, machine, workload, Policy(min_gpus=2, max_gpus=2))
    answer: dict[str, Any] = {
        "parameters": profile.elements,
        "plan": {
            "fits": planned.fits,
            "longest_prompt_tokens": planned.longest_prompt_tokens,
            "peak_gib": [round(stage.peak_bytes / GIB, 2) for stage in planned.stages],
            "constraints": list(planned.notes),
        },
    }
    if not planned.fits and mode == "plan":
        return {**answer, "failed": planned.shortage.message if planned.shortage else "does not fit"}
    asked: Any = "auto" if mode == "auto" else dict(planned.device_map)
    options: dict[str, Any] = {} if is_tiny else {"device_map": asked}
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.bfloat16, **options
        )
    except Exception as error:  # noqa: BLE001 - the library's own failure is the result
        return {**answer, "failed": f"load: {type(error).__name__}: {str(error)[:300]}"}
    loaded.eval()
    placed = dict(getattr(loaded, "hf_device_map", None) or planned.device_map)
    checked = check_map(placed, profile, machine, workload)
    answer.update(
        devices={str(device): sum(d == device for d in placed.values()) for device in placed.values()},
        cut_blocks=sorted({block for key in placed if (block := block_of(key)) and block != key}),
        check=[f"{found.severity} {found.code} {found.message}" for found in checked.findings if found.severity != "info"],
    )
    first = next(iter(loaded.parameters())).device
    places = image_places(loaded, model, is_tiny=is_tiny)
    for name, images in (("text", 0), ("image", 1)):
        said = ask(loaded, first, places + 32, images)
        answer[name] = said or "runs"
        if not said and not is_tiny and time.monotonic() < deadline:
            until = time.monotonic() + (deadline - time.monotonic()) / (2 - images)
            answer[f"longest_{name}"] = longest(loaded, first, places, images, until)
    return answer


def block_of(key: str) -> str:
    """The block that a key lies in, or is."""
    parts = key.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: at + 1]) if at is not None else ""


def image_places(model: Any, name: str, *, is_tiny: bool) -> int:
    """Places of an image in the prompt."""
    if not is_tiny:
        return IMAGE_PLACES[name]
    vision = model.config.vision_config
    return int((vision["image_size"] // vision["patch_size"] // 2) ** 2 + 2)


def ask(model: Any, device: Any, tokens: int, images: int) -> str:
    """One short generation; what went wrong, or nothing."""
    import torch

    edge = model.config.vision_config["image_size"]
    inputs: dict[str, Any] = {"input_ids": torch.full((1, tokens), 7, device=device)}
    if images:
        inputs["images"] = torch.zeros(1, 3, edge, edge, dtype=torch.bfloat16, device=device)
    try:
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    except Exception as error:  # noqa: BLE001 - the crash is the result
        said = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    else:
        said = ""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return said


def longest(model: Any, device: Any, places: int, images: int, until: float) -> int:
    """Most prompt tokens that run, to 2 %."""
    low, high, tokens = places + 32, 0, 16384
    while time.monotonic() < until:
        if ask(model, device, tokens, images):
            high = tokens
        else:
            low = tokens
        if high and high - low <= 0.02 * low:
            break
        tokens = (low + high) // 2 if high else 2 * tokens
    return low


if __name__ == "__main__":
    sys.exit(main())
