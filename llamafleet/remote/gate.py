"""Check that the running server is the planned one, before its instance counts as good.

Contract: `gate.py check PLAN.json [--record] [--no-floor]` runs every check in order, stops at the first that
fails, and prints {"ok": bool, "checks": [{"name", "ok", "expected", "found", "hint"}],
"decode_tokens_per_s": float | null}; exit 0 good, 1 not. With --record it also writes
/var/lib/llamafleet/gate/NAME.json: that object, "schema" 1, "time" (UTC), "identity" and "release" of the plan, what
the next gate compares with, and "last_failure" {"time", "release", "check"}. With --no-floor any speed passes: a server
that has served before is not rejected for its speed. A server that sleeps is woken with --record only, which is for one
that was just started.
`gate.py pace PLAN.json` measures a running server before another build takes its place, and keeps its pace in the
record (gate_pace.py); `gate.py again PLAN.json` measures one that runs under another driver or kernel than before, and
keeps "slower", a text that is empty where it is not. Both print the same object, and fail where nothing can be
measured now.
`gate.py start PLAN.json`, the unit's ExecStartPost, waits for /health and then checks that a planned key is asked for
and that the process holds memory on the planned GPUs. If the key file is empty, or the driver was not ready at boot,
the start thus fails: no server serves everybody, or stays on the CPU. The checks run in a transient unit without
root's rights (gate_unit.py); what they find is written here.

PLAN.json is plan.json, of which is read: identity, release, commit, accept_slower (that commit | null), files,
plan.predicted, and `gate`: unit, argv, url, api_keys and tls_certificate (path | null), health_seconds (the most that
loading may take), context_tokens (of one slot), slots, kv_type, speed_floor_percent, backend, serves ("chat" where it
is missing; "embedding" with pooling and vector_elements, or "reranking" with rerank_example), gpus [{"uuid", "name",
"planned_bytes", and what gate_devices.py reads}], and what gate_prompt_files.py, gate_adapters.py and
gate_speculation.py read. Standard library, psutil and pynvml; common.py and gate_*.py lie beside it.

`/health` alone proves little: llama-server answers 200 also after it silently fell back to the CPU.

Decision 7: docs/decisions/0007-health-is-not-enough.md.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any, Callable, Sequence  # the contract is Python 3.8, whose own are typing's

import gate_devices
import gate_unit
from common import GATE_SCHEMA, command_line, invocation, journal_of_start, write_json
from gate_adapters import check_adapters
from gate_devices import cause_of_end, check_devices
from gate_load import deadline, why_silent
from gate_nvml import held_by, in_use_on_all
from gate_pace import check_again, check_old_pace, check_pace
from gate_picture import check_picture
from gate_prompt_files import check_prompt_files
from gate_reading import check_longest, check_reading
from gate_reply import REMEMBERED, check_completion, check_speed, speed_key
from gate_scores import check_scores
from gate_server import ask, first_key, found_status, is_alive, main_pid, result, trust, unit_state
from gate_sleep import check_asleep, ends
from gate_spec import Unreadable, read_spec
from gate_speculation import check_speculation
from gate_unit import CONFINED, with_credentials
from gate_vectors import check_embedding

# The share of a GPU's planned bytes that the process must really hold. The CUDA context comes on
# top of the plan, so a healthy process holds more than planned; a fallback to the CPU holds none.
HELD_SHARE = 0.5


def wait_for_health(url: str, seconds: float, alive: Callable[[], bool] = lambda: True) -> int:
    """Ask /health until it answers 200, the time is over or the process has ended; the last status."""
    deadline = time.monotonic() + seconds
    while True:
        status, _ = ask(url, "/health", seconds=5.0)
        if status == 200 or time.monotonic() >= deadline or not alive():
            return status
        time.sleep(0.2)


def check_health(spec: dict[str, Any]) -> dict[str, Any]:
    def alive() -> bool:
        # While ExecStartPost waits, systemd calls a unit "activating" also after its server has ended.
        return is_alive(unit_state(spec["unit"])) and main_pid(spec["unit"]) > 0

    seconds, how = spec["health_seconds"], "the most that loading may take"
    status = wait_for_health(spec["url"], 0.0, alive)
    if status != 200 and alive():
        seconds, how = deadline([file["path"] for file in spec["files"]], spec["health_seconds"])
        status = wait_for_health(spec["url"], seconds, alive)
    state, running = unit_state(spec["unit"]), alive()
    ended = ", its server has ended" if is_alive(state) and not running else ""
    return result(
        "health", status == 200, f"200 from {spec['url']}/health within {seconds:.0f} s ({how})",
        f"{status or 'no answer'}, unit {state}{ended}",
        why_silent(spec["unit"], main_pid(spec["unit"]), status) if running
        else cause_of_end(spec["unit"]) or "its journal says why",
    )  # fmt: skip


def arguments(unit: str) -> list[str]:
    """The command line of the unit's process; empty if it has none."""
    return command_line(main_pid(unit))


