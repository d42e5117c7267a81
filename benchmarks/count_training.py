"""Count the memory of real training steps of small models on a CPU.

Two steps of AdamW, bfloat16, with real arithmetic and autograd; every storage that comes and goes is counted, rounded to
512 bytes as torch's caching allocator rounds. Adapters are made as peft makes them (float32 beside 16-bit weights).

    python benchmarks/count_training.py [BODY ...]

The figures of tests/doctor/planner/test_training.py. Needs torch and transformers (5.23), and no GPU; a minute a body.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

TOKENS = 384
RANK = 16
SHAPES = (
    {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8,
     "num_key_value_heads": 8, "vocab_size": 2048},
    {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
     "num_key_value_heads": 2, "vocab_size": 8000},
)  # fmt: skip


class Live(TorchDispatchMode):
    """Notes what is alive beside the weights."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known = known
        self._sizes: dict[int, int] = {}
        self.now_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._sizes or not storage.nbytes():
            return
        self._sizes[key] = -(-storage.nbytes() // 512) * 512
        self.now_bytes += self._sizes[key]
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.now_bytes -= self._sizes.pop(key, 0)


class Adapted(torch.nn.Module):
    """A linear layer with an adapter. Source: Linear.forward of peft, tuners/lora/layer.py."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, RANK, bias=False, dtype=torch.float32)
        self.up = torch.nn.Linear(RANK, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The base layer's output and the adapter's."""
        result = self.base(inputs)
        return (result + self.up(self.down(inputs.to(torch.float32))) * 2.0).to(result.dtype)


def count(body: str, shape: dict[str, int], *, is_lora: bool, is_checkpointed: bool) -> float:
    """Peak of the second step in MiB, weights included."""
    config = transformers.AutoConfig.for_model(body, **shape, head_dim=64, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    if is_lora:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, Adapted(module))
        model.enable_input_require_grads()
    if is_checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5, foreach=True)
    prompt = torch.randint(5, 100, (1, TOKENS))
    tensors = [*model.parameters(), *model.buffers(), prompt]
    live = Live({tensor.untyped_storage()._cdata for tensor in tensors})
    gc.disable()
    with live:
        for _ in range(2):
            live.peak_bytes = live.now_bytes
            loss = model(input_ids=prompt, labels=prompt, use_cache=False).loss
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return float((weights + live.peak_bytes) / 2**20)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'body':14}{'hidden':>7}{'full':>9}{'ckpt':>9}{'LoRA':>9}{'ckpt':>9}   MiB at the peak of a step")
    for body in sys.argv[1:] or ("llama", "qwen3", "glm4"):
        for shape in SHAPES:
            cases = ((False, False), (False, True), (True, False), (True, True))
            peaks = [count(body, shape, is_lora=lora, is_checkpointed=checkpointed) for lora, checkpointed in cases]
            print(f"{body:14}{shape['hidden_size']:7}" + "".join(f"{peak:9.1f}" for peak in peaks), flush=True)


if __name__ == "__main__":
    main()
