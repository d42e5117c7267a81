from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.machine import Driver, Gap, PciDevice, TorchView

from .asking import Ask, Load, Said, commands


def test_no_gpu(ask: Ask, said: Said) -> None:
    outcome = ask("VLM101", "laptop-no-gpu")

    assert said(outcome) == [("info", "No NVIDIA GPU: the PCI bus shows none, and no driver is loaded.")]


def test_no_gpu_in_wsl_says_where_it_comes_from(ask: Ask, load: Load) -> None:
    host = load("wsl2").host

    outcome = ask("VLM101", "laptop-no-gpu", host=host)

    assert outcome.findings[0].message == (
        "No NVIDIA GPU: the PCI bus shows none, and no driver is loaded (in WSL2 the GPU comes from the driver of Windows)."
    )


def test_no_gpu_without_any_fact_about_the_host(ask: Ask) -> None:
    assert ask("VLM101", "laptop-no-gpu", host=None).state == "found"


def test_no_gpu_is_silent_with_one_and_unknown_when_the_bus_cannot_be_read(ask: Ask) -> None:
    gaps = (Gap(path="pci_devices", reason="PermissionError"),)

    assert ask("VLM101", "2xl4-idle").state == "passed"
    assert ask("VLM101", "wsl2").state == "passed"
    assert ask("VLM101", "laptop-no-gpu", gaps=gaps).reason == "pci_devices: PermissionError"


def test_driver_not_loaded(ask: Ask, said: Said) -> None:
    outcome = ask("VLM102", "driver-missing")

    assert said(outcome) == [
        (
            "error",
            "2 NVIDIA GPUs are on the PCI bus (0000:01:00.0, 0000:02:00.0), but the NVIDIA driver is not loaded.",
        )
    ]
    assert outcome.findings[0].evidence == {
        "pci_devices[0].bus_id": "0000:01:00.0",
        "pci_devices[0].kernel_driver": "unknown",
        "driver.kernel_module_version": "unknown",
    }
    assert commands(outcome) == ("sudo modprobe nvidia", "nvidia-smi")
    assert ask("VLM102", "2xl4-idle").state == "passed"
    assert ask("VLM102", "nouveau").reason == "explained by VLM103"


def test_one_gpu_without_driver(ask: Ask, load: Load) -> None:
    one = load("driver-missing").pci_devices[:1]

    assert ask("VLM102", "driver-missing", pci_devices=one).findings[0].message == (
        "1 NVIDIA GPU is on the PCI bus (0000:01:00.0), but the NVIDIA driver is not loaded."
    )


def test_nouveau(ask: Ask, said: Said) -> None:
    outcome = ask("VLM103", "nouveau")

    assert said(outcome) == [("error", "0000:01:00.0 belongs to the kernel driver nouveau, not to nvidia.")]
    assert commands(outcome) == (
        "printf 'blacklist nouveau\\noptions nouveau modeset=0\\n' | sudo tee /etc/modprobe.d/blacklist-nouveau.conf",
        "sudo update-initramfs -u",
        "sudo reboot",
    )
    assert ask("VLM103", "2xl4-idle").state == "passed"


def test_another_driver_beside_working_gpus_is_a_warning(ask: Ask, load: Load) -> None:
    devices = (*load("2xl4-idle").pci_devices, PciDevice(bus_id="0000:09:00.0", device_id="1", kernel_driver="nouveau"))

    assert [f.severity for f in ask("VLM103", "2xl4-idle", pci_devices=devices).findings] == ["warning"]


def test_a_gpu_set_aside_is_only_mentioned_while_others_work(ask: Ask, said: Said) -> None:
    outcome = ask("VLM103", "one-gpu-passed-through")

    assert said(outcome) == [("info", "0000:09:00.0 belongs to the kernel driver vfio-pci, not to nvidia.")]
    assert commands(outcome) == (
        "echo 0000:09:00.0 | sudo tee /sys/bus/pci/drivers/vfio-pci/unbind",
        "echo nvidia | sudo tee /sys/bus/pci/devices/0000:09:00.0/driver_override",
        "echo 0000:09:00.0 | sudo tee /sys/bus/pci/drivers_probe",
    )


def test_the_only_gpu_set_aside_is_an_error(ask: Ask) -> None:
    device = PciDevice(bus_id="0000:01:00.0", device_id="1", kernel_driver="vfio-pci")

    assert ask("VLM103", "nouveau", pci_devices=(device,)).findings[0].severity == "error"


