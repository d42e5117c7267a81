"""The plugin with real models, on the CPU: one load for many tests, and failures that say what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# In processes of their own: a run in this one would forget the modules it imported (see tiny_vlms).
pytestmark = pytest.mark.models

TWO_TESTS = """
    from pytest_vlmgpu.testing import tiny_image

    def test_short(vlm):
        assert len(vlm.generate(tiny_image(), "What is this?", max_new_tokens=3)) == 3

    def test_parts(vlm, vlm_model, vlm_processor, vlm_device_map):
        assert (vlm_model, vlm_processor) == (vlm.model, vlm.processor)
        assert vlm_device_map == {}
"""


def test_tests_of_two_modules_share_one_load(pytester: pytest.Pytester, tiny_vlms: Mapping[str, Path]) -> None:
    pytester.makepyfile(test_one=TWO_TESTS, test_two=TWO_TESTS)
    result = pytester.runpytest_subprocess("--vlm-gpus=none", f"--vlm-model={tiny_vlms['llava']}")
    result.assert_outcomes(passed=4)
    assert str(result.stdout).count("loaded in ") == 1


def test_a_test_runs_with_each_model_it_names(pytester: pytest.Pytester, tiny_vlms: Mapping[str, Path]) -> None:
    pytester.makepyfile(
        f"""
        import pytest
        from pytest_vlmgpu.testing import tiny_image

        @pytest.mark.vlm({str(tiny_vlms["qwen2_vl"])!r}, {str(tiny_vlms["glm4v"])!r}, dtype="bfloat16")
        def test_answer(vlm):
            assert str(vlm.model.dtype) == "torch.bfloat16"
            assert len(vlm.generate([tiny_image(), tiny_image(seed=1)], "Compare.", max_new_tokens=3)) == 3

        @pytest.mark.vlm({str(tiny_vlms["qwen2_vl"])!r}, dtype="bfloat16")
        @pytest.mark.vlm_requires(gpus=2)
        def test_two_gpus(vlm):
            raise AssertionError
        """
    )
    result = pytester.runpytest_subprocess("--vlm-gpus=none")
    result.assert_outcomes(passed=2, skipped=1)


def test_a_checkpoint_that_lacks_weights_is_an_error_in_one_sentence(
    pytester: pytest.Pytester, tiny_vlms: Mapping[str, Path]
) -> None:
    from shutil import copytree

    folder = copytree(tiny_vlms["llava"], pytester.path / "model")
    (folder / "model.safetensors").unlink()
    pytester.makepyfile(TWO_TESTS)
    result = pytester.runpytest_subprocess("--vlm-gpus=none", f"--vlm-model={folder}")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines([f"*VLM713: *{folder}*"])
    result.stdout.no_fnmatch_line("*Traceback*")
