"""Which servers a gateway has, from the plans of its fleet: pure, the same inputs give the same servers.

A host that is not part of a run, or failed in it, keeps the servers that the gateway knows of it; a host that the
inventory no longer has loses them.

Decision 24: docs/decisions/0024-a-gateway-of-standard-parts.md.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter, ValidationError

from llamafleet.remote import common
from llamafleet.remote.common import GATEWAY
from llamafleet.settings.schema import DEMAND, Instance, Settings

# The first parts of the gateway's own paths, which no model can have.
RESERVED = ("health", "models", "v1")
RECORD, SCHEMA = f"{GATEWAY}/current/servers.json", 1


class RecordError(ValueError):
    """What a gateway knows of its servers cannot be read; the text has the way out."""


@dataclass(frozen=True, order=True)
class Server:
    """One server behind the gateway, as the gateway's record has it."""

    model: str  # what clients call it: the name of the instance, without the number of a copy
    host: str  # as the inventory names it
    instance: str  # as its unit is named
    address: str  # where the gateway reaches it
    port: int
    slots: int
    context_tokens: int
    serves: str
    on_demand: bool
    load_seconds: int  # the longest that it loads
    keys: tuple[str, ...] = ()  # SHA-256 of each API key that it takes; empty where it asks for none
    certificate: str = ""  # SHA-256 of its TLS certificate; empty where it speaks plain http

    @property
    def name(self) -> str:
        """How people name it: HOST/INSTANCE."""
        return f"{self.host}/{self.instance}"

    @property
    def backend(self) -> str:
        """HAProxy's name of the model's servers."""
        return f"model:{self.model}"

    @property
    def id(self) -> str:
        """HAProxy's name of it, in which not every character has a place; a hash keeps such names apart."""
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", self.host)
        return f"{plain if plain == self.host else f'{plain}-{sha256(self.host)[:6]}'}:{self.instance}"


@dataclass(frozen=True)
class Offered:
    """An instance of a host of the run, with what its plan says. `serves_it`: it runs as planned, or will at the end of
    the run; else the gateway keeps what it knows."""

    instance: Instance
    model: str
    slots: int
    context_tokens: int
    load_seconds: int
    serves_it: bool = True


@dataclass(frozen=True)
class Member:
    """A host of the inventory. `offered` is None where the host is not in the run, or failed."""

    name: str
    reached_at: str  # by other hosts
    offered: tuple[Offered, ...] | None


@dataclass(frozen=True)
class Secret:
    """What the operator's machine knows of an instance's access: API keys, and the TLS certificate with its chain."""

    keys: tuple[str, ...] = field(default=(), repr=False)
    certificate: str = ""


