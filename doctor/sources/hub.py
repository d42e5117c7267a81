"""Read config and headers of a model on the hub over HTTP, without downloading a weight.

Of each shard only the first bytes are asked for (``Range``), and where a server sends the whole file regardless, the
connection is closed after the header.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ..errors import ModelError, ModelFileError, ModelNotFoundError
from .checkpoint import Checkpoint, StoredTensor
from .checkpoint_folder import CONFIG, INDEX, MAX_JSON_BYTES, PROCESSORS, SINGLE, join_shards, parse_object, shards_of_index
from .hub_cache import HubId, HubSettings
from .image_files import processor_settings
from .safetensors_headers import PREFIX_BYTES, header_length, parse_header

FIRST_RANGE_BYTES = 128 * 1024
"""Asked of each shard at once: headers have 5 to 60 kB, so that one request is enough."""

CONNECTIONS = 8
WAIT_S = 10.0
"""For one answer of the server."""

DEADLINE_S = 60.0
"""For all requests together, so that a server that drips cannot hold the doctor."""


def read_hub(model: HubId, settings: HubSettings) -> Checkpoint:
    """Read a model's config and headers from the hub.

    Args:
        model: Which model.
        settings: Endpoint and token.

    Raises:
        ModelNotFoundError: No network, no such model, or no permission.
        ModelFileError: What the hub holds is damaged or cannot be used.
    """
    session = _Session(model, settings)
    config = parse_object(session.need(CONFIG), where=CONFIG)
    single = session.header(SINGLE)
    if single is not None:
        headers = {SINGLE: single}
    else:
        index = session.get(INDEX)
        if index is None:
            raise ModelFileError(
                f"{model.repo}: has no safetensors files on the hub, and the header of a .bin file is at its end; download "
                "the model and name its folder, or convert it with save_pretrained."
            )
        shards = shards_of_index(index)
        with ThreadPoolExecutor(max_workers=CONNECTIONS) as pool:
            headers = dict(zip(shards, pool.map(session.need_header, shards), strict=True))
    images, prompts = processor_settings(*(session.settings(name) for name in PROCESSORS))
    return Checkpoint(config, join_shards(headers), tuple(headers), images, prompts=prompts)


class _SameHostToken(urllib.request.HTTPRedirectHandler):
    """Follow redirects to the file store, and keep the token on the hub's own host."""

    def http_error_302(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """Follow; close the first answer when that is impossible, which urllib leaves open."""
        try:
            # Python 3.10 does not know 308, which differs from 307 in its permanence only.
            return super().http_error_302(req, fp, 307 if code == 308 else code, msg, headers)
        except urllib.error.HTTPError:
            raise  # It owns the answer, and its reader closes it.
        except (OSError, ValueError):
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(  # noqa: PLR0917 - the signature of urllib
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Build the next request; the token is an unredirected header, so that it is lost unless added here."""
        old, new = _origin(req.full_url), _origin(newurl)
        if new[0] not in ("https", old[0]):
            raise urllib.error.URLError(f"redirected from {old[0]} to {new[0]}")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.get_header("Authorization")
        if request is not None and token is not None and new == old:
            request.add_unredirected_header("Authorization", token)
        return request


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: where a token may go."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


class _Session:
    """Requests for the files of one model, within one deadline."""

    def __init__(self, model: HubId, settings: HubSettings) -> None:
        self._model = model
        self._settings = settings
        self._opener = urllib.request.build_opener(_SameHostToken())
        self._end = time.monotonic() + DEADLINE_S

    def need(self, name: str) -> bytes:
        """A small file that must be there."""
        data = self.get(name)
        if data is None:
            raise ModelFileError(f"{self._model.repo}: has no {name} on the hub; it is not a model for transformers.")
        return data

    def get(self, name: str) -> bytes | None:
        """A small file, ``None`` when the repository has none of that name."""
        with self._open(name) as response:
            if response is None:
                return None
            data = self._read(response, MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ModelFileError(f"{name}: more than {MAX_JSON_BYTES:,} bytes on the hub; do not trust it.")
        return data

    def need_header(self, shard: str) -> dict[str, StoredTensor]:
        """The header of a shard that the index lists."""
        header = self.header(shard)
        if header is None:
            raise ModelFileError(f"{shard}: is missing on the hub, though {INDEX} lists it; choose another revision.")
        return header

    def header(self, shard: str) -> dict[str, StoredTensor] | None:
        """The header of a shard, ``None`` when there is no such file."""
        with self._open(shard, (0, FIRST_RANGE_BYTES)) as response:
            if response is None:
                return None
            file_bytes = _file_bytes(response)
            length = header_length(self._read(response, PREFIX_BYTES), file_bytes, where=shard)
            header = self._read(response, length)
        if len(header) < length:
            with self._open(shard, (PREFIX_BYTES, PREFIX_BYTES + length)) as response:
                if response is None or response.status != http.client.PARTIAL_CONTENT:
                    raise ModelFileError(f"{shard}: the hub breaks off inside its header; try again later.")
                header = self._read(response, length)
        return parse_header(header, file_bytes, length=length, where=shard)

    def settings(self, name: str) -> dict[str, Any] | None:
        """A processor's settings; a plan does without them."""
        try:
            data = self.get(name)
            return None if data is None else parse_object(data, where=name)
        except ModelError:
            return None

    @contextmanager
    def _open(self, name: str, span: tuple[int, int] | None = None) -> Iterator[http.client.HTTPResponse | None]:
        """Ask for a file, or for its bytes from ``span[0]`` up to ``span[1]``; gives ``None`` when it is not there.

        Raises:
            ModelNotFoundError: Anything else went wrong, also while the answer is read.
        """
        revision = urllib.parse.quote(self._model.revision, safe="")
        url = f"{self._settings.endpoint}/{self._model.repo}/resolve/{revision}/{urllib.parse.quote(name)}"
        try:
            with self._opener.open(self._request(url, span), timeout=self._wait_s()) as response:
                yield response
        except urllib.error.HTTPError as error:
            with error:
                sentence = self._refusal(error, name)
            if sentence is not None:
                raise ModelNotFoundError(sentence) from error
            yield None
        except (OSError, http.client.HTTPException, ValueError) as error:
            # A server's own words may be in it: one line, and not too long.
            reason = " ".join(str(getattr(error, "reason", None) or error).split())[:200]
            raise ModelNotFoundError(
                f"{self._model.repo}: {self._settings.endpoint} cannot be reached ({reason}); "
                "check the network or HF_ENDPOINT, or name a local folder."
            ) from error

    def _request(self, url: str, span: tuple[int, int] | None) -> urllib.request.Request:
        request = urllib.request.Request(url, headers={"User-Agent": "vlm-doctor", "Accept-Encoding": "identity"})
        if request.type not in ("http", "https"):
            raise ValueError(f"{request.type} is no web address")
        if span is not None:
            request.add_header("Range", f"bytes={span[0]}-{span[1] - 1}")
        if self._settings.token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._settings.token}")
        return request

    def _wait_s(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no complete answer within {DEADLINE_S:.0f} s")
        return min(WAIT_S, left)

    def _read(self, response: http.client.HTTPResponse, limit: int) -> bytes:
        """At most ``limit`` bytes; fewer when the answer ends."""
        data = bytearray()
        while len(data) < limit:
            self._wait_s()
            piece = response.read1(min(limit - len(data), 2**16))
            if not piece:
                break
            data += piece
        return bytes(data)

    def _refusal(self, error: urllib.error.HTTPError, name: str) -> str | None:
        """What an HTTP error means, as a sentence; ``None`` when the file is simply not there."""
        repo, page = self._model.repo, f"{self._settings.endpoint}/{self._model.repo}"
        reason = error.headers.get("X-Error-Code", "") if error.headers else ""
        if reason == "GatedRepo":
            return f"{repo}: is gated; accept its terms at {page} and set HF_TOKEN."
        if reason == "RevisionNotFound":
            return f"{repo}: has no revision {self._model.revision!r} on the hub; correct the part after @."
        if error.code in (401, 403):
            return f"{repo}: does not exist on the hub, or needs permission; check the name, or set HF_TOKEN."
        if error.code == 404 and reason == "RepoNotFound":
            return f"{repo}: does not exist on the hub; check the name."
        if error.code == 404:
            return None
        if error.code == 416:
            return f"{repo}: {name} is empty on the hub; choose another revision."
        if error.code == 429:
            return f"{repo}: the hub refuses more requests for now; wait, or set HF_TOKEN."
        return f"{repo}: the hub answers with error {error.code} for {name}; try again later."


def _file_bytes(response: http.client.HTTPResponse) -> int | None:
    """Size of the whole file, from ``Content-Range`` of a part or ``Content-Length`` of everything."""
    if response.status == http.client.PARTIAL_CONTENT:
        text = (response.headers.get("Content-Range") or "").rpartition("/")[2]
    else:
        text = response.headers.get("Content-Length") or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
