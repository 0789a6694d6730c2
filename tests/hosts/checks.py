"""Is a host as it was asked for? Pure functions over settings and what `collect.py` found.

Each check yields a `Problem` for everything that is not as it should be, and nothing where all is well.
What is expected comes from the inventory's settings and, for what was decided for this very host, from
the plan.json that lies there; the latter is itself checked against the former.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamafleet.remote.common import CURRENT, ETC, INSTANCES, OPT, RUN, STAGED
from llamafleet.settings.schema import Instance, Settings


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be: where, what, and both values."""

    where: str
    what: str
    expected: Any
    found: Any
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.where}: {self.what}: expected {self.expected}, found {say(self.found)}{hint}"


def say(value: Any) -> str:
    """The value for a message."""
    return "nothing" if value is None or value in ("", [], {}) else str(value)


Problems = Iterator[Problem]


@dataclass(frozen=True)
class Box:
    """A host: its name, what was asked for it, and what was found there."""

    where: str
    settings: Settings
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Served:
    """One instance of a host; `where` is HOST/INSTANCE."""

    where: str
    instance: Instance
    facts: Mapping[str, Any]
    # Key of the host's current release; None where there is none.
    release: str | None
    # Is a liveness check wanted?
    watched: bool

    @property
    def plan(self) -> Mapping[str, Any]:
        """plan.json as it lies on the host; empty where there is none, which `plan_file` reports."""
        return self.facts["plan"] or {}


def served(box: Box, instance: Instance) -> Served:
    """The part of a host's facts that is about one instance."""
    found = box.facts["release"]
    key = found["target"].rsplit("/", 1)[-1] if found else None
    facts, watched = box.facts["instances"][instance.name], box.settings.liveness_seconds > 0
    return Served(f"{box.where}/{instance.name}", instance, facts, key, watched)


# --- a host; instances are checked in `instance_checks.py` ---


def release(box: Box, resolve: Callable[[str, str], str | None]) -> Problems:
    """`current` leads to a whole release of the wanted version. `resolve` asks a repository what commit a
    ref names; it is called only where the ref's name alone does not settle it."""
    found = box.facts["release"]
    if found is None:
        yield Problem(box.where, CURRENT, "a link to a release", None, "run the deploy")
        return
    if not re.fullmatch(r"releases/[0-9a-f]{16}", found["target"]):
        yield Problem(box.where, CURRENT, "a link to releases/KEY", found["target"])
    record = found["record"]
    if record is None:
        yield Problem(box.where, f"{found['target']}/release.json", "the record of a whole build", None)
        return
    if found["target"] != f"releases/{record['key']}":
        yield Problem(box.where, "key in release.json", found["target"], record["key"])
    ref = box.settings.llama_cpp_ref
    if ref not in (record["ref"], record["commit"]):
        commit = resolve(box.settings.llama_cpp_repository, ref)
        if commit != record["commit"]:
            yield Problem(
                box.where,
                "llama.cpp",
                f"{ref} (commit {commit or 'unknown'})",
                f"{record['ref']} (commit {record['commit']})",
            )
    for name in sorted({*record["files"], *found["files"]}):
        expected, there = record["files"].get(name), found["files"].get(name)
        if expected != there:
            yield Problem(
                box.where,
                f"{found['target']}/bin/{name}",
                say(expected and f"sha256 {expected}"),
                there and f"sha256 {there}",
                "damaged, or built by hand",
            )


def version(box: Box) -> Problems:
    """The installed program itself names the commit it was made from."""
    found = box.facts["release"]
    commit = ((found or {}).get("record") or {}).get("commit", box.settings.llama_cpp_ref)
    said = found and found["version"]
    if not said or not re.search(rf"\b{commit[:7]}", said):
        yield Problem(box.where, "llama-server --version", f"commit {commit[:7]}", said)


def folders(box: Box) -> Problems:
    """Only root changes what the services run and are told."""
    for path in (OPT, ETC, INSTANCES):
        found = box.facts["folders"][path]
        if found is None or (found["owner"], found["mode"]) != ("root", "0755"):
            yield Problem(box.where, path, "root 0755", found and f"{found['owner']} {found['mode']}")


def leftovers(box: Box) -> Problems:
    """A finished deploy leaves no token on the host and nothing half prepared."""
    tokens = [name for name in box.facts["run"] if "token" in name]
    if tokens:
        yield Problem(box.where, RUN, "no Hub token", tokens, "a fetch was broken off: remove it")
    if box.facts["staged"]:
        yield Problem(
            box.where,
            STAGED,
            "an empty folder",
            box.facts["staged"],
            "a switch was broken off: deploy again",
        )
    staged = box.facts["folders"][STAGED]
    if staged and (staged["owner"], staged["mode"]) != ("root", "0700"):
        yield Problem(
            box.where,
            STAGED,
            "root 0700",
            f"{staged['owner']} {staged['mode']}",
            "API keys pass through it",
        )


def undeclared(box: Box) -> Problems:
    """What the inventory does not name does not run."""
    declared = {instance.unit for instance in box.settings.models}
    extra = sorted(set(box.facts["units"]) - declared)
    if extra:
        yield Problem(
            box.where,
            "units llama-server-*.service",
            f"only {', '.join(sorted(declared)) or 'none'}",
            ", ".join(extra),
            "deploy again, or name them in models",
        )


HOST_CHECKS = (version, folders, leftovers, undeclared)
