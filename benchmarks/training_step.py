"""One training step of a model at true size on two GPUs: predicted and measured peaks.

    python benchmarks/training_step.py --out FOLDER [--budget SECONDS] [edge | SCENARIO ...]

A scenario is a model, a method, the tokens of the prompt and the GiB that ``ballast.py`` leaves: ``qwen:lora:2048:16+12``;
``lora+``, ``full+`` keep all activations, without checkpoints. The model is placed by the plan for that step as
``frontier.py`` places it, with peft's adapters on every linear layer of the text body for ``lora``; two steps of torch's
AdamW run, and the peak of each GPU in the second stands beside the plan's. A workload that was said to fit and ran out of
memory is the row that must not be.

``edge`` in place of the tokens, ``qwen:lora:edge:16+12``, asks the plan for the longest prompt of such a step, without
headroom: it has to run, and what is a tenth longer must not, if nothing is given away; still longer ones are tried until
one runs out of memory. ``edge`` alone stands for four such scenarios.

Needs two GPUs of 80 GiB, torch, transformers, accelerate and peft. Rows go to ``training.json`` in FOLDER as they come.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import frontier
import msgspec
import torch

from vlm_doctor.planner import plan
from vlm_doctor.sources import collect
from vlm_doctor.workload import Training

SCENARIOS = (
    "qwen:lora:2048:16+12",
    "qwen:lora:8192:23.5+23.5",
    "qwen:lora+:2048:23.5+23.5",
    "glm:lora:4096:23.5+23.5",
    "mha:lora:4096:23.5+23.5",
    "qwen:full:2048:50+50",
)
EDGES = ("qwen:lora:edge:16+12", "glm:lora:edge:23.5+23.5", "mha:lora+:edge:23.5+23.5", "qwen:full:edge:50+50")
RANK = 16
LEAST_TOKENS = 256
MORE = (1.1, 1.2, 1.35, 1.5)
EDGE_SECONDS = 22
"""After which no longer prompt is tried; one step takes a second or two."""


def adapt(model: Any) -> Any:
    """Adapters of peft on every linear layer of the text body."""
    from peft import LoraConfig, get_peft_model

    text = r".*language_model.*\.(\w+_proj|gate_up_proj)"
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=text, task_type="CAUSAL_LM"))


def step(model: Any, optimizer: Any, tokens: int) -> None:
    """Forward, backward, and a step of the optimizer."""
    ids = torch.full((1, tokens), 5, device=next(model.parameters()).device)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    loss.backward()
    del loss
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def trains(model: Any, tokens: int) -> str:
    """Two steps of a new optimizer, from empty caches; ``ran``, or why they did not. Peaks are those of the second."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5, foreach=True)
    try:
        for _ in range(2):
            for gpu in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(gpu)
            step(model, optimizer, tokens)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0][:160]}"
    finally:
        optimizer.zero_grad(set_to_none=True)
    return "ran"


def prepared(subject: frontier.Subject, device_map: dict[str, int], training: Training) -> Any:
    """The model on its GPUs, with what is trained."""
    torch.cuda.init()
    subject.place(device_map)
    model = subject.model
    if training.method == "lora":
        model.requires_grad_(False)
        model = adapt(model)
        model.enable_input_require_grads()
    else:
        model.requires_grad_(True)
    model.train()
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def peaks(name: str, planned: Any, stages: Any, ran: str, out: frontier.Out, **more: Any) -> None:
    """One row a GPU."""
    for stage in stages:
        device = frontier.ordinal(stage.gpu)
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        out.add(
            scenario=name, **more, gpu=stage.gpu, layers=frontier.layers_of(planned), ran=ran, predicted=stage.peak_bytes,
            measured=peak, error=round(stage.peak_bytes / peak - 1, 4), predicted_reserved=stage.reserved_bytes,
            reserved=reserved, reserved_error=round(stage.reserved_bytes / reserved - 1, 4),
        )  # fmt: skip


def scenario(name: str, out: frontier.Out) -> None:
    """One row a GPU, or why there is none; at the edge, one more that tells what ran."""
    short, method, tokens, _ = name.split(":")
    started = time.monotonic()
    training = Training(
        method="lora" if method.startswith("lora") else "full", lora_rank=RANK, gradient_checkpointing="+" not in method
    )
    is_edge = tokens == "edge"
    subject = frontier.Subject(frontier.MODELS[short])
    workload = msgspec.structs.replace(
        frontier.WORKLOAD, text_tokens=LEAST_TOKENS if is_edge else int(tokens), new_tokens=0, training=training
    )
    machine = collect(with_torch=False)
    planned = plan(subject.profile, machine, workload, frontier.policy_for(len(frontier.cards_of(name))))
    if not planned.fits:
        out.add(scenario=name, fits=False, why=planned.shortage.message if planned.shortage else "")
        return
    model = prepared(subject, frontier.map_for(planned), training)
    if not is_edge:
        peaks(name, planned, planned.stages, trains(model, int(tokens)), out)
        return
    promised = planned.longest_prompt_tokens or 0
    ran = trains(model, promised)
    at_edge = msgspec.structs.replace(workload, text_tokens=promised)
    peaks(name, planned, frontier.stages_for(subject, machine, planned, at_edge), ran, out, tokens=promised)
    more = {}
    for share in MORE:
        if time.monotonic() - started > EDGE_SECONDS:
            break
        frontier.clean()
        more[share] = trains(model, int(promised * share))
        if more[share] != "ran":
            break
    out.add(
        scenario=name, what="edge", promised=promised, promise_ran=ran == "ran",
        tenth_more_ran=more.get(MORE[0]) == "ran" if MORE[0] in more else None,
        longest_share_that_ran=max((share for share, how in more.items() if how == "ran"), default=float(ran == "ran")),
        seconds=round(time.monotonic() - started, 1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=400)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("scenarios", nargs="*")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        scenario(options.scenarios[0], frontier.Out(options.out, "training.json"))
        return
    names = EDGES if options.scenarios == ["edge"] else options.scenarios or SCENARIOS
    for name, left in frontier.begun(names, options.budget, 30):
        words = [sys.executable, __file__, "--out", str(options.out), "--child", name]
        try:
            subprocess.run(words, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print(name, "timed out", flush=True)


if __name__ == "__main__":
    main()
