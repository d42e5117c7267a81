"""Which attention kernel a GPU has, by what torch's own choice rests on."""

from __future__ import annotations

import msgspec
import pytest

from vlm_doctor.machine import Gpu, Libraries, Package
from vlm_doctor.planner.kernels import cudnn_width
from vlm_doctor.sources import load_machine


def _gpu(capability: tuple[int, int] | None) -> Gpu:
    return msgspec.structs.replace(load_machine("24GiB").gpus[0], compute_capability=capability)


def _libraries(**versions: str) -> Libraries:
    packages = tuple(Package(name=name.replace("_", "-"), version=version) for name, version in versions.items())
    return Libraries(python="3.12.3", executable="/usr/bin/python3", packages=packages)


@pytest.mark.parametrize(
    ("capability", "width"),
    [((9, 0), 256), ((10, 0), 128), ((10, 3), 128), ((12, 0), 0), ((8, 9), 0), ((8, 0), 0), (None, 0)],
)
def test_by_generation(capability: tuple[int, int] | None, width: int) -> None:
    assert cudnn_width(_gpu(capability)) == width


@pytest.mark.parametrize(
    ("libraries", "width"),
    [
        ({"nvidia_cudnn_cu13": "9.19.0.56"}, 256),
        ({"nvidia_cudnn_cu12": "9.10.2.21"}, 0),
        ({"nvidia_cudnn_cu12": "9.15.1.9"}, 256),
        ({"nvidia_cudnn_cu12": "built here"}, 256),
        ({"torch": "2.11.0"}, 256),
    ],
)
def test_by_release_of_cudnn(libraries: dict[str, str], width: int) -> None:
    assert cudnn_width(_gpu((9, 0)), _libraries(**libraries)) == width
