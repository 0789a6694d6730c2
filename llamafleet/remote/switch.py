"""Switch instances to their new files, and restore the old ones if the new ones do not serve.

Contract: NAMES are names of instances, joined by commas. `switch.py install NAMES [--leaving NAMES] [--keep] [--drain
SECONDS [--overdue WHAT]]` takes the staged files of /var/lib/llamafleet/staged/NAME (the unit, plan.json, the secrets
that it has, the units of its liveness check where there is one), installs them together, starts, runs the gate and,
where anything fails, puts the old ones back and proves that they serve again. Several are switched at once, as
instances that take over each other's ports or memory must be: all are stopped before the first one starts, and all go
back where one fails. Those of --leaving are stopped with them and stay stopped and disabled, with all their files:
`remove` is for later. With --keep `switch.py undo NAMES --leaving NAMES`, with the same names, leads back to what was
before. A server that is stopped has SECONDS to finish its running replies; WHAT is "cut" where they are cut then,
"wait" where the switch waits on, and "stop" where it fails and the server serves on. `switch.py refresh NAME` installs
the staged files, and sets the unit's state in systemd right, while the server runs on; `switch.py watch NAME` installs
the staged liveness check alone. Each removes the drop-ins of the instance's units, but for those that plan.json allows.
`switch.py recover NAMES [--wait]` ends a switch that was cut off: it finishes it if the gate had passed, else it puts
the old files back and starts them, and does not wait for them; while a switch is at work it does nothing, or, with
--wait, waits for its end. `switch.py remove NAME [--after NAMES] [--drain SECONDS [--overdue WHAT]]` stops and removes
an instance; of the switch of --after nothing is kept for `undo` any more. Log lines on stdout; the last one of a
failure begins with `error: `. Exit 0 done, 1 failed. Killed at any point it can be run again, and `recover` runs before
the instances start at the next boot. Root, the standard library; common.py, transaction.py, instance_files.py, the
modules that it imports and what the gate and the preflight need lie beside it.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
Decision 9: docs/decisions/0009-nothing-half-done-has-its-final-name.md.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from typing import Any, Dict, Iterator, List, Optional, Sequence  # the contract is Python 3.8, whose own are typing's

import common
import instance_files
import pace
import room
import starting
import switch_back
import switch_checks
import transaction
from common import journal, liveness_units, systemctl, unit_of
from draining import CUT, STOP, WAIT, Draining, Overdue
from instance_files import PLAN, Files
from starting import timer_of, unwatch
from switch_back import Failed, Stopped, finish, going_back, recover, settle

VERIFY = f"{starting.FOLDER}/verify.py"
REJECTED = 3  # exit status of `verify.py settle`: llama-server rejects its arguments


def install(
    names: Sequence[str], leaving: Sequence[str] = (), keep: bool = False, drain: float = 0.0,
    options: Sequence[str] = (), overdue: str = CUT,
) -> None:  # fmt: skip
    """Switch these instances together to their staged files, in place of `leaving`. `options` are the gate's."""
    everyone = [*names, *leaving]
    try:
        for name in everyone:
            settle(name)
        switch_checks.check(names)
        old = {**{name: instance_files.previous(name) for name in names},
               **{name: whole(name) for name in leaving}}  # fmt: skip
        with going_back(everyone, prove=True):
            guard(everyone)
            if keep:
                for name in names:
                    transaction.remember(name, old[name])
            switch_back.begin(old, leaving)
            for name in names if "--no-floor" not in options else ():
                if starting.serving_since(name):
                    pace.measure_old(name, f"{common.STAGED}/{name}/{PLAN}")
            drained = Draining(everyone, drain, overdue)
            make_way(names)
            ask(names, leaving, drained)
            replace(names)
            for name in leaving:
                unwatch(name)
            systemctl("daemon-reload")
            for name in names:
                switch_checks.effective(name)
            start(names, leaving, drained, options)
            transaction.pass_gate(everyone)
        finish(everyone)
    finally:
        for name in names:
            shutil.rmtree(f"{common.STAGED}/{name}", ignore_errors=True)  # it may hold keys


def whole(name: str) -> Optional[Files]:
    """The installed files of an instance that leaves; None where they are not whole, and could not be started again."""
    files = instance_files.installed(name)
    return files if instance_files.damage(name, files) is None else None


