"""4xx, second half: does data arrive that one GPU sends to another?"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from ..data.xids import NVLINK_XIDS
from ..findings import Finding, Fix
from ..machine import Gpu, Link
from ..visibility import quote
from ._check import Check, Facts, Result, found, label, names, plain, skipped, unknown
from ._remedy import is_red_hat, python, shell_path
from .kernel import said_by_kernel

_FALSE = ("", "0")
_OFF_LEVELS = ("LOC", "0")
_NOISY = ("INFO", "TRACE")
_FILES = ("NCCL_TOPO_FILE", "NCCL_GRAPH_FILE")


def redirected_peer_copies(facts: Facts) -> Result:
    """Direct copies between GPUs may be redirected by the IOMMU and arrive wrong.

    ## What it checks
    On real hardware: an IOMMU that translates, while the driver grants peer access between visible GPUs that NVLink does
    not join; and accesses of a GPU that the IOMMU refused.

    ## Why it matters
    CUDA says that the copy went well, and the data is lost or scrambled: `device_map="auto"` then answers nonsense, or
    fails with "device-side assert". Nothing else tells.

    ## Example
    `warning VLM406 The IOMMU translates, and GPUs 0, 1 copy to each other over PCIe: data may arrive wrong.`

    ## What to do
    Start the kernel with `iommu=pt` (passthrough), and switch ACS off in the BIOS. Until then NCCL obeys
    `NCCL_P2P_DISABLE=1`; torch's own copies have no such switch.

    ## When it is fine
    Where you have seen that copies arrive whole. Pairs that NVLink joins, and virtual machines, are not reported.

    ## Sources
    `/sys/kernel/iommu_groups/*/type`, kernel log; NVIDIA, CUDA programming guide, "IOMMU on Linux"; pytorch issue 84803,
    accelerate issue 4036.
    """
    host = facts.machine.host
    if len(facts.visible) < 2:
        return skipped("fewer than 2 visible GPUs")
    refused = [gpu for gpu in facts.visible if _was_refused(facts, gpu)]
    if refused:
        message = f"The IOMMU has refused accesses of {names(refused)}: data between GPUs may be lost."
        return (_redirected(facts, message, refused),)
    if host is None or host.is_virtual_machine is not False:
        return skipped("not known to be real hardware")
    risky = _peers_over_pcie(facts)
    if not risky or host.iommu in ("off", "passthrough"):
        return ()
    if host.iommu == "unknown":
        return unknown("what the IOMMU does is not known")
    gpus = [gpu for gpu in facts.visible if any(gpu.index in (link.a, link.b) for link in risky)]
    return (
        _redirected(
            facts, f"The IOMMU translates, and {names(gpus)} copy to each other over PCIe: data may arrive wrong.", gpus
        ),
    )


def _was_refused(facts: Facts, gpu: Gpu) -> bool:
    events = facts.machine.driver.kernel_events or ()
    return any(event.kind == "iommu_fault" and event.bus_id == gpu.bus_id for event in events)


def _peers_over_pcie(facts: Facts) -> list[Link]:
    members = {gpu.index for gpu in facts.visible}
    links = [link for link in facts.machine.links if link.a in members and link.b in members and not link.nvlinks]
    return [link for link in links if "ok" in (link.p2p_read, link.p2p_write)]


def _redirected(facts: Facts, message: str, gpus: Sequence[Gpu]) -> Finding:
    return found(
        "warning",
        message,
        cause="A translating IOMMU, or PCIe access control, sends peer traffic through the processor.",
        evidence=facts.evidence("host.iommu", "host.is_virtual_machine"),
        fix=_pass_through(facts),
        gpus=gpus,
    )


def _pass_through(facts: Facts) -> Fix:
    """The kernel's command line is changed in another way by each family of distributions."""
    if is_red_hat(facts):
        text = "Let the IOMMU pass through, reboot, and switch ACS off in the BIOS."
        commands = ("sudo grubby --update-kernel=ALL --args=iommu=pt", "sudo reboot")
    else:
        text = (
            "Let the IOMMU pass through: put iommu=pt into GRUB_CMDLINE_LINUX of /etc/default/grub, reboot, and switch ACS "
            "off in the BIOS."
        )
        commands = ("sudo nano /etc/default/grub", "sudo update-grub && sudo reboot")
    return Fix(text=text, commands=commands, who="administrator")


