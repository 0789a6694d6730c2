"""Is what runs what was planned? Asked before an instance is called good.

Contract: `gate.py check SPEC.json` runs every check in order, stops at the first that fails, and
prints {"ok": bool, "checks": [{"name", "ok", "expected", "found", "hint"}]}; exit 0 good, 1 not.
`gate.py start SPEC.json`, the unit's ExecStartPost, waits for /health and then asks whether the planned
GPUs hold the process, so that a boot at which the driver was not ready yet ends in a restart and not in
a server on the CPU. SPEC has the `gate`
object of plan.json: unit, argv, url, api_keys (path | null), health_seconds, context_tokens (of one
slot), slots, backend, gpus [{"uuid", "name", "planned_bytes", and what gate_devices.py reads}]. Standard
library, psutil and pynvml only; gate_devices.py lies beside it.

`/health` alone proves little: llama-server answers 200 also after it silently fell back to the CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any, Callable, Sequence  # the contract is Python 3.8, whose own are typing's

from gate_devices import cause_of_end, check_devices

# The share of a GPU's planned bytes that the process must really hold. The CUDA context comes on
# top of the plan, so a healthy process holds more than planned; a fallback to the CPU holds none.
HELD_SHARE = 0.5


def result(name: str, ok: bool, expected: object, found: object, hint: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "expected": expected, "found": found, "hint": hint}


def main_pid(unit: str) -> int:
    done = subprocess.run(["systemctl", "show", "--property=MainPID", "--value", unit],
                          stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    return int(done.stdout.strip() or 0)


def unit_state(unit: str) -> str:
    """Such as "active/running", "activating/start-post" or "activating/auto-restart"."""
    done = subprocess.run(["systemctl", "show", "--property=ActiveState,SubState", unit],
                          stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    shown = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return f"{shown.get('ActiveState')}/{shown.get('SubState')}"


def is_alive(state: str) -> bool:
    """May a unit in this state still come to serve? One that systemd starts again has failed once."""
    return state.startswith(("active/", "activating/")) and state != "activating/auto-restart"


def ask(
    url: str, path: str, key: str | None = None, body: dict[str, Any] | None = None, seconds: float = 120.0
) -> tuple[int, Any]:
    """(status, JSON or text); status 0 where nothing answered."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = "Bearer " + key
    data = json.dumps(body).encode() if body is not None else None
    # A proxy of the environment must not stand between the host and its own server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url + path, data, headers), timeout=seconds) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    except (OSError, ValueError) as error:
        return 0, str(error)
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text.decode("utf-8", "replace")[:500]


def wait_for_health(url: str, seconds: float, alive: Callable[[], bool] = lambda: True) -> int:
    """The last status of /health: 200 as soon as it is, else what it was when time or process ended."""
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

    status = wait_for_health(spec["url"], spec["health_seconds"], alive)
    state, running = unit_state(spec["unit"]), alive()
    ended = ", its server has ended" if is_alive(state) and not running else ""
    return result(
        "health", status == 200, f"200 from {spec['url']}/health within {spec['health_seconds']:.0f} s",
        f"{status or 'no answer'}, unit {state}{ended}",
        "loading takes longer than the deadline" if running else cause_of_end(spec["unit"]) or "its journal says why",
    )  # fmt: skip


def check_process(spec: dict[str, Any]) -> dict[str, Any]:
    pid = main_pid(spec["unit"])
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            found = file.read().decode("utf-8", "surrogateescape").split("\0")[:-1]
    except OSError:
        found = []
    return result("process", found == spec["argv"], spec["argv"], found,
                  "the unit was edited by hand, or systemd read an argument differently")  # fmt: skip


def check_key(spec: dict[str, Any]) -> dict[str, Any] | None:
    """With a key, nobody gets in without it; llama-server lets everybody in when the file is empty."""
    if not spec["api_keys"]:
        return None
    status, _ = ask(spec["url"], "/v1/completions", body={"prompt": "a", "max_tokens": 1})
    return result("api key", status == 401, "401 without a key", status,
                  "an empty key file switches llama-server's authentication off")  # fmt: skip


def first_key(spec: dict[str, Any]) -> str | None:
    if not spec["api_keys"]:
        return None
    with open(spec["api_keys"]) as file:
        return file.readline().strip()