def replace(names: Sequence[str]) -> None:
    """Give the staged files of all these instances their places; a full disk fails before the first of them."""
    new = {name: staged_files(name) for name in names}
    for name in names:
        transaction.write(name, new[name], good=new[name])
    for name in names:
        unwatch(name)
        transaction.replace(name, new[name])
        remove_drop_ins(name, new[name])


def start(names: Sequence[str], leaving: Sequence[str], drain: Draining, options: Sequence[str]) -> None:
    """Stop what is old, start what is new, and run the gate. Raises Failed."""
    print(f"starting {', '.join(map(unit_of, names))}", flush=True)
    if leaving:
        stop_all([*names, *leaving], drain)
    problem = starting.start_and_check(names, *options, drain=drain)
    if problem is not None:
        for name in names:
            print(journal("--lines=15", "--unit", unit_of(name)).rstrip(), flush=True)
        raise Failed(f"{', '.join(map(unit_of, names))} did not pass the gate: {problem}")
    for name in leaving:  # at a boot from here on it would take the port of what replaces it
        systemctl("disable", "--quiet", unit_of(name))
        transaction.sync_enabled(name)


def stop_all(names: Sequence[str], drain: Draining) -> None:
    starting.stop([name for name in names if os.path.exists(f"{common.UNITS}/{unit_of(name)}")], drain)


def ask(names: Sequence[str], leaving: Sequence[str], drain: Draining) -> None:
    """Stop the old servers and ask each new one what it would allocate, if the GPU had no room for both.

    Raises Failed if it would allocate more than the plan gives.
    """
    questions = {name: f"{common.STAGED}/{name}/question.json" for name in names}
    asked = [name for name in names if os.path.exists(questions[name])]
    if not asked:
        return
    clear(names)
    print(f"asking llama-server, with {', '.join(map(unit_of, [*names, *leaving]))} stopped", flush=True)
    stop_all([*names, *leaving], drain)
    for name in asked:
        done = subprocess.run(
            [sys.executable, "-s", "-E", "-B", VERIFY, "settle", questions[name], f"{common.STAGED}/{name}/{PLAN}"]
        )  # fmt: skip
        if done.returncode == REJECTED:
            raise Failed(f"llama-server rejects what {unit_of(name)} would give it")
        if done.returncode:
            raise Failed(f"the plan of {unit_of(name)} does not fit")


def clear(names: Sequence[str]) -> None:
    """Stop all other servers that started on demand, when their running replies have ended. Raises Failed."""
    problem = room.make(names[0], besides=names, alone=True)
    if problem is not None:
        raise Failed(problem)


def make_way(names: Sequence[str]) -> None:
    """Where an instance that starts with the host is new or needs more than before: stop what started on demand, which
    was planned beside less."""
    if any(grows(name) for name in names):
        clear(names)


def grows(name: str) -> bool:
    """Whether a staged instance that starts with the host needs more on a device than the installed one."""
    if common.demand_units(name)[0] in staged_files(name):
        return False
    new, old = (used(common.read_json(path)) for path in (f"{common.STAGED}/{name}/{PLAN}", common.plan_path(name)))
    return any(size > old.get(device, 0) or common.is_on_demand(name) for device, size in new.items())


def used(record: Dict[str, Any]) -> Dict[str, int]:
    """What a plan.json takes of each device, in bytes; nothing where it does not say."""
    plan = record.get("plan")
    rows = plan.get("ledger") if isinstance(plan, dict) else None
    parts = [f"{part}_bytes" for part in ("weights", "kv", "compute", "staging", "overhead", "beside")]
    return {str(row.get("device")): sum(size for part in parts if isinstance(size := row.get(part), int))
            for row in rows or [] if isinstance(row, dict)}  # fmt: skip


def staged_files(name: str) -> Files:
    return instance_files.in_folder(name, f"{common.STAGED}/{name}")


def guard(names: Sequence[str]) -> None:
    """Have a process outside this job wait for its end and, if that was no orderly one, lead back."""
    unit = common.transient_unit("guard", f"{names[0]}-{os.getpid()}")
    subprocess.run(
        ["systemd-run", "--quiet", "--collect", f"--unit={unit}", "--property=Type=exec", "--property=MemoryMax=256M",
         sys.executable, "-s", "-E", "-B", f"{starting.FOLDER}/switch.py", "recover", ",".join(names), "--wait"],
        check=True,
    )  # fmt: skip


