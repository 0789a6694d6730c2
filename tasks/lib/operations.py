"""Changing a host, under its lock. Each operation yields commands only where something must change; what must change
was decided before, in `llamafleet/service/`.

Whatever goes wrong in an operation fails its host alone, with a line. No word of an inventory reaches a shell: commands
are lists of words, and files go by standard input to `llamafleet/remote/receive.py`.

Decision 11: docs/decisions/0011-secrets-never-travel-in-the-open.md.
"""

from __future__ import annotations

import hashlib
import json
import traceback
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

from pyinfra import logger
from pyinfra.api import FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from llamafleet import payload
from llamafleet.host import answers
from llamafleet.hub.network import Network
from llamafleet.planner.reconcile import ROUNDS
from llamafleet.remote.common import GOOD, LOADED, STAGED, plan_path, unit_of
from llamafleet.service import wanted
from llamafleet.service.succession import Handover
from tasks.lib import builds, gateway_drains, host_lock, jobs, lookups, moves, paths, remote, sending, switching

Commands = Generator[remote.HostCommand | FunctionCommand, None, None]

Item = TypeVar("Item")

# A release is read once for its digest: 3 GB from a slow disk.
DIGEST_SECONDS = 300.0


@dataclass(frozen=True)
class Staging:
    """The files and secrets that are staged for one instance, and the identity of its plan record."""

    name: str
    identity: str
    files: dict[str, str]
    secrets: Mapping[str, str] = field(repr=False)

    @property
    def folder(self) -> str:
        """The folder on the host."""
        return staged(self.name)


def staged(name: str) -> str:
    """The folder on the host for the staged files of the instance of that name."""
    return f"{STAGED}/{name}"


def each(items: Iterable[Item], name: Callable[[Item], str]) -> Iterator[Item]:
    """The items in turn, each with operations of its own in pyinfra's output.

    pyinfra merges operations that come from the same line of code, and shows the name of one host's for all
    hosts. The loop position tells them apart: first the place in the list, which keeps the order, then the name.
    """
    host = ctx_host.get()
    for position, item in enumerate(items):
        host.loop_position += [position, zlib.crc32(name(item).encode())]
        yield item
        del host.loop_position[-2:]


def _as_wanted(what: str) -> None:
    """Log, with `-v`, why an operation does nothing."""
    ctx_host.get().noop(what)


def call(action: Callable[..., bool], *arguments: Any) -> FunctionCommand:
    """A command that is a function of ours, by state, host and these arguments."""
    return FunctionCommand(remote.guarded(action), arguments, {})


def _by(network: Network | None) -> tuple[Any, ...]:
    """The last arguments of `jobs.follow`, for a job that has no secret and reads by this network."""
    return (None, network) if network is not None and network.is_set else ()


def change(function: Callable[..., Commands]) -> Any:
    """An operation that changes the host: before its first command the host's lock is held, and what was decided is
    looked at again. Where the function itself raises, the host fails with a line."""

    @operation()
    @wraps(function)
    def under_the_lock(*args: Any, **kwargs: Any) -> Commands:
        held = False
        try:
            for command in function(*args, **kwargs):
                if not held:
                    yield call(jobs.hold)
                    held = True
                yield command
        except Exception as error:  # whatever it is, the other hosts' run must go on
            logger.debug(traceback.format_exc())
            yield call(_failed, remote.said(error))

    return under_the_lock


def _failed(state: State, host: Host, text: str) -> bool:
    return remote.fail(host, text)


@operation()
def take_lock(needed: bool) -> Commands:
    """Take this run's lock on the host; of two runs at once the second fails, and names the first."""
    if needed:
        yield call(jobs.hold)


@operation()
def release_lock(needed: bool) -> Commands:
    """Release the host's lock."""
    if needed:
        yield call(_release)


def _release(state: State, host: Host) -> bool:
    host_lock.release(host)
    return True


