"""The hub's settings and its local cache, without the huggingface_hub library.

Layout and variables: https://huggingface.co/docs/huggingface_hub, "Manage your cache" and "Environment variables".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = frozenset({"1", "true", "yes", "on"})
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)*", re.ASCII)
_TOKEN = re.compile(r"[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_SMALL_FILE_BYTES = 4096
DEFAULT_REVISION = "main"


class HubId(NamedTuple):
    """A model on the hub."""

    repo: str
    """``org/name``."""
    revision: str = DEFAULT_REVISION
    """Branch, tag, commit or ``refs/pr/1``."""


class HubSettings(NamedTuple):
    """What the environment says about the hub."""

    endpoint: str
    cache: Path
    is_offline: bool
    token: str | None = None
    """For the endpoint's host only."""


def parse_hub_id(name: str) -> HubId | None:
    """Read ``org/name`` or ``org/name@revision``; ``None`` for anything else, such as a path."""
    repo, _, revision = name.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or ("@" in name and not _is_revision(revision)):
        return None
    return HubId(repo, revision or DEFAULT_REVISION)


def _is_revision(text: str) -> bool:
    return len(text) <= 255 and ".." not in text and _REVISION.fullmatch(text) is not None


def hub_settings(environment: Mapping[str, str]) -> HubSettings:
    """Read endpoint, cache folder, offline mode and token as the hub's own library does."""
    home = Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = _expand(environment.get("HF_HOME") or str(home))
    cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    offline = environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or ""
    token_file = _expand(environment.get("HF_TOKEN_PATH") or str(home / "token"))
    return HubSettings(
        endpoint=(environment.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT).rstrip("/"),
        cache=_expand(cache) if cache else home / "hub",
        is_offline=offline.lower() in _TRUE,
        token=_token(environment, token_file),
    )


def _expand(path: str) -> Path:
    """Follow ``~``; where there is no home folder, the path stays as it is and nothing is found there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _token(environment: Mapping[str, str], token_file: Path) -> str | None:
    token = environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN") or ""
    if not token and (environment.get("HF_HUB_DISABLE_IMPLICIT_TOKEN") or "").lower() not in _TRUE:
        token = _read_small(token_file)
    token = token.strip()
    # Anything else cannot be a token, and a line break in a header would be an injection.
    return token if _TOKEN.fullmatch(token) else None


def find_snapshot(model: HubId, cache: Path) -> Path | None:
    """The folder of one revision in the local cache, or ``None`` when it was never downloaded."""
    folder = cache / ("models--" + model.repo.replace("/", "--"))
    commit = model.revision if _COMMIT.fullmatch(model.revision) else _read_small(folder / "refs" / model.revision).strip()
    if not _COMMIT.fullmatch(commit):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if _is_folder(snapshot) else None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _read_small(path: Path) -> str:
    """Text of a small file; nothing when it cannot be read, as when there is none."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(_MAX_SMALL_FILE_BYTES).decode("ascii", errors="replace")
    except OSError:
        return ""
