"""What is published of a machine: nothing private of the original, and still the same diagnosis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from vlm_doctor.checks import diagnose
from vlm_doctor.codec import machine_from_json, to_json
from vlm_doctor.machine import (
    Checkpoint,
    FileSetting,
    Gap,
    GpuProcess,
    Machine,
    Package,
    TorchDevice,
    TorchView,
    VersionRule,
)
from vlm_doctor.redaction import _Scrubber, redact
from vlm_doctor.sources import load_machine
from vlm_doctor.sources.identity import private_words
from vlm_doctor.visibility import visible_gpus

MACHINES = Path(__file__).parents[1] / "machines"
NAMES = sorted(path.stem for path in MACHINES.glob("*.json"))


def machine(name: str = "2xl4-idle") -> Machine:
    return load_machine(str(MACHINES / f"{name}.json"))


@pytest.mark.parametrize("name", NAMES)
def test_the_diagnosis_is_the_same(name: str) -> None:
    original = machine(name)
    again = machine_from_json(to_json(redact(original)).encode(), where="again")

    was, is_ = diagnose(original), diagnose(again)

    assert [(o.code, o.state, len(o.findings)) for o in was.outcomes] == [
        (o.code, o.state, len(o.findings)) for o in is_.outcomes
    ]
    assert visible_gpus(original).gpus == visible_gpus(again).gpus


@pytest.mark.parametrize("name", NAMES)
def test_no_uuid_of_the_original_is_left(name: str) -> None:
    original = machine(name)
    text = to_json(redact(original)).lower()

    for gpu in original.gpus:
        if not gpu.uuid:
            continue
        assert gpu.uuid.lower() not in text
        assert gpu.uuid.lower().partition("-")[2] not in text


# Words that cannot be there by chance: in no vocabulary, in no fact of the machine.
WORD = st.text("bdfghjkmqvwxz", min_size=6, max_size=12)
OCTET = st.integers(1, 254)
TOKEN = st.text("abcdefghjkmnpqrstuvwxyz0123456789", min_size=20, max_size=30)


KINDS = ["home", "path", "mail", "url", "ip", "ipv6", "mac", "token", "assignment", "windows", "blank", "key"]


@st.composite
def secrets(draw: st.DrawFn) -> tuple[str, str]:
    """A secret, and a text that holds it as machines do."""
    word = draw(WORD)
    kind = draw(
        st.sampled_from(
            ["home", "path", "mail", "url", "ip", "ipv6", "mac", "token", "assignment", "windows", "blank", "key"]
        )
    )
    if kind == "ip":
        word = ".".join(str(draw(OCTET)) for _ in range(4))
        return word, f"connect to {word} failed"
    if kind == "ipv6":
        word = ":".join(f"{draw(st.integers(4096, 65535)):x}" for _ in range(8))
        return word, f"connect to [{word}]:443 failed"
    if kind == "mac":
        word = ":".join(f"{draw(OCTET):02x}" for _ in range(6))
        return word, f"interface {word} is down"
    if kind == "token":
        word = draw(TOKEN)
        return word, f"{draw(st.sampled_from(['hf_', 'ghp_', 'sk-', 'glpat-']))}{word}"
    if kind == "key":
        word = f"{draw(TOKEN)}{draw(TOKEN)}a1"
        return word, f"key {word}"
    texts = {
        "home": f"cannot open /home/{word}/venv/lib/python3.12/x.so",
        "path": f"/data/{word}/venv/lib/python3.12/site-packages",
        "mail": f"ask {word}@example.com about it",
        "url": f"proxy http://{word}.corp.example:3128/simple refused",
        "assignment": f"retry with token={word} later",
        "windows": rf"C:\Users\{word}\AppData",
        "blank": f"/mnt/c/Users/{word}/models",
    }
    return word, texts[kind]


@settings(deadline=None)
@given(secrets(), st.sampled_from(["message", "gap", "environment", "path", "process", "location", "error", "description"]))
def test_no_secret_of_the_original_is_left_wherever_it_stood(secret: tuple[str, str], place: str) -> None:
    word, text = secret
    original = machine()
    assume(word not in to_json(original))
    hidden = planted(original, text, place)

    assert word in json.dumps(json.loads(to_json(hidden)), ensure_ascii=False).replace("\\\\", "\\")
    assert word not in to_json(redact(hidden))


def planted(one: Machine, text: str, place: str) -> Machine:
    assert one.host is not None
    assert one.libraries is not None
    if place == "message":
        return replace(one, torch=TorchView(state="failed", message=text))
    if place == "gap":
        return replace(one, gaps=(Gap(path="host", reason=text),))
    if place == "environment":
        return replace(one, environment={"NCCL_TOPO_FILE": text, "HF_HOME": text, "CUDA_CACHE_PATH": text, "NCCL_X": text})
    if place == "path":
        return replace(one, host=replace(one.host, hf_cache=text))
    if place == "location":
        packages = (Package(name="torch", version="2.13.0", location=text),)
        return replace(one, libraries=replace(one.libraries, executable=text, packages=packages))
    if place == "error":
        return replace(one, gpus=(replace(one.gpus[0], error=text), one.gpus[1]))
    if place == "description":
        return replace(one, description=text)
    process = GpuProcess(pid=1, kind="compute", user=text, command=text)
    return replace(one, gpus=(replace(one.gpus[0], processes=(process,)), one.gpus[1]))


@settings(deadline=None)
@given(WORD, WORD)
def test_names_of_the_host_and_the_user_go_as_whole_words(user: str, host: str) -> None:
    assume(user not in host and host not in user)
    text = f"{user} on {host}.cluster: job {host} of {user.upper()} failed; x{user} stays"
    cleaned = redact(replace(machine(), gaps=(Gap(path="host", reason=text),)), secrets=(user, host, "a", "lib"))

    assert cleaned.gaps[0].reason == f"REDACTED on REDACTED.cluster: job REDACTED of REDACTED failed; x{user} stays"


def test_the_same_folder_has_the_same_name_everywhere() -> None:
    one = replace(
        machine(),
        environment={
            "LD_LIBRARY_PATH": "/data/team/lib:/data/team/cuda-12.8/compat:/usr/local/cuda/lib64/stubs",
            "HF_HOME": "/data/team/hf",
        },
    )

    assert redact(one).environment == {
        "LD_LIBRARY_PATH": "/data/dir1/lib:/data/dir1/cuda-12.8/compat:/usr/local/cuda/lib64/stubs",
        "HF_HOME": "/data/dir1/hf",
    }


def test_the_beginning_of_a_uuid_still_names_the_same_gpus() -> None:
    one = machine()
    first, second = (gpu.uuid for gpu in one.gpus)
    for value in (first[:8], first[:12], f"{second},{first[:10]}", first[:6], "GPU-ffffffff", "GPU-"):
        masked = replace(one, environment={"CUDA_VISIBLE_DEVICES": value})
        cleaned = redact(masked)

        assert visible_gpus(cleaned).gpus == visible_gpus(masked).gpus, value


def test_the_beginning_of_two_uuids_still_names_none() -> None:
    one = machine()
    alike = replace(one, gpus=(one.gpus[0], replace(one.gpus[1], uuid=one.gpus[0].uuid[:-1] + "0")))
    masked = replace(alike, environment={"CUDA_VISIBLE_DEVICES": one.gpus[0].uuid[:12]})

    assert visible_gpus(masked).gpus == visible_gpus(redact(masked)).gpus == ()


def test_torchs_own_uuids_still_match() -> None:
    one = machine()
    devices = tuple(
        TorchDevice(ordinal=number, uuid=gpu.uuid.removeprefix("GPU-")) for number, gpu in enumerate(reversed(one.gpus))
    )
    mixed = replace(one, torch=TorchView(state="ok", device_count=2, devices=devices))

    assert visible_gpus(redact(mixed)).gpus == visible_gpus(mixed).gpus == (1, 0)


def test_what_looks_private_and_is_not_stays() -> None:
    text = (
        "ImportError: /usr/lib/x86_64-linux-gnu/libcudnn.so.9: undefined symbol: "
        "_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE at 0000:3b:00.0, driver "
        "580.95.05, see https://pytorch.org/get-started/"
    )

    assert redact(replace(machine(), gaps=(Gap(path="torch", reason=text),))).gaps[0].reason == text


def test_where_a_rule_was_read_stays_unless_it_is_somebodys_folder() -> None:
    one = machine()
    assert one.libraries is not None
    rules = tuple(
        VersionRule(requirer="transformers", requirement="torch>=2.6", source=source)
        for source in ("transformers/utils/import_utils.py", "/home/ana/ours/rules.py")
    )

    cleaned = redact(replace(one, libraries=replace(one.libraries, rules=rules))).libraries

    assert cleaned is not None
    assert [rule.source for rule in cleaned.rules] == ["transformers/utils/import_utils.py", "~/dir1/dir2"]


def test_addresses_of_public_hosts_stay_and_others_have_one_name_each() -> None:
    text = "https://huggingface.co and http://mirror.corp:8080 and https://mirror.corp and https://other.corp"

    cleaned = redact(replace(machine(), gaps=(Gap(path="torch", reason=text),))).gaps[0].reason

    assert cleaned == "https://huggingface.co and http://host1 and https://host1 and https://host2"


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_can_be_redacted(text: str) -> None:
    redact(replace(machine(), description=text, environment={"HF_HOME": text}), secrets=(text,))


def words_of(annotation: object) -> Iterator[str]:
    """What a field may hold besides free text: the words of its closed vocabulary."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    for inner in get_args(annotation):
        yield from words_of(inner)


