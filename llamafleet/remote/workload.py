"""Report what the servers of this host were asked for: how long prompts, contexts and replies were, and how many
requests were served at once. Read from the journal of each unit.

Contract: `workload.py SINCE NAME...`: SINCE in journalctl's words ("7 days ago"), NAMEs of instances. Prints one JSON
object, by instance {"since", "until": unix times of the first and the last line of llama-server that was read, or null,
"requests": those that were answered, "cut_short": those that ended without an answer, "checks": requests that are as
small as those of the liveness check, in no figure, "prompt_tokens", "reply_tokens", "live_tokens", "concurrency": each
{"mean", "p10", "p50", "p90", "p99", "max"}, or null where nothing was asked, "counters": what the running server has
counted since its start, {"prompt_tokens", "cached_tokens", "reply_tokens"}, or null where it does not say}. No text of
a request is read or printed: llama-server logs none at the level of its unit, and is not asked for its slots, which may
hold some. A failure prints a line that begins with `error: `; exit 1. Changes nothing, and wakes and starts nothing.
Python 3.8, standard library; common.py, gate_server.py, gate_spec.py and liveness_server.py lie beside it.

What the lines say (tools/server/server-context.cpp): `launch_slot_with_task` begins a request, `print_timings` has the
prompt's tokens without those that were in the cache, and the written ones, `release` has all tokens in the slot. A
server of embeddings or scores has no timings: there all tokens are the prompt's.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from common import plan_path, read_json, unit_of
from gate_server import trust
from gate_spec import Unreadable, read_spec
from liveness_server import NoAnswer, Refused, get

# Time, process and message, as journalctl prints them; a part of llama-server's message.
LINE = re.compile(r"(\d{1,12}\.\d+) \S+ \S+\[(\d{1,10})\]: (.*)")
SLOT = re.compile(r"slot +(\w+): id +\d+ \| task (\d{1,18}) \|(.*)")
READ = re.compile(r"prompt eval time = .*?/ +(\d{1,9}) tokens")
WRITTEN = re.compile(r"eval time = .*?/ +(\d{1,9}) (?:tokens|runs)")
HELD = re.compile(r"stop processing: n_(?:tokens|past) = (\d{1,9})")
CHECK_TOKENS = 4  # in a slot, at most, after a request of the liveness check (liveness_server.py, SMALLEST)
QUANTILES = (("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
# Of /metrics (server_task_result_metrics::to_prometheus). Numbers have six digits, and an exponent from a million on.
COUNTERS = {"prompt_tokens": "prompt_tokens_total", "cached_tokens": "prompt_tokens_cached_total",
            "reply_tokens": "tokens_predicted_total"}  # fmt: skip
COUNTED = re.compile(r"^llamacpp:(\w{1,60}) ([\d.e+]{1,30})$", re.MULTILINE)
LINE_CHARACTERS = 1000  # of a line, at most, that is looked at

Weighted = List[Tuple[float, float]]  # values with their weights


class Request:
    """One request: when it began and ended, tokens read and written, and those in its slot at the end."""

    __slots__ = ("began", "ended", "held", "read", "written")

    def __init__(self, began: Optional[float]) -> None:
        self.began = began
        self.ended = 0.0
        self.read: Optional[int] = None
        self.written: Optional[int] = None
        self.held = 0


class Journal:
    """The requests of a unit, line after line. A task's number counts within its process."""

    def __init__(self) -> None:
        self.done: List[Request] = []
        self.first: Optional[float] = None
        self.last: Optional[float] = None
        self._open: Dict[Tuple[str, str], Request] = {}
        self._timed: Dict[str, Tuple[str, str]] = {}  # by process, the task of its last timings

    def add(self, line: str) -> None:
        if not (match := LINE.match(line[:LINE_CHARACTERS])):
            return
        time, process, message = float(match[1]), match[2], match[3]
        slot = SLOT.search(message)
        if slot is None:  # some builds print timings without the slot before each line
            if process in self._timed and self._timed[process] in self._open:
                self._timings(self._open[self._timed[process]], message)
            return
        self.first, self.last = self.first or time, time
        function, task, text = slot[1], (process, slot[2]), slot[3]
        if function.startswith("launch_slot"):
            self._open[task] = Request(time)
        elif function.startswith("print_timing"):
            self._timed[process] = task
            self._timings(self._open.setdefault(task, Request(None)), text)
        elif held := HELD.search(text):
            request = self._open.pop(task, None) or Request(None)
            request.ended, request.held = time, int(held[1])
            self.done.append(request)

    def _timings(self, request: Request, text: str) -> None:
        if read := READ.search(text):
            request.read = int(read[1])
        elif written := WRITTEN.search(text):
            request.written = int(written[1])


