"""What a host of the group `gateway` should have, from the decisions about all hosts of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyinfra.api.host import Host
from pyinfra.context import ctx_host

from llamafleet.fleet import gateway, haproxy
from llamafleet.fleet.gateway import Found, Member, Offered, Secret, Server
from llamafleet.host import answers
from llamafleet.remote.common import GATEWAY, GATEWAY_UNIT, TLS_CERTIFICATE, TLS_KEY, helper, sha256
from llamafleet.service.command import unit_escape
from llamafleet.service.unit import path_of
from llamafleet.settings import secrets
from llamafleet.settings.copies import model_of
from llamafleet.settings.schema import Instance, Settings, SettingsError
from tasks.lib import certificates, decision, jobs, lookups, moves, operations, remote, sending, templates
from tasks.lib.usage import reached_by


class GatewayError(Exception):
    """A gateway cannot be what the inventory asks for; `problems` has a sentence for each reason."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


# What reading may raise: each leaves the host out of the run.
ERRORS = (GatewayError, gateway.RecordError, *decision.READ_ERRORS)


@dataclass(frozen=True)
class Wanted:
    """A gateway's files, and what the operator should know of its servers."""

    files: haproxy.Files = field(repr=False)
    unit: str
    servers: tuple[Server, ...]
    notes: tuple[str, ...]


def read(host: Host) -> answers.Gateway:
    """The gateway that the host has. Raises as `sending.run_helper` does, and `RemoteError`."""
    ok, out, err = sending.run_helper(host, "gateway_apply.py", "show", purpose="the host's gateway")
    if not ok or not out:
        raise remote.RemoteError(f"the host's gateway cannot be read: {remote.explain(out, err)}")
    return remote.last(out, answers.gateway)


def wanted(host: Host, there: answers.Gateway) -> Wanted:
    """What the host's gateway should be by now. Raises one of `ERRORS`."""
    settings = Settings.from_data(host.data.dict())
    known = gateway.recorded(there.servers)
    everybody = settings_of_all(host)
    members = [_member(host, one, everybody.get(one.name)) for one in host.state.inventory]
    keys = _client_keys(settings)
    of_servers = dict(_secrets(everybody, members, known))
    found = gateway.servers(host.name, settings, members, known, of_servers)
    problems = (*found.problems, *_shared_keys(keys, of_servers))
    if problems:
        raise GatewayError(problems)
    access = haproxy.Access(keys, _certificate(settings), of_servers, _trusted(found, of_servers, everybody))
    files = haproxy.files(templates.render, settings, found.servers, access)
    return Wanted(files, unit_text(settings), found.servers, found.notes)


def unit_text(settings: Settings) -> str:
    """The gateway's unit."""
    save = [unit_escape(word) for word in (helper("gateway_admin.py"), "save")]
    values = {"python": path_of(settings.python), "save": save, "config": f"{GATEWAY}/current/haproxy.cfg"}
    return templates.render(haproxy.UNIT_TEMPLATE, values)


def differences(wanted: Wanted, there: answers.Gateway) -> Iterator[str]:
    """How the host's gateway differs from what it should be, a phrase each; nothing where it is so."""
    if there.version is None:
        yield "HAProxy is not installed"
    if there.digest != wanted.files.digest:
        yield from _changed_servers(wanted.servers, gateway.recorded(there.servers)) if there.digest else ("it is new",)
    if there.unit != sha256(wanted.unit.encode()):
        yield f"{GATEWAY_UNIT} differs"
    if not there.active:
        yield f"{GATEWAY_UNIT} does not run"
    if not there.enabled:
        yield f"{GATEWAY_UNIT} does not start with the host"


def _changed_servers(wanted: tuple[Server, ...], known: tuple[Server, ...]) -> Iterator[str]:
    new, old = {one.name: one for one in wanted}, {one.name: one for one in known}
    told = [
        *(f"{name} is new" for name in new if name not in old),
        *(f"{name} leaves" for name in old if name not in new),
        *(f"{name} has changed" for name in new if name in old and old[name] != new[name]),
    ]
    yield from told or ["its settings or keys have changed"]


@operations.change
def put_in_service(gateway: Callable[[], Wanted | None]) -> operations.Commands:
    """Stage the files of the gateway, let HAProxy check them, and reload it; nothing where `gateway` gives None."""
    now = gateway()
    if now is None:
        ctx_host.get().noop("the gateway is as it should be")
        return
    folder = operations.staged(".gateway")
    texts = {**now.files.texts, GATEWAY_UNIT: now.unit}
    sent = sending.with_modes(texts, now.files.secrets)
    yield sending.received({f"{folder}/{name}": one for name, one in sent.items()}, "--fresh", folder)
    words = remote.words("gateway_apply.py", "apply", folder, now.files.digest)
    yield operations.call(jobs.follow, jobs.name_of("gateway", now.files.digest), words)


