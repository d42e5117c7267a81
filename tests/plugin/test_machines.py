"""Where the machine comes from, how often it is read, and what the real planner says to the gate."""

from __future__ import annotations

from typing import Any

import pytest

LIVE = """
@pytest.fixture(scope="session", autouse=True)
def no_real_machine():
    from vlm_doctor import sources

    def collect(*, with_torch):
        assert not with_torch
        log("COLLECT")
        return from_json((FOLDER / "machine.json").read_bytes(), Machine, where="machine.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "collect", collect)
        yield
"""


def test_the_machine_is_read_once_and_again_before_each_load(suite: Any) -> None:
    suite.configure(LIVE, without="vlm_machine")

    result = suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm_requires(gpus=2, vram_gib=20)
        def test_1(): pass
        @pytest.mark.vlm_requires(gpus=2)
        def test_2(vlm_gpus): pass
        @pytest.mark.vlm("org/a")
        def test_3(vlm): pass
        @pytest.mark.vlm("org/a")
        def test_4(vlm): pass
        @pytest.mark.vlm("org/b")
        def test_5(vlm, vlm_machine): assert len(vlm_machine.gpus) == 2
        """
    )

    result.assert_outcomes(passed=5)
    assert suite.log() == ["COLLECT", "COLLECT", "LOAD org/a", "UNLOAD org/a", "COLLECT", "LOAD org/b", "UNLOAD org/b"]


def test_free_memory_is_not_older_than_a_few_seconds(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vlmgpu.gating.gate.MEMORY_AGE_S", -1)
    suite.configure(LIVE, without="vlm_machine")

    suite.run(
        test_x="""
        import pytest
        @pytest.mark.vlm_requires(gpus=2)
        def test_counts(): pass
        @pytest.mark.vlm_requires(vram_gib=20)
        def test_memory(): pass
        @pytest.mark.vlm("org/a")
        def test_model(): pass
        """
    ).assert_outcomes(passed=3)

    # The first test needs no memory.
    assert suite.log() == ["COLLECT"] * 3


def test_a_made_up_machine_is_never_read_again(suite: Any) -> None:
    suite.configure(LIVE, without="vlm_machine")

    result = suite.run("--vlm-machine=2xL4", test_x="import pytest\n@pytest.mark.vlm('org/a')\ndef test_x(vlm): pass")

    result.assert_outcomes(skipped=1)
    assert suite.log() == []


def test_a_project_without_conftest_plans_with_the_catalogue(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    suite.folder.joinpath("conftest.py").unlink()

    result = suite.run(
        "--vlm-machine=2xL4",
        "-rs",
        test_x="""
        import pytest
        @pytest.mark.vlm("llava-hf/llava-1.5-7b-hf")
        def test_small(vlm): pass
        @pytest.mark.vlm("llava-hf/llava-1.5-7b-hf")
        @pytest.mark.vlm_requires(gpus=2)
        def test_spread(vlm): pass
        @pytest.mark.vlm("llava-hf/llava-1.5-13b-hf")
        def test_split(vlm): pass
        @pytest.mark.vlm("Qwen/Qwen2.5-VL-72B-Instruct")
        def test_huge(vlm): pass
        @pytest.mark.vlm("OpenGVLab/InternVL3-8B")
        def test_code(vlm): pass
        @pytest.mark.vlm("nobody/nothing")
        def test_gone(vlm): pass
        """,
    )

    result.assert_outcomes(skipped=4, errors=2)
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED [[]1[]] test_x.py:2: would run on GPU 0 of *",
            "SKIPPED [[]1[]] test_x.py:4: would run on GPU 0, 1 of *",
            "SKIPPED [[]1[]] test_x.py:7: would run on GPU 0, 1 of *",
            "SKIPPED [[]1[]] test_x.py:9: VLM705: Qwen/Qwen2.5-VL-72B-Instruct does not fit: *",
            "VLM713: OpenGVLab/InternVL3-8B brings its own Python code *",
            "VLM713: *nobody/nothing*",
        ]
    )


def test_a_policy_that_makes_no_sense_is_the_projects_error(suite: Any) -> None:
    suite.configure(
        """
@pytest.fixture(scope="session")
def vlm_policy():
    from vlm_doctor.workload import Policy
    return Policy(headroom_fraction=7.0)
""",
        without="vlm_planner",
    )

    result = suite.run(test_x="import pytest\n@pytest.mark.vlm('llava-hf/llava-1.5-7b-hf')\ndef test_x(vlm): pass")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["VLM720: *headroom*"])
