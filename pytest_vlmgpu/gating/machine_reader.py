"""The machine that decides, as it was last read: this one, or a recorded or made-up one that never changes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..leasing.hiding import lifted
from ..overridden import check_value
from .faults import Losses
from .slices import unfold

if TYPE_CHECKING:
    import pytest

    from vlm_doctor.machine import Machine


class MachineReader:
    """Reads the machine when it is first asked for, and again where a reading is too old.

    Args:
        config: Of this run.
        recorded: The machine of ``--vlm-machine`` or ``--vlm-fake-gpus``; ``None`` is this one.
    """

    def __init__(self, config: pytest.Config, recorded: Machine | None) -> None:
        self._config = config
        self._first = self._latest = unfold(recorded) if recorded is not None else None
        self._read_at = 0.0
        self.is_read_by_doctor = False
        """True where the doctor read this machine itself, and no project or plugin answered in its place."""
        self.used: Machine | None = None
        """As last read; ``None`` until a gated test was decided about."""
        self.losses = Losses()

    def first(self) -> Machine:
        """The machine as this process saw it at first."""
        if self._first is None:
            self._first = self._read()
        return self._first

    def current(self, request: pytest.FixtureRequest, *, max_age_s: float) -> Machine:
        """The value of the fixture ``vlm_machine``, read again if it is ours and live and older than ``max_age_s``.

        Raises:
            UsageError: A conftest gives something else.
        """
        from vlm_doctor.machine import Machine

        machine: Machine = request.getfixturevalue("vlm_machine")
        check_value(machine, Machine, origin="fixture vlm_machine", wanted="a vlm_doctor.Machine, as load_machine does")
        if machine is self._first and machine.origin == "live":
            if time.monotonic() - self._read_at > max_age_s:
                self._latest = self._read()
            machine = self._latest or machine
        self.used = machine = unfold(machine)
        return machine

    def now(self) -> Machine | None:
        """The machine as it is right now, where it is this one and can be asked; else as last read."""
        if self.used is not None and self.used.origin == "live" and self._latest is not None:
            try:
                self.used = self._read()
            except Exception:  # noqa: BLE001 - only asked while a failure is reported, which must not be lost
                return self.used
        return self.used

    @property
    def is_reread(self) -> bool:
        """True when the machine in use is the one that this process reads: another one never changes."""
        return self.used is not None and self.used is self._latest and self.used.origin == "live"

    def _read(self) -> Machine:
        with lifted(self._config):
            told: Machine | None = self._config.hook.pytest_vlmgpu_inventory(config=self._config)
            self.is_read_by_doctor = told is None
            self._latest = unfold(_collect() if told is None else told)
        self._read_at = time.monotonic()
        self.losses.see(self._latest)
        return self._latest


def _collect() -> Machine:
    from vlm_doctor.sources import collect

    return collect(with_torch=False)


def ordinals_by_uuid(machine: Machine) -> dict[str, int]:
    """GPU UUID to CUDA ordinal, as far as the doctor can tell without torch."""
    from vlm_doctor.visibility import visible_gpus

    uuids = {gpu.index: gpu.uuid for gpu in machine.gpus}
    return {uuids[index]: ordinal for ordinal, index in enumerate(visible_gpus(machine).gpus)}
