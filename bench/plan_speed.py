"""Time and bytes read of a plan: every test layout, on machines with none to eight GPUs.

    python -m bench.plan_speed          writes bench/results/plan_speed.csv and plan_reading.csv

Headers are read over HTTP from a Hub on 127.0.0.1, as `llamafleet plan --model hf:...` reads them. The whole command,
a Python process with its imports, is measured in wall time, which includes other work of the machine. Planning alone is
measured in processor time of one core, each time for a header that was not planned before.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llamafleet.cli.arguments import default_data, settings_for
from llamafleet.host import described
from llamafleet.host.machine import Machine
from llamafleet.hub import source as sources
from llamafleet.model.gguf import Header
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan, Refusal
from llamafleet.settings.schema import Settings
from sandbox import models
from sandbox.hub import Hub

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MACHINES = (
    "cpu,ram=128GB,cores=8",
    "rtx3060,ram=64GB,cores=8",
    "rtx4090,ram=128GB,cores=10",
    "rtx4090,rtx3060,ram=128GB,cores=10",
    "4xrtx3090,ram=256GB,cores=16",
    "8xh100,ram=1024GB,cores=96",
    "gb10,cores=20",
)
RUNS = 3


def timed(action: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[list[float], Any]:
    """Milliseconds of each run by `clock`, and the last result."""
    spent = []
    for _ in range(RUNS):
        began = clock()
        result = action()
        spent.append(1000 * (clock() - began))
    return spent, result


def anew(host: Machine, header: Header, settings: Settings) -> tuple[Plan | Refusal, ...]:
    """A plan for a copy of the header: for a header that was planned before, the ledger has cached layouts."""
    return plan_host(host, [(settings.models[0], replace(header))], settings)


def planning(name: str, header: Header) -> Iterator[dict[str, object]]:
    """Planning alone, with the header already read, at the whole trained context and at the default context."""
    trained = header.get("context_length")
    for words in MACHINES:
        host = described.read(words).machine
        for tokens in (None, trained):
            settings = settings_for("/model.gguf", default_data(), {"context_tokens": tokens})
            spent, [answer] = timed(partial(anew, host, header, settings), time.process_time)
            yield {
                "layout": name, "machine": words, "context_tokens": tokens or "", "fits": answer.fits,
                "plan_ms_median": round(statistics.median(spent), 1), "plan_ms_max": round(max(spent), 1),
            }  # fmt: skip


def reading(name: str, path: Path) -> tuple[dict[str, object], Header]:
    """Reading the header alone, and the whole command."""
    with Hub() as hub:
        hub.add("bench/model", path.name, path)
        source = f"hf:bench/model/{path.name}"
        spent, header = timed(lambda: sources.read_header(sources.resolve(source, endpoint=hub.url)))
        requests = hub.settled()
        command = [sys.executable, "-m", "llamafleet.cli", "plan", "--model", source, "--machine", MACHINES[2]]
        command += ["--set", f"hub_endpoint={hub.url}", "--json"]
        whole, done = timed(lambda: subprocess.run(command, cwd=ROOT, capture_output=True))
        if done.returncode not in (0, 3):
            raise SystemExit(done.stderr.decode())
    row = {
        "layout": name, "file_gib": round(path.stat().st_size / 2**30, 2), "requests": len(requests) // RUNS,
        "read_mb": round(sum(request.bytes_sent for request in requests) / RUNS / 1e6, 2),
        "read_ms_median": round(statistics.median(spent), 1), "command_ms_median": round(statistics.median(whole)),
        "command_ms_max": round(max(whole)), "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    return row, header


def write(name: str, rows: list[dict[str, object]]) -> None:
    """Write a CSV file in bench/results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    plans, reads = [], []
    for name in models.PUBLISHED:
        with tempfile.TemporaryDirectory() as folder:
            read, header = reading(name, models.weightless(Path(folder), name))
        reads.append(read)
        plans += planning(name, header)
        slowest = max(row["plan_ms_median"] for row in plans if row["layout"] == name)  # type: ignore[type-var]
        print(f"{name}: {read['read_mb']} MB, command {read['command_ms_median']} ms, plans at most {slowest} ms")
    write("plan_reading.csv", reads)
    write("plan_speed.csv", plans)


if __name__ == "__main__":
    main()