@change
def create_user(needed: bool) -> Commands:
    """The system user that the services run as: no shell, no home."""
    if not needed:
        return _as_wanted("the user llamafleet exists")
    yield remote.HostCommand(
        ["useradd", "--system", "--user-group", "--home-dir", "/nonexistent", "--no-create-home",
         "--shell", "/usr/sbin/nologin", "--comment", "llama-server instances", "llamafleet"],
        purpose="useradd llamafleet",
    )  # fmt: skip


@change
def install_helpers(needed: bool, arch: str, network: Network) -> Commands:
    """Our helper programs with their pinned libraries, in a folder of this version; then link it as the current one."""
    if not needed:
        return _as_wanted("the helpers are of this version")
    helpers = lookups.once(
        ("helpers", arch, network), lambda: payload.helpers_zip(arch, environment=network.environment())
    )
    yield sending.copied(helpers, "helpers.py", "install", payload.helpers_key(), purpose="helpers.py", seconds=300)


@change
def restore_places(places: tuple[wanted.Place, ...]) -> Commands:
    """Make folders of ours, and set modes and owners, by `llamafleet/remote/restore.py`; no service is touched."""
    if not places:
        return _as_wanted("all files and folders are in their place")
    asked = [
        {"path": one.path, "kind": "folder" if one.kind == "folder" else "file", "mode": one.mode} for one in places
    ]
    yield remote.program("restore.py", json.dumps(asked))


@change
def install_packages(manager: str, needs: Mapping[str, Mapping[str, Any]], network: Network | None = None) -> Commands:
    """What the host lacks, from packages of the distribution; `needs` is as `llamafleet/remote/packages.py` says."""
    if not needs:
        return _as_wanted("all packages are installed")
    words = (manager, json.dumps(needs))
    job = jobs.name_of("packages", hashlib.sha256(" ".join(words).encode()).hexdigest()[:16])
    yield call(jobs.follow, job, remote.words("install_packages.py", *words), *_by(network))


@change
def checkout(
    needed: bool, repository: str, commit: str, folder: str, network: Network | None = None
) -> Commands:  # fmt: skip
    """A git checkout at exactly this commit; fetches that commit alone, and only where it is missing."""
    if not needed:
        return _as_wanted(f"commit {commit} needs no building")
    job = jobs.name_of("checkout", commit)
    yield call(jobs.follow, job, remote.words("checkout.py", folder, repository, commit), *_by(network))


@change
def run_job(
    needed: bool,
    job: str,
    program: str,
    arguments: tuple[str, ...] = (),
    spec: dict[str, Any] | None = None,
    secret: jobs.Secret | None = None,
    network: Network | None = None,
) -> Commands:
    """Run one of our helper programs detached: a lost connection loses nothing, and a later run follows the job
    while it still runs.

    `job` is what it does, a `-`, and to what; `spec` is sent as a file, and its path becomes the first argument.
    `secret` is a file that is on the host from the job's start to its end, whether or not we are still connected.
    `network` is the job's way out.
    """
    if not needed:
        return _as_wanted(f"{job} is not needed")
    name = jobs.name_of(*job.split("-", 1))
    if spec is not None:
        yield jobs.sent_spec(name, spec)
        arguments = (jobs.spec_path(name), *arguments)
    yield call(jobs.follow, name, remote.words(program, *arguments), secret, *_by(network)[1:])


@change
def send_files(needed: bool, files: tuple[paths.Sending, ...], reserve_bytes: int) -> Commands:
    """Files of this machine, part by part; a later run goes on where this one was cut."""
    if not needed:
        return _as_wanted("the host has the files")
    yield call(paths.send, files, reserve_bytes)


@change
def send_commit(needed: bool, repository: str, commit: str, path: str) -> Commands:
    """One commit of a repository of this machine, as a pack file."""
    if not needed:
        return _as_wanted(f"commit {commit} needs no building")
    yield call(paths.send_commit, repository, commit, path)


