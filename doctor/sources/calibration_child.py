"""Child program: measures what torch takes of the one GPU it sees. Makes a CUDA context, because the user asked for it.

All tensors together stay below 100 MiB. ``CUDA_VISIBLE_DEVICES`` names the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MIB = 2**20
LEAST_FREE_BYTES = 2 * 2**30
"""With less free memory nothing is measured: the context alone can take 0.7 GiB from whoever works there."""


def main(say: Callable[..., None], *, free_bytes: int) -> None:
    """Answer ``{context_bytes, bare_context_bytes, workspace_bytes, …}``; see ``vlm_doctor.calibration.Calibration``.

    Args:
        say: Answers.
        free_bytes: What NVML says is free before there is a context.
    """
    import torch

    answer: dict[str, Any] = {"torch_version": str(torch.__version__)}
    say("import torch", answer)
    if free_bytes < LEAST_FREE_BYTES:
        raise RuntimeError(f"only {free_bytes / MIB:.0f} MiB are free")
    gpu = torch.device("cuda", 0)
    torch.cuda.set_device(gpu)
    first = torch.empty(1, device=gpu)
    answer["rounding_bytes"] = torch.cuda.memory_allocated(gpu)
    answer["small_segment_bytes"] = torch.cuda.memory_reserved(gpu)
    answer["bare_context_bytes"] = free_bytes - _outside(torch, gpu)
    say("context", answer)
    with torch.no_grad():
        answer["workspace_bytes"] = _workspace(torch, gpu)
        _first_calls(torch, gpu)
    answer["context_bytes"] = free_bytes - _outside(torch, gpu)
    say("libraries", answer)
    answer["large_segment_bytes"] = _large_segment(torch, gpu)
    del first
    say("segments", answer, is_final=True)


def _outside(torch: Any, gpu: Any) -> int:
    """Free memory as it would be without torch's own segments."""
    torch.cuda.synchronize(gpu)
    return int(torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu))


def _workspace(torch: Any, gpu: Any) -> int:
    """What stays allocated after a matrix product whose operands are gone."""
    before = torch.cuda.memory_allocated(gpu)
    matrix = torch.ones(256, 256, device=gpu, dtype=torch.bfloat16)
    product = matrix @ matrix
    torch.cuda.synchronize(gpu)
    del matrix, product
    return int(torch.cuda.memory_allocated(gpu) - before)


def _first_calls(torch: Any, gpu: Any) -> None:
    """One small call of each kind that a vision-language model makes, so that its kernels and libraries are loaded."""
    functional = torch.nn.functional
    options = {"device": gpu, "dtype": torch.bfloat16}
    query = torch.ones(1, 8, 256, 64, **options)
    functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    mask = torch.ones(256, 256, device=gpu, dtype=torch.bool).tril()
    functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    functional.conv2d(torch.ones(1, 3, 56, 56, **options), torch.ones(8, 3, 14, 14, **options), stride=14)
    states = torch.ones(1, 256, 64, **options)
    functional.linear(states, torch.ones(64, 64, **options), torch.ones(64, **options))
    functional.layer_norm(states, (64,))
    states.float().pow(2).mean(-1, keepdim=True).rsqrt()
    functional.gelu(states)
    functional.silu(states)
    functional.softmax(states, dim=-1, dtype=torch.float32)
    table = torch.ones(16, 64, **options)
    functional.embedding(torch.zeros(1, 8, device=gpu, dtype=torch.int64), table)
    is_text, is_image = (make(1, 256, 1, device=gpu, dtype=torch.bool) for make in (torch.zeros, torch.ones))
    torch.cat([states, states], dim=1).masked_scatter(torch.cat([is_text, is_image], dim=1), states)
    states.float().argmax(-1).cumsum(-1)


def _large_segment(torch: Any, gpu: Any) -> int:
    """Growth of the reserved memory by a tensor of 2 MiB, with nothing free that could serve."""
    torch.cuda.empty_cache()
    held: list[Any] = []
    before = torch.cuda.memory_reserved(gpu)
    # What is free in an older segment of that kind serves first.
    while torch.cuda.memory_reserved(gpu) == before and len(held) < 16:
        held.append(torch.empty(2 * MIB, device=gpu, dtype=torch.uint8))
    return int(torch.cuda.memory_reserved(gpu) - before)
