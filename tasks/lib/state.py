"""The state of one host: what is installed and runs there, and what a run would change; for `llamafleet status` and
`llamafleet report`. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pyinfra.api.host import Host

from llamafleet.cli.status import HostStatus, Wanted, of_host
from llamafleet.host import answers
from llamafleet.host.answers import LiveInstance
from llamafleet.host.installed import Installed, Survey
from llamafleet.service.changes import Changes
from llamafleet.service.desired import Desired
from llamafleet.service.measured import to_json
from llamafleet.service.refusals import Refused
from llamafleet.settings.schema import Settings, SettingsError
from tasks.lib import facts, remote
from tasks.lib.decision import READ_ERRORS, decide


@dataclass(frozen=True)
class State:
    """What was read of a host. `desired` is None where it cannot be what the inventory asks for: `status` says why."""

    status: HostStatus
    survey: Survey
    desired: Desired | None


def read(host: Host) -> State | str:
    """The host's state, also where it cannot be what the inventory asks for; a sentence if nothing can be read."""
    now = decide(host)
    if isinstance(now, Refused):
        return _without_plan(host, str(now))
    survey = now.desired.inputs.survey
    live, problem = _live(host, survey.installed)
    status = of_host(survey.installed, live, wanted(now.desired, now.changes), problem)
    return State(_with_machine(status, survey), survey, now.desired)


def wanted(desired: Desired, changes: Changes) -> Wanted:
    """What a run would change, as `--dry` says it."""
    services = {serving.name: changes.of_instance(serving.name) for serving in desired.servings}
    tuned = {name: to_json(tuning) for name, tuning in desired.inputs.tunings.items()}
    return Wanted(services, changes.of_host(), tuned)


def _without_plan(host: Host, problem: str) -> State | str:
    """The state of what runs on a host to which the inventory cannot be deployed."""
    try:
        survey = facts.survey(host, Settings.from_data(host.data.dict()), packages=False)
    except SettingsError:
        return problem
    except READ_ERRORS as error:
        return str(error)
    live, _ = _live(host, survey.installed)
    status = of_host(survey.installed, live, None, f"cannot be compared with the inventory: {problem}")
    return State(_with_machine(status, survey), survey, None)


def _with_machine(status: HostStatus, survey: Survey) -> HostStatus:
    """The state with the free space of the disks of our folders, and what the probe found wrong with the host."""
    free_bytes = {disk.path: disk.free_bytes for disk in survey.machine.disks}
    return replace(status, free_bytes=free_bytes, problems=survey.machine.problems)


def _live(host: Host, installed: Installed) -> tuple[Mapping[str, LiveInstance], str]:
    """What `status.py` prints on the host, and the problem where it fails."""
    if installed.helpers is None or not installed.instances:
        return {}, ""
    try:
        return remote.run_json(host, remote.program("status.py"), answers.status), ""
    except remote.RemoteError as error:
        return {}, f"memory and gate are not known: {error}"
