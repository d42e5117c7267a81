"""The markers: functions whose signature validates the arguments.

A wrong marker is a collection error: one sentence with the test, what is wrong, and what to write instead.
"""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from .concern import MARKER_PREFIXES
from .declare import MARKERS as MARKER_LINES
from .requirements import DEVICE_MAPS, DTYPE_ALIASES, DTYPES
from .state import ALIASES, SETTINGS
from .verdicts import WRONG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .requirements import Requirements, VlmSpec

NEAR_NAME = 0.66
"""Likeness (difflib) from which another name counts as ours misspelt: "vml" and "vlms" do, "vlm_slow" does not."""
MAX_SHOWN = 80
"""Characters of a value in a message."""
MAX_NAME_CHARS = 4096
"""``PATH_MAX`` of Linux: a longer name is no folder."""
MAX_GPUS = 1024
MAX_GIB = 65_536
"""Anything larger (64 TiB) is a size in another unit: a DGX B200 has 1.4 TiB in all."""

_OTHER_NAMES = {
    "names": "name model models model_id model_name id checkpoint path",
    "gpus": "num_gpus n_gpus count gpu_count min_count min_gpus gpu devices num_devices world_size",
    "vram_gib": "min_gb min_gib memory memory_gb memory_gib vram vram_gb gpu_memory gpu_memory_gb gib gb min_vram size",
    "total_vram_gib": "total_vram total_vram_gb total_memory total_gib total_gb total_memory_gb",
    "capability": "compute_capability cuda_capability min_capability cc sm arch",
    "bf16": "bfloat16",
    "p2p": "peer peer_access nvlink",
    "exclusive": "exclusive_gpu alone",
    "dtype": "torch_dtype precision",
    "device_map": "device placement devicemap",
    "revision": "commit branch tag rev",
    "trust_remote_code": "remote_code trust",
}
"""Keyword to what other suites call it (transformers, vLLM, accelerate, oumi, pytest-torch), for the suggestion."""


class _ArgumentError(Exception):
    """An argument that a marker does not take; the text continues after the marker's name."""


