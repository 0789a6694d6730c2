"""Changing a host. Each operation yields commands only where something must change; what must change was decided
before, in `llamafleet/service/`.

Decision 11: docs/decisions/0011-secrets-never-travel-in-the-open.md.
"""

from __future__ import annotations

import json
import shlex
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from typing import Any, TypeVar

from pyinfra import logger
from pyinfra.api import FileUploadCommand, FunctionCommand, StringCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.context import ctx_host

from llamafleet import payload
from llamafleet.host import answers
from llamafleet.planner.reconcile import ROUNDS
from llamafleet.remote.common import (
    ETC,
    GOOD,
    HELPERS,
    INSTANCES,
    JOBS,
    MODELS,
    OPT,
    RELEASES,
    RUN,
    STAGED,
    VAR,
    plan_path,
)  # fmt: skip
from tasks.lib import jobs, lookups, remote

Commands = Generator[StringCommand | FileUploadCommand | FunctionCommand, None, None]

Item = TypeVar("Item")


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


FOLDERS = {
    OPT: "0755", HELPERS: "0755", RELEASES: "0755", VAR: "0755", MODELS: "0755", JOBS: "0750",
    STAGED: "0700", GOOD: "0700", ETC: "0755", INSTANCES: "0755", RUN: "0755",
}  # fmt: skip


def _as_wanted(what: str) -> None:
    """Log, with `-v`, why an operation does nothing."""
    ctx_host.get().noop(what)


@operation()
def create_user(needed: bool) -> Commands:
    """The system user that the services run as: no shell, no home."""
    if not needed:
        return _as_wanted("the user llamafleet exists")
    yield StringCommand(
        "useradd --system --user-group --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin "
        "--comment 'llama-server instances' llamafleet"
    )


@operation()
def install_helpers(needed: bool, arch: str) -> Commands:
    """Our helper programs with their pinned libraries, in a folder of this version; then link it as the current one."""
    if not needed:
        return _as_wanted("the helpers are of this version")
    key = payload.helpers_key()
    folder = f"{HELPERS}/{key}"
    for path, mode in FOLDERS.items():
        yield StringCommand(f"install -d -m {mode} {path}")
    helpers = lookups.once(("helpers", arch), lambda: payload.helpers_zip(arch))
    yield FileUploadCommand(BytesIO(helpers), f"{HELPERS}/{key}.zip")
    yield StringCommand(
        f"rm -rf {folder}.new && python3 -I -m zipfile -e {folder}.zip {folder}.new"
        # Compiled once: every survey and gate would otherwise compile the libraries again.
        f" && python3 -m compileall -q {folder}.new"
        f" && chmod -R u=rwX,go=rX {folder}.new && rm -rf {folder} && mv {folder}.new {folder}"
        f" && ln -sfn {key} {HELPERS}/.current && mv -T {HELPERS}/.current {HELPERS}/current"
        f" && rm {folder}.zip"
        f" && find {HELPERS} -mindepth 1 -maxdepth 1 -type d ! -name {key} -exec rm -rf {{}} +"
    )


@operation()
def take_lock(needed: bool) -> Commands:
    """Take this run's lock on the host; of two runs at once the second fails, and names the first."""
    if needed:
        yield FunctionCommand(jobs.take_lock, (), {})


@operation()
def release_lock(needed: bool) -> Commands:
    """Release the host's lock."""
    if needed:
        yield jobs.release()


@operation()
def checkout(needed: bool, repository: str, commit: str, folder: str) -> Commands:
    """A git checkout at exactly this commit; fetches that commit alone, and only where it is missing."""
    if not needed:
        return _as_wanted(f"commit {commit} needs no building")
    git = f"git -C {shlex.quote(folder)}"
    yield StringCommand(f"test -d {shlex.quote(folder)}/.git || git init --quiet {shlex.quote(folder)}")
    # A shallow.lock or index.lock of a git that was killed would stop every later one.
    yield StringCommand(f"rm -f {shlex.quote(folder)}/.git/*.lock")
    yield StringCommand(
        f"{git} cat-file -e {commit}^{{commit}} 2>/dev/null"
        f" || {git} fetch --quiet --depth 1 {shlex.quote(repository)} {commit}"
        f" || {{ echo 'llama_cpp_ref: the repository does not give commit {commit} to this host' >&2; exit 1; }}"
    )
    yield StringCommand(f"{git} checkout --quiet --force --detach {commit} && {git} clean --quiet -ffdx")


@operation()
def run_job(
    needed: bool,
    job: str,
    program: str,
    arguments: tuple[str, ...] = (),
    spec: dict[str, Any] | None = None,
    remove_after: str | None = None,
) -> Commands:
    """Run one of our helper programs detached: a lost connection loses nothing, and a later run follows the job
    while it still runs.

    `spec` is sent as a file, and its path becomes the first argument. `remove_after` is a file on the host that
    is removed as soon as the job has ended, whether or not we are still connected.
    """
    if not needed:
        return _as_wanted(f"{job} is not needed")
    if spec is not None:
        path = f"{JOBS}/{job}.json"
        yield FileUploadCommand(StringIO(json.dumps(spec)), path)
        arguments = (path, *arguments)
    command = remote.words(program, *arguments)
    if remove_after:
        command = ["sh", "-c", '"$@"; code=$?; rm -f "$0"; exit $code', remove_after, *command]
    yield FunctionCommand(jobs.follow, (job, command), {})