def check_context(spec: dict[str, Any]) -> dict[str, Any]:
    status, props = ask(spec["url"], "/props", first_key(spec))
    settings = props.get("default_generation_settings", {}) if isinstance(props, dict) else {}
    found = {"context_tokens": settings.get("n_ctx"), "slots": props.get("total_slots") if settings else None}
    expected = {"context_tokens": spec["context_tokens"], "slots": spec["slots"]}
    return result("context", found == expected, expected, found if settings else f"status {status}",
                  "the model was trained for less, or llama-server padded or cut the context")  # fmt: skip


def check_completion(spec: dict[str, Any]) -> dict[str, Any]:
    body = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    status, answer = ask(spec["url"], "/v1/completions", first_key(spec), body, seconds=300.0)
    usage = answer.get("usage", {}) if isinstance(answer, dict) else {}
    tokens = usage.get("completion_tokens", 0)
    return result(
        "completion",
        status == 200 and tokens == 8,
        "200 and 8 tokens",
        f"{status or 'no answer'} and {tokens} tokens",
        str(answer)[:300] if status != 200 else "",
    )


def check_gpus(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Every planned GPU holds this process's memory: the silent fallback to the CPU is caught here."""
    if not spec["gpus"] or spec["backend"] != "cuda":
        return None  # NVML knows no others; what the server says of them is asked in check_devices
    held = held_by(main_pid(spec["unit"]))
    for gpu in spec["gpus"]:
        found = held.get(gpu["uuid"], 0) if isinstance(held, dict) else 0
        if found is None:  # NVML knows the process but not its memory: containers, some drivers
            continue
        if found < gpu["planned_bytes"] * HELD_SHARE:
            where = f"on {gpu['name']} ({gpu['uuid']})"
            return result(
                "gpu memory", False, f"about {gpu['planned_bytes'] >> 20} MiB {where}",
                held if isinstance(held, str) else f"{found >> 20} MiB {where}",
                "llama-server runs on the CPU: no usable driver, or the sandbox hides the device",
            )  # fmt: skip
    names = ", ".join(gpu["name"] for gpu in spec["gpus"])
    return result("gpu memory", True, f"the planned memory on {names}", "held")


def held_by(pid: int) -> dict[str, int | None] | str:
    """Bytes that the process holds by UUID of the GPU or MIG instance (None: NVML does not tell); a text
    where NVML fails. A GPU that does not answer is left out."""
    import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py ships no types

    held: dict[str, int | None] = {}
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    for index in range(count):
        try:
            for device in devices(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)):
                processes = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
                mine = [process.usedGpuMemory for process in processes if process.pid == pid]
                held[text(pynvml.nvmlDeviceGetUUID(device))] = mine[0] if mine else 0
        except pynvml.NVMLError:
            continue
    return held


def devices(pynvml: Any, gpu: Any) -> list[Any]:
    """The GPU itself, or its MIG instances where it is cut into some: CUDA knows only those then."""
    try:
        if pynvml.nvmlDeviceGetMigMode(gpu)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return [gpu]
    except pynvml.NVMLError:  # a GPU that cannot be cut
        return [gpu]
    found = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            found.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
        except pynvml.NVMLError:  # a place without an instance
            continue
    return found


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


CHECKS = (check_health, check_process, check_gpus, check_devices, check_key, check_context, check_completion)
START_CHECKS = (check_health, check_gpus, check_devices)


def check(
    spec: dict[str, Any], every: Sequence[Callable[[dict[str, Any]], dict[str, Any] | None]] = CHECKS
) -> dict[str, Any]:
    """The checks in order, up to the first that fails."""
    checks = []
    for one in every:
        found = one(spec)
        if found is not None:
            checks.append(found)
            if not found["ok"]:
                break
    return {"ok": all(found["ok"] for found in checks), "checks": checks}


def main(argv: list[str]) -> int:
    with open(argv[1]) as file:
        spec = json.load(file)["gate"]
    found = check(spec, CHECKS if argv[0] == "check" else START_CHECKS)
    if argv[0] == "check":
        print(json.dumps(found))
    for bad in [] if argv[0] == "check" else found["checks"]:
        if not bad["ok"]:  # for the journal
            print(f"{bad['name']}: expected {bad['expected']}, found {bad['found']} ({bad['hint']})", file=sys.stderr)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
