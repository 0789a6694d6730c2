"""The hosts of one site in a run: who needs what and who has it, and how each gets it.

Stages note what each host has and lacks while pyinfra prepares. By the time it executes all hosts are known.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import gevent
from gevent.lock import RLock
from pyinfra import logger
from pyinfra.api.host import Host
from pyinfra.api.state import State

from llamafleet.build.packages import SITE
from llamafleet.fleet.site_server import SharedFile
from llamafleet.host import answers
from llamafleet.hub.network import Network
from llamafleet.service.desired import Desired
from llamafleet.settings.defaults import defaults
from llamafleet.settings.schema import Settings
from tasks.lib import decision, jobs, lookups, remote, site_access
from tasks.lib.site_access import Access
from tasks.lib.sites import Actions, Shared
from tasks.lib.usage import reached_by


class Item(Protocol):
    """What hosts share: a model, a build."""

    @property
    def key(self) -> Hashable:
        """By which it is the same on all hosts."""

    @property
    def is_needed(self) -> bool:
        """Whether the host lacks it."""

    @property
    def is_under_way(self) -> bool:
        """Whether a job of an earlier run makes or fetches it there already."""

    @property
    def files(self) -> list[SharedFile]:
        """What a host serves of it, where that is known beforehand."""


@dataclass
class Member:
    """A host of the site. `reached`: the name or address by which others reach it; `installs`: how nginx is installed
    there, where it is missing; `packed`: files that were made for others in this run."""

    host: Host
    reached: str
    network: Network
    installs: tuple[str, ...] = ()
    items: dict[Hashable, Item] = field(default_factory=dict)
    packed: dict[Hashable, SharedFile] = field(default_factory=dict)

    @classmethod
    def of(cls, host: Host, desired: Desired) -> Member:
        settings, manager = desired.settings, desired.machine.package_manager
        is_missing = SITE.name in desired.installed.missing_packages
        words = (manager, json.dumps({SITE.name: SITE.to_json(manager)})) if is_missing and manager else ()
        return cls(host, settings.reached_at or reached_by(host), lookups.network(settings), words)

    @property
    def files(self) -> list[SharedFile]:
        """All that the host may serve in this run, as far as it is known by now."""
        return [*(file for item in self.items.values() for file in item.files), *self.packed.values()]


@dataclass
class Site:
    """The hosts of a site in one run, by name."""

    state: State
    port: int
    members: dict[str, Member] = field(default_factory=dict)
    # Archives that hosts have made of their releases, by host and build key.
    packed: dict[tuple[str, str], answers.Packed] = field(default_factory=dict)
    lacking: dict[Hashable, set[str]] = field(default_factory=dict)  # names of hosts that need it
    _shared: dict[Hashable, Shared] = field(default_factory=dict)
    _access: Access | None = None
    _lock: RLock = field(default_factory=RLock)

    def join(self, host: Host, desired: Desired, items: Sequence[Item]) -> None:
        """Note what the host has and lacks; its other stages may note more."""
        if host.name not in self.members:
            self.members[host.name] = Member.of(host, desired)
        self.note(host.name, items)

    def note(self, name: str, items: Sequence[Item]) -> None:
        """As `join`, of a host that has joined."""
        self.members[name].items |= {one.key: one for one in items}
        for one in items:
            if one.is_needed:
                self.lacking.setdefault(one.key, set()).add(name)

    @property
    def access(self) -> Access:
        """Of the hosts that have an address for themselves, as this machine knows it. For when all have joined."""
        with self._lock:  # names are looked up, and other hosts' greenlets run meanwhile
            if self._access is None:
                known = {name: site_access.resolved(member.reached) for name, member in self.members.items()}
                times = Counter(known.values())
                own = {name: one for name, one in known.items() if one is not None and times[one] == 1}
                self._access = Access.made(own, self.port)
        return self._access

    def shared(self, key: Hashable) -> Shared:
        """For when all have joined."""
        if key not in self._shared:
            self._shared[key] = Shared(self.is_active)
            self._shared[key].note(filter(self.is_active, self.lacking.get(key, ())), ())
        return self._shared[key]

    def is_active(self, name: str) -> bool:
        return self.members[name].host in self.state.active_hosts

    def others(self, name: str, key: Hashable) -> list[str]:
        """The other hosts that have it or need it, and that others may reach."""
        return [other for other in self._with(key) if other != name and other in self.access.addresses]

    def may_serve(self, name: str, items: Sequence[Item]) -> bool:
        """Whether others may come to draw on the host for one of these."""
        return any(self.shared(one.key).needing - {name} for one in items)

    def has_work(self, items: Sequence[Item]) -> bool:
        """Whether a host lacks some of these, or others do."""
        return any(self.lacking.get(one.key) for one in items)

    def _with(self, key: Hashable) -> Iterator[str]:
        return (name for name, member in self.members.items() if key in member.items and self.is_active(name))


# --- which hosts are one site -----------------------------------------------------------------------

_Key = tuple[Any, Any]  # of a site: the settings `site` and `site_port`
_sites: WeakKeyDictionary[State, dict[_Key, Site]] = WeakKeyDictionary()
_named: WeakKeyDictionary[State, Mapping[_Key, Mapping[str, set[str]]]] = WeakKeyDictionary()


def of(host: Host, settings: Settings) -> Site | None:
    """The host's site; None where no other host of the run names the same one."""
    key = (settings.site, settings.site_port)
    if settings.site is None or not set().union(*_names(host.state, key).values()) - {host.name}:
        return None
    return _sites.setdefault(host.state, {}).setdefault(key, Site(host.state, settings.site_port))