@operation()
def ask_server(needed: bool, check: Callable[[Host], bool]) -> Commands:
    """Ask the built llama-server what it would allocate, and plan again where the ledger was wrong."""
    if not needed:
        return _as_wanted("no new plan is to be verified")
    yield FunctionCommand(lambda state, host: check(host), (), {})


@operation()
def note_plans(records: Callable[[], Mapping[str, str]]) -> Commands:
    """Write the plan.json of instances whose service stays as it is; `records` gives the texts by instance."""
    texts = records()
    for name, text in texts.items():
        target = plan_path(name)
        good = f"{GOOD}/{name}"
        yield FileUploadCommand(StringIO(text), f"{target}.new")
        yield StringCommand(
            f"chmod 0644 {target}.new && mv {target}.new {target} && if test -d {good}; then cp -p {target} {good}; fi"
        )
    if not texts:
        _as_wanted("every plan.json is as it should be")


@operation()
def stage_service(staging: Callable[[], Staging | None]) -> Commands:
    """Stage an instance's files, as they are after its plan was verified; nothing where `staging` gives None."""
    now = staging()
    if now is None:
        return _as_wanted("the instance is as planned")
    yield from stage_files._inner(True, now.folder, now.files, now.secrets)


@operation()
def switch_service(staging: Callable[[], Staging | None], again: Callable[[Host, dict[str, int]], bool]) -> Commands:
    """Switch to the staged files; where the new instance does not pass the gate, the old files come back.

    They come back too where llama-server could only be asked in the switch, and wanted more memory than there is.
    Then `again` plans with the sizes that it printed, and the switch is tried again, `ROUNDS` times at most.
    """
    for number in range(ROUNDS):
        now = staging()
        if now is None:
            return _as_wanted("the instance is as planned")
        if number:
            yield from stage_files._inner(True, now.folder, now.files, now.secrets)
        binary_bytes: dict[str, int] = {}
        yield FunctionCommand(_switch, (now, binary_bytes, number == ROUNDS - 1), {})
        if not binary_bytes:
            return
        yield FunctionCommand(lambda state, host, sizes=binary_bytes: again(host, sizes), (), {})


@operation()
def refresh_service(staging: Callable[[], Staging | None]) -> Commands:
    """Replace unit, plan.json and liveness check of an instance whose running server depends on none of the changes."""
    now = staging()
    if now is None:
        return _as_wanted("the unit is as planned")
    yield from stage_files._inner(True, now.folder, now.files, now.secrets)
    yield FunctionCommand(jobs.follow, (f"refresh-{now.name}", remote.words("switch.py", "refresh", now.name)), {})


def _switch(state: State, host: Host, now: Staging, binary_bytes: dict[str, int], last: bool) -> bool:
    """Run the switch as a job. Where it failed because llama-server wants more memory, put the sizes that it printed
    into `binary_bytes`, unless this was the last try."""
    job = f"switch-{now.name}-{now.identity}"
    if jobs.follow(state, host, job, remote.words("switch.py", "install", now.name)):
        return True
    _, lines, _ = remote.run(host, f"grep '^told: ' {JOBS}/{shlex.quote(job)}.log")
    if not lines or last:
        return False
    try:
        binary_bytes.update(remote.last(lines, answers.sizes))
    except remote.RemoteError as error:
        host.log_styled(str(error), fg="red", log_func=logger.error)
        return False
    return True


@operation()
def stage_secret(needed: bool, path: str, text: str | None) -> Commands:
    """Write a secret file on the host, mode 0600, in a folder that root alone may enter. The text is in no
    command, no diff and no log."""
    if needed and text is not None:
        folder = shlex.quote(path.rsplit("/", 1)[0])
        # By standard input: an upload under sudo would pass through a temporary file of the user.
        yield StringCommand(
            f"umask 077 && mkdir -p {folder} && cat > {shlex.quote(path)}.new"
            f" && mv {shlex.quote(path)}.new {shlex.quote(path)}",
            _stdin=text.rstrip("\n"),
        )


@operation()
def stage_files(needed: bool, folder: str, files: dict[str, str], secrets: Mapping[str, str]) -> Commands:
    """Write the new files of an instance into a folder that root alone may enter, before the switch."""
    if not needed:
        return _as_wanted("the instance is as planned")
    quoted = shlex.quote(folder)
    yield StringCommand(f"rm -rf {quoted} && install -d -m 0700 {quoted}")
    for name, text in files.items():
        yield FileUploadCommand(StringIO(text), f"{folder}/{name}")
    for name, text in secrets.items():
        yield from stage_secret._inner(True, f"{folder}/{name}", text)


@operation()
def make_current(needed: bool, key: str, keep: int) -> Commands:
    """Link the release as the current one, and remove the oldest that nothing runs from."""
    if not needed:
        return _as_wanted(f"release {key} is the current one")
    yield remote.program("releases.py", key, str(keep))


@operation()
def remove_instance(instance: str) -> Commands:
    """Stop and remove an instance that the inventory no longer names; its model stays."""
    yield remote.program("switch.py", "remove", instance)
