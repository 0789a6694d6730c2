"""Replace the files of one or more instances together: after a power cut, a kill or an error they are all old, or all
new.

Contract: a module of switch.py, which calls, under the instances' locks, for each of them `begin`, `write`, `replace`,
then `pass_gate` and `keep`, or `put_back`; at last `close`. Each raises OSError where it fails, `put_back` also Lost;
`put_back`, `pass_gate`, `keep` and `close` can be repeated. Root, the standard library, Python 3.8; common.py and
instance_files.py beside it.

Instances that are switched together are a group. The first one leads: it begins first, its folder's renaming decides
for all, and it is closed last.

State on the disk, in /var/lib/llamafleet/good, where NAME is the instance:

    .switching/NAME/   a switch is under way; whoever finds it without a living switch puts the old files back.
                       note.json {"schema": 1, "old": {file: SHA-256} | null, "had": [files], "invocation": text},
                       of a group also "group": [names, the leading one first], "id": of the switch, and "leaves":
                       true of an instance that is only stopped; files/: the new files, to become the last good ones
    .passed/NAME/      the same folder, renamed: the gate has passed; whoever finds it finishes the switch
    .before/NAME/      the files from before a switch that `undo` may take back
    NAME/              the last good files

Beside each installed file lie, while .switching/NAME is there, `.FILE.old`, to go back by renaming alone, and
`.FILE.new`. For that time llamafleet-recover-NAME.service is enabled: at a boot it leads back before the instance
starts.

Decision 9: docs/decisions/0009-nothing-half-done-has-its-final-name.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

import common
import instance_files
from instance_files import MANIFEST, PASSED, Files, places

PREPARING, SWITCHING, BEFORE = "/.preparing", "/.switching", "/.before"
WANTED_BY, SOCKETS_WANTED_BY = "multi-user.target.wants", "sockets.target.wants"


class Lost(Exception):
    """A file cannot be put back; the text names it."""


def folder_of(state: str, name: str) -> str:
    return f"{common.GOOD}{state}/{name}"


def beside(path: str, end: str) -> str:
    """A hidden name in the file's own folder, which is not the name of any instance's file."""
    return f"{os.path.dirname(path)}/.{os.path.basename(path)}.{end}"


class Group(NamedTuple):
    """Instances that are switched together, the leading one first; `id` is of this switch alone. Those of `leaving` are
    stopped, and none of their files is replaced."""

    names: Sequence[str]
    id: str
    leaving: Sequence[str] = ()


def under_way(name: str) -> Optional[Dict[str, Any]]:
    """The note of a switch that has not passed the gate; None where there is none."""
    if not os.path.isdir(folder_of(SWITCHING, name)) or has_passed(name):
        return None
    return _note(SWITCHING, name)


def has_passed(name: str) -> bool:
    if os.path.isdir(folder_of(PASSED, name)):
        return True
    note = _note(SWITCHING, name)
    leading = _names(note, name)[0]
    return leading != name and note.get("id") is not None and _note(PASSED, leading).get("id") == note["id"]


def group_of(name: str) -> List[str]:
    """The instances that were switched together with this one, the leading one first; itself alone where none were."""
    return _names(_any_note(name), name)


def is_leaving(name: str) -> bool:
    """Whether the switch only stops this instance."""
    return _any_note(name).get("leaves") is True


def _any_note(name: str) -> Dict[str, Any]:
    return _note(SWITCHING, name) or _note(PASSED, name)


def _note(state: str, name: str) -> Dict[str, Any]:
    return common.read_json(folder_of(state, name) + "/note.json")


def _names(note: Dict[str, Any], name: str) -> List[str]:
    group = note.get("group")
    if isinstance(group, list) and name in group and all(isinstance(one, str) for one in group):
        return list(group)
    return [name]


def begin(name: str, old: Optional[Files], invocation: str, recover: Optional[str], group: Group) -> None:
    """Prepare the way back, then note that a switch is under way. `old` are the files to go back to, None where there
    is no whole set of them; `invocation` is the start of the server that runs; `recover` is the text of the unit that
    leads back at a boot, for the leading instance."""
    common.make_folder(f"{common.INSTANCES}/{name}")
    for folder in (common.GOOD, *(common.GOOD + state for state in (PREPARING, SWITCHING, PASSED))):
        common.make_folder(folder, 0o700)
    for file, data in (old or {}).items():
        path, mode = places(name)[file]
        common.write_file(beside(path, "old"), data, mode)
    sync(name)
    prepared = folder_of(PREPARING, name)
    remove_folder(prepared)
    os.mkdir(prepared, 0o700)
    note = {
        "schema": 1,
        "old": None if old is None else {file: common.sha256(data) for file, data in old.items()},
        "had": sorted(instance_files.installed(name)),
        "invocation": invocation,
    }
    if len(group.names) > 1:
        note.update(group=list(group.names), id=group.id, leaves=name in group.leaving)
    common.replace_file(f"{prepared}/note.json", json.dumps(note).encode(), 0o600)
    os.rename(prepared, folder_of(SWITCHING, name))
    common.sync(common.GOOD + SWITCHING)
    if recover is not None:
        _enable_recovery(name, recover)


def remember(name: str, old: Optional[Files]) -> None:
    """Keep the files from before a switch until `forget_before`; an empty folder where the instance was not there."""
    forget_before(name)
    folder = folder_of(BEFORE, name)
    common.make_folder(common.GOOD, 0o700)
    common.make_folder(common.GOOD + BEFORE, 0o700)
    os.mkdir(folder, 0o700)
    for file, data in (old or {}).items():
        common.write_file(f"{folder}/{file}", data, 0o600)
    common.sync(folder)
    common.sync(common.GOOD + BEFORE)


def before(name: str) -> Optional[Files]:
    """The files that `remember` kept; None where the instance was not there. Raises Lost where they are not whole."""
    folder = folder_of(BEFORE, name)
    if os.path.isdir(folder) and not os.listdir(folder):
        return None
    files = instance_files.in_folder(name, folder)
    damage = instance_files.damage(name, files)
    if damage is not None:
        raise Lost(f"the files of {name} from before were not kept in {folder}: {damage}")
    return files


def forget_before(name: str) -> None:
    remove_folder(folder_of(BEFORE, name))


def _enable_recovery(name: str, text: str) -> None:
    """Have systemd lead back at the next boot. The link is what `systemctl enable` makes; systemd need not know now."""
    unit, wants = common.transient_unit("recover", name), f"{common.UNITS}/{WANTED_BY}"
    path = f"{common.UNITS}/{unit}"
    common.write_file(beside(path, "new"), text.encode())
    os.replace(beside(path, "new"), path)
    common.make_folder(wants)
    if not os.path.lexists(f"{wants}/{unit}"):
        os.symlink(f"../{unit}", f"{wants}/{unit}")
    common.sync(wants)
    common.sync(common.UNITS)


def _disable_recovery(name: str) -> None:
    unit = common.transient_unit("recover", name)
    path = f"{common.UNITS}/{unit}"
    if remove_files([f"{common.UNITS}/{WANTED_BY}/{unit}", path, beside(path, "new")]):
        sync_enabled(name)


def write(name: str, new: Files, good: Optional[Files]) -> None:
    """Write the new files beside the installed ones, and `good`, which become the last good ones if the gate passes;
    None: those stay. A full disk fails here, where nothing is replaced."""
    for file, data in new.items():
        path, mode = places(name)[file]
        common.write_file(beside(path, "new"), data, mode)
    sync(name)
    files = folder_of(SWITCHING, name) + "/files"
    remove_folder(files)
    if good is not None:
        os.mkdir(files, 0o700)
        for file, data in (*good.items(), (MANIFEST, instance_files.manifest(good))):
            common.write_file(f"{files}/{file}", data, 0o600)
        common.sync(files)
    common.sync(folder_of(SWITCHING, name))


def replace(name: str, new: Iterable[str]) -> None:
    """Give the new files their names; remove installed ones that are not among them."""
    wanted = set(new)
    for file, (path, _) in places(name).items():
        if file in wanted:
            common.make_way(path)
            os.replace(beside(path, "new"), path)
    for file, (path, _) in places(name).items():
        if file not in wanted:
            common.make_way(path)
            remove_files([path])
    sync(name)


def put_back(name: str, note: Dict[str, Any]) -> None:
    """Give the old files their names again; remove installed ones that are not among them. Raises Lost where a file
    is neither installed nor beside it; nothing is removed then."""
    if "old" not in note:
        raise Lost(f"{folder_of(SWITCHING, name)}/note.json cannot be read")
    old = note["old"]
    if old is None:
        return _remove_what_was_not_there(name, note)
    for file, (path, mode) in places(name).items():
        if file in old and os.path.exists(beside(path, "old")):
            os.replace(beside(path, "old"), path)
        elif file in old and common.sha256_of(path) != old[file]:
            kept = (instance_files.last_good(name) or {}).get(file)
            if kept is None or common.sha256(kept) != old[file]:
                raise Lost(f"{path} cannot be put back: no whole copy of it is left")
            common.replace_file(path, kept, mode)
    remove_files(path for file, (path, _) in places(name).items() if file not in old)
    return sync(name)


def _remove_what_was_not_there(name: str, note: Dict[str, Any]) -> None:
    """Of a first switch that did not get as far as its unit nothing stays; with its unit it stays, for its log."""
    unit = places(name)[common.unit_of(name)][0]
    if not os.path.exists(unit):
        remove_files(path for file, (path, _) in places(name).items() if file not in note["had"])
        sync(name)


def pass_gate(group: Sequence[str]) -> None:
    """From here on the new files are the good ones: the renaming of the leading instance's folder decides it."""
    for name in group:
        if os.path.isdir(folder_of(SWITCHING, name)):
            os.rename(folder_of(SWITCHING, name), folder_of(PASSED, name))
            for state in (PASSED, SWITCHING):
                common.sync(common.GOOD + state)


