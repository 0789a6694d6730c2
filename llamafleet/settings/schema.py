"""What the operator asked for: `host.data`, typed and checked.

Defaults live in `inventory/group_data/all.py` alone; this module knows names and types only.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from llamafleet.settings import extra_flags as extra

BACKENDS = ("auto", "cuda", "hip", "vulkan", "cpu")
# common/arg.cpp, kv_cache_types: the types llama-server accepts for --cache-type-k/-v.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

# Names that belong to pyinfra and its connectors, not to us.
_FOREIGN_PREFIXES = ("_", "ssh_", "dockerssh_", "docker_", "chroot_", "local_", "vagrant_", "winrm_")


class SettingsError(ValueError):
    """One or more settings are unusable; `problems` has a sentence for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def unit_of(name: str) -> str:
    """The systemd unit of the instance of that name."""
    return f"llama-server-{name}.service"


@dataclass(frozen=True)
class Instance:
    """One model served by one unit, `llama-server-NAME.service`."""

    name: str
    source: str
    port: int
    priority: int
    context_tokens: int | None
    prompt_tokens: int
    live_tokens: int | None
    reply_tokens: int
    concurrency: int
    slots: int | None
    kv_types: tuple[str, ...]
    ubatch_tokens: int | None
    threads: int | None
    prompt_cache_mib: int
    context_checkpoints_mib: int
    listen: str
    api_key_file: str | None
    allow_unauthenticated: bool
    tls_certificate_file: str | None
    tls_key_file: str | None
    extra_flags: tuple[str, ...]
    dangerous_flags: tuple[str, ...]
    sha256: str | None
    mirrors: tuple[str, ...]

    @property
    def unit(self) -> str:
        """The systemd unit's name."""
        return unit_of(self.name)


@dataclass(frozen=True)
class Settings:
    """All settings of one host; `inventory/group_data/all.py` explains each."""

    models: tuple[Instance, ...]
    llama_cpp_repository: str
    llama_cpp_ref: str
    backend: str
    cuda_toolkit: str
    vulkan_devices: tuple[int, ...] | None
    build_ui: bool
    build_jobs: int | None
    build_cache: str | None
    keep_releases: int
    hub_endpoint: str
    hub_token_file: str | None
    gpu_reserve_mib: int
    ram_reserve_mib: int
    allow_swap: bool
    speed_floor_percent: int
    liveness_seconds: int
    liveness_interval_seconds: int
    uninstall_models: bool

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Settings:
        """Check a host's data and make settings of it.

        Raises `SettingsError` with every problem found, each naming the key, the value and
        what was expected.
        """
        ours = {k: v for k, v in data.items() if not k.startswith(_FOREIGN_PREFIXES)}
        defaults = ours.pop("model_defaults", {})
        if not isinstance(defaults, Mapping):
            raise SettingsError([f"model_defaults: should be a dictionary, is {defaults!r}"])
        problems = [*_unknown(ours, _names(cls), ""), *_missing(ours, _names(cls), "")]
        values = {k: _frozen(v) if k == "vulkan_devices" else v for k, v in ours.items() if k in _names(cls)}
        if isinstance(values.get("models"), list | tuple):
            values["models"] = tuple(_instances(values["models"], defaults, problems))
        problems += _wrong_types(cls, values, "", skip=("models",))
        if not isinstance(values.get("models", ()), tuple):
            problems.append(f"models: should be a list of dictionaries, is {values['models']!r}")
        if not problems:
            problems += _implausible(values)
        if problems:
            raise SettingsError(problems)
        return cls(**values)


def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def _unknown(values: Mapping[str, Any], known: tuple[str, ...], path: str) -> Iterator[str]:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known are {', '.join(known)}"
            yield f"{path}{key}: unknown setting{hint}"


def _missing(values: Mapping[str, Any], known: tuple[str, ...], path: str) -> Iterator[str]:
    for key in known:
        if key not in values:
            where = "the entry must give it" if path else "inventory/group_data/all.py must give it"
            yield f"{path}{key}: missing; {where}"


