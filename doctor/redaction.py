"""Makes a snapshot of a machine safe to publish and still good to replay. Pure.

What goes: users, commands, host names, addresses, tokens, and the parts of paths that are anybody's own. What stays: every
fact that a check looks at. The same name gets the same pseudonym everywhere in a snapshot, so that references still hold.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

import msgspec

from .machine import Machine

_KEPT = frozenset(
    {
        # Closed vocabularies, versions and addresses of devices: a check reads them as they stand.
        *("origin", "name", "kind", "state", "bus_id", "remote_bus_id", "remote", "device_id", "path", "kernel_driver"),
        *("version", "requirer", "requirement", "python", "cuda", "hip", "archs", "os", "kernel", "container", "iommu"),
        *("compute_mode", "recovery_action", "p2p_read", "p2p_write", "nvml_state", "driver_version"),
        *("slowdowns", "virtualization", "mps"),
        *("kernel_module_version", "collected_at", "tool_version", "pynvml_owners"),
    }
)
_DROPPED = frozenset({"user", "command"})
_PATHS = frozenset({"executable", "location", "libcuda_path", "hf_cache", "source", "tmp", "file", "repo"})
"""Fields that are one path, blanks and all; names of checkpoints are treated alike, for some are private."""
_PATH_VARIABLES = re.compile(r"(?:PATH|HOME|CACHE|DIR|DIRECTORY|FILE|ROOT|PRELOAD)$")

_UUID = re.compile(
    r"\b(?:(?P<kind>GPU|MIG)-)?(?P<hex>[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})\b"
    r"|\b(?P<start>GPU|MIG)-(?P<part>[0-9a-f]{1,8}(?:-[0-9a-f]{0,12}){0,4})(?![\w-])",
    re.IGNORECASE | re.ASCII,
)
_HOME = re.compile(r"/(?:home|Users|export/home)/[^/\s\"':;,]+|/root(?=/|$|[\s\"':;,])")
_WINDOWS_HOME = re.compile(r"(?i)\b[a-z]:[\\/]+users[\\/]+[^\\/\s\"':;,]+")
_MNT_HOME = re.compile(r"(?i)/mnt/[a-z]/users/[^/\s\"':;,]+")
_SECRETS = (
    re.compile(
        r"\b(?:hf|ghp|gho|ghs|ghr|glpat|github_pat|sk|pk|rk|xox[abprs]|npm|pypi|dckr_pat|wandb)[_-][A-Za-z0-9_.-]{8,}"
    ),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_.-]+"),
    re.compile(r"(?i)(?<=bearer )[\w.~+/=-]{6,}"),
    re.compile(
        r"(?i)(?<![a-z])(?:password|passwd|pwd|token|secret|api[_-]?key|access[_-]?key|auth)[\"']?\s{0,3}[=:]\s{0,3}[^\s,;&]+"
    ),
    re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]*@"),
    re.compile(r"(?<![\w/.-])(?=[A-Za-z+=_]{0,500}[0-9])(?=[0-9+=_]{0,500}[A-Za-z])(?!_Z)[A-Za-z0-9+=_]{32,}(?![\w/.-])"),
)
_MAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})*")
_URL_HOST = re.compile(r"(?<=://)[^\s/\"'<>]+")
_PUBLIC_HOSTS = frozenset(
    {"huggingface.co", "pypi.org", "download.pytorch.org", "pytorch.org", "github.com", "www.nvidia.com", "docs.nvidia.com"}
)
_IPV4 = re.compile(r"(?<![\w.])(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?:25[0-5]|2[0-4]\d|1?\d?\d)){3}(?![\w.]|-\w)")
_IPV6 = re.compile(
    r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}(?![\w:])"
    r"|(?<![\w:.])(?=[0-9a-fA-F:]{0,39}::)[0-9a-fA-F:]{3,39}(?![\w:.])"
)
_MAC = re.compile(r"(?<![\w:.])[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}(?![\w:])")
_PATH = re.compile(r"(?<![\w.~/:-])~?(?:/[^\s\"':;,()\[\]<>|=/]+)+/?")

_PUBLIC = frozenset(
    {
        *("~", ".", "..", "usr", "lib", "lib32", "lib64", "libexec", "local", "bin", "sbin", "opt", "etc", "var"),
        *("tmp", "proc", "sys", "dev", "run", "mnt", "media", "srv", "data", "home", "root", "share", "cache"),
        *(".cache", ".local", "conda", "miniconda3", "anaconda3", "mambaforge", "miniforge3", "micromamba", "envs"),
        *("env", "venv", ".venv", "virtualenvs", ".virtualenvs", "site-packages", "dist-packages", "huggingface"),
        *("hub", "hf", "cuda", "stubs", "compat", "targets", "wsl", "drivers", "driver", "shm", "workspace"),
        *("content", "app", "kaggle", "colab", "pip", "uv", "pyenv", ".pyenv", "versions", "nix", "store"),
        *("snapshots", "blobs", "modules", "include", "extras", "CUPTI", "python", "python3", "x86_64-linux-gnu"),
        *("aarch64-linux-gnu", "x86_64-linux", "sbsa-linux", "openmpi", "mpi", "hpcx", "nccl", "cudnn", "cublas"),
        *(
            "bus",
            "pci",
            "devices",
            "class",
            "module",
            "nvidia_uvm",
            "memory.max",
            "nccl.conf",
            ".nccl.conf",
            "nccl.conf.d",
            "self",
            "cgroup",
            "fs",
            "kernel",
        ),
        *("gpus", "version"),
    }
)
"""Parts of paths that every machine has."""
_PUBLIC_FORMS = re.compile(
    r"python\d(?:\.\d{1,2})?|cuda-?\d{0,2}(?:[.-]\d{1,2}){0,2}|lib[\w+-]{1,60}\.so(?:\.\d{1,6}){0,4}"
    r"|nvidia[\w-]{0,40}|[\d.]{1,20}"
    r"|torch(?:vision|audio)?|(?:transformers|accelerate|bitsandbytes|flash_attn|xformers|triton|numpy"
    r"|pynvml)(?:\.py)?|\w{1,20}\.pth|dir\d{1,4}"
)


def redact(machine: Machine, *, secrets: Collection[str] = ()) -> Machine:
    """Make a snapshot safe to publish.

    Args:
        machine: Any machine.
        secrets: Words that must not be in it, such as the host's name and the user's.
    """
    whole: dict[str, Any] = msgspec.to_builtins(machine)
    uuids = [gpu.uuid for gpu in machine.gpus]
    uuids += [slice_.uuid for gpu in machine.gpus for slice_ in gpu.mig_devices]
    names = machine.libraries.packages if machine.libraries is not None else ()
    scrubber = _Scrubber(uuids, [package.name for package in names], secrets)
    return msgspec.convert(scrubber.record(whole), Machine)


class _Scrubber:
    """Replaces what is private, each name by the same pseudonym throughout."""

    def __init__(self, uuids: Collection[str], packages: Collection[str], secrets: Collection[str]) -> None:
        self._uuids = [uuid.lower() for uuid in uuids]
        self._packages = {form for name in packages for form in (name, name.replace("-", "_"))}
        # A name of one or two letters is in every word.
        words = sorted({secret for secret in secrets if len(secret) > 2 and secret not in _PUBLIC}, key=len, reverse=True)
        self._words = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE) if words else None
        self._folders: dict[str, str] = {}
        self._hosts: dict[str, str] = {}

    def record(self, value: Any, key: str = "") -> Any:
        """A builtin value of a field, and all in it."""
        if key in _DROPPED:
            return None
        if isinstance(value, dict):
            if key == "environment":
                return {name: self.variable(name, text) for name, text in value.items()}
            return {name: self.record(inner, name) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.record(inner, key) for inner in value]
        if not isinstance(value, str) or key in _KEPT:
            return value
        if key == "source" and not value.startswith(("/", "~")):
            # A file of a package, or a field of its metadata.
            return value
        return self.path(value) if key in _PATHS else self.text(value)

    def variable(self, name: str, value: str) -> str:
        """The value of an environment variable."""
        cleaned = self.text(value)
        if _PATH_VARIABLES.search(name):
            # Once more as what it is, a list of paths: blanks in them are no ends.
            return ":".join(self.path(part) for part in cleaned.split(":"))
        return cleaned

    def text(self, value: str) -> str:
        """Any text."""
        for pattern in (_MNT_HOME, _WINDOWS_HOME, _HOME):
            value = pattern.sub("~", value)
        value = _PATH.sub(lambda match: self._folded(match[0]), value)
        for pattern in _SECRETS:
            value = pattern.sub("REDACTED", value)
        value = _MAIL.sub("user@host", value)
        value = _URL_HOST.sub(lambda match: self._host(match[0]), value)
        value = _MAC.sub("00:00:00:00:00:00", _IPV6.sub("::", _IPV4.sub("0.0.0.0", value)))
        value = _UUID.sub(self._uuid, value)
        return value if self._words is None else self._words.sub("REDACTED", value)

    def path(self, value: str) -> str:
        """A path as a whole, or what is none as text."""
        for pattern in (_MNT_HOME, _WINDOWS_HOME, _HOME):
            value = pattern.sub("~", value)
        return self.text(self._folded(value) if "/" in value else value)

    def _folded(self, path: str) -> str:
        return "/".join(self._folder(part) for part in path.split("/"))

    def _folder(self, part: str) -> str:
        if part == "" or part in _PUBLIC or part in self._packages or _PUBLIC_FORMS.fullmatch(part):
            return part
        return self._folders.setdefault(part, f"dir{len(self._folders) + 1}")

    def _host(self, host: str) -> str:
        name = host.rpartition("@")[2].partition(":")[0].lower()
        if name in _PUBLIC_HOSTS:
            return host
        return self._hosts.setdefault(name, f"host{len(self._hosts) + 1}")

    def _uuid(self, match: re.Match[str]) -> str:
        """A UUID, or the beginning of one: its pseudonym begins so that it names the same GPUs."""
        if match["hex"]:
            kind = match["kind"]
            return f"{kind}-{_pseudonym(match['hex'])}" if kind else _pseudonym(match["hex"])
        kind, part = match["start"], match["part"].lower()
        named = [uuid for uuid in self._uuids if uuid.startswith(f"{kind.lower()}-{part}")]
        if not named:
            return f"{kind}-{_pseudonym(part)[: len(part)]}"
        wanted = [_pseudonym(uuid.partition("-")[2]) for uuid in named]
        others = [_pseudonym(uuid.partition("-")[2]) for uuid in self._uuids if uuid not in named]
        length = _shared(wanted) if len(wanted) > 1 else max(len(part), _needed(wanted[0], others))
        return f"{kind}-{wanted[0][:length]}"


def _pseudonym(hexadecimal: str) -> str:
    digest = hashlib.sha256(hexadecimal.lower().encode()).hexdigest()
    return f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"


def _shared(texts: Collection[str]) -> int:
    """Length of the beginning that all have."""
    return next(
        (place for place, chars in enumerate(zip(*texts, strict=True)) if len(set(chars)) > 1), len(next(iter(texts)))
    )


def _needed(text: str, others: Collection[str]) -> int:
    """Length from which on a beginning is no other's."""
    return 1 + max((_shared((text, other)) for other in others), default=0)
