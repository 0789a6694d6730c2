"""The kinds of values that settings have: types and ranges, and the reason where a range ends."""

from __future__ import annotations

import functools
import ipaddress
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainValidator, with_config

from llamafleet import sources, validation
from llamafleet.remote.common import (
    ADDRESS_RULE,
    ETC,
    MODEL_FILE_RULE,
    OPT,
    VAR,
    is_address,
    is_model_file,
)
from llamafleet.settings.gpu_names import gpu_list, gpu_name, gpu_reserve
from llamafleet.validation import Listed, Should, Whole

# common/arg.cpp, kv_cache_types: the types llama-server accepts for --cache-type-k/-v.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

# It goes into paths, commands and units, none of which can hold a control character.
Text = Annotated[
    validation.Text,
    Field(max_length=2**17, description="MAX_ARG_STRLEN of Linux"),
    Should("have no control characters", functools.partial(re.fullmatch, r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*")),
]


def _kv_type(value: object) -> object:
    """A type of K/V that names the same type twice, as the type alone."""
    key, _, rest = value.partition("/") if isinstance(value, str) else ("", "", "")
    return key if key and key == rest else value


KvType = Annotated[
    Text,
    BeforeValidator(_kv_type),
    Should(
        f"be one of {', '.join(KV_TYPES)}, or two of them as K/V",
        lambda text: text in KV_TYPES or ("/" in text and set(text.split("/", 1)) <= set(KV_TYPES)),
    ),
]

# A range's reason is its description. llama.cpp's arguments are 32-bit integers (common_params).
_INT32 = 2**31 - 1
Tokens = Annotated[Whole, Field(ge=1, le=_INT32, description="llama.cpp counts tokens in 32 bits")]
CacheMib = Annotated[Whole, Field(ge=0, le=_INT32, description="llama.cpp counts MiB in 32 bits; 0: no such cache")]
Slots = Annotated[Whole, Field(ge=1, le=256, description="LLAMA_MAX_SEQ, the most sequences of a context")]
# More than any host or workload has; numbers of any length would overflow what is calculated from them.
Mib = Annotated[Whole, Field(ge=0, le=_INT32, description="2 PiB")]
LONGEST = 10**9  # some thirty years


def _is_web(text: str) -> bool:
    return text.startswith(("http://", "https://"))


_BE_ADDRESS = Should(f"be {ADDRESS_RULE}", lambda text: not _is_web(text) or is_address(text))


def _is_source(text: str) -> bool:
    try:
        sources.parse(text)
    except sources.SourceError:
        return False
    return True


def _has_file_name(text: str) -> bool:
    """Whether a host can give the file its name. A repository's file is chosen later; of a path the file is there."""
    if text.startswith("/") or not _is_source(text):
        return text.startswith("/")
    name = sources.goes_to_hosts_as(text)
    return name is None or is_model_file(name)


_BE_HUB_FILE = Should(f"be {sources.FORMS}", lambda text: not text.startswith("hf:") or _is_source(text))
Source = Annotated[
    Text,
    Should("begin with hf:, http://, https:// or /", lambda text: text.startswith(("hf:", "/")) or _is_web(text)),
    _BE_ADDRESS,
    _BE_HUB_FILE,
    # The rule by which a host gives the file its name.
    Should(f"end in a file name of {MODEL_FILE_RULE} (else serve a copy under such a name)", _has_file_name),
]
# Its file may have any name: a host gives it the source's.
Mirror = Annotated[
    Text,
    Should("begin with hf:, http:// or https://", lambda text: text.startswith("hf:") or _is_web(text)),
    _BE_ADDRESS,
    Should(
        "be hf:OWNER/REPO/FILE.gguf or hf:OWNER/REPO/FILE.gguf@REVISION",
        lambda text: not text.startswith("hf:") or (_is_source(text) and not sources.parse(text).is_repository),
    ),
]
GpuName = Annotated[str, PlainValidator(gpu_name)]
GpuNames = Annotated[Listed[GpuName], Field(max_length=256), BeforeValidator(gpu_list)]
# MiB for every GPU, or by GPU with "default" for the others.
GpuReserve = Annotated[int | Mapping[str, int], PlainValidator(gpu_reserve)]
# git takes what begins with a dash for an option.
GitArgument = Annotated[Text, Should("not be empty or begin with a dash", lambda text: text and text[0] != "-")]


def is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    # Python takes anything behind "fe80::1%"; Linux' names of interfaces have 15 characters at most.
    return re.fullmatch(r"[0-9A-Fa-f:.]+(%[\w.-]{1,15})?", text, re.ASCII) is not None


def is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return "%" not in text and text.isascii()


# Part of the unit's name and of paths.
SiteName = Annotated[
    Text, Should("be 1 to 63 of A-Z a-z 0-9 . _ -", functools.partial(re.fullmatch, r"[A-Za-z0-9._-]{1,63}"))
]
Name = Annotated[
    Text,
    Should(
        "be 1 to 63 of a-z 0-9 . _ -, letter or digit first",
        functools.partial(re.fullmatch, r"[a-z0-9][a-z0-9._-]{0,62}"),
    ),
    Should("not end in -liveness, as liveness checks' units do", lambda text: not text.endswith("-liveness")),
]


def _sums(value: object) -> tuple[str, ...]:
    """The sums of a text, or of a list of texts."""
    sums = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    if sums and all(isinstance(one, str) and re.fullmatch(r"[0-9a-f]{64}", one) for one in sums):
        return tuple(sums)
    raise ValueError("be 64 lower-case hexadecimal digits, or a list of such, one for each file of a split model")


Sha256 = Annotated[Listed[Text], BeforeValidator(_sums)]
ContextTokens = Annotated[Whole, Field(ge=256, le=_INT32, description="llama.cpp rounds a context up to 256 tokens")]
# A variable of a process. A unit's line has at most a megabyte (systemd's LONG_LINE_MAX).
Variables = Annotated[
    Mapping[
        Annotated[
            Text,
            Should(
                "be a variable's name, of letters, digits and _",
                functools.partial(re.fullmatch, r"[A-Za-z_][A-Za-z0-9_]{0,254}", flags=re.ASCII),
            ),
        ],
        Text,
    ],
    Field(max_length=100),
]
# Folders in which the services see nothing, or something else (ProtectHome=, PrivateTmp=, PrivateDevices=), and those
# of the system.
_NO_MODELS = (
    *("/home", "/root", "/run", "/tmp", "/var/tmp"),  # noqa: S108 -- compared with, never written to
    *("/dev", "/proc", "/sys", "/boot", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64", ETC, OPT),
    *(f"{VAR}/{name}" for name in ("build", "src", "jobs", "staged", "good", "gate")),
)


def _holds_models(path: str) -> bool:
    return not any(path == one or path.startswith(f"{one}/") for one in _NO_MODELS)


ModelsDir = Annotated[
    Text,
    Should(
        "be an absolute path on the host, of letters, digits and . _ + = @ - between slashes",
        lambda text: re.fullmatch(r"(/[\w.+=@-]+)+", text, re.ASCII) and posixpath.normpath(text) == text,
    ),
    Should(f"lie outside of {', '.join(_NO_MODELS[:7])} and of the system's and llamafleet's folders", _holds_models),
]
UbatchTokens = Annotated[
    Whole, Field(ge=32, le=65536, description="well around the 256 to 8192 that a plan chooses from")
]
Threads = Annotated[Whole, Field(ge=1, le=4096, description="more than any host has")]
# As systemd's CPUAffinity= and /sys/devices/system/cpu have it.
Cpus = Annotated[
    Text,
    Should(
        "be numbers and ranges of CPUs, such as 0-5,12",
        functools.partial(re.fullmatch, r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*"),
    ),
]
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]"
DayWindow = Annotated[
    Text, Should("be two times of a day, such as 02:00-05:00", functools.partial(re.fullmatch, f"{_TIME}-{_TIME}"))
]


@with_config(extra="forbid")
@dataclass(frozen=True)
class Companion:
    """A file that is loaded beside a model: a projector, a draft model, an adapter."""

    source: Source
    sha256: Sha256 | None = None
    mirrors: Annotated[Listed[Mirror], Field(max_length=100)] = ()


@with_config(extra="forbid")
@dataclass(frozen=True)
class Adapter(Companion):
    """A LoRA adapter and the scale that it is applied with."""

    scale: Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False, description="1: as it was trained")] = 1.0


# The projector of the model's own repository.
AUTO = Companion("auto")


def by_source(value: object) -> object:
    """A companion that is given by its source alone."""
    return {"source": value} if isinstance(value, str) else value


def projector_file(value: object) -> object:
    return AUTO if value == AUTO.source else by_source(value)


OneCompanion = Annotated[Companion, BeforeValidator(by_source)]
Idle = Annotated[Whole, Field(ge=1, le=LONGEST, description="a pause")]
# Less than its gate may pause. llama-server counts milliseconds in 32 bits (server_context::start_loop).
Sleep = Annotated[Whole, Field(ge=10, le=2_147_483, description="longer than a gate's pauses; milliseconds in 32 bits")]


@with_config(extra="forbid")
@dataclass(frozen=True)
class RerankExample:
    """A question, a text that answers it and one that does not."""

    query: Text
    relevant: Text
    irrelevant: Text
