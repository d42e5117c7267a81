"""GLM-4V-9B and CogVLM2-19B at true size, as remote code of our own: ``device_map="auto"`` beside the planner's map.

On two GPUs of 80 GiB or more, in one call of less than nine minutes (``WHEELS`` holds what that machine lacks)::

    WHEELS=FOLDER OUT=FOLDER SCRIPT=true_size.py benchmarks/run_on_h200.sh --free 23.5,23.5 --budget 520

Here, without a GPU, in two minutes (shapes, plan, one call on the CPU, ``try --cpu``, pytest)::

    python benchmarks/true_size.py --out FOLDER --tiny

Names, shapes and order of registration are those of the published checkpoints (``remote_code/``); tensors are those of the
catalogue, byte for byte. The weights are zeros in sparse files, so that nothing is written and ``from_pretrained`` goes its
usual way; positions and norms are then zero too, so that answers say nothing but whether the model runs. ``ballast.py``
holds the memory beyond ``--free`` GiB. Every step runs in a process of its own with a time limit, the most telling ones
first: for each model ``vlm-doctor plan``, then for the planner's map and for ``auto``: does it load, what is on which GPU,
is a block cut, what does ``check-map`` say before, what does a call with text and with an image say, how long can the
prompt be with and without an image; then the planner's map in nf4 and int8, with its predicted peaks and the measured ones,
``vlm-doctor try --beside-auto`` and ``pytest --vlm-gpus=auto``.
``true_size.json`` and ``table.md`` in ``--out`` are written anew after each step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ballast import held

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
NAMES = {"glm4v": "THUDM/glm-4v-9b", "cogvlm2": "THUDM/cogvlm2-llama3-chat-19B"}
CLASSES = {
    "glm4v": ("modeling_chatglm", "ChatGLMConfig", "ChatGLMForConditionalGeneration"),
    "cogvlm2": ("modeling_cogvlm", "CogVLMConfig", "CogVLMForCausalLM"),
}
MORE = {"glm4v": {}, "cogvlm2": {"num_multi_query_heads": 8}}
"""Of the published config.json, which the catalogue leaves out."""
IMAGE_PLACES = {"glm4v": 1602, "cogvlm2": 2306}
"""Tokens of one image with its two marks: (1120 / 14 / 2)^2 and (1344 / 14 / 2)^2."""
GIB = 2**30
STEPS = (
    ("plan", 60),
    ("run plan", 80),
    ("run auto", 80),
    ("run plan nf4", 60),
    ("run plan int8", 60),
    ("try", 130),
    ("pytest", 70),
)
"""Step and its limit in seconds, for each model in turn, the first three before the rest. The quantized ones need
bitsandbytes."""
FIRST = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--free", default="23.5,23.5", help="GiB left free on each GPU")
    parser.add_argument("--budget", type=float, default=520, help="seconds in all")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("models", nargs="*", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step:
        folder, mode, seconds = options.step.split("|")
        child = Child(options, options.models[0], Path(folder), mode, time.monotonic() + float(seconds))
        child.run()
        return 0
    return Run(options).all()


class Run:
    """All steps of all models, and what became of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.is_tiny: bool = options.tiny
        self.out: Path = options.out.resolve()
        self.deadline = time.monotonic() + options.budget
        self.models: list[str] = options.models or list(NAMES)
        self.results: dict[str, Any] = {}
        self.folders: dict[str, Path] = {}

    def all(self) -> int:
        """In the order of their worth."""
        try:
            with nullcontext("") if self.is_tiny else held(self.options.free.split(",")) as line:
                print("ballast:", line, flush=True)
                for model in self.models:
                    self.folders[model] = Path(tempfile.mkdtemp(prefix=f"{model}-"))
                    build(model, self.folders[model], is_tiny=self.is_tiny)
                for steps in (STEPS[:FIRST], STEPS[FIRST:]):
                    for model in self.models:
                        for name, limit in steps:
                            self.step(model, name, limit)
        finally:
            for folder in self.folders.values():
                shutil.rmtree(folder, ignore_errors=True)
        print((self.out / "table.md").read_text())
        return 0

    def step(self, model: str, name: str, limit: float) -> None:
        """One step; what it says, or why it failed, is its result."""
        left = self.deadline - time.monotonic()
        started = time.monotonic()
        if left < 15:
            answer: dict[str, Any] = {"failed": "no time left"}
        else:
            run = {"plan": self.plan, "try": self.attempt, "pytest": self.pytest}.get(name)
            try:
                answer = run(model, min(limit, left)) if run else self.child(model, name, min(limit, left))
            except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
                answer = {"failed": f"{type(error).__name__}: {error}"[:400]}
        self.results[f"{model} {name}"] = {**answer, "step_seconds": round(time.monotonic() - started, 1)}
        print(f"{model} {name}: {json.dumps(self.results[f'{model} {name}'])[:1200]}", flush=True)
        (self.out / "true_size.json").write_text(
            json.dumps({"free_gib": self.options.free, **self.results}, indent=1) + "\n"
        )
        (self.out / "table.md").write_text(table(self.results))

    # -- steps

    def plan(self, model: str, limit: float) -> dict[str, Any]:
        """``vlm-doctor plan``, as a user types it."""
        done = self.doctor(["plan", str(self.folders[model]), "--min-gpus", "2", "--max-gpus", "2"], limit)
        found = json.loads(done.stdout)["plan"]
        auto = found.get("auto") or {}
        return {
            "exit": done.returncode,
            "fits": found["fits"],
            "stages_gib": [
                round(sum(line["size_bytes"] for line in stage["ledger"] if line["kind"] != "left") / GIB, 2)
                for stage in found["stages"]
            ],
            "longest_prompt_tokens": found.get("longest_prompt_tokens"),
            "notes": found["notes"],
            "auto": {key: auto.get(key) for key in ("fits", "cut_blocks", "parted", "longest_prompt_tokens", "verdict")},
            "stderr": done.stderr[-300:],
        }

    def attempt(self, model: str, limit: float) -> dict[str, Any]:
        """``vlm-doctor try --beside-auto``."""
        words = ["try", str(self.folders[model]), "--trust-remote-code", "--text-tokens", "256", "--new-tokens", "4"]
        words += ["--deadline", str(int(limit / (1 if self.is_tiny else 2)) - 5)]
        words += ["--cpu"] if self.is_tiny else ["--beside-auto", "--min-gpus", "2", "--max-gpus", "2"]
        done = self.doctor(words, limit)
        trial = json.loads(done.stdout)["trial"]
        kept = ("route", "state", "reached", "is_finite", "is_repeatable", "astray_count", "cut_count", "load_seconds")
        attempts = [
            {**{key: one.get(key) for key in kept}, "peaks": one.get("peaks"), "error": (one.get("traceback") or "")[-400:]}
            for one in trial["attempts"]
        ]
        findings = [f"{one['severity']} {one['code']} {one['message']}" for one in trial["findings"]]
        return {"exit": done.returncode, "attempts": attempts, "findings": findings, "stderr": done.stderr[-300:]}

    def doctor(self, words: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        """One call of the doctor with JSON on its output."""
        machine = ["--machine", "24GiB,24GiB"] if self.is_tiny and words[0] == "plan" else []
        command = [sys.executable, "-m", "vlm_doctor", *words, "--json", "--offline", *machine]
        return subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environment())

    def pytest(self, model: str, limit: float) -> dict[str, Any]:
        """A test with the fixture ``vlm``."""
        from pytest_command import pytest_command, pytest_environment

        folder = self.folders[model] / "tests"
        folder.mkdir(exist_ok=True)
        places = tiny_places(self.folders[model]) if self.is_tiny else IMAGE_PLACES[model]
        requires = "" if self.is_tiny else "@pytest.mark.vlm_requires(gpus=2)"
        (folder / "test_true_size.py").write_text(
            TEST.format(folder=str(self.folders[model]), places=places, requires=requires)
        )
        gpus = "none" if self.is_tiny else "auto"
        command = pytest_command("-q", "-W", "ignore", "-s", str(folder), f"--vlm-gpus={gpus}")
        variables = {name: value for name, value in environment().items() if name not in os.environ or name == "PYTHONPATH"}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
            cwd=folder,
            env=pytest_environment(**variables),
        )
        lines = done.stdout.strip().splitlines()
        return {
            "exit": done.returncode,
            "last_line": lines[-1] if lines else done.stderr[-300:],
            "said": [line for line in lines if line.startswith(("peak", "VLM", "E  "))][:12],
        }

    def child(self, model: str, mode: str, limit: float) -> dict[str, Any]:
        """One map of one model, in a process of its own, so that its memory is gone afterwards."""
        found = self.out / "step.json"
        found.unlink(missing_ok=True)
        step = f"{self.folders[model]}|{mode}|{limit - 12}"
        command = [sys.executable, __file__, "--out", str(self.out), "--step", step, model]
        command += ["--tiny"] if self.is_tiny else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environment())
            end = {} if done.returncode == 0 else {"failed": f"exit {done.returncode}", "stderr": done.stderr[-600:]}
        except subprocess.TimeoutExpired:
            end = {"failed": f"not done after {limit:.0f} s"}
        # A step saves what it has as it goes.
        return {**(json.loads(found.read_text()) if found.exists() else {}), **end}