def undo(names: Sequence[str], leaving: Sequence[str], drain: float = 0.0, overdue: str = CUT) -> None:
    """Take back a switch that was made with `keep`: what it stopped serves again, and what was new is removed."""
    old = {name: transaction.before(name) for name in names}
    back: Dict[str, Files] = {name: files for name, files in old.items() if files is not None}
    for name in leaving:
        files = whole(name)
        if files is None:
            raise Failed(f"{unit_of(name)} cannot be started again: its files are not whole")
        back[name] = files
    for name, files in back.items():
        stage(name, files)
    new = [name for name in names if name not in back]
    install(list(back), new, drain=drain, options=["--no-floor"], overdue=overdue)
    for name in new:
        remove(name)
    for name in names:
        transaction.forget_before(name)


def stage(name: str, files: Files) -> None:
    """Stage these files, which only root may read."""
    folder = f"{common.STAGED}/{name}"
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder, mode=0o700)
    for file, data in files.items():
        common.write_file(f"{folder}/{file}", data, 0o600)


def replace_quietly(name: str, only: Sequence[str]) -> None:
    """Replace `only` these files by the staged ones while the server runs on, also among the last good files. Where
    there are no good files that fit, the running server has to pass the gate first."""
    try:
        settle(name)
        old = instance_files.installed(name)
        if unit_of(name) in only:
            keep_hardening(name, old)
        staged = staged_files(name)
        new, good = replaced(old, staged, only), instance_files.last_good(name)
        # The last good files stay those of one set.
        is_good = good is not None and has_same_core(name, good, new)
        with going_back([name], prove=False):
            guard([name])
            switch_back.begin({name: old})
            if unit_of(name) in only and instance_files.damage(name, new) is None:
                transaction.write(name, new, new if is_good or good is None else None)
            else:
                transaction.write(name, new, replaced(good, staged, only) if good and is_good else None)
            if timer_of(name) in only:
                unwatch(name)
            transaction.replace(name, new)
            remove_drop_ins(name, new)
            systemctl("daemon-reload")
            if unit_of(name) in only:
                starting.enable(name)
                starting.open_door(name)
                if good is None and (problem := prove(name)):
                    raise Failed(f"{unit_of(name)} runs, but does not pass the gate: {problem}")
            transaction.pass_gate([name])
        finish([name])
    finally:
        shutil.rmtree(f"{common.STAGED}/{name}", ignore_errors=True)


def prove(name: str) -> Optional[str]:
    """Run the gate on the server as it runs; one that starts on demand is started for it."""
    return starting.start_on_demand(name) if common.is_on_demand(name) else starting.gate(name)


def has_same_core(name: str, one: Files, other: Files) -> bool:
    """Whether two sets of files have a unit that differs at most in what a running server does not depend on."""
    cores = [common.core_of_unit(files.get(unit_of(name), b"").decode("utf-8", "replace")) for files in (one, other)]
    return bool(cores[0]) and cores[0] == cores[1]


def remove_drop_ins(name: str, files: Files) -> None:
    """Remove the drop-ins of the instance's units, but for those of its server that plan.json allows."""
    allowed = (instance_files.plan(files) or {}).get("allowed_drop_ins") or []
    for unit in instance_files.units_of(name):
        for path in common.drop_ins(unit):
            if unit != unit_of(name) or os.path.basename(path) not in allowed:
                transaction.remove(path)
                print(f"removed the drop-in {path}", flush=True)


def replaced(files: Files, by: Files, only: Sequence[str]) -> Files:
    """These files with `only` those replaced; of them, those that `by` lacks are left out."""
    kept = {file: data for file, data in files.items() if file not in only}
    return {**kept, **{file: by[file] for file in only if file in by}}


def keep_hardening(name: str, old: Files) -> None:
    """Loosen the staged unit as the installed one is: they differ in nothing that the preflight tries."""
    import preflight

    unit = old.get(unit_of(name), b"").decode("utf-8", "replace")
    preflight.keep(f"{common.STAGED}/{name}", name, instance_files.record(name), unit)


