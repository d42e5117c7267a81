from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlm_doctor.errors import ModelError, ModelNotFoundError
from vlm_doctor.sources import hub
from vlm_doctor.sources.hub_cache import HubId, find_snapshot, hub_settings, parse_hub_id
from vlm_doctor.sources.model_files import load_profile

Write = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Site:
    """A hub on the loopback address: serves one folder as ``org/vlm``, and notes what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: Site | None = None
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.sent_bytes = 0
        self.ranges_left = 1000
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                site.answer(self)

        return Handler

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        prefix, _, name = request.path.partition("/resolve/main/")
        self.asked.append((request.path, request.headers["Range"], request.headers["Authorization"]))
        path = self.folder / name
        if name in self.answers:
            status, headers = self.answers[name]
            self._reply(request, status, headers)
        elif prefix != "/org/vlm" or not path.is_file():
            self._reply(request, 404, {"X-Error-Code": "EntryNotFound" if prefix == "/org/vlm" else "RepoNotFound"})
        elif self.store is not None and name.endswith(".safetensors"):
            self._reply(request, 302, {"Location": self.store.url + request.path})
        else:
            self._send(request, path)

    def _reply(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": "0", **headers}.items():
            request.send_header(key, value)
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, path: Path) -> None:
        size, wanted = path.stat().st_size, request.headers["Range"]
        first, last = 0, size - 1
        if wanted and self.ranges_left > 0:
            self.ranges_left -= 1
            first, last = (int(bound) for bound in wanted.removeprefix("bytes=").split("-"))
            last = min(last, size - 1)
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(last - first + 1))
        request.end_headers()
        with path.open("rb") as file:
            file.seek(first)
            left = last - first + 1
            try:
                while left > 0:
                    piece = file.read(min(left, 2**16))
                    request.wfile.write(piece)
                    self.sent_bytes += len(piece)
                    left -= len(piece)
            except OSError:  # The client has read enough.
                request.close_connection = True


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_TOKEN_PATH",
        "HUGGING_FACE_HUB_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = Site(tmp_path / "served")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", served.url + "/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield served
    served.close()


@pytest.fixture
def store(site: Site) -> Iterator[Site]:
    """A second host, to which the first redirects the weights."""
    served = Site(site.folder)
    site.store = served
    yield served
    served.close()


def refusal(name: str = "org/vlm", allow_network: bool = True) -> str:
    with pytest.raises(ModelError) as raised:
        load_profile(name, allow_network=allow_network)
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix("org/vlm/")


@pytest.mark.parametrize("shards", [1, 20])
def test_a_model_on_the_hub_is_read_by_its_headers(site: Site, write_checkpoint: Write, shards: int) -> None:
    local = load_profile(str(write_checkpoint(folder=site.folder, shards=shards)))
    remote = load_profile("org/vlm")
    assert remote.units == local.units
    assert (remote.origin, remote.name, remote.files) == ("hub", "org/vlm", local.files)
    assert {wanted for path, wanted, _ in site.asked if path.endswith(".safetensors")} == {"bytes=0-131071"}


def test_a_header_longer_than_the_first_range_is_asked_for_again(
    site: Site, write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = load_profile(str(write_checkpoint(folder=site.folder)))
    monkeypatch.setattr(hub, "FIRST_RANGE_BYTES", 100)
    assert load_profile("org/vlm").units == local.units
    assert len([path for path, _, _ in site.asked if path.endswith("model.safetensors")]) == 2


def test_a_server_without_ranges_is_not_downloaded(site: Site, write_checkpoint: Write) -> None:
    tensors = {
        "language_model.model.embed_tokens.weight": ("F16", [32, 8]),
        "language_model.model.layers.0.mlp.up_proj.weight": ("F32", [2**12, 2**16]),
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {"hidden_size": 8, "num_hidden_layers": 1},
    }
    folder = write_checkpoint(config, tensors, folder=site.folder)
    site.ranges_left = 0
    assert load_profile("org/vlm").stored_bytes == 2**30 + 512
    assert (folder / "model.safetensors").stat().st_size > 2**30
    assert site.sent_bytes < 2**26


def test_a_truncated_file_on_the_hub_is_found_by_its_size(site: Site, write_checkpoint: Write) -> None:
    shard = write_checkpoint(folder=site.folder) / "model.safetensors"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1)
    assert refusal() == f"model.safetensors: truncated, {size - 1:,} of {size:,} bytes are there; download it again."


def test_the_token_does_not_follow_a_redirect_to_another_host(site: Site, store: Site, write_checkpoint: Write) -> None:
    write_checkpoint(folder=site.folder, shards=2)
    load_profile("org/vlm")
    assert {token for _, _, token in site.asked} == {"Bearer hf_secret"}
    assert len(store.asked) == 2
    assert {token for _, _, token in store.asked} == {None}
    assert {wanted for _, wanted, _ in store.asked} == {"bytes=0-131071"}


def test_the_token_follows_a_redirect_on_the_same_host(site: Site, write_checkpoint: Write) -> None:
    write_checkpoint(folder=site.folder)
    site.answers["config.json"] = (308, {"Location": "/org/vlm/resolve/main/config2.json"})
    shutil.copy(site.folder / "config.json", site.folder / "config2.json")
    load_profile("org/vlm")
    assert [token for path, _, token in site.asked if path.endswith("config2.json")] == ["Bearer hf_secret"]


@pytest.mark.parametrize("text", ["hf_file", "hf_file\n", "two words", "line\r\nX: y", ""])
def test_the_token_file_is_used_when_it_holds_a_token(
    site: Site, write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    write_checkpoint(folder=site.folder)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(text)
    load_profile("org/vlm")
    assert site.asked[0][2] == ("Bearer hf_file" if text.strip() == "hf_file" else None)


def test_an_implicit_token_can_be_turned_off(
    site: Site, write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_checkpoint(folder=site.folder)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("hf_file")
    load_profile("org/vlm")
    assert site.asked[0][2] is None


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "org/vlm: is gated; accept its terms at {url}/org/vlm and set HF_TOKEN."),
        (
            401,
            "RepoNotFound",
            "org/vlm: does not exist on the hub, or needs permission; check the name, or set HF_TOKEN.",
        ),
        (
            403,
            "",
            "org/vlm: does not exist on the hub, or needs permission; check the name, or set HF_TOKEN.",
        ),
        (404, "RepoNotFound", "org/vlm: does not exist on the hub; check the name."),
        (404, "RevisionNotFound", "org/vlm: has no revision 'main' on the hub; correct the part after @."),
        (404, "EntryNotFound", "org/vlm: has no config.json on the hub; it is not a model for transformers."),
        (416, "", "org/vlm: config.json is empty on the hub; choose another revision."),
        (429, "", "org/vlm: the hub refuses more requests for now; wait, or set HF_TOKEN."),
        (503, "", "org/vlm: the hub answers with error 503 for config.json; try again later."),
    ],
)
def test_a_refusal_becomes_a_sentence(site: Site, status: int, code: str, expected: str) -> None:
    site.answers["config.json"] = (status, {"X-Error-Code": code})
    assert refusal() == expected.format(url=site.url)


def test_a_revision_is_part_of_the_address(site: Site) -> None:
    refusal("org/vlm@refs/pr/3")
    assert site.asked[0][0] == "/org/vlm/resolve/refs%2Fpr%2F3/config.json"


def test_a_model_without_safetensors_on_the_hub_is_refused(site: Site, write_checkpoint: Write) -> None:
    (write_checkpoint(folder=site.folder) / "model.safetensors").unlink()
    assert refusal() == (
        "org/vlm: has no safetensors files on the hub, and the header of a .bin file is at its end; download the model and "
        "name its folder, or convert it with save_pretrained."
    )


def test_a_config_without_end_is_not_read(site: Site, write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(folder=site.folder)
    monkeypatch.setattr(hub, "MAX_JSON_BYTES", 10)
    assert refusal() == "config.json: more than 10 bytes on the hub; do not trust it."


def test_a_hub_that_breaks_off_inside_a_header_is_reported(
    site: Site, write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(folder=site.folder)
    monkeypatch.setattr(hub, "FIRST_RANGE_BYTES", 100)
    site.ranges_left = 1
    assert refusal() == "model.safetensors: the hub breaks off inside its header; try again later."


def test_a_broken_processor_on_the_hub_is_as_good_as_none(site: Site, write_checkpoint: Write) -> None:
    (write_checkpoint(folder=site.folder) / "preprocessor_config.json").write_text("not json")
    assert load_profile("org/vlm").image is not None


def test_a_shard_missing_on_the_hub_is_named(site: Site, write_checkpoint: Write) -> None:
    (write_checkpoint(folder=site.folder, shards=9) / "model-00004-of-00009.safetensors").unlink()
    assert refusal() == (
        "model-00004-of-00009.safetensors: is missing on the hub, though model.safetensors.index.json lists it; "
        "choose another revision."
    )


def test_an_index_on_the_hub_may_not_lead_elsewhere(site: Site, write_checkpoint: Write) -> None:
    folder = write_checkpoint(folder=site.folder, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../other/x"}}))
    assert refusal().endswith("which is not a name inside the folder; do not trust it.")
    assert not [path for path, _, _ in site.asked if "other" in path]


def test_a_circle_of_redirects_ends(site: Site) -> None:
    site.answers["config.json"] = (302, {"Location": "/org/vlm/resolve/main/config.json"})
    assert "error 302 for config.json" in refusal()


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[", "http://127.0.0.1:notaport/"])
def test_a_redirect_to_no_web_address_is_not_followed(site: Site, location: str) -> None:
    site.answers["config.json"] = (302, {"Location": location})
    refusal()


def test_a_server_that_breaks_off_is_reported(site: Site) -> None:
    site.answers["config.json"] = (200, {"Content-Length": "100", "Connection": "close"})
    assert "\n" not in refusal()


def test_a_server_that_speaks_no_http_is_reported_in_one_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mail\tserver\r\n")
                connection.recv(2**16)

        thread = threading.Thread(target=greet)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert "cannot be reached (220 mail server)" in refusal()
        thread.join()


def test_a_host_that_does_not_answer_is_reported(site: Site) -> None:
    site.close()
    assert refusal() == (
        f"org/vlm: {site.url} cannot be reached ([Errno 111] Connection refused); check the network or HF_ENDPOINT, "
        "or name a local folder."
    )
    site.server = ThreadingHTTPServer(("127.0.0.1", 0), site._handler())
    site._thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    site._thread.start()


def test_a_silent_server_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "DEADLINE_S", 0.0)
    assert "cannot be reached (no complete answer within 0 s)" in refusal()


@pytest.mark.parametrize("endpoint", ["no address", "file:///etc", "ftp://x", "http://", "https://["])
def test_an_endpoint_that_is_no_web_address_is_reported(site: Site, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "cannot be reached (" in refusal()


@pytest.mark.parametrize(("variable", "value"), [("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_OFFLINE", "true"), (None, "")])
def test_without_network_nothing_is_asked(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None, value: str
) -> None:
    if variable is not None:
        monkeypatch.setenv(variable, value)
    why = "--offline" if variable is None else "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    assert refusal(allow_network=variable is not None) == (
        f"org/vlm: no such folder, not in the catalogue nor in {tmp_path / 'home' / 'hub'}, "
        f"and the network may not be used ({why}); download it, or allow that."
    )
    assert site.asked == []


def cached(cache: Path, write_checkpoint: Write, repo: str = "org/vlm", ref: str = "main") -> Path:
    folder = cache / ("models--" + repo.replace("/", "--"))
    (folder / "refs" / ref).parent.mkdir(parents=True)
    (folder / "refs" / ref).write_text(COMMIT)
    return write_checkpoint(folder=folder / "snapshots" / COMMIT)


def test_a_revision_is_kept_apart_from_the_name(
    write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "x"))
    cached(tmp_path / "x", write_checkpoint, ref="v1.0")
    profile = load_profile("org/vlm@v1.0")
    assert (profile.name, profile.revision) == ("org/vlm", "v1.0")


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"])
def test_the_local_cache_answers_without_network(
    site: Site, write_checkpoint: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "x"))
    inside = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(variable, ".")
    cached(tmp_path / "x" / inside, write_checkpoint)
    profile = load_profile("org/vlm")
    assert (profile.origin, profile.name) == ("hub", "org/vlm")
    assert site.asked == []


@pytest.mark.parametrize(
    ("name", "ref"), [(f"org/vlm@{COMMIT}", "main"), ("org/vlm@refs/pr/1", "refs/pr/1"), ("org/vlm@v1.0", "v1.0")]
)
def test_a_revision_is_found_in_the_cache(site: Site, write_checkpoint: Write, tmp_path: Path, name: str, ref: str) -> None:
    cached(tmp_path / "home" / "hub", write_checkpoint, ref=ref)
    assert load_profile(name, allow_network=False).origin == "hub"


def test_a_model_of_the_catalogue_is_read_from_the_cache_first(site: Site, write_checkpoint: Write, tmp_path: Path) -> None:
    cached(tmp_path / "home" / "hub", write_checkpoint, repo="llava-hf/llava-1.5-7b-hf")
    assert load_profile("llava-1.5-7b").text.hidden == 8


def test_an_incomplete_copy_in_the_cache_is_passed_over_and_noted(
    site: Site, write_checkpoint: Write, tmp_path: Path
) -> None:
    snapshot = cached(tmp_path / "home" / "hub", write_checkpoint)
    (snapshot / "model.safetensors").unlink()
    expected = f"{snapshot}: has config.json but no safetensors file; complete the download."
    assert refusal(allow_network=False) == expected
    write_checkpoint(folder=site.folder)
    assert load_profile("org/vlm").notes == (f"The copy in the hub cache was not used: {expected}",)


@pytest.mark.parametrize("commit", ["", "../../../etc", "zz", "0" * 39])
def test_a_cache_that_names_no_commit_is_passed_over(
    site: Site, write_checkpoint: Write, tmp_path: Path, commit: str
) -> None:
    cached(tmp_path / "home" / "hub", write_checkpoint)
    (tmp_path / "home" / "hub" / "models--org--vlm" / "refs" / "main").write_text(commit)
    with pytest.raises(ModelNotFoundError):
        load_profile("org/vlm", allow_network=False)


def test_a_cache_that_cannot_be_read_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    assert find_snapshot(HubId("org/vlm"), long) is None
    assert find_snapshot(HubId("org/vlm", COMMIT), long) is None


def test_without_a_home_folder_nothing_is_found_there() -> None:
    settings = hub_settings({"HF_HOME": "~nobody-at-all/hf"})
    assert settings.cache == Path("~nobody-at-all/hf/hub")
    assert settings.token is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/vlm", HubId("org/vlm")),
        ("org/vlm-1.5_x@v2", HubId("org/vlm-1.5_x", "v2")),
        ("org/vlm@refs/pr/1", HubId("org/vlm", "refs/pr/1")),
        ("vlm", None),
        ("a/b/c", None),
        ("../vlm", None),
        ("org/..", None),
        ("org/a--b", None),
        ("org/vlm@", None),
        ("org/vlm@../x", None),
        ("org/vlm@/x", None),
        ("org/v lm", None),
        ("org/vlm\n", None),
        ("org/" + "x" * 97, None),
        ("org/ünï", None),
    ],
)
def test_hub_ids_are_told_from_paths(name: str, expected: HubId | None) -> None:
    assert parse_hub_id(name) == expected
