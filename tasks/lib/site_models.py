"""The models that hosts of one site have in common in a run: who needs which, who has it, and what each host does.

A host's stage notes its models while pyinfra prepares. By the time it executes all hosts are known, and one operation,
on all of them at once, fetches what they lack.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import gevent
from pyinfra import logger
from pyinfra.api import operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from llamafleet.build.packages import SITE
from llamafleet.fleet.site_server import SharedFile
from llamafleet.host import answers
from llamafleet.hub.network import Network
from llamafleet.service.desired import Desired
from llamafleet.settings.defaults import defaults
from llamafleet.settings.schema import Settings
from tasks.lib import decision, jobs, lookups, operations, paths, remote, site_access
from tasks.lib.site_access import Access
from tasks.lib.site_actions import OnHost
from tasks.lib.sites import Shared
from tasks.lib.usage import reached_by

Sums = tuple[str, ...]  # of a model's files, by which it is the same on all hosts


@dataclass(frozen=True)
class Model:
    """A model on one host. `spec` is what fetch.py is asked with the model's own addresses, `sent` what this machine
    sends in place of them."""

    name: str
    spec: Mapping[str, Any]
    is_needed: bool
    secret: jobs.Secret | None = None
    sent: tuple[paths.Sending, ...] = ()

    @property
    def sums(self) -> Sums:
        return tuple(file["sha256"] for file in self.spec["files"])

    @property
    def files(self) -> list[SharedFile]:
        """Where its files lie, or will."""
        return [SharedFile(file["sha256"], f"{self.spec['directory']}/{file['name']}") for file in self.spec["files"]]

    @property
    def can_be_shared(self) -> bool:
        """Whether peers can be asked: sum and size of each file are known, and none is the host's own."""
        return all(
            file["sha256"] and file["size_bytes"] and not any(url.startswith("file:") for url in file["urls"])
            for file in self.spec["files"]
        )


@dataclass(frozen=True)
class Member:
    """A host of the site. `address`: an IP address, None where this machine knows none; `installs`: how nginx is
    installed there, where it is missing."""

    host: Host
    address: str | None
    models: Mapping[Sums, Model]
    network: Network
    installs: tuple[str, ...] = ()

    @classmethod
    def of(cls, host: Host, desired: Desired, models: list[Model]) -> Member:
        settings, manager = desired.settings, desired.machine.package_manager
        is_missing = SITE.name in desired.installed.missing_packages and manager is not None
        words = (manager, json.dumps({SITE.name: SITE.to_json(manager)})) if is_missing and manager else ()
        address = site_access.resolved(settings.reached_at or reached_by(host))
        return cls(host, address, {one.sums: one for one in models}, lookups.network(settings), words)

    @property
    def files(self) -> list[SharedFile]:
        return [file for model in self.models.values() for file in model.files]


@dataclass
class Site:
    """The hosts of a site in one run, by name."""

    state: State
    port: int
    members: dict[str, Member] = field(default_factory=dict)
    _shared: dict[Sums, Shared] = field(default_factory=dict)

    def join(self, member: Member) -> None:
        self.members[member.host.name] = member

    @cached_property
    def access(self) -> Access:
        """Of the hosts that have an address for themselves; asked for when all have joined."""
        addresses = {name: member.address for name, member in self.members.items() if member.address is not None}
        times = Counter(addresses.values())
        return Access.made({name: one for name, one in addresses.items() if times[one] == 1}, self.port)

    def shared(self, sums: Sums) -> Shared:
        if sums not in self._shared:
            self._shared[sums] = Shared(self.is_active)
            needing = [name for name in self._with(sums) if self.members[name].models[sums].is_needed]
            self._shared[sums].note(needing, ())
        return self._shared[sums]

    def is_active(self, name: str) -> bool:
        return self.members[name].host in self.state.active_hosts

    def others(self, name: str, sums: Sums) -> list[str]:
        """The other hosts that have the model or need it, and that others may reach."""
        return [other for other in self._with(sums) if other != name and other in self.access.addresses]

    def needed(self, name: str) -> list[Model]:
        """What the host lacks."""
        return [model for model in self.members[name].models.values() if model.is_needed]

    def offered(self, name: str) -> list[Model]:
        """What the host has and others lack."""
        return [
            model
            for sums, model in self.members[name].models.items()
            if not model.is_needed and self.shared(sums).needing
        ]

    def may_serve(self, name: str) -> bool:
        """Whether others may come to draw on the host."""
        return any(self.shared(sums).needing - {name} for sums in self.members[name].models)

    def _with(self, sums: Sums) -> Iterator[str]:
        return (name for name, member in self.members.items() if sums in member.models and self.is_active(name))


# --- which hosts are one site -----------------------------------------------------------------------

