from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from vlm_doctor.machine import Libraries, Package, TorchView, VersionRule

from .asking import Ask, Load, Said, commands


@pytest.fixture
def libraries(load: Load) -> Libraries:
    found = load("2xl4-idle").libraries
    assert found is not None
    return found


def test_torch_missing(ask: Ask, said: Said) -> None:
    outcome = ask("VLM301", "torch-missing")

    assert said(outcome) == [("error", "torch is not installed for Python 3.12.3, and this machine has 2 GPUs.")]
    assert commands(outcome) == (
        "python -m pip install torch torchvision --index-url https://download.pytorch.org/whl/cu130",
    )
    assert ask("VLM301", "2xl4-idle").state == "passed"
    assert ask("VLM301", "ci-container").reason == "no GPU"
    assert ask("VLM301", "torch-half-installed").state == "passed"


def test_torchvision_comes_along_with_a_first_torch(ask: Ask, load: Load) -> None:
    libraries = load("torch-missing").libraries
    assert libraries is not None
    bare = replace(libraries, packages=tuple(one for one in libraries.packages if one.name != "torchvision"))

    assert commands(ask("VLM301", "torch-missing", libraries=bare)) == commands(ask("VLM301", "torch-missing"))


def test_torch_missing_beside_one_gpu(ask: Ask, load: Load) -> None:
    assert ask("VLM301", "wsl2", libraries=load("torch-missing").libraries).findings[0].message == (
        "torch is not installed for Python 3.12.3, and this machine has 1 GPU."
    )


def test_torch_half_installed(ask: Ask, said: Said) -> None:
    outcome = ask("VLM302", "torch-half-installed")

    assert said(outcome) == [("error", "torch is half installed: metadata of torch 2.13.0 without the package.")]
    assert commands(outcome)[0] == "python -m pip uninstall -y torch"
    assert ask("VLM302", "2xl4-idle").state == "passed"
    assert ask("VLM302", "2xl4-idle", libraries=None).reason == "libraries is not known"


def test_a_torch_that_works_unregistered_is_a_warning(ask: Ask, load: Load) -> None:
    libraries = load("2xl4-idle").libraries
    assert libraries is not None
    problem = "/src/torch holds torch 2.13.0, but no installed package is registered for it"
    unregistered = replace(libraries, torch_problem=problem)

    assert ask("VLM302", "2xl4-idle", libraries=unregistered).findings[0].severity == "warning"
    untried = TorchView(state="not_asked")
    assert ask("VLM302", "2xl4-idle", libraries=unregistered, torch=untried).findings[0].severity == "error"
    # A CPU build that lies before the real one: seen on a machine with two H200s, where the run counted as usable.
    without_cuda = TorchView(state="ok", version="2.13.0+cpu", cuda=None)
    assert ask("VLM302", "2xl4-idle", libraries=unregistered, torch=without_cuda).findings[0].severity == "error"


def test_loaders_missing(ask: Ask, said: Said) -> None:
    outcome = ask("VLM308", "transformers-missing")

    assert said(outcome) == [("warning", "transformers and accelerate are not installed.")]
    assert commands(outcome) == ("python -m pip install transformers accelerate",)
    assert ask("VLM308", "2xl4-idle").state == "passed"
    assert ask("VLM308", "torch-missing").reason == "explained by VLM301"


def test_one_loader_missing(ask: Ask, said: Said, libraries: Libraries) -> None:
    packages = tuple(package for package in libraries.packages if package.name != "accelerate")

    assert said(ask("VLM308", "2xl4-idle", libraries=replace(libraries, packages=packages))) == [
        ("warning", "accelerate is not installed.")
    ]


def test_rule_not_met(ask: Ask, said: Said) -> None:
    outcome = ask("VLM309", "old-accelerate")

    assert said(outcome) == [
        ("error", "accelerate 1.0.1 does not suit transformers 5.23.0, which asks for accelerate>=1.1.0.")
    ]
    assert outcome.findings[0].cause == "transformers then says that accelerate is not installed."
    assert outcome.findings[0].evidence == {
        "libraries.rules[0].requirement": "accelerate>=1.1.0",
        "libraries.rules[0].source": "transformers/utils/import_utils.py",
    }
    assert commands(outcome) == ("python -m pip install 'accelerate>=1.1.0'",)
    assert ask("VLM309", "2xl4-idle").state == "passed"
    assert ask("VLM309", "transformers-missing").reason == "no library declares rules"


def rules(libraries: Libraries, *requirements: str, optional: bool = False, **versions: str) -> dict[str, Any]:
    packages = tuple(Package(name=name, version=version) for name, version in versions.items())
    declared = tuple(
        VersionRule(requirer="transformers", requirement=text, source="here", is_optional=optional) for text in requirements
    )
    return {"libraries": replace(libraries, rules=declared, packages=libraries.packages + packages)}


