"""What there is, for later or for others: ``collect`` and ``calibrate``."""

from __future__ import annotations

import os
from argparse import Namespace

import msgspec

from ._shared import read_machine, write

COULD_NOT_MEASURE = 3


def collect(options: Namespace) -> int:
    """Write a snapshot of this machine."""
    from .. import codec

    machine = read_machine(options)
    if options.redact:
        from ..redaction import redact
        from ..sources.identity import private_words

        machine = redact(machine, secrets=private_words(os.environ))
    write(codec.to_json(machine), options.output)
    return 0


def calibrate(options: Namespace) -> int:
    """Measure what torch takes of each GPU."""
    from ..answer import refuse_missing_gpus
    from ..formats.calibration_text import calibration_text
    from ..sources import collect as collect_machine
    from ..sources.calibration import calibrate as measure

    machine = collect_machine(with_torch=False)
    refuse_missing_gpus(machine, options.gpus)
    readings = measure(machine, gpus=options.gpus)
    status = 0 if any(reading.calibration for reading in readings) else COULD_NOT_MEASURE
    if options.json:
        text = msgspec.json.encode({"readings": readings, "exit_status": status}).decode() + "\n"
    else:
        text = calibration_text((one.gpu, one.name, one.calibration, one.reason) for one in readings)
    write(text, options.output)
    return status
