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
trial under way is not recorded; "stops": whether the service may be stopped where it runs (false); "window":
"HH:MM-HH:MM" by the host's clock, in which it may be stopped (null: always); "drain_seconds": what its running replies
get to end (0); "stays_stopped_seconds": after the batch the service is put back when this time is over (0: at once), so
that the next batch or `end` comes first; "idle_seconds": the longest wait for an idle host before a trial (30).

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

Prints a line for each trial, and the reason of an end after `error: `. Exit 0: done, also where trials failed, the
budget is spent or another run came; 1: nothing can be measured; 3: the service runs, and "stops" is false; 4: it runs,
and no trial ends inside the window from now on; 5: another run holds the host already, or the instance is being
switched. What was measured stays in each case, and the service that was stopped runs again, whatever happens to this
program: tune_service.py. Root, systemd, the standard library, Python 3.8; common.py and the modules that this imports
lie beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any, Dict, List, Optional, Sequence

import gate_server
import tune_measure
import tune_trials
from common import read_json, show, transient_unit, unit_words
from confined import forget
from hardening_trial import NOT_TRIED, Started, free_port, how_it_ended

ADDRESS = "127.0.0.1"
POLL_SECONDS = 0.1
STOP_SECONDS = 10
# Of one server's life: the first measurement warms up and is not counted.
MOST_REPETITIONS = 3
NO_FIGURES: Dict[str, Any] = {
    "seconds": None, "prompt_tokens_per_s": None, "decode_tokens_per_s": None, "drafted": 0, "accepted": 0,
    "spread": None, "load_seconds": None, "peak_bytes": None,
}  # fmt: skip


def main(argv: List[str]) -> int:
    if argv[:1] == ["read"] and len(argv) == 3:
        print(json.dumps(tune_trials.read(argv[1], argv[2])))
        return 0
    if argv[:1] != ["run"] or len(argv) != 2:
        print("error: usage: tune.py run SPEC.json | tune.py read NAME KEY", file=sys.stderr)
        return 1
    spec = read_json(argv[1])
    if spec.get("schema") != tune_trials.SCHEMA:
        print(f"error: {argv[1]} is no spec of a tune of the form {tune_trials.SCHEMA}: run again", file=sys.stderr)
        return 1
    run(spec)
    return 0


def run(spec: Dict[str, Any]) -> None:
    """The trials that are not measured yet, as far as the budget goes."""
    name, key = spec["instance"], spec["key"]
    tune_trials.begin(name, key)
    for trial in spec["trials"]:
        done = tune_trials.read(name, key)
        if any(one.get("id") == trial["id"] for one in done):
            continue
        took = [float(one["took_seconds"]) for one in done]
        if sum(took) + (statistics.median(took) if took else 0.0) > spec["budget_seconds"]:
            print(f"the time is over: {len(done)} trials took {sum(took):.0f} s", flush=True)
            return
        found = measured(spec, trial)
        tune_trials.append(name, found)
        print(told(found), flush=True)


def told(found: Dict[str, Any]) -> str:
    """A trial as a line of the log."""
    if found["error"]:
        return f"trial {found['id']}: {found['label']}: lost: {found['error']}"
    return (
        f"trial {found['id']}: {found['label']}: {found['seconds']:.2f} s for the workload, "
        f"{found['decode_tokens_per_s']:.1f} tokens/s written, {found['prompt_tokens_per_s']:.0f} read"
    )


def measured(spec: Dict[str, Any], trial: Dict[str, Any]) -> Dict[str, Any]:
    """One trial, from the start of the server to its end."""
    about = {key: trial[key] for key in ("id", "candidate", "label", "stage")}
    began, load = time.time(), os.getloadavg()[0]
    figures, error = dict(NO_FIGURES), None
    try:
        figures.update(with_server(spec, trial))
    except tune_measure.Failed as failed:
        error = str(failed)[:400]
    return {**about, "error": error, **figures, "load_average": load, "started": began,
            "took_seconds": time.time() - began}  # fmt: skip


def with_server(spec: Dict[str, Any], trial: Dict[str, Any]) -> Dict[str, Any]:
    """Start the server, measure, stop it. Raises tune_measure.Failed."""
    unit, port = transient_unit("tune", spec["instance"]), free_port(ADDRESS)
    over = time.monotonic() + spec["trial_seconds"]
    forget(unit)  # of a job that was killed
    command = [word.replace("{port}", str(port)) for word in trial["argv"]]
    try:
        with Started(unit, starting(unit, command, spec["directives"], trial["environment"], port)) as process:
            url = f"http://{ADDRESS}:{port}"
            load_seconds = ready(process, url, over)
            try:
                figures = repeated(url, workload_of(spec), text_of(spec), over)
            except tune_measure.Failed as error:
                raise tune_measure.Failed(ended(process) or str(error)) from error
            peak = show(unit, "MemoryPeak").get("MemoryPeak", "")
            return {**figures, "load_seconds": load_seconds, "peak_bytes": int(peak) if peak.isdigit() else None}
    finally:
        forget(unit)


def starting(
    unit: str, command: Sequence[str], directives: Sequence[str], environment: Dict[str, str], port: int
) -> List[str]:
    """The words that start the server in a unit with the service's directives."""
    kept = [line for line in directives if line.partition("=")[0] not in NOT_TRIED]
    kept = [f"SocketBindAllow=tcp:{port}" if line.startswith("SocketBindAllow=") else line for line in kept]
    return [
        "systemd-run", "--collect", "--pipe", "--wait", f"--unit={unit}", "--property=Type=exec",
        f"--property=TimeoutStopSec={STOP_SECONDS}", *(f"--property={line}" for line in kept),
        *(f"--setenv={key}={value}" for key, value in environment.items()), "--", *unit_words(command),
    ]  # fmt: skip


def ready(process: Started, url: str, over: float) -> float:
    """Seconds until the server has loaded its model. Raises Failed where it ends, or takes too long."""
    began = time.monotonic()
    while time.monotonic() < over:
        if why := ended(process):
            raise tune_measure.Failed(why)
        status, _ = gate_server.ask(url, "/health", seconds=5)
        if status == 200:
            return time.monotonic() - began
        time.sleep(POLL_SECONDS)
    raise tune_measure.Failed(f"it did not load its model within {time.monotonic() - began:.0f} s")


def ended(process: Started) -> Optional[str]:
    """How the server ended; None while it runs."""
    code = process.wait(0)
    return None if code is None else f"the server ended: {how_it_ended(process.said(), code)}"


def repeated(url: str, workload: tune_measure.Workload, text: str, over: float) -> Dict[str, Any]:
    """The median of several measurements, after one that warms up; one that is cut short by the time does not count."""
    found: List[Dict[str, Any]] = []
    for turn in range(MOST_REPETITIONS + 1):
        began = time.monotonic()
        figures = tune_measure.measure(url, workload, text, max(1.0, over - began), turn)
        if turn:
            found.append(figures)
        if found and time.monotonic() + (time.monotonic() - began) > over:
            break
    found.sort(key=lambda one: float(one["seconds"]))
    middle = found[(len(found) - 1) // 2]
    return {**middle, "spread": found[-1]["seconds"] / found[0]["seconds"]}


def workload_of(spec: Dict[str, Any]) -> tune_measure.Workload:
    return tune_measure.Workload(**spec["workload"])


def text_of(spec: Dict[str, Any]) -> str:
    if not spec["text"]:
        return ""
    with open(spec["text"], encoding="utf-8") as file:
        return file.read()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
