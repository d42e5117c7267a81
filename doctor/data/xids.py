"""Numbers by which the NVIDIA driver reports faults in the kernel log.

Source: NVIDIA, "Xid Errors" (docs.nvidia.com/deploy/xid-errors), table of Xids.
"""

from __future__ import annotations

XIDS = {
    13: "a program's kernel made an illegal access or instruction",
    31: "a program accessed memory that is not mapped",
    32: "a command reached the GPU damaged, often through a bad PCIe link",
    43: "the GPU stopped work of a program that had failed",
    45: "work was torn down after an earlier fault",
    48: "an uncorrectable memory error",
    61: "a breakpoint of the GPU's microcontroller",
    62: "the GPU's microcontroller halted",
    63: "a row of memory was marked for remapping",
    64: "remapping a row of memory failed: the card is worn out",
    68: "a fault of the video decoder",
    69: "a program's graphics or compute class failed",
    74: "a fault of an NVLink",
    79: "the GPU has fallen off the bus",
    92: "many single-bit memory errors",
    94: "a contained memory error: the program was stopped",
    95: "an uncontained memory error: every program on the GPU was stopped",
    109: "a program's work timed out",
    119: "the GPU's firmware did not answer in time",
    120: "the GPU's firmware failed",
    121: "a fault of the chip-to-chip link",
    136: "a fault of NVLink while it was set up",
    137: "a fault of NVLink that privileged access caused",
    140: "an unrecovered memory error",
    143: "the GPU could not be started",
    154: "the action that the driver recommends has changed",
}
"""Number to what it means, as the end of a sentence."""

_RESET = "sudo nvidia-smi --gpu-reset -i {gpu}"
XID_ADVICE: dict[int, tuple[str, str]] = {
    32: ("Reseat the card, and look at risers and at the power supply.", "nvidia-smi -q -i {gpu}"),
    48: ("Stop what uses the GPU and reset it; if it comes again, have the card replaced.", _RESET),
    62: ("Stop what uses the GPU and reset it; if it comes again, have the card looked at.", _RESET),
    63: ("Reset the GPU when it is idle: the row is then remapped.", _RESET),
    64: ("Have the card replaced.", "nvidia-smi -q -d ROW_REMAPPER -i {gpu}"),
    74: ("Look at the links and their errors; reseat the bridge, or have the board looked at.", "nvidia-smi nvlink -e"),
    79: ("Power the machine off and on; if it comes again, reseat the card.", "sudo poweroff"),
    92: ("Watch the counters; if they grow, have the card replaced.", "nvidia-smi -q -d ECC -i {gpu}"),
    95: ("Stop what uses the GPU and reset it.", _RESET),
    119: ("Stop what uses the GPU and reset it; if it comes again, try another branch of the driver.", _RESET),
    120: ("Stop what uses the GPU and reset it; if it comes again, try another branch of the driver.", _RESET),
    140: ("Stop what uses the GPU and reset it; if it comes again, have the card replaced.", _RESET),
}
"""Number to what to do and the command for it, which follows the one that shows the log. Source: NVIDIA, "Xid Errors",
recommended actions. What a program caused has none."""

MEMORY_XIDS = frozenset({48, 63, 64, 92, 94, 95, 140})
"""What the counters of ECC errors and row remapping count, too."""

NVLINK_XIDS = frozenset({74, 136, 137})
"""What links that are inactive or count errors show, too."""

MINOR_XIDS = frozenset({13, 31, 43, 45, 68, 69, 94, 109, 154})
"""Caused by, or confined to, one program: the GPU itself goes on working. 45 also comes when a program is killed; what 154
tells is the recovery action, which NVML has as it is now."""