def keep(name: str) -> None:
    """After the gate has passed: let the new files be the last good ones."""
    passed, good = folder_of(PASSED, name), f"{common.GOOD}/{name}"
    if os.path.isdir(passed + "/files"):
        remove_folder(passed + "/before")
        if os.path.lexists(good):
            os.rename(good, passed + "/before")
        os.rename(passed + "/files", good)
        common.sync(common.GOOD)
        common.sync(passed)


def close(name: str) -> None:
    """Remove what a switch needed, now that nothing is left to do. The folder that says what is under way goes last."""
    remove_files(beside(path, end) for path, _ in places(name).values() for end in ("old", "new"))
    sync(name)
    _disable_recovery(name)
    prepared = folder_of(PREPARING, name)
    remove_folder(prepared)
    for state in (SWITCHING, PASSED):
        if os.path.isdir(folder_of(state, name)):
            # Renamed first: what is left of a folder that is being removed must not be taken for a switch.
            os.rename(folder_of(state, name), prepared)
            common.sync(common.GOOD + state)
            remove_folder(prepared)


def forget(name: str) -> None:
    """Remove all that is kept of an instance that is removed, and the links of a unit that systemd cannot disable."""
    close(name)
    forget_before(name)
    remove_folder(f"{common.GOOD}/{name}")
    unit, timer = common.unit_of(name), common.liveness_units(name)[1]
    remove_files([f"{common.UNITS}/{WANTED_BY}/{unit}", f"{common.UNITS}/{unit}.wants/{timer}", socket_link(name)])
    with contextlib.suppress(OSError):
        os.rmdir(f"{common.UNITS}/{unit}.wants")  # if nobody else has a link there