def records_of(record: type) -> Iterator[type]:
    """A record, and every record in its fields."""
    yield record
    for annotation in get_type_hints(record).values():
        for inner in (annotation, *get_args(annotation), *(a for part in get_args(annotation) for a in get_args(part))):
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                yield from records_of(inner)


def test_a_secret_that_is_a_word_of_a_vocabulary_changes_none() -> None:
    """A user may be called as a state of a GPU: what comes out must still be a machine."""
    vocabularies = {
        name: set(words_of(annotation))
        for record in records_of(Machine)
        for name, annotation in get_type_hints(record).items()
        if set(words_of(annotation))
    }
    assert {"virtualization", "slowdowns", "mps", "nvml_state", "path", "remote"} <= set(vocabularies)
    scrubber = _Scrubber((), (), {word for words in vocabularies.values() for word in words})

    for name, words in vocabularies.items():
        assert [scrubber.record(word, name) for word in words] == list(words), name


def test_words_that_are_private_come_from_the_process() -> None:
    words = private_words({"USER": "ana", "HOME": "/data/users/ana", "HOSTNAME": "gpu01.example", "LOGNAME": "root"})

    assert {"ana", "gpu01.example"} <= set(words)
    assert "root" not in words
    assert "" not in private_words({})


def test_names_of_checkpoints_and_settings_files() -> None:
    machine = Machine(
        origin="live",
        description="x",
        checkpoints=(Checkpoint(repo="acme/secret-model", lost_calls=("_extract_past_from_model_output",)),),
        nccl_settings=(FileSetting(name="NCCL_TOPO_FILE", value="/cluster/acme/topo.xml", file="/etc/nccl.conf"),),
    )
    clean = redact(machine)
    assert "acme" not in to_json(clean)
    assert clean.checkpoints[0].lost_calls == machine.checkpoints[0].lost_calls
    assert clean.nccl_settings[0].file == "/etc/nccl.conf"
