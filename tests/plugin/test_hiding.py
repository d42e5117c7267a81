"""Tests without markers of the plugin see no GPU, as far as one process can hide them."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vlmgpu.leasing.attempts import counted_gpus
from pytest_vlmgpu.leasing.hiding import Hider

from .projects import with_workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from .projects import Project

OPTION = "--vlm-hide-gpu-from-cpu-tests"
SEES = """
import os, subprocess, sys
import pytest

def sees(): return os.environ.get("CUDA_VISIBLE_DEVICES")
def child(): return subprocess.run(["printenv", "CUDA_VISIBLE_DEVICES"], stdout=subprocess.PIPE, text=True).stdout.strip()

@pytest.fixture
def around():
    before = sees()
    yield before
    assert sees() == before
"""
MIXED = (
    SEES
    + """
at_import = sees()
def test_plain(around): assert (at_import, around, sees(), child()) == (None, "-1", "-1", "-1")
@pytest.mark.vlm("org/a")
def test_gated(vlm, around): assert around != "-1" and sees() != "-1"
def test_plain_again(around): assert (around, sees()) == ("-1", "-1")
@pytest.mark.vlm_limit_vram(4)
def test_watched(around): assert around != "-1"
def test_image(vlm_images, around): assert around != "-1"
"""
)
LIVE = """
def pytest_vlmgpu_inventory(config):
    import os
    from msgspec.structs import replace
    machine = from_json((FOLDER / "machine.json").read_bytes(), Machine, where="machine.json")
    return replace(machine, environment={k: v for k, v in os.environ.items() if k == "CUDA_VISIBLE_DEVICES"})
"""
CUDA = """
import pytest_vlmgpu.leasing.masks as masks
class Cuda:
    is_started = False
masks.is_cuda_started = lambda: Cuda.is_started
"""


@pytest.fixture(autouse=True)
def real_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projects replace it, in this process."""
    from pytest_vlmgpu.leasing import masks

    monkeypatch.setattr(masks, "is_cuda_started", masks.is_cuda_started)


@pytest.mark.parametrize("how", ["option", "ini"])
def test_only_tests_that_are_no_concern_of_the_plugin_see_no_gpu(suite: Any, how: str) -> None:
    if how == "ini":
        suite.pytester.makeini("[pytest]\nvlm_hide_gpu_from_cpu_tests = true")

    result = suite.run(*([OPTION] if how == "option" else []), test_x=MIXED)

    result.assert_outcomes(passed=5)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_without_the_option_nothing_is_hidden(suite: Any) -> None:
    suite.run(test_x=SEES + "def test_plain(around): assert sees() is None").assert_outcomes(passed=1)


def test_a_run_without_gated_tests_hides_gpus_too(suite: Any) -> None:
    suite.run(OPTION, test_x=SEES + "def test_plain(around): assert sees() == '-1'").assert_outcomes(passed=1)


def test_a_test_that_asks_for_the_machine_does_not_hide_the_gpus_from_the_gate(suite: Any) -> None:
    suite.configure(LIVE, without="vlm_machine")

    result = suite.run(
        OPTION,
        test_x=SEES
        + """
def test_asks(request): assert len(request.getfixturevalue("vlm_machine").gpus) == 2 and sees() == "-1"
@pytest.mark.vlm_requires(gpus=2)
def test_gated(): pass
""",
    )

    result.assert_outcomes(passed=2)


