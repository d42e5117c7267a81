"""Traces of models, from a child process or from the cache.

The child (:mod:`.trace_child`) imports torch and transformers and may crash, hang or meet a model that it cannot run: each
ends as a :class:`TraceError` with one phrase, and the planner goes on with its formulas.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from ..data.auto_classes import AUTO_CLASSES
from ..errors import ModelError
from ..trace import Event, Trace, TraceRequest, Traces
from .cache_files import default_folder, load_record, store_record
from .checkpoint_folder import CONFIG, parse_object
from .child import Child, Outcome
from .regular_file import read_text

DEADLINE_S = 300.0
"""The slowest model tried takes 40 s on one slow core."""
_IDLE_S = 20.0
FOLDER = Path(__file__).parent.parent
PROGRAM = "sources.trace_child"
_PROGRAMS = ("sources/trace*.py", "trace.py", "data/image_rules.py")
"""What the child is made of."""
_LIBRARIES = (
    "torch", "transformers", "torchvision", "pillow", "timm", "kernels", "flash-linear-attention", "causal-conv1d",
)  # fmt: skip
"""By their versions, or by whether they are there, a class runs other code."""
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_MAX_CACHE_BYTES = 64 * 2**20
_KEPT_FILES = 64
"""Cached traces beyond so many go, oldest first."""


class TraceError(ModelError):
    """A model that could not be traced; the message is a phrase that says why."""


class RunError(TraceError):
    """The model was run and did not come to its end."""

    def __init__(self, message: str, transformers: str) -> None:
        super().__init__(message)
        self.transformers = transformers
        """Version."""


class _Run(msgspec.Struct):
    """One run as the child tells it."""

    tokens: int
    events: list[Event]
    passes: list[int]
    same_as: int | None = None
    """Number of the run that has the same events, but for their sizes."""
    sizes: list[int] = []


class _Answer(msgspec.Struct):
    """All that the child tells."""

    torch: str
    transformers: str
    modules: list[str]
    weights_bytes: int
    runs: list[_Run]


def trace(
    request: TraceRequest,
    config: Mapping[str, Any],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    deadline_s: float = DEADLINE_S,
    cache_folder: Path | None = None,
    is_fresh: bool = False,
) -> Traces:
    """Run a model without GPU, weights and arithmetic, and tell what it allocates.

    Args:
        request: What to run.
        config: What config.json holds.
        folder: The checkpoint, for its code, and for its image processor where its family is not known.
        environment: Of the child; ``None`` is that of this process.
        deadline_s: Seconds after which the child is killed.
        cache_folder: Where traces are kept; ``None`` is the user's cache folder.
        is_fresh: Trace, even when there is a trace in the cache.

    Raises:
        TraceError: It could not be traced.
    """
    environment = os.environ if environment is None else environment
    for library in ("torch", "transformers"):
        if _version(library) is None:
            raise TraceError(f"{library} is not installed; install pytest-vlmgpu[models]")
    code = _code_of(config, folder) if request.is_remote_code else None
    # Code of another repository is not known to be the same the next time.
    is_kept = code is None or "--" not in code
    path = _cache_path(request, config, folder, cache_folder or default_folder()) if is_kept else None
    known = None if is_fresh or path is None else _load(path)
    if known is not None:
        return known
    runs = [
        {
            "tokens": tokens,
            "batch": request.batch,
            "steps": request.steps,
            "pictures": None if request.pictures is None else msgspec.to_builtins(request.pictures),
            "marked": request.image_tokens or None,
        }
        for tokens in request.lengths
    ]
    arguments = {
        "config": dict(config),
        "runs": runs,
        "folder": None if folder is None else str(folder),
        "code": code,
        **{
            name: getattr(request, name)
            for name in ("architecture", "dtype", "attention", "layers", "tower", "cudnn_width")
        },
    }
    with contextlib.ExitStack() as stack:
        # transformers copies the code of a checkpoint before it imports it.
        own = {} if code is None else {"HF_MODULES_CACHE": stack.enter_context(_empty_folder())}
        outcome = Child(
            PROGRAM,
            arguments,
            environment={**environment, **own, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            deadline_s=deadline_s,
            idle_s=_IDLE_S,
            folder=FOLDER,
        ).outcome()
    traces = understand(outcome, request)
    if path is not None:
        _store(path, traces)
    return traces


def _empty_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="vlm-doctor-", ignore_cleanup_errors=True)
    except OSError as error:
        raise TraceError(f"there is no folder for copies of its code ({error.strerror or error})") from error


def understand(outcome: Outcome, request: TraceRequest) -> Traces:
    """Turn what the child said into a record.

    Raises:
        TraceError: It did not come to its end, or said something else.
    """
    if outcome.state != "ok":
        reached = f", after {outcome.stage}" if outcome.stage and outcome.state != "failed" else ""
        raise RunError(f"{outcome.message}{reached}".rstrip("."), _version("transformers") or "")
    try:
        answer = msgspec.convert(outcome.answer, _Answer)
        runs = tuple(_run(run, answer, request) for run in answer.runs)
    except (msgspec.ValidationError, LookupError, ValueError) as error:
        raise TraceError(f"unreadable answer: {error}") from error
    return Traces(
        architecture=request.architecture,
        attention=request.attention,
        torch=answer.torch,
        transformers=answer.transformers,
        weights_bytes=answer.weights_bytes,
        runs=runs,
        seconds=round(outcome.seconds, 3),
    )


def _run(run: _Run, answer: _Answer, request: TraceRequest) -> Trace:
    events = run.events
    if run.same_as is not None:
        events = answer.runs[run.same_as].events
        if len(run.sizes) != sum(event.size_bytes != 0 for event in events):
            raise ValueError(f"{len(run.sizes)} sizes do not belong to the events of run {run.same_as}")
        sizes = iter(run.sizes)
        events = [
            Event(event.tensor, next(sizes) if event.size_bytes else 0, event.place, event.module) for event in events
        ]
    return Trace(
        tokens=run.tokens,
        batch=request.batch,
        layers=len(request.layers),
        modules=tuple(answer.modules),
        events=tuple(events),
        passes=tuple(run.passes),
    )


def find_config(name: str, *, allow_network: bool = True) -> tuple[dict[str, Any], Path | None]:
    """The config of a model and its folder, if it lies in one: the same model that ``load_profile`` reads.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    from .catalogue import find_entry
    from .hub_cache import find_snapshot, hub_settings
    from .model_files import find_model

    place = find_model(name)
    if not isinstance(place, Path):
        snapshot = find_snapshot(place, hub_settings(os.environ).cache)
        if snapshot is None or not (snapshot / CONFIG).is_file():
            entry = find_entry(place.repo)
            if entry is not None:
                return entry.config, None
            if not allow_network:
                raise TraceError("its config is not on this machine, and the network may not be used")
            from .hub import read_hub

            return dict(read_hub(place, hub_settings(os.environ)).config), None
        place = snapshot
    try:
        return parse_object((place / CONFIG).read_bytes(), where=CONFIG), place
    except OSError as error:
        raise TraceError(f"{place / CONFIG} cannot be read ({error.strerror or error})") from error


