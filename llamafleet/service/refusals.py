"""Why a host is left out of a run, as a value. Each text has the setting or place, the fact, and the way out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from llamafleet.build.cuda_toolkit import Unsuitable
from llamafleet.build.packages import COMPILER, MANAGERS, Need, too_old
from llamafleet.build.rocm import NoHip
from llamafleet.host.installed import Holder, Installed, Listener, Offer, Place, Survey
from llamafleet.host.machine import Machine
from llamafleet.host.recorded import SCHEMA
from llamafleet.hub.source import ModelFiles
from llamafleet.planner.result import Refusal
from llamafleet.remote.common import LOCK, MODEL_FILE_RULE, drop_in_folders, is_model_file, plan_path
from llamafleet.settings.schema import Instance, Settings
from llamafleet.sources import shown

SYSTEMD = 1  # its process
WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 -- compared with, never bound


@dataclass(frozen=True)
class Refused:
    """This host is left out of the run, for these reasons."""

    reasons: tuple[str, ...]

    @classmethod
    def because(cls, reason: str) -> Refused:
        """For a single reason."""
        return cls((reason,))

    def __str__(self) -> str:
        return "; ".join(self.reasons)


def diagnosed(refused: Refused, machine: Machine) -> Refused:
    """The refusal with what the probe found wrong with the host, unless it says so already."""
    said = str(refused)
    new = [text for text in machine.problems if (text.partition(": ")[2] or text) not in said]
    return Refused((*refused.reasons, *(f"the host: {text}" for text in new)))


def not_accessible(
    survey: Survey, holder: Holder | None, oldest_python: tuple[int, ...]
) -> Refused | None:  # fmt: skip
    """Whether our programs cannot work on the host at all.

    `holder`: another run that holds the host's lock, see `held_by`; `oldest_python`: what our helpers run with.
    """
    machine = survey.machine
    python = machine.python or ""
    if survey.installed.euid != 0:
        return Refused.because(
            "commands run there as an ordinary user: connect as root (ssh_user), or set `_sudo = True` "
            "for the host in the inventory, or pass --sudo"
        )
    if tuple(int(part) for part in re.findall(r"\d+", python)[:2]) < oldest_python:
        needed = ".".join(map(str, oldest_python))
        return Refused.because(
            f"its Python is {python or 'of unknown version'}, {needed} or later is needed: install a newer one, and "
            'name it in the setting python, such as python = "/usr/bin/python3.11"'
        )
    if machine.package_manager not in MANAGERS:
        known = f"{', '.join(MANAGERS[:-1])} or {MANAGERS[-1]}"
        system = f"{machine.os.id} {machine.os.version}".strip()
        return Refused.because(f"{system} has none of the package managers that llamafleet knows: {known}")
    if later := _later_record(survey):
        return later
    return Refused.because(held_by(holder)) if holder else None


def _later_record(survey: Survey) -> Refused | None:
    """Whether a later version of llamafleet deployed an instance: what it wrote is not known here."""
    for name, instance in survey.installed.instances.items():
        if instance.record is not None and instance.record.is_later:
            return Refused.because(
                f"{plan_path(name)} on the host has schema {instance.record.schema}, this version of llamafleet knows "
                f"{SCHEMA}: deploy with the later version that wrote it, or remove the file to have {name} planned anew"
            )
    return None


def held_by(holder: Holder) -> str:
    """The sentence for somebody who finds the host's lock held, from what the lock's file says."""
    return (
        f"{holder.who} (pid {holder.pid}) is deploying to this host since {holder.began}, "
        f"last seen {holder.age_seconds:.0f} s ago: wait for it; a run that died elsewhere loses the lock "
        f"after 15 minutes, or remove {LOCK}"
    )


def nothing_to_serve(settings: Settings, installed: Installed, elsewhere: Collection[str]) -> Refused | None:
    """Whether the run would remove all instances of the host, which an inventory without `models` asks for. Those that
    other hosts are to serve, as the names and sources `elsewhere` say, only move."""
    gone = {name: one for name, one in installed.instances.items() if name not in elsewhere}
    lost = [name for name, one in gone.items() if not (one.record and one.record.source in elsewhere)]
    if settings.models or settings.allow_empty_models or not lost:
        return None
    names = ", ".join(sorted(lost))
    return Refused.because(
        f"models: is empty, and the host serves {names}: the run would stop and remove all of them. Give the host its "
        "models in the inventory; if it is to serve none, set allow_empty_models = True, or remove llamafleet from it "
        "by tasks.uninstall.uninstall"
    )


def is_path(instance: Instance) -> bool:
    """Whether the model is a file of the operator's machine or of the host."""
    return instance.source.startswith("/")


