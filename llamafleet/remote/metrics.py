"""Write what is known of this host's instances to a file that node-exporter reads, for Prometheus.

Contract: `metrics.py [--scraped NAME]... [--gateway PORT]`, run by the timer llamafleet-metrics.timer. Replaces
/run/llamafleet/metrics/llamafleet.prom, in Prometheus' text format: for each instance its state, restarts, drift, gate,
memory, plan, build and certificate, and what a server tells at /metrics that Prometheus itself does not ask: every
server but those NAMEd. With --gateway also what HAProxy tells at that port of 127.0.0.1. Wakes and starts nothing, and
takes no slot: a server on demand is asked at its own socket, while it runs. An instance of which something cannot be
read is counted in llamafleet_metrics_errors, and the reason is on stderr. Exit 0 written, 1 not written.
Root, the standard library, psutil and pynvml, Python 3.8; common.py, gate_server.py, instance_files.py, liveness.py,
metrics_relay.py and status.py beside it.

Keys and texts of users are in no metric.

Decision 26: docs/decisions/0026-watched-by-standard-parts.md.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import statistics
import subprocess
import sys
import time
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import common
import instance_files
from common import gate_record, liveness_record, liveness_units, output_of, plan_path, read_json, unit_of, whole_number
from gate_server import is_alive
from liveness import positive
from metrics_relay import escaped, is_running, of_gateway, of_server, together

FILE = "llamafleet.prom"
CGROUPS = "/sys/fs/cgroup"
STATE = ("ActiveState", "SubState", "MainPID", "MemoryMax", "ControlGroup", "NRestarts", "NeedDaemonReload")

# What each metric is, and its kind.
HELP = {
    "metrics_time_seconds": "When this file was written.",
    "metrics_errors": "Instances of which something could not be read.",
    "instance_active": "Whether systemd says that the server runs.",
    "instance_starting": "Whether the server loads its model.",
    "instance_on_demand": "Whether the server starts when it is asked.",
    "server_answers": "Whether the server answered /metrics to its own host.",
    "restarts_total": "Restarts of the server, by systemd or by the liveness check, which takes it for wedged.",
    "last_wedge_time_seconds": "When the liveness check last restarted the server; 0: never.",
    "liveness_failed": "Whether the last liveness check could not look.",
    "drift": "Whether this part of the installed instance differs from what was installed.",
    "gate_ok": "Whether the last gate passed.",
    "gate_time_seconds": "When the last gate was.",
    "gate_tokens_per_second": "What the last gate measured.",
    "gate_usual_tokens_per_second": "The median of the gates before the last one, with the same model and flags.",
    "gate_slower": "Whether the server is slower since the driver or the kernel changed.",
    "predicted_tokens_per_second": "What the plan predicts of writing.",
    "planned_bytes": "Memory that the plan counts for the server.",
    "held_bytes": "Memory that the server holds: of the host without its page cache, of a GPU all.",
    "cgroup_bytes": "Memory that counts for the unit's MemoryMax, without the page cache that is not in use.",
    "limit_bytes": "The unit's MemoryMax.",
    "plan_time_seconds": "When the plan was installed.",
    "build_time_seconds": "When the llama-server that the plan names was built.",
    "build_info": "The commit of llama.cpp, and the key of the build.",
    "certificate_end_time_seconds": "When the TLS certificate ends.",
}
Sample = Tuple[str, Dict[str, str], float]


# --- the text ---------------------------------------------------------------------------------------


def line(name: str, labels: Dict[str, str], value: float) -> str:
    """A sample as Prometheus reads it."""
    told = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
    number = repr(float(value)) if value != int(value) else str(int(value))
    return f"{name}{{{told}}} {number}" if told else f"{name} {number}"


def text(samples: Sequence[Sample], relayed: Sequence[str]) -> str:
    """The whole file: samples of one metric together."""
    lines: List[str] = []
    for name, help_text in HELP.items():
        own = [line(f"llamafleet_{name}", labels, value) for one, labels, value in samples if one == name]
        if own:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP llamafleet_{name} {help_text}", f"# TYPE llamafleet_{name} {kind}", *own]
    return "\n".join([*lines, *together(relayed)]) + "\n"


# --- an instance --------------------------------------------------------------------------------------


def of_instance(name: str) -> Iterator[Sample]:
    """What is known of an instance without asking its server. Raises OSError and SubprocessError where systemd does not
    answer."""
    its = {"name": name}
    shown = common.show(unit_of(name), *STATE, seconds=10.0)
    record = instance_files.record(name)
    active = is_running(shown)
    yield "instance_active", its, active
    yield "instance_starting", its, not active and is_alive("/".join(shown.get(key, "") for key in STATE[:2]))
    yield "instance_on_demand", its, common.is_on_demand(name)
    yield from of_restarts(name, shown)
    for what, is_so in drifts(name, record, shown):
        yield "drift", {**its, "what": what}, is_so
    yield from of_gate(name)
    yield from of_plan(name, record)
    yield from of_memory(name, record, shown)
    end = certificate_end(f"{common.INSTANCES}/{name}/{common.TLS_CERTIFICATE}")
    if end is not None:
        yield "certificate_end_time_seconds", its, end


def of_restarts(name: str, shown: Dict[str, str]) -> Iterator[Sample]:
    kept, its = read_json(liveness_record(name)), {"name": name}
    by_systemd = (whole_number(shown.get("NRestarts"), 2**32) or 0) + positive(kept.get("by_systemd"))
    yield "restarts_total", {**its, "by": "systemd"}, by_systemd
    yield "restarts_total", {**its, "by": "liveness"}, positive(kept.get("restarts"))
    yield "last_wedge_time_seconds", its, seconds_of(kept.get("time")) or 0
    if os.path.lexists(f"{common.UNITS}/{liveness_units(name)[0]}"):
        state = common.show(liveness_units(name)[0], "ActiveState", seconds=10.0).get("ActiveState")
        yield "liveness_failed", its, state == "failed"


def drifts(name: str, record: Dict[str, Any], shown: Dict[str, str]) -> Iterator[Tuple[str, bool]]:
    """What may have been changed by hand, and whether it was. What the operator's inventory says by now is not known
    here."""
    unit, good = unit_of(name), f"{common.GOOD}/{name}"
    allowed = record.get("allowed_drop_ins")
    allowed = allowed if isinstance(allowed, list) else []
    timer = liveness_units(name)[1]
    plan = read_json(plan_path(name))
    yield "plan", not plan or not common.is_as_written(plan)
    known = {file: common.sha256_of(f"{good}/{file}") for file in (unit, *liveness_units(name))}
    yield "unit", any(one and common.sha256_of(f"{common.UNITS}/{file}") != one for file, one in known.items())
    yield "drop-in", any(os.path.basename(path) not in allowed for path in common.drop_ins(unit))
    yield "not-reloaded", shown.get("NeedDaemonReload") == "yes"
    yield "liveness", is_running(shown) and os.path.lexists(f"{common.UNITS}/{timer}") and not is_active(timer)
    yield "release", lacks_files(record.get("release"))


def is_active(unit: str) -> bool:
    return common.show(unit, "ActiveState", seconds=10.0).get("ActiveState") == "active"


def lacks_files(release: Any) -> bool:
    """Whether a file of this release is missing, or one is there that is not its own."""
    if not isinstance(release, str):
        return False
    path = f"{common.RELEASES}/{release}"
    files = read_json(f"{path}/release.json").get("files")
    return not isinstance(files, dict) or set(common.listing(f"{path}/bin")) != set(files)


def of_gate(name: str) -> Iterator[Sample]:
    record, its = read_json(gate_record(name)), {"name": name}
    when = seconds_of(record.get("time"))
    if when is None:
        return
    yield "gate_ok", its, record.get("ok") is True
    yield "gate_time_seconds", its, when
    yield "gate_slower", its, bool(record.get("slower"))
    # By what the server does: one that writes nothing reads.
    for kind, key in (("write", "speeds"), ("read", "read_speeds")):
        speeds = [positive(one) for one in record.get(key) or () if positive(one)]
        if speeds:
            yield "gate_tokens_per_second", {**its, "kind": kind}, speeds[-1]
            yield "gate_usual_tokens_per_second", {**its, "kind": kind}, statistics.median(speeds[:-1] or speeds)


def of_plan(name: str, record: Dict[str, Any]) -> Iterator[Sample]:
    its = {"name": name}
    if not record:
        return
    yield "plan_time_seconds", its, os.stat(plan_path(name)).st_mtime
    predicted: Any = record.get("plan")
    for key in ("predicted", "decode_tokens_per_s"):
        predicted = predicted.get(key) if isinstance(predicted, dict) else None
    if positive(predicted):
        yield "predicted_tokens_per_second", its, positive(predicted)
    release, commit = record.get("release"), record.get("commit")
    if isinstance(release, str) and isinstance(commit, str):
        yield "build_info", {**its, "commit": commit, "build": release}, 1
        path = f"{common.RELEASES}/{release}/release.json"
        if os.path.exists(path):
            yield "build_time_seconds", its, os.stat(path).st_mtime


def of_memory(name: str, record: Dict[str, Any], shown: Dict[str, str]) -> Iterator[Sample]:
    its = {"name": name, "device": "host"}
    if planned := planned_host_bytes(record):
        yield "planned_bytes", its, planned
    limit = whole_number(shown.get("MemoryMax"))
    if limit is not None:  # else "infinity"
        yield "limit_bytes", {"name": name}, limit
    stat, pid = cgroup(shown.get("ControlGroup") or ""), whole_number(shown.get("MainPID"))
    if stat:
        yield "held_bytes", its, stat.get("anon", 0) + stat.get("shmem", 0)
        yield "cgroup_bytes", {"name": name}, max(0, stat["current"] - stat.get("inactive_file", 0))
    elif pid and (held := process_bytes(pid)):
        yield "held_bytes", its, held
    gate = record.get("gate")
    gpus = gate.get("gpus") if isinstance(gate, dict) else None
    if not isinstance(gate, dict) or not isinstance(gpus, list) or not gpus:
        return
    for gpu in gpus:
        if isinstance(gpu, dict) and isinstance(gpu.get("uuid"), str) and positive(gpu.get("planned_bytes")):
            yield "planned_bytes", {"name": name, "device": gpu["uuid"]}, positive(gpu["planned_bytes"])
    if pid:
        import status

        of_gpus = status.gpu_bytes(pid, unit_of(name), gate)
        for uuid, size in of_gpus.items() if isinstance(of_gpus, dict) else ():
            if size is not None:
                yield "held_bytes", {"name": name, "device": uuid}, size


def planned_host_bytes(record: Dict[str, Any]) -> float:
    """Of the plan's ledger what the server takes of the host; 0 where it does not say."""
    plan = record.get("plan")
    rows = plan.get("ledger") if isinstance(plan, dict) else None
    parts = ("weights_bytes", "kv_bytes", "compute_bytes", "staging_bytes", "overhead_bytes", "beside_bytes")
    return sum(
        positive(row.get(part))
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and row.get("device") == "host"
        for part in parts
    )


