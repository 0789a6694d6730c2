"""What a host of a site does for one model: jobs that fetch its files, from their origin or from peers, and that serve
them.

A job that asks peers has the run's token and no other; one that asks the origin has the Hub's.

Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyinfra.api.host import Host
from pyinfra.api.state import State

from llamafleet.fleet import site_server
from llamafleet.fleet.site_server import SharedFile
from llamafleet.host import answers
from llamafleet.hub.network import Network
from llamafleet.remote.common import RUN
from tasks.lib import jobs, paths, remote, templates
from tasks.lib.site_access import Access
from tasks.lib.sites import Outcome
from tasks.lib.this_run import this_run

# A tmpfs: they are on the host only while a job runs.
FOR_CLIENTS, FOR_SERVER = RUN + "/site-access.json", RUN + "/site-server.json"


@dataclass
class OnHost:
    """A host and a model. `spec` is what fetch.py is asked with the model's own addresses; `secret` and `network` are
    those of the origin. `shared` are all files that the host may serve in this run. All may raise `RemoteError`."""

    state: State
    host: Host
    model: str
    spec: Mapping[str, Any]
    access: Access
    shared: Sequence[SharedFile]
    secret: jobs.Secret | None = None
    network: Network | None = None
    sent: Sequence[paths.Sending] = ()  # files of this machine, which is their origin

    def from_origin(self) -> Outcome:
        if self.sent:
            paths.send(self.state, self.host, tuple(self.sent), self.spec["reserve_bytes"])
        return self._fetch(self.spec, self.secret, self.network)

    def from_peers(self, names: tuple[str, ...], seconds: float) -> Outcome:
        """From these hosts, by their addresses and without a proxy."""
        hosts = [{"name": name, "address": self.access.addresses[name], "port": self.access.port} for name in names]
        peers = {"hosts": hosts, "access": FOR_CLIENTS, "seconds": seconds}
        spec = {**self.spec, "curl_config": None, "peers": peers}
        return self._fetch(spec, jobs.Secret(FOR_CLIENTS, self.access.for_clients()), None)

    def serve(self) -> bool:
        """Whether the other hosts can draw on this one; where they cannot, a line says why."""
        name = self.host.name
        files = [
            {
                "path": f"{self.spec['directory']}/{file['name']}",
                "sha256": file["sha256"],
                "size_bytes": file["size_bytes"],
            }
            for file in self.spec["files"]
        ]
        others = self.access.others(name)
        address, port = self.access.addresses[name], self.access.port
        spec = {"run": this_run()["run"], "address": address, "port": port, "allowed": others, "files": files}
        values = site_server.values(address, port, self.access.token, others, self.shared)
        secret = jobs.Secret(FOR_SERVER, self.access.for_server(templates.render(site_server.TEMPLATE, values)))
        seen = self._run("share", "share.py", ("serve",), (FOR_SERVER,), spec, secret, None)
        for line in seen.tail:
            if line.startswith(("note: ", "error: ")):
                self.say(f"does not serve {self.model} to the site: {line.partition(': ')[2]}")
        return seen.state == "ended" and seen.exit_code == 0

    def say(self, text: str) -> None:
        self.host.log(text)

    def _fetch(self, spec: Mapping[str, Any], secret: jobs.Secret | None, network: Network | None) -> Outcome:
        seen = self._run("fetch", "fetch.py", (), (), spec, secret, network)
        outcome = Outcome.of(seen)
        if not outcome.asks_again:
            jobs.told(self.host, self._job("fetch"), seen)
        return outcome

    def _run(
        self, kind: str, program: str, before: tuple[str, ...], after: tuple[str, ...], spec: Mapping[str, Any],
        secret: jobs.Secret | None, network: Network | None,
    ) -> answers.Job:  # fmt: skip
        """Send the spec, and follow the job to its end."""
        job = self._job(kind)
        ok, out, err = remote.run(self.host, jobs.sent_spec(job, spec))
        if not ok:
            raise remote.RemoteError(f"{job}: {remote.explain(out, err)}")
        command = remote.words(program, *before, jobs.spec_path(job), *after)
        return jobs.ended(self.state, self.host, job, command, secret, network)

    def _job(self, kind: str) -> str:
        return jobs.name_of(kind, self.model)
