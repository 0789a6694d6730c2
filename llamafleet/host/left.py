"""What a host says of its disks, a due reboot and its firewall, as `llamafleet/remote/left.py` prints it.

A host is not trusted, as in machine.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator, Field

from llamafleet.host.machine import Bytes, Label, Message, Name
from llamafleet.host.recorded import readable
from llamafleet.validation import Flag

Path = Annotated[Label, BeforeValidator(readable)]


@dataclass(frozen=True)
class Space:
    """The disk of a path."""

    place: Path  # the folder above it that is there
    device: Name  # the same for paths of one file system
    free_bytes: Bytes
    mount: Path
    # Where a disk is to be mounted, by /etc/fstab, and is not; the path lies below.
    unmounted: Path | None = None
    read_only: Flag = False


@dataclass(frozen=True)
class Left:
    """What is left for people to do; empty where the host's program was not asked."""

    reboot: Message = ""
    # By port why other machines do not reach it.
    closed: Annotated[Mapping[Name, Message], Field(max_length=10_000)] = field(default_factory=dict)
    spaces: Annotated[Mapping[Path, Space], Field(max_length=1000)] = field(default_factory=dict)
    # The size of each model file, whole or partial, by the path of the whole one.
    model_bytes: Annotated[Mapping[Path, Bytes], Field(max_length=100_000)] = field(default_factory=dict)
