"""Finished builds that hosts share, and the digests by which they may take them.

A build cache is a folder that anybody may have written to, so a host takes a build from it only with a digest that
this side carries: the SHA-256 of the build's release.json. It is known from a host that compiled in this run, from a
release that a host of the inventory has, or from this operator's record of earlier runs.

pyinfra runs an operation on all hosts at once. So of the hosts that need one build one goes first, and the others wait
here until its digest is known.

Decision 8: docs/decisions/0008-source-pinned-known-by-a-build-key.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from pyinfra import logger
from pyinfra.api.host import Host

from llamafleet.payload import ROOT
from llamafleet.remote.common import replace_file

# Digests of one build that are remembered, the newest last; builds that are remembered; digests that a host is told.
MOST_DIGESTS, MOST_BUILDS, MOST_TOLD = 8, 2000, 64
_KEY, _DIGEST = re.compile("[0-9a-f]{16}"), re.compile("[0-9a-f]{64}")


@dataclass
class _First:
    """The host that makes a build for others."""

    host: str
    done: Event = field(default_factory=Event)


# Digests by build key, in the order in which they came: of builds that were made or taken under our eyes, and of
# releases that hosts say they have.
_made: dict[str, dict[str, None]] = {}
_surveyed: dict[str, dict[str, None]] = {}
# By build key and cache.
_first: dict[tuple[str, str], _First] = {}
# Hosts on which a job makes the build already, of a run that ended before it.
_making: dict[tuple[str, str], list[Host]] = {}


def record_path() -> Path:
    """Where this operator's digests are: in `.cache` of a checkout, else in the user's state folder."""
    if (ROOT / ".git").exists():
        return ROOT / ".cache" / "known-builds.json"
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "llamafleet" / "known-builds.json"


def recorded(path: Path | None = None) -> dict[str, list[str]]:
    """The digests of earlier runs by build key. Empty, with a warning, where others could have written the file."""
    path = path or record_path()
    try:
        with path.open() as file:
            found = os.fstat(file.fileno())
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                logger.warning(f"{path} is not used, because others may change it: chmod 600, or delete it")
                return {}
            data = json.load(file)
    except (OSError, ValueError):
        return {}
    builds = data.get("builds") if isinstance(data, dict) and data.get("schema") == 1 else None
    return _sound(builds) if isinstance(builds, dict) else {}


def _sound(builds: Mapping[Any, Any]) -> dict[str, list[str]]:
    return {
        key: digests
        for key, digests in builds.items()
        if _KEY.fullmatch(key)
        and isinstance(digests, list)
        and all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in digests)
    }


def made(key: str, digest: str) -> None:
    """Note the digest of a build that a host has made or taken in this run, for other hosts and for later runs."""
    _made.setdefault(key, {})[digest] = None
    try:
        record(key, digest)
    except OSError as error:
        logger.warning(f"the digest of build {key} is known in this run only: {error}")


def record(key: str, digest: str, path: Path | None = None) -> None:
    """Add a digest to this operator's record. Raises OSError."""
    path = path or record_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path):
        builds = recorded(path)
        digests = [*(one for one in builds.pop(key, []) if one != digest), digest]
        builds[key] = digests[-MOST_DIGESTS:]
        text = json.dumps({"schema": 1, "builds": dict(list(builds.items())[-MOST_BUILDS:])}, indent=1) + "\n"
        replace_file(str(path), text.encode(), 0o600)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the runs of this operator; held for a moment."""
    handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def tell(key: str, digest: str) -> None:
    """Note for this run the digest of a release that a host has, as its survey says."""
    _surveyed.setdefault(key, {})[digest] = None


def known(key: str) -> list[str]:
    """The digests of a build that hosts may take: of this run, of earlier ones, of the inventory's hosts."""
    every = [*reversed(_made.get(key, {})), *reversed(recorded().get(key, [])), *_surveyed.get(key, {})]
    return list(dict.fromkeys(every))[:MOST_TOLD]


def makes(host: Host, key: str, cache: str) -> None:
    """Note that a job on the host makes this build already, as its survey says: the host goes before others."""
    _making.setdefault((key, cache), []).append(host)


@contextlib.contextmanager
def turn(host: Host, key: str, cache: str | None) -> Iterator[None]:
    """Of the hosts that need a build from one cache let one go first, until one of them has it; then all others.

    A host that makes it already goes before those that have not begun. One that fails lets an exception out of the
    block: then the next one goes first.
    """
    if cache is None:
        yield
        return
    place = (key, cache)
    _let_makers_begin(host, place)
    while (first := _first.get(place)) is not None and not first.done.is_set():
        host.log(f"waiting for {first.host}, which makes the same build")
        first.done.wait()
    if first is not None:
        yield
        return
    mine = _first[place] = _First(host.name)
    try:
        yield
    except BaseException:
        del _first[place]  # the next host goes first
        raise
    finally:
        mine.done.set()


def _let_makers_begin(host: Host, place: tuple[str, str]) -> None:
    """Wait until a host that makes the build already has its turn, or cannot come: all hosts begin at once."""
    makers = _making.get(place, [])
    while place not in _first and host not in makers and any(one in one.state.active_hosts for one in makers):
        gevent.sleep(0.1)
    if host in makers:
        makers.remove(host)  # where it fails nobody waits for it
