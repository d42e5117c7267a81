"""Under pytest-xdist the controller reports for all workers, also where only a conftest knows the machine."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

pytest.importorskip("xdist", reason="pytest-xdist is not installed")

SUITE = """
import pytest

@pytest.mark.vlm("org/a")
@pytest.mark.parametrize("n", range(4))
def test_a(vlm, n): assert vlm.name == "org/a"
@pytest.mark.vlm_requires(gpus=2)
def test_few(): pass
@pytest.mark.vlm("org/oom")
@pytest.mark.xfail
def test_oom(vlm): pass
def test_free(): pass
"""


def test_two_workers(suite: Any) -> None:
    result = suite.run("-n", "2", "--vlm-gpus=0,", "--junitxml=out.xml", test_x=SUITE)

    result.assert_outcomes(passed=5, skipped=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "vlmgpu: --vlm-gpus=0,",
            "*= vlmgpu =*",
            "2 GPUs; free: GPU 0 22.0 GiB, GPU 1 22.0 GiB",
            "4 ran; 1 skipped (VLM702 too few GPUs: 1); 1 error (VLM715 out of memory: 1)",
            "org/a: loaded in * s on GPU 0, 4.0 GiB of weights, peak 4.0 GiB predicted; 4 tests",
        ]
    )
    assert suite.loads().count("LOAD org/a") == 1
    codes = [
        item.attrib["value"]
        for item in ET.parse(suite.folder / "out.xml").iter("property")
        if "code" in item.attrib["name"]
    ]
    assert sorted(codes) == ["VLM702", "VLM715"]


def test_a_wrong_marker_is_a_collection_error(suite: Any) -> None:
    result = suite.run("-n", "2", test_x="import pytest\n@pytest.mark.vlm_requires(count=2)\ndef test_x(): pass")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*@pytest.mark.vlm_requires has no keyword 'count'; write gpus=*"])
    assert "INTERNALERROR" not in result.stdout.str()


def test_strict_reaches_the_workers(suite: Any) -> None:
    result = suite.run(
        "-n", "2", "--vlm-strict", test_x="import pytest\n@pytest.mark.vlm_requires(gpus=4)\ndef test_x(): pass"
    )

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["NO TEST RAN ON A GPU (1 gated test)."])
