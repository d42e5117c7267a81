"""The snippet is Python, makes exactly the plan's map, and holds names as data only."""

from __future__ import annotations

import ast
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.errors import UsageError
from vlm_doctor.formats import render
from vlm_doctor.formats.key_runs import runs
from vlm_doctor.formats.to_python import device_map_source, dtype_argument, literal, snippet
from vlm_doctor.machine import Libraries, Package
from vlm_doctor.placement import Plan
from vlm_doctor.report import Report
from vlm_doctor.workload import Workload


def libraries(version: str) -> Libraries:
    return Libraries(python="3.11", executable="", packages=(Package(name="transformers", version=version),))


def map_of(source: str) -> dict[str, int | str]:
    names: dict[str, dict[str, int | str]] = {}
    exec(source, {}, names)
    return names["device_map"]


def arguments_of_loading(source: str) -> dict[str | None, str]:
    call = ast.parse(source).body[-1]
    assert isinstance(call, ast.Assign)
    assert isinstance(call.value, ast.Call)
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.value.keywords}


def test_whole_snippet(plan_report: Report, golden: Callable[[str, str], None]) -> None:
    golden("python/plan_report.py.txt", render(plan_report, "python"))


def test_a_plan_for_this_machine_needs_no_warning(plan: Plan) -> None:
    assert "another machine" not in snippet(plan, is_live=True)
    assert "another machine" in snippet(plan, is_live=False)


def test_the_environment_is_set_before_anything_is_imported_that_imports_torch(plan: Plan) -> None:
    text = snippet(plan)

    assert text.index("CUDA_DEVICE_ORDER") < text.index("CUDA_VISIBLE_DEVICES") < text.index("from transformers")


def test_the_map_is_the_plans_in_the_same_order(plan: Plan) -> None:
    assert list(map_of(device_map_source(plan)).items()) == list(plan.device_map.items())


KEYS = st.one_of(
    st.text(min_size=1, max_size=12),
    st.builds("{}.{}".format, st.sampled_from(["model.layers", "a b", 'q"', "{x}", "x'\\", "\n"]), st.integers(0, 12)),
    st.sampled_from(["model.layers.007", "model.layers.-1", "7", ".7", "layers.٣"]),
)


@given(pairs=st.dictionaries(KEYS, st.integers(0, 3) | st.just("cpu"), max_size=30))
def test_any_map_survives(pairs: dict[str, int | str]) -> None:
    plan = Plan(
        model="m", machine="m", fits=True, workload=Workload(), dtype="bfloat16", prompt_tokens=0, image_tokens=0,
        device_map=pairs, max_memory={}, cuda_visible_devices="", stages=(),
    )  # fmt: skip

    assert list(map_of(device_map_source(plan)).items()) == list(pairs.items())


@given(keys=st.lists(KEYS, unique=True, max_size=30))
def test_runs_name_exactly_the_keys(keys: list[str]) -> None:
    named = [
        run.prefix if run.first is None or run.last is None else f"{run.prefix}{number}"
        for run in runs(keys)
        for number in (range(1) if run.first is None or run.last is None else range(run.first, run.last + 1))
    ]

    assert named == keys


@pytest.mark.parametrize(
    ("version", "argument"),
    [
        ("4.55.4", "torch_dtype"),
        ("4.56.0.dev0", "torch_dtype"),
        ("4.56.0", "dtype"),
        ("5.23.0", "dtype"),
        ("unreadable", "dtype"),
    ],
)
def test_the_dtype_argument_is_that_of_the_installed_transformers(plan: Plan, version: str, argument: str) -> None:
    assert dtype_argument(libraries(version)) == argument
    assert arguments_of_loading(snippet(plan, libraries(version)))[argument] == "'bfloat16'"


def test_without_transformers_the_newest_is_assumed() -> None:
    assert dtype_argument(None) == "dtype"
    assert dtype_argument(Libraries(python="3.11", executable="")) == "dtype"


@pytest.mark.parametrize(
    ("quantization", "config"),
    [
        ("int8", "BitsAndBytesConfig(load_in_8bit=True)"),
        ("nf4", "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype='bfloat16')"),
    ],
)
def test_quantization_is_configured(plan: Plan, quantization: str, config: str) -> None:
    workload = msgspec.structs.replace(plan.workload, quantization=quantization)

    tree = ast.parse(snippet(msgspec.structs.replace(plan, workload=workload)))

    assert f"quantization = {config}" in ast.unparse(tree)
    assert arguments_of_loading(ast.unparse(tree))["quantization_config"] == "quantization"


def test_remote_code_is_named_as_such(plan: Plan) -> None:
    text = snippet(msgspec.structs.replace(plan, is_remote_code=True))

    assert "AutoModelForCausalLM.from_pretrained" in text
    assert "# The class of this model comes with the checkpoint: read that code before you run it." in text
    assert arguments_of_loading(text) == {
        "dtype": "'bfloat16'",
        "device_map": "device_map",
        "trust_remote_code": "True",
    }


def test_a_revision_is_loaded_for_model_and_processor(plan: Plan) -> None:
    text = snippet(msgspec.structs.replace(plan, revision="v1.0"))

    assert 'AutoProcessor.from_pretrained(MODEL, revision="v1.0")' in text
    assert '    MODEL,\n    revision="v1.0",\n' in text


def test_remote_code_is_told_to_use_eager_attention_when_asked(plan: Plan) -> None:
    workload = msgspec.structs.replace(plan.workload, attention="eager")
    text = snippet(msgspec.structs.replace(plan, is_remote_code=True, workload=workload))

    assert arguments_of_loading(text)["attn_implementation"] == "'eager'"


HOSTILE = "\"; import os; os.system('true') #\n'''\\ \u202e {__import__}"


def test_hostile_names_stay_data(plan: Plan) -> None:
    plan = msgspec.structs.replace(
        plan, model=HOSTILE, machine=HOSTILE, dtype=HOSTILE, cuda_visible_devices=HOSTILE, device_map={HOSTILE: 0}
    )

    text = snippet(plan)

    values = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    assert values.count(HOSTILE) == 4, "model, dtype, devices, key"
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert names == {"AutoModelForImageTextToText", "AutoProcessor", "MODEL", "device_map", "model", "os", "processor"}
    assert map_of(device_map_source(plan)) == {HOSTILE: 0}


def test_a_plan_that_does_not_fit_cannot_be_run_by_accident(misfit_report: Report) -> None:
    text = render(misfit_report, "python")

    with pytest.raises(SystemExit, match=r"needs 25\.2 GiB of GPU 0, which has 22\.5 GiB"):
        exec(text)


def test_a_report_without_plan_cannot_be_python(check_report: Report) -> None:
    with pytest.raises(UsageError, match="only a plan can be written as Python"):
        render(msgspec.structs.replace(check_report, plan=None), "python")


@given(st.text())
def test_literals_read_back(text: str) -> None:
    assert ast.literal_eval(literal(text)) == text
    assert literal(text).isascii()
