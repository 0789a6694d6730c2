"""Report what the instances of this host use, and the result of their last gate.

Contract: no arguments; prints one JSON object, by instance name {"rss_bytes", "cgroup_bytes": int | null,
"gpu_bytes": {GPU's UUID: int | null} | text where NVML does not tell, "since": text, "gate": the last gate's record
(`gate.py`) | null, "liveness": the record of the liveness check's restarts (`liveness.py`) | null, "asleep": whether
the server has freed its model's memory until the next request}. Changes nothing, and wakes and starts nothing.
Python 3.8, standard library, psutil and pynvml; its siblings common.py, gate_nvml.py, gate_pace.py, gate_sleep.py,
gate_spec.py, liveness_server.py and survey.py lie beside it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from common import GATES, RUN, invocation, liveness_record, plan_path, read_json, unit_of


def status() -> dict[str, dict[str, Any]]:
    """Every installed instance that we made."""
    import survey

    return {name: instance(name) for name in survey.names()}


def instance(name: str) -> dict[str, Any]:
    import survey

    shown = survey.show(unit_of(name), "MainPID", "MemoryCurrent", "ActiveEnterTimestamp")
    pid = int(shown.get("MainPID") or 0)
    gate = read_json(plan_path(name)).get("gate")
    gate = gate if isinstance(gate, dict) else {}
    planned = gate.get("gpus") if isinstance(gate.get("gpus"), list) else []
    return {
        "rss_bytes": rss(pid) if pid else None,
        # Where the kernel does not count it, systemd says "[not set]" or the largest number there is.
        "cgroup_bytes": number(shown.get("MemoryCurrent")),
        "gpu_bytes": gpu_bytes(pid, unit_of(name), gate) if planned and pid else {},
        "since": shown.get("ActiveEnterTimestamp") or "",
        "gate": of_now(read_json(f"{GATES}/{name}.json")) or None,
        "liveness": read_json(liveness_record(name)) or None,
        "asleep": is_asleep(name) if pid else False,
    }


def of_now(record: dict[str, Any]) -> dict[str, Any]:
    """The gate's record without "slower" where the host no longer runs the driver and the kernel that this is of."""
    if not record.get("slower"):
        return record
    from gate_pace import driver

    again = record.get("pace_again")
    again = again if isinstance(again, dict) else {}
    same = (again.get("kernel"), again.get("driver")) == (os.uname().release, driver())
    return record if same else {**record, "slower": ""}


def is_asleep(name: str) -> bool:
    import gate_sleep
    from gate_spec import Unreadable, read_spec
    from liveness_server import may_sleep

    try:
        spec = read_spec(plan_path(name))
        return may_sleep(spec["argv"]) and gate_sleep.sleeps(spec)
    except (Unreadable, OSError, ValueError):  # what is wrong with it, others say
        return False


def number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() and int(text) < 2**63 else None


def rss(pid: int) -> int | None:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has ended meanwhile
        return None


def gpu_bytes(pid: int, unit: str, gate: dict[str, Any]) -> dict[str, int | None] | str:
    """By UUID what the server holds: by NVML where the backend is CUDA, and where NVML does not tell, as in a
    container, or knows no such GPU, by the server's own log. `gate` is that of plan.json."""
    import gate_nvml

    planned = gate["gpus"]
    if gate.get("backend", "cuda") != "cuda":
        uuids = [gpu["uuid"] for gpu in planned if isinstance(gpu, dict) and isinstance(gpu.get("uuid"), str)]
        return {uuid: by_log(unit, uuid, planned) for uuid in uuids}
    held = gate_nvml.held_by(pid)
    if isinstance(held, str):
        return held
    return {uuid: by_log(unit, uuid, planned) if size is None else size for uuid, size in held.items() if size != 0}


def by_log(unit: str, uuid: str, planned: list[Any]) -> int | None:
    """What the server logged of its buffers on a planned GPU, as the gate kept it; None where it did not."""
    kept = read_json(f"{RUN}/devices-{unit}.json")
    names = [gpu.get("device") for gpu in planned if isinstance(gpu, dict) and gpu.get("uuid") == uuid]
    if not names or kept.get("start") != invocation(unit) or not isinstance(kept.get("devices"), dict):
        return None
    held = kept["devices"].get(names[0])
    return sum(int(size) for size in held.values()) if isinstance(held, dict) else 0


if __name__ == "__main__":
    print(json.dumps(status()))
