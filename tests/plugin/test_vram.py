"""What a test takes of the GPUs: measured, limited, reported; what it leaves behind is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_vlmgpu.watching.meter import Meter, Peak, allocators

from .fake_cuda import Cuda, fake_torch

GIB = 2**30
PROPERTIES = """
def pytest_runtest_logreport(report):
    if report.when == "teardown":
        for name, value in report.user_properties:
            if "gib" in name or "note" in name: log(f"{report.nodeid.rpartition('::')[2]} {name}={value}")
"""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """In place of torch.cuda, for the project too (``from fake_cuda import ...`` would make another one)."""
    made = Cuda()
    monkeypatch.setitem(sys.modules, "torch", fake_torch(made))
    return made


def test_overlapping_meters_keep_what_the_other_one_resets(cuda: Cuda) -> None:
    outer, inner = Meter(), Meter()
    outer.start()
    cuda.take(5)
    cuda.free(4)
    inner.start()
    cuda.take(2)
    cuda.free(2)

    assert inner.stop() == {0: Peak(3 * GIB, 5 * GIB)}
    cuda.take(1)
    assert outer.read() == {0: Peak(5 * GIB, 5 * GIB)}
    assert outer.stop() == {0: Peak(5 * GIB, 5 * GIB)}


def test_a_meter_that_starts_again_forgets(cuda: Cuda) -> None:
    meter = Meter()
    meter.start()
    cuda.take(5)
    cuda.free(5)
    meter.start()

    assert meter.stop()[0].allocated == 0


def test_the_allocator_is_read_where_it_is_used(cuda: Cuda) -> None:
    assert allocators() == {}
    cuda.take(3, ordinal=1)

    assert allocators() == {1: (3 * GIB, 3 * GIB, 3 * GIB, int(20.5 * GIB), 24 * GIB, 3, 2**20, 1)}


BODY = """
import pytest, torch
pytestmark = pytest.mark.vlm("org/a")
@pytest.fixture
def image(vlm):
    torch.cuda.take(2)
    yield
    torch.cuda.free(2)
@pytest.mark.vlm_requires(vram_gib=20)
def test_takes(image, vlm_vram):
    torch.cuda.take(1, ordinal=1)
    torch.cuda.free(1, ordinal=1)
    assert (vlm_vram.peak_gib, vlm_vram.used_gib) == (3, 2)
    assert vlm_vram.peaks_gib() == {0: 2, 1: 1}
    vlm_vram.reset()
    assert vlm_vram.peak_gib == 2
def test_small(vlm): torch.cuda.take(0.5); torch.cuda.free(0.5)
"""


def test_peaks_are_properties_of_the_test(suite: Any, cuda: Cuda) -> None:
    suite.configure(PROPERTIES)

    result = suite.run(test_x=BODY)

    result.assert_outcomes(passed=2)
    lines = [line for line in suite.log() if "gib" in line and "need" not in line]
    assert lines == [
        "test_takes vlmgpu.peak_gib=3.0",
        "test_takes vlmgpu.peak_gib_of_gpu=2.0",
        "test_takes vlmgpu.reserved_gib=3.0",
        "test_takes vlmgpu.reserved_gib_of_gpu=2.0",
        "test_takes vlmgpu.driver_gib=4.0",
        "test_takes vlmgpu.declared_gib=20.0",
        "test_small vlmgpu.peak_gib=0.5",
        "test_small vlmgpu.peak_gib_of_gpu=0.5",
        "test_small vlmgpu.reserved_gib=3.0",
        "test_small vlmgpu.reserved_gib_of_gpu=2.0",
        "test_small vlmgpu.driver_gib=4.0",
    ]
    result.stdout.fnmatch_lines(["hint: test_x.py::test_takes declares 20 GiB, peaked at 2.0 (--vlm-suggest)"])


def test_suggestions_can_be_pasted(suite: Any, cuda: Cuda) -> None:
    result = suite.run("--vlm-suggest", test_x=BODY)

    result.stdout.fnmatch_lines(
        [
            "markers by what was measured in this run *",
            "test_x.py::test_takes  # declares 20 GiB, peaked at 2.0",
            "    @pytest.mark.vlm_requires(vram_gib=3)",
            "    @pytest.mark.vlm_limit_vram(2.1)",
            "test_x.py::test_small",
        ]
    )


def test_nothing_measured_is_said_so(suite: Any) -> None:
    result = suite.run("--vlm-suggest", test_x="import pytest\n@pytest.mark.vlm('org/a')\ndef test_x(vlm): pass")

    result.stdout.fnmatch_lines(["no test's GPU memory was measured, so no marker can be suggested."])


LIMITS = """
import pytest, torch
@pytest.mark.vlm_limit_vram("2GiB")
@pytest.mark.vlm("org/a")
@pytest.mark.parametrize("gib", [1, 2, 2.5])
def test_loads(vlm, gib): torch.cuda.take(gib); torch.cuda.free(gib)
@pytest.mark.vlm_limit_vram(1)
def test_loads_itself(): torch.cuda.take(3, ordinal=1); torch.cuda.free(3, ordinal=1)
@pytest.mark.vlm_limit_vram(1)
def test_fails_itself():
    torch.cuda.take(3); torch.cuda.free(3)
    assert False, "its own"
