"""Quantized vision-language models: bytes of each module as loaded beside those planned, and whether the plan's map loads.

Without a GPU, in ten minutes (torch, transformers, accelerate, and of bitsandbytes, torchao, optimum-quanto, hqq,
compressed-tensors what there is)::

    python benchmarks/quantised.py --out benchmarks/results/quantised-cpu.json

On two GPUs, where the map parts the model, memory is read from torch, and answers are compared with those of one GPU::

    python benchmarks/quantised.py --out quantised-gpu.json --devices cuda:0,cuda:1

Each family gets a tiny checkpoint with random weights (``tiny_architectures.py``). ``load`` quantizes it while it is
loaded; ``read`` saves what was quantized so, reads that checkpoint's headers with the profile, and loads it again. Planned
bytes are those of the plan's ledger; loaded bytes are the sum over all tensors of a module, scales and tables included. A
line a case.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

FAMILIES = (
    "glm4v", "qwen2_5_vl", "qwen3_vl_moe", "llava", "gemma3", "internvl", "mllama", "mistral3", "idefics3", "paligemma",
    "llama4", "glm4v_moe", "deepseek_vl", "blip-2",
)  # fmt: skip
PACKAGES = (
    "torch", "transformers", "accelerate", "bitsandbytes", "torchao", "optimum-quanto", "hqq", "compressed-tensors",
)  # fmt: skip


IMAGES_ALONE = frozenset({"blip-2"})
"""Families that take no prompt without an image."""


class Method(NamedTuple):
    """One way of quantizing."""

    package: str
    make: Callable[[], Any]
    """``quantization_config``."""
    workload: str | None = None
    """The plan's word for it, where it has one."""
    is_saved: bool = True
    """The library can save what it quantized."""


def _bnb(**fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torch
        import transformers

        return transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **fields)

    return make