def cgroup(path: str) -> Dict[str, int]:
    """memory.stat of a unit's cgroup (v2), with its memory.current as "current"; empty where the kernel has none."""
    folder = CGROUPS + path
    stat = (common.read_file(f"{folder}/memory.stat") or b"").decode("ascii", "replace")
    current = whole_number((common.read_file(f"{folder}/memory.current") or b"").decode("ascii", "replace"))
    if not path or current is None:
        return {}
    return {**{key: int(value) for key, value in re.findall(r"^(\w+) (\d{1,19})$", stat, re.M)}, "current": current}


def process_bytes(pid: int) -> int:
    """Memory of a process without its page cache, where the kernel counts none for its cgroup."""
    told = (common.read_file(f"/proc/{pid}/status") or b"").decode("ascii", "replace")
    return sum(1024 * int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d{1,16}) kB$", told, re.M))


def certificate_end(path: str) -> Optional[float]:
    """When the first certificate of a PEM file ends; None where there is none, or no openssl that reads it."""
    if not os.path.exists(path):
        return None
    told = output_of(["openssl", "x509", "-noout", "-enddate", "-in", path], seconds=10.0)
    found = re.fullmatch(r"notAfter=(.+)\n", told)
    try:
        return float(ssl.cert_time_to_seconds(found.group(1))) if found else None
    except ValueError:
        return None


