"""The test that changes a shared model fails, and no other; later tests meet the model as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import pytest_vlmgpu.gating.gate
import pytest_vlmgpu.models.loading
import pytest_vlmgpu.watching.watch  # noqa: F401
import vlm_doctor.checks
import vlm_doctor.sources.collection  # noqa: F401
from pytest_vlmgpu.watching import fingerprint

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.models

PROJECT = """
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
import pytest, torch

def log(line):
    with Path(__file__).with_name("log.txt").open("a") as file: file.write(line + "\\n")

@pytest.fixture(scope="session")
def vlm_loader():
    @contextmanager
    def load(spec, plan):
        log(f"LOAD {spec.name}")
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).eval()
        model.config = SimpleNamespace(use_cache=True)
        yield SimpleNamespace(name=spec.name, model=model, processor=None)
        log(f"UNLOAD {spec.name}")
    return load
"""


class Project:
    """A project whose models are two linear layers."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester

    def run(self, body: str, *arguments: str) -> pytest.RunResult:
        self.pytester.makepyfile(test_x=f"import pytest, torch\npytestmark = pytest.mark.vlm('org/a')\n{body}")
        (self.pytester.path / "log.txt").unlink(missing_ok=True)
        return self.pytester.runpytest_inprocess(
            "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:randomly", "--vlm-gpus=none", *arguments
        )

    def log(self) -> list[str]:
        return (self.pytester.path / "log.txt").read_text().splitlines()


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    pytester.makeconftest(PROJECT)
    return Project(pytester)


def test_the_test_that_did_it_fails_and_no_other(project: Project) -> None:
    result = project.run("""
def test_before(vlm): assert not vlm.model.training
def test_trains(vlm):
    vlm.model.train()
    vlm.model.config.use_cache = False
def test_after(vlm): assert not vlm.model.training and vlm.model.config.use_cache
""")

    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines([
        "*ERROR at teardown of test_trains*",
        "VLM750: this test changed org/a, which other tests share, and left it so: training mode of 3 modules (the model "
        "itself, 0, *); settings (config.use_cache = False, was True). It was put right for the tests that follow: undo *",
    ])  # fmt: skip
    assert project.log() == ["LOAD org/a", "UNLOAD org/a"]


def test_changed_weights_are_loaded_again(project: Project) -> None:
    result = project.run("""
def test_zeroes(vlm):
    with torch.no_grad(): vlm.model[1].weight.zero_()
def test_after(vlm, vlm_model): assert vlm_model is vlm.model and vlm.model[1].weight.abs().sum() > 0
""")

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["VLM750: *left it so: values: 1 tensor (1.weight). It is loaded again for the tests *"])
    assert project.log() == ["LOAD org/a", "UNLOAD org/a", "LOAD org/a", "UNLOAD org/a"]


def test_a_model_that_is_kept_for_later_is_loaded_again_too(project: Project) -> None:
    result = project.run(
        """
def test_zeroes(vlm): vlm.model[1].weight.data.zero_()
def test_after(vlm): assert vlm.model[1].weight.abs().sum() > 0
@pytest.mark.vlm("org/b")
def test_other(vlm): pass
@pytest.mark.vlm_mutates
def test_prunes(vlm): vlm.model[1].weight.data.zero_()
""",
        "--vlm-slots=fit",
    )

    result.assert_outcomes(passed=4, errors=1)
    assert [line for line in project.log() if line.startswith("LOAD")] == ["LOAD org/a", "LOAD org/a", "LOAD org/b"]


def test_what_a_fixture_of_the_test_undoes_is_no_change(project: Project) -> None:
    result = project.run("""
@pytest.fixture
def training(vlm):
    vlm.model.train()
    yield
    vlm.model.eval()
def test_fixture(training, vlm): assert vlm.model.training
def test_monkeypatch(vlm, monkeypatch): monkeypatch.setattr(vlm.model, "training", True)
class TestSetup:
    @pytest.fixture(autouse=True)
    def _set(self, vlm): self.vlm = vlm
    def setup_method(self): self.hook = None
    def teardown_method(self): self.vlm.model.eval()
    def test_x(self): self.vlm.model.train()
""")

    result.assert_outcomes(passed=3)


def test_what_wider_fixtures_do_is_theirs(project: Project) -> None:
    result = project.run("""
@pytest.fixture(scope="session")
def frozen(vlm): vlm.model.requires_grad_(False)
def test_first(vlm): assert vlm.model[0].weight.requires_grad
def test_frozen(frozen, vlm): assert not vlm.model[0].weight.requires_grad
class TestTraining:
    @pytest.fixture(scope="class", autouse=True)
    def training(self, vlm):
        vlm.model.train()
        yield
        vlm.model.eval()
    def test_one(self, vlm): assert vlm.model.training
    def test_two(self, vlm): vlm.model[0].eval()
    def test_three(self, vlm): assert vlm.model[0].training
def test_last(vlm): assert not vlm.model.training
""")

    result.assert_outcomes(passed=6, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of TestTraining.test_two*", "VLM750: *evaluation mode of 1 module (0)*"]
    )


def test_a_test_that_mutates_runs_last_and_leaves_nothing(project: Project) -> None:
    result = project.run("""
@pytest.mark.vlm_mutates
def test_one(vlm): vlm.model[0].weight.data.zero_(); vlm.model.train()
def test_two(vlm): assert vlm.model[0].weight.abs().sum() > 0
@pytest.mark.vlm_mutates
def test_three(vlm): assert vlm.model[0].weight.abs().sum() > 0 and not vlm.model.training
def test_four(vlm): assert vlm.model[0].weight.abs().sum() > 0
""", "-v")  # fmt: skip

    result.assert_outcomes(passed=4)
    assert [line.split()[0].partition("::")[2] for line in result.outlines if "PASSED" in line] == [
        "test_two",
        "test_four",
        "test_one",
        "test_three",
    ]
    assert project.log().count("LOAD org/a") == 2


