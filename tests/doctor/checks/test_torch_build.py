from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.checks import diagnose
from vlm_doctor.findings import Outcome
from vlm_doctor.machine import TorchBuild, TorchView

from .asking import Ask, Load, Said

INDEX = "python -m pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl"


def fixed_by(outcome: Outcome) -> tuple[str, tuple[str, ...]]:
    fix = outcome.findings[0].fix
    assert fix is not None
    return fix.text, fix.commands


def built(load: Load, **fields: Any) -> dict[str, Any]:
    """Change of the libraries: another build of torch."""
    libraries = load("2xl4-idle").libraries
    assert libraries is not None
    return {
        "libraries": replace(libraries, torch_build=TorchBuild(**({"version": "2.13.0+cu130", "cuda": "13.0"} | fields)))
    }


def test_cpu_build(ask: Ask, said: Said) -> None:
    outcome = ask("VLM303", "cpu-torch")

    assert said(outcome) == [("error", "torch 2.13.0+cpu is built for the CPU only, and this machine has 2 GPUs.")]
    assert fixed_by(outcome) == ("Reinstall torch with CUDA.", (f"{INDEX}/cu130",))
    assert ask("VLM303", "2xl4-idle").state == "passed"
    assert ask("VLM303", "laptop-no-gpu").reason == "no GPU"
    assert ask("VLM303", "torch-missing").reason == "explained by VLM301"


def test_rocm_build(ask: Ask, load: Load) -> None:
    changes = built(load, version="2.13.0+rocm7.1", cuda=None, hip="7.1")

    assert ask("VLM303", "wsl2", **changes).findings[0].message == (
        "torch 2.13.0+rocm7.1 is built for ROCm, and this machine has 1 GPU."
    )


def test_no_build_to_judge(ask: Ask, load: Load) -> None:
    libraries = load("2xl4-idle").libraries
    assert libraries is not None
    unread = replace(libraries, torch_build=None)

    for code in ("VLM303", "VLM308"):
        assert ask(code, "2xl4-idle", libraries=unread).reason == "torch is not installed"
    for code in ("VLM306", "VLM307"):
        assert ask(code, "2xl4-idle", libraries=unread).reason == "torch has no CUDA"


def test_import_error(ask: Ask, said: Said) -> None:
    outcome = ask("VLM304", "torch-import-error")

    assert said(outcome) == [
        (
            "error",
            "torch cannot be imported: ImportError: libcudnn.so.9: cannot open shared object file: No such file "
            "or directory.",
        )
    ]
    assert outcome.findings[0].cause == "A library that torch needs is not installed or not found."
    assert fixed_by(outcome) == ("Reinstall torch.", (f"{INDEX}/cu130",))
    foreign = ask("VLM304", "torch-import-error", environment={"LD_LIBRARY_PATH": "/opt/lib"})
    assert fixed_by(foreign) == (
        "Try it without LD_LIBRARY_PATH (if it works, unset that). Reinstall torch.",
        ("env -u LD_LIBRARY_PATH python -c 'import torch'", f"{INDEX}/cu130"),
    )


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("OSError: libnccl.so.2: undefined symbol: ncclCommRegister", "A library of another version"),
        ("ImportError: version `GLIBC_2.34' not found", "torch was built for a newer Linux"),
        ("ModuleNotFoundError: No module named 'typing_extensions'", "torch or something it needs"),
    ],
)
def test_known_texts_get_a_cause(message: str, cause: str, ask: Ask) -> None:
    found = ask("VLM304", "2xl4-idle", torch=TorchView(state="failed", message=message)).findings[0].cause

    assert (found or "").startswith(cause)


def test_an_unknown_text_gets_no_cause(ask: Ask) -> None:
    finding = ask("VLM304", "2xl4-idle", torch=TorchView(state="failed")).findings[0]

    assert (finding.message, finding.cause) == ("torch cannot be imported: no message.", None)


@pytest.mark.parametrize("code", ["VLM304", "VLM305"])
def test_import_is_judged_only_when_tried(code: str, ask: Ask) -> None:
    absent = TorchView(state="absent")
    unasked = TorchView(state="not_asked", message="still being asked")

    assert ask(code, "2xl4-idle").state == "passed"
    assert ask(code, "2xl4-idle", torch=absent).reason == "torch is not installed"
    assert ask(code, "2xl4-idle", torch=unasked).state == "unknown"


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        (TorchView(state="crashed", message="SIGSEGV"), "Importing torch crashes the process (SIGSEGV)."),
        (TorchView(state="crashed"), "Importing torch crashes the process (no signal known)."),
        (TorchView(state="timed_out", seconds=20.0), "Importing torch does not end within 20 s."),
        (TorchView(state="timed_out"), "Importing torch does not end."),
    ],
)
def test_import_dies(torch: TorchView, message: str, ask: Ask, said: Said) -> None:
    outcome = ask("VLM305", "2xl4-idle", torch=torch)

    assert said(outcome) == [("error", message)]
    assert fixed_by(outcome)[1] == ("timeout -s ABRT 60 python -X faulthandler -c 'import torch'", f"{INDEX}/cu130")


