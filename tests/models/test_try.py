"""The child of ``vlm-doctor try`` with tiny checkpoints on the CPU, in this process; once as a user starts it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]
import formulas_and_traces  # noqa: E402 - of the benchmarks
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from pytest_vlmgpu.testing import TINY_FAMILIES  # noqa: E402
from vlm_doctor import load_profile  # noqa: E402
from vlm_doctor.probes import try_child, try_prompt  # noqa: E402
from vlm_doctor.probes.loading import load_processor  # noqa: E402
from vlm_doctor.probes.trial_run import _blocks, understand, work_of  # noqa: E402
from vlm_doctor.sources.child import Outcome  # noqa: E402
from vlm_doctor.trace import Pictures  # noqa: E402
from vlm_doctor.trial import Attempt  # noqa: E402
from vlm_doctor.workload import Workload  # noqa: E402

from ..until import is_running, until  # noqa: E402

CALL = Workload(text_tokens=60, new_tokens=4, image_width=112, image_height=56)
LLAVA = Workload(text_tokens=60, new_tokens=4)


def tried(folder: Path, workload: Workload = LLAVA, *, before: Callable[[Any], None] | None = None, **more: Any) -> Attempt:
    """What the child tells; its steps are heard as the parent hears them."""
    profile = load_profile(str(folder))
    heard: list[tuple[str, dict[str, Any]]] = []

    def say(stage: str, answer: dict[str, Any], *, is_final: bool = False) -> None:
        heard.append((stage, json.loads(json.dumps(answer))))

    arguments: dict[str, Any] = {
        "name": str(folder),
        "revision": None,
        "device_map": None,
        "dtype": "float32",
        "attention": "sdpa",
        "quantization": None,
        "trust_remote_code": False,
        "work": work_of(profile, workload),
        "blocks": _blocks(profile),
    }
    try_child.main(say, **{**arguments, **more})
    stage, answer = heard[-1]
    assert stage == "end"
    return understand(Outcome(state="ok", answer=answer, stage=stage), "cpu")


@pytest.fixture
def copy(tiny_vlms: Mapping[str, Path], tmp_path: Path) -> Path:
    """A tiny LLaVA that may be damaged."""
    return Path(shutil.copytree(tiny_vlms["llava"], tmp_path / "copy"))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_tiny_model_of_each_family_loads_and_answers(tiny_vlms: Mapping[str, Path], family: str) -> None:
    attempt = tried(tiny_vlms[family], CALL)

    assert attempt.state == "ran", attempt.traceback
    assert (attempt.reached, attempt.new_tokens) == ("second call", 4)
    assert (attempt.is_finite, attempt.is_repeatable) == (True, True)
    assert (attempt.astray_count, attempt.cut_count, attempt.missing_count) == (0, 0, 0)
    assert attempt.notes == ()
    planned = work_of(load_profile(str(tiny_vlms[family])), CALL)["prompt_tokens"]
    assert attempt.prompt_tokens == pytest.approx(planned, abs=8)
    assert len(attempt.text or "") == 4
    assert set(attempt.held_bytes) == {"cpu"}


def test_prompts_of_a_batch_with_several_images_or_none(tiny_vlms: Mapping[str, Path]) -> None:
    two = Workload(images=2, batch=2, text_tokens=60, new_tokens=2, image_width=56, image_height=56)
    many = tried(tiny_vlms["qwen2_vl"], two)
    none = tried(tiny_vlms["llava"], Workload(images=0, text_tokens=60, new_tokens=2))

    assert (many.state, many.notes, many.is_repeatable) == ("ran", (), True), many.traceback
    assert (none.state, none.notes, none.is_repeatable) == ("ran", (), True), none.traceback


def test_weights_that_are_missing_are_named(copy: Path) -> None:
    change_weights(copy, lambda tensors: tensors.pop("language_model.model.norm.weight"))

    attempt = tried(copy)

    assert attempt.state == "ran"
    assert attempt.missing_count == 1
    assert "norm.weight" in attempt.missing[0]


def test_logits_that_are_no_numbers_are_seen(copy: Path) -> None:
    change_weights(copy, lambda tensors: tensors["language_model.lm_head.weight"].fill_(float("nan")))

    assert tried(copy).is_finite is False


def test_an_error_is_told_with_its_traceback(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config["text_config"]["intermediate_size"] += 8
    (copy / "config.json").write_text(json.dumps(config), "utf-8")

    attempt = tried(copy)

    assert (attempt.state, attempt.reached) == ("raised", "imports")
    assert attempt.traceback is not None
    assert attempt.traceback.startswith("Traceback (most recent call last)")


def test_a_checkpoint_without_processor_is_called_all_the_same(copy: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (copy / name).unlink()

    attempt = tried(copy)

    assert (attempt.state, attempt.is_finite) == ("ran", True)
    assert attempt.text is None
    assert attempt.notes[0].startswith("Its processor makes no prompt here (")


@pytest.mark.parametrize(("family", "prompt_tokens"), [("pix2struct", 1), ("kosmos-2.5", 46)])
def test_flat_patches_keep_the_places_that_stand_before_their_pixels(
    tmp_path: Path, family: str, prompt_tokens: int
) -> None:
    """Without a processor; noise there is no row of a table. The decoder of Pix2Struct begins by itself."""
    if family not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(0)
    config = formulas_and_traces.tiny_config(family)
    transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)

    attempt = tried(tmp_path, Workload(text_tokens=40, new_tokens=2))

    assert (attempt.state, attempt.reached) == ("ran", "second call"), attempt.traceback
    assert attempt.prompt_tokens == prompt_tokens


def test_a_prompt_of_shapes_has_room_for_a_word_behind_each_image(copy: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (copy / name).unlink()
    several = Workload(images=3, text_tokens=1, new_tokens=2)
    planned = work_of(load_profile(str(copy)), several)

    attempt = tried(copy, several)

    assert attempt.state == "ran", attempt.traceback
    assert attempt.prompt_tokens == planned["image_tokens"] + 3 == planned["prompt_tokens"] + 2


@pytest.mark.parametrize("is_trusted", [False, True])
def test_parts_of_a_processor_run_code_of_a_checkpoint_only_where_it_is_trusted(
    is_trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without torchvision, where each part is loaded by itself: unless it is told, transformers asks at the terminal."""
    told: list[bool | None] = []

    class Family:
        @staticmethod
        def get_processor_dict(name: str, revision: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
            return {}, {}

        @classmethod
        def from_args_and_dict(cls, parts: list[Any], settings: dict[str, Any]) -> list[Any]:
            return parts

    def whole(name: str, **more: Any) -> None:
        raise ImportError("torchvision")

    def part(name: str, *, revision: str | None, trust_remote_code: bool | None = None) -> str:
        told.append(trust_remote_code)
        return name

    made = SimpleNamespace(
        AutoProcessor=SimpleNamespace(from_pretrained=whole),
        AutoImageProcessor=SimpleNamespace(from_pretrained=part),
        AutoTokenizer=SimpleNamespace(from_pretrained=part),
        PROCESSOR_MAPPING={SimpleNamespace: Family},
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    parts = load_processor(made, "org/vlm", None, SimpleNamespace(), trust_remote_code=is_trusted)
    assert parts == ["org/vlm", "org/vlm", None]
    assert told == [is_trusted, is_trusted]


def test_noise_is_in_the_place_of_pixels_alone() -> None:
    sizes = torch.tensor([[2, 3]])
    noise = try_prompt._noise_like([torch.zeros(3, 4), (torch.zeros(2), sizes), "same"])

    assert [noise[0].shape, noise[1][0].shape] == [(3, 4), (2,)]
    assert float(noise[0].abs().sum()) > 0 < float(noise[1][0].abs().sum())
    assert noise[1][1] is sizes
    assert noise[2] == "same"


def test_tensors_are_held_against_the_map(tiny_vlms: Mapping[str, Path]) -> None:
    assert tried(tiny_vlms["llava"], device_map={"": "cpu"}).astray_count == 0

    trial = try_child._Trial(lambda *args, **kwargs: None, {})
    trial.import_libraries()
    trial.load(
        str(tiny_vlms["llava"]),
        None,
        None,
        dtype="float32",
        attention="eager",
        quantization=None,
        trust_remote_code=False,
    )
    trial.look({"model": 0, "lm_head": "cpu"}, [])
    answer = trial._answer
    body = trial._model.model
    assert answer["astray_count"] == len([*body.parameters(), *body.buffers()])
    assert answer["astray"][0].endswith(" is on cpu, planned cuda:0")
    trial.look({"model": "cpu"}, [])
    assert answer["astray"] == ["lm_head.weight is on cpu, planned nowhere"]


def test_buffers_of_a_layer_in_host_memory_are_where_it_is_computed() -> None:
    # As accelerate leaves a layer that is offloaded: weights on meta, what is no weight on the GPU.
    place = {"model.layers.1.mlp.weight": "meta", "model.layers.0.mlp.weight": "cuda:0"}
    weights = {key: SimpleNamespace(device=device, nbytes=8) for key, device in place.items()}
    buffers = {"model.layers.1.scalar": SimpleNamespace(device="cuda:0", nbytes=4)}
    trial = try_child._Trial(lambda *args, **kwargs: None, {})
    trial._model = SimpleNamespace(named_parameters=weights.items, named_buffers=buffers.items)

    trial.look({"model.layers.0": 0, "model.layers.1": "cpu"}, ["model.layers.0", "model.layers.1"])
    assert (trial._answer["astray"], trial._answer["cut_blocks"]) == ([], [])
    assert trial._answer["held_bytes"] == {"meta": 8, "cuda:0": 12}
    trial.look({"model.layers.0": 0, "model.layers.1": 1}, [])
    assert trial._answer["astray_count"] == 2


def test_auto_beside_it_as_a_user_starts_it(tiny_vlms: Mapping[str, Path]) -> None:
    words = [sys.executable, "-m", "vlm_doctor", "try", str(tiny_vlms["llava"]), "--cpu", "--beside-auto", "--json"]
    ran = subprocess.run([*words, "--text-tokens", "60"], capture_output=True, text=True, timeout=300, check=False)

    report = json.loads(ran.stdout)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [(one["route"], one["state"]) for one in report["trial"]["attempts"]] == [("cpu", "ran"), ("auto", "ran")]
    assert report["trial"]["is_good"] is True


def test_a_trial_ends_with_the_process_that_asked_for_it(tiny_vlms: Mapping[str, Path]) -> None:
    words = [sys.executable, "-m", "vlm_doctor", "try", str(tiny_vlms["llava"]), "--cpu", "--text-tokens", "60"]
    asker = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        child = until(lambda: next(iter(children_of(asker.pid)), None))
        # Once torch is on its way, the program is past its first lines.
        until(lambda: "libtorch" in Path(f"/proc/{child}/maps").read_text("utf-8"))
    finally:
        asker.kill()
        asker.wait()

    until(lambda: not is_running(child))


def children_of(pid: int) -> list[int]:
    found = [Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()]
    programs = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in found[0]}
    return [child for child, command in programs.items() if b"probes.try_child" in command]


def shaped(forward: Any, config: SimpleNamespace, **work: int) -> dict[str, Any]:
    """Inputs for a class with such a ``forward``."""
    kind = type("Remote", (), {"forward": forward})
    model = kind()
    model.config = config
    pictures = Pictures(
        images=1, height=28, width=28, sequences=1, run_height=28, run_width=28, patches=4, patch=14, merge=1
    )
    call = {"batch": 2, "pictures": pictures, "image_tokens": 6, "prompt_tokens": 20}
    return try_prompt._by_shape(model, {**call, **work}, "nowhere")


def test_code_of_checkpoints_is_given_images_as_it_wants_them() -> None:
    def cogvlm(self: Any, input_ids: Any, images: Any, token_type_ids: Any, position_ids: Any) -> None: ...
    def glm4v(self: Any, input_ids: Any, images: Any, position_ids: Any) -> None: ...
    def other(self: Any, input_ids: Any, images: Any, **more: Any) -> None: ...

    config = SimpleNamespace(boi_token_id=91, eoi_token_id=92)

    cog = shaped(cogvlm, config)
    assert cog["token_type_ids"].sum(dim=1).tolist() == [6, 6]
    assert [[image.shape for image in row] for row in cog["images"]] == [[(3, 28, 28)], [(3, 28, 28)]]
    glm = shaped(glm4v, config)
    assert glm["input_ids"].shape == (2, 20 - 6 + 3)
    assert glm["input_ids"][0, :3].tolist() == [91, 5, 92]
    assert glm["images"].shape == (2, 3, 28, 28)
    model = SimpleNamespace(config=config)
    assert try_prompt._length(glm, model, {"image_tokens": 6}) == 20
    plain = shaped(other, config)
    assert plain["input_ids"].shape == (2, 20)
    assert try_prompt._length(plain, model, {"image_tokens": 6}) == 20