def of_journal(lines: Iterable[str], writes: bool = True) -> Dict[str, Any]:
    """What the contract says of an instance. `writes`: it serves replies, no embeddings or scores."""
    journal = Journal()
    for line in lines:
        journal.add(line)
    users = [one for one in journal.done if one.held > CHECK_TOKENS]
    checks = len(journal.done) - len(users)
    if not writes:
        for one in users:
            one.read, one.written = one.held, 0
    answered = [one for one in users if one.read is not None and one.written is not None]
    read, written = [float(one.read or 0) for one in answered], [float(one.written or 0) for one in answered]
    # While a reply is written its slot has half of it on average; long replies are that for longer.
    live = [(one.held - (one.written or 0) / 2, float(one.written or 1)) for one in answered]
    return {
        "since": journal.first, "until": journal.last, "requests": len(answered), "checks": checks,
        "cut_short": len(users) - len(answered), "prompt_tokens": figures([(one, 1.0) for one in read]),
        "reply_tokens": figures([(one, 1.0) for one in written]), "live_tokens": figures(live),
        "concurrency": figures(at_once([(one.began, one.ended) for one in users if one.began is not None])),
    }  # fmt: skip


def at_once(spans: Sequence[Tuple[float, float]]) -> Weighted:
    """Numbers of requests that are served at the same time, each with its seconds; without the time of none."""
    events = sorted([(began, 1) for began, _ in spans] + [(ended, -1) for _, ended in spans])
    seconds: Dict[int, float] = {}
    count, since = 0, 0.0
    for time, change in events:
        if count > 0:
            seconds[count] = seconds.get(count, 0.0) + time - since
        count, since = count + change, time
    return [(float(number), weight) for number, weight in seconds.items() if weight > 0]


def figures(values: Weighted) -> Optional[Dict[str, float]]:
    """The mean and the quantiles of weighted values; None of nothing."""
    total = sum(weight for _, weight in values)
    if total <= 0:
        return None
    ranked, found, passed = sorted(values), {}, 0.0
    found["mean"] = sum(value * weight for value, weight in values) / total
    at = iter(ranked)
    value = ranked[0][0]
    for name, share in QUANTILES:
        while passed < share * total * (1 - 1e-9):
            value, weight = next(at)
            passed += weight
        found[name] = value
    return {name: round(number, 1) for name, number in found.items()}


def lines_of(unit: str, since: str) -> Iterator[str]:
    """The unit's lines since then, with time and process. Raises OSError with what journalctl says."""
    command = ["journalctl", "--quiet", "--no-pager", "--output=short-unix", f"--unit={unit}", f"--since={since}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reading:
        assert reading.stdout is not None and reading.stderr is not None  # pipes were asked for
        for line in reading.stdout:
            yield line.decode("utf-8", "replace").rstrip("\n")
        said = reading.stderr.read(4096).decode("utf-8", "replace").strip()
    if reading.returncode:
        raise OSError(f"journalctl: {said or reading.returncode}")


def counters(name: str) -> Optional[Dict[str, float]]:
    """What the running server has counted since its start; None where it does not say."""
    try:
        spec = read_spec(plan_path(name))
        trust(spec)
        told = dict(COUNTED.findall(get(spec, "/metrics", str)))
        found = {key: float(told[counter]) for key, counter in COUNTERS.items()}
    except (Unreadable, NoAnswer, Refused, OSError, ValueError, KeyError):
        return None
    return found if all(math.isfinite(value) for value in found.values()) else None


def is_chat(name: str) -> bool:
    gate = read_json(plan_path(name)).get("gate")
    return not isinstance(gate, dict) or gate.get("serves", "chat") == "chat"


def main(argv: List[str]) -> int:
    if not argv:
        print("error: usage: workload.py SINCE NAME...", file=sys.stderr)
        return 1
    try:
        found = {
            name: {**of_journal(lines_of(unit_of(name), argv[0]), is_chat(name)), "counters": counters(name)}
            for name in argv[1:]
        }
        print(json.dumps(found))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
