"""Command lines, understood."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_doctor.errors import UsageError
from vlm_doctor.options import COMMANDS, parse
from vlm_doctor.plan_options import policy, workload
from vlm_doctor.units import GIB
from vlm_doctor.workload import Policy, Training, Workload


@pytest.mark.parametrize("words", [[], ["--strict"], ["check"], ["--json", "--strict"]])
def test_check_is_the_default_command(words: list[str]) -> None:
    assert parse(words).command == "check"


def test_every_command_has_help_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit) as caught:
            parse(words)
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: vlm-doctor {words[0] if words[0] in COMMANDS else '[-h]'}")


WORDS = st.one_of(
    st.sampled_from([*COMMANDS, "--json", "--format", "--format=json", "--version", "--machine", "2xL4", "--gpus", "0,1"]),
    st.sampled_from(
        ["--", "-", "", "--gpus=", "-o", "-v", "-vv", "--ignore", "--no-", "--=", "=", "--machine=--", "-h", "--he"]
    ),
    st.text(max_size=4),
)


@settings(max_examples=200)
@given(st.lists(WORDS, max_size=5))
def test_any_words_are_understood_or_refused_in_one_sentence(words: list[str]) -> None:
    try:
        said = str(parse(words).command)
    except UsageError as error:
        said = str(error)
    except SystemExit as end:
        said = f"help {end.code}"
    assert said in (*COMMANDS, "None", "help 0") or said.endswith((".", "?", "'"))


def test_version() -> None:
    options = parse(["--version"])

    assert (options.command, options.json) == (None, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plann"], f"'plann' is not a command (they are {', '.join(COMMANDS)}); did you mean plan?"),
        (["\x1b[31m"], f"'\\x1b[31m' is not a command (they are {', '.join(COMMANDS)})."),
        (["plan", "m", "--imags=2"], "'--imags=2' is no option of vlm-doctor plan; did you mean --images? "
         "Try 'vlm-doctor plan --help'."),
        (["--json", "plan", "m"], "'plan' stands behind an option; write the command first: vlm-doctor plan ..."),
        (["check", "plan"], "'plan' is one argument too many for vlm-doctor check. Try 'vlm-doctor check --help'."),
        (["PLAN"], f"'PLAN' is not a command (they are {', '.join(COMMANDS)}); did you mean plan?"),
        (["--json=1"], "--json takes no value, and was given '1'. Try 'vlm-doctor check --help'."),
        (["--output"], "--output needs a value, as in --output=VALUE. Try 'vlm-doctor check --help'."),
        (["--machine", "-4GiB"], "--machine needs a value, as in --machine=VALUE. Try 'vlm-doctor check --help'."),
        (["plan", "/tmp/\udcff"],
         "'/tmp/\\udcff' is not UTF-8 text, which a report could not hold; rename the file or folder."),
        (["plan"], "the following arguments are required: MODEL. Try 'vlm-doctor plan --help'."),
        (["plan", "m", "--batch", "x"], "--batch: 'x' is not a whole number; write digits, such as 1."),
        (["plan", "m", "--max-gpus=٣"], "--max-gpus: '٣' is not a whole number; write digits, such as 2."),
        (["plan", "m", "--images", "1e3"], "--images: '1e3' is not a whole number; write digits, such as 1."),
        (["plan", "m", "--dtype=bf16"], "--dtype: 'bf16' is none of float32, bfloat16, float16; did you mean bfloat16?"),
        (["--gpus", "0,0"], "--gpus: '0,0' names a GPU twice; name each once."),
        (["--gpus", "x"], "--gpus: 'x' is not a list of GPU indices; write them with commas, such as 0,1."),
        (["--mach", "2xL4"], "'--mach' is no option of vlm-doctor check; did you mean --machine? "
         "Try 'vlm-doctor check --help'."),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    "option",
    [
        "--dtype",
        "--quantization",
        "--attention",
        "--logits",
        "--format",
        "--prefer",
        "--allocator",
        "--training",
        "--optimizer",
    ],
)
def test_other_words_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"^{option}: 'x' is none of .*[.?]$"):
        parse(["plan", "m", option, "x"])


def test_python_is_a_format_of_plans_only() -> None:
    assert parse(["plan", "m", "--format", "python"]).format == "python"
    with pytest.raises(UsageError, match="'python' is none of terminal, json, github, junit"):
        parse(["--format", "python"])


def test_json_is_short_for_the_format() -> None:
    assert parse([]).format == "terminal"
    assert parse(["--json"]).format == "json"


def test_ignore_may_be_repeated_and_leaves_no_trace() -> None:
    assert parse(["--ignore", "VLM503", "--ignore", "VLM5"]).ignore == ["VLM503", "VLM5"]
    assert parse([]).ignore == []


def test_without_options_workload_and_policy_are_the_default_ones() -> None:
    options = parse(["plan", "m"])

    assert workload(options) == Workload()
    assert policy(options) == Policy()


def test_every_option_of_plan_arrives() -> None:
    words = (
        "plan m --machine 2xL4 --gpus 1,0 --images 2 --image-size 640x480 --text-tokens 1 --new-tokens 3 --batch 4 "
        "--dtype float16 --quantization nf4 --attention eager --logits forward --max-gpus 2 --min-gpus 2 "
        "--headroom 2GiB --offline --json --output f.json --verbose --allocator expandable --prefer context "
        "--exclude 3,4 --exclude 6 --pin model.visual=1 --pin lm_head=0 --max-memory 0=20GiB,1=1GiB --max-memory 2=2GiB "
        "--offload --suggest-gpus "
        "--families own.toml --training lora --optimizer sgd --lora-rank 8 --no-gradient-checkpointing"
    )
    options = parse(words.split())

    assert workload(options) == Workload(
        images=2,
        image_width=640,
        image_height=480,
        text_tokens=1,
        new_tokens=3,
        batch=4,
        dtype="float16",
        quantization="nf4",
        attention="eager",
        logits="forward",
        allocator="expandable",
        training=Training(method="lora", optimizer="sgd", lora_rank=8, gradient_checkpointing=False),
    )
    assert policy(options) == Policy(
        gpus=(1, 0),
        max_gpus=2,
        min_gpus=2,
        headroom_fraction=0.0,
        headroom_min_bytes=2 * GIB,
        prefer="context",
        exclude=(3, 4, 6),
        pins=(("model.visual", 1), ("lm_head", 0)),
        max_memory=((0, 20 * GIB), (1, GIB), (2, 2 * GIB)),
        offload=True,
    )
    assert options.suggest_gpus
    assert (options.model, options.machine, options.offline, options.format) == ("m", "2xL4", True, "json")
    assert (options.output, options.verbose, options.families) == (Path("f.json"), True, Path("own.toml"))


def test_training_has_the_usual_details_unless_they_are_given() -> None:
    assert workload(parse(["plan", "m", "--training", "full"])).training == Training(method="full")
    assert workload(parse(["plan", "m", "--training", "lora"])).training == Training()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer sgd", "--optimizer is about training: add --training lora or --training full."),
        ("--lora-rank 4", "--lora-rank is about training: add --training lora or --training full."),
        ("--lora-rank 0", "--lora-rank is about training: add --training lora or --training full."),
        (
            "--no-gradient-checkpointing",
            "--no-gradient-checkpointing is about training: add --training lora or --training full.",
        ),
        (
            "--training full --lora-rank 4",
            "--lora-rank is about adapters: use it with --training lora, or leave it out.",
        ),
    ],
)
def test_details_of_training_without_training_are_refused(words: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        workload(parse(["plan", "m", *words.split()]))
    assert str(caught.value) == message


def test_every_option_of_check_and_collect_arrives() -> None:
    words = "check --machine x.json --model m --no-torch --fresh-torch --strict"
    options = parse(words.split())
    assert (options.machine, options.model) == ("x.json", "m")
    assert (options.no_torch, options.fresh_torch, options.strict) == (True, True, True)
    words = "collect --no-redact --no-torch --fresh-torch -o f"
    options = parse(words.split())
    assert (options.redact, options.no_torch, options.fresh_torch, options.output) == (False, True, True, Path("f"))


@pytest.mark.parametrize("word", ["--images=--", "--gpus=--", "--format=--", "-o=--"])
def test_two_dashes_are_no_value(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(["plan", "m", word])

    assert str(caught.value) == f"{word!r} gives no value; write one after the =."


@pytest.mark.parametrize("words", [["--json", "--format", "terminal"], ["--format=terminal", "--json"]])
def test_json_wins(words: list[str]) -> None:
    assert parse(words).format == "json"