TEST = """
import pytest
import torch


@pytest.mark.vlm({folder!r}, trust_remote_code=True)
{requires}
def test_an_image_and_a_text(vlm):
    device = torch.device(vlm.input_device)
    edge = vlm.model.config.vision_config["image_size"]
    ids = torch.full((1, {places} + 257), 7, device=device)
    kinds = torch.zeros_like(ids)
    kinds[:, 1 : 1 + {places}] = 1
    pixels = torch.zeros(1, 3, edge, edge, dtype=vlm.model.dtype, device=device)
    more = {{"token_type_ids": kinds}} if "CogVLM" in type(vlm.model).__name__ else {{}}
    with torch.inference_mode():
        found = vlm.model.generate(input_ids=ids, images=pixels, max_new_tokens=4, do_sample=False, **more)
    assert found.shape[1] == ids.shape[1] + 4
    used = {{str(parameter.device) for parameter in vlm.model.parameters()}}
    assert len(used) == max(1, len(vlm.gpus))
    print("\\npeak", {{gpu: round(size / 2**30, 2) for gpu, size in vlm.peak_bytes().items()}}, "devices", sorted(used))
"""


def environment() -> dict[str, str]:
    """Without a network, and with this tree first."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH", ""))))
    modules = os.environ.get("HF_MODULES_CACHE") or tempfile.gettempdir() + "/true-size-modules"
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "HF_MODULES_CACHE": modules}


def build(model: str, folder: Path, *, is_tiny: bool) -> None:
    """config.json, the code, a tokenizer, and weights of zeros in a sparse file."""
    import tiny_remote

    from vlm_doctor.sources.catalogue import catalogue

    entry = catalogue()[NAMES[model]]
    module, config_class, model_class = CLASSES[model]
    auto_map = {"AutoConfig": f"{module}.{config_class}", "AutoModelForCausalLM": f"{module}.{model_class}"}
    config = {
        **entry.config,
        **MORE[model],
        "architectures": [model_class],
        "auto_map": auto_map,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(shrunk(config) if is_tiny else config))
    tiny_remote.copy_code(module, folder)
    write_tokenizer(folder)
    if is_tiny:
        write_zeros(folder / "model.safetensors", tiny_shapes(folder))
    else:
        write_zeros(folder / "model.safetensors", {name: one.shape for name, one in entry.checkpoint().tensors.items()})


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same names at a hundredth of the width, four layers and three blocks."""
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_layers": 4, "vocab_size": 256, "padded_vocab_size": 256}
    small |= {"intermediate_size": 96, "ffn_hidden_size": 96, "num_attention_heads": 8, "kv_channels": 8}
    tower = {"num_hidden_layers": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "image_size": 112}
    found = {key: small.get(key, value) for key, value in config.items()}
    return {**found, "vision_config": {**config["vision_config"], **tower, "num_positions": 65}}


