"""GPUs as settings name them: by the plan's index, by UUID, or by the address on the PCI bus."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llamafleet.settings.defaults import defaults

RULE = 'be a GPU\'s index, UUID or PCI id, such as 0, "GPU-1a2b..." or "0000:01:00.0"'
DEFAULT = "default"  # in a dictionary by GPU: the value of all GPUs that it does not name
LARGEST_MIB = 2**31 - 1  # as for all sizes in MiB: 2 PiB

_INDEX = re.compile(r"(?:GPU)?([0-9]{1,6})", re.IGNORECASE | re.ASCII)
# sysfs has four digits for the domain, nvidia-smi eight, and lspci leaves out domain 0.
_PCI = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", re.ASCII)
_UUID = re.compile(r"(?:gpu|mig|pci)-[0-9a-z/:.-]{1,100}|[0-9a-f-]{32,36}", re.ASCII)


def gpu_name(value: object) -> str:
    """The name in the one form in which names are compared; raises ValueError with the rule."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**6:
        return str(value)
    text = value.strip().lower() if isinstance(value, str) else ""
    if index := _INDEX.fullmatch(text):
        return str(int(index[1]))
    if address := _PCI.fullmatch(text):
        return f"{int(address[1] or '0', 16):04x}:{address[2]}"
    if _UUID.fullmatch(text):
        return text
    raise ValueError(RULE)


def gpu_list(value: object) -> object:
    """The value, where it is a list; raises ValueError with the rule."""
    if isinstance(value, list | tuple):
        return value
    raise ValueError('be a list of GPUs by index, UUID or PCI id, such as [0, "0000:02:00.0"]')


def gpu_reserve(value: object) -> int | Mapping[str, int]:
    """MiB for every GPU, or by GPU with those of all others. Raises ValueError with what the value should be."""
    if isinstance(value, Mapping):
        reserve = {key if key == DEFAULT else _key(key): size for key, size in value.items()}
        if all(_is_size(size) for size in reserve.values()):
            return {DEFAULT: defaults()["gpu_reserve_mib"], **reserve}
    elif _is_size(value):
        return value  # type: ignore[return-value]  # `_is_size` has looked
    form = f"be a whole number from 0 to {LARGEST_MIB}"
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(form)
    raise ValueError(f'{form}, or a dictionary of such by GPU, as {{0: 4096, "{DEFAULT}": 1024}}')


def _key(key: object) -> str:
    try:
        return gpu_name(key)
    except ValueError as error:
        raise ValueError(f'have keys that are "{DEFAULT}", or each {str(error).removeprefix("be ")}') from error


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_MIB
