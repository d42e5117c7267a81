"""Record every allocation of training steps at true size, without a GPU, and replay them through torch's allocator.

    python benchmarks/record_training.py [--limit] [--rows training.json] SCENARIO ...

A scenario is a model, a method and the tokens of the prompt, as in ``training_step.py``, and the text layers of each stage:
``qwen:lora:2048:14+14``. The real code of transformers, peft and accelerate's hooks runs on meta tensors; each tensor knows
the stage that it is on. What comes and goes there in two steps of torch's AdamW goes through ``planner/allocator.py``:
peak allocated and reserved of each stage and, with ``--limit``, the least memory in which the second step still runs.
``qwen:lora:edge:16+12`` plans for cards with so many GiB free and tells whether what is promised runs, and how much more.
``--rows`` puts the measured ones of a run of ``training_step.py`` beside that. Every row has the plan's figures too.

Kernels of CUDA make temporaries that no meta tensor tells of; those of attention are added by hand. Needs torch,
transformers, accelerate and peft.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate.hooks
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from traced_models import config_of

from vlm_doctor.planner import plan
from vlm_doctor.planner.allocator import Allocator, Block, OutOfMemoryError
from vlm_doctor.planner.budget import budgets
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.checkpoint import Checkpoint, StoredTensor
from vlm_doctor.sources.model_profile import build_profile
from vlm_doctor.units import MIB
from vlm_doctor.workload import Policy, Training, Workload

MODELS = {
    "glm": "glm-4.1v-9b",
    "qwen": "qwen2.5-vl-7b",
    "qwen3": "qwen3-vl-8b",
    "mha": "llava-1.5-13b",
    "llava": "llava-1.5-7b",
    "internvl": "internvl3-8b",
}
MROPE_BODIES = frozenset({"glm4v_text", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"})
RANK = 16
WORKSPACE_BYTES = 32 * MIB
"""Of cuBLAS on Hopper: one for the main thread, one for the thread that goes backward."""
aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Which storages come and go on which stage, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int, int]] = []
        """Stage, number of the storage, and its bytes when it comes or -1 when it goes."""
        self._stages: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._made = 0
        self._last = 0
        self._forced: int | None = None
        self.is_on = True

    def own(self, tensor: torch.Tensor, stage: int) -> None:
        """A tensor that was there before."""
        self._stages[tensor.untyped_storage()._cdata] = stage

    def stage(self, tensor: torch.Tensor) -> int:
        """Where a tensor is."""
        return self._stages.get(tensor.untyped_storage()._cdata, self._last)

    @contextmanager
    def on(self, stage: int) -> Iterator[None]:
        """What is made here is on that stage."""
        before, self._forced = self._forced, stage
        yield
        self._forced = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [one for one in tree_flatten((args, kwargs))[0] if _is_meta(one)]
        known = [self._stages[key] for one in given if (key := one.untyped_storage()._cdata) in self._stages]
        stage = self._forced if self._forced is not None else known[0] if known else self._last
        self._last = stage
        each = [one for one in tree_flatten(result)[0] if _is_meta(one)]
        for size in _temporaries(func, each):
            self.make(size, stage, is_kept=False)
        for number, tensor in enumerate(each):
            is_list = isinstance(result, (list, tuple)) and len(known) >= len(each) > 1 and "foreach" in str(func)
            self._note(tensor.untyped_storage(), known[number] if is_list else stage)
        return result

    def make(self, size: int, stage: int, *, is_kept: bool = True) -> int:
        """A tensor that no storage stands for."""
        number = self._made
        self._made += 1
        self.events.append((stage, number, size))
        if not is_kept:
            self.events.append((stage, number, -1))
        return number

    def _note(self, storage: torch.UntypedStorage, stage: int) -> None:
        key = storage._cdata
        if key in self._stages or not storage.nbytes():
            return
        self._stages[key] = stage
        self._numbers[key] = self.make(storage.nbytes(), stage)
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        stage = self._stages.pop(key)
        self.events.append((stage, self._numbers.pop(key), -1))


def _is_meta(one: object) -> bool:
    return isinstance(one, torch.Tensor) and one.device.type == "meta"


def _temporaries(func: Any, made: list[torch.Tensor]) -> list[int]:
    """Bytes of what a kernel of CUDA makes for itself."""
    name = func.name()
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        # Flash attention: sums of the gradients of queries in float32, rows rounded to 128; here all at once.
        query = made[0]
        batch, heads, rows, width = query.shape
        rows = -(-rows // 128) * 128
        return [4 * batch * heads * rows * width, 4 * batch * heads * rows]
    return []


class Moved(torch.autograd.Function):
    """A copy to another stage, and the gradient's way back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, recorder: Recorder, stage: int) -> torch.Tensor:
        """Copy there."""
        ctx.recorder, ctx.back = recorder, recorder.stage(tensor)
        with recorder.on(stage):
            return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Copy back."""
        with ctx.recorder.on(ctx.back):
            return gradient.clone(), None, None


def attend(query: Any, key: Any, value: Any, **fields: Any) -> Any:
    """Attention as flash attention does it, whatever the device is."""
    assert fields.get("attn_mask") is None, "a mask"
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]


def training_of(method: str) -> Training:
    """``lora``, ``lora64`` for another rank than 16, or ``full``; with a plus, without checkpoints."""
    rank = re.search(r"\d+", method)
    return Training(
        method="lora" if method.startswith("lora") else "full",
        lora_rank=int(rank[0]) if rank else RANK,
        gradient_checkpointing="+" not in method,
    )


class Trial:
    """A model on meta, placed and trained."""

    def __init__(self, name: str) -> None:
        self.name = name
        short, method, tokens, layers = name.split(":")
        self.tokens = int(tokens)
        self.layers = tuple(map(int, layers.split("+")))
        self.training = training_of(method)
        config = config_of(MODELS[short])
        with torch.device("meta"):
            self.model = transformers.AutoModelForImageTextToText.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        fields = config.to_dict()
        fields["architectures"] = [type(self.model).__name__]
        tensors = {
            key: StoredTensor("BF16", tuple(one.shape), 2 * one.numel()) for key, one in self.model.named_parameters()
        }
        self.profile = build_profile(Checkpoint(fields, tensors), name=short, origin="checkpoint")
        self.workload = Workload(images=0, text_tokens=self.tokens, new_tokens=0, training=self.training)
        self.atoms = chain(self.profile).atoms
        self.owner = {}
        ends, seen = [sum(self.layers[: n + 1]) for n in range(len(self.layers))], 0
        self.runs: list[tuple[int, int]] = []
        for position, atom in enumerate(self.atoms):
            stage = next((n for n, end in enumerate(ends) if seen < end), len(ends) - 1)
            seen += atom.layers
            if stage == len(self.runs):
                self.runs.append((position, position + 1))
            self.runs[stage] = (self.runs[stage][0], position + 1)
            self.owner.update({unit.key: stage for unit in atom.units})
        self.recorder = Recorder()

    def place(self, run_ends: list[int]) -> None:
        """Stages that end behind so many atoms, in place of those that the layers tell."""
        self.runs = list(zip([0, *run_ends], run_ends, strict=False))
        self.layers = tuple(sum(atom.layers for atom in self.atoms[first:end]) for first, end in self.runs)
        for stage, (first, end) in enumerate(self.runs):
            self.owner.update({unit.key: stage for atom in self.atoms[first:end] for unit in atom.units})

    def _stage_of(self, key: str) -> int:
        key = key.removeprefix("base_model.model.").replace(".base_layer", "")
        while key not in self.owner:
            key = key.rpartition(".")[0]
            if not key:
                return 0
        return self.owner[key]

    def record(self, steps: int = 2) -> None:
        """Two steps."""
        self._dispatch()
        model = self.model
        if self.training.method == "lora":
            from peft import LoraConfig, get_peft_model

            model.requires_grad_(False)
            text = r".*language_model.*\.(\w+_proj|gate_up_proj)"
            model = get_peft_model(
                model,
                LoraConfig(r=self.training.lora_rank, target_modules=text, task_type="CAUSAL_LM"),
                low_cpu_mem_usage=True,
            )
            model.enable_input_require_grads()
        else:
            model.requires_grad_(True)
        model.train()
        if self.training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        recorder = self.recorder
        for number in range(len(self.layers)):
            recorder.make(WORKSPACE_BYTES, number)
        groups: dict[int, list[torch.nn.Parameter]] = {}
        for key, one in [*model.named_parameters(), *model.named_buffers()]:
            assert one.device.type == "meta", key
            stage = self._stage_of(key)
            recorder.own(one, stage)
            if "lora_" in key:
                assert one.dtype == torch.float32, key
                recorder.make(one.untyped_storage().nbytes(), stage)
            if one.requires_grad:
                groups.setdefault(stage, []).append(one)
        self.optimizers = [torch.optim.AdamW(group, lr=1e-5, foreach=True) for group in groups.values()]
        self.marks = []
        for number in range(len(self.layers)):
            recorder.make(WORKSPACE_BYTES, number)
        gc.collect()
        gc.disable()
        with recorder:
            for _ in range(steps):
                self.marks.append(len(recorder.events))
                self._step(model)
                gc.collect()

    def _step(self, model: Any) -> None:
        with self.recorder.on(0):
            ids = torch.full((1, self.tokens), 5, device="meta")
            inputs = {"input_ids": ids, "labels": ids}
            if self.profile.text.body in MROPE_BODIES:
                # What finds images in a prompt looks at its tokens, of which there are none here.
                inputs["position_ids"] = torch.zeros(3, 1, self.tokens, dtype=torch.long, device="meta")
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        del loss
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _dispatch(self) -> None:
        hooks, recorder = accelerate.hooks, self.recorder

        def send(values: Any, stage: int, **_: Any) -> Any:
            def one(tensor: torch.Tensor) -> torch.Tensor:
                if not _is_meta(tensor) or recorder.stage(tensor) == stage:
                    return tensor
                return Moved.apply(tensor, recorder, stage)

            return tree_map_only(torch.Tensor, one, values)

        def find(values: Any) -> int | None:
            first = next((one for one in tree_flatten(values)[0] if _is_meta(one)), None)
            return None if first is None else recorder.stage(first)

        hooks.send_to_device, hooks.find_device = send, find
        hooks.set_module_tensor_to_device = lambda *_, **__: None
        execution = {**self.owner, "": self.owner[next(iter(self.owner))]}
        hooks.attach_align_device_hook_on_blocks(
            self.model,
            execution_device=execution,
            offload=dict.fromkeys(self.owner, False),
            skip_keys=self.model._skip_keys_device_placement,
        )

    def weights(self, stage: int) -> int:
        """Bytes."""
        seen = {one.untyped_storage()._cdata: (key, one) for key, one in self.model.named_parameters()}
        return sum(
            one.untyped_storage().nbytes()
            for key, one in seen.values()
            if "lora_" not in key and self._stage_of(key) == stage
        )

    def replay(self, stage: int, capacity: int | None = None) -> tuple[int, int]:
        """Peak allocated and reserved of all that was recorded."""
        weights = self.weights(stage)
        segment = -(-weights // (2 * MIB)) * 2 * MIB
        allocator = Allocator(capacity, segment + 2 * MIB, segment - weights)
        blocks: dict[int, Block] = {}
        for number, (where, key, size) in enumerate(self.recorder.events):
            if number == self.marks[-1]:
                allocator.peak_allocated_bytes = allocator.allocated_bytes
            if where == stage:
                if size >= 0:
                    blocks[key] = allocator.make(size)
                else:
                    allocator.free(blocks.pop(key))
        return weights + allocator.peak_allocated_bytes, allocator.peak_reserved_bytes

    def limit(self, stage: int) -> int:
        """Least memory in which both steps run, to 8 MiB."""
        low, high = self.replay(stage)
        while high - low > 8 * MIB:
            middle = (low + high) // 2
            try:
                self.replay(stage, middle)
                high = middle
            except OutOfMemoryError:
                low = middle
        return high


def edge(name: str) -> None:
    """The longest prompt that a plan promises on H200s with so much free, and whether the recorded step runs so far."""
    short, method, _, free = name.split(":")
    sizes = free.split("+")
    policy = Policy(min_gpus=len(sizes), max_gpus=len(sizes), headroom_fraction=0, headroom_min_bytes=0)
    machine = load_machine(f"{len(sizes)}xH200:nvlink:free=" + ",".join(f"{size}GiB" for size in sizes))
    first = Trial(f"{short}:{method}:256:1")
    planned = plan(first.profile, machine, first.workload, policy)
    if not planned.fits:
        print(f"{name:28}does not fit: {planned.shortage.message if planned.shortage else ''}", flush=True)
        return
    rooms = {one.gpu.index: one.available_bytes + WORKSPACE_BYTES for one in budgets(machine, policy).usable}
    units, ends = 0, []
    counts = [len(stage.keys) for stage in planned.stages]
    for number, atom in enumerate(first.atoms, start=1):
        units += len(atom.units)
        if units == sum(counts[: len(ends) + 1]):
            ends.append(number)
    promised = planned.longest_prompt_tokens or 0
    for share in (1.0, 1.1, 1.2, 1.35, 1.5):
        trial = Trial(f"{short}:{method}:{int(promised * share)}:1")
        trial.place(ends)
        trial.record()
        room = [rooms[stage.gpu] for stage in planned.stages]
        limits = [trial.limit(number) for number in range(len(room))]
        runs = all(limit <= most for limit, most in zip(limits, room, strict=True))
        left = "  ".join(f"{limit / 1e6:,.0f} of {most / 1e6:,.0f}" for limit, most in zip(limits, room, strict=True))
        print(f"{name:28}{trial.layers} {trial.tokens} tokens {share:4} {'runs' if runs else 'fails':6} {left}", flush=True)
        if not runs:
            return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("scenarios", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.nn.functional.scaled_dot_product_attention = attend
    # Looks at values; a prompt of one text has no packed sequences.
    transformers.masking_utils.find_packed_sequence_indices = lambda _: None
    rows = json.loads(options.rows.read_text()) if options.rows else []
    names = [name for name in options.scenarios if ":edge:" not in name]
    for name in options.scenarios:
        if name not in names:
            edge(name)
    if options.scenarios and not names:
        return
    measured: dict[str, list[Any]] = {}
    for row in rows:
        name = ":".join((*row["scenario"].split(":")[:3], "+".join(map(str, row["layers"]))))
        measured.setdefault(name, []).append(row)
    print(f"{'MB':28}{'stage':>6}{'allocated: plan':>18}{'recorded':>10}{'measured':>10}", end="")
    print(f"{'reserved: plan':>18}{'recorded':>10}{'measured':>10}{'limit':>10}  moment", flush=True)
    for name in names or measured:
        trial = Trial(name)
        trial.record()
        footprint = Footprint(trial.profile, trial.workload, image_load(trial.profile, trial.workload), trial.atoms)
        for stage, run in enumerate(trial.runs):
            allocated, reserved = trial.replay(stage)
            need = footprint.detail(*run, trial.tokens)
            live = need.total_bytes - need.fragmentation_bytes + WORKSPACE_BYTES
            total = (need.total_bytes if need.reserved_bytes is None else need.reserved_bytes) + WORKSPACE_BYTES
            row = measured[name][stage] if name in measured else {"measured": 0, "reserved": 0}
            limit = trial.limit(stage) if options.limit else 0
            figures = (live, allocated, row["measured"], total, reserved, row["reserved"], limit)
            widths = (18, 10, 10, 18, 10, 10, 10)
            line = "".join(f"{size / 1e6:{width},.0f}" for size, width in zip(figures, widths, strict=True))
            print(f"{name:28}{stage:6}{line}  {need.moment}", flush=True)


if __name__ == "__main__":
    main()