@change
def build_release(needed: bool, job: str, spec: dict[str, Any], network: Network | None = None) -> Commands:
    """Make a release on the host: compiled there, or taken from the build cache with a digest that this run knows."""
    if not needed:
        return _as_wanted("the host has the release")
    name = jobs.name_of(*job.split("-", 1))
    yield jobs.sent_spec(name, spec)
    yield call(_build, name, spec["key"], spec["build_cache"], network)


class _NotBuiltError(Exception):
    """A host has not made the build; why has been logged."""


def _build(state: State, host: Host, job: str, key: str, cache: str | None, network: Network | None = None) -> bool:
    """Make the build in its turn, and note its digest for the other hosts. Raises `remote.RemoteError` where the host
    does not give it."""
    try:
        with builds.turn(host, key, cache):
            command = remote.words("build.py", jobs.spec_path(job), *builds.known(key))
            if not jobs.follow(state, host, job, command, None, network):
                raise _NotBuiltError
            if cache is not None:
                asked = remote.program("build.py", "digest", key, seconds=DIGEST_SECONDS)
                builds.made(key, remote.run_json(host, asked, answers.built).digest)
    except _NotBuiltError:
        return False
    return True


@change
def ask_server(needed: bool, check: Callable[[Host], bool]) -> Commands:
    """Ask the built llama-server what it would allocate, and plan again where the ledger was wrong."""
    if not needed:
        return _as_wanted("no new plan is to be verified")
    yield call(lambda state, host: check(host))


@change
def for_instances(names: tuple[str, ...], action: Callable[[State, Host, str], bool]) -> Commands:
    """Do this for each of these instances, one after another."""
    for name in names:
        yield call(action, name)
    if not names:
        _as_wanted("no instance needs it")


@change
def note_plans(records: Callable[[], Mapping[str, str]]) -> Commands:
    """Write the plan.json of instances whose service stays as it is; `records` gives the texts by instance."""
    texts = records()
    for name, text in texts.items():
        yield sending.received({plan_path(name): (0o644, text.encode())}, "--too", f"{GOOD}/{name}/plan.json")
    if not texts:
        _as_wanted("every plan.json is as it should be")


@change
def stage_service(staging: Callable[[], Staging | None]) -> Commands:
    """Stage an instance's files, as they are after its plan was verified; nothing where `staging` gives None."""
    now = staging()
    if now is None:
        return _as_wanted("the instance is as planned")
    yield _staged(now.folder, now.files, now.secrets)


@change
def switch_service(
    staging: Callable[[], tuple[Staging, ...]], again: Callable[[Host, str, dict[str, int]], bool],
    handover: Handover, options: switching.Options,
) -> Commands:  # fmt: skip
    """Switch to the staged files in the host's turn; where a new instance does not pass the gate, all old files come
    back.

    They come back too where llama-server could only be asked in the switch, and wanted more memory than there is.
    Then `again` plans with the sizes that it printed, and the switch is tried again, `ROUNDS` times at most.
    """
    for number in range(ROUNDS):
        now = staging()
        if not now:
            moves.passed(ctx_host.get(), Handover(handover.names))
            return _as_wanted("the instance is as planned")
        if number:
            for one in now:
                yield _staged(one.folder, one.files, one.secrets)
        binary_bytes: dict[str, int] = {}
        yield call(_switch, now, handover, options, binary_bytes, number == ROUNDS - 1)
        if not binary_bytes:
            return
        [asked] = _asked(now)
        yield call(lambda state, host, sizes=binary_bytes, name=asked.name: again(host, name, sizes))


@change
def refresh_service(staging: Callable[[], Staging | None]) -> Commands:
    """Replace unit, plan.json and liveness check of an instance whose running server depends on none of the changes."""
    now = staging()
    if now is None:
        return _as_wanted("the unit is as planned")
    yield _staged(now.folder, now.files, now.secrets)
    yield call(jobs.follow, jobs.name_of("refresh", now.name), remote.words("switch.py", "refresh", now.name))


def _asked(now: tuple[Staging, ...]) -> list[Staging]:
    """Those about which llama-server is asked in the switch; of a single instance itself."""
    return [one for one in now if len(now) == 1 or "question.json" in one.files]