def test_an_optional_package_in_a_wrong_version_is_a_warning(ask: Ask, said: Said, libraries: Libraries) -> None:
    outcome = ask("VLM309", "2xl4-idle", **rules(libraries, "timm>=1.0.23", optional=True, timm="0.9"))

    assert said(outcome) == [("warning", "timm 0.9 does not suit transformers 5.23.0, which asks for timm>=1.0.23.")]
    assert outcome.findings[0].cause is None


def test_what_transformers_calls_optional_is_not_to_a_model_on_gpus(ask: Ask, said: Said, libraries: Libraries) -> None:
    old = rules(libraries, "accelerate>=99", "torch>=99", "timm>=99", optional=True, timm="0.9")

    assert [severity for severity, _ in said(ask("VLM309", "2xl4-idle", **old))] == ["error", "error", "warning"]
    assert [severity for severity, _ in said(ask("VLM309", "laptop-no-gpu", **old))] == ["warning"] * 3


@pytest.mark.parametrize(
    "requirement",
    [
        "absent>=1",
        "torch>=2.6",
        "torch==2.13.0",
        "Torch>=2.6",
        'accelerate>=99; python_version < "3.10"',
        'accelerate>=99; extra == "cpu"',
        "python>=3.10",
    ],
)
def test_what_is_absent_does_not_apply_or_suits_is_silent(requirement: str, ask: Ask, libraries: Libraries) -> None:
    assert ask("VLM309", "2xl4-idle", **rules(libraries, requirement)).state == "passed"


def test_a_marker_that_applies(ask: Ask, libraries: Libraries) -> None:
    changes = rules(libraries, 'accelerate>=99; python_version >= "3.12"')

    assert ask("VLM309", "2xl4-idle", **changes).state == "found"


def test_a_python_that_is_too_old(ask: Ask, said: Said, libraries: Libraries) -> None:
    outcome = ask("VLM309", "2xl4-idle", **rules(replace(libraries, python="3.10.14"), "python>=3.11"))

    assert said(outcome) == [("error", "python 3.10.14 does not suit transformers 5.23.0, which asks for python>=3.11.")]
    fix = outcome.findings[0].fix
    assert fix is not None
    assert (fix.text, fix.commands) == ("Use a Python that suits (>=3.11), or an older transformers.", ())


def test_pre_releases_count_as_what_they_are(ask: Ask, libraries: Libraries) -> None:
    assert ask("VLM309", "2xl4-idle", **rules(libraries, "timm>=1.0", timm="1.1.dev0")).state == "passed"


def test_the_same_rule_twice_gives_one_finding(ask: Ask, libraries: Libraries) -> None:
    changes = rules(libraries, "timm>=1.0", "timm>=1.0.23", timm="0.9")

    assert len(ask("VLM309", "2xl4-idle", **changes).findings) == 1


@pytest.mark.parametrize(
    ("requirement", "version"), [("timm >>> 1", "1.0"), ("timm>=1", "not a version"), ("\0" * 1_000_000, "1.0")]
)
def test_a_rule_that_cannot_be_read_is_unknown_and_the_others_count(
    requirement: str, version: str, ask: Ask, libraries: Libraries
) -> None:
    unread = ask("VLM309", "2xl4-idle", **rules(libraries, requirement, timm=version))
    both = ask("VLM309", "2xl4-idle", **rules(libraries, requirement, "accelerate>=99", timm=version))

    assert unread.state == "unknown"
    assert (unread.reason or "").startswith("rule not readable: ")
    assert both.state == "found"


def test_pynvml_shadowed(ask: Ask, said: Said) -> None:
    outcome = ask("VLM310", "pynvml-shadowed")

    assert said(outcome) == [("error", "The module pynvml belongs to pynvml as well as to nvidia-ml-py.")]
    assert commands(outcome) == (
        "python -m pip uninstall -y pynvml",
        "python -m pip install --force-reinstall nvidia-ml-py",
    )
    assert ask("VLM310", "2xl4-idle").state == "passed"


def test_a_foreign_pynvml_while_nvml_works_is_a_warning(ask: Ask, said: Said, libraries: Libraries) -> None:
    changed = replace(libraries, pynvml_owners=("pynvml",))

    assert said(ask("VLM310", "2xl4-idle", libraries=changed)) == [("warning", "The module pynvml belongs to pynvml.")]


def test_a_torch_that_is_too_old_is_replaced_by_one_that_runs_here(ask: Ask, load: Load) -> None:
    libraries = load("2xl4-idle").libraries
    assert libraries is not None
    rule = VersionRule(requirer="transformers", requirement="torch>=3", source="Requires-Dist of transformers")

    assert commands(ask("VLM309", "2xl4-idle", libraries=replace(libraries, rules=(rule,)))) == (
        "python -m pip install --force-reinstall 'torch>=3' torchvision --index-url https://download.pytorch.org/whl/cu130",
    )
