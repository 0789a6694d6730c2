"""Checks of a host against the inventory's settings: pure functions over the facts that `collect.py` read.

Each check yields a `Problem` for each difference, and nothing if there is none. Expected values come from the
inventory's settings and, for what the plan decided, from the host's plan.json; `instance_checks.plan_file` checks that
file against the settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamafleet.host.installed import Place
from llamafleet.printable import printable
from llamafleet.remote.common import CURRENT, HELPERS, RUN, STAGED
from llamafleet.service import wanted
from llamafleet.service.record import credentials
from llamafleet.settings.schema import DEMAND, Instance, Settings
from tests.hosts import facts

AGAIN = "changed by hand? deploy again"


@dataclass(frozen=True)
class Problem:
    """A difference: the host or instance, the thing that differs, the expected and the actual value, and a hint."""

    where: str
    what: str
    expected: Any
    found: Any
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return printable(f"{self.where}: {self.what}: expected {self.expected}, found {say(self.found)}{hint}")


def say(value: Any) -> str:
    """The value as text for a message; "nothing" for an empty one."""
    return "nothing" if value is None or value in ("", [], {}) else str(value)


Problems = Iterator[Problem]


@dataclass(frozen=True)
class Box:
    """A host: its name, its settings in the inventory, and its facts as `collect.py` prints them."""

    where: str
    settings: Settings
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Served:
    """An instance of a host: its settings and its facts; `where` is HOST/INSTANCE."""

    where: str
    instance: Instance
    facts: Mapping[str, Any]
    release: str | None  # build key of the host's current release; None if there is none
    watched: bool  # whether the settings ask for a liveness check

    @property
    def is_stopped(self) -> bool:
        """Whether it starts on demand, and nobody uses it now."""
        return self.instance.start == DEMAND and self.facts["state"].get("ActiveState") == "inactive"

    @property
    def plan(self) -> Mapping[str, Any]:
        """The host's plan.json. Where it cannot be read, which `plan_file` reports, the one that last passed the gate;
        empty if that cannot be read either."""
        plans: list[Mapping[str, Any]] = [self.facts[key] or {} for key in ("plan", "kept_plan")]
        return next((plan for plan in plans if not facts.plan_problems(plan)), {})


def served(box: Box, instance: Instance) -> Served:
    """The instance with its part of the host's facts."""
    current = box.facts["release"]
    key = current["target"].rsplit("/", 1)[-1] if current else None
    watched = box.settings.liveness_seconds > 0
    return Served(f"{box.where}/{instance.name}", instance, box.facts["instances"][instance.name], key, watched)


# --- a host; instances are checked in `instance_checks.py` ---


def release(box: Box, resolve: Callable[[str, str], str | None]) -> Problems:
    """The link `current` leads to a complete release of the wanted version.

    `resolve` asks a repository for the commit of a ref. It is called only if the ref is neither the built ref nor the
    built commit. A host that serves nothing, such as a gateway, needs no release.
    """
    if not box.settings.models:
        return
    current = box.facts["release"]
    if current is None:
        yield Problem(box.where, CURRENT, "a link to a release", None, "run the deploy")
        return
    if not re.fullmatch(r"releases/[0-9a-f]{16}", current["target"]):
        yield Problem(box.where, CURRENT, "a link to releases/KEY", current["target"])
    record = current["record"]
    if record is None:
        yield Problem(box.where, f"{current['target']}/release.json", "the record of a whole build", None)
        return
    if problems := facts.release_problems(record):
        for problem in problems:
            yield Problem(box.where, f"{current['target']}/release.json", "a readable record", problem, "deploy again")
        return
    if current["target"] != f"releases/{record['key']}":
        yield Problem(box.where, "key in release.json", current["target"], record["key"])
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
    for name in sorted({*record["files"], *current["files"]}):
        expected, actual = record["files"].get(name), current["files"].get(name)
        if expected != actual:
            yield Problem(
                box.where,
                f"{current['target']}/bin/{name}",
                say(expected and f"sha256 {expected}"),
                actual and f"sha256 {actual}",
                "damaged, or built by hand: deploy again, and it is made anew",
            )


def version(box: Box) -> Problems:
    """The output of `llama-server --version` has the commit of release.json."""
    if not box.settings.models:
        return
    current = box.facts["release"]
    record = (current or {}).get("record") or {}
    commit = box.settings.llama_cpp_ref if facts.release_problems(record) else record["commit"]
    output = current and current["version"]
    if not output or not re.search(rf"\b{re.escape(commit[:7])}", output):
        yield Problem(box.where, "llama-server --version", f"commit {commit[:7]}", output)


def folders(box: Box) -> Problems:
    """Every file and folder of ours is in its place, with its mode and owner."""
    found = {
        path: Place(one["kind"], one["mode"], one["uid"], one["gid"])
        for path, one in box.facts["paths"].items()
        if one is not None
    }
    for place, phrase in wanted.differences(_places(box), found):
        how = phrase.removeprefix(f"{place.path} ")
        yield Problem(box.where, place.path, f"root's {place.kind} with mode {place.mode:04o}", f"it {how}", AGAIN)


def _places(box: Box) -> tuple[wanted.Place, ...]:
    """The list of a deploy, made of the settings and of what the host's own records name."""
    current = box.facts["release"] or {}
    record = current.get("record") or {}
    files = [] if facts.release_problems(record) else list(record["files"])
    plans = [served(box, instance).plan for instance in box.settings.models]
    models = [file["path"] for plan in plans for file in plan.get("files", [])]
    instances = [
        wanted.Instance(
            instance.name, tuple(credentials(instance)), box.settings.liveness_seconds > 0, instance.start == DEMAND
        )
        for instance in box.settings.models
    ]
    key = str(current.get("target", "")).rpartition("/")[2]
    return wanted.places(instances, str(box.facts["helpers"]["key"]), key, files, models)


def helpers(box: Box) -> Problems:
    """The programs that look after the services are those that were installed."""
    found = box.facts["helpers"]
    if found["key"] is None:
        yield Problem(box.where, f"{HELPERS}/current", "a link to the helpers", None, AGAIN)
    elif found["damaged"]:
        names = ", ".join(found["damaged"][:5])
        yield Problem(
            box.where, f"{HELPERS}/{found['key']}", "helpers as they were installed", f"others: {names}", AGAIN
        )


def leftovers(box: Box) -> Problems:
    """No Hub token and no staged files are left on the host after a deploy."""
    tokens = [name for name in box.facts["run"] if "token" in name]
    if tokens:
        yield Problem(box.where, RUN, "no Hub token", tokens, "a download was interrupted: remove the file")
    if box.facts["staged"]:
        yield Problem(
            box.where,
            STAGED,
            "an empty folder",
            box.facts["staged"],
            "a switch was interrupted: deploy again",
        )


def undeclared(box: Box) -> Problems:
    """The host has no llama-server units that the inventory does not name."""
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


HOST_CHECKS = (version, folders, helpers, leftovers, undeclared)
