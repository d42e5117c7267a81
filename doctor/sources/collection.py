"""Runs the sources, the slow ones side by side, and puts what they saw together."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from .. import __version__
from ..machine import Checkpoint, Driver, Gap, Gpu, KernelEvent, Machine, PciDevice, TorchView
from .checkpoints import read_checkpoints
from .child import Child
from .driver import read_driver_files
from .environment import read_environment
from .host import hf_cache_folder, read_host
from .in_time import in_time
from .nccl_files import read_nccl_files
from .nvml_answer import NvmlView, understand
from .pci import read_pci_devices
from .torch_view import TorchQuestion, search_path

ResultT = TypeVar("ResultT")
OtherT = TypeVar("OtherT")

SOURCE_DEADLINE_S = 3.0
"""What reading files may take: far more than it does, far less than a disk whose server is gone."""


class Collection:
    """An examination of this computer that is under way: starting it starts the children, asking it waits for them.

    Args:
        with_torch: Ask torch in a child process, too.
        environment: Environment variables to examine and to give to the children; ``None`` for this process's own.
        root: Where the file system begins: a folder with a copy of ``/proc``, ``/sys``, ``/dev`` … in tests.
        deadline_s: Seconds that NVML may take.
        torch_deadline_s: Seconds that importing and asking torch may take.
        fresh_torch: Do not use an answer of torch from the last ten minutes.
        cache_folder: Where torch's answers and the readings of ``calibrate`` are kept; ``None`` for the user's.
        meanwhile: Called once, when files have been read and NVML is to be waited for, with whether there may be GPUs: work
            that can be done until it has answered.
    """

    def __init__(
        self,
        *,
        with_torch: bool = True,
        environment: Mapping[str, str] | None = None,
        root: Path = Path("/"),
        deadline_s: float = 5.0,
        torch_deadline_s: float = 20.0,
        fresh_torch: bool = False,
        cache_folder: Path | None = None,
        meanwhile: Callable[[bool], None] | None = None,
    ) -> None:
        self._environment = dict(os.environ if environment is None else environment)
        self._root = root
        self._meanwhile = meanwhile
        self._cache_folder = cache_folder
        self._gaps: list[Gap] = []
        self._seconds: dict[str, float] = {}
        self._search_path = search_path(self._environment)
        self._nvml = Child("nvml", {}, environment=self._environment, deadline_s=deadline_s)
        self._torch: TorchQuestion | None = None
        self._machine: Machine | None = None
        self.waiting_for = ""
        """The source that is being read now, for whoever shows it; empty in between."""
        if not with_torch:
            return
        try:
            self._torch = TorchQuestion(
                self._search_path,
                self._environment,
                root=root,
                deadline_s=torch_deadline_s,
                cache_folder=cache_folder,
                is_fresh=fresh_torch,
            )
        except Exception as error:  # noqa: BLE001 - border: reading one source
            self._note_gap("torch", error)

    def without_torch(self) -> Machine:
        """Everything but torch, whose state is ``not_asked`` while its answer is not there yet."""
        if self._machine is None:
            self._machine = self._assemble()
        return self._machine

    def complete(self) -> Machine:
        """Everything; waits for torch at most until its deadline."""
        machine = self.without_torch()
        if self._torch is None:
            return machine
        self.waiting_for = "torch"
        view = self._torch.view()
        seconds = machine.seconds if view.seconds is None else {**machine.seconds, "torch": view.seconds}
        return msgspec.structs.replace(machine, torch=view, seconds=seconds)

    def close(self) -> None:
        """Stop the children. What they have not answered yet is lost."""
        self._nvml.close()
        if self._torch is not None:
            self._torch.close()

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _assemble(self) -> Machine:
        # Late: reading metadata takes 20 ms to import, and the children shall be running by then.
        from .calibration import load_calibrations
        from .libraries import read_libraries

        home = self._environment.get("HOME", "")
        nothing: dict[str, Any] = {}
        environment = self._read("environment", lambda: read_environment(self._environment), nothing)
        devices = self._read("pci_devices", lambda: read_pci_devices(self._root), ())
        files = self._read("driver", lambda: read_driver_files(self._root), nothing)
        host = self._read("host", lambda: read_host(self._root, self._environment, devices), None)
        libraries = self._read(
            "libraries", lambda: read_libraries(self._search_path, home=home, environment=self._environment), None
        )
        is_nvidia = bool(devices or files.get("kernel_module_version"))
        # Without an NVIDIA GPU the kernel has nothing to say that matters here.
        events = self._read("driver.kernel_events", self._read_kernel_log, None) if is_nvidia else None
        settings = self._read("nccl_settings", lambda: read_nccl_files(self._root, self._environment), ())
        checkpoints = self._read("checkpoints", self._read_checkpoints, ())
        calibrations = self._read("calibrations", lambda: load_calibrations(self._cache_folder), ())
        if self._meanwhile is not None:
            self._meanwhile(is_nvidia)
        self.waiting_for = "NVML"
        outcome = self._nvml.outcome()
        self._seconds["nvml"] = round(outcome.seconds, 4)
        unread = Driver(nvml_state="crashed", nvml_message="its answer was not understood")
        seen = self._read("gpus", lambda: understand(outcome), NvmlView(driver=unread))
        gpus = tuple(_with_numa_node(gpu, devices) for gpu in seen.gpus)
        names = {gpu.name for gpu in gpus}
        return Machine(
            origin="live",
            description=describe(gpus, devices),
            collected_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            tool_version=__version__,
            gpus=gpus,
            links=seen.links,
            pci_devices=devices,
            driver=msgspec.structs.replace(seen.driver, **files, kernel_events=events),
            host=host,
            libraries=libraries,
            torch=self._torch_so_far(),
            environment=environment,
            calibrations=tuple(reading for reading in calibrations if reading.gpu_name in names),
            nccl_settings=settings,
            checkpoints=checkpoints,
            gaps=(*self._gaps, *seen.gaps),
            seconds=self._seconds,
        )

    def _torch_so_far(self) -> TorchView:
        if self._torch is None:
            return TorchView(state="not_asked", message="was not asked")
        return self._torch.known() or TorchView(state="not_asked", message="still being asked")

    def _read_kernel_log(self) -> tuple[KernelEvent, ...]:
        from .kernel_log import read_kernel_log

        return read_kernel_log(self._root)

    def _read_checkpoints(self) -> tuple[Checkpoint, ...]:
        cache = hf_cache_folder(self._environment)
        if cache is None:
            return ()
        folders = (Path(folder) / "transformers" for folder in self._search_path)
        transformers = next((folder for folder in folders if (folder / "__init__.py").is_file()), None)
        return read_checkpoints(self._root / str(cache).lstrip("/"), transformers)

    def _read(self, part: str, source: Callable[[], ResultT], otherwise: OtherT) -> ResultT | OtherT:
        """Read one source; one that fails or does not end in time becomes a gap, so that the others still count."""
        started = time.perf_counter()
        self.waiting_for = part
        try:
            return in_time(source, SOURCE_DEADLINE_S)
        except Exception as error:  # noqa: BLE001 - border: reading one source
            self._note_gap(part, error)
            return otherwise
        finally:
            self.waiting_for = ""
            self._seconds[part] = round(time.perf_counter() - started, 4)

    def _note_gap(self, part: str, error: Exception) -> None:
        self._gaps.append(Gap(path=part, reason=f"{type(error).__name__}: {error}"[:300]))


def collect(
    *,
    with_torch: bool = True,
    environment: Mapping[str, str] | None = None,
    root: Path = Path("/"),
    deadline_s: float = 5.0,
    torch_deadline_s: float = 20.0,
    fresh_torch: bool = False,
    cache_folder: Path | None = None,
    meanwhile: Callable[[bool], None] | None = None,
) -> Machine:
    """Examine this computer and wait for everything; the arguments are those of :class:`Collection`."""
    with Collection(
        with_torch=with_torch,
        environment=environment,
        root=root,
        deadline_s=deadline_s,
        torch_deadline_s=torch_deadline_s,
        fresh_torch=fresh_torch,
        cache_folder=cache_folder,
        meanwhile=meanwhile,
    ) as collection:
        return collection.complete()


def describe(gpus: Sequence[Gpu], devices: Sequence[PciDevice]) -> str:
    """``2 x NVIDIA H200``, or what the PCI bus shows where the driver shows nothing."""
    if gpus:
        return " + ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in gpus).items())
    if devices:
        return f"{len(devices)} NVIDIA {'GPU' if len(devices) == 1 else 'GPUs'} on the PCI bus, none answering"
    return "no NVIDIA GPU"


def _with_numa_node(gpu: Gpu, devices: Sequence[PciDevice]) -> Gpu:
    """NVML's NUMA node is that of a GPU's own memory (Grace); the node of the host that it hangs on is the PCI device's."""
    node = next((device.numa_node for device in devices if device.bus_id == gpu.bus_id), None)
    return gpu if node is None else msgspec.structs.replace(gpu, numa_node=node)
