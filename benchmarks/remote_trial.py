"""One family that brings code of its own, on two devices: as ``architecture_trial.py`` does for those of transformers.

Beside the maps for two devices there is one of accelerate for four, where vision towers are cut (CogVLM2#10).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from architecture_trial import Trial


class RemoteTrial(Trial):
    """The checkpoint is that of ``tiny_remote.py``, loaded with ``trust_remote_code=True``."""

    def run(self) -> None:
        """In the order in which things can fail."""
        import tiny_remote
        import transformers

        from vlm_doctor import load_profile

        started = time.monotonic()
        self.release = transformers.__version__
        tiny_remote.write(self.family, Path(self.folder.name))
        self.model = self.alone()
        self.kind = type(self.model)
        self.inputs = tiny_remote.inputs(self.family)
        counted = sum(parameter.numel() for parameter in self.model.parameters())
        self.row.add(architecture=self.kind.__name__, parameters=counted, inputs=sorted(self.inputs))
        self.expected = {name: self.answer(self.model, self.at_home(inputs)) for name, inputs in self.inputs.items()}
        self.row.add(alone={name: answer["failed"] for name, answer in self.expected.items()})
        self.profile = load_profile(self.folder.name)
        self.row.add(profile="ok", notes=list(self.profile.notes))
        self.plan()
        self.accelerate()
        self.quarters()
        if self.with_cuts:
            self.cuts()
        self.row.add(seconds=round(time.monotonic() - started, 1))

    def quarters(self) -> None:
        """The map of accelerate for four devices of a quarter each; only where there are four."""
        from accelerate import infer_auto_device_map
        from architecture_trial import _no_split

        if not self.is_fake and len(self.devices) < 4:
            return
        model = self.on_meta()
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        memory = {0: size // 4, 1: size // 4, 2: size // 4, 3: size * 2}
        made = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=list(_no_split(model)) or None)
        entry: dict[str, Any] = {"devices": sorted({str(device) for device in made.values()})}
        self.row.add(quarters=entry)
        if len(entry["devices"]) > 1:
            entry.update(self.judge(made), map={key: int(device) for key, device in made.items()})
        self.row.add()

    def judge(self, device_map: dict[str, Any]) -> dict[str, Any]:
        """As of any architecture; a warning that tells of the crash counts as named, too."""
        found = super().judge(device_map)
        crashed = [run for run in found["runs"].values() if run["failed"]]
        told = [*found["check"]["errors"].values(), *found["check"].get("warned", {}).values()]
        found["named"] = any(_tells(text, run["module"]) for text in told for run in crashed)
        return found

    def checked(self, device_map: dict[str, Any]) -> dict[str, Any]:
        """Codes and sentences of ``check_map``, those of warnings too."""
        from vlm_doctor.planner.map_check import check_map

        count = max(2, 1 + max(int(device) for device in device_map.values()))
        checked = check_map(device_map, self.profile, self.machine(count), self.workload())
        found: dict[str, dict[str, str]] = {"error": {}, "warning": {}}
        for finding in checked.findings:
            if finding.severity in found:
                said_before = found[finding.severity].get(finding.code, "")
                found[finding.severity][finding.code] = f"{said_before}{finding.message} "
        return {"errors": found["error"], "warned": found["warning"], "warnings": sorted(found["warning"])}

    def alone(self) -> Any:
        """The model on one device."""
        model = self.loaded({})
        return model if self.is_fake else model.to(self.devices[0])

    def loaded(self, options: dict[str, Any]) -> Any:
        """By the class of transformers that asks for the checkpoint's own code."""
        import tiny_remote

        return tiny_remote.load(Path(self.folder.name), self.family, attn_implementation="eager", **options)

    def loaded_by(self, device_map: dict[str, int]) -> Any:
        """The model as transformers places it."""
        return self.loaded({"device_map": device_map})


def _tells(text: str, module: str) -> bool:
    """True when a sentence names the module that failed, one in it, or the block or part that holds it.

    What the outermost forward joins fails in no module: any that is named will do.
    """
    words = {word.strip("'\":,.();") for word in text.replace("(", " ").split()}
    return any(
        not module or word == module or word.startswith(f"{module}.") or module.startswith(f"{word}.") for word in words
    )


__all__ = ["RemoteTrial"]
