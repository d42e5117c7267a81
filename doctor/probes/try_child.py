"""Child program: loads a model for real, calls it twice, and tells what came of it. Makes CUDA contexts: the user asked.

Every step is told before the next begins, so that a crash, a hang or the kernel's OOM killer says how far it came.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_KEPT_CHARS = 12_000
"""Of a traceback: its end, where the error is."""
_SET_PARENT_DEATH_SIGNAL = 1
"""``PR_SET_PDEATHSIG``. Source: sys/prctl.h."""
_NAMED = 5
"""Names that are told of each kind; the rest are counted."""


def main(
    say: Callable[..., None],
    *,
    name: str,
    revision: str | None,
    device_map: dict[str, int | str] | str | None,
    dtype: str,
    attention: str,
    quantization: str | None,
    trust_remote_code: bool,
    work: dict[str, Any],
    blocks: list[str],
    parent: int | None = None,
) -> None:
    """Answer the fields of ``vlm_doctor.trial.Attempt`` that a child can know.

    Args:
        say: Answers.
        name: Folder or hub id.
        revision: Of the hub id.
        device_map: Module path to position among the visible GPUs or ``cpu``; ``auto``; or ``None`` for the CPU.
        dtype: torch's word, or ``auto``.
        attention: As in ``Workload``.
        quantization: As in ``Workload``.
        trust_remote_code: Allow Python code of the checkpoint to run.
        work: The call; see :func:`.try_prompt.make_prompt`, and ``new_tokens``.
        blocks: Module paths of the repeated blocks, none of which may be cut.
        parent: Pid of the process without which this one has nobody to tell; ``None`` goes on alone.
    """
    if parent is not None:
        _end_with(parent)
    warnings.simplefilter("ignore")
    answer: dict[str, Any] = {"reached": "start"}
    trial = _Trial(say, answer)
    try:
        trial.import_libraries()
        options = {"dtype": dtype, "attention": attention, "quantization": quantization}
        trial.load(name, revision, device_map, trust_remote_code=trust_remote_code, **options)
        trial.look(device_map if isinstance(device_map, dict) else None, blocks)
        trial.call(work, name=name, revision=revision, trust_remote_code=trust_remote_code)
    except BaseException as error:  # noqa: BLE001 - border to foreign code: whatever it raises is the answer
        answer["traceback"] = "".join(traceback.format_exception(error))[-_KEPT_CHARS:]
    if answer["reached"] not in ("call", "second call"):
        trial.measure()
    say("end", answer, is_final=True)


def _end_with(parent: int) -> None:
    """Let the kernel end this process with the one that started it: a model must not stay on GPUs for nobody. On Linux."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


