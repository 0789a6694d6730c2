"""What lies on a host as it should be: each folder, file and link of ours with its mode; and what of it differs.

One list for the deploy, `--dry` and `llamafleet status`. tests/hosts takes it too, and looks by its own way. The
contents of files are compared in changes.py, as far as a run decides them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from llamafleet.host.installed import Place as Found
from llamafleet.remote.common import (
    BUILD,
    CURRENT,
    FOLDERS,
    GATES,
    GOOD,
    HELPERS,
    INSTANCES,
    MODEL_MODE,
    RELEASES,
    RUN,
    SOURCE,
    UNITS,
    demand_units,
    liveness_units,
    plan_path,
    unit_of,
)

# Bits of a mode that say who reads and who writes.
READ_WRITE = 0o666
# That root reads and writes, also without capabilities, and that nobody else writes.
NOT_BY_OTHERS = 0o622


@dataclass(frozen=True)
class Place:
    """A path with what belongs there."""

    path: str
    kind: str  # "file", "folder" or "link"
    mode: int = 0o755
    compared: int = 0o7777  # the bits of the mode that must be so
    instance: str = ""  # whose it is; empty: the host's
    needed: bool = True  # whether it differs where it is missing


@dataclass(frozen=True)
class Instance:
    """Of an instance what its places depend on."""

    name: str
    secrets: Collection[str]  # the names of its credentials
    watched: bool  # whether it has a liveness check
    on_demand: bool = False  # whether it has the units that start it


def places(instances: Iterable[Instance], helpers: str, release: str, files: Collection[str],
           models: Iterable[str]) -> tuple[Place, ...]:  # fmt: skip
    """All places of a host, folders before what is in them.

    `helpers` and `release` are the keys of the current ones, `files` the names in the release, `models` the paths of
    the model files. A file that is missing is no difference of its place: its content is.
    """
    return (*folders(), *_links(), Place(f"{HELPERS}/{helpers}", "folder", needed=False), *_release(release, files),
            *_models(models), *(place for one in instances for place in _instance(one)))  # fmt: skip


def folders() -> Iterator[Place]:
    """Our folders. Those of a run and those that only a build needs may be missing; whoever needs them first makes
    them."""
    yield from (Place(path, "folder", mode) for path, mode in FOLDERS.items() if path != RUN)
    yield Place(f"{GATES}/liveness", "folder", compared=0o022, needed=False)
    yield from (Place(path, "folder", compared=0o022, needed=False) for path in (RUN, BUILD, SOURCE))


def _links() -> Iterator[Place]:
    yield from (Place(path, "link", compared=0, needed=False) for path in (CURRENT, f"{HELPERS}/current"))


def _release(key: str, files: Collection[str]) -> Iterator[Place]:
    folder = f"{RELEASES}/{key}"
    yield from (Place(path, "folder", needed=False) for path in (folder, f"{folder}/bin"))
    yield Place(f"{folder}/release.json", "file", 0o644, READ_WRITE, needed=False)
    for name in sorted(files):
        compared = 0o777 if name == "llama-server" else READ_WRITE
        yield Place(f"{folder}/bin/{name}", "file or link", 0o755, compared, needed=False)


def _models(paths: Iterable[str]) -> Iterator[Place]:
    for path in dict.fromkeys(paths):
        yield Place(path.rpartition("/")[0], "folder", needed=False)
        yield from (Place(f"{path}{end}", "file", MODEL_MODE, needed=False) for end in ("", ".verified"))


def _instance(one: Instance) -> Iterator[Place]:
    name, good = one.name, f"{GOOD}/{one.name}"
    units = (
        unit_of(name),
        *(liveness_units(name) if one.watched else ()),
        *(demand_units(name) if one.on_demand else ()),
    )
    yield Place(f"{INSTANCES}/{name}", "folder", instance=name, needed=False)
    for secret in sorted(one.secrets):
        yield Place(f"{INSTANCES}/{name}/{secret}", "file", 0o600, instance=name, needed=False)
    yield Place(plan_path(name), "file", 0o644, instance=name, needed=False)
    yield from (Place(f"{UNITS}/{unit}", "file", 0o644, instance=name, needed=False) for unit in units)
    yield Place(good, "folder", 0o755, NOT_BY_OTHERS, instance=name, needed=False)
    yield from (Place(f"{good}/{file}", "file", 0o600, NOT_BY_OTHERS, instance=name, needed=False)
                for file in (*sorted(one.secrets), "plan.json", "manifest.json", *units))  # fmt: skip


def differences(wanted: Iterable[Place], found: Mapping[str, Found]) -> Iterator[tuple[Place, str]]:
    """Each place that is not as it should be, with a phrase that says how."""
    for place in wanted:
        if phrase := difference(place, found.get(place.path)):
            yield place, f"{place.path} {phrase}"


def difference(place: Place, found: Found | None) -> str:
    """How what lies at a place differs; empty where it does not."""
    if found is None:
        return "is missing" if place.needed else ""
    if found.kind not in place.kind.split(" or "):
        return f"is {_article(found.kind)} instead of {_article(place.kind)}"
    if found.kind == "link":
        return ""
    parts = []
    if (found.mode ^ place.mode) & place.compared:
        parts.append(f"has mode {found.mode:04o} instead of {place.mode:04o}")
    if (found.uid, found.gid) != (0, 0):
        parts.append(f"belongs to {found.uid}:{found.gid} instead of root")
    return " and ".join(parts)


def _article(kind: str) -> str:
    return "something else" if kind == "other" else f"a {kind}"