_Key = tuple[Any, Any]  # of a site: the settings `site` and `site_port`
_sites: WeakKeyDictionary[State, dict[_Key, Site]] = WeakKeyDictionary()
_sources: WeakKeyDictionary[State, Mapping[tuple[_Key, str], set[str]]] = WeakKeyDictionary()


def of(host: Host, settings: Settings) -> Site | None:
    """The host's site; None where no other host of the run names the same one and the source of one of its models."""
    key, state = (settings.site, settings.site_port), host.state
    if settings.site is None:
        return None
    if state not in _sources:
        _sources[state] = _by_source(state)
    if not any(_sources[state].get((key, source), set()) - {host.name} for _, source in decision.wanted_models(host)):
        return None
    return _sites.setdefault(state, {}).setdefault(key, Site(state, settings.site_port))


def _by_source(state: State) -> Mapping[tuple[_Key, str], set[str]]:
    """Names of hosts by their site and the sources of their models, of all hosts of the run."""
    usual, found = defaults(), dict[tuple[_Key, str], set[str]]()
    for host in decision.hosts_of_run(state):
        data = host.data.dict()
        key = (data.get("site", usual["site"]), data.get("site_port", usual["site_port"]))
        for _, source in decision.wanted_models(host):
            found.setdefault((key, source), set()).add(host.name)
    return found


# --- what a host does -------------------------------------------------------------------------------


@operation()
def fetch_in_site(site: Site) -> operations.Commands:
    """Fetch what the host lacks, from other hosts of the site or from its origin; serve what others lack."""
    name = ctx_host.get().name
    if site.needed(name) or site.offered(name):
        yield operations.call(_fetch, site)
    else:
        ctx_host.get().noop("the site's hosts have their models")


def _fetch(state: State, host: Host, site: Site) -> bool:
    """Whether the host has all its models. A host that only serves never fails for it. Raises `RemoteError`."""
    needed, offered = site.needed(host.name), site.offered(host.name)
    for model in offered:  # at once, before the first host asks
        site.shared(model.sums).expect(host.name)
    try:
        gevent.sleep(0)  # until all hosts have come so far
        jobs.hold(state, host)
        _get_ready(state, host, site)
        for model in offered:
            site.shared(model.sums).offer(host.name, _actions(state, host, site, model))
        return all(site.shared(one.sums).fetch(host.name, _actions(state, host, site, one)) for one in needed)
    except Exception as error:  # whatever it is, a host that lacks nothing goes on
        if needed:
            raise
        logger.debug(traceback.format_exc())
        host.log(f"serves nothing to its site: {remote.said(error)}", logger.warning)
        return True
    finally:
        for model in offered:
            site.shared(model.sums).end(host.name)


def _actions(state: State, host: Host, site: Site, model: Model) -> OnHost:
    me = site.members[host.name]
    return OnHost(
        state, host, model.name, model.spec, site.access, me.files, model.secret, me.network, model.sent
    )  # fmt: skip


def _get_ready(state: State, host: Host, site: Site) -> None:
    """Find out which hosts this one reaches, and install the server where others may draw on it."""
    me = site.members[host.name]
    serves = host.name in site.access.addresses and (not site.may_serve(host.name) or _has_server(state, host, me))
    apart = _apart(host, site)
    for sums in me.models:
        sharing = site.shared(sums).sharing
        sharing.apart(host.name, apart)
        if not serves:
            sharing.mute(host.name)


def _apart(host: Host, site: Site) -> list[str]:
    """The names of the hosts that this one does not reach, of those it could draw on."""
    peers = sorted({other for model in site.needed(host.name) for other in site.others(host.name, model.sums)})
    addresses = {site.access.addresses[name]: name for name in peers}
    if not addresses:
        return []
    try:
        asked = remote.program("share.py", "apart", str(site.port), *addresses)
        return [addresses[one] for one in remote.run_json(host, asked, answers.apart) if one in addresses]
    except remote.LostError:
        raise
    except remote.RemoteError as error:
        host.log(f"asks no other host of its site: {remote.said(error)}")
        return peers


def _has_server(state: State, host: Host, me: Member) -> bool:
    """Whether nginx is there, or could be installed."""
    if not me.installs:
        return True
    host.log("installing nginx, by which it gives the site what it has")
    job = jobs.name_of("packages", hashlib.sha256(" ".join(me.installs).encode()).hexdigest()[:16])
    seen = jobs.ended(state, host, job, remote.words("install_packages.py", *me.installs), None, me.network)
    if seen.state == "ended" and seen.exit_code == 0:
        return True
    why = seen.line.removeprefix("error: ") or seen.how
    host.log(f"gives its site nothing, because nginx was not installed: {why}", logger.warning)
    return False