def test_gpus_that_are_taken_while_they_are_hidden_are_shown_to_the_gated_tests_after(suite: Any) -> None:
    shown = "GPU-00000001-0000-0000-0000-000000000000"

    result = suite.run(
        OPTION,
        "--vlm-gpus=1,",
        test_x=SEES
        + f"""
def test_asks(request): assert len(request.getfixturevalue("vlm_gpus")) == 1 and sees() == "-1"
@pytest.mark.vlm_requires
def test_gated(): assert sees() == {shown!r}
""",
    )

    result.assert_outcomes(passed=2)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_gpus_that_the_project_hides_while_ours_are_hidden_stay_hidden(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    suite.configure(LIVE, without="vlm_machine")

    result = suite.run(
        OPTION,
        test_x=SEES
        + """
@pytest.fixture(scope="session", autouse=True)
def one(): os.environ["CUDA_VISIBLE_DEVICES"] = "1"
def test_plain(): assert sees() == "1"
def test_plain_again(): assert sees() == "-1"
@pytest.mark.vlm_requires
def test_gated(): assert sees() == "1"
""",
    )

    result.assert_outcomes(passed=3)


def test_once_cuda_is_started_tests_see_gpus_and_a_warning_says_so_once(suite: Any) -> None:
    suite.configure(CUDA)

    result = suite.run(
        OPTION,
        "-Werror",
        test_x=SEES
        + """
from conftest import Cuda
@pytest.mark.vlm("org/a")
def test_gated(vlm): Cuda.is_started = True
def test_plain(): assert child() == "-1"
def test_plain_again(): pass
""",
    )

    result.assert_outcomes(passed=3, warnings=1)
    result.stdout.fnmatch_lines(
        ["*PytestWarning: vlmgpu: vlm_hide_gpu_from_cpu_tests: CUDA was started in this process before this test, so *"]
    )


def test_who_starts_cuda_while_gpus_are_hidden_is_named_by_the_gated_tests_after(suite: Any) -> None:
    suite.configure(CUDA)

    result = suite.run(
        OPTION,
        test_x=SEES
        + """
from conftest import Cuda
def test_starts(): Cuda.is_started = True
def test_plain(): pass
@pytest.mark.vlm("org/a")
def test_gated(vlm): pass
""",
    )

    result.assert_outcomes(passed=2, errors=1, warnings=1)
    result.stdout.fnmatch_lines(
        [
            "VLM712: test_x.py::test_starts, which has no marker of the plugin, started CUDA while GPUs were hidden from "
            "it (vlm_hide_gpu_from_cpu_tests), so this process sees none any more: give that test "
            "@pytest.mark.vlm_requires, run with pytest-xdist and one worker more than there are GPUs, or leave the *"
        ]
    )


TORCH = """
import sys, types
import pytest_vlmgpu.leasing.masks as masks

# torch as it was found on a real GPU: an attempt while no GPU is visible fails, and is_initialized() stays False; from then
# on the process has none.
class Driver:
    is_blind = is_loaded = is_started = False

def count():
    Driver.is_loaded = True
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "-1":
        Driver.is_blind = True
    Driver.is_started = not Driver.is_blind
    return 0 if Driver.is_blind else 2

def init():
    if count() == 0:
        raise RuntimeError("No CUDA GPUs are available")

def make(cuda=True):
    extension = types.ModuleType("torch._C")
    if cuda:
        extension._cuda_init, extension._cuda_getDeviceCount = init, count
    return extension

def backward(*tensors, **options):
    count()

class Finder:
    # Imports the stand-in as torch is imported: the extension first.
    def find_spec(self, name, path, target=None):
        import importlib.machinery
        return importlib.machinery.ModuleSpec(name, self) if name == "torch.cuda" else None
    def create_module(self, spec): return None
    def exec_module(self, module): pass

def late():
    import importlib
    sys.modules["torch"] = package = types.ModuleType("torch")
    package.__path__ = []
    sys.modules["torch._C"] = package._C = make()
    sys.modules["torch.autograd"] = types.SimpleNamespace(_engine_run_backward=backward)
    importlib.import_module("torch.cuda")

masks.is_cuda_started = lambda: Driver.is_started
masks.is_driver_loaded = lambda: Driver.is_loaded
sys.meta_path.append(Finder())
if KIND != "late":
    sys.modules["torch._C"] = make(cuda=KIND != "cpu")
    sys.modules["torch.autograd"] = types.SimpleNamespace(_engine_run_backward=backward)
"""
STARTS = """
import os, sys
import pytest
from conftest import Driver, late
def start():
    if "torch._C" not in sys.modules: late()
    sys.modules["torch._C"]._cuda_init()
def test_first(): assert sys.modules["torch._C"]._cuda_init.__name__ == "init"
def test_starts():
    with pytest.raises(RuntimeError, match="No CUDA GPUs are available"): start()
def test_again():
    with pytest.raises(RuntimeError, match="No CUDA GPUs are available"): start()
@pytest.mark.vlm_requires
def test_gated(): start()
def test_between(): pass
@pytest.mark.vlm_requires
def test_gated_too(): start()
def teardown_module(): assert not hasattr(sys.modules["torch._C"]._cuda_init, "__wrapped__")
"""
TAKEN = "VLM712: test_x.py::{}, which has no marker of the plugin, started CUDA while GPUs were hidden from it *"


@pytest.fixture
def stand_in(suite: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A project with a stand-in for torch: ``early``, ``late`` (imported by the test that uses it) or for the ``cpu``."""
    from pytest_vlmgpu.leasing import masks

    monkeypatch.setattr(masks, "is_driver_loaded", masks.is_driver_loaded)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("torch", "torch._C", "torch.cuda", "torch.autograd"):
        monkeypatch.setitem(sys.modules, name, sys)  # to be put back by the end of the test
        monkeypatch.delitem(sys.modules, name)

    def make(kind: str) -> None:
        suite.configure(f"import os\nKIND = {kind!r}\n{TORCH}")

    return make


@pytest.mark.parametrize("kind", ["early", "late"])
def test_an_attempt_that_failed_is_an_error_of_the_gated_tests_and_names_who_made_it(
    suite: Any, stand_in: Callable[[str], None], kind: str
) -> None:
    stand_in(kind)
    suite_text = STARTS if kind == "early" else STARTS.replace("def test_first", "def no_test")

    result = suite.run(OPTION, test_x=suite_text)

    result.assert_outcomes(passed=4 if kind == "early" else 3, errors=2)
    result.stdout.fnmatch_lines([TAKEN.format("test_starts")])


def test_who_made_torch_count_the_gpus_without_python_is_named_too(suite: Any, stand_in: Callable[[str], None]) -> None:
    stand_in("early")

    result = suite.run(
        OPTION,
        test_x=STARTS
        + """
import conftest
def test_starts(): conftest.count()  # as C++ does, at the first backward()
test_again = lambda: None
""",
    )

    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines([TAKEN.format("test_starts")])


@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_backward_pass_whose_count_nobody_sees_is_named_though_the_driver_was_there(
    suite: Any, stand_in: Callable[[str], None], kind: str
) -> None:
    stand_in(kind)

    result = suite.run(
        OPTION,
        test_x=STARTS.replace("def test_first", "def no_test")
        + """
import conftest
Driver.is_loaded = True
def test_starts():
    if "torch._C" not in sys.modules: late()
    sys.modules["torch.autograd"]._engine_run_backward("tensor", allow_unreachable=True)
test_again = lambda: None
def teardown_module(): assert sys.modules["torch.autograd"]._engine_run_backward is conftest.backward
""",
    )

    result.assert_outcomes(passed=3, errors=2)
    result.stdout.fnmatch_lines([TAKEN.format("test_starts")])


def test_who_only_loads_the_driver_takes_nothing(suite: Any, stand_in: Callable[[str], None]) -> None:
    stand_in("early")

    result = suite.run(
        OPTION,
        test_x=STARTS
        + """
def test_starts(): Driver.is_loaded = True
test_again = lambda: None
""",
    )

    result.assert_outcomes(passed=6, warnings=1)


def test_without_a_hidden_attempt_torch_is_not_asked(suite: Any, stand_in: Callable[[str], None]) -> None:
    stand_in("early")

    result = suite.run(
        OPTION,
        test_x="""
import pytest
from conftest import Driver
def test_plain(): pass
@pytest.mark.vlm_requires
def test_gated(): assert not Driver.is_loaded
""",
    )

    result.assert_outcomes(passed=2)


def test_a_torch_without_cuda_is_left_alone(suite: Any, stand_in: Callable[[str], None]) -> None:
    stand_in("cpu")

    result = suite.run(
        OPTION,
        test_x="""
import pytest, sys
from conftest import Driver
def test_plain():
    Driver.is_loaded = True  # by something else
    assert not hasattr(sys.modules["torch._C"], "_cuda_init")
@pytest.mark.vlm_requires
def test_gated(): pass
""",
    )

    result.assert_outcomes(passed=2)


def test_a_count_that_raises_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise RuntimeError("CUDA unknown error")

    monkeypatch.setitem(sys.modules, "torch._C", SimpleNamespace(_cuda_getDeviceCount=fail))

    assert counted_gpus() == 0


def test_a_load_that_finds_no_gpu_says_that_they_were_hidden_before(suite: Any) -> None:
    suite.configure(
        """
@pytest.fixture(scope="session")
def vlm_loader():
    @contextmanager
    def load(spec, plan):
        raise LoadFailure("VLM712", "torch sees no usable GPU in this process.")
        yield
    return load
"""
    )
    gated = "@pytest.mark.vlm('org/a')\ndef test_gated(vlm): pass\n"

    alone = suite.run(OPTION, test_x=f"import pytest\n{gated}")
    after = suite.run(OPTION, test_x=f"import pytest\ndef test_plain(): pass\n{gated}")

    alone.stdout.fnmatch_lines(["VLM712: torch sees no usable GPU in this process."])
    after.stdout.fnmatch_lines(
        ["VLM712: torch sees no usable GPU in this process. GPUs were hidden from tests before this one (vlm_hide_gpu_fr*"]
    )


def test_lifting_what_is_not_hidden_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with Hider().lifted():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


FREE = SEES + "@pytest.mark.parametrize('n', range(20))\ndef test_free(n, around): log(worker(), sees(), 'free')\n"
LOGS = """
def log(*words):
    from pathlib import Path
    with (Path(os.environ["SHARED_PROJECT"]) / "seen.txt").open("a") as file:
        print(*words, file=file)
def worker(): return os.environ["PYTEST_XDIST_WORKER"]
"""
GATED = (
    SEES
    + LOGS
    + """
@pytest.mark.vlm("org/a")
@pytest.mark.parametrize("n", range(3))
def test_a(vlm, n): log(worker(), sees(), "gated")
"""
)


@with_workers
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_worker_without_gated_tests_takes_the_others(make: Callable[..., Project], workers: int) -> None:
    project = make()

    text, counts = project.run(f"-n{workers}", OPTION, test_a=GATED, test_free=FREE + LOGS)

    assert counts == {"passed": 23}, text
    seen = [line.split() for line in (project.shared / "seen.txt").read_text().splitlines()]
    gated = {worker for worker, _, kind in seen if kind == "gated"}
    assert {shown for _, shown, kind in seen if kind == "free"} == {"-1"}
    assert {shown for _, shown, kind in seen if kind == "gated"} != {"-1"}
    assert len(gated) == 1
    assert ({worker for worker, _, kind in seen if kind == "free"} == gated) == (workers == 1)


@with_workers
def test_when_the_worker_without_gated_tests_is_gone_the_other_ones_finish(make: Callable[..., Project]) -> None:
    project = make()
    crash = FREE + LOGS + "def test_free_crashes(): os._exit(1)\n"

    text, counts = project.run("-n2", OPTION, "--vlm-gpus=1", test_a=GATED, test_free=crash)

    assert counts == {"passed": 23, "failed": 1}, text