@dataclass(frozen=True)
class Found:
    """The servers of a gateway. With `problems` there is no gateway; `notes` are for the operator to know."""

    servers: tuple[Server, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def sha256(text: str) -> str:
    """The SHA-256 of a text, hexadecimal."""
    return common.sha256(text.encode())


def servers(
    gateway: str, settings: Settings, members: Sequence[Member], known: Sequence[Server],
    secrets: Mapping[tuple[str, str], Secret],
) -> Found:  # fmt: skip
    """The servers of the gateway on the host of that name, with its `settings`. `known` are those that it has now,
    `secrets` what the operator's machine knows of each, by host and instance."""
    before = {(one.host, one.instance): one for one in known}
    found: list[Server] = []
    problems: list[str] = []
    notes: list[str] = []
    for member in members:
        kept = [one for one in known if one.host == member.name]
        if member.offered is None:
            notes += _told_of_absent(member, kept)
            found += kept
            continue
        for offered in member.offered:
            if not offered.instance.gateway:
                continue
            place = (member.name, offered.instance.name)
            if not offered.serves_it:
                notes.append(f"{'/'.join(place)} does not run as planned: the gateway "
                             f"{'keeps what it had of it' if place in before else 'leaves it out'}")  # fmt: skip
                found += [before[place]] if place in before else []
                continue
            address = _address(gateway, member, offered.instance)
            if address is None:
                problems.append(_unreachable(gateway, member, offered.instance))
                continue
            found.append(_server(member, offered, address, secrets.get(place, Secret())))
    found.sort()
    if not found and not problems:
        problems.append(
            f"{gateway}: the gateway has no server: no host of the run serves a model, and it knows of none. Run it "
            "with the hosts that serve, without --limit"
        )
    problems += _problems(gateway, settings, found, secrets, {member.name: member for member in members})
    return Found(tuple(found), tuple(problems), tuple(notes))


def _told_of_absent(member: Member, kept: Sequence[Server]) -> Iterator[str]:
    if kept:
        yield f"{member.name} is not in this run: the gateway keeps {', '.join(one.name for one in kept)} as it was"


def _address(gateway: str, member: Member, instance: Instance) -> str | None:
    """Where the gateway reaches the instance; None where it cannot."""
    listen = ipaddress.ip_address(instance.listen)
    if listen.is_unspecified:
        if gateway == member.name:
            return "::1" if listen.version == 6 else "127.0.0.1"
        return member.reached_at
    # Hosts of one machine, such as containers, have addresses of its loopback.
    there = gateway == member.name or instance.listen == member.reached_at
    return str(listen) if there or not listen.is_loopback else None


def _unreachable(gateway: str, member: Member, instance: Instance) -> str:
    return (
        f"{member.name}: models: {instance.name}: listen: the gateway on {gateway} cannot reach {instance.listen} of "
        f"another host: let it listen on an address of {member.name}, with allowed_clients = [the gateway's address], "
        "or set gateway = False for it"
    )


def _server(member: Member, offered: Offered, address: str, secret: Secret) -> Server:
    instance = offered.instance
    return Server(
        model=offered.model, host=member.name, instance=instance.name, address=address, port=instance.port,
        slots=offered.slots, context_tokens=offered.context_tokens, serves=instance.serves,
        on_demand=instance.start == DEMAND, load_seconds=offered.load_seconds,
        keys=tuple(map(sha256, secret.keys)), certificate=sha256(secret.certificate) if secret.certificate else "",
    )  # fmt: skip


def _problems(
    gateway: str, settings: Settings, found: Sequence[Server], secrets: Mapping[tuple[str, str], Secret],
    members: Mapping[str, Member],
) -> Iterator[str]:  # fmt: skip
    for name, ones in by_model(found).items():
        if name in RESERVED:
            yield (f"{ones[0].host}: models: name: {name!r} is a path of the gateway itself: give the model another "
                   "name, or set gateway = False for it")  # fmt: skip
        kinds = {one.serves: one for one in ones}
        if len(kinds) > 1:
            said = " and ".join(f"{one.serves} on {one.host}" for one in kinds.values())
            yield f"models: {name}: serves: one name for {said}: give them two names"
        if any(one.keys for one in ones) and common_key(ones, secrets) is None:
            yield _no_common_key(name, ones, secrets, members)
        for one in ones:
            there = secrets.get((one.host, one.instance), Secret()).certificate
            if one.certificate and sha256(there) != one.certificate:
                yield (f"{one.host}: models: {one.instance}: tls_certificate_file: it is another certificate than the "
                       f"gateway knows of this server: run with {one.host} too, which installs it")  # fmt: skip
    for one in found:
        ports = {settings.gateway_port: "gateway_port", settings.gateway_stats_port: "gateway_stats_port"}
        if one.host == gateway and one.port in ports:
            yield f"{gateway}: {ports[one.port]}: {one.port} is the port of {one.instance}: give another one"


def by_model(found: Iterable[Server]) -> dict[str, list[Server]]:
    """The servers of each model, by its name."""
    models: dict[str, list[Server]] = {}
    for one in found:
        models.setdefault(one.model, []).append(one)
    return models


def common_key(ones: Sequence[Server], secrets: Mapping[tuple[str, str], Secret]) -> str | None:
    """The first key that all these servers take, of those that the operator's machine knows. None where there is none:
    HAProxy writes one key for a model, before it chooses the server."""
    asking = [set(one.keys) for one in ones if one.keys]
    texts = [key for one in ones for key in secrets.get((one.host, one.instance), Secret()).keys]
    return next((key for key in texts if all(sha256(key) in keys for keys in asking)), None)


def _no_common_key(
    name: str, ones: Sequence[Server], secrets: Mapping[tuple[str, str], Secret], members: Mapping[str, Member]
) -> str:  # fmt: skip
    changed = [
        one.host for one in ones
        if one.keys and not {sha256(key) for key in secrets.get((one.host, one.instance), Secret()).keys} & {*one.keys}
    ]  # fmt: skip
    if changed:
        return (f"models: {name}: api_key_file: it has none of the keys that {', '.join(changed)} had when the gateway "
                f"learned of it: run with {', '.join(changed)} too, which installs them")  # fmt: skip
    return (
        f"models: {name}: api_key_file: {', '.join(one.host for one in ones if one.keys)} have no key in common, and a "
        "gateway writes one key for all servers of a model: give them the same file, or add one key to all"
    )


# --- the gateway's record ------------------------------------------------------------------------------


def recorded(told: Mapping[str, object]) -> tuple[Server, ...]:
    """The servers of a gateway's record, as its host gave it. Raises `RecordError`."""
    if not told:
        return ()
    try:
        schema, entries = told["schema"], told["servers"]
        if schema != SCHEMA:
            raise RecordError(f"{RECORD} has schema {schema!r}, and this llamafleet knows {SCHEMA}: use the llamafleet "
                              "that made it")  # fmt: skip
        servers = [_adapter().validate_python(_of_server(entry)) for entry in entries.values()]  # type: ignore[attr-defined]
    except (KeyError, AttributeError, ValidationError) as error:
        raise RecordError(f"{RECORD} is damaged: remove it, and run with all hosts, without --limit") from error
    return tuple(sorted(servers))


def _of_server(entry: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in entry.items() if key in Server.__dataclass_fields__}


@functools.cache
def _adapter() -> TypeAdapter[Server]:
    return TypeAdapter(Server)


def record(found: Sequence[Server]) -> dict[str, object]:
    """servers.json: what the gateway knows of its servers, and where HAProxy has each."""
    return {
        "schema": SCHEMA,
        "servers": {one.name: {**asdict(one), "backend": one.backend, "server": one.id} for one in found},
    }  # fmt: skip
