from __future__ import annotations

import importlib.util
import platform
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import Any

import pytest

from vlm_doctor.machine import Libraries, VersionRule
from vlm_doctor.sources.libraries import read_libraries
from vlm_doctor.sources.torch_build import find_torch, statements

VERSION_FILE = """\
from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']
__version__ = '{version}'
debug = False
cuda: Optional[str] = {cuda!r}
hip: Optional[str] = None
xpu: Optional[str]
"""
CUDA_FILE = """\
import os

PYTORCH_RELEASES_CODE_CC: dict[str, dict[str, set[int]]] = {
    "12.6": {"x86_64": {50, 60}, "aarch64": {80}},
    "13.0": {
        "x86_64": {75, 120, 80},
        "aarch64": {80, 110},
    },
}


def get_arch_list():
    raise RuntimeError("never run")
"""
OLD_CUDA_FILE = 'PYTORCH_RELEASES_CODE_CC: dict[str, set[int]] = {"13.0": {75, 80, 110, 120}}\n'


def install(site: Path, name: str, version: str, *, requires: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {requirement}" for requirement in requires)]
    (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n\nA description.\n")
    (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (site / file).parent.mkdir(exist_ok=True)
        (site / file).touch()


def add_torch(
    site: Path, version: str = "2.13.0+cu130", cuda: str | None = "13.0", *, registered: str | None = "2.13.0"
) -> Path:
    package = site / "torch"
    (package / "lib").mkdir(parents=True)
    (package / "cuda").mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('never imported')\n")
    (package / "version.py").write_text(VERSION_FILE.format(version=version, cuda=cuda))
    (package / "cuda/__init__.py").write_text(CUDA_FILE)
    if registered is not None:
        install(site, "torch", registered)
    return package


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def no_real_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for torch on the path given only, not among the hooks of the environment that runs the tests."""

    def nothing(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", nothing)


def read(*folders: Path, home: str = "") -> Libraries:
    return read_libraries([str(folder) for folder in folders], home=home)


def rules(libraries: Libraries, requirer: str) -> dict[str, bool]:
    return {rule.requirement: rule.is_optional for rule in libraries.rules if rule.requirer == requirer}


def test_empty_environment(site: Path) -> None:
    libraries = read(site)
    assert libraries == Libraries(
        python=sys.version.split()[0],
        executable=sys.executable,
        is_virtual_environment=sys.prefix != sys.base_prefix,
        has_pip=False,
        is_externally_managed=False,
    )


def test_packages_are_read_from_the_first_folder_that_has_them(site: Path, tmp_path: Path) -> None:
    install(site, "Accelerate", "1.15.0")
    install(site, "left-pad", "1.0")
    install(tmp_path / "user", "accelerate", "0.1")
    install(tmp_path / "user", "Flash_Attn", "2.8.3")
    libraries = read(site, tmp_path / "user", home=str(tmp_path))
    assert [(package.name, package.version, package.location) for package in libraries.packages] == [
        ("accelerate", "1.15.0", "~/site-packages"),
        ("flash-attn", "2.8.3", "~/user"),
    ]
    assert libraries.version("left-pad") is None


@pytest.mark.parametrize("text", ["", "Name: accelerate\n", "\x00\x00"])
def test_damaged_metadata_is_not_an_installed_package(site: Path, text: str) -> None:
    (site / "accelerate-1.15.0.dist-info").mkdir()
    (site / "accelerate-1.15.0.dist-info/METADATA").write_text(text)
    (site / "safetensors-0.8.0.dist-info").mkdir()
    install(site, "numpy", "2.4.6")
    assert [package.name for package in read(site).packages] == ["numpy"]


def test_requirements_of_an_old_installation_count(site: Path) -> None:
    folder = site / "accelerate-0.20.0.egg-info"
    folder.mkdir()
    (folder / "PKG-INFO").write_text("Metadata-Version: 1.2\nName: accelerate\nVersion: 0.20.0\n\nVersion: 9\n")
    (folder / "requires.txt").write_text("torch>=1.6\n")
    libraries = read(site)
    assert libraries.version("accelerate") == "0.20.0"
    assert [rule.requirement for rule in libraries.rules] == ["torch>=1.6"]


def test_metadata_on_a_failing_disk_is_no_error(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "accelerate", "1.15.0", requires=("torch>=2",))
    install(site, "pynvml", "11.5.0")

    def fails(*_: object) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Distribution, "files", property(fails))
    libraries = read(site)
    assert [package.name for package in libraries.packages] == ["accelerate", "pynvml"]
    assert (len(libraries.rules), libraries.pynvml_owners) == (1, ())
    monkeypatch.setattr(PathDistribution, "read_text", fails)
    assert read(site).packages == ()


def test_cuda_build_is_read_from_its_files(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    (add_torch(site) / "lib/libtorch_cuda.so").touch()
    libraries = read(site)
    assert libraries.torch_problem is None
    build = libraries.torch_build
    assert build is not None
    assert (build.version, build.cuda, build.hip, build.has_cuda_library) == ("2.13.0+cu130", "13.0", None, True)
    assert build.archs == ("sm_75", "sm_80", "sm_120")


def test_cpu_build_has_no_cuda(site: Path) -> None:
    add_torch(site, "2.13.0+cpu", None, registered="2.13.0+cpu")
    build = read(site).torch_build
    assert build is not None
    assert (build.cuda, build.archs, build.has_cuda_library) == (None, (), False)


def test_architectures_are_those_of_this_machine(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    add_torch(site)
    build = read(site).torch_build
    assert build is not None
    assert build.archs == ("sm_80", "sm_110")


@pytest.mark.parametrize(("machine", "archs"), [("x86_64", ("sm_75", "sm_80", "sm_120")), ("aarch64", ())])
def test_table_of_older_releases(site: Path, monkeypatch: pytest.MonkeyPatch, machine: str, archs: tuple[str, ...]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    (add_torch(site) / "cuda/__init__.py").write_text(OLD_CUDA_FILE)
    build = read(site).torch_build
    assert build is not None
    assert build.archs == archs


@pytest.mark.parametrize(
    ("version", "cuda", "table"),
    [
        ("2.11.0a0+eb65b36914.nv26.2", "13.0", CUDA_FILE),
        ("2.13.0", "99.9", CUDA_FILE),
        ("2.6.0+cu124", "12.4", "x = 1\n"),
        ("2.13.0", "13.0", "PYTORCH_RELEASES_CODE_CC = {\n    broken(\n}\n"),
        ("2.13.0", "13.0", 'PYTORCH_RELEASES_CODE_CC = {"13.0": {"x86_64": "75", "aarch64": "75"}}\n'),
        ("2.13.0", "13.0", "PYTORCH_RELEASES_CODE_CC = compute()\n"),
    ],
)
def test_architectures_are_unknown_where_the_table_does_not_tell(site: Path, version: str, cuda: str, table: str) -> None:
    (add_torch(site, version, cuda, registered=version) / "cuda/__init__.py").write_text(table)
    build = read(site).torch_build
    assert build is not None
    assert (build.cuda, build.archs) == (cuda, ())


def test_architectures_are_unknown_without_the_file(site: Path) -> None:
    (add_torch(site) / "cuda/__init__.py").unlink()
    build = read(site).torch_build
    assert build is not None
    assert build.archs == ()


def test_metadata_without_package(site: Path) -> None:
    install(site, "torch", "2.13.0")
    assert read(site).torch_problem == "torch 2.13.0 is registered, but its package folder is gone"


def test_torso_of_a_failed_uninstall(site: Path) -> None:
    (site / "torch/lib").mkdir(parents=True)
    libraries = read(site)
    assert libraries.torch_build is None
    assert libraries.torch_problem == f"{site}/torch is a torso: it has no __init__.py"


def test_missing_version_file(site: Path) -> None:
    (add_torch(site) / "version.py").unlink()
    assert read(site).torch_problem == f"{site}/torch/version.py is missing"


@pytest.mark.parametrize("data", [b"__version__ = '2.13", b"\xff\xfe\x00", b"\x00", b"(" * 3000])
def test_corrupt_version_file(site: Path, data: bytes) -> None:
    (add_torch(site) / "version.py").write_bytes(data)
    libraries = read(site)
    assert libraries.torch_build is None
    assert libraries.torch_problem is not None
    assert libraries.torch_problem.startswith(f"{site}/torch/version.py cannot be read (")


@pytest.mark.parametrize("text", ["", "__version__ = 2.13\n", "__version__ = read()\n", "version.x = '1'\n"])
def test_version_file_without_a_version(site: Path, text: str) -> None:
    (add_torch(site) / "version.py").write_text(text)
    assert read(site).torch_problem == f"{site}/torch/version.py does not tell the version"


def test_two_installs_on_top_of_each_other(site: Path) -> None:
    add_torch(site, registered="2.11.0")
    assert read(site).torch_problem == (
        f"torch 2.11.0 is registered, but the files in {site}/torch are those of 2.13.0+cu130"
    )


def test_package_that_is_not_registered(site: Path) -> None:
    add_torch(site, registered=None)
    assert read(site).torch_problem == (
        f"{site}/torch holds torch 2.13.0+cu130, but no installed package is registered for it"
    )


def test_single_file_named_torch_is_no_torch_package(site: Path) -> None:
    (site / "torch.py").write_text("x = 1\n")
    assert read(site).torch_problem == f"{site}/torch.py is a file where the package torch should be"


def test_development_install_is_found_by_its_hook(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = add_torch(site)
    spec = ModuleSpec("torch", None, origin=str(package / "__init__.py"), is_package=True)
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(package))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert find_torch([]) == package


@pytest.mark.parametrize("error", [ValueError("torch.__spec__ is None"), ImportError("hook")])
def test_hooks_that_fail_find_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", broken)
    assert find_torch([]) is None


def test_rules_of_the_metadata(site: Path) -> None:
    install(
        site,
        "accelerate",
        "1.15.0",
        requires=(
            "numpy>=1.17",
            "psutil",
            "torch>=2.0.0",
            "huggingface_hub (>=0.21.0)",
            "left-pad>=1",
            'safetensors>=0.4.3; sys_platform == "never"',
            'tokenizers>=0.1; python_version >= "3.8"',
            'timm>=1.0; extra == "vision"',
            'peft>=9; extra == "test-dev"',
            'transformers>=99; extra == "quality"',
            'triton>=2; python_version >= "3.8" and extra == "vision"',
            'xformers>=2; sys_platform == "never" and extra == "vision"',
            "pillow>=1; not a marker",
            ";",
        ),
    )
    assert rules(read(site), "accelerate") == {
        "numpy>=1.17": False,
        "torch>=2.0.0": False,
        "huggingface_hub>=0.21.0": False,
        "tokenizers>=0.1": False,
        "timm>=1.0": True,
        "triton>=2": True,
    }


def test_rules_that_transformers_5_checks_while_it_runs(site: Path) -> None:
    install(site, "transformers", "5.23.0", requires=("safetensors>=0.8.0", 'torch>=2.6; extra == "torch"'))
    (site / "transformers/utils").mkdir(parents=True)
    (site / "transformers/dependency_versions_table.py").write_text(
        'deps = {\n    "Pillow": "Pillow>=10.0.1,<=15.0",\n    "av": "av",\n    "pytest": "pytest<9",\n'
        '    "python": "python>=3.11",\n    "safetensors": "safetensors>=0.8.0",\n    "peft": "peft>=0.20.0",\n}\n'
    )
    (site / "transformers/utils/import_utils.py").write_text(
        'ACCELERATE_MIN_VERSION = "1.1.0"\nBITSANDBYTES_MIN_VERSION = "0.46.1"\nFSDP_MIN_VERSION = "1.12.0"\n\n\n'
        "@lru_cache\ndef is_torch_available() -> bool:\n"
        '    return is_available and version.parse(torch_version) >= version.parse("2.7.0")\n\n\n'
        'def is_other():\n    return version.parse("9") >= version.parse("9")\n'
    )
    libraries = read(site)
    assert rules(libraries, "transformers") == {
        "safetensors>=0.8.0": False,
        "torch>=2.6": True,
        "Pillow>=10.0.1,<=15.0": True,
        "peft>=0.20.0": True,
        "accelerate>=1.1.0": True,
        "bitsandbytes>=0.46.1": True,
        "torch>=2.7.0": True,
    }
    assert {rule.source for rule in libraries.rules} == {
        "Requires-Dist of transformers",
        "transformers/dependency_versions_table.py",
        "transformers/utils/import_utils.py",
    }


def test_torch_minimum_of_transformers_4(site: Path) -> None:
    install(site, "transformers", "4.57.6")
    (site / "transformers/utils").mkdir(parents=True)
    (site / "transformers/utils/import_utils.py").write_text(
        'if x:\n    _torch_available = version.parse(_torch_version) >= version.parse("2.1.0")\n\n'
        "def is_torch_available():\n    return _torch_available\n"
    )
    assert rules(read(site), "transformers") == {"torch>=2.1.0": True}


@pytest.mark.parametrize("table", ["", "deps = {\n    broken(\n}\n", "deps = {**other}\n", "\x00", "deps = {1: 2}\n"])
def test_damaged_sources_of_transformers_give_no_rules(site: Path, table: str) -> None:
    install(site, "transformers", "5.23.0")
    (site / "transformers/utils").mkdir(parents=True)
    (site / "transformers/dependency_versions_table.py").write_text(table)
    (site / "transformers/utils/import_utils.py").write_bytes(b"\xff\xfe")
    assert rules(read(site), "transformers") == {}


def test_same_rule_is_listed_once(site: Path) -> None:
    requires = (
        'torch>=2.6; extra == "torch"',
        'torch >=2.6.0; extra == "all-models"',
        "pillow!=8.3.*,>=5",
        "Pillow>=5,!=8.3.*",
    )
    install(site, "torchvision", "0.26.0", requires=requires)
    assert read(site).rules == (
        VersionRule(
            requirer="torchvision", requirement="torch>=2.6", source="Requires-Dist of torchvision", is_optional=True
        ),
        VersionRule(requirer="torchvision", requirement="pillow!=8.3.*,>=5", source="Requires-Dist of torchvision"),
    )


def test_owners_of_the_module_pynvml(site: Path) -> None:
    install(site, "nvidia-ml-py", "13.615.71", files=("pynvml.py", "example.py"))
    assert read(site).pynvml_owners == ("nvidia-ml-py",)
    install(site, "pynvml", "11.5.0", files=("pynvml/__init__.py", "pynvml/nvml.py"))
    assert read(site).pynvml_owners == ("nvidia-ml-py", "pynvml")


def test_newer_pynvml_that_ships_no_module_is_no_owner(site: Path) -> None:
    install(site, "pynvml", "13.0.1", files=("_pynvml_redirector.py", "_pynvml_redirector.pth", "pynvml_utils/__init__.py"))
    assert read(site).pynvml_owners == ()


def test_statements_are_cut_at_the_next_top_level_line() -> None:
    text = "a = 1\nb = {\n    2: 3,\n\n}\nc = [\n]\n"
    assert list(statements(text, "b =", "c")) == ["b = {\n    2: 3,\n\n}", "c = [\n]"]


@pytest.mark.models
def test_installed_libraries_are_read() -> None:
    libraries = read_libraries(sys.path)
    assert libraries.torch_build is not None
    assert libraries.torch_problem is None
    import torch

    assert libraries.torch_build.version == torch.__version__
    assert libraries.torch_build.cuda == torch.version.cuda
    required = {rule.requirement.partition(">")[0] for rule in libraries.rules if rule.requirer == "transformers"}
    assert {"accelerate", "torch", "safetensors"} <= required


def test_a_python_with_pip(site: Path) -> None:
    install(site, "pip", "25.3")

    assert read(site).has_pip is True


@pytest.mark.parametrize("is_virtual", [True, False])
def test_a_python_that_the_operating_system_keeps(
    is_virtual: bool, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "EXTERNALLY-MANAGED").write_text("[externally-managed]\n")
    monkeypatch.setattr("vlm_doctor.sources.libraries.os.__file__", str(tmp_path / "os.py"))
    monkeypatch.setattr(sys, "base_prefix", sys.prefix + "/base" if is_virtual else sys.prefix)

    assert read(site).is_externally_managed is not is_virtual