# --- what is read -----------------------------------------------------------------------------------


def settings_of_all(host: Host) -> dict[str, Settings]:
    """The settings of each host of the inventory; a host whose settings are unusable is refused by its own run."""
    found = {}
    for one in host.state.inventory:
        try:
            found[one.name] = Settings.from_data(one.data.dict())
        except SettingsError:
            continue
    return found


def _member(gateway_host: Host, host: Host, settings: Settings | None) -> Member:
    reached = (settings.reached_at if settings else None) or reached_by(host)
    return Member(host.name, reached, _offered(gateway_host, host))


def _offered(gateway_host: Host, host: Host) -> tuple[Offered, ...] | None:
    """The host's instances as they are by now, or will be after this run; None for a host that is not in it."""
    state = host.state
    if not state.is_host_in_limit(host) or host not in state.active_hosts:
        return None
    now = decision.of_other(host)
    if now is None or host not in state.active_hosts:
        return None
    copied = _copied(host.data.dict())
    return tuple(
        Offered(
            instance=one.instance, model=model_of(one.name, copied), slots=one.plan.slots,
            context_tokens=one.plan.context_tokens, load_seconds=one.record["gate"]["health_seconds"],
            serves_it=one.name not in now.changes.services or _is_served(gateway_host, host, one.name),
        )
        for one in now.desired.servings
    )  # fmt: skip


def _is_served(gateway_host: Host, host: Host, name: str) -> bool:
    """Whether an instance that differs from its plan is, or will be, set right in this run: all hosts have the same
    stages."""
    return moves.serves(host, name) if host.state.is_executing else decision.makes(gateway_host, "services")


def _copied(data: Mapping[str, Any]) -> set[str]:
    """The names in `models` of those that are served as copies."""
    default = (data.get("model_defaults") or {}).get("copies", 1)
    return {one["name"] for one in data.get("models") or () if one.get("copies", default) != 1}


# --- secrets -----------------------------------------------------------------------------------------


def _client_keys(settings: Settings) -> tuple[str, ...]:
    if settings.gateway_api_key_file is None:
        return ()
    return _keys(settings.gateway_api_key_file, "gateway_api_key_file")


def _keys(place: str, setting: str) -> tuple[str, ...]:
    text = lookups.once(("keys", place), lambda: secrets.api_keys(place, setting))
    return tuple(dict.fromkeys(text.splitlines()))


def _certificate(settings: Settings) -> str:
    if settings.gateway_tls_certificate_file is None or settings.gateway_tls_key_file is None:
        return ""
    pair = certificates.pair(settings.gateway_tls_certificate_file, settings.gateway_tls_key_file, "gateway_")
    return pair[TLS_CERTIFICATE] + pair[TLS_KEY]


def _secrets(
    everybody: Mapping[str, Settings], members: list[Member], known: tuple[Server, ...]
) -> Iterator[tuple[tuple[str, str], Secret]]:  # fmt: skip
    """What this machine knows of the access to each server."""
    for one in known:
        instances = everybody[one.host].models if one.host in everybody else ()
        if instance := next((its for its in instances if its.name in (one.instance, one.model)), None):
            yield (one.host, one.instance), _secret(one.host, instance)
    for member in members:
        for offered in member.offered or ():
            if offered.instance.gateway:
                yield (member.name, offered.instance.name), _secret(member.name, offered.instance)


def _secret(host: str, instance: Instance) -> Secret:
    place = f"{host}: models: {instance.name}: "
    keys = _keys(instance.api_key_file, f"{place}api_key_file") if instance.api_key_file else ()
    if instance.tls_certificate_file is None or instance.tls_key_file is None:
        return Secret(keys)
    return Secret(keys, certificates.pair(instance.tls_certificate_file, instance.tls_key_file, place)[TLS_CERTIFICATE])


def _shared_keys(keys: tuple[str, ...], of_servers: Mapping[tuple[str, str], Secret]) -> Iterator[str]:
    both = sorted({"/".join(place) for place, one in of_servers.items() if set(one.keys) & set(keys)})
    if both:
        yield (f"gateway_api_key_file: it has a key of {', '.join(both)}: whoever has it could pass the gateway by; "
               f"make keys for its clients: {secrets.MAKE_KEYS}")  # fmt: skip


def _trusted(
    found: Found, of_servers: Mapping[tuple[str, str], Secret], everybody: Mapping[str, Settings]
) -> dict[str, tuple[str, str]]:  # fmt: skip
    """By which certificates the servers' own are trusted, by the SHA-256 of each."""
    trusted = {}
    for one in found.servers:
        if one.certificate:
            authority = lookups.network(everybody[one.host]).certificates() if everybody[one.host].ca_file else ""
            trusted[one.certificate] = certificates.trust(of_servers[one.host, one.instance].certificate, authority)
    return trusted