def check_process(spec: dict[str, Any]) -> dict[str, Any]:
    found = arguments(spec["unit"])
    return result("process", found == spec["argv"], spec["argv"], found,
                  "the unit was edited by hand, or systemd read an argument differently")  # fmt: skip


def check_key(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Where keys are planned, a request without one must be refused; an empty key file would let everybody in."""
    if not spec["api_keys"]:
        return None
    status, told = ask(spec["url"], "/v1/completions", body={"prompt": "a", "max_tokens": 1})
    return result("api key", status == 401, "401 without a key", status or found_status(status, told),
                  "an empty key file switches llama-server's authentication off")  # fmt: skip


def check_context(spec: dict[str, Any]) -> dict[str, Any]:
    status, props = ask(spec["url"], "/props", first_key(spec))
    settings = props.get("default_generation_settings") if isinstance(props, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    found = {"context_tokens": settings.get("n_ctx"), "slots": props.get("total_slots") if settings else None}
    expected = {"context_tokens": spec["context_tokens"], "slots": spec["slots"]}
    logged = kv_types(spec["unit"])
    if logged and spec["kv_type"]:  # else the arguments decide, which check_process has compared
        kinds = {spec["kv_type"], (spec.get("speculation") or {}).get("kv_type")} - {None}
        found["kv_types"], expected["kv_types"] = logged, sorted(kinds)
    return result("context", found == expected, expected, found if settings else found_status(status, props),
                  "the model was trained for less, or llama-server padded or cut the context")  # fmt: skip


def kv_types(unit: str) -> list[str]:
    """The types of the KV cache that the server logged while it loaded, such as "q8_0", or K/V where they differ;
    empty where the journal has no such line.

    No address of the server tells them. The constructor of llama_kv_cache logs them at the verbosity of a server with
    GPUs. A type that the backend cannot hold ends the start (llama_init_from_model).
    """
    pairs = re.findall(r"K \((\w+)\): .*V \((\w+)\):", log_of_start(unit))
    return sorted({key if key == value else key + "/" + value for key, value in pairs})


def log_of_start(unit: str) -> str:
    """What the unit logged since it was last started."""
    return journal_of_start(invocation(unit))


def check_gpus(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Every planned GPU must hold memory of this process: a silent fallback to the CPU holds none.

    Where NVML does not tell whose memory is whose, as in a container, as much must be in use there by all together;
    that the server holds it, its log says (check_devices).
    """
    gpus = [gpu for gpu in spec["gpus"] if gpu["uuid"]]  # a Jetson's GPU has none, and NVML may not know it
    if not gpus or spec["backend"] != "cuda":
        return None  # NVML knows NVIDIA's GPUs alone; check_devices reads the server's log for all others
    held = held_by(main_pid(spec["unit"]))
    untold = isinstance(held, dict) and any(held.get(gpu["uuid"], 0) is None for gpu in gpus)
    in_use = in_use_on_all() if untold else {}
    for gpu in gpus:
        found = held.get(gpu["uuid"], 0) if isinstance(held, dict) else 0
        whose = "" if found is not None else " in use by all together"
        found = in_use.get(gpu["uuid"]) if found is None else found
        if found is not None and found < gpu["planned_bytes"] * HELD_SHARE:
            where = f"on {gpu['name']} ({gpu['uuid']}){whose}"
            return result(
                "gpu memory", False, f"about {gpu['planned_bytes'] >> 20} MiB {where}",
                held if isinstance(held, str) else f"{found >> 20} MiB {where}",
                "llama-server runs on the CPU: no usable driver, or the hardening hides the device",
            )  # fmt: skip
    names = ", ".join(gpu["name"] for gpu in gpus)
    found_so = "in use; NVML does not tell here by whom, so the server's log decides" if untold else "held"
    return result("gpu memory", True, f"the planned memory on {names}", found_so)


CHECKS = (
    check_health, check_process, check_asleep, check_gpus, check_devices, check_key, check_context, check_prompt_files,
    check_completion, check_adapters, check_speculation, check_picture, check_speed, check_pace, check_embedding,
    check_scores, check_reading, check_longest,
)  # fmt: skip
# The key first: until then a server without keys would serve everybody.
START_CHECKS = (check_health, check_key, check_gpus, check_devices)


def unreadable(name: str, error: Exception) -> dict[str, Any]:
    return result(name, False, "the instance's files, and systemd's answer", str(error),
                  "a file is missing or damaged: deploy again")  # fmt: skip


def check(
    spec: dict[str, Any], every: Sequence[Callable[[dict[str, Any]], dict[str, Any] | None]] = CHECKS
) -> dict[str, Any]:
    """The checks in order, up to the first that fails, or to a server that sleeps."""
    checks = []
    for one in every:
        try:
            found = one(spec)
        except OSError as error:
            found = unreadable(one.__name__.replace("check_", "").replace("_", " "), error)
        if found is not None:
            checks.append(found)
            if ends(found):
                break
    return {"ok": all(found["ok"] for found in checks), "checks": checks}


def record_of(spec: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The record: the verdict and, if it is good, the values that the next gate compares with."""
    last, measured, now = spec["last"], spec["measured"], time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {
        **last,
        **found,
        "schema": GATE_SCHEMA,
        "time": now,
        "identity": spec["identity"],
        "release": spec["release"],
    }
    if found["ok"]:
        key = speed_key(spec)
        speeds = last.get("speeds", []) if last.get("speed_key") == key else []
        speeds = [*speeds, measured["decode_tokens_per_s"]] if "decode_tokens_per_s" in measured else speeds
        if spec["serves"] != "chat":
            record["read_speeds"] = reading_speeds(spec, key)
        record.update(measured, speed_key=key, speeds=speeds[-REMEMBERED:], expected=spec["expected"])
        if "pace" in measured:  # what was said of an earlier build
            record["slower"] = ""
    else:
        record["last_failure"] = {"time": now, "release": spec["release"], "check": found["checks"][-1]}
    return record


def reading_speeds(spec: dict[str, Any], key: str) -> list[float]:
    """The last speeds at which a server read that writes nothing."""
    before = spec["last"].get("read_speeds", []) if spec["last"].get("speed_key") == key else []
    measured = spec["measured"].get("read_tokens_per_s")
    return ([*before, measured] if measured else before)[-REMEMBERED:]


def verdict(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was asked for and what was found, by the arguments of `main`; nothing was asked for by an unusable plan."""
    try:
        spec = read_spec(argv[1])
        if CONFINED in argv:
            spec = with_credentials(spec)
    except Unreadable as error:
        way_out = "deploy again, with the llamafleet that made it or a later one"
        bad = result("plan", False, "a plan.json that this gate knows", str(error), way_out)
        return {}, {"ok": False, "checks": [bad]}
    spec["deploying"] = "--record" in argv
    if "--no-floor" in argv:
        spec["speed_floor_percent"] = 0
    spec["wake"] = "--record" in argv
    try:
        trust(spec)
    except (OSError, ValueError) as error:
        return spec, {"ok": False, "checks": [unreadable("certificate", error)]}
    by_verb = {"check": CHECKS, "start": START_CHECKS, "pace": (check_old_pace,), "again": (check_again,)}
    return spec, check(spec, by_verb[argv[0]])


def examine(argv: list[str]) -> dict[str, Any]:
    """Run the checks; {"found": the verdict, "record": what to remember of it | null, "devices": what the log told}."""
    spec, found = verdict(argv)
    if argv[0] != "start":
        found["decode_tokens_per_s"] = spec.get("measured", {}).get("decode_tokens_per_s")
    record = record_of(spec, found) if spec and argv[0] == "check" and "--record" in argv else None
    if argv[0] in ("pace", "again") and spec and found["ok"]:
        record = {**spec["last"], **spec["measured"]}
    return {"found": found, "record": record, "devices": gate_devices.unwritten}


def conclude(argv: list[str], examined: dict[str, Any]) -> int:
    """Write and print what the checks found; the exit status."""
    found = examined["found"]
    if examined["devices"]:
        gate_devices.keep(read_spec(argv[1])["unit"], examined["devices"])
    if argv[0] != "start":
        if examined["record"] is not None:
            write_json(read_spec(argv[1])["record"], examined["record"])
        print(json.dumps(found))
        return 0 if found["ok"] else 1
    for bad in found["checks"]:
        if not bad["ok"]:  # for the journal
            print(f"{bad['name']}: expected {bad['expected']}, found {bad['found']} ({bad['hint']})", file=sys.stderr)
    return 0 if found["ok"] else 1


def main(argv: list[str]) -> int:
    if CONFINED in argv:
        print(json.dumps(examine(argv)))
        return 0
    try:
        spec = read_spec(argv[1])
    except Unreadable:
        return conclude(argv, examine(argv))  # which says so, and asks nobody
    try:
        return conclude(argv, gate_unit.examine(argv, spec))
    except gate_unit.GateFailed as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