def tiny_places(folder: Path) -> int:
    """Places of an image of the small model."""
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    return int((vision["image_size"] // vision["patch_size"] // 2) ** 2 + 2)


def tiny_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """What the small class stores, made without data."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_tokenizer(folder: Path) -> None:
    """Every byte a token: the published tokenizers are no question here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


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


class Child:
    """One map of one model."""

    def __init__(self, options: argparse.Namespace, model: str, folder: Path, mode: str, deadline: float) -> None:
        self.model, self.folder, self.deadline = model, folder, deadline
        _, self.map, *quantization = mode.split()
        self.quantization: Any = quantization[0] if quantization else None
        self.is_tiny: bool = options.tiny
        self.path: Path = options.out / "step.json"
        self.answer: dict[str, Any] = {}

    def add(self, **fields: Any) -> None:
        """Keep and write."""
        self.answer.update(fields)
        self.path.write_text(json.dumps(self.answer))

    def run(self) -> None:
        """Load it and call it."""
        import torch
        import transformers

        from vlm_doctor import Policy, Workload, collect, load_machine, load_profile, plan
        from vlm_doctor.planner.map_check import check_map
        from vlm_doctor.probes.loading import workload_options

        profile = load_profile(str(self.folder))
        machine = load_machine("24GiB,24GiB") if self.is_tiny else collect(with_torch=False)
        workload = Workload(images=1, text_tokens=257, new_tokens=2, quantization=self.quantization)
        planned = plan(profile, machine, workload, Policy(min_gpus=2, max_gpus=2))
        self.add(
            parameters=profile.elements,
            promised_tokens=planned.longest_prompt_tokens,
            planned_gib=[[round(size / GIB, 3) for size in (one.peak_bytes, one.reserved_bytes)] for one in planned.stages],
        )
        if not planned.fits and self.map == "plan":
            self.add(failed=planned.shortage.message if planned.shortage else "does not fit")
            return
        asked: Any = "auto" if self.map == "auto" else dict(planned.device_map)
        started = time.monotonic()
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                self.folder,
                trust_remote_code=True,
                dtype=torch.bfloat16,
                **workload_options(transformers, attention="sdpa", quantization=self.quantization, dtype=torch.bfloat16),
                **({} if self.is_tiny else {"device_map": asked}),
            ).eval()
        except Exception as error:  # noqa: BLE001 - the library's own failure is the result
            self.add(failed=f"load: {type(error).__name__}: {str(error)[:300]}")
            return
        self.add(load_seconds=round(time.monotonic() - started, 1))
        placed = dict(getattr(loaded, "hf_device_map", None) or planned.device_map)
        checked = check_map(placed, profile, machine, workload)
        on: dict[str, int] = {}
        for parameter in loaded.parameters():
            on[str(parameter.device)] = on.get(str(parameter.device), 0) + parameter.nbytes
        self.add(
            weights_gib={device: round(size / GIB, 2) for device, size in on.items()},
            cut_blocks=sorted({block for key in placed if (block := block_of(key)) and block != key}),
            check=[f"{one.severity} {one.code} {one.message}"[:300] for one in checked.findings if one.severity != "info"],
        )
        self.loaded = loaded
        self.first = torch.device("cpu" if self.is_tiny else "cuda:0")
        self.places = tiny_places(self.folder) if self.is_tiny else IMAGE_PLACES[self.model]
        self.calls()

    def calls(self) -> None:
        """A short call with a text and with an image, then the longest ones in the time that is left."""
        for name, images in (("text", 0), ("image", 1)):
            said = self.ask(self.places + 257, images)
            self.add(**{name: said or "runs"}, **{f"peak_gib_{name}": self.peaks()})
        for name, images in (("image", 1), ("text", 0)):
            if self.answer[name] == "runs" and self.quantization is None:
                until = time.monotonic() + (self.deadline - time.monotonic()) / (1 + images)
                self.longest(name, images, until)

    def peaks(self) -> list[list[float]]:
        """Most that torch had allocated and reserved on each GPU since the last time."""
        import torch

        if self.is_tiny:
            return []
        gpus = range(torch.cuda.device_count())
        measures = (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        found = [[round(measure(gpu) / GIB, 3) for measure in measures] for gpu in gpus]
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        return found

    def ask(self, tokens: int, images: int) -> str:
        """One short generation; what went wrong, or nothing."""
        import torch

        edge = self.loaded.config.vision_config["image_size"]
        inputs: dict[str, Any] = {"input_ids": torch.full((1, tokens), 7, device=self.first)}
        if images:
            inputs["images"] = torch.zeros(1, 3, edge, edge, dtype=torch.bfloat16, device=self.first)
            if self.model == "cogvlm2":
                kinds = torch.zeros_like(inputs["input_ids"])
                kinds[:, 1 : 1 + self.places] = 1
                inputs["token_type_ids"] = kinds
        try:
            with torch.inference_mode():
                self.loaded.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
        except Exception as error:  # noqa: BLE001 - the crash is the result
            said = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        else:
            said = ""
        gc.collect()
        if self.first.type == "cuda":
            for gpu in range(torch.cuda.device_count()):
                torch.cuda.synchronize(gpu)
            torch.cuda.empty_cache()
        return said

    def longest(self, name: str, images: int, until: float) -> None:
        """Most prompt tokens that run, to 2 %; what is known is written after each call."""
        low, high, tokens = self.places + 257, 0, int(self.answer.get("promised_tokens") or 8192)
        if self.is_tiny:
            until, tokens = min(until, time.monotonic() + 3), 512
        while time.monotonic() < until:
            said = self.ask(tokens, images)
            if said:
                high = tokens
                if "out of memory" not in said.lower():
                    self.add(**{f"stopped_by_{name}": said})
            else:
                low = tokens
            self.add(**{f"longest_{name}_tokens": low, f"fails_{name}_tokens": high})
            if high and high - low <= 0.02 * low:
                break
            tokens = (low + high) // 2 if high else int(1.25 * low)


def block_of(key: str) -> str:
    """The block that a key lies in, or is."""
    parts = key.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: at + 1]) if at is not None else ""


