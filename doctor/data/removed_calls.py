"""Methods that code shipped with checkpoints calls and that transformers has removed since."""

from __future__ import annotations

REMOVED_CALLS = {
    "_extract_past_from_model_output": "generation/utils.py",
}
"""Method of a class that every generating model inherits from, to the file of transformers that had it.

``_extract_past_from_model_output`` went with transformers 4.49; code of CogVLM2, CogAgent, GLM-4 and GLM-4V calls it.
Sources: zai-org/GLM-4 issue 716, zai-org/CogVLM2 issue 218, zai-org/CogAgent issue 42. Whether the installed version has
it is read from its own file, so that no version number is needed here.
"""