def _instances(entries: Any, defaults: Mapping[str, Any], problems: list[str]) -> Iterator[Instance]:
    for position, entry in enumerate(entries):
        path = f"models[{position}]."
        if not isinstance(entry, Mapping):
            problems.append(f"models[{position}]: should be a dictionary, is {entry!r}")
            continue
        values = {**defaults, **entry}
        known = _names(Instance)
        found = [*_unknown(values, known, path), *_missing(values, known, path)]
        values = {k: _frozen(v) for k, v in values.items() if k in known}
        found += _wrong_types(Instance, values, path)
        found = found or list(_implausible_instance(values, path))
        problems += found
        if not found:
            yield Instance(**values)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _wrong_types(cls: type, values: Mapping[str, Any], path: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in skip and not _is(value, hints[key]):
            yield f"{path}{key}: should be {_say(hints[key])}, is {value!r}"


def _is(value: Any, hint: Any) -> bool:
    """Is the value of the type hint? True is no integer here, unlike in Python."""
    if isinstance(hint, types.UnionType):
        return any(_is(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(item, typing.get_args(hint)[0]) for item in value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _say(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_say(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_say(typing.get_args(hint)[0])}s"
    return {str: "a string", int: "a whole number", bool: "True or False", type(None): "None"}[hint]


def _implausible_instance(values: Mapping[str, Any], path: str) -> Iterator[str]:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", values["name"]):
        yield f"{path}name: should be 1 to 63 of a-z 0-9 . _ -, letter or digit first, is {values['name']!r}"
    if values["name"].endswith("-liveness"):
        yield f"{path}name: should not end in -liveness, as liveness checks' units do, is {values['name']!r}"
    if not values["source"].startswith(("hf:", "http://", "https://", "/")):
        yield f"{path}source: should begin with hf:, http://, https:// or /, is {values['source']!r}"
    if not _is_address(values["listen"]):
        yield f"{path}listen: should be an IP address, such as 127.0.0.1 or 0.0.0.0, is {values['listen']!r}"
    for key, low, high in _RANGES:
        value = values[key]
        if value is not None and not low <= value <= high:
            yield f"{path}{key}: should be from {low} to {high}, is {value}"
    for kv_type in values["kv_types"]:
        if kv_type not in KV_TYPES:
            yield f"{path}kv_types: should be of {', '.join(KV_TYPES)}, is {kv_type!r}"
    if not values["kv_types"]:
        yield f"{path}kv_types: should name at least one type, is empty"
    yield from _open_doors(values, path)
    if values["sha256"] is not None and not re.fullmatch(r"[0-9a-f]{64}", values["sha256"]):
        yield f"{path}sha256: should be 64 lower-case hexadecimal digits, is {values['sha256']!r}"


def _open_doors(values: Mapping[str, Any], path: str) -> Iterator[str]:
    """Who gets in without being asked for a key, or reads what others say."""
    guarded = values["api_key_file"] is not None or values["allow_unauthenticated"]
    if _is_address(values["listen"]) and not ipaddress.ip_address(values["listen"]).is_loopback and not guarded:
        yield (
            f"{path}listen: other machines reach {values['listen']}, and no key is asked: give an api_key_file, "
            "or set allow_unauthenticated = True"
        )
    one, other = values["tls_certificate_file"], values["tls_key_file"]
    if (one is None) != (other is None):
        missing = "tls_certificate_file" if one is None else "tls_key_file"
        yield f"{path}{missing}: missing; certificate and key are given together"
    found = extra.problems(values["extra_flags"], values["dangerous_flags"], values["api_key_file"] is not None)
    yield from (f"{path}{problem}" for problem in found)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


_RANGES = (
    ("port", 1, 65535),
    ("context_tokens", 256, 2**31 - 1),
    ("priority", -1000, 1000),
    ("prompt_tokens", 1, 2**31 - 1),
    ("live_tokens", 1, 2**31 - 1),
    ("reply_tokens", 1, 2**31 - 1),
    ("concurrency", 1, 256),
    ("slots", 1, 256),
    ("ubatch_tokens", 32, 65536),
    ("threads", 1, 4096),
    ("prompt_cache_mib", 0, 2**31 - 1),
    ("context_checkpoints_mib", 0, 2**31 - 1),
)


def _implausible(values: Mapping[str, Any]) -> Iterator[str]:
    if values["backend"] not in BACKENDS:
        yield f"backend: should be one of {', '.join(BACKENDS)}, is {values['backend']!r}"
    toolkit = values["cuda_toolkit"]
    if toolkit not in ("auto", "nvidia", "distro") and not toolkit.startswith("/"):
        yield f"cuda_toolkit: should be auto, nvidia, distro or an absolute path, is {toolkit!r}"
    if values["build_cache"] is not None and not values["build_cache"].startswith("/"):
        yield f"build_cache: should be an absolute path on the host, is {values['build_cache']!r}"
    if not values["hub_endpoint"].startswith(("http://", "https://")):
        yield f"hub_endpoint: should begin with http:// or https://, is {values['hub_endpoint']!r}"
    for key in ("llama_cpp_repository", "llama_cpp_ref"):
        if not values[key] or values[key].startswith("-"):
            yield f"{key}: should not be empty or begin with a dash, is {values[key]!r}"
    for key in ("keep_releases", "gpu_reserve_mib", "ram_reserve_mib"):
        if values[key] < 0:
            yield f"{key}: should be 0 or more, is {values[key]}"
    if not 0 <= values["speed_floor_percent"] <= 100:
        yield f"speed_floor_percent: should be from 0 to 100, is {values['speed_floor_percent']}"
    if values["liveness_seconds"] != 0 and values["liveness_seconds"] < 5:
        yield f"liveness_seconds: should be 0 (no check) or 5 or more, is {values['liveness_seconds']}"
    if values["liveness_interval_seconds"] < 1:
        yield f"liveness_interval_seconds: should be 1 or more, is {values['liveness_interval_seconds']}"
    if values["build_jobs"] is not None and values["build_jobs"] < 1:
        yield f"build_jobs: should be 1 or more, is {values['build_jobs']}"
    yield from _clashes(values["models"])


def _clashes(instances: tuple[Instance, ...]) -> Iterator[str]:
    for position, one in enumerate(instances):
        for other in instances[:position]:
            if one.name == other.name:
                yield f"models[{position}].name: {one.name!r} is used twice"
            if one.port == other.port:
                yield f"models[{position}].port: {one.port} is already the port of {other.name!r}"