def table(results: dict[str, Any]) -> str:
    """Short, for people."""
    lines = ["| model | step | result | s |", "| --- | --- | --- | --- |"]
    for name, found in results.items():
        model, _, step = name.partition(" ")
        lines.append(f"| {model} | {step} | {_words(step, found)} | {found['step_seconds']} |")
    return "\n".join(lines) + "\n"


def _words(step: str, found: dict[str, Any]) -> str:
    if found.get("failed"):
        return found["failed"].replace("|", "/")[:200]
    if step == "plan":
        return f"fits {found['fits']}, peaks {found['stages_gib']} GiB, longest prompt {found['longest_prompt_tokens']}"
    if step == "try":
        ends = [f"{one['route']}: {one['state']} ({one['reached']})" for one in found["attempts"]]
        return "; ".join([*ends, *found["findings"]]).replace("|", "/")[:300]
    if step == "pytest":
        return f"exit {found['exit']}: {found['last_line']} {' '.join(found['said'][:1])}".replace("|", "/")[:300]
    if step.startswith("run"):
        long = [found.get(f"longest_{name}_tokens") for name in ("text", "image")]
        said = f"text {found.get('text')}, image {found.get('image')}, longest {long}, cut {found.get('cut_blocks')}"
        peaks = f"planned {found.get('planned_gib')}, measured with an image {found.get('peak_gib_image')} GiB"
        return f"{said}, {peaks}, weights {found.get('weights_gib')}; check-map: {found.get('check')}".replace("|", "/")[
            :600
        ]
    return json.dumps(found)[:200]


if __name__ == "__main__":
    sys.exit(main())
