"""What the operator asked for: `host.data`, typed and checked.

Defaults live in `inventory/group_data/all.py` alone (see `defaults.py`); this module has names, types and ranges, and
the reason where a range ends.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PlainValidator, TypeAdapter, ValidationError, model_validator, with_config

from llamafleet import validation
from llamafleet.remote.common import (
    ADDRESS_RULE,
    is_address,
    keeps_secrets,
    unit_of,
)
from llamafleet.settings import (
    cache_shape,
    environment,
    monitoring,
    pictures,
    prompt_files,
    secrets,
    serving,
    speculation,
)
from llamafleet.settings import copies as copying
from llamafleet.settings import extra_flags as extra
from llamafleet.settings import gateway as gateways
from llamafleet.settings.defaults import MODEL_DEFAULTS, DefaultsError, with_defaults
from llamafleet.settings.kinds import (
    LONGEST,
    Adapter,
    CacheMib,
    Companion,
    ContextTokens,
    Cpus,
    DayWindow,
    GitArgument,
    GpuNames,
    GpuReserve,
    Idle,
    KvType,
    Mib,
    Mirror,
    ModelsDir,
    Name,
    OneCompanion,
    RerankExample,
    Sha256,
    SiteName,
    Sleep,
    Slots,
    Source,
    Text,
    Threads,
    Tokens,
    UbatchTokens,
    Variables,
    by_source,
    is_ip_address,
    is_network,
    projector_file,
)
from llamafleet.settings.other_names import LLAMA_CPP_NAMES
from llamafleet.settings.profiles import PROFILES, filled
from llamafleet.validation import Flag, Listed, Should, Whole, one_of

BACKENDS = ("auto", "cuda", "hip", "vulkan", "cpu")
SERVES = ("chat", "embedding", "reranking")
BOOT, DEMAND = "boot", "demand"
# common/arg.cpp, --pooling.
POOLINGS = ("none", "mean", "cls", "last", "rank")
SPECULATIONS = ("none", "auto", "ngram", "mtp", "draft", "eagle3", "dflash", "dspark")
NEVER, MISSING, ALWAYS = "never", "missing", "always"
CUT, WAIT, STOP = "cut", "wait", "stop"  # what becomes of replies that run on after `drain_seconds`

# Names that belong to pyinfra and its connectors, not to us.
_FOREIGN_PREFIXES = ("_", "ssh_", "dockerssh_", "docker_", "chroot_", "local_", "vagrant_", "winrm_")


class SettingsError(ValueError):
    """One or more settings are unusable; `problems` has a sentence for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@with_config(extra="forbid")