def has_a_model_in_common(host: Host, settings: Settings) -> bool:
    """Whether another host of the site is to serve a model of the same source as one of this host's."""
    by_source = _names(host.state, (settings.site, settings.site_port))
    return any(by_source.get(source, set()) - {host.name} for _, source in decision.wanted_models(host))


def _names(state: State, key: _Key) -> Mapping[str, set[str]]:
    """Names of the site's hosts by the sources of their models."""
    if state not in _named:
        usual, found = defaults(), dict[_Key, dict[str, set[str]]]()
        for host in decision.hosts_of_run(state):
            data = host.data.dict()
            mine = (data.get("site", usual["site"]), data.get("site_port", usual["site_port"]))
            for _, source in decision.wanted_models(host):
                found.setdefault(mine, {}).setdefault(source, set()).add(host.name)
        _named[state] = found
    return _named[state].get(key, {})


# --- what a host does -------------------------------------------------------------------------------


def get(
    state: State, host: Host, site: Site, items: Sequence[Item], actions: Callable[[Any], Actions]
) -> bool:  # fmt: skip
    """Get what the host lacks of these, and serve what others lack; whether it has all. A host that only serves never
    fails for it. Raises `RemoteError`."""
    needed = [one for one in items if one.is_needed]
    offered = [one for one in items if not one.is_needed and site.shared(one.key).needing]
    if not needed and not offered:
        return True
    for one in offered:  # at once, before the first host asks
        site.shared(one.key).expect(host.name)
    for one in needed:
        if one.is_under_way:
            site.shared(one.key).begin(host.name)
    try:
        gevent.sleep(0)  # until all hosts have come so far
        jobs.hold(state, host)
        _get_ready(state, host, site, [*needed, *offered])
        for one in offered:
            site.shared(one.key).offer(host.name, actions(one))
        return all(site.shared(one.key).fetch(host.name, actions(one)) for one in needed)
    except Exception as error:  # whatever it is, a host that lacks nothing goes on
        if needed:
            raise
        logger.debug(traceback.format_exc())
        host.log(f"serves nothing to its site: {remote.said(error)}", logger.warning)
        return True
    finally:
        for one in (*needed, *offered):
            site.shared(one.key).end(host.name)


def _get_ready(state: State, host: Host, site: Site, items: Sequence[Item]) -> None:
    """Find out which hosts this one reaches, and install the server where others may draw on it."""
    me = site.members[host.name]
    may_serve = site.may_serve(host.name, items)
    serves = host.name in site.access.addresses and (not may_serve or _has_server(state, host, me))
    peers = {other for one in items if one.is_needed for other in site.others(host.name, one.key)}
    apart = _apart(host, site, peers)
    for one in items:
        sharing = site.shared(one.key).sharing
        sharing.tried(host.name, peers - apart, apart)
        if not serves:
            sharing.mute(host.name)


def _apart(host: Host, site: Site, peers: set[str]) -> set[str]:
    """The names of those that this host does not reach."""
    if not peers:
        return set()
    addresses = {site.access.addresses[name]: name for name in sorted(peers)}
    try:
        asked = remote.program("share.py", "apart", str(site.port), *addresses)
        return {addresses[one] for one in remote.run_json(host, asked, answers.apart) if one in addresses}
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
        me.installs = ()
        return True
    why = seen.line.removeprefix("error: ") or seen.how
    host.log(f"gives its site nothing, because nginx was not installed: {why}", logger.warning)
    return False
