"""What a plan may be asked: the options of ``plan``, ``check-map`` and ``try``, and the records that they become."""

from __future__ import annotations

import argparse
from typing import get_args

import msgspec

from . import arguments
from .errors import UsageError
from .workload import Attention, DType, Optimizer, Policy, Preference, Quantization, Training, Workload

TRIAL_TOKENS = 16
"""Enough to see that decoding works; a plan's own default would take a minute on a slow card."""


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Which placements are allowed, and which is best."""
    careful = Policy()
    policy = parser.add_argument_group("policy")
    policy.add_argument(
        "--prefer",
        choices=get_args(Preference),
        default=careful.prefer,
        help="fewest GPUs, then longest prompt (balanced) or fastest links (speed); or longest prompt first (context)",
    )
    policy.add_argument(
        "--max-gpus", metavar="N", type=arguments.whole_number("--max-gpus", 2), help="use at most so many GPUs"
    )
    policy.add_argument(
        "--min-gpus",
        metavar="N",
        type=arguments.whole_number("--min-gpus", 2),
        default=careful.min_gpus,
        help="spread over at least so many",
    )
    policy.add_argument(
        "--exclude",
        metavar="0,1",
        type=arguments.excluded_gpus,
        action="extend",
        default=[],
        help="GPUs that must not be used; repeatable",
    )
    policy.add_argument(
        "--pin",
        metavar="MODULE=GPU",
        type=arguments.pin,
        action="append",
        default=[],
        help="module that must be on a GPU, such as model.visual=0; repeatable",
    )
    policy.add_argument(
        "--max-memory",
        metavar="GPU=SIZE",
        type=arguments.max_memory,
        action="append",
        default=[],
        help="most that this process may take there, such as 0=20GiB; repeatable",
    )
    policy.add_argument(
        "--offload", action="store_true", help="allow the last layers in host memory when the GPUs do not suffice: slow"
    )
    policy.add_argument("--headroom", metavar="SIZE", type=arguments.headroom_bytes, help="keep free on each GPU: 1GiB")


def add_workload(parser: argparse.ArgumentParser) -> None:
    """What the model is to do: the same words for a plan and for the judgement of a map, so that the two never differ."""
    work = _add_call(parser, Workload())
    work.add_argument("--logits", choices=("generate", "forward"), default="generate", help="forward keeps all of them")
    work.add_argument("--padded", action="store_true", help="prompts of a batch differ in length, so that there is a mask")
    usual = Training()
    group = parser.add_argument_group("training: one optimizer step instead of a call")
    group.add_argument("--training", choices=("lora", "full"), help="adapters on the text body, or all weights")
    group.add_argument("--optimizer", choices=get_args(Optimizer), help=f"default: {usual.optimizer}")
    group.add_argument(
        "--lora-rank",
        metavar="N",
        type=arguments.whole_number("--lora-rank", usual.lora_rank),
        help=f"rank of the adapters (default: {usual.lora_rank})",
    )
    group.add_argument(
        "--no-gradient-checkpointing", action="store_true", help="keep all activations for the backward pass"
    )


def _add_call(parser: argparse.ArgumentParser, default: Workload) -> argparse._ArgumentGroup:
    """What a call of the model holds."""
    work = parser.add_argument_group("largest call of the model")
    for name, value, text in (
        ("--images", default.images, "images in each prompt"),
        ("--text-tokens", default.text_tokens, "text tokens of each prompt"),
        ("--new-tokens", default.new_tokens, "tokens that generate makes"),
        ("--batch", default.batch, "prompts at once"),
    ):
        work.add_argument(
            name,
            metavar="N",
            type=arguments.whole_number(name, value),
            default=value,
            help=f"{text} (default: {value})",
        )
    work.add_argument(
        "--image-size",
        metavar="WxH",
        type=arguments.image_size,
        default=(None, None),
        help="pixels; one number: a square",
    )
    work.add_argument("--dtype", choices=get_args(DType), help="of the weights (default: the checkpoint's)")
    work.add_argument("--quantization", choices=get_args(Quantization), help="load with bitsandbytes")
    work.add_argument("--attention", choices=get_args(Attention), default=default.attention)
    work.add_argument(
        "--allocator",
        choices=("native", "expandable"),
        default=default.allocator,
        help="torch's, or expandable_segments:True",
    )
    return work


def add_trial_call(parser: argparse.ArgumentParser) -> None:
    """The call that ``try`` makes: of generate, with prompts of one length."""
    _add_call(parser, Workload(new_tokens=TRIAL_TOKENS))
    parser.set_defaults(
        logits="generate", padded=False, training=None, optimizer=None, lora_rank=None, no_gradient_checkpointing=False
    )


def workload(options: argparse.Namespace) -> Workload:
    """Put the workload of ``plan`` together. Numbers out of range are the planner's to refuse."""
    width, height = options.image_size
    return Workload(
        images=options.images,
        image_width=width,
        image_height=height,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        batch=options.batch,
        dtype=options.dtype,
        quantization=options.quantization,
        attention=options.attention,
        logits=options.logits,
        training=_training(options),
        allocator=options.allocator,
        is_padded=options.padded,
    )


def _training(options: argparse.Namespace) -> Training | None:
    """The training step that was asked for; its details make no sense without it."""
    usual = Training()
    if options.training is None:
        for name, value in (
            ("--optimizer", options.optimizer),
            ("--lora-rank", options.lora_rank),
            ("--no-gradient-checkpointing", options.no_gradient_checkpointing),
        ):
            if value is not None and value is not False:
                raise UsageError(f"{name} is about training: add --training lora or --training full.")
        return None
    if options.training == "full" and options.lora_rank is not None:
        raise UsageError("--lora-rank is about adapters: use it with --training lora, or leave it out.")
    return Training(
        method=options.training,
        optimizer=options.optimizer or usual.optimizer,
        lora_rank=usual.lora_rank if options.lora_rank is None else options.lora_rank,
        gradient_checkpointing=not options.no_gradient_checkpointing,
    )


def policy(options: argparse.Namespace) -> Policy:
    """Put the policy of ``plan`` together."""
    chosen = Policy(
        gpus=options.gpus,
        max_gpus=options.max_gpus,
        min_gpus=options.min_gpus,
        prefer=options.prefer,
        exclude=tuple(options.exclude),
        pins=tuple(options.pin),
        max_memory=tuple(limit for limits in options.max_memory for limit in limits),
        offload=options.offload,
    )
    return with_headroom(chosen, options.headroom)


def with_headroom(chosen: Policy, size_bytes: int | None) -> Policy:
    """A policy with a headroom that was asked for, in the place of both parts of the default one."""
    if size_bytes is None:
        return chosen
    return msgspec.structs.replace(chosen, headroom_fraction=0.0, headroom_min_bytes=size_bytes)
