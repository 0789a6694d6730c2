"""The releases of llama.cpp that hosts of one site have in common in a run: one host compiles, the others take it.

A host takes a build only with its digest, the SHA-256 of its release.json, which this side has from the host that made
it or has it. So hosts of a site trust each other with what they run, as hosts with one build cache do.

Decision 8: docs/decisions/0008-source-pinned-known-by-a-build-key.md.
Decision 25: docs/decisions/0025-one-download-for-a-site.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pyinfra.api import operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from llamafleet.fleet.site_server import SharedFile
from llamafleet.host import answers
from llamafleet.remote.pieces import BUILDS
from llamafleet.service.disks import MODEL_RESERVE_BYTES
from tasks.lib import builds, jobs, operations, remote, site_members
from tasks.lib.site_actions import OnHost
from tasks.lib.site_members import Site
from tasks.lib.sites import Outcome

# A release is read and written once: 3 GB on a slow disk.
PACK_SECONDS = 600.0


@dataclass(frozen=True)
class Release:
    """A release on one host. `spec` is what build.py is asked; `is_under_way`: a job makes it there already."""

    job: str
    spec: Mapping[str, Any]
    is_needed: bool
    is_under_way: bool = False

    @property
    def key(self) -> str:
        return str(self.spec["key"])

    @property
    def files(self) -> list[SharedFile]:
        """None that is known before it is packed."""
        return []


@operation()
def build_in_site(site: Site, release: Release) -> operations.Commands:
    """Make the release that the host lacks, in the site's order; give it to others that lack it."""
    host = ctx_host.get()
    if site.has_work((release,)):
        yield operations.call(_build, site, release)
    else:
        host.noop("the host has the release")


def _build(state: State, host: Host, site: Site, release: Release) -> bool:
    return site_members.get(state, host, site, (release,), partial(Building, state, host, site))


@dataclass
class Building:
    """What a host does for its release. All may raise `RemoteError`."""

    state: State
    host: Host
    site: Site
    release: Release

    def from_origin(self) -> Outcome:
        """Compile it."""
        return Outcome(self._made(None))

    def from_peers(self, names: tuple[str, ...], seconds: float) -> Outcome:
        """Take it, from those of these hosts that have the very same build."""
        key, packed = self.release.key, {name: self.site.packed[name, self.release.key] for name in names}
        first = packed[names[0]]
        same = tuple(name for name in names if packed[name] == first)
        outcome = self._sharing(first).from_peers(same, seconds)
        if not outcome.is_there:
            return outcome
        is_made = self._made(first.digest)
        if is_made:
            builds.made(key, first.digest)
        return replace(outcome, is_there=is_made)

    def serve(self) -> bool:
        key, me = self.release.key, self.site.members[self.host.name]
        asked = remote.program("build.py", "pack", key, seconds=PACK_SECONDS)
        packed = remote.run_json(self.host, asked, answers.packed)
        builds.made(key, packed.digest)
        self.site.packed[self.host.name, key] = packed
        me.packed[key] = SharedFile(packed.sha256, f"{BUILDS}/{_archive(key, packed)}")
        return self._sharing(packed).serve()

    def say(self, text: str) -> None:
        self.host.log(text)

    def _made(self, digest: str | None) -> bool:
        """Whether build.py made the release: compiled, or of an archive with this digest that the host has."""
        job = jobs.name_of(*self.release.job.split("-", 1))
        spec = {**self.release.spec, "build_cache": BUILDS if digest else None}
        ok, out, err = remote.run(self.host, jobs.sent_spec(job, spec))
        if not ok:
            raise remote.RemoteError(f"{job}: {remote.explain(out, err)}")
        command = remote.words("build.py", jobs.spec_path(job), *([digest] if digest else []))
        network = self.site.members[self.host.name].network
        return jobs.follow(self.state, self.host, job, command, None, network)

    def _sharing(self, packed: answers.Packed) -> OnHost:
        """The jobs that move the archive."""
        key, me = self.release.key, self.site.members[self.host.name]
        file = {
            "name": _archive(key, packed), "urls": [], "size_bytes": packed.size_bytes, "sha256": packed.sha256,
        }  # fmt: skip
        spec = {"directory": BUILDS, "owner": None, "files": [file], "curl_config": None,
                "reserve_bytes": MODEL_RESERVE_BYTES}  # fmt: skip
        return OnHost(self.state, self.host, f"build-{key}", spec, self.site.access, me.files)


def _archive(key: str, packed: answers.Packed) -> str:
    """As build.py names it."""
    return f"{key}-{packed.digest}.tar"
