"""The cost of a run without changes: wall time and memory of the controller for 1, 10 and 30 hosts.

    python -m bench.converge            as root; writes bench/results/converge.csv

The hosts are sandbox hosts with a real systemd, reached by SSH, and each serves a tiny model. Unlike a real fleet they
share one machine with the controller, so the hosts' own work is included in the figures.
"""

from __future__ import annotations

import csv
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.one_run import ROOT, Cost, one_run
from sandbox import hosts, outside

RESULTS = ROOT / "bench" / "results" / "converge.csv"
COUNTS = (1, 10, 30)
RUNS = 5
# Packages that a release needs at run time: installed once in the hosts' root instead of on each of thirty hosts.
PACKAGES = ["ca-certificates", "curl", "libgomp1"]


def write_inventory(path: Path, up: list[hosts.SandboxHost], running: outside.Outside) -> None:
    entries = []
    for host in up:
        model = {"name": "tiny", "source": running.sources["dense"], "port": 8080, "listen": host.address,
                 "context_tokens": 512, "prompt_cache_mib": 0, "threads": 1}  # fmt: skip
        entries.append((host.name, {
            "ssh_hostname": host.address, "ssh_port": host.port, "ssh_user": "root", "ssh_key": str(host.ssh_key),
            "ssh_known_hosts_file": str(host.known_hosts), "ssh_strict_host_key_checking": "yes",
            **running.settings(), "build_cache": outside.BUILDS_ON_HOST, "models": [model],
        }))  # fmt: skip
    path.write_text(f"sandbox = {entries!r}\n")


def deploy(inventory: Path) -> Cost:
    """One run."""
    return one_run("the run", [str(Path(sys.executable).with_name("pyinfra")), "-y", str(inventory), "deploy.py"])


def measure(count: int, inventory: Path) -> dict[str, object]:
    runs = [deploy(inventory) for _ in range(RUNS)]
    for run in runs:
        if "] Success" in run.text:
            raise SystemExit(f"a run over {count} hosts changed something:\n{run.text[-4000:]}")
    seconds = [run.wall_seconds for run in runs]
    return {
        "hosts": count, "runs": RUNS, "wall_s_min": round(min(seconds), 2),
        "wall_s_median": round(statistics.median(seconds), 2), "wall_s_max": round(max(seconds), 2),
        "controller_rss_mib": max(run.peak_bytes for run in runs) >> 20, "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip


def main() -> None:
    hosts.prepare()
    outside.BUILDS.mkdir(parents=True, exist_ok=True)
    rows = []
    with outside.running() as running, tempfile.TemporaryDirectory() as folder:
        try:
            for count in COUNTS:
                up = hosts.up(count, packages=PACKAGES, binds=[f"{outside.BUILDS}:{outside.BUILDS_ON_HOST}"])
                inventory = Path(folder) / f"{count}.py"
                write_inventory(inventory, up, running)
                began = time.monotonic()
                deploy(inventory)
                print(f"{count} hosts deployed in {time.monotonic() - began:.0f} s", flush=True)
                rows.append(measure(count, inventory))
                print(rows[-1], flush=True)
        finally:
            hosts.down()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