def refresh(name: str) -> None:
    staged = staged_files(name)
    # A credential that the unit loads and that was not sent stays as it is.
    stay = [one for one in instance_files.credentials(name, staged.get(unit_of(name), b"")) if one not in staged]
    replace_quietly(name, [file for file in instance_files.places(name) if file not in stay])


def watch(name: str) -> None:
    replace_quietly(name, liveness_units(name))


def remove(name: str, after: Sequence[str] = (), drain: float = 0.0, overdue: str = CUT) -> None:
    for one in after:
        transaction.forget_before(one)
    if len(transaction.group_of(name)) > 1:  # a switch of several that was cut off
        settle(name)
    unwatch(name)
    unit = f"{common.UNITS}/{unit_of(name)}"
    if drain or starting.doors([name]):
        try:
            starting.stop([name], Draining([name], drain, overdue))
        except Overdue:
            starting.start_watching(name, check=False)
            raise
    is_sound = os.path.isfile(unit) and not starting.is_empty(unit)
    systemctl("disable", "--quiet", "--now", unit_of(name), check=is_sound)
    transaction.forget(name)
    transaction.remove_files([
        *(f"{common.UNITS}/{unit}" for unit in instance_files.units_of(name) if unit != unit_of(name)),
        common.gate_record(name), common.liveness_record(name), f"{common.RUN}/liveness-{name}.json",
        f"{common.RUN}/room-{name}",
    ])  # fmt: skip
    for folder in (f"{common.INSTANCES}/{name}", f"{common.STAGED}/{name}", f"{common.CACHES}/llama-server-{name}"):
        transaction.remove_folder(folder)
    transaction.remove_files([unit])  # last: while it is there, the next run sees what is left to do
    common.sync(common.UNITS)
    systemctl("daemon-reload")


def stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what follows leads back
    raise Stopped


@contextlib.contextmanager
def locked(names: Sequence[str], wait: bool) -> Iterator[bool]:
    """Hold the locks of these instances and of those that were switched together with them; False, without them, where
    one is held and we do not `wait`. All take them in one order."""
    with contextlib.ExitStack() as stack:
        for name in sorted({one for each in names for one in transaction.group_of(each)}):
            lock = stack.enter_context(open(f"{common.RUN}/switch-{name}.lock", "w"))
            try:
                # A job of a run that was killed may still be at work. Whoever holds the lock ends its own switch.
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
        yield True


def parsed(argv: List[str]) -> argparse.Namespace:
    def names(text: str) -> List[str]:
        return text.split(",") if text else []

    parser = argparse.ArgumentParser(prog="switch.py", description=__doc__)
    parser.add_argument("verb", choices=["install", "undo", "refresh", "watch", "remove", "recover"])
    parser.add_argument("names", type=names)
    for option in ("--leaving", "--after"):
        parser.add_argument(option, type=names, default=[])
    parser.add_argument("--drain", type=float, default=0.0)
    parser.add_argument("--overdue", choices=[CUT, WAIT, STOP], default=CUT)
    for option in ("--keep", "--wait"):
        parser.add_argument(option, action="store_true")
    return parser.parse_args(argv)


def act(asked: argparse.Namespace) -> None:
    if asked.verb == "install":
        install(asked.names, asked.leaving, asked.keep, asked.drain, overdue=asked.overdue)
    elif asked.verb == "undo":
        undo(asked.names, asked.leaving, asked.drain, asked.overdue)
    elif asked.verb == "remove":
        remove(asked.names[0], asked.after, asked.drain, asked.overdue)
    elif asked.verb == "recover":
        for name in asked.names:
            recover(name)
    else:
        {"refresh": refresh, "watch": watch}[asked.verb](asked.names[0])


def main(argv: List[str]) -> int:
    asked = parsed(argv)
    signal.signal(signal.SIGTERM, stop)
    os.makedirs(common.RUN, exist_ok=True)
    try:
        with locked([*asked.names, *asked.leaving], wait=asked.verb != "recover" or asked.wait) as held:
            if held:
                act(asked)
    except (Failed, Overdue, transaction.Lost, OSError, subprocess.SubprocessError, Stopped) as error:
        print(f"error: {error or 'the switch was stopped'}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
