"""The errors that users can meet, each one sentence that says what, where and what to do.

::

    VlmDoctorError
    ├── UsageError              bad command line, machine spec, marker or setting      exit status 2
    │   ├── OutputError         standard output cannot be written
    │   ├── MachineError        a machine spec or snapshot that cannot be read
    │   └── MapError            a device_map that cannot be read, or a model that cannot be moved
    ├── ModelError              a model that cannot be read                            exit status 2
    │   ├── ModelNotFoundError  no such folder, hub id or catalogue name
    │   └── ModelFileError      a config or checkpoint file that is damaged or lacks what is needed
    └── CouldNotLookError       nothing that matters could be examined                 exit status 3
"""

from __future__ import annotations


class VlmDoctorError(Exception):
    """Base of every error whose text is meant for the user as it stands."""

    exit_status = 2


class UsageError(VlmDoctorError):
    """What the user wrote cannot be understood."""


class OutputError(UsageError):
    """Standard output cannot be written."""


class MachineError(UsageError):
    """A machine spec or a snapshot file that cannot be read."""


class MapError(UsageError):
    """A ``device_map`` that cannot be read, or a loaded model that cannot be moved."""


class ModelError(VlmDoctorError):
    """A model that cannot be read."""


class ModelNotFoundError(ModelError):
    """There is no such folder, hub id or catalogue name."""


class ModelFileError(ModelError):
    """A config or checkpoint file is damaged, or lacks what a plan needs."""


class CouldNotLookError(VlmDoctorError):
    """Nothing that matters could be examined."""

    exit_status = 3