def test_no_command_is_made_of_an_address_that_is_none(ask: Ask) -> None:
    device = PciDevice(bus_id="0; rm -rf ~", device_id="1", kernel_driver="vfio-pci")

    assert commands(ask("VLM103", "nouveau", pci_devices=(device,))) == ()


def test_driver_mismatch(ask: Ask, said: Said) -> None:
    outcome = ask("VLM104", "driver-mismatch")

    assert said(outcome) == [
        (
            "error",
            "NVML refuses to work: the loaded kernel module is 570.86.15, the installed library is of another version.",
        )
    ]
    assert commands(outcome) == ("sudo reboot",)
    assert ask("VLM104", "2xl4-idle").state == "passed"


def test_driver_mismatch_in_a_container_asks_for_a_new_container(ask: Ask, load: Load) -> None:
    host = load("container-no-injection").host

    fix = ask("VLM104", "driver-mismatch", host=host).findings[0].fix

    assert fix is not None
    assert fix.text == "Create the container anew; if that does not help, have the host rebooted (IMAGE stands for yours)."
    assert (fix.commands, fix.place) == (("docker run --gpus all IMAGE",), "host")


def nvml(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"kernel_module_version": "580.95.05", "device_files": ("/dev/nvidia0", "/dev/nvidiactl")}
    return {"driver": Driver(**(fields | changes))}


@pytest.mark.parametrize(
    ("changes", "message", "commands_"),
    [
        (
            {"nvml_state": "no_binding"},
            "The Python binding of NVML (nvidia-ml-py) cannot be used.",
            ("python -m pip install --force-reinstall nvidia-ml-py",),
        ),
        (
            {"nvml_state": "no_library"},
            "libnvidia-ml.so.1 cannot be loaded.",
            ("sudo apt install libnvidia-compute-580",),
        ),
        (
            {"nvml_state": "error", "nvml_error_code": 15, "nvml_message": "GPU is lost"},
            "NVML answers with error 15: GPU is lost.",
            ("sudo dmesg | grep -iE 'nvrm|xid'", "sudo reboot"),
        ),
        (
            {"nvml_state": "crashed", "nvml_message": "SIGSEGV"},
            "NVML crashed: SIGSEGV.",
            ("sudo dmesg | grep -iE 'nvrm|xid'", "sudo reboot"),
        ),
        (
            {"nvml_state": "timed_out"},
            "NVML did not answer in time.",
            ("sudo dmesg | grep -iE 'nvrm|xid'", "sudo reboot"),
        ),
    ],
)
def test_nvml_unusable(changes: dict[str, Any], message: str, commands_: tuple[str, ...], ask: Ask, said: Said) -> None:
    outcome = ask("VLM105", "nvml-crashed", **nvml(**changes))

    assert said(outcome) == [("error", message)]
    assert commands(outcome) == commands_


def test_nvml_fails_in_a_container(ask: Ask, load: Load) -> None:
    changes = nvml(
        nvml_state="error", nvml_error_code=999, nvml_message="Unknown Error", libcuda_path="/usr/lib/libcuda.so.1"
    )
    files = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm")
    # access(2) asks the control group, too: in such a container the files are there and may not be opened.
    changes = {"driver": replace(changes["driver"], device_files=files, forbidden_device_files=files)}
    host = load("container-no-injection").host

    finding = ask("VLM105", "nvml-crashed", host=host, **changes).findings[0]

    assert ask("VLM106", "nvml-crashed", host=host, **changes).reason == "NVML's own error says more (VLM105)"
    assert ask("VLM105", "nvml-crashed", **changes).reason == "explained by VLM106"
    assert finding.message == "NVML answers with error 999: Unknown Error."
    assert finding.cause is not None
    assert finding.cause.startswith("The host took the GPUs from this container")
    assert finding.fix is not None
    assert finding.fix.text.startswith("Restart the container (NAME stands for its name)")
    assert (finding.fix.commands, finding.fix.place) == (("docker restart NAME", "nvidia-smi"), "host")


def test_missing_library_of_a_driver_without_version(ask: Ask) -> None:
    changes = nvml(nvml_state="no_library", kernel_module_version="nightly")

    assert commands(ask("VLM105", "nvml-crashed", **changes)) == ("ldconfig -p | grep libnvidia-ml",)


def test_nvml_unusable_is_a_warning_where_torch_works(ask: Ask) -> None:
    torch = TorchView(state="ok", is_available=True, device_count=2)

    assert ask("VLM105", "nvml-crashed", torch=torch).findings[0].severity == "warning"