def vlm(
    *names: str,
    revision: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[VlmSpec, ...]:
    """Name the model (folder or hub id) that the fixture vlm loads; several names run the test with each."""
    from .requirements import VlmSpec

    if not names:
        raise _ArgumentError('names no model; write vlm("org/model")')
    texts = [_name(name) for name in names]
    if len(set(texts)) < len(texts):
        raise _ArgumentError("names a model twice; name it once")
    if revision is not None:
        texts = [_at_revision(texts, revision)]
    first = VlmSpec(
        texts[0],
        dtype=_dtype(dtype),
        trust_remote_code=_flag("trust_remote_code", trust_remote_code),
        device_map=_device_map(device_map),
    )
    return tuple(replace(first, name=text) for text in texts)


def vlm_requires(
    *,
    gpus: int = 1,
    vram_gib: float | str | None = None,
    total_vram_gib: float | str | None = None,
    capability: tuple[int, int] | str | float | None = None,
    bf16: bool | None = False,
    fp8: bool | None = False,
    p2p: bool | None = False,
    exclusive: bool | None = False,
    reason: str | None = None,
) -> Requirements:
    """Skip unless GPUs can do it: count, free memory on each and in all (GiB, or text as "80GB"), capability, links."""
    from .requirements import BF16_CAPABILITY, FP8_CAPABILITY, Requirements

    floors = [_capability(capability)]
    floors += [BF16_CAPABILITY] if _wish("bf16", bf16) else []
    floors += [FP8_CAPABILITY] if _wish("fp8", fp8) else []
    return Requirements(
        gpus=_count(gpus),
        vram_bytes=_size("vram_gib", vram_gib),
        total_vram_bytes=_size("total_vram_gib", total_vram_gib),
        capability=max((floor for floor in floors if floor is not None), default=None),
        p2p=_wish("p2p", p2p),
        exclusive=_wish("exclusive", exclusive),
        reason=_reason(reason),
    )


def vlm_limit_vram(amount: float | str) -> int:
    """Fail when the test's tensors take more on any one GPU (GiB, or text such as "18GiB")."""
    size = _size("amount", amount)
    if size is None:
        raise _ArgumentError('has amount=None; write GiB as a number, or text such as "18GiB"')
    return size


def vlm_mutates() -> bool:
    """The test may change the shared model: it runs last, and the model is loaded again after it."""
    return True


MARKERS: dict[str, Callable[..., Any]] = {
    "vlm": vlm,
    "vlm_requires": vlm_requires,
    "vlm_limit_vram": vlm_limit_vram,
    "vlm_mutates": vlm_mutates,
}


_READ: dict[tuple[str, str, str], Any] = {}
"""Name, positional and keyword arguments of each right marker as text to what it says."""


def chosen(
    name: str, *, dtype: str | None, trust_remote_code: bool, gpus: int, device_map: str | None, where: str
) -> VlmSpec:
    """The model of a call at run time, whose arguments are those of the markers.

    Args:
        name: Folder or hub id.
        dtype: As in ``vlm``.
        trust_remote_code: As in ``vlm``.
        gpus: As in ``vlm_requires``.
        device_map: As in ``vlm``.
        where: The fixture that was called, for the message.
    """
    try:
        (spec,) = vlm(name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
        return replace(spec, min_gpus=_count(gpus))
    except _ArgumentError as error:
        pytest.fail(f"{WRONG}: {where} {error}.", pytrace=False)


def wrong(sentence: str) -> pytest.Collector.CollectError:
    """The error for a test whose markers cannot be understood."""
    return pytest.Collector.CollectError(f"{WRONG}: {sentence}")


def read(mark: pytest.Mark, where: str) -> Any:
    """Apply a marker's function to its arguments.

    Args:
        mark: A mark named in :data:`MARKERS`.
        where: The test, for the message.

    Returns:
        :class:`Requirements` for ``vlm_requires``, a tuple of :class:`VlmSpec` for ``vlm``.

    Raises:
        pytest.Collector.CollectError: Wrong arguments.
    """
    # The same marker stands on many tests, and is asked for several times of each. What it says is frozen.
    try:
        key = (mark.name, repr(mark.args), repr(mark.kwargs))
    except Exception:  # noqa: BLE001 - see _shown
        return _read_anew(mark, where)
    if key not in _READ:
        _READ[key] = _read_anew(mark, where)
    return _READ[key]


def _read_anew(mark: pytest.Mark, where: str) -> Any:
    function = MARKERS[mark.name]
    try:
        inspect.signature(function).bind(*mark.args, **mark.kwargs)
    except TypeError:
        raise wrong(f"{where}: @pytest.mark.{mark.name} {_misuse(mark)}.") from None
    try:
        return function(*mark.args, **mark.kwargs)
    except _ArgumentError as error:
        raise wrong(f"{where}: @pytest.mark.{mark.name} {error}.") from error


def read_models(definition: pytest.Function, where: str) -> tuple[VlmSpec, ...]:
    """Models that a test names: those of its closest ``vlm`` markers (function, class, what it derives from, module).

    Raises:
        pytest.Collector.CollectError: A marker is wrong.
    """
    marks = [(node, mark) for node, mark in ours_with_node(definition, where, closest="vlm") if mark.name == "vlm"]
    closest = [mark for node, mark in marks if node is marks[0][0]]
    # Stacked decorators apply from the bottom up, as with parametrize; read them in the order written.
    named = [spec for mark in closest for spec in read(mark, where)]
    if len(set(named)) < len(named):
        raise wrong(f"{where}: @pytest.mark.vlm names a model twice; name it once.")
    return tuple(completed(spec, definition, where) for spec in named)


def completed(spec: VlmSpec, definition: pytest.Function, where: str) -> VlmSpec:
    """Have a model spread over as many GPUs as a test requires, and in ``--vlm-dtype`` where its marker names none."""
    from .requirements import Requirements

    gpus = Requirements.strictest(read_requirements(definition, where)).gpus
    if gpus > 1 and spec.device_map == "single":
        raise wrong(f'{where}: @pytest.mark.vlm has device_map="single", and the test requires {gpus} GPUs.')
    settings = definition.config.stash.get(SETTINGS, None)
    dtype, how = (settings.dtype, settings.device_map) if settings is not None else (None, "doctor")
    return spec.completed(gpus=gpus, dtype=dtype, device_map=how)


def read_requirements(definition: pytest.Function, where: str) -> Sequence[Requirements]:
    """Every ``vlm_requires`` that applies to a test, closest first.

    Raises:
        pytest.Collector.CollectError: A marker is wrong.
    """
    return [read(mark, where) for _, mark in ours_with_node(definition, where) if mark.name == "vlm_requires"]


def ours_with_node(
    definition: pytest.Function, where: str, *, closest: str | None = None
) -> Iterator[tuple[Any, pytest.Mark]]:
    """Our markers of a test and those that stand for ours (``vlm_marker_aliases``), closest first, each with its node.

    Args:
        definition: The test.
        where: Of messages.
        closest: Name of a marker of which a class does not inherit any where it has its own.

    Raises:
        pytest.Collector.CollectError: A marker that stands for ours has other arguments than its alias.
    """
    aliases = definition.config.stash.get(ALIASES, {})
    overridden = _overridden(definition, closest) if closest is not None else ()
    for node, mark in definition.iter_markers_with_node():
        if id(mark) in overridden:
            continue
        if mark.name in MARKERS:
            yield node, mark
        elif mark.name in aliases:
            alias = aliases[mark.name]
            try:
                yield node, alias.expand(mark)
            except TypeError:
                takes = f"{alias.name}{alias.signature}"
                raise wrong(f"{where}: @pytest.mark.{alias.name} is an alias with other arguments: {takes}.") from None


def _overridden(definition: pytest.Function, name: str) -> set[int]:
    """Identities of the markers that a test's class inherits and has its own of: pytest puts all of them on the class."""
    aliases = definition.config.stash.get(ALIASES, {})
    overridden: set[int] = set()
    is_found = False
    for base in definition.cls.__mro__ if definition.cls is not None else ():
        listed: Any = vars(base).get("pytestmark", [])
        given: list[Any] = listed if isinstance(listed, list) else [listed]
        marks = [mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in given]
        own = {id(mark) for mark in marks if name == (aliases[mark.name].target if mark.name in aliases else mark.name)}
        if is_found:
            overridden |= own
        is_found = is_found or bool(own)
    return overridden


def read_limit(definition: pytest.Function, where: str) -> int | None:
    """Bytes that the closest ``vlm_limit_vram`` allows; ``None`` without one.

    Raises:
        pytest.Collector.CollectError: A marker is wrong.
    """
    name = "vlm_limit_vram"
    limits: list[int] = [
        read(mark, where) for _, mark in ours_with_node(definition, where, closest=name) if mark.name == name
    ]
    return limits[0] if limits else None


def may_mutate(definition: pytest.Function, where: str) -> bool:
    """True when a ``vlm_mutates`` applies.

    Raises:
        pytest.Collector.CollectError: It has arguments.
    """
    marks = [read(mark, where) for mark in definition.iter_markers("vlm_mutates")]
    return bool(marks)


def registered(config: pytest.Config) -> set[str]:
    """Names of markers that the project declares in the setting ``markers``, or another plugin does."""
    lines = [line for line in config.getini("markers") if line not in MARKER_LINES]
    return {line.split(":")[0].split("(")[0].strip() for line in lines}


def refuse_unknown(item: pytest.Item, *, is_surely_meant: bool) -> None:
    """Refuse a marker that looks like one of ours and is not: a typing error would switch the gate off without a word.

    Args:
        item: The test.
        is_surely_meant: True when the test uses the plugin otherwise; then any name with our prefix is one of ours.

    Raises:
        pytest.Collector.CollectError: Such a marker. Names in the setting ``markers`` are the user's own.
    """
    aliases = item.config.stash.get(ALIASES, {})
    for mark in item.iter_markers():
        if not mark.name.startswith(MARKER_PREFIXES) or mark.name in MARKERS or mark.name in aliases:
            continue
        import difflib

        cutoff = 0.0 if is_surely_meant else NEAR_NAME
        near = difflib.get_close_matches(mark.name, MARKERS, n=1, cutoff=cutoff)
        if near and mark.name not in registered(item.config):
            raise wrong(
                f"{item.nodeid}: there is no marker @pytest.mark.{mark.name}; did you mean @pytest.mark.{near[0]}? "
                "(A marker of your own goes into the setting markers.)"
            )


def _misuse(mark: pytest.Mark) -> str:
    """Why the arguments do not match the signature."""
    parameters = inspect.signature(MARKERS[mark.name]).parameters
    for keyword in mark.kwargs:
        if keyword in parameters:
            continue
        near = _near(keyword)
        owner = next((name for name in MARKERS if near in inspect.signature(MARKERS[name]).parameters), None)
        if keyword == "revision":
            instead = 'write it behind the name, as in vlm("org/model@revision")'
        elif near == "names":
            instead = 'write the name alone, as in vlm("org/model")'
        elif near in parameters:
            instead = f"write {near}=…"
        else:
            instead = f"write @pytest.mark.{owner}({near}=…)" if owner else f"it takes {', '.join(parameters) or 'none'}"
        return f"has no keyword {keyword!r}; {instead}"
    if mark.name == "vlm_limit_vram":
        return 'takes one size, such as vlm_limit_vram("18GiB")'
    if mark.name == "vlm_mutates":
        return "takes no arguments"
    return f"takes keywords only, such as gpus=2; got {', '.join(map(_shown, mark.args))}"


def _near(keyword: str) -> str | None:
    """The keyword of ours that was probably meant."""
    import difflib

    lower = keyword.lower()
    known = {other: name for name, others in _OTHER_NAMES.items() for other in (name, *others.split())}
    matches = [lower] if lower in known else difflib.get_close_matches(lower, known, n=1, cutoff=0.7)
    return known[matches[0]] if matches else None


def _shown(value: object) -> str:
    """A value in a message."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - Python refuses to write numbers of thousands of digits, others have reasons of theirs
        return f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _name(value: object) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    # Whatever cannot be printed is in no name, and would be in every line that shows it.
    if not isinstance(text, str) or not text.strip() or not text.isprintable() or len(text) > MAX_NAME_CHARS:
        raise _ArgumentError(f"names a model {_shown(value)}; write a folder or a hub id as text")
    return text


def _reason(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise _ArgumentError(f"has reason={value!r}; write a text")


def _at_revision(names: Sequence[str], revision: object) -> str:
    """The one name with its branch, tag or commit, as the doctor takes it."""
    if not isinstance(revision, str) or not revision.strip():
        raise _ArgumentError(f"has revision={revision!r}; write a branch, tag or commit as text")
    if len(names) > 1 or "@" in names[0]:
        raise _ArgumentError("has revision=… beside several names or an @; write each name as org/model@revision")
    return f"{names[0]}@{revision}"


def _device_map(value: object) -> str | None:
    if value is None or value in DEVICE_MAPS:
        return value if isinstance(value, str) else None
    raise _ArgumentError(f"has device_map={value!r}; write {', '.join(DEVICE_MAPS)}")


def _flag(keyword: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _ArgumentError(f"has {keyword}={_shown(value)}; write True or False")
    return value


def _wish(keyword: str, value: object) -> bool:
    """``True``; ``False`` and ``None`` both mean that it does not matter."""
    return value is not None and _flag(keyword, value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_GPUS:
        raise _ArgumentError(f"has gpus={_shown(value)}; write a whole number from 1 to {MAX_GPUS}")
    return value


def _size(keyword: str, value: object) -> int | None:
    """Bytes of a size: a number is GiB, text carries its own unit."""
    if value is None:
        return None
    advice = 'write GiB as a number, or text with a unit such as "80GB"'
    if isinstance(value, str):
        from vlm_doctor.errors import UsageError
        from vlm_doctor.units import parse_bytes

        try:
            size = parse_bytes(value)
        except UsageError:
            raise _ArgumentError(f"has {keyword}={_shown(value)}; {advice}") from None
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # noqa: PLR0124 - not a number
        raise _ArgumentError(f"has {keyword}={_shown(value)}; {advice}")
    elif value > MAX_GIB:
        raise _ArgumentError(f"has {keyword}={_shown(value)}; a number is in GiB, so this is too large")
    else:
        size = int(value * 2**30) if value > 0 else 0
    if size <= 0:
        raise _ArgumentError(f"has {keyword}={_shown(value)}; write a size above zero")
    return size


def _capability(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    text = ".".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    match = re.fullmatch(r"([1-9][0-9]?)\.([0-9])", text, re.ASCII)
    if match is None:
        raise _ArgumentError(f'has capability={_shown(value)}; write (8, 0) or "8.0"')
    return int(match[1]), int(match[2])


def _dtype(value: object) -> str | None:
    """Word for a dtype that torch uses, given as text or as the object itself."""
    if value is None:
        return None
    text = str(value).removeprefix("torch.")
    if text not in DTYPES:
        instead = DTYPE_ALIASES.get(text.lower(), " or ".join(DTYPES))
        raise _ArgumentError(f"has dtype={_shown(value)}; write {instead}")
    return text