class TestAll:
    pytestmark = pytest.mark.vlm_limit_vram(9)
    @pytest.mark.vlm_limit_vram(1)
    def test_closest(self): torch.cuda.take(3); torch.cuda.free(3)
    def test_class(self): torch.cuda.take(3); torch.cuda.free(3)
"""


def test_a_limit_fails_the_test_and_never_skips(suite: Any, cuda: Cuda) -> None:
    result = suite.run(test_x=LIMITS)

    result.assert_outcomes(passed=3, failed=4)
    result.stdout.fnmatch_lines(
        [
            "VLM751: the test may take 2.0 GiB of one GPU and took 2.5 GiB on cuda:0 *",
            "VLM751: the test may take 1.0 GiB of one GPU and took 3.0 GiB on cuda:1 (3.0 GiB with gaps): make its *",
            "*_ test_fails_itself _*",
            "E       AssertionError: its own",
        ]
    )


def test_without_gpus_a_limit_holds(suite: Any) -> None:
    suite.has_none()

    suite.run(
        test_x="import pytest\n@pytest.mark.vlm_limit_vram('1GiB')\ndef test_x(vlm_vram): assert vlm_vram.peak_gib == 0"
    ).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("vlm_limit_vram(amount='18')", "has amount='18'; write GiB as a number, or text with a unit such as \"80GB\""),
        ("vlm_limit_vram()", 'takes one size, such as vlm_limit_vram("18GiB")'),
        ("vlm_limit_vram(None)", 'has amount=None; write GiB as a number, or text such as "18GiB"'),
        ("vlm_limit_vram(0)", "has amount=0; write a size above zero"),
        ("vlm_mutates('x')", "takes no arguments"),
    ],
)
def test_a_wrong_marker_is_a_collection_error(suite: Any, mark: str, message: str) -> None:
    result = suite.run(test_x=f"import pytest\n@pytest.mark.{mark}\ndef test_x(): pass")

    result.assert_outcomes(errors=1)
    assert f"@pytest.mark.{mark.partition('(')[0]} {message}." in result.stdout.str()


LEAKS = """
import pytest, torch
pytestmark = pytest.mark.vlm("org/a")
def test_leaks(vlm): torch.cuda.take(1)
def test_fine(vlm): torch.cuda.take(0.2)
@pytest.fixture
def tidy(vlm):
    yield
    torch.cuda.free(1)
def test_tidy(tidy): torch.cuda.take(1)
@pytest.mark.vlm_mutates
def test_mutates(vlm): torch.cuda.take(1)
"""


def test_memory_left_behind_is_a_note(suite: Any, cuda: Cuda) -> None:
    result = suite.run(test_x=LEAKS)

    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(
        ["test_x.py::test_leaks: VLM754: test_leaks left 1.0 GiB on cuda:0 taken: delete it in the test, or when *"]
    )
    assert result.stdout.str().count("VLM754") == 1
    assert cuda.emptied, "what nobody refers to was not given back before the test was blamed"


def test_memory_left_behind_can_be_an_error_or_nothing(suite: Any, cuda: Cuda) -> None:
    suite.run("--vlm-leak-check=error", test_x=LEAKS).assert_outcomes(passed=4, errors=1)
    suite.run("--vlm-leak-check=error", "--vlm-leak-tolerance=2GiB", test_x=LEAKS).assert_outcomes(passed=4)
    result = suite.run("--vlm-leak-check=off", test_x=LEAKS)

    assert "VLM754" not in result.stdout.str()


def test_notes_reach_the_controller_of_xdist(suite: Any, cuda: Cuda) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    folder = str(Path(__file__).parent)
    suite.configure(
        f"import sys\nsys.path.insert(0, {folder!r})\nfrom fake_cuda import Cuda, fake_torch\n"
        "sys.modules['torch'] = fake_torch(Cuda())"
    )

    result = suite.run("-n1", test_x=LEAKS)

    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["test_x.py::test_leaks: VLM754: test_leaks left 1.0 GiB on cuda:0 taken*"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--vlm-mutation=maybe", "--vlm-mutation: 'maybe' is no level; write error, warn or off."),
        ("--vlm-leak-tolerance=much", "--vlm-leak-tolerance: 'much' is no amount of memory*"),
        ("--vlm-seed=-1", "--vlm-seed: '-1' is no seed; write a whole number from 0 on, or none."),
    ],
)
def test_a_wrong_setting_ends_the_run(suite: Any, option: str, message: str) -> None:
    result = suite.run(option, test_x="def test_x(): pass")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: VLM720: {message}"])


BROKEN = """
import pytest, torch
class OutOfMemoryError(RuntimeError): pass
@pytest.mark.vlm_limit_vram(9)
@pytest.mark.parametrize("error", [ValueError("its own"), OutOfMemoryError("CUDA out of memory."), None])
def test_x(error):
    torch.cuda.take(1)
    torch.cuda.is_broken = True
    if error is not None: raise error
    pytest.skip("as it likes")
def test_other(): pass
"""


def test_a_gpu_that_stops_answering_hides_no_failure(suite: Any, cuda: Cuda) -> None:
    result = suite.run("-rs", test_x=BROKEN)

    result.assert_outcomes(passed=1, failed=2, skipped=1)
    result.stdout.fnmatch_lines(["E       ValueError: its own", "*VLM752: out of GPU memory in the test*", "*as it likes"])
    assert "INTERNALERROR" not in result.stdout.str()
    assert "launch failure" not in result.stdout.str()