@dataclass(frozen=True)
class Instance:
    """One model served by one unit, `llama-server-NAME.service`."""

    name: Name
    source: Source
    port: Annotated[Whole, Field(ge=1, le=65535, description="TCP's; with 0 the kernel would choose")]
    profile: Annotated[Text, one_of(tuple(PROFILES))] | None
    priority: Annotated[Whole, Field(ge=-1000, le=1000, description="an order; more would be a slip of the keyboard")]
    context_tokens: ContextTokens | None
    prompt_tokens: Tokens
    live_tokens: Tokens | None
    reply_tokens: Tokens
    concurrency: Slots
    slots: Slots | None
    kv_types: Annotated[Listed[KvType], Should("name at least one type", bool)]
    ubatch_tokens: UbatchTokens | None
    batch_tokens: UbatchTokens | None
    threads: Threads | None
    threads_batch: Threads | None
    cpus: Cpus | None
    numa: Annotated[Text, one_of(("auto", "interleave", "local"))]
    load_mode: Annotated[Text, one_of(("none", "mlock"))]
    op_offload: Flag
    repack: Flag | None
    spilled_layers: Annotated[Whole, Field(ge=0, le=4096, description="more than any model has")] | None
    prompt_cache_mib: CacheMib
    context_checkpoints_mib: CacheMib
    serves: Annotated[Text, one_of(SERVES)]
    pooling: Annotated[Text, one_of(POOLINGS)] | None
    rerank_example: RerankExample | None
    projector: Annotated[Companion, BeforeValidator(projector_file)] | None
    image_min_tokens: Tokens | None
    image_max_tokens: Tokens | None
    speculation: Annotated[Text, one_of(SPECULATIONS)]
    draft: OneCompanion | None
    draft_max_tokens: Annotated[Whole, Field(ge=1, le=1024, description="far beyond what any draft gets right")] | None
    draft_min_tokens: Annotated[Whole, Field(ge=0, le=1024, description="0: as few as the draft is sure of")] | None
    tune_prompt_file: Text | None
    accept_slower: GitArgument | None
    adapters: Annotated[Listed[Annotated[Adapter, BeforeValidator(by_source)]], Field(max_length=64)]
    chat_template_file: Text | None
    grammar_file: Text | None
    json_schema_file: Text | None
    kv_unified: Flag
    pool_tokens: ContextTokens | None
    gpus: GpuNames | None
    copies: Annotated[int | Text, PlainValidator(copying.copies)]
    split_mode: Annotated[Text, one_of(("auto", "layer", "tensor"))]
    sleep_idle_seconds: Sleep | None
    start: Annotated[Text, one_of((BOOT, DEMAND))]
    idle_seconds: Idle
    listen: Annotated[Text, Should("be an IP address, such as 127.0.0.1 or 0.0.0.0", is_ip_address)]
    allowed_clients: Listed[
        Annotated[Text, Should("be an IP address or network, such as 10.0.0.7 or 10.0.0.0/8", is_network)]
    ]
    api_key_file: Text | None
    allow_unauthenticated: Flag
    tls_certificate_file: Text | None
    tls_key_file: Text | None
    extra_flags: Listed[validation.Text]  # words between blanks of any kind
    dangerous_flags: Listed[validation.Text]
    sha256: Sha256 | None
    allow_unverified: Flag
    gateway: Flag
    mirrors: Annotated[Listed[Mirror], Field(max_length=100, description="tried one after another")]
    allowed_drop_ins: Listed[
        Annotated[
            Text,
            Should("be a drop-in's file name, such as nice.conf", functools.partial(re.fullmatch, r"[\w@.:-]+\.conf")),
        ]
    ]

    OTHER_NAMES = LLAMA_CPP_NAMES

    @property
    def unit(self) -> str:
        """The systemd unit's name."""
        return unit_of(self.name)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        flags = extra.problems(self.extra_flags, self.dangerous_flags, self.api_key_file is not None)
        shape = cache_shape.problems(
            kv_unified=self.kv_unified, pool_tokens=self.pool_tokens, context_tokens=self.context_tokens,
            live_tokens=self.live_tokens, batch_tokens=self.batch_tokens, ubatch_tokens=self.ubatch_tokens,
        )  # fmt: skip
        files = {setting: getattr(self, setting) for setting in prompt_files.SETTINGS.values()}
        clashes = prompt_files.clashes(files, self.serves, self.extra_flags)
        seen = pictures.clashes(
            has_projector=self.projector is not None, min_tokens=self.image_min_tokens,
            max_tokens=self.image_max_tokens, serves=self.serves, extra_flags=self.extra_flags,
        )  # fmt: skip
        guesses = speculation.problems(
            self.speculation, has_draft=self.draft is not None, serves=self.serves, split_mode=self.split_mode,
            most=self.draft_max_tokens, least=self.draft_min_tokens,
        )  # fmt: skip
        validation.refuse([*self._open_doors(), *self._half_of_tls(), *flags, *shape, *clashes, *seen, *guesses,
                           *serving.of_vectors(vars(self))])  # fmt: skip
        return self

    def copied(self, count: int | None) -> tuple[Self, ...]:
        """The instances that this one is served as, as many as `count`; None: itself."""
        if count is None:
            return (self,)
        return tuple(replace(self, name=name, port=port, copies=1) for _, name, port in self.asked(count).places())

    def asked(self, count: int | None) -> copying.Asked:
        """Its name, its port and the number of its copies."""
        return copying.Asked(self.name, self.port, count)

    def _open_doors(self) -> Iterator[tuple[str, str]]:
        """A server that other machines reach asks for a key, unless the operator says that it need not."""
        guarded = self.api_key_file is not None or self.allow_unauthenticated
        if not ipaddress.ip_address(self.listen).is_loopback and not guarded:
            yield (
                "listen",
                f"other machines reach {self.listen}, and no key is asked: give an api_key_file (made by "
                f"{secrets.MAKE_KEYS}), or set allow_unauthenticated = True",
            )

    def _half_of_tls(self) -> Iterator[tuple[str, str]]:
        """With one of the two files only, llama-server speaks plain http (server_http_context::init_listener)."""
        if (self.tls_certificate_file is None) != (self.tls_key_file is None):
            missing = "tls_certificate_file" if self.tls_certificate_file is None else "tls_key_file"
            yield missing, "missing; certificate and key are given together"