def unusable_file(instance: Instance, model: ModelFiles) -> Refused | None:
    """Whether a host cannot store a file of the model under its name."""
    for file in model.files:
        if not is_model_file(file.name):
            return Refused.because(
                f"models: {instance.name}: source: the file name {file.name[:250]!r} should have {MODEL_FILE_RULE}"
            )
    return None


def unverified(instance: Instance, model: ModelFiles) -> Refused:
    """No sha256 is known of a file of the model, which the host does not have."""
    unknown = model.without_sum
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    one = "it" if len(model.files) == 1 else f"a list with one for each of the {len(model.files)} files"
    return Refused.because(
        f"models: {instance.name}: sha256: it is not known of {unknown[0].name}{more} from {shown(unknown[0].url)}, so "
        f"anybody between could give another file: give {one}, or set `allow_unverified` = True in this model's entry"
        f"{f'. The source was not read: {unknown[0].failed}' if unknown[0].failed else ''}"
    )


def no_backend(refusal: Refusal) -> Refused:
    """No backend can be chosen for the host."""
    reason = refusal.reason if refusal.reason.startswith("models: ") else f"the host: {refusal.reason}"
    return Refused.because("; ".join([reason, *refusal.suggestions]))


def no_plan(refusal: Refusal) -> Refused:
    """A model cannot be served on the host."""
    name = refusal.instance
    reason = refusal.reason
    while reason.startswith(f"{name}: "):  # the model itself may have that name, too
        reason = reason.removeprefix(f"{name}: ")
    return Refused.because("; ".join([f"models: {name}: {reason}", *refusal.suggestions]))


def no_toolkit(unsuitable: Unsuitable) -> Refused:
    """The host has no CUDA toolkit that can compile llama.cpp for it, and none can be installed."""
    return Refused.because("; ".join([f"cuda_toolkit: {unsuitable.reason}", *unsuitable.suggestions]))


def no_hip(no_hip: NoHip) -> Refused:
    """The host has no HIP that can compile llama.cpp, and none can be installed."""
    return Refused.because("; ".join([f"backend: hip: {no_hip.reason}", *no_hip.suggestions]))


# The way out where no repository has a package, by `Need.name`.
_ELSEWHERE = {
    "glslc": "install LunarG's Vulkan SDK, whose glslc on the PATH of root's services does as well",
    "cmake": "put a CMake of kitware into /usr/local/bin",
}


# What switches a repository on, by package manager.
_ENABLE = {"apt": "add-apt-repository {}", "dnf": "dnf config-manager --set-enabled {}",
           "zypper": "zypper modifyrepo --enable {}"}  # fmt: skip


def _enabling(manager: str, repository: str) -> str:
    """The command by which an owner switches a repository on."""
    if re.search(r"-for-rhel-\d+-", repository):  # of Red Hat's subscription, which writes dnf's files anew
        return f"subscription-manager repos --enable {repository}"
    return _ENABLE.get(manager, "enable {}").format(repository)


def no_packages(lacking: Sequence[Need], offers: Mapping[str, Offer], machine: Machine) -> Refused | None:
    """Whether no enabled repository of the host has something that it needs and lacks."""
    reasons = []
    for need in lacking:
        offer = offers.get(need.name)
        if offer is None or offer.package is not None or need.optional:
            continue
        names = " or ".join(need.packages.get(machine.package_manager or "", ())) or need.name
        off = f" ({', '.join(offer.off)}: switched off there)" if offer.off else ""
        out = _ELSEWHERE.get(need.name, "install it on the host")
        if offer.off:
            out = " or ".join(_enabling(machine.package_manager or "", one) for one in offer.off)
        reasons.append(
            f"packages: {need.name} is missing, and no enabled repository of the host has {names}{off}: {out}"
        )
    return Refused(tuple(reasons)) if reasons else None