def _switch(
    state: State, host: Host, now: tuple[Staging, ...], handover: Handover, options: switching.Options,
    binary_bytes: dict[str, int], last: bool,
) -> bool:  # fmt: skip
    """Run the switch as a job. Where it failed because llama-server wants more memory, put the sizes that it printed
    into `binary_bytes`, unless this was the last try."""
    names = tuple(one.name for one in now)
    job = jobs.name_of("switch", "-".join([*names, now[0].identity]))
    words = ["install", ",".join(names), *options.words()]
    if handover.leaving:
        words += ["--leaving", ",".join(handover.leaving)]
        words += ["--keep"] if moves.is_taken_over(host, handover.leaving) else []
    with switching.turn(host, (*names, *handover.leaving), options.at_once):
        is_good = jobs.follow(state, host, job, remote.words("switch.py", *words))
    if is_good:
        moves.passed(host, handover)
        return True
    _, lines, _ = remote.run(host, remote.program("job.py", "told", job))
    lines = [line for line in lines if line]
    if not lines or last or len(_asked(now)) != 1:
        return False
    binary_bytes.update(remote.last(lines, answers.sizes))
    return True


@operation()
def note_switched() -> Commands:
    """Note that the host has made its switches; changes nothing."""
    moves.switched(ctx_host.get())
    _as_wanted("it changes nothing")
    yield from ()


@change
def stage_files(needed: bool, folder: str, files: dict[str, str], secrets: Mapping[str, str]) -> Commands:
    """Write the new files of an instance into a folder that root alone may enter, before the switch."""
    if not needed:
        return _as_wanted("the instance is as planned")
    yield _staged(folder, files, secrets)


def _staged(folder: str, files: Mapping[str, str], secrets: Mapping[str, str]) -> remote.HostCommand:
    """The command that makes the folder anew with these files; their texts are in no command, no diff and no log."""
    modes = {name: 0o600 if name in LOADED else 0o644 for name in (*files, *secrets)}
    texts = {**files, **secrets}
    sent = {f"{folder}/{name}": (mode, texts[name].encode()) for name, mode in modes.items()}
    return sending.received(sent, "--fresh", folder)


@change
def make_current(needed: bool, key: str, keep: int) -> Commands:
    """Link the release as the current one, and remove the oldest that nothing runs from."""
    if not needed:
        return _as_wanted(f"release {key} is the current one")
    yield remote.program("releases.py", key, str(keep), seconds=600)


@change
def remove_instance(instance: str, handover: Handover, options: switching.Options) -> Commands:
    """Stop and remove an instance that the inventory no longer names; its model stays. `handover` is the switch for
    which it was stopped, if there was one. It stays where another host was to serve it, and does not."""
    yield call(_remove, instance, handover, options)


def _remove(state: State, host: Host, instance: str, handover: Handover, options: switching.Options) -> bool:
    staying = moves.staying(host)
    why = [str(staying[name]) for name in (instance, *handover.leaving) if name in staying]
    if not why:
        words = ["remove", instance, *options.words()]
        words += ["--after", ",".join(handover.names)] if handover.names else []
        with gateway_drains.drained(host, [instance], strict=False, even_last=True, back=False):
            return jobs.follow(state, host, jobs.name_of("remove", instance), remote.words("switch.py", *words))
    if not handover.names:
        host.log(f"{unit_of(instance)} stays: {why[0]}. Run again when it can", logger.warning)
        return True
    if instance == handover.leaving[0]:  # once for all
        names = ",".join(handover.names)
        words = ["undo", names, "--leaving", ",".join(handover.leaving), *options.words()]
        if not jobs.follow(state, host, jobs.name_of("undo", names), remote.words("switch.py", *words)):
            return False
    units = ", ".join(map(unit_of, handover.leaving))
    return remote.fail(host, f"{units} came back in place of {', '.join(map(unit_of, handover.names))}: {why[0]}")
