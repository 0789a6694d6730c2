"""Report what the instances of this host use, and the result of their last gate.

Contract: no arguments; prints one JSON object, by instance name {"rss_bytes", "cgroup_bytes": int | null,
"gpu_bytes": {GPU's UUID: int | null} | text where NVML does not tell, "since": text, "gate": the last gate's record
(`gate.py`) | null, "liveness": the record of the liveness check's restarts (`liveness.py`) | null}. Changes nothing.
Python 3.8, standard library, psutil and pynvml; its siblings common.py, gate.py and survey.py lie in the same folder.
"""

from __future__ import annotations

import json
from typing import Any

from common import GATES, liveness_record, plan_path, read_json, unit_of


def status() -> dict[str, dict[str, Any]]:
    """Every installed instance that we made."""
    import survey

    return {name: instance(name) for name in survey.names()}


def instance(name: str) -> dict[str, Any]:
    import survey

    shown = survey.show(unit_of(name), "MainPID", "MemoryCurrent", "ActiveEnterTimestamp")
    pid = int(shown.get("MainPID") or 0)
    gate = read_json(plan_path(name)).get("gate")
    planned = isinstance(gate, dict) and bool(gate.get("gpus"))
    return {
        "rss_bytes": rss(pid) if pid else None,
        # Where the kernel does not count it, systemd says "[not set]" or the largest number there is.
        "cgroup_bytes": number(shown.get("MemoryCurrent")),
        "gpu_bytes": gpu_bytes(pid) if planned and pid else {},
        "since": shown.get("ActiveEnterTimestamp") or "",
        "gate": read_json(f"{GATES}/{name}.json") or None,
        "liveness": read_json(liveness_record(name)) or None,
    }


def number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() and int(text) < 2**63 else None


def rss(pid: int) -> int | None:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has ended meanwhile
        return None


def gpu_bytes(pid: int) -> dict[str, int | None] | str:
    import gate

    held = gate.held_by(pid)
    return held if isinstance(held, str) else {uuid: size for uuid, size in held.items() if size != 0}


if __name__ == "__main__":
    print(json.dumps(status()))