@with_config(extra="forbid")
@dataclass(frozen=True)
class Settings:
    """All settings of one host; `inventory/group_data/all.py` explains each."""

    models: Listed[Instance]
    llama_cpp_repository: GitArgument
    llama_cpp_ref: GitArgument
    backend: Annotated[Text, one_of(BACKENDS)]
    cuda_toolkit: Annotated[
        Text,
        Should(
            "be auto, nvidia, distro or an absolute path",
            lambda text: text in ("auto", "nvidia", "distro") or text.startswith("/"),
        ),
    ]
    python: Annotated[
        Text,
        Should(
            "be python3, or an absolute path such as /usr/bin/python3.11",
            lambda text: text == "python3" or re.fullmatch(r"/[A-Za-z0-9_./@:+-]+", text),
        ),
    ]
    gpus: GpuNames | None
    vulkan_devices: Listed[Annotated[Whole, Field(ge=0, le=1023, description="a number of vulkaninfo")]] | None
    build_ui: Flag
    build_jobs: Annotated[Whole, Field(ge=1, le=4096, description="a compiler job at least")] | None
    build_cache: Annotated[Text, Should("be an absolute path on the host", lambda text: text.startswith("/"))] | None
    keep_releases: Annotated[Whole, Field(ge=0, le=10_000, description="each takes some hundred MB")]
    hub_endpoint: Annotated[Text, Should(f"be {ADDRESS_RULE}", is_address)]
    hub_token_file: Text | None
    proxy: Annotated[
        Text,
        Should(
            "be the address of a proxy that asks for no password, such as http://proxy.example.net:3128",
            lambda text: is_address(text) and re.fullmatch(r"https?://[^/?#]+/?", text),
        ),
    ] | None  # fmt: skip
    no_proxy: Listed[
        Annotated[
            Text,
            Should(
                "be a name of a host or domain, an address or a network, such as .example.net or 10.0.0.0/8",
                functools.partial(re.fullmatch, r"\.?[A-Za-z0-9:][A-Za-z0-9._:-]*(/[0-9]{1,3})?"),
            ),
        ]
    ]
    ca_file: Text | None
    gpu_reserve_mib: GpuReserve
    ram_reserve_mib: Mib
    allow_swap: Flag
    speed_floor_percent: Annotated[Whole, Field(ge=0, le=100, description="of the median of earlier gates' speeds")]
    # Within less than five seconds an ordinary pause looks like a server that is stuck.
    liveness_seconds: Annotated[
        Whole,
        Should(f"be 0 (no check), or from 5 to {LONGEST}", lambda number: number == 0 or 5 <= number <= LONGEST),
    ]
    liveness_interval_seconds: Annotated[
        Whole, Field(ge=1, le=LONGEST, description="systemd's timer has no pause of 0")
    ]
    drain_seconds: Annotated[Whole, Field(ge=0, le=3600, description="0: replies are cut; nobody waits longer")]
    drain_overdue: Annotated[Text, one_of((CUT, WAIT, STOP))]
    switch_at_once: Annotated[Whole, Field(ge=1, le=10_000, description="more hosts than a run has")] | None
    tune: Annotated[Text, one_of((NEVER, MISSING, ALWAYS))]
    tune_minutes: Annotated[Whole, Field(ge=1, le=1440, description="a day")]
    tune_stops_service: Flag
    tune_window: DayWindow | None
    allow_empty_models: Flag
    uninstall_models: Flag
    environment: Variables
    models_dir: ModelsDir | None
    site: SiteName | None
    site_port: gateways.Port
    reached_at: gateways.ReachedAt | None
    gateway_listen: gateways.Address
    gateway_port: gateways.Port
    gateway_api_key_file: Text | None
    gateway_allow_unauthenticated: Flag
    gateway_allowed_clients: gateways.Networks
    gateway_tls_certificate_file: Text | None
    gateway_tls_key_file: Text | None
    gateway_session_headers: gateways.Headers
    gateway_queue_seconds: gateways.Seconds
    gateway_queue_requests: gateways.QueueRequests
    gateway_reply_seconds: gateways.Seconds
    gateway_body_kib: gateways.BodyKib
    gateway_stats_port: gateways.Port
    metrics_listen: gateways.Address | None
    metrics_port: gateways.Port
    metrics_allowed_clients: gateways.Networks
    monitoring_port: gateways.Port
    monitoring_days: Annotated[Whole, Field(ge=1, le=3650, description="ten years")]
    alertmanagers: monitoring.Alertmanagers

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Settings:
        """Check a host's data and make settings of it; keys that it lacks have their defaults.

        Raises `SettingsError` with every problem, each naming the key, the value and what it should be. Rules between
        fields are checked where the fields themselves are right.
        """
        ours = {key: value for key, value in data.items() if not str(key).startswith(_FOREIGN_PREFIXES)}
        try:
            ours = with_defaults(ours)
        except DefaultsError as error:
            raise SettingsError([str(error)]) from error
        defaults = ours.pop(MODEL_DEFAULTS)
        if not isinstance(defaults, Mapping):
            raise SettingsError([f"model_defaults: should be a dictionary, is {validation.shown(defaults)}"])
        if defaults.get("allow_unverified"):
            why = "cannot be a default: give it in the entry of each model that may do without a known sha256"
            raise SettingsError([f"model_defaults.allow_unverified: {why}"])
        if isinstance(ours.get("models"), list | tuple):
            ours["models"] = [filled(one, defaults) if isinstance(one, Mapping) else one for one in ours["models"]]
        try:
            settings = _adapter().validate_python(ours)
        except ValidationError as error:
            found = validation.problems(error, cls, _WORDS)
            raise SettingsError([str(one) if one.path else f"settings: {one.text}" for one in found]) from None
        return settings.with_copies({})

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        wrong = environment.problems(self.environment)
        validation.refuse([*self.clashes({}), *self._token_in_the_open(), *wrong, *gateways.problems(vars(self)),
                           *monitoring.problems(vars(self)), *self._taken_site_port()])  # fmt: skip
        return self

    def with_copies(self, per_gpu: Mapping[str, int]) -> Settings:
        """The settings with each copy as an instance. `per_gpu`: how many copies are one for each GPU, by their
        instance's name; what is not in it stays as it is."""
        models = [copy for one in self.models for copy in one.copied(_count(one, per_gpu.get(one.name)))]
        return replace(self, models=tuple(models))

    def clashes(self, per_gpu: Mapping[str, int]) -> Iterator[tuple[str, str]]:
        """The key and a sentence for each name and port that two instances, or copies, would have."""
        return copying.clashes([one.asked(_count(one, per_gpu.get(one.name, 1))) for one in self.models])

    def _taken_site_port(self) -> Iterator[tuple[str, str]]:
        """The server of the site runs while services are switched."""
        taken = next((one.name for one in self.models if one.port == self.site_port), None)
        if self.site is not None and taken is not None:
            yield "site_port", f"{self.site_port} is the port of {taken}: give another one, or set site to None"

    def _token_in_the_open(self) -> Iterator[tuple[str, str]]:
        if self.hub_token_file is not None and not keeps_secrets(self.hub_endpoint):
            yield (
                "hub_endpoint",
                f"{validation.shown(self.hub_endpoint)} is neither https nor this machine, so others could read the "
                "token on its way: use https, or set hub_token_file to None",
            )


def _count(instance: Instance, per_gpu: int | None) -> int | None:
    """How many copies it has; None: it is served as it is, under its own name."""
    if instance.copies == copying.PER_GPU:
        return per_gpu
    return instance.copies if isinstance(instance.copies, int) and instance.copies > 1 else None


@functools.cache
def _adapter() -> TypeAdapter[Settings]:
    return TypeAdapter(Settings)


def _where_missing(depth: int) -> str:
    return "the entry must give it" if depth > 1 else "inventory/group_data/all.py must give it"


_WORDS = validation.Vocabulary("None", "True or False", "a string", "a dictionary", "dictionaries", _where_missing)