def test_a_test_that_fails_is_not_failed_twice(project: Project) -> None:
    result = project.run("""
def test_fails(vlm):
    vlm.model.train()
    assert False
def test_after(vlm): assert not vlm.model.training
""")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["test_x.py::test_fails: VLM750: this test changed org/a*"])


def test_an_expected_failure_does_not_hide_it(project: Project) -> None:
    result = project.run("""
@pytest.mark.xfail(strict=False)
def test_x(vlm): vlm.model.train()
""")

    result.assert_outcomes(xpassed=1, errors=1)


def test_it_can_be_a_note_or_nothing(project: Project) -> None:
    body = "def test_x(vlm): vlm.model.train()\ndef test_y(vlm): assert vlm.model.training == {}"

    warned = project.run(body.format(False), "--vlm-mutation=warn")
    off = project.run(body.format(True), "--vlm-mutation=off")

    warned.assert_outcomes(passed=2)
    warned.stdout.fnmatch_lines(["test_x.py::test_x: VLM750: *"])
    off.assert_outcomes(passed=2)
    assert "VLM750" not in off.stdout.str()


def test_another_model_in_its_place_is_found(project: Project) -> None:
    result = project.run("""
def test_x(vlm): vlm.model = torch.nn.Linear(2, 2)
def test_y(vlm): assert len(vlm.model) == 2
""")

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["VLM750: *left it so: another model in its place. It is loaded again*"])


def test_a_fixture_of_the_project_that_wraps_ours_is_renewed_too(project: Project) -> None:
    result = project.run("""
@pytest.fixture(scope="session")
def vlm(vlm):
    vlm.wrapped = True
    return vlm
def test_zeroes(vlm):
    assert vlm.wrapped
    vlm.model[0].weight.data.zero_()
def test_after(vlm): assert vlm.wrapped and vlm.model[0].weight.abs().sum() > 0
""")

    result.assert_outcomes(passed=2, errors=1)


def test_a_gpu_that_died_is_told_by_its_test(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = fingerprint._sample

    def may_be_dead(module: Any, tensors: Any) -> Any:
        if "VLMGPU_TEST_DEAD" in os.environ:
            raise RuntimeError("CUDA error: device-side assert triggered\nmore")
        return sample(module, tensors)

    monkeypatch.setattr(fingerprint, "_sample", may_be_dead)
    monkeypatch.delenv("VLMGPU_TEST_DEAD", raising=False)
    result = project.run("""
import os
def test_x(vlm): os.environ["VLMGPU_TEST_DEAD"] = "1"
def test_y(vlm): pass
""")
    monkeypatch.delenv("VLMGPU_TEST_DEAD")

    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "VLM712: the GPU stopped answering in this test (RuntimeError: CUDA error: device-side assert triggered): *",
            "VLM712: the GPU stopped answering before this test (RuntimeError: CUDA error: device-side assert *",
        ]
    )
    assert "Traceback" not in result.stdout.str()
    assert "During handling" not in result.stdout.str()


def test_each_test_draws_the_same_and_leaves_the_random_state_alone(project: Project) -> None:
    project.run("""
SEEN = []
def test_one(vlm): SEEN.append(torch.rand(1))
def test_two(vlm): assert torch.rand(1) == SEEN[-1]
@pytest.fixture
def noise(vlm): return torch.rand(1)
def test_three(noise): assert noise == SEEN[-1]
@pytest.fixture(scope="module")
def wider(vlm):
    torch.manual_seed(8)
    yield
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(8))
def test_four(wider): torch.rand(1)
""").assert_outcomes(passed=4)


def test_the_seed_can_be_another_one_or_none(project: Project) -> None:
    body = """
SEEN = []
@pytest.mark.parametrize("n", range(3))
def test_x(vlm, n): SEEN.append(float(torch.rand(1)))
def test_y(vlm): assert (len(set(SEEN)), SEEN[0] == float(torch.rand(1, generator=torch.Generator().manual_seed(5)))) == {}
"""

    project.run(body.format((1, True)), "--vlm-seed=5").assert_outcomes(passed=4)
    project.run(body.format((3, False)), "--vlm-seed=none").assert_outcomes(passed=4)


def test_memory_that_stays_after_unloading_has_a_holder(tmp_path: Path) -> None:
    from pytest_vlmgpu.models.loading import LoadedVlm, unload

    model = torch.nn.Linear(8, 8)
    loaded = LoadedVlm("org/a", model, None, None, {}, (), "cpu", 0.0)
    del model
    kept: Any = loaded.model.weight
    keepers.append(kept)
    del kept

    assert unload(loaded) == 8 * 8 * 4
    assert loaded.held_by == f"variable keepers of module {__name__}"
    assert repr(loaded) == "<LoadedVlm org/a, unloaded>"
    keepers.clear()


keepers: list[Any] = []


def test_a_model_whose_warm_host_has_ended_is_an_error_and_is_loaded_again(project: Project) -> None:
    project.pytester.makeconftest(
        PROJECT.replace("processor=None)", "processor=None, warm=SimpleNamespace(is_lost=False, log='/l'))")
    )

    result = project.run("""
def test_before(vlm): pass
def test_under_which_it_ends(vlm): vlm.warm.is_lost = True
def test_after(vlm): assert not vlm.warm.is_lost
""")

    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        ["VLM712: the warm host of org/a ended while the test ran, and the model's memory with it. *; *log is /l."]
    )
    assert project.log() == ["LOAD org/a", "UNLOAD org/a", "LOAD org/a", "UNLOAD org/a"]