def old_tools(backend: str, versions: Mapping[str, str | None]) -> Refused | None:
    """Whether what would compile llama.cpp is too old for it."""
    reasons = tuple(
        f"packages: {word} {version} is too old to compile llama.cpp, {oldest} or later is needed: "
        + ("link a newer one as c++, g++, cc and gcc in /usr/local/bin (RHEL 8: those of gcc-toolset-13)"
           if word == COMPILER.name else "put one of kitware's into /usr/local/bin")
        + ", or give the host a build_cache with the build of another one of its kind"
        for word, version, oldest in too_old(backend, versions)
    )  # fmt: skip
    return Refused(reasons) if reasons else None


def no_hip_target() -> Refused:
    """It is not known for which AMD GPU llama.cpp is to be compiled."""
    return Refused.because(
        "backend: hip: the driver does not report the GPU's LLVM target (gfx...): amdgpu's KFD is not loaded, or a "
        'container was not given /dev/kfd: mend that, or set backend = "vulkan"'
    )


def foreign_unit(instance: Instance, foreign_units: Collection[str]) -> Refused | None:
    """Whether the host has a unit of the instance's name that llamafleet did not make."""
    if instance.unit not in foreign_units:
        return None
    return Refused.because(
        f"models: {instance.name}: {instance.unit} exists and llamafleet did not make it: "
        "give the model another name, or remove the unit"
    )


def foreign_drop_in(instance: Instance, drop_ins: Collection[str]) -> Refused | None:
    """Whether a drop-in changes the instance's unit that is neither the unit's own, which a run removes, nor one of all
    services of the host."""
    own = drop_in_folders(instance.unit)
    for path in drop_ins:
        folder, _, name = path.rpartition("/")
        if folder not in own and not folder.endswith("/service.d") and name not in instance.allowed_drop_ins:
            return Refused.because(
                f"models: {instance.name}: {path} changes {instance.unit} and was not made for it alone: remove it, or "
                f'name it in allowed_drop_ins: ["{name}"]'
            )
    return None


def no_disk(instance: Instance, folder: str, place: Place | None) -> Refused | None:
    """Whether the model's folder is a link of ours to a disk that is not there: downloaded again, the model would fill
    another disk."""
    if place is None or place.kind != "link" or not place.target:
        return None
    if place.target.rpartition("/")[2] != folder.rpartition("/")[2]:
        return None
    return Refused.because(
        f"models: {instance.name}: {folder} leads to {place.target}, which is not there: mount its disk, or remove the "
        "link to have the model downloaded again"
    )


def no_address(instance: Instance, unbindable: Mapping[str, str]) -> Refused | None:
    """Whether no server of the host can listen at the instance's address; `unbindable` has such addresses and why."""
    why = unbindable.get(instance.listen)
    if why is None:
        return None
    return Refused.because(
        f"models: {instance.name}: listen: {instance.listen}: the host cannot listen there: {why}: give an address "
        "that the host has (`ip address` shows them), 127.0.0.1, or 0.0.0.0 for all"
    )


def port_taken(
    instance: Instance, listeners: Sequence[Listener], ours: Collection[str], opened: Collection[int] = ()
) -> Refused | None:
    """Whether another program listens where the instance should; `ours` are units that give up their ports, `opened`
    ports at which systemd listens for them."""
    others = [one for one in listeners if not (one.pid == SYSTEMD and one.port in opened)]
    listener = _listener(instance, others, ours)
    if listener is None:
        return None
    who = listener.unit or listener.process or "another program"
    return Refused.because(
        f"models: {instance.name}: port {instance.port} on {instance.listen} is taken by {who}"
        f"{f' (pid {listener.pid})' if listener.pid else ''}: stop it, or give the model another port"
    )


def _listener(instance: Instance, listeners: Sequence[Listener], ours: Collection[str]) -> Listener | None:
    for listener in listeners:
        addresses = {listener.address, instance.listen}
        overlaps = len(addresses) == 1 or addresses & set(WILDCARDS)
        if listener.port == instance.port and overlaps and listener.unit not in (instance.unit, *ours):
            return listener
    return None