def test_driver_too_old(ask: Ask, said: Said) -> None:
    outcome = ask("VLM306", "old-driver")

    assert said(outcome) == [("error", "torch 2.13.0+cu130 needs CUDA 13, the driver 550.54.14 supports CUDA 12.4.")]
    assert fixed_by(outcome) == (
        "Update the driver to 580 or newer, or install a torch for its CUDA version.",
        (f"{INDEX}/cu126",),
    )


def test_a_cuda_of_the_future(ask: Ask, load: Load) -> None:
    outcome = ask("VLM306", "2xl4-idle", torch=TorchView(state="ok"), **built(load, cuda="14.0"))

    assert fixed_by(outcome)[0] == "Update the driver, or install a torch for its CUDA version."


def test_minor_versions_are_compatible(ask: Ask, load: Load) -> None:
    driver = replace(load("2xl4-idle").driver, cuda_version=(12, 0))

    assert ask("VLM306", "2xl4-idle", driver=driver, **built(load, cuda="12.9")).state == "passed"


def test_a_compatibility_package_that_works(ask: Ask, load: Load) -> None:
    assert ask("VLM306", "old-driver", torch=load("2xl4-idle").torch).state == "passed"


def test_driver_of_unknown_cuda(ask: Ask, load: Load) -> None:
    driver = replace(load("2xl4-idle").driver, cuda_version=None)

    assert ask("VLM306", "2xl4-idle", driver=driver).reason == "driver.cuda_version is not known"


def test_architecture_missing(ask: Ask, said: Said) -> None:
    outcome = ask("VLM307", "v100-missing-sm")

    assert said(outcome) == [
        ("error", "torch 2.13.0+cu130 has no code for GPUs 0, 1 (Tesla V100-SXM2-16GB): sm_70 is not in it.")
    ]
    assert outcome.findings[0].gpus == (0, 1)
    assert fixed_by(outcome) == ("Install a torch that has sm_70.", (f"{INDEX}/cu126",))


def test_a_hidden_gpu_needs_no_code(ask: Ask) -> None:
    assert ask("VLM307", "some-hidden", gpu=(0, {"compute_capability": (7, 0)})).state == "passed"


def test_architectures_unread(ask: Ask, load: Load) -> None:
    assert ask("VLM307", "2xl4-idle", **built(load)).reason == "libraries.torch_build.archs is not known"
    assert ask("VLM307", "2xl4-idle", gpu=(0, {"compute_capability": None})).state == "unknown"


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_86", (8, 6), True),
        ("sm_86", (8, 9), True),
        ("sm_89", (8, 6), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100f", (10, 3), False),
        ("sm_120", (12, 1), True),
        ("sm_80", (8, 7), False),
        ("sm_87", (8, 7), True),
        ("compute_80", (9, 0), True),
        ("compute_90", (8, 0), False),
        ("sm_", (8, 0), False),
        ("gfx90a", (9, 0), False),
    ],
)
def test_which_code_runs_where(arch: str, capability: tuple[int, int], runs: bool, ask: Ask, load: Load) -> None:
    state = ask("VLM307", "wsl2", gpu=(0, {"compute_capability": capability}), **built(load, archs=(arch,))).state

    assert state == ("passed" if runs else "found")


@pytest.mark.parametrize(
    ("cuda", "capability", "index"),
    [
        ((13, 0), (8, 9), "/cu130"),
        ((13, 1), (12, 1), "/cu130"),
        ((13, 0), (7, 0), "/cu126"),
        ((12, 9), (8, 9), "/cu129"),
        ((12, 8), (8, 9), "/cu126"),
        ((12, 8), (12, 0), "/cu129"),
        ((12, 2), (8, 9), "/cu126"),
        ((11, 8), (8, 9), None),
        ((13, 0), (3, 5), None),
        (None, (8, 9), None),
    ],
)
def test_the_wheel_suits_driver_and_gpu(
    cuda: tuple[int, int] | None, capability: tuple[int, int], index: str | None, ask: Ask, load: Load
) -> None:
    driver = replace(load("2xl4-idle").driver, cuda_version=cuda)

    command = fixed_by(ask("VLM303", "cpu-torch", driver=driver, gpu=(0, {"compute_capability": capability})))[1][0]

    assert command == (INDEX + index if index else "python -m pip install --force-reinstall torch torchvision")


def test_a_foreign_error_of_a_half_installed_torch_is_reported_too(load: Load) -> None:
    torso = load("torch-half-installed")
    boom = replace(torso, torch=TorchView(state="failed", message="ImportError: libcudart.so.12: no file"))
    hung = replace(torso, torch=TorchView(state="timed_out", seconds=5.0))

    assert [finding.code for finding in diagnose(torso).findings if finding.severity == "error"] == ["VLM302"]
    assert [finding.code for finding in diagnose(boom).findings if finding.severity == "error"] == ["VLM302", "VLM304"]
    assert [finding.code for finding in diagnose(hung).findings if finding.severity == "error"] == ["VLM302", "VLM305"]
