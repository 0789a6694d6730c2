"""Ask the freshly built llama-server what it would allocate, without letting it load.

Contract: `verify.py ask SPEC`, a JSON object {"name": of the instance, "command": [llama-server and its arguments, made
by `question` in llamafleet/planner/reconcile.py], "environment": {name: value}, "groups": [names], "gpus": [UUIDs of
NVIDIA GPUs], "room_bytes": what must be free on each of them, "beside": "draft" where a draft model is loaded, "head"
where the model's own guesses, else missing or ""}; prints one JSON object {"told": {llama.cpp's name of a device or
kind of host memory, "beside " and such a name for what guesses, or "projector": bytes} | null, "why": text if nothing
was reported, "room": false if the reason is that a GPU had no room beside what runs there, "rejected": the line by
which llama-server refuses its arguments or its model, or ""}. Exit 0 whatever was reported.
`verify.py settle QUESTION.json PLAN.json` is for the switch, once the old server is stopped: QUESTION has the same and
"devices" {llama.cpp's name: the ledger's}, "limits" {the ledger's name: bytes}. The sizes go into PLAN's `verified`.
Exit 0 within the limits, or if nothing was reported; 1 beyond them, with a line `told: ` and their JSON; 3 if it
rejects its arguments or its model, with its line.
Root, systemd, standard library and pynvml; common.py and inherited.py lie beside it.

llama-server first makes the model and its context without memory, if it is to fit its arguments to the memory (its
default), and prints where the bytes would be (common_memory_breakdown_print at b11434), 0.3 s after its start; then it
does the same for a draft, or for the context of a head (common_fit_params), unless the draft needs the model's own
matrices: that fails, and is not reported. It is killed there, before it loads anything.

Decision 4: docs/decisions/0004-the-binary-is-asked-before-it-is-trusted.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from typing import Any, Iterable  # the contract is Python 3.8, whose own Iterable is typing's

import boot
import inherited
from common import systemctl, transient_unit, unit_words, write_json

MIB = 1024**2
# Until the breakdown is there: reading a header of 10 MB from a cold disk and a CUDA context take seconds.
SECONDS = 120
# It reads the vocabulary and makes a CUDA context; were it not killed in time, it gets no further than this.
MEMORY_BYTES = 4096 * MIB
TAIL_LINES = 8
REJECTS = 3  # exit status of `settle`
# The preflight, which proves what a GPU's driver can do without, comes later: so these are directives that no driver is
# known to need, on top of those that it never drops.
HARDENING = (
    "PrivateMounts=yes", "ProtectKernelTunables=yes", "ProtectKernelModules=yes", "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes", "ProtectHostname=yes", "ProtectProc=invisible", "RestrictNamespaces=yes",
    "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes", "SystemCallArchitectures=native",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6", "IPAddressDeny=any", "KeyringMode=private", "UMask=0077",
    "SystemCallFilter=@system-service", "SystemCallFilter=~@privileged", "SystemCallErrorNumber=EPERM", "TasksMax=2048",
)  # fmt: skip
# With the device's total and free memory before the figures, or, on the host, without; in MiB.
# What a projector takes, weights and compute buffers of all its devices (tools/server/server-context.cpp, load_model);
# before the rows.
PROJECTOR = re.compile(r"estimated worst-case memory usage of mmproj is (?P<size>\d+\.\d+) MiB")
ROW = re.compile(
    r"common_memory_breakdown_print: \|   - (?P<name>\S+).*?(?P<self>\d+) =\s+(?P<weights>\d+) \+\s+\d+ \+\s+\d+\)?"
    r"(?: \+\s+-?\d+)?\s+\|"
)
# Behind the first breakdown: that of what guesses comes after it, or not at all.
NO_MORE = re.compile(r"failed to measure the memory of the extra model|projected to use |fitting params to free memory")
BESIDE = "beside "
# What it prints where it ends because of its arguments (common_params_parse in common/arg.cpp) or of the model's header
# (llama_model_load in src/llama.cpp): the service would end in the same way.
REJECTED = re.compile(
    r"error: invalid argument: |error while handling (?:argument|environment variable) |error: (?:the )?argument |"
    r"error loading model(?: \w+)?: |unknown model architecture|gguf_init_from_\w+: .*(?:invalid|failed to)|"
    r"common_chat_verify_template: failed|failed to initialize chat template"
)
# With this split it goes on to load the model (common_params_fit_impl in common/fit.cpp).
NOT_MEASURED = re.compile(r"not implemented for SPLIT_MODE_TENSOR")
USAGE = re.compile(r"^\s*usage:", re.MULTILINE)
NO_ROOM = re.compile(r"out of memory|cudaErrorMemoryAllocation|ErrorOutOfDeviceMemory|hipErrorOutOfMemory")


def properties(spec: dict[str, Any]) -> list[str]:
    """The process runs as the services' user with little memory, a low priority and a deadline: it cannot harm them."""
    return [
        "User=llamafleet", "Group=llamafleet", f"SupplementaryGroups={' '.join(spec['groups'])}",
        f"MemoryMax={MEMORY_BYTES}", "MemorySwapMax=0", "Nice=10", "LimitCORE=0",
        f"RuntimeMaxSec={SECONDS}", "TimeoutStopSec=5",
        "NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict", "ProtectHome=yes", "PrivateTmp=yes",
        *HARDENING, *inherited.DIRECTIVES,
    ]  # fmt: skip


