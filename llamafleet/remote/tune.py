"""Measure llama-server on this host with several command lines, each in the sandbox of the service that it is for.

Contract: `tune.py run SPEC.json` runs the trials that the spec lists and that are not measured yet, one after another,
and appends each to the tune's file (tune_trials.py); `tune.py read NAME KEY` prints the trials of the tune as a JSON
list; `tune.py end NAME` puts the service of the instance back, where a tune has stopped it.

The spec: {"schema": 1, "instance": NAME, "key": 16 hexadecimal digits of what is measured on, "trials": [{"id",
"candidate", "label", "stage", "argv", "environment", "directives": those of this trial, where they differ}],
"directives": lines of [Service] of the service's unit, "workload": {"prompt", "reply", "depth", "concurrency"}, "text":
path of a text of prompts, or null, "trial_seconds": the longest that one may take, "budget_seconds": of all trials of
the tune together}. It may have: "serves": "text" (default), "embedding" or "reranking"; "host": the loopback address
that a trial listens at (127.0.0.1); "run": of the host's lock: where another run takes that, the batch ends, and the
trial under way is not recorded, but for one that joins the batch and so has written the spec anew; "stops": whether the
service may be stopped where it runs (false); "window": "HH:MM-HH:MM" by the host's clock, in which it may be stopped
(null: always); "drain_seconds": what its running replies get to end (0); "stays_stopped_seconds": after the batch the
service is put back when this time is over (0: at once), so that the next batch or `end` comes first; "idle_seconds":
the longest wait for an idle host before a trial (30).

`argv` is llama-server and its arguments, as llamafleet.service.trial.measured() makes them of a service's: {port} is
replaced by a free port, {host} by "host", {socket} by the path of a socket in the unit's own RuntimeDirectory=, and
{credentials} by the folder of the files that its LoadCredential= names. Keys and certificates are left out.

The text: user's messages, divided by lines that are a % alone. Each message is sent whole, through the model's chat
template, in place of the workload's prompt; the reply may end early. User N of those that come at once sends message N;
those for whom there is none send words by chance, as all do without a text: then prompts and replies have the
workload's tokens exactly.

A trial: {"id", "candidate", "label", "stage", "error": text | null, "seconds": of the workload as the user feels it who
waits longest, or null, "prompt_tokens_per_s", "decode_tokens_per_s": of all users together, or null, "inputs_per_s": of
embeddings and scores, else null, "prompt_tokens", "reply_tokens": of one request as measured, "reread_tokens": of the
depth that the server had not kept, "drafted", "accepted", "spread": of the repetitions, a factor, "load_seconds",
"peak_bytes", "joules": of one workload, or null, "state": {"waited_seconds", "busy_cpus" before the trial, "is_idle",
"celsius", "mhz", "throttled": text | null, "gpus": {UUID: {"celsius", "mhz", "throttled"}}}, "load_average", "started":
unix time, "took_seconds"}. Any figure may be null. A server that crashes, hangs or runs out of memory is a trial with
an error, which names it; no trial begins that would probably end after the budget.

Prints a line for each trial, and the reason of an end after `error: `. Exit 0: done, also where trials failed or the
budget is spent; 1: nothing can be measured; 3: the service runs, and "stops" is false; 4: it runs, and no trial ends
inside the window from now on; 5: another run holds the host or takes it, the instance is being switched, or somebody
starts or stops the service meanwhile. What was measured stays in each case, and the service that was stopped runs
again, whatever happens to this program: tune_service.py. Root, systemd, the standard library, Python 3.8; common.py and
the modules that this imports lie beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Dict, Iterator, List

import common
import room
import tune_measure
import tune_prompts
import tune_server
import tune_service
import tune_state
import tune_trials
import tune_vectors
import tune_watch
from common import read_json
from tune_prompts import Failed
from tune_service import Aside, Refused

# Of one server's life: the first measurement warms up and is not counted. Of a long one fewer are enough.
MOST_REPETITIONS, LONG_SECONDS = 3, 20.0
IDLE_SECONDS = 30.0
IDLE_SHARE = 0.1  # of the budget that may be waited for an idle host
TEXT_BYTES = 1 << 20
NO_FIGURES: Dict[str, Any] = {
    "seconds": None, "prompt_tokens_per_s": None, "decode_tokens_per_s": None, "inputs_per_s": None,
    "prompt_tokens": None, "reply_tokens": None, "reread_tokens": None, "drafted": 0, "accepted": 0, "spread": None,
    "load_seconds": None, "peak_bytes": None, "joules": None,
}  # fmt: skip

Turn = Callable[[float, int], Dict[str, Any]]  # measures once, within these seconds: the turn's number is the other


class Stopped(BaseException):
    """The job was told to stop."""


def main(argv: List[str]) -> int:
    if argv[:1] == ["read"] and len(argv) == 3:
        print(json.dumps(tune_trials.read(argv[1], argv[2])))
        return tune_service.DONE
    verbs = {"run": run_file, "end": tune_service.end, "guard": tune_service.guard}
    if len(argv) != 2 or argv[0] not in verbs:
        print("error: usage: tune.py run SPEC.json | read NAME KEY | end NAME", file=sys.stderr)
        return tune_service.FAILED
    if argv[0] == "run":
        signal.signal(signal.SIGTERM, stop)
    try:
        return verbs[argv[0]](argv[1])
    except Refused as error:
        code, why = error.code, str(error)
    except (Failed, OSError, ValueError, subprocess.SubprocessError, Stopped) as error:
        code, why = tune_service.FAILED, str(error) or "the tune was stopped"
    print(f"error: {why}", file=sys.stderr, flush=True)
    return code


def stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what follows puts the service back
    raise Stopped


def run_file(path: str) -> int:
    spec = read_json(path)
    if spec.get("schema") != tune_trials.SCHEMA:
        raise Failed(f"{path} is no spec of a tune of the form {tune_trials.SCHEMA}: run again")
    return run({**spec, "path": path})


def run(spec: Dict[str, Any]) -> int:
    """The trials that are not measured yet, as far as the budget goes. Raises Refused and Failed."""
    name, key = spec["instance"], spec["key"]
    texts = texts_of(spec)
    tune_trials.begin(name, key)
    done = tune_trials.read(name, key)
    ids = {one.get("id") for one in done}
    missing = [trial for trial in spec["trials"] if trial["id"] not in ids]
    if not missing or is_spent(spec, done):
        return tune_service.DONE
    with Aside(name, spec) as aside:
        for number, trial in enumerate(missing):
            if number and (is_spent(spec, done) or is_late(aside)):
                break
            aside.renew()
            found = measured(spec, trial, texts, aside, idle_seconds(spec, done))
            tune_trials.append(name, found)
            done.append(found)
            aside.start_seconds = max(aside.start_seconds, found["load_seconds"] or 0.0)
            print(told(found), flush=True)
    return tune_service.DONE


def is_spent(spec: Dict[str, Any], done: List[Dict[str, Any]]) -> bool:
    """Whether another trial would probably end after the budget."""
    took = [float(one["took_seconds"]) for one in done]
    spent = sum(took) + (statistics.median(took) if took else 0.0) > float(spec["budget_seconds"])
    if spent:
        print(f"the time is over: {len(done)} trials took {sum(took):.0f} s", flush=True)
    return spent


def is_late(aside: Aside) -> bool:
    """Whether another trial might end after the window."""
    if aside.has_time():
        return False
    print(f"the window {aside.window} is over for now", flush=True)
    return True


def idle_seconds(spec: Dict[str, Any], done: List[Dict[str, Any]]) -> float:
    """The longest that may be waited for an idle host before the next trial."""
    states = [one.get("state") or {} for one in done]
    left = IDLE_SHARE * float(spec["budget_seconds"]) - sum(float(one.get("waited_seconds") or 0) for one in states)
    return max(0.0, min(float(spec.get("idle_seconds", IDLE_SECONDS)), left))


def told(found: Dict[str, Any]) -> str:
    """A trial as a line of the log."""
    begin = f"trial {found['id']}: {found['label']}: "
    if found["error"]:
        return begin + f"lost: {found['error']}"
    if found["inputs_per_s"]:
        return begin + f"{found['seconds']:.3f} s for the workload, {found['inputs_per_s']:.1f} inputs/s"
    speeds = ((found["decode_tokens_per_s"], "written"), (found["prompt_tokens_per_s"], "read"))
    words = ", ".join(f"{speed:.1f} tokens/s {how}" for speed, how in speeds if speed)
    return begin + f"{found['seconds']:.2f} s for the workload, {words}"


# --- one trial --------------------------------------------------------------------------------------


def measured(
    spec: Dict[str, Any], trial: Dict[str, Any], texts: List[str], aside: Aside, idle: float
) -> Dict[str, Any]:  # fmt: skip
    """One trial, from the start of the server to its end. Raises Refused where the server has no room, or where
    something else happened to the host, so that the trial is worth nothing."""
    about = {key: trial[key] for key in ("id", "candidate", "label", "stage")}
    began = time.time()
    with room_for(spec["instance"]):
        state = tune_state.wait_until_idle(idle)
        load = os.getloadavg()[0]
        figures, error = dict(NO_FIGURES), None
        with tune_watch.Watch(aside, tune_server.unit_of(spec["instance"])) as watch:
            try:
                figures.update(with_server(spec, trial, texts))
            except Failed as failed:
                error = str(failed)[:400]
    if watch.why:
        raise Refused(tune_service.HELD, watch.why)
    return {**about, "error": error, **figures, "state": {**state, **watch.samples.told()}, "load_average": load,
            "started": began, "took_seconds": time.time() - began}  # fmt: skip


@contextlib.contextmanager
def room_for(name: str) -> Iterator[None]:
    """For an instance on demand stop others that nobody uses, and let none start for the block. Raises Refused."""
    if not common.is_on_demand(name):
        yield
        return
    if why := room.make(name):
        raise Refused(tune_service.HELD, why)
    with room.lock():
        yield


_unknown: List[str] = []  # directives that this systemd does not know


def with_server(spec: Dict[str, Any], trial: Dict[str, Any], texts: List[str]) -> Dict[str, Any]:
    """Start the server, measure, stop it. Raises Failed."""
    over = time.monotonic() + spec["trial_seconds"]
    with tune_server.Server(spec["instance"], spec, trial, _unknown) as server:
        try:
            load_seconds = server.ready(over)
            most = 1 if texts else MOST_REPETITIONS
            figures = repeated(turn_of(spec, server.place.url, texts), over, most)
            return {**figures, "load_seconds": load_seconds, "peak_bytes": server.peak_bytes()}
        except Failed as error:
            ended = server.ended(tune_server.END_SECONDS)
            unknown = server.unknown() if ended else None
            if unknown is None or unknown in _unknown:
                raise Failed(ended or str(error)) from error
            _unknown.append(unknown)
    return with_server(spec, trial, texts)


def turn_of(spec: Dict[str, Any], url: str, texts: List[str]) -> Turn:
    """What measures this server once."""
    workload = tune_measure.Workload(**spec["workload"])
    prompts = tune_prompts.Prompts(url, texts)
    kind = spec.get("serves") or "text"
    if kind == "text":
        return lambda seconds, turn: tune_measure.measure(prompts, workload, seconds, turn)
    vectors = tune_vectors.Vectors(prompts, kind)
    return lambda seconds, turn: vectors.measure(workload, seconds, turn)


def repeated(turn: Turn, over: float, most: int) -> Dict[str, Any]:
    """The median of several measurements, after one that warms up; one that is cut short by the time does not count.
    A text is measured once: a table of n-grams knows the reply from then on."""
    turn(max(1.0, over - time.monotonic()), 0)
    found: List[Dict[str, Any]] = []
    joules = tune_state.Joules()
    first = time.monotonic()
    for number in range(1, most + 1):
        began = time.monotonic()
        found.append(turn(max(1.0, over - began), number))
        now = time.monotonic()
        if now - first > LONG_SECONDS or now + (now - began) > over:
            break
    used = joules.used()
    found.sort(key=lambda one: float(one["seconds"]))
    middle = found[(len(found) - 1) // 2]
    return {**middle, "spread": found[-1]["seconds"] / found[0]["seconds"],
            "joules": None if used is None else used / len(found)}  # fmt: skip


def texts_of(spec: Dict[str, Any]) -> List[str]:
    """The messages that users send; none without a text. Raises Failed where there is nothing in it, OSError."""
    if not spec["text"] or spec.get("serves", "text") != "text":
        return []
    with open(spec["text"], "rb") as file:
        found = tune_prompts.messages(file.read(TEXT_BYTES).decode("utf-8", "replace"))
    if not found:
        raise Failed(f"{spec['text']} has no message: write one, or set tune_prompt_file to None")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