def nccl_settings(facts: Facts) -> Result:
    """Settings of NCCL do not fit this machine.

    ## What it checks
    NCCL's variables in the environment and in its files (`~/.nccl.conf`, `/etc/nccl.conf`): peer access or shared memory
    switched off, network interfaces that do not exist, topology files, noise.

    ## Why it matters
    They are left over from another machine or another fault. Collectives then take the slow way, or fail with "no socket
    interface found". What stands in a file is shown by no list of environment variables.

    ## Example
    `warning VLM407 NCCL_P2P_DISABLE='1' (from /etc/nccl.conf) keeps NCCL off the NVLinks between the GPUs.`

    ## What to do
    `unset` the variable, or take the line out of the file.

    ## When it is fine
    Where peer access is broken and was switched off on purpose: without NVLink it is only mentioned.

    ## Sources
    NVIDIA, NCCL, Environment Variables.
    """
    settings = {setting.name: (setting.value, setting.file) for setting in reversed(facts.machine.nccl_settings)}
    settings |= {n: (v, "the environment") for n, v in facts.machine.environment.items() if n.startswith("NCCL_")}
    if not settings:
        return skipped("NCCL has no settings")
    if len(facts.visible) < 2:
        return skipped("fewer than 2 visible GPUs")
    findings = [_peer_setting(facts, settings), _interface_setting(facts, settings)]
    if settings.get("NCCL_SHM_DISABLE", ("0", ""))[0].strip() not in _FALSE:
        findings.append(_setting(facts, settings, "NCCL_SHM_DISABLE", "keeps NCCL from using shared memory", is_bad=True))
    if settings.get("NCCL_DEBUG", ("", ""))[0].strip().upper() in _NOISY:
        findings.append(_setting(facts, settings, "NCCL_DEBUG", "fills the output", is_bad=False))
    findings += [
        _setting(facts, settings, name, "describes one machine, perhaps another one than this", is_bad=False)
        for name in _FILES
        if name in settings
    ]
    return tuple(finding for finding in findings if finding is not None)


def _peer_setting(facts: Facts, settings: Mapping[str, tuple[str, str]]) -> Finding | None:
    disabled, level = (settings.get(name, ("", ""))[0].strip() for name in ("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"))
    name = "NCCL_P2P_DISABLE" if disabled not in _FALSE else "NCCL_P2P_LEVEL"
    if name == "NCCL_P2P_LEVEL" and level.upper() not in _OFF_LEVELS:
        return None
    members = {gpu.index for gpu in facts.visible}
    has_nvlink = any(link.nvlinks for link in facts.machine.links if link.a in members and link.b in members)
    effect = "keeps NCCL off the NVLinks between the GPUs" if has_nvlink else "sends NCCL's data through the host"
    return _setting(facts, settings, name, effect, is_bad=has_nvlink)


def _interface_setting(facts: Facts, settings: Mapping[str, tuple[str, str]]) -> Finding | None:
    """NCCL_SOCKET_IFNAME: prefixes, with ``=`` in front exact names, with ``^`` in front what to leave out."""
    value = settings.get("NCCL_SOCKET_IFNAME", ("", ""))[0].strip()
    host = facts.machine.host
    here = host.network_interfaces if host is not None else ()
    if not value or value.startswith("^") or not here:
        return None
    is_exact = value.startswith("=")
    wanted = [word.strip() for word in value.lstrip("=").split(",") if word.strip()]
    if any(name == word if is_exact else name.startswith(word) for name in here for word in wanted):
        return None
    effect = f"names no network interface of this machine ({plain(', '.join(here[:6]))})"
    return _setting(facts, settings, "NCCL_SOCKET_IFNAME", effect, is_bad=True)


def _setting(facts: Facts, settings: Mapping[str, tuple[str, str]], name: str, effect: str, *, is_bad: bool) -> Finding:
    value, where = settings[name]
    is_file = where != "the environment"
    positions = [at for at, setting in enumerate(facts.machine.nccl_settings) if setting.name == name]
    path = f"nccl_settings[{positions[0]}].value" if is_file else f"environment.{name}"
    return found(
        "warning" if is_bad else "info",
        f"{name}={quote(value)} (from {plain(where)}) {effect}.",
        evidence=facts.evidence(path),
        fix=_take_out(name, where) if is_file else Fix(text=f"Unset {name}.", commands=(f"unset {name}",)),
    )


def _take_out(name: str, file: str) -> Fix:
    rights, who = ("sudo ", "administrator") if file.startswith("/etc/") else ("", "you")
    line = shlex.quote(rf"/^[[:space:]]*{name}[[:space:]]*=/d")
    return Fix(
        text=f"Take {name} out of {plain(file)}.",
        commands=(f"{rights}sed -i {line} {shell_path(file)}",),
        who=cast(Literal["you", "administrator"], who),
    )