def sync(name: str) -> None:
    """Let the names of the instance's files survive a power cut."""
    for folder in (f"{common.INSTANCES}/{name}", common.UNITS):
        if os.path.isdir(folder):
            common.sync(folder)


def socket_link(name: str) -> str:
    """The link that `systemctl enable` makes for the socket of an instance that starts on demand."""
    return f"{common.UNITS}/{SOCKETS_WANTED_BY}/{common.demand_units(name)[0]}"


def sync_enabled(name: str) -> None:
    """Let the links that `systemctl enable` makes survive a power cut."""
    of_server = (f"{common.UNITS}/{WANTED_BY}", f"{common.UNITS}/{common.unit_of(name)}.wants")
    of_socket = (os.path.dirname(socket_link(name)),) if common.is_on_demand(name) else ()
    for folder in (*of_server, *of_socket, common.UNITS):
        if os.path.isdir(folder):
            common.sync(folder)


def remove_files(paths: Iterable[str]) -> List[str]:
    """Remove these files, where they are there; the paths of those that were."""
    gone = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            gone.append(path)
    return gone


def remove(path: str) -> None:
    """Remove a drop-in, whatever it is, and its folder if it was the last one there."""
    if os.path.isdir(path) and not os.path.islink(path):
        remove_folder(path)
    else:
        remove_files([path])
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))


def remove_folder(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