def command(spec: dict[str, Any]) -> list[str]:
    environment = {**spec["environment"], "HOME": "/tmp", "XDG_CACHE_HOME": "/tmp"}  # noqa: S108 -- a private one
    return [
        "systemd-run", "--quiet", "--collect", "--pipe", "--wait", f"--unit={transient_unit('verify', spec['name'])}",
        *(f"--property={one}" for one in properties(spec)),
        *(f"--setenv={name}={value}" for name, value in environment.items()),
        "--", *unit_words(spec["command"]),
    ]  # fmt: skip


def ask(spec: dict[str, Any]) -> dict[str, Any]:
    """Ask the server; returns the object of the contract."""
    unit = transient_unit("verify", spec["name"])
    full = too_full(spec["gpus"], spec["room_bytes"])
    if full:
        return {"told": None, "why": full, "room": False, "rejected": ""}
    if spec["gpus"]:
        boot.make_nodes()  # they exist only after the driver was used
    systemctl("stop", unit, check=False)  # a run that was killed may have left one
    with subprocess.Popen(
        command(spec), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        late = threading.Timer(SECONDS + 10, process.kill)
        late.start()
        try:
            assert process.stdout is not None  # for mypy: a pipe was asked for
            lines = (line.decode("utf-8", "replace").rstrip() for line in process.stdout)
            told, tail, rejected = read(lines, spec.get("beside", ""))
        finally:
            # It has printed what was asked; next it would load the model.
            systemctl("kill", "--signal=KILL", unit, check=False)
            late.cancel()
            process.kill()
    if told:
        return {"told": told, "why": "", "room": True, "rejected": ""}
    said = "\n".join(tail)
    why = f"it ended without reporting its memory: {said or 'it printed nothing'}"
    if NOT_MEASURED.search(said):
        why = "llama.cpp does not measure --split-mode tensor before it loads"
    has_room = not NO_ROOM.search(said)
    return {"told": None, "why": why, "room": has_room, "rejected": rejected if has_room else ""}


def read(lines: Iterable[str], beside: str = "") -> tuple[dict[str, int], list[str], str]:
    """(bytes by name, the last lines, the first line by which it rejects what it was given): the first breakdown only,
    which is of the flags as they were given, and the one after it where something guesses (`beside`, of the contract).
    A head's weights are the model's, and counted there."""
    told: dict[str, int] = {}
    tables, within = 0, False  # breakdowns that are complete, and whether the last line was a row of one
    tail: list[str] = []
    rejected = ""
    for line in lines:
        tail = [*tail, line][-TAIL_LINES:]
        if not rejected and (REJECTED.search(line) or USAGE.search(line)):
            rejected = line.strip()
        if NOT_MEASURED.search(line):
            break
        row, projector = ROW.search(line), PROJECTOR.search(line)
        if row:
            counted = int(row.group("weights")) if tables and beside == "head" else 0
            told[(BESIDE if tables else "") + row.group("name")] = (int(row.group("self")) - counted) * MIB
        elif projector:
            told["projector"] = int(float(projector.group("size")) * MIB)
        elif within:
            tables += 1
        if tables > bool(beside) or (tables and NO_MORE.search(line)):
            break
        within = bool(row)
    return (told if "Host" in told else {}), tail, rejected


def too_full(uuids: list[str], needed: int) -> str:
    """The first GPU that has not this many bytes free, as a sentence; empty where all have, or NVML does not tell."""
    if not uuids:
        return ""
    import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py ships no types

    try:
        pynvml.nvmlInit()
        for uuid in uuids:
            free = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).free
            if free < needed:
                return f"{uuid} has {free // MIB} MiB free, asking takes up to {needed // MIB} MiB"
    except pynvml.NVMLError:
        return ""
    return ""


def settle(question: str, plan: str) -> int:
    """Ask while no other server runs, and write the answer into the plan; returns the exit status."""
    with open(question) as file:
        spec = json.load(file)
    with open(plan) as file:
        record = json.load(file)
    found = ask(spec)
    if found["rejected"]:
        print(f"llama-server rejects what it would be given: {found['rejected']}", flush=True)
        return REJECTS
    if found["told"] is None:
        print(f"llama-server was not asked: {found['why']}; the gate decides", flush=True)
        return 0
    sizes = by_device(found["told"], spec)
    record["verified"] = {**(record.get("verified") or {}), "binary_bytes": sizes, "why": "asked in the switch"}
    write_json(plan, record)
    over = [f"{device}: {size // MIB} MiB, {spec['limits'][device] // MIB} MiB are left under the reserve"
            for device, size in sizes.items() if size > spec["limits"][device]]  # fmt: skip
    if over:
        print("told: " + json.dumps(found["told"]))
        print(f"llama-server would allocate more than the plan gives: {'; '.join(over)}", flush=True)
    return 1 if over else 0


def by_device(told: dict[str, int], spec: dict[str, Any]) -> dict[str, int]:
    """Sums by the ledger's names; what is no device's is the host's."""
    sizes = dict.fromkeys(spec["limits"], 0)
    for name, size in told.items():
        sizes[spec["devices"].get(name[len(BESIDE) :] if name.startswith(BESIDE) else name, "host")] += size
    return sizes


def main(argv: list[str]) -> int:
    if argv[0] == "settle":
        return settle(argv[1], argv[2])
    print(json.dumps(ask(json.loads(argv[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