def test_nvml_that_failed_half_way_is_a_warning_and_hides_nothing(ask: Ask, load: Load) -> None:
    driver = replace(load("2xl4-idle").driver, nvml_state="crashed", nvml_message="SIGSEGV")

    assert ask("VLM105", "2xl4-idle", driver=driver).findings[0].severity == "warning"
    assert ask("VLM109", "2xl4-idle", driver=driver).state == "passed"
    assert ask("VLM107", "2xl4-idle", driver=driver).reason == "explained by VLM105"


def test_nvml_is_not_missed_without_hardware(ask: Ask) -> None:
    assert ask("VLM105", "laptop-no-gpu").state == "passed"
    assert ask("VLM105", "2xl4-idle").state == "passed"
    assert ask("VLM105", "pynvml-shadowed").reason == "explained by VLM310"


def test_device_files_forbidden(ask: Ask, said: Said) -> None:
    outcome = ask("VLM106", "device-files-forbidden")

    assert said(outcome) == [("error", "This user may not open /dev/nvidia0, /dev/nvidiactl.")]
    assert commands(outcome) == ("id -un; ls -l /dev/nvidia*", "sudo usermod -aG GROUP USER")
    assert ask("VLM106", "2xl4-idle").state == "passed"
    assert ask("VLM106", "laptop-no-gpu").reason == "the NVIDIA driver is not loaded"


def test_device_files_missing(ask: Ask, said: Said) -> None:
    outcome = ask("VLM106", "nvml-crashed", **nvml(nvml_state="error", nvml_error_code=9, device_files=()))

    assert said(outcome) == [("error", "/dev/nvidiactl is missing, though the driver is loaded.")]
    assert commands(outcome) == ("sudo nvidia-modprobe -u -c=0",)


def test_uvm_is_created_on_demand_and_not_missed(ask: Ask, load: Load) -> None:
    driver = replace(load("2xl4-idle").driver, device_files=("/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl"))

    assert ask("VLM106", "2xl4-idle", driver=driver).state == "passed"
    assert ask("VLM106", "cpu-torch", driver=driver).state == "passed"
    assert ask("VLM106", "masked", driver=driver).state == "passed"


def test_uvm_is_missed_where_torch_cannot_use_the_gpus(ask: Ask, load: Load, said: Said) -> None:
    driver = replace(load("2xl4-idle").driver, device_files=("/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl"))
    torch = TorchView(state="ok", cuda="13.0", is_available=False, device_count=0)

    outcome = ask("VLM106", "2xl4-idle", driver=driver, torch=torch)

    assert said(outcome) == [("error", "/dev/nvidia-uvm is missing, though the driver is loaded.")]
    assert ask("VLM206", "2xl4-idle", driver=driver, torch=torch).reason == "explained by VLM106"


def test_files_of_gpus_that_a_scheduler_keeps_are_not_missed(ask: Ask) -> None:
    torch = TorchView(state="ok", cuda="13.0", is_available=False, device_count=0)

    assert ask("VLM106", "scheduled-job").state == "passed"
    assert ask("VLM106", "scheduled-job", torch=torch).state == "passed"


def test_files_of_capabilities_are_roots_alone_and_not_missed(ask: Ask) -> None:
    driver = nvml(nvml_state="crashed", forbidden_device_files=("/dev/nvidia-modeset",))

    assert ask("VLM106", "nvml-crashed", **driver).state == "passed"


@pytest.mark.parametrize(
    ("owner", "system", "expected"),
    [
        (
            "nova_core",
            "Ubuntu 24.04",
            ("printf 'blacklist nova_core\\n' | sudo tee /etc/modprobe.d/blacklist-nova_core.conf",),
        ),
        ("nouveau", "Fedora Linux 42", ("sudo dracut --force", "sudo reboot")),
        ("x'; rm -rf ~", "Ubuntu 24.04", ()),
    ],
)
def test_another_kernel_driver_is_blocked_by_its_own_name(
    owner: str, system: str, expected: tuple[str, ...], ask: Ask, load: Load
) -> None:
    machine = load("nouveau")
    assert machine.host is not None
    devices = tuple(replace(device, kernel_driver=owner) for device in machine.pci_devices)

    outcome = ask("VLM103", replace(machine, pci_devices=devices, host=replace(machine.host, os=system)))

    told = commands(outcome)
    assert set(expected) <= set(told)
    assert bool(told) == bool(expected)
