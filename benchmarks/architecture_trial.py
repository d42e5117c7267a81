"""One architecture on two devices: its tiny checkpoint, its maps, and what became of them.

``all_architectures.py`` runs these, several at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

FAKE = "fake"


def said(error: BaseException) -> str:
    """Its type and first line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _where(error: BaseException) -> str:
    """The innermost line of transformers that was at work."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/transformers/" in frame.filename]
    if not frames:
        return ""
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}: {frames[-1].line}"


class Row(dict[str, Any]):
    """What is known of an architecture, on disk as soon as it is known."""

    def __init__(self, path: Path, family: str) -> None:
        super().__init__(family=family)
        self._path = path

    def add(self, **fields: Any) -> None:
        """Keep and write."""
        self.update(fields)
        self._path.write_text(json.dumps(self, indent=1))


class Trial:
    """One architecture: its checkpoint, its maps, and what became of them."""

    def __init__(self, family: str, options: argparse.Namespace, row: Row) -> None:
        self.family = family
        self.devices: list[str] = options.devices.split(",")
        self.is_fake = options.devices == FAKE
        self.with_cuts: bool = options.cuts
        self.with_turned: bool = options.turned
        self.row = row
        self.folder = tempfile.TemporaryDirectory(prefix="tiny-")

    def run(self) -> None:
        """In the order in which things can fail."""
        import tiny_architectures
        import transformers

        from vlm_doctor import load_profile

        started = time.monotonic()
        self.model = tiny_architectures.tiny_model(self.family)
        self.row.add(architecture=type(self.model).__name__, parameters=sum(p.numel() for p in self.model.parameters()))
        self.make_inputs()
        self.model.save_pretrained(self.folder.name)
        self.kind = type(self.model)
        self.model = self.alone()
        self.expected = {name: self.answer(self.model, self.at_home(inputs)) for name, inputs in self.inputs.items()}
        self.row.add(alone={name: answer["failed"] for name, answer in self.expected.items()})
        self.profile = load_profile(self.folder.name)
        self.row.add(profile="ok", notes=list(self.profile.notes), image_rule=_image_rule(self.profile))
        self.release = transformers.__version__
        self.plan()
        self.accelerate()
        if self.with_cuts:
            self.cuts()
        entries = [self.row.get(name, {}) for name in ("plan", "accelerate", "auto")]
        if any("runs" in entry and not entry["crashes"] and not entry["equal"] for entry in entries):
            self.row.add(repeats={name: self.repeats(name, inputs) for name, inputs in self.inputs.items()})
        self.row.add(seconds=round(time.monotonic() - started, 1))

    def options(self) -> dict[str, Any]:
        """Of every load."""
        import torch

        return {"dtype": torch.float32, "attn_implementation": "eager"}

    def alone(self) -> Any:
        """The model on one device."""
        model = _plain(self.kind.from_pretrained(self.folder.name, **self.options()))
        return model if self.is_fake else model.to(self.devices[0])

    def at_home(self, inputs: Any) -> Any:
        """Inputs on the one device."""
        return _moved(inputs, "cpu" if self.is_fake else self.devices[0])

    def make_inputs(self) -> None:
        """A text and an image, as far as the class takes them."""
        import tiny_inputs

        self.inputs: dict[str, Any] = {}
        refused: dict[str, str] = {}
        for name, make in (("text", tiny_inputs.text_inputs), ("image", tiny_inputs.image_inputs)):
            try:
                inputs = make(self.model)
                if inputs:
                    _logits(self.model, inputs)
                    self.inputs[name] = inputs
            except Exception as error:  # noqa: BLE001 - a class that takes no such inputs
                refused[name] = said(error)
        self.row.add(inputs=sorted(self.inputs), no_inputs=refused)
        if not self.inputs:
            raise LookupError(f"the model runs on nothing: {refused}")

    def repeats(self, name: str, inputs: Any) -> bool:
        """Whether one device gives the same answer once more, loaded anew."""
        import torch

        again = self.answer(self.alone(), self.at_home(inputs))
        first = self.expected[name]
        if first["failed"] or again["failed"]:
            return bool(first["failed"]) and bool(again["failed"])
        return bool(torch.allclose(again["logits"], first["logits"], atol=1e-4))

    # -- maps

    def machine(self, count: int = 2) -> Any:
        """Two GPUs with room for anything, and the libraries of this process."""
        import msgspec

        from vlm_doctor import load_machine
        from vlm_doctor.machine import Libraries, Package

        packages = (Package(name="transformers", version=self.release),)
        libraries = Libraries(python="3", executable="python", packages=packages)
        return msgspec.structs.replace(load_machine(",".join(["80GiB"] * count)), libraries=libraries)

    def plan(self) -> None:
        """The planner's own map for two GPUs."""
        from vlm_doctor import Policy, plan
        from vlm_doctor.errors import VlmDoctorError

        try:
            planned = plan(self.profile, self.machine(), self.workload(), Policy(min_gpus=2, max_gpus=2))
        except VlmDoctorError as error:
            self.row.add(plan={"failed": said(error)})
            return
        if not planned.fits:
            whole = plan(self.profile, self.machine(1), self.workload())
            self.row.add(plan={"whole": whole.fits, "why": planned.shortage.message if planned.shortage else ""})
            return
        used = sorted(set(planned.device_map.values()))
        self.row.add(plan={"fits": planned.fits, "devices": used, "share": self.share(planned.device_map)})
        self.row["plan"].update(self.judge(planned.device_map))
        if self.with_turned:
            self.row["plan"]["turned"] = self.judge(_turned(planned.device_map))
        self.row.add()

    def workload(self) -> Any:
        """A short prompt, with an image where the profile knows how to count it."""
        from vlm_doctor import Workload

        return Workload(images=int(self.profile.vision is not None), text_tokens=64, new_tokens=8)

    def share(self, device_map: dict[str, Any]) -> float:
        """Part of the weights on the first device."""
        from vlm_doctor.planner.map_names import owner

        total = first = 0
        for name, parameter in self.model.named_parameters():
            total += parameter.numel()
            key = owner(device_map, name)
            first += parameter.numel() * (key is not None and device_map[key] == 0)
        return round(first / max(1, total), 3)

    def accelerate(self) -> None:
        """The maps of accelerate: half and half, and transformers' own ``auto`` for two GPUs of a little more than half."""
        for name, make in (("accelerate", self.half_and_half), ("auto", self.automatic)):
            try:
                device_map = make()
            except Exception as error:  # noqa: BLE001 - the library's own failure is the result
                self.row.add(**{name: {"failed": said(error)}})
                continue
            entry: dict[str, Any] = {
                "share": self.share(device_map),
                "devices": sorted({str(d) for d in device_map.values()}),
            }
            self.row.add(**{name: entry})
            if len(entry["devices"]) > 1 and set(entry["devices"]) <= {"0", "1"}:
                numbers = {key: int(device) for key, device in device_map.items()}
                entry.update(self.judge(device_map), map=numbers)
                if self.with_turned:
                    entry["turned"] = self.judge(_turned(numbers))
            self.row.add()

    def half_and_half(self) -> dict[str, Any]:
        """``infer_auto_device_map`` as scripts call it, with the class's own list of blocks."""
        from accelerate import infer_auto_device_map

        model = self.on_meta()
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        blocks = list(_no_split(model))
        found: dict[str, Any] = infer_auto_device_map(
            model, max_memory={0: size // 2, 1: size * 2}, no_split_module_classes=blocks or None
        )
        return found

    def automatic(self) -> dict[str, Any]:
        """What ``device_map="auto"`` of the installed transformers makes of two GPUs with room for 0.7 of the model."""
        import accelerate.utils.modeling
        import torch

        model = self.on_meta()
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        memory = {0: int(size * 0.7), 1: int(size * 0.7), "cpu": size * 10}

        def free(asked: Any = None) -> Any:
            return dict(memory if asked is None else asked)

        accelerate.utils.modeling.get_max_memory = free
        if self.release.startswith("4."):
            import transformers.modeling_utils as loading

            loading.get_max_memory = free
            return dict(loading._get_device_map(model, "auto", None, None, torch.float32, None))
        import transformers.integrations.accelerate as own

        own.accelerate_max_memory = free
        return dict(own._get_device_map(model, "auto", None, None))

    def on_meta(self) -> Any:
        """The class without weights, tied."""
        import copy

        import torch

        with torch.device("meta"):
            model = self.kind._from_config(copy.deepcopy(self.model.config))
        model.tie_weights()
        return model

    def cuts(self) -> None:
        """Every contiguous cut of the chain, the tower whole and in parts."""
        from vlm_doctor.planner.constraints import can_break_tower, chain
        from vlm_doctor.planner.installed import as_loaded

        profile = as_loaded(self.profile, self.machine())
        found = []
        for breaks in (False, True):
            if breaks and not can_break_tower(profile):
                continue
            atoms = chain(profile, breaks_tower=breaks).atoms
            for border in range(1, len(atoms)):
                device_map = {unit.key: int(at >= border) for at, atom in enumerate(atoms) for unit in atom.units}
                judged = self.judge(device_map)
                found.append({"breaks_tower": breaks, "border": border, "of": len(atoms), **judged})
        self.row.add(cuts=found)

    # -- runs

    def judge(self, device_map: dict[str, Any]) -> dict[str, Any]:
        """What ``check_map`` says before, and what happens."""
        checked = self.checked(device_map)
        results = {name: self.compare(device_map, name, inputs) for name, inputs in self.inputs.items()}
        crashed = [result for result in results.values() if result["failed"]]
        names = [result.get("module", "") for result in crashed]
        return {
            "check": checked,
            "runs": results,
            "crashes": bool(crashed),
            "equal": all(result.get("equal") for result in results.values()),
            "named": any(_is_about(text, module) for text in checked["errors"].values() for module in names),
        }

    def checked(self, device_map: dict[str, Any]) -> dict[str, Any]:
        """Codes and sentences of ``check_map``."""
        from vlm_doctor.errors import VlmDoctorError
        from vlm_doctor.planner.map_check import check_map

        try:
            checked = check_map(device_map, self.profile, self.machine(), self.workload())
        except VlmDoctorError as error:
            return {"failed": said(error), "errors": {}, "warnings": []}
        errors: dict[str, str] = {}
        for found in checked.findings:
            if found.severity == "error":
                errors.setdefault(found.code, "")
                errors[found.code] += f"{found.message} {found.cause or ''} {found.fix.text if found.fix else ''} "
        return {"errors": errors, "warnings": sorted({f.code for f in checked.findings if f.severity == "warning"})}

    def compare(self, device_map: dict[str, Any], name: str, inputs: Any) -> dict[str, Any]:
        """Load by the map and answer; beside the answer of one device."""
        import torch

        expected = self.expected[name]
        if expected["failed"]:
            return {"failed": "", "equal": False, "note": f"fails on one device too: {expected['failed']}"}
        found = self.placed(device_map, inputs)
        if found["failed"]:
            return {key: found.get(key, "") for key in ("failed", "module", "where")}
        difference = (found["logits"] - expected["logits"]).abs().max().item()
        scale = expected["logits"].abs().max().item()
        same = (
            torch.equal(found["tokens"], expected["tokens"]) if found["tokens"] is not None else expected["tokens"] is None
        )
        is_equal = difference <= 1e-4 * max(1.0, scale) and same
        return {"failed": "", "equal": is_equal, "difference": difference, "tokens_equal": same}

    def answer(self, model: Any, inputs: Any) -> dict[str, Any]:
        """Logits of one pass and greedy tokens, or what was raised and in which module."""
        import torch

        at: list[str] = []
        names = {id(module): name for name, module in model.named_modules()}

        def begin(module: Any, _: Any) -> None:
            at.append(names.get(id(module), ""))

        def end(_: Any, __: Any, ___: Any) -> None:
            at.pop()

        enter = torch.nn.modules.module.register_module_forward_pre_hook(begin)
        leave = torch.nn.modules.module.register_module_forward_hook(end)
        try:
            logits = _logits(model, inputs)
            tokens = _tokens(model, inputs)
        except Exception as error:  # noqa: BLE001 - the crash is the result
            where = _where(error)
            return {"failed": said(error), "module": at[-1] if at else "", "where": where, "logits": None, "tokens": None}
        finally:
            enter.remove()
            leave.remove()
        return {"failed": "", "module": "", "logits": logits, "tokens": tokens}

    def placed(self, device_map: dict[str, Any], inputs: Any) -> dict[str, Any]:
        """The answer of the model as the map places it."""
        if self.is_fake:
            return self.on_fake_devices(device_map, inputs)
        import torch

        real, first = self.on_real_devices(device_map)
        try:
            model = self.loaded_by(real)
        except Exception as error:  # noqa: BLE001 - the library's own failure is the result
            return {"failed": said(error), "module": "", "logits": None, "tokens": None}
        found = self.answer(model, _moved(inputs, first))
        del model
        if found["failed"]:
            self.check_devices()
        torch.cuda.empty_cache()
        return found

    def on_real_devices(self, device_map: dict[str, Any]) -> tuple[dict[str, int], str]:
        """The map in ordinals, and where accelerate sends the inputs.

        Ordinals are what plans and ``auto`` give. For texts such as ``cuda:1`` accelerate takes the first of a set of them,
        which is another one in every process.
        """
        from vlm_doctor.planner.map_devices import main_device

        ordinals = [int(device.rpartition(":")[2]) for device in self.devices]
        real = {key: ordinals[device] for key, device in device_map.items()}
        return real, f"cuda:{main_device(real.values())}"

    def loaded_by(self, device_map: dict[str, int]) -> Any:
        """The model as transformers places it."""
        return _plain(self.kind.from_pretrained(self.folder.name, device_map=device_map, **self.options()))

    def check_devices(self) -> None:
        """Some errors (an assertion in a kernel) leave CUDA unusable in this process; what follows is not to blame."""
        import torch

        try:
            for device in self.devices:
                torch.cuda.synchronize(device)
        except RuntimeError:
            self.row.add(is_lost=True)
            raise

    def on_fake_devices(self, device_map: dict[str, Any], inputs: Any) -> dict[str, Any]:
        """The same with tensors that say where they are."""
        import copy

        import torch
        from accelerate import dispatch_model

        from tests.models.fake_devices import FakeDevices
        from vlm_doctor.planner.map_devices import main_device

        model = copy.deepcopy(self.model)
        with torch.no_grad(), FakeDevices():
            try:
                places = {key: torch.device("cuda", device) for key, device in device_map.items()}
                first = torch.device("cuda", int(main_device(device_map.values()) or 0))
                _load_at(model, places)
                skip = model._skip_keys_device_placement
                dispatch_model(model, places, main_device=first, skip_keys=skip, force_hooks=True)
            except Exception as error:  # noqa: BLE001 - the library's own failure is the result
                return {"failed": said(error), "module": "", "logits": None, "tokens": None}
            found = self.answer(model, _moved(inputs, first))
        for name in ("logits", "tokens"):
            if found[name] is not None:
                found[name] = found[name].as_subclass(torch.Tensor)
        return found


def _plain(model: Any) -> Any:
    """For inference, with experts in plain operations: kernels do not know devices that are not there, nor float32."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for module in model.modules():
        # A tower of experts is not asked.
        if getattr(getattr(module, "config", None), "_experts_implementation", "eager") != "eager":
            module.config._experts_implementation = "eager"
    return model.eval()


def _load_at(model: Any, places: dict[str, Any]) -> None:
    """Put every tensor where loading puts it: accelerate moves modules only, and a bare parameter is none."""
    from vlm_doctor.planner.map_names import owner

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        key = owner(places, name)
        if key is not None:
            tensor.data = tensor.data.to(places[key])


def _turned(device_map: dict[str, Any]) -> dict[str, int]:
    """The two devices exchanged: accelerate sends the inputs to the lower number all the same."""
    return {key: 1 - int(device) for key, device in device_map.items()}


def _moved(inputs: Any, device: Any) -> Any:
    return {name: value.to(device) for name, value in inputs.items()}


def _no_split(model: Any) -> list[str]:
    """The class's list of blocks, as either major version keeps it."""
    if hasattr(model, "_get_no_split_modules"):
        try:
            return list(model._get_no_split_modules("auto"))
        except ValueError:
            return []
    return list(model._no_split_modules or ())


def _logits(model: Any, inputs: Any) -> Any:
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(**inputs).logits
    logits = logits.cpu()
    if torch.isnan(logits).any():
        raise ArithmeticError("logits are not numbers")
    return logits.float()


def _tokens(model: Any, inputs: Any, count: int = 3) -> Any:
    """Greedy tokens; nothing where the class makes none."""
    import torch

    if not model.can_generate() or type(model).__name__ in _NO_TOKENS:
        return None
    torch.manual_seed(0)
    with torch.no_grad():
        # Without an end, so that no logits processor is asked to hold it back.
        for part in (model, getattr(model, "language_model", None)):
            if getattr(part, "generation_config", None) is not None:
                part.generation_config.eos_token_id = None
        return model.generate(**inputs, max_new_tokens=count, do_sample=False).cpu()


_NO_TOKENS = frozenset({"DiffusionGemmaForBlockDiffusion", "PI0ForConditionalGeneration"})
"""They make actions, or denoise a canvas."""


def _image_rule(profile: Any) -> str:
    return profile.image.kind if profile.image is not None else ""


def _is_about(text: str, module: str) -> bool:
    """True when a sentence names the module that failed, one in it, or the block or part that holds it."""
    words = {word.strip("'\":,.();") for word in text.replace("(", " ").split()}
    return any(
        word.count(".") >= 1 and (word == module or word.startswith(f"{module}.") or module.startswith(f"{word}."))
        for word in words
    )


__all__ = ["FAKE", "Row", "Trial", "said"]
