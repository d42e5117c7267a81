"""Version rules that the installed libraries declare themselves, read from their metadata and sources.

A table of ours would be stale with their next release; theirs is right by definition.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import Distribution
from pathlib import Path

from ..machine import VersionRule
from .torch_build import statements

_REQUIRERS = ("accelerate", "bitsandbytes", "peft", "torch", "torchaudio", "torchvision", "transformers", "xformers")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
_DEVELOPMENT = re.compile(r"dev|test|quality|doc|lint|bench|ci$|all$|deepspeed|torchhub", re.IGNORECASE)
"""Extras for people who work on the library itself: their pins say nothing about using it."""
_MINIMUM = re.compile(r"^(\w+)_MIN_VERSION\s*=\s*[\"']([0-9][\w.]*)[\"']", re.MULTILINE)
_PARSED_MINIMUM = re.compile(r">=\s*version\.parse\(\s*[\"']([0-9.]+)[\"']\s*\)")


def read_rules(installed: Mapping[str, Distribution], known: Collection[str]) -> tuple[VersionRule, ...]:
    """Rules of the installed libraries about packages in ``known``, each once.

    Args:
        installed: Distributions by normalised name.
        known: Normalised names of the packages that matter.
    """
    rules: dict[tuple[str, str], VersionRule] = {}
    for requirer in _REQUIRERS:
        distribution = installed.get(requirer)
        if distribution is None:
            continue
        found = [*_from_metadata(requirer, distribution, known)]
        if requirer == "transformers":
            found += _from_transformers(Path(str(distribution.locate_file("transformers"))), known)
        for rule in found:
            # The first wins: metadata without an extra is the stricter word.
            rules.setdefault((requirer, _canonical(rule.requirement)), rule)
    return tuple(rules.values())


def normalised(name: str) -> str:
    """``Flash_Attn`` to ``flash-attn`` (the rule of the packaging standards)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def fields(distribution: Distribution, name: str) -> list[str]:
    """Values of a field of an installed package's metadata, in order; none where it is missing or damaged.

    ``Distribution.metadata`` parses the package's long description as well, at each access: 20 ms for the packages that
    matter, where only lines of the head are wanted.
    """
    try:
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    except (OSError, TypeError, ValueError):
        return []
    head = text.partition("\n\n")[0]
    return [value.strip() for value in re.findall(rf"^{name}:(.*)$", head, re.MULTILINE | re.IGNORECASE)]


def _from_metadata(requirer: str, distribution: Distribution, known: Collection[str]) -> Iterator[VersionRule]:
    try:
        # The second only for old installations, which keep them in a file of their own (requires.txt).
        requirements = fields(distribution, "Requires-Dist") or distribution.requires or []
    except (OSError, ValueError):
        return
    for text in requirements:
        requirement, _, marker = (part.strip() for part in text.partition(";"))
        match = _NAME.match(requirement)
        if match is None or normalised(match[0]) not in known or requirement == match[0]:
            continue
        extra = _EXTRA.search(marker)
        if extra is not None and _DEVELOPMENT.match(extra[1]):
            continue
        if _applies(marker, extra[1] if extra else ""):
            yield VersionRule(
                requirer=requirer,
                requirement=re.sub(r"[ ()]", "", requirement),
                source=f"Requires-Dist of {requirer}",
                is_optional=extra is not None,
            )


def _applies(marker: str, extra: str) -> bool:
    """Whether an environment marker holds here. The common one, an extra alone, is told without importing a parser."""
    if not marker or _EXTRA.fullmatch(marker):
        return True
    from packaging.markers import InvalidMarker, Marker, UndefinedComparison, UndefinedEnvironmentName

    try:
        return Marker(marker).evaluate({"extra": extra})
    except (InvalidMarker, UndefinedComparison, UndefinedEnvironmentName):
        return False


def _from_transformers(folder: Path, known: Collection[str]) -> Iterator[VersionRule]:
    """Rules that transformers checks while it runs and that its metadata does not have.

    It says "requires accelerate" also when accelerate is there but too old; these rules tell the two apart.
    """
    table = _source(folder / "dependency_versions_table.py")
    for requirement in _deps_table(table):
        match = _NAME.match(requirement)
        # The table also pins what transformers is developed with.
        is_wanted = match is not None and normalised(match[0]) in known and not match[0].startswith("pytest")
        if match and is_wanted and requirement != match[0] and "[" not in requirement:
            yield _transformers_rule(requirement, "dependency_versions_table.py")
    utils = _source(folder / "utils/import_utils.py")
    for name, version in _MINIMUM.findall(utils):
        if normalised(name) in known:
            yield _transformers_rule(f"{normalised(name)}>={version}", "utils/import_utils.py")
    for version in _torch_minimum(utils):
        yield _transformers_rule(f"torch>={version}", "utils/import_utils.py")


def _transformers_rule(requirement: str, file: str) -> VersionRule:
    return VersionRule(requirer="transformers", requirement=requirement, source=f"transformers/{file}", is_optional=True)


def _deps_table(text: str) -> list[str]:
    # Late, as the text is there only with transformers.
    import ast

    for part in statements(text, "deps = {"):
        try:
            table = ast.literal_eval(part.partition("=")[2].strip())
        except (ValueError, SyntaxError, RecursionError):
            return []
        return [value for value in table.values() if isinstance(value, str)]
    return []


def _torch_minimum(text: str) -> list[str]:
    """The version below which transformers behaves as if torch were absent, as its own test for torch has it."""
    for part in statements(text, "def is_torch_available"):
        if found := _PARSED_MINIMUM.findall(part):
            return found[:1]
    # transformers 4 decides while it is imported.
    return re.findall(r"_torch_available\s*=\s*version\.parse\(_torch_version\)\s*" + _PARSED_MINIMUM.pattern, text)[:1]


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _canonical(requirement: str) -> str:
    """``Pillow<=15.0,>=10.0.1`` and ``pillow>=10.0.1,<=15.0`` are one rule."""
    match = _NAME.match(requirement)
    name = match[0] if match else requirement
    versions = requirement[len(name) :].replace(" ", "").split(",")
    return normalised(name) + ",".join(sorted(re.sub(r"(\.0)+$", "", version) for version in versions))