def _torchao(name: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torchao.quantization
        import transformers

        return transformers.TorchAoConfig(getattr(torchao.quantization, name)(**fields))

    return make


def _intx4() -> Any:
    """4 bits kept in bytes, which runs anywhere."""
    import torch
    import torchao.quantization
    import transformers
    from torchao.quantization.granularity import PerGroup

    kind = torchao.quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return transformers.TorchAoConfig(kind)


def _of_transformers(name: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**fields)

    return make


METHODS: dict[str, Method] = {
    "bnb-int8": Method("bitsandbytes", _bnb(load_in_8bit=True), "int8"),
    "bnb-nf4": Method("bitsandbytes", _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"),
    "bnb-nf4-double": Method(
        "bitsandbytes", _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    ),
    "bnb-fp4": Method("bitsandbytes", _bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "torchao-int8": Method("torchao", _torchao("Int8WeightOnlyConfig", version=2)),
    "torchao-int4": Method("torchao", _torchao("Int4WeightOnlyConfig", group_size=32)),
    "torchao-intx4": Method("torchao", _intx4),
    "torchao-float8": Method("torchao", _torchao("Float8WeightOnlyConfig")),
    "quanto-int8": Method("optimum-quanto", _of_transformers("QuantoConfig", weights="int8"), is_saved=False),
    "quanto-int4": Method("optimum-quanto", _of_transformers("QuantoConfig", weights="int4"), is_saved=False),
    "quanto-float8": Method("optimum-quanto", _of_transformers("QuantoConfig", weights="float8"), is_saved=False),
    "hqq-int4": Method("hqq", _of_transformers("HqqConfig", nbits=4, group_size=64), is_saved=False),
}


def main() -> int:
    import logging

    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--devices", default="cpu", help="cpu, or GPUs such as cuda:0,cuda:1")
    parser.add_argument("--methods", nargs="*", default=[*METHODS, *COMPRESSED], choices=[*METHODS, *COMPRESSED])
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help="model_type")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for family in options.families or FAMILIES:
        try:
            tiny = Tiny(family, options.devices.split(","))
        except Exception as error:  # noqa: BLE001 - whatever the class raises is the result
            rows.append({"family": family, "failed": said(error)})
            print(f"{family:16} {rows[-1]['failed']}", flush=True)
            continue
        for name in options.methods:
            for row in compressed(tiny, name) if name in COMPRESSED else tiny.cases(name):
                rows.append(row)
                print(line(row), flush=True)
        options.out.write_text(
            json.dumps({"devices": options.devices, "versions": versions(), "rows": rows}, indent=1) + "\n"
        )
    bad = [row for row in rows if row.get("worst_part_per_thousand", 0) > 5]
    print(f"{len(rows)} cases, {sum('failed' in row for row in rows)} failed, {len(bad)} beyond 0.5 % of a module")
    return 0


def versions() -> dict[str, str]:
    """Of the libraries that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], **found}


def said(error: BaseException) -> str:
    """Its type and first line."""
    lines = [text for text in str(error).strip().splitlines() if text.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def line(row: dict[str, Any]) -> str:
    """One case on one line."""
    head = f"{row['family']:14} {row['method']:15} {row['step']:4}"
    if "loaded_bytes" not in row:
        return f"{head} FAILED {row['failed']}"
    planned = f"{row['planned_bytes']:>9,}" if row["planned_bytes"] is not None else "        -"
    ratio = f"{row['ratio']:.4f}" if row["ratio"] is not None else "   -  "
    worst = f" worst {row['worst_unit']} {row['worst_part_per_thousand']:.1f} per thousand" if row.get("worst_unit") else ""
    answers = f" answers {row['answers']}" if "answers" in row else f" FAILED {row.get('failed', '')}"
    return f"{head} planned {planned} loaded {row['loaded_bytes']:>9,} {ratio} map {row['map']}{answers}{worst}"


class Tiny:
    """A family's tiny checkpoint in bfloat16."""

    def __init__(self, family: str, devices: list[str]) -> None:
        import tiny_architectures
        import tiny_inputs
        import torch

        self.family, self.devices = family, devices
        self.folder = tempfile.TemporaryDirectory(prefix="tiny-")
        model = tiny_architectures.tiny_model(family)
        self.kind = type(model)
        self.inputs = tiny_inputs.text_inputs(model)
        if family in IMAGES_ALONE:
            self.inputs = tiny_inputs.image_inputs(model)
        model.to(torch.bfloat16).save_pretrained(self.folder.name)

    def cases(self, name: str) -> Iterator[dict[str, Any]]:
        """Quantized while loading; saved and read."""
        method = METHODS[name]
        try:
            importlib.metadata.version(method.package)
        except importlib.metadata.PackageNotFoundError:
            return
        started = time.monotonic()
        row: dict[str, Any] = {"family": self.family, "method": name, "step": "load"}
        model = None
        try:
            case = Case(self, self.folder.name, method.workload, method.package)
            model = case.load(method.make())
            row.update(case.compare(model, is_planned=method.workload is not None))
            row.update(case.run(model, method.make))
        except Exception as error:  # noqa: BLE001 - the library's own failure is the result
            row["failed"] = said(error)
        yield {**row, "seconds": round(time.monotonic() - started, 2)}
        if model is not None and method.is_saved:
            yield self.read_again(name, model)

    def read_again(self, name: str, model: Any) -> dict[str, Any]:
        """Save what was quantized, read the headers, load it."""
        started = time.monotonic()
        row: dict[str, Any] = {"family": self.family, "method": name, "step": "read"}
        with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
            try:
                model.save_pretrained(folder)
                case = Case(self, folder, None, METHODS[name].package)
                row["stored_bytes"] = case.profile.stored_bytes
                row["elements"] = case.profile.elements
                again = case.load(None)
                row.update(case.compare(again, is_planned=True))
                row.update(case.run(again, lambda: None))
            except Exception as error:  # noqa: BLE001 - the library's own failure is the result
                row["failed"] = said(error)
        return {**row, "seconds": round(time.monotonic() - started, 2)}


class Case:
    """One checkpoint, loaded one way."""

    def __init__(self, tiny: Tiny, folder: str, quantization: Any, package: str) -> None:
        import msgspec
        import transformers

        from vlm_doctor import Policy, Workload, load_machine, load_profile, plan
        from vlm_doctor.machine import Libraries, Package
        from vlm_doctor.planner.installed import as_loaded

        self.tiny, self.folder, self.package = tiny, folder, package
        packages = (Package(name="transformers", version=transformers.__version__),)
        libraries = Libraries(python="3", executable="python", packages=packages)
        machine = msgspec.structs.replace(load_machine("80GiB,80GiB"), libraries=libraries)
        self.profile = as_loaded(load_profile(folder), machine)
        self.workload = Workload(images=0, text_tokens=64, new_tokens=4, quantization=quantization)
        self.plan = plan(load_profile(folder), machine, self.workload, Policy(min_gpus=2, max_gpus=2))
        self.is_on_cpu = tiny.devices == ["cpu"]

    def load(self, config: Any, *, is_split: bool = True) -> Any:
        """By the plan's map; on the CPU each of its keys says ``cpu``, where the library takes such a map."""
        import torch

        devices = self.tiny.devices
        # Ordinals, as plans have them: of texts accelerate takes any as the device of the inputs.
        places: list[Any] = ["cpu" if device == "cpu" else int(device.rpartition(":")[2]) for device in devices]
        names: Any = {key: places[min(int(gpu), len(places) - 1) if is_split else 0] for key, gpu in self.placed().items()}
        if not self.takes_map:
            names = {"": "cpu"} if self.package == "torchao" else None
        options = {"quantization_config": config} if config is not None else {}
        before = self.allocated(torch.cuda.memory_allocated)
        if not self.is_on_cpu:
            torch.cuda.init()
            for device in devices:
                torch.cuda.reset_peak_memory_stats(device)
        model = self.tiny.kind.from_pretrained(
            self.folder, device_map=names, dtype=torch.bfloat16, attn_implementation="eager", **options
        )
        from architecture_trial import _plain

        held, most = self.allocated(torch.cuda.memory_allocated), self.allocated(torch.cuda.max_memory_allocated)
        self.memory = {
            "allocated_bytes": {name: held[name] - before[name] for name in held},
            "while_loading_bytes": {name: most[name] - held[name] for name in held},
            "planned_while_loading_bytes": self.loading_bytes(),
        }
        return _plain(model)

    def allocated(self, read: Callable[[str], int]) -> dict[str, int]:
        """Of each GPU; nothing on a CPU."""
        return {} if self.is_on_cpu else {name: read(name) for name in self.tiny.devices}

    def loading_bytes(self) -> int:
        """What the plan counts beside the weights while they are loaded."""
        import transformers

        from vlm_doctor.planner.weights import loading_bytes

        major, minor = transformers.__version__.split(".")[:2]
        return loading_bytes(self.profile.units, self.profile, self.workload, (int(major), int(minor)))

    @property
    def takes_map(self) -> bool:
        """Quanto and hqq refuse a map with a CPU in it, and torchao then looks for a GPU."""
        return not self.is_on_cpu or self.package not in ("torchao", "optimum-quanto", "hqq")

    def placed(self) -> dict[str, int]:
        """The plan's map; the whole model on the first device where it may not be parted."""
        return {key: int(gpu) for key, gpu in (self.plan.device_map or {"": 0}).items()}

    def compare(self, model: Any, *, is_planned: bool) -> dict[str, Any]:
        """Planned and loaded bytes, of all and of the module where they differ most."""
        from vlm_doctor.planner.weights import unit_bytes

        keys = [unit.key for unit in self.profile.units]
        loaded: Counter[str] = Counter(dict.fromkeys(keys, 0))
        for name, size_bytes in tensor_bytes(model):
            loaded[next((key for key in keys if name == key or name.startswith(f"{key}.")), "")] += size_bytes
        found: dict[str, Any] = {
            "loaded_bytes": sum(loaded.values()),
            "planned_bytes": None,
            "ratio": None,
            "map": "loads" if self.takes_map else "not tried",
            "kept": unquantized(model),
        }
        if not is_planned:
            return found
        planned = {unit.key: unit_bytes(unit, self.profile, self.workload) for unit in self.profile.units}
        found["planned_bytes"] = sum(planned.values())
        found["ratio"] = round(found["planned_bytes"] / max(1, found["loaded_bytes"]), 5)
        off = {
            key: abs(planned.get(key, 0) - size) / max(1, size)
            for key, size in loaded.items()
            if planned.get(key, 0) != size
        }
        if off:
            worst = max(off, key=lambda key: off[key])
            found["worst_unit"], found["worst_part_per_thousand"] = worst or "(no unit)", round(1000 * off[worst], 2)
            found["worst_bytes"] = [planned.get(worst, 0), loaded[worst]]
        return found

    def inputs(self) -> dict[str, Any]:
        """Pixels in the model's type."""
        import torch

        given = self.tiny.inputs.items()
        return {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in given}

    def run(self, model: Any, make: Callable[[], Any]) -> dict[str, Any]:
        """Whether the answer of the parted model is that of one device."""
        import torch

        if self.is_on_cpu:
            return {"answers": on_stand_ins(model, self.placed(), self.inputs())}
        memory = self.memory
        parted = logits(model, self.inputs(), self.tiny.devices[0])
        alone = logits(self.load(make(), is_split=False), self.inputs(), self.tiny.devices[0])
        return {"answers": "equal" if torch.allclose(parted, alone, atol=2e-2) else "differ", **memory}


COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "ct-pack-int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "ct-int8": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "ct-float8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
}
"""Checkpoints of compressed-tensors: its name for the format, its arguments for the weights."""


def compressed(tiny: Tiny, name: str) -> Iterator[dict[str, Any]]:
    """A checkpoint written with compressed-tensors itself, rounded to the nearest; its bytes count after the first pass."""
    try:
        import compressed_tensors.quantization as kinds
        from compressed_tensors.compressors import ModelCompressor
    except ImportError:
        return
    import torch

    started = time.monotonic()
    row: dict[str, Any] = {"family": tiny.family, "method": name, "step": "read"}
    try:
        word, fields = COMPRESSED[name]
        weights = kinds.QuantizationArgs(symmetric=True, **fields)
        made = kinds.QuantizationConfig(
            config_groups={"group_0": kinds.QuantizationScheme(targets=["Linear"], weights=weights)},
            ignore=["lm_head"], format=word, quantization_status=kinds.QuantizationStatus.COMPRESSED,
        )  # fmt: skip
        model = tiny.kind.from_pretrained(tiny.folder.name, dtype=torch.bfloat16)
        kinds.apply_quantization_config(model, made)
        top = 448.0 if fields["type"] == "float" else 2.0 ** (fields["num_bits"] - 1) - 1
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                rows, groups = module.weight_scale.shape
                scale = module.weight.data.float().view(rows, groups, -1).abs().amax(-1) / top
                module.weight_scale.data = scale.to(module.weight_scale.dtype)
        ModelCompressor(quantization_config=made).compress_model(model)
        with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
            model.save_pretrained(folder)
            path = Path(folder, "config.json")
            section = {**made.model_dump(exclude_none=True, mode="json"), "quant_method": "compressed-tensors"}
            path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": section}))
            for config, kind in ((None, name), (unpacking(), f"{name}-unpacked")):
                if kind == name or config is not None:
                    yield read_compressed(tiny, folder, {**row, "method": kind}, config)
    except Exception as error:  # noqa: BLE001 - the library's own failure is the result
        yield {**row, "failed": said(error), "seconds": round(time.monotonic() - started, 2)}


def unpacking() -> Any:
    """What has the weights unpacked while they are loaded; ``None`` before transformers 5, which always does so."""
    import transformers

    is_old = transformers.__version__.startswith("4.")
    return None if is_old else transformers.CompressedTensorsConfig(dequantize=True)


def read_compressed(tiny: Tiny, folder: str, row: dict[str, Any], config: Any) -> dict[str, Any]:
    """Load such a checkpoint and hold it to the plan."""
    started = time.monotonic()
    try:
        case = Case(tiny, folder, None, "compressed-tensors")
        row.update(stored_bytes=case.profile.stored_bytes, elements=case.profile.elements)
        again = case.load(config)
        row["loaded_before_a_pass_bytes"] = sum(size_bytes for _, size_bytes in tensor_bytes(again))
        logits(again, case.inputs(), tiny.devices[0])
        row.update(case.compare(again, is_planned=True))
        row.update(case.run(again, lambda: config))
    except Exception as error:  # noqa: BLE001 - the library's own failure is the result
        row["failed"] = said(error)
    return {**row, "seconds": round(time.monotonic() - started, 2)}


def tensor_bytes(model: Any) -> Iterator[tuple[str, int]]:
    """Every parameter and stored buffer with all that belongs to it, each storage once."""
    import torch

    seen: set[int] = set()
    stored = set(model.state_dict())

    def size_of(value: Any) -> int:
        parts = inner(value)
        if parts:
            return sum(size_of(part) for part in parts)
        key = value.untyped_storage().data_ptr()
        if value.numel() == 0 or key in seen:
            return 0
        seen.add(key)
        return int(value.numel() * value.element_size())

    for path, module in model.named_modules():
        own = {**module._parameters, **{n: b for n, b in module._buffers.items() if f"{path}.{n}".lstrip(".") in stored}}
        for name in ("W_q", "meta"):  # hqq keeps its scales in a dictionary.
            value = getattr(module, name, None) if type(module).__name__ == "HQQLinear" else None
            if isinstance(value, dict):
                own |= {f"{name}.{key}": item for key, item in value.items() if isinstance(item, torch.Tensor)}
        for name, value in own.items():
            if value is not None:
                yield f"{path}.{name}".lstrip("."), size_of(value)


def inner(value: Any) -> list[Any]:
    """The tensors that a quantized weight consists of; none for a plain tensor."""
    import torch

    if type(value).__name__ == "Params4bit" and value.quant_state is not None:
        state = value.quant_state
        found = [value.data.as_subclass(torch.Tensor), state.absmax, state.code]
        if state.nested:
            found += [state.offset, state.state2.absmax, state.state2.code]
        return [item for item in found if isinstance(item, torch.Tensor)]
    if type(value).__name__ == "Int8Params" and value.SCB is not None:
        return [value.data.as_subclass(torch.Tensor), value.SCB]
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [getattr(value, name) for name in names if isinstance(getattr(value, name), torch.Tensor)]
    return []


def unquantized(model: Any) -> list[str]:
    """Patterns of the linear layers that stay as they are."""
    import torch

    plain = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if isinstance(module, torch.nn.Linear) else None
        if weight is not None and weight.is_floating_point() and weight.element_size() > 1 and not inner(weight):
            plain.add(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    return sorted(plain)


def logits(model: Any, inputs: dict[str, Any], device: str) -> Any:
    """Of one pass."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        return model(**{name: value.to(device) for name, value in inputs.items()}).logits.float().cpu()


def on_stand_ins(model: Any, device_map: dict[str, int], inputs: dict[str, Any]) -> str:
    """The answer of the model over two devices that are not there, beside that of one."""
    import torch
    from accelerate import dispatch_model

    from tests.models.fake_devices import FakeDevices, put
    from vlm_doctor.planner.map_devices import main_device
    from vlm_doctor.planner.map_names import owner

    if len(set(device_map.values())) < 2:
        return "not parted"
    if any(hasattr(tensor, "__tensor_flatten__") for tensor in model.parameters()):
        return "not on stand-ins (the weights are a tensor class of their own)"
    expected = logits(model, inputs, "cpu")
    first = torch.device("cuda", int(main_device(device_map.values()) or 0))
    try:
        with torch.no_grad(), FakeDevices():
            places = {key: torch.device("cuda", gpu) for key, gpu in device_map.items()}
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                key = owner(places, name)
                if key is None:
                    continue
                for part in inner(tensor)[1:]:
                    put(part, places[key])
                tensor.data = put(tensor.data.clone(), places[key])
            for path, module in model.named_modules():
                state = getattr(module, "state", None)  # Of an 8-bit layer that has run.
                for name in ("CB", "SCB") if state is not None else ():
                    if isinstance(getattr(state, name, None), torch.Tensor):
                        setattr(
                            state, name, put(getattr(state, name).clone(), places[str(owner(places, f"{path}.weight"))])
                        )
            dispatch_model(model, places, main_device=first, skip_keys=model._skip_keys_device_placement, force_hooks=True)
            found = model(**{name: value.to(first) for name, value in inputs.items()}).logits
        found = found.as_subclass(torch.Tensor).float()
    except Exception as error:  # noqa: BLE001 - the crash is the result
        return f"not on stand-ins ({said(error)[:120]})"
    return "equal" if torch.allclose(found, expected, atol=1e-3) else "differ"


if __name__ == "__main__":
    sys.exit(main())