def wrong_numa_node(facts: Facts) -> Result:
    """This process runs on processors far from its GPUs.

    ## What it checks
    The NUMA node of each visible GPU against the processors that this process may use.

    ## Why it matters
    Copies from host to GPU then cross the link between the sockets: loading and data loaders are slower.

    ## Example
    `warning VLM408 GPUs 0, 1 belong to NUMA node 0, and this process may only run on node 1.`

    ## What to do
    `numactl --cpunodebind=0 --membind=0 python …`, or ask the scheduler for processors next to the GPUs.

    ## When it is fine
    Where only some of the GPUs are far, it is only mentioned: that is so by design when a process uses all of them.

    ## Sources
    `/sys/bus/pci/devices/*/numa_node`, `/sys/devices/system/node`, sched_getaffinity(2).
    """
    host = facts.machine.host
    nodes = host.numa_nodes if host is not None else ()
    if len(nodes) < 2:
        return skipped("fewer than 2 NUMA nodes are known")
    mine = {node.node for node in nodes if node.allowed_cpu_count}
    placed = [gpu for gpu in facts.visible if gpu.numa_node in {node.node for node in nodes}]
    if not placed:
        return unknown("the NUMA node of no visible GPU is known")
    far = [gpu for gpu in placed if gpu.numa_node not in mine]
    if not far:
        return ()
    theirs = sorted({gpu.numa_node for gpu in far if gpu.numa_node is not None})
    node = theirs[0]
    verb = "belong" if len(far) > 1 else "belongs"
    return (
        found(
            "warning" if len(far) == len(placed) else "info",
            f"{names(far)} {verb} to NUMA node {', '.join(map(str, theirs))}, and this process may only run on node "
            f"{', '.join(map(str, sorted(mine))) or 'none of them'}.",
            cause="A processor set or numactl binds this process to the other socket.",
            evidence=facts.evidence(*(facts.path(gpu, "numa_node") for gpu in far[:4])),
            fix=Fix(
                text=f"Start programs on processors of node {node}, as here pytest; a container or job must be given some.",
                commands=(f"numactl --cpunodebind={node} --membind={node} {python(facts)} -m pytest",),
            ),
            gpus=far,
        ),
    )


def nvlink_errors(facts: Facts) -> Result:
    """NVLinks have had errors.

    ## What it checks
    Replays and recoveries that each GPU counts over all its NVLinks, and Xid 74 in the kernel log.

    ## Why it matters
    A few over months are harmless; a number that grows slows every split, and ends in Xid 74.

    ## Example
    `info VLM409 GPU 3 (NVIDIA A100) counts 12 NVLink replays and recoveries.`

    ## What to do
    Look again after a run: `nvidia-smi nvlink -e -i 3`. If it grows, reseat the bridge or have the board looked at.

    ## When it is fine
    While it does not grow. With Xid 74 in the kernel log it is a warning.

    ## Sources
    NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL, NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL; NVIDIA, Xid Errors.
    """
    told = [gpu for gpu in facts.working if gpu.nvlink_errors is not None]
    if not any(gpu.nvlinks for gpu in facts.working):
        return skipped("no NVLink")
    if not told:
        return unknown("NVLink errors are not told")
    return tuple(_link_errors(facts, gpu) for gpu in told if gpu.nvlink_errors)


def _link_errors(facts: Facts, gpu: Gpu) -> Finding:
    log = said_by_kernel(facts, {gpu.bus_id}, NVLINK_XIDS)
    cause, seen = log or (None, {})
    return found(
        "warning" if log is not None else "info",
        f"{label(gpu)} counts {gpu.nvlink_errors:,} NVLink replays and recoveries.",
        cause=cause,
        evidence=facts.evidence(facts.path(gpu, "nvlink_errors")) | seen,
        fix=Fix(
            text="Look again after a run; if it grows, reseat the bridge or have the board looked at."
            if log is None
            else "Reseat the bridge, or have the board looked at.",
            commands=(f"nvidia-smi nvlink -e -i {gpu.index}",),
            who="administrator",
        ),
        gpus=(gpu,),
    )


CHECKS = (
    Check(
        code="VLM406",
        title="peer copies may arrive wrong",
        run=redirected_peer_copies,
        needs=("gpus",),
        explained_by=("VLM201", "VLM403"),
    ),
    Check(code="VLM407", title="NCCL settings", run=nccl_settings, needs=("gpus",), explained_by=("VLM201",)),
    Check(code="VLM408", title="far from its GPUs", run=wrong_numa_node, needs=("gpus", "host"), explained_by=("VLM201",)),
    Check(code="VLM409", title="NVLink errors", run=nvlink_errors, needs=("gpus",), told_by=("VLM402",)),
)