def seconds_of(when: Any) -> Optional[float]:
    """Of a record's time in UTC, since 1970; None where it is none."""
    import calendar

    try:
        return float(calendar.timegm(time.strptime(when, "%Y-%m-%dT%H:%M:%SZ")))
    except (TypeError, ValueError):
        return None


# --- all of it ---------------------------------------------------------------------------------------


def gathered(scraped: Sequence[str], gateway: Optional[int]) -> str:
    """The whole file's text."""
    samples: List[Sample] = []
    relayed: List[str] = []
    errors = 0
    for name in instance_files.names():
        try:
            samples += of_instance(name)
            if name not in scraped:
                lines = of_server(name)
                samples += [("server_answers", {"name": name}, bool(lines))] if lines is not None else []
                relayed += lines or []
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            errors += 1
            print(f"{name}: {error}", file=sys.stderr)
    if gateway is not None:
        try:
            relayed += of_gateway(gateway)
        except (OSError, http.client.HTTPException) as error:
            errors += 1
            print(f"the gateway does not answer at 127.0.0.1:{gateway}: {error}", file=sys.stderr)
    end = certificate_end(f"{common.GATEWAY}/current/tls.pem")
    if end is not None:
        samples.append(("certificate_end_time_seconds", {"name": "gateway"}, end))
    samples += [("metrics_time_seconds", {}, time.time()), ("metrics_errors", {}, errors)]
    return text(samples, relayed)


def values(argv: List[str], option: str) -> List[str]:
    return [argv[number + 1] for number, word in enumerate(argv) if word == option]


def main(argv: List[str]) -> int:
    scraped, ports = values(argv, "--scraped"), values(argv, "--gateway")
    try:
        os.makedirs(common.METRICS, mode=0o755, exist_ok=True)
        common.replace_file(f"{common.METRICS}/{FILE}", gathered(scraped, int(ports[0]) if ports else None).encode())
    except OSError as error:
        print(f"error: the metrics cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
