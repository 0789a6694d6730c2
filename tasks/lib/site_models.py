"""The models that hosts of one site have in common in a run, and the operation that fetches what each lacks.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyinfra.api import operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from llamafleet.fleet.site_server import SharedFile
from tasks.lib import jobs, operations, paths, site_members
from tasks.lib.site_actions import OnHost
from tasks.lib.site_members import Site


@dataclass(frozen=True)
class Model:
    """A model on one host. `spec` is what fetch.py is asked with the model's own addresses, `sent` what this machine
    sends in place of them."""

    name: str
    spec: Mapping[str, Any]
    is_needed: bool
    secret: jobs.Secret | None = None
    sent: tuple[paths.Sending, ...] = ()
    is_under_way: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """The sums of its files."""
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


@operation()
def fetch_in_site(site: Site, models: Sequence[Model]) -> operations.Commands:
    """Fetch what the host lacks of these, from other hosts of the site or from its origin; serve what others lack."""
    host = ctx_host.get()
    if site.has_work(models):
        yield operations.call(_fetch, site, models)
    else:
        host.noop("the site's hosts have their models")


def _fetch(state: State, host: Host, site: Site, models: Sequence[Model]) -> bool:
    return site_members.get(state, host, site, models, partial(_actions, state, host, site))


def _actions(state: State, host: Host, site: Site, model: Model) -> OnHost:
    me = site.members[host.name]
    return OnHost(
        state, host, model.name, model.spec, site.access, me.files, model.secret, me.network, model.sent
    )  # fmt: skip
