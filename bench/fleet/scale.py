"""What a run over many hosts costs the operator's machine: processor time and memory for 10, 100 and 1000 hosts.

    python -m bench.fleet.scale [HOSTS ...]        writes bench/results/fleet_scale.csv

The hosts are simulated: one process beside the controller answers by SSH for all of them, from memory, as hosts do on
which everything is as planned. So no work of hosts is in the figures, and all of pyinfra, paramiko and this project is.
`connect` is a deploy without any operation: the floor, which is pyinfra's and paramiko's.
"""

from __future__ import annotations

import csv
import json
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import paramiko

from bench.one_run import ROOT, one_run

RESULTS = ROOT / "bench" / "results" / "fleet_scale.csv"
COUNTS = (10, 100, 1000)
COMMIT = "c" * 40
CONTROL = "control"  # in the fleet's folder: the socket that tells what the hosts were asked
# Machines with the model that each serves, in turn.
KINDS = (
    ("rtx4090,ram=64GB,cores=8", "Qwen3-8B"),
    ("cpu,ram=64GB,cores=8", "Qwen3-0.6B"),
    ("2xrtx3090,ram=128GB,cores=16", "Qwen3-32B"),
    ("rtx4090,ram=128GB,cores=10", "gpt-oss-120b"),
    ("8xh100,ram=1024GB,cores=96", "GLM-4.5-Air"),
)
PYINFRA = str(Path(sys.executable).with_name("pyinfra"))
# Of each kind of run: the words before and after the inventory.
RUNS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "connect": ([PYINFRA, "-y"], ["bench/fleet/nothing.py"]),
    "deploy": ([PYINFRA, "-y"], ["deploy.py"]),
    "status": ([sys.executable, "-m", "tasks.status"], []),
    "rollout --dry": ([sys.executable, "-m", "tasks.rollout"], ["--dry"]),
}


def address(number: int) -> str:
    """The loopback address of a host."""
    return f"127.20.{number // 250}.{number % 250 + 1}"


def settings(number: int, hub: str, files: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a host, beside those of its connection."""
    layout = KINDS[number % len(KINDS)][1]
    model = {"name": layout.lower(), "source": f"hf:bench/{layout}/{files[layout]}", "port": 8080,
             "listen": address(number)}  # fmt: skip
    return {"hub_endpoint": hub, "llama_cpp_ref": COMMIT, "models": [model]}


@contextmanager
def fleet(count: int, folder: Path) -> Iterator[Path]:
    """So many hosts, served by a process of their own, and their inventory; `asked` has what was run on them."""
    process = Popen([sys.executable, "-m", "bench.fleet.serve", str(count), str(folder)], cwd=ROOT, stdin=DEVNULL)
    try:
        while not (folder / CONTROL).exists():
            if process.poll() is not None:
                raise SystemExit("the simulated hosts could not be started")
            time.sleep(0.1)
        yield folder / "inventory.py"
    finally:
        process.terminate()
        process.wait()


def asked(folder: Path) -> Counter[str]:
    """How often each program was run on the hosts until now."""
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(str(folder / CONTROL))
        with control.makefile() as answer:
            return Counter(json.load(answer))


def write_inventory(folder: Path, data: Sequence[Mapping[str, Any]], ports: Sequence[int]) -> None:
    """The hosts' inventory, `inventory.py` of the folder."""
    connection = {"ssh_user": "root", "ssh_known_hosts_file": str(folder / "known_hosts"),
                  "ssh_strict_host_key_checking": "yes", "ssh_key": str(folder / "key")}  # fmt: skip
    paramiko.ECDSAKey.generate().write_private_key_file(str(folder / "key"))
    entries = [
        (f"host{n}", {**connection, "ssh_hostname": address(n), "ssh_port": port, **one})
        for n, (one, port) in enumerate(zip(data, ports, strict=True))
    ]
    (folder / "inventory.py").write_text(f"fleet = {entries!r}\n")


def run(kind: str, inventory: Path) -> tuple[dict[str, float], str]:
    """One run: seconds by the clock and of the processor, peak memory in MiB; and what was printed."""
    before, after = RUNS[kind]
    cost = one_run(kind, [*before, str(inventory), *after])
    figures = {"wall_s": cost.wall_seconds, "cpu_s": cost.cpu_seconds, "rss_mib": cost.peak_bytes / 2**20}
    return {key: round(value, 2) for key, value in figures.items()}, cost.text


def measure(count: int) -> Iterator[dict[str, object]]:
    """A row for each kind of run. Raises SystemExit where a run finds that something differs."""
    with tempfile.TemporaryDirectory() as made, fleet(count, folder := Path(made)) as inventory:
        for kind in RUNS:
            before = asked(folder)
            figures, text = run(kind, inventory)
            if kind == "deploy" and text.count("nothing to do: everything is as planned") != count:
                raise SystemExit(f"a run over {count} hosts has something to do:\n{text[-4000:]}")
            commands = sum((asked(folder) - before).values()) / count
            yield {"hosts": count, "run": kind, **figures, "cpu_ms_per_host": round(1000 * figures["cpu_s"] / count, 1),
                   "commands_per_host": commands}  # fmt: skip


def main(counts: Sequence[int]) -> None:
    rows = []
    for count in counts or COUNTS:
        for row in measure(count):
            print(row, flush=True)
            rows.append(row)
    if not counts:
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
