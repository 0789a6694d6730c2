"""What must change on a host: what it should be, against what is installed.

Decision 16: docs/decisions/0016-records-are-versioned.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llamafleet.host.installed import Installed, InstalledInstance
from llamafleet.hub.source import ModelFiles
from llamafleet.service import astray, wanted
from llamafleet.service.desired import Desired, Service, Serving
from llamafleet.service.instance_changes import differences, liveness_differences, quiet_differences

# Keys of plan.json beside its identity by which the host's programs work.
TOLD_TO_HOST = ("trial", "batch_tokens", "allowed_drop_ins", "demand")


@dataclass(frozen=True)
class Misplaced:
    """A place that is not as it should be, and how it differs."""

    place: wanted.Place
    phrase: str


@dataclass(frozen=True)
class Changes:
    """What to do on one host; empty where everything is as it should be."""

    helpers: bool
    user: bool
    packages: tuple[str, ...]  # what the host lacks, by the words of `llamafleet/build/packages.py`
    toolkit: bool
    build: bool
    # Folders of models to fetch or to read again, with the reasons.
    models: Mapping[str, tuple[str, ...]]
    # Instances to install or restart, with the reasons.
    services: Mapping[str, tuple[str, ...]]
    # Instances whose servers run on while their files and their state in systemd are set right, with the reasons.
    refreshed: Mapping[str, tuple[str, ...]]
    # Instances that stay as they are, but for their liveness check, with the reasons.
    liveness: Mapping[str, tuple[str, ...]]
    removed: tuple[str, ...]
    current: bool
    # Files and folders that get their mode and owner again, or make way for what belongs there, by path.
    paths: Mapping[str, Misplaced]
    # Of the instances to install those whose plan llama-server was not asked about.
    verify: tuple[str, ...] = ()
    # Instances that stay as they are, but whose plan.json has other inputs or another answer of llama-server.
    note: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        """Whether anything is to be done to what runs or is installed: a plan.json alone does not count."""
        parts = (self.helpers, self.user, self.packages, self.toolkit, self.build, self.models, self.services,
                 self.refreshed, self.liveness, self.removed, self.current, self.paths)  # fmt: skip
        return any(bool(part) for part in parts)

    def to_do(self) -> Iterator[str]:
        """What a run would do on the host, a phrase each."""
        for name, reasons in self.services.items():
            yield f"serve {name}: {', '.join(reasons)}"
        for name, reasons in self.refreshed.items():
            yield f"set {name} right while its server runs on: {', '.join(reasons)}"
        for name, reasons in self.liveness.items():
            yield f"install the liveness check of {name}: {', '.join(reasons)}"
        yield from (f"remove {name}, which models no longer has" for name in self.removed)
        yield from (*self.of_host(), *(one.phrase for one in self.paths.values() if one.place.instance))
        for name in self.note:
            yield f"write the plan.json of {name} again, since its inputs changed; its service stays as it is"

    def of_instance(self, name: str) -> tuple[str, ...]:
        """How this instance differs from what it should be, a phrase each."""
        parts = (self.services, self.refreshed, self.liveness)
        reasons = [reason for part in parts for reason in part.get(name, ())]
        return (*reasons, *(one.phrase for one in self.paths.values() if one.place.instance == name))

    def of_host(self) -> tuple[str, ...]:
        """What differs on the host beside its instances, a phrase each."""
        parts = {"helpers": self.helpers, "user": self.user, "packages": self.packages, "toolkit": self.toolkit,
                 "build": self.build, "current release": self.current}  # fmt: skip
        models = [f"models: {reason}" for reasons in self.models.values() for reason in reasons]
        # What is missing with its folder is not named again.
        places = [one.phrase for path, one in self.paths.items() if not one.place.instance
                  and not (one.phrase.endswith(" is missing") and path.rpartition("/")[0] in self.paths)]  # fmt: skip
        return (*(name for name, needed in parts.items() if needed), *models, *places)


def changes_needed(desired: Desired, installed: Installed) -> Changes:
    """What makes the host what it should be."""
    installed = astray.left_out(installed)
    services = {serving.name: serving.service for serving in desired.servings}
    alone = len(services) == 1
    build = bool(services) and not _has_release(desired, installed)
    reasons = {
        name: (*differences(service, installed.instances.get(name), installed.ground, alone),
               *_runs_from(service, installed.instances.get(name), build))
        for name, service in services.items()
    }  # fmt: skip
    there = {name: installed.instances[name] for name in services if name in installed.instances}
    quiet = {name: quiet_differences(services[name], instance) for name, instance in there.items()}
    watching = {name: liveness_differences(services[name], instance) for name, instance in there.items()}
    # What is done with more than is needed for one reason is done for the others too.
    to_install = {name: (*why, *quiet.get(name, ()), *watching.get(name, ())) for name, why in reasons.items() if why}
    refreshed = {name: (*why, *watching[name]) for name, why in quiet.items() if why and name not in to_install}
    stay = {name: instance for name, instance in there.items() if name not in (*to_install, *refreshed)}
    misplaced = [Misplaced(*one) for one in wanted.differences(_places(desired, installed, build), installed.paths)]
    model_files = {path for serving in desired.servings for path in _model_files(serving)}
    models = {folder: tuple(_of_model(folder, model, installed, misplaced))
              for serving in desired.servings for folder, model in serving.models.items()}  # fmt: skip
    return Changes(
        helpers=installed.helpers != desired.run.helpers,
        user=not installed.user,
        packages=tuple(need.name for need in desired.lacking),
        toolkit=desired.install_toolkit is not None,
        build=build,
        models={folder: why for folder, why in models.items() if why},
        services=to_install,
        refreshed=refreshed,
        liveness={name: watching[name] for name in stay if watching[name]},
        removed=tuple(name for name in installed.instances if name not in services),
        current=bool(services) and installed.current != desired.build.key,
        # Links are replaced with what they lead to; a model's file is read again.
        paths={one.place.path: one for one in misplaced
               if one.place.kind != "link" and one.place.path not in model_files},
        verify=tuple(
            serving.name for serving in desired.servings if serving.name in to_install and not serving.is_verified
        ),
        note=tuple(
            serving.name
            for serving in desired.servings
            if serving.name in stay
            and (
                serving.verified is not None
                or serving.name not in desired.inputs.same_inputs()
                or _tells_otherwise(stay[serving.name], serving)
                or _has_other_rates(stay[serving.name], serving)
            )
        ),
    )  # fmt: skip


def _has_release(desired: Desired, installed: Installed) -> bool:
    """Whether the wanted release is there and whole, and its release.json is its own."""
    record, build = installed.releases.get(desired.build.key), desired.build
    own = {"key": build.key, "commit": build.commit}
    return record is not None and all(record.get(key, value) == value for key, value in own.items())


def _has_other_rates(installed: InstalledInstance, serving: Serving) -> bool:
    """Whether plan.json lacks the rates that its plan was chosen with, as an earlier version wrote it, or has another
    figure of the probe. One that it lacks, since the host was busy then, is written with the next change."""
    recorded = installed.record.raw.get("inputs") if installed.record else None
    wanted = serving.record.get("inputs")
    if wanted is None:
        return False
    rates, now = recorded.get("rates") if isinstance(recorded, dict) else None, wanted["rates"]
    return rates not in (now, {**now, "probe": None})


def _runs_from(service: Service, installed: InstalledInstance | None, build: bool) -> Iterator[str]:
    """Whether the running server has loaded files of its release that are gone, or will be."""
    if installed is None or installed.active != "active":
        return
    if installed.deleted:
        names = ", ".join(path.rpartition("/")[2] for path in installed.deleted)
        yield f"it runs from files that were removed or replaced: {names}"
    elif build and (installed.exe or "").startswith(service.release + "/"):
        yield "its release is damaged and made again"


def _places(desired: Desired, installed: Installed, build: bool) -> tuple[wanted.Place, ...]:
    record = installed.releases.get(desired.build.key, {})
    files = record.get("files") if not build else None
    names = [name for name in files if isinstance(name, str)] if isinstance(files, Mapping) else []
    instances = [
        wanted.Instance(
            serving.name, tuple(serving.service.secrets), bool(serving.service.liveness), bool(serving.service.demand)
        )
        for serving in desired.servings
    ]
    models = [path for serving in desired.servings for path in _model_files(serving)]
    return wanted.places(instances, desired.run.helpers, desired.build.key, names, models)


def _model_files(serving: Serving) -> dict[str, str | None]:
    """The sums of the files of a model and its companions by path; None where one is not known."""
    return {path: sha256 for folder, model in serving.models.items() for path, sha256 in _files(folder, model).items()}


def _files(folder: str, model: ModelFiles) -> dict[str, str | None]:
    return {f"{folder}/{file.name}": file.sha256 for file in model.files}


def _of_model(folder: str, model: ModelFiles, installed: Installed, misplaced: list[Misplaced]) -> Iterator[str]:
    """Why the files of a model must be fetched or read again: a phrase for each that is not there and verified, by its
    sum, or where that is unknown by any."""
    for path, sha256 in _files(folder, model).items():
        known = installed.models.get(path)
        note = f"{path}.verified"
        phrases = [
            one.phrase
            for one in misplaced
            if one.place.path == path or (one.place.path == note and installed.paths[note].kind != "file")
        ]
        if phrases:
            yield phrases[0]
        elif known is None:
            there = path in installed.paths
            yield f"{path} {'was changed since it was verified' if there else 'is missing'}"
        elif sha256 not in (None, known):
            yield f"{path} is another file than the source has"


def _tells_otherwise(installed: InstalledInstance, serving: Serving) -> bool:
    """Whether plan.json tells the host's programs other things than it should: an earlier version wrote less, and of
    an address the query too."""
    keys = ("source", *TOLD_TO_HOST)
    return installed.record is not None and any(installed.record.raw.get(k) != serving.record.get(k) for k in keys)