def _code_of(config: Mapping[str, Any], folder: Path | None) -> str:
    """Where the class that generates is, in the words of ``auto_map``: file and class, behind another repository's name and
    two hyphens where it is there.

    Raises:
        TraceError: It is nowhere on this machine.
    """
    published = config.get("auto_map")
    names = published if isinstance(published, dict) else {}
    found: str | None = next((names[name] for name in AUTO_CLASSES if isinstance(names.get(name), str)), None)
    if found is None:
        raise TraceError("auto_map of its config names no class that generates")
    file, _, kind = found.rpartition("--")[2].partition(".")
    if folder is None or ("--" not in found and not (folder / f"{file}.py").is_file()):
        raise TraceError(f"the code of {kind} is not on this machine; download the checkpoint first")
    return found


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except (metadata.PackageNotFoundError, ValueError, OSError):
        return None


def _cache_path(request: TraceRequest, config: Mapping[str, Any], folder: Path | None, cache: Path | None) -> Path | None:
    if cache is None:
        return None
    digest = hashlib.sha256()
    for pattern in _PROGRAMS:
        for file in sorted(FOLDER.glob(pattern)):
            digest.update(file.read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library} {_version(library)}\0".encode())
    digest.update(msgspec.json.encode([request, dict(config)]))
    if folder is not None and request.is_remote_code:
        # auto_map may name a file in a folder of its own.
        for file in sorted(folder.rglob("*.py")):
            text = read_text(file, _MAX_CACHE_BYTES)
            if text is None:
                return None
            digest.update(f"{file.relative_to(folder)}\0{text}\0".encode("utf-8", "surrogateescape"))
    if folder is not None and request.pictures:
        for name in _PROCESSOR_FILES:
            with contextlib.suppress(OSError):
                digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
    return cache / f"trace-{digest.hexdigest()[:32]}.json"


def _load(path: Path) -> Traces | None:
    """A trace of this user's; ``None`` when there is none that can be read."""
    traces = load_record(path, Traces, most_bytes=_MAX_CACHE_BYTES)
    return None if traces is None else msgspec.structs.replace(traces, is_cached=True)


def _store(path: Path, traces: Traces) -> None:
    """Keep a trace, and of the others the newest."""
    with contextlib.suppress(OSError):
        others = sorted(path.parent.glob("trace-*.json"), key=lambda other: other.lstat().st_mtime)
        for other in others[: max(0, len(others) - _KEPT_FILES)]:
            other.unlink(missing_ok=True)
        store_record(path, traces)