class _Trial:
    """The steps, each of which adds to the answer."""

    def __init__(self, say: Callable[..., None], answer: dict[str, Any]) -> None:
        self._say = say
        self._answer = answer
        self._torch: Any = None
        self._transformers: Any = None
        self._model: Any = None

    def import_libraries(self) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self._torch, self._transformers = torch, transformers
        self._answer |= {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}
        self._reach("imports")

    def load(
        self,
        name: str,
        revision: str | None,
        device_map: dict[str, int | str] | str | None,
        *,
        dtype: Any,
        attention: Any,
        quantization: Any,
        trust_remote_code: bool,
    ) -> None:
        from .loading import auto_class, workload_options

        transformers = self._transformers
        started = time.perf_counter()
        # An explicit False: None would make transformers ask at the terminal and wait.
        where: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(name, **where)
        loader = auto_class(transformers, config)
        if loader is None:
            raise ValueError(
                f"transformers {transformers.__version__} does not know model_type {config.model_type!r} as a "
                "vision-language model"
            )
        kinds = {"attention": attention, "quantization": quantization, "dtype": dtype}
        options = workload_options(transformers, **kinds, config=config, device_map=device_map)
        options["dtype"] = dtype if dtype == "auto" else getattr(self._torch, dtype)
        if device_map is not None:
            options["device_map"] = device_map
        model, problems = loader.from_pretrained(name, config=config, output_loading_info=True, **where, **options)
        self._model = model.eval()
        self._wait()
        missing = sorted(problems.get("missing_keys", ()))
        reported = getattr(model, "hf_device_map", None) or {}
        self._answer |= {
            "load_seconds": time.perf_counter() - started,
            "class_name": type(model).__name__,
            "missing": missing[:_NAMED],
            "missing_count": len(missing),
            "device_map": {key: _plain(device) for key, device in reported.items()},
        }

    def look(self, planned: dict[str, int | str] | None, blocks: list[str]) -> None:
        """Where every parameter and buffer is, held against the plan; and which blocks are on several devices."""
        sizes: dict[str, int] = {}
        astray = []
        on: dict[str, set[str]] = {}
        known = set(blocks)
        for key, tensor, is_buffer in self._tensors():
            device = str(tensor.device)
            sizes[device] = sizes.get(device, 0) + tensor.nbytes
            wanted = _planned(key, planned)
            # Buffers of what is kept on the CPU are where it is computed: accelerate, AlignDevicesHook.
            if wanted is not None and device not in wanted and not (is_buffer and "meta" in wanted):
                astray.append(f"{key} is on {device}, planned {wanted[0]}")
            block = next((path for path in _holders(key) if path in known), None)
            if block is not None and not is_buffer:
                on.setdefault(block, set()).add(device)
        cut = [[block, sorted(devices)] for block, devices in on.items() if len(devices) > 1]
        self._answer |= {
            "held_bytes": sizes,
            "astray": astray[:_NAMED],
            "astray_count": len(astray),
            "cut_blocks": [{"key": key, "devices": devices} for key, devices in cut[:_NAMED]],
            "cut_count": len(cut),
        }
        self.measure()
        self._reach("weights")

    def call(self, work: dict[str, Any], *, name: str, revision: str | None, trust_remote_code: bool) -> None:
        from .try_prompt import make_prompt

        inputs, prompt_tokens, processor, notes = make_prompt(
            self._transformers, self._model, work, name=name, revision=revision, trust_remote_code=trust_remote_code
        )
        self._answer |= {"prompt_tokens": prompt_tokens, "notes": notes}
        self._reach("prompt")
        started = time.perf_counter()
        first = self._generate(inputs, work["new_tokens"])
        self._wait()
        self._answer["call_seconds"] = time.perf_counter() - started
        self._answer["new_tokens"] = len(first[0])
        # Before the second call, which looks at logits and finds the allocator's segments made.
        self.measure()
        if processor is not None:
            text = getattr(processor, "tokenizer", processor).decode(first[0], skip_special_tokens=True)
            self._answer["text"] = text[:500]
        self._reach("call")
        watch = _Finite(self._torch)
        second = self._generate(inputs, work["new_tokens"], logits_processor=[watch])
        self._answer |= {"is_finite": watch.is_finite, "is_repeatable": first == second}
        self._reach("second call")

    def _generate(self, inputs: dict[str, Any], new_tokens: int, **options: Any) -> list[list[int]]:
        """The new tokens of each prompt, the likeliest each time; as many as planned, so that the cache grows as far."""
        # A checkpoint's own sampling settings would only be warned about.
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
        with self._torch.inference_mode():
            output = self._model.generate(
                **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **greedy, **options
            )
        # An encoder-decoder gives a start token and what follows; all others repeat the prompt first.
        first = 1 if getattr(self._model.config, "is_encoder_decoder", False) else inputs["input_ids"].shape[1]
        rows: list[list[int]] = output[:, first:].tolist()
        return rows

    def measure(self) -> None:
        """Add peaks and what is free. Memory of GPUs on which this process has nothing is not asked for."""
        # In KiB on Linux: getrusage(2).
        self._answer["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        cuda = self._torch.cuda if self._torch is not None else None
        if cuda is None or not cuda.is_initialized():
            return
        readings = []
        try:
            for ordinal in range(cuda.device_count()):
                if not cuda.max_memory_reserved(ordinal):
                    continue
                readings.append(
                    {
                        "device": f"cuda:{ordinal}",
                        "allocated_bytes": cuda.max_memory_allocated(ordinal),
                        "reserved_bytes": cuda.max_memory_reserved(ordinal),
                        "free_bytes": cuda.mem_get_info(ordinal)[0],
                    }
                )
        except RuntimeError:
            # After a device-side assert nothing answers any more: what was read before that stays.
            return
        self._answer["peaks"] = readings

    def _reach(self, step: str) -> None:
        self._answer["reached"] = step
        self._say(step, self._answer)

    def _tensors(self) -> Iterator[tuple[str, Any, bool]]:
        """Name, tensor, and whether it is a buffer."""
        yield from ((name, tensor, False) for name, tensor in self._model.named_parameters())
        yield from ((name, tensor, True) for name, tensor in self._model.named_buffers())

    def _wait(self) -> None:
        cuda = self._torch.cuda
        if cuda.is_initialized():
            for ordinal in range(cuda.device_count()):
                if cuda.memory_reserved(ordinal):
                    cuda.synchronize(ordinal)


class _Finite:
    """Looks at the logits of every step and changes nothing."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.is_finite = True

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002 - transformers' signature
        # Suppressed tokens are minus infinity on purpose: a likeliest one that is finite, and nothing that is no number.
        is_number = not bool(self._torch.isnan(scores).any())
        has_top = bool(self._torch.isfinite(scores.max(dim=-1).values).all())
        self.is_finite = self.is_finite and is_number and has_top
        return scores


def _holders(name: str) -> Iterator[str]:
    """The name and every module around it, innermost first; the root last."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _planned(name: str, device_map: dict[str, int | str] | None) -> tuple[str, ...] | None:
    """Devices that agree with the plan; ``None`` without one. What is kept on the CPU shows as meta, too."""
    if device_map is None:
        return None
    key = next((path for path in _holders(name) if path in device_map), None)
    if key is None:
        return ("nowhere",)
    device = device_map[key]
    return (f"cuda:{device}",) if isinstance(device, int) else (device, "meta")


def _plain(device: Any) -> int | str:
    """A device as a map writes it."""
    return device if isinstance(device, int) else str(device)
