"""Remove from this host what llamafleet has installed, and nothing else.

Contract: `uninstall.py find ASKED` prints {"euid", "lock": holder | null, "units": [names], "paths": [paths],
"models": [paths], "user": bool} and changes nothing; `uninstall.py remove ASKED` removes that, one line of text for
each, the last one of a failure beginning with `error: `; exit 0 done, 1 failed, 3 held by another run, then
with the holder as JSON. ASKED is a JSON object {"models": bool, "holder": as lock.py has it | null, "over": run |
null}; models stay, owned by root, unless they are asked for. Packages and logs stay, and so does a build cache,
which is a folder of the operator's. Killed at any point it can be run again. Root, systemd, the standard
library; common.py, lock.py and survey.py lie beside it.
"""

from __future__ import annotations

import glob
import json
import os
import pwd
import shutil
import subprocess
import sys
from typing import Any

import lock
import survey
from common import ETC, MODELS, OPT, PREFIX, RUN, UNITS, USER, VAR, listing, output_of

COMMENT = "llama-server instances"  # as `tasks/lib/operations.py` makes the user
STAMPS = "/var/lib/systemd/timers"
# Paths with our name; install_toolkit.py makes the repositories and their key.
OURS = (
    OPT, ETC, RUN, f"{UNITS}/.{PREFIX}*.rejected",
    "/etc/apt/sources.list.d/llamafleet-*", "/etc/apt/preferences.d/llamafleet-*",
    "/usr/share/keyrings/llamafleet-*", "/etc/yum.repos.d/llamafleet-*",
)  # fmt: skip


def units() -> list[str]:
    """Unit files that we made, by their first line: services, timers, whatever there is."""
    return [name for name in listing(UNITS) if survey.is_ours(name)]


def jobs() -> list[str]:
    """Our detached jobs that still run; they have no unit file (job.py)."""
    lines = output_of(["systemctl", "list-units", "--all", "--plain", "--no-legend", "llamafleet-*"])
    return [line.split()[0] for line in lines.splitlines() if line.split()]


def paths() -> list[str]:
    """Everything of ours but units and models, and the folders above models that are there."""
    found = [path for pattern in OURS for path in sorted(glob.glob(pattern))]
    inside = [path for path in children(VAR) if path != MODELS]
    found += inside if models() or not os.path.isdir(VAR) else [VAR]
    return found + caches() + stamps()


def children(folder: str) -> list[str]:
    try:
        return [f"{folder}/{name}" for name in sorted(os.listdir(folder))]
    except OSError:
        return []


def caches() -> list[str]:
    """The cache folders of our units, also of removed ones: they belong to our user."""
    number = user_id()
    found = [path for path in glob.glob(f"/var/cache/{PREFIX}*") if os.lstat(path).st_uid == number]
    return sorted(found) if number is not None else []


def stamps() -> list[str]:
    """The files in which systemd keeps when our persistent timers last ran."""
    stamped = [f"{STAMPS}/stamp-{name}" for name in units() if name.endswith(".timer")]
    return [path for path in stamped if os.path.exists(path)]


def user_id() -> int | None:
    """The number of the user that we made; None if there is none, or if somebody else made a user of that name."""
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        return None
    return user.pw_uid if user.pw_gecos.startswith(COMMENT) else None


def models() -> list[str]:
    return children(MODELS)


def stores() -> list[str]:
    """The folders of models on other disks, to which links of ours of the same name lead."""
    links = [path for path in models() if os.path.islink(path)]
    return [target for path in links if os.path.isdir(target := os.path.realpath(path))
            and os.path.basename(target) == os.path.basename(path)]  # fmt: skip


def find() -> dict[str, Any]:
    return {"euid": os.geteuid(), "lock": lock.read(), "units": units(), "paths": paths(), "models": models(),
            "user": user_id() is not None}  # fmt: skip


def remove(with_models: bool, run_id: str) -> None:
    """Remove everything; `run_id` holds the host's lock. Raises OSError and CalledProcessError."""
    for name in [*jobs(), *units()]:
        stop(name)
        lock.refresh(run_id)
    gone = [path for path in paths() if path != RUN]
    for name in units():
        run("systemctl", "disable", "--quiet", name, check=os.path.isfile(f"{UNITS}/{name}"))
        run("systemctl", "reset-failed", name, check=False)  # nothing to forget is as good
        delete(f"{UNITS}/{name}")
    run("systemctl", "daemon-reload")
    for path in [*gone, *([*stores(), VAR] if with_models else [])]:
        delete(path)
        lock.refresh(run_id)
    keep_models()
    if user_id() is not None:
        run("userdel", USER)
        print(f"removed the user {USER}", flush=True)
    shutil.rmtree(RUN)  # last: the lock is in it


def stop(unit: str) -> None:
    """Stop a unit; of a template, its instances."""
    run("systemctl", "stop", unit.replace("@.", "@*."))


def keep_models() -> None:
    """Models that stay are root's, since the number of a removed user may become somebody else's."""
    for folder, names, files in os.walk(MODELS):
        # In order: FILE.verified may not seem to be older than FILE.
        for path in [folder, *(os.path.join(folder, name) for name in sorted((*names, *files)))]:
            os.chown(path, 0, 0, follow_symlinks=False)
    if models():
        print(f"kept the models in {MODELS}", flush=True)


def delete(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
    else:
        return
    print(f"removed {path}", flush=True)


def run(*command: str, check: bool = True) -> None:
    subprocess.run(command, check=check, stdout=None if check else subprocess.DEVNULL,
                   stderr=None if check else subprocess.DEVNULL)  # fmt: skip


def main(argv: list[str]) -> int:
    asked = json.loads(argv[1])
    if argv[0] == "find":
        print(json.dumps(find()))
        return 0
    over = ["--over", asked["over"]] if asked["over"] else []
    # It prints the holder where that is somebody else.
    if lock.main(["take", json.dumps(asked["holder"]), *over]):
        return 3
    try:
        remove(asked["models"], asked["holder"]["run"])
    except (OSError, subprocess.CalledProcessError) as error:
        lock.release(asked["holder"]["run"])
        print(f"error: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
