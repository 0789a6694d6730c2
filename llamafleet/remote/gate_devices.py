"""Compare the memory that llama-server reports for each of its devices with the plan.

Contract: `check_devices(spec)` is one of gate.py's checks; SPEC is its `gate` object, of which this reads
unit and gpus [{"name", "device", "weights_bytes", "kv_bytes", "compute_bytes", "staging_bytes", and "beside_bytes" of
what is loaded beside the model, where there is any}], `device` being llama.cpp's name, such as CUDA0.
`cause_of_end(unit)` says which device a server that has ended could not use.
Standard library; reads the journal, and keeps what it read in /run/llamafleet, since the journal drops old lines.

All backends report their buffers in the load log, in the same form. NVML knows NVIDIA's GPUs alone, and neither
/props nor /metrics names a device (tools/server at b11434). The log has these lines from verbosity 4 on, which is
llama.cpp's INFO (common_log_get_verbosity). Its line "offloaded 5/5 layers to GPU" proves nothing: a build without
any GPU backend prints it too.
"""

from __future__ import annotations

import re
import time
from typing import Any, Dict  # the contract is Python 3.8, whose own is typing's

from common import RUN as KEPT
from common import invocation, read_json, write_json
from common import journal_of_start as journal

Told = Dict[str, Dict[str, float]]

MIB = 1 << 20
# Printed by load_tensors, llama_kv_cache, llama_memory_recurrent, llama_dsv4_comp_state and sched_reserve.
BUFFER = re.compile(r"(\S+) +(model|KV|RS|DSV4 .* state|compute) buffer size = +([\d.]+) MiB")
# Of a projector: its buffers are beside the model's, and gate_picture.py asks it itself.
PROJECTOR = re.compile(r"^.*reserve_compute_meta: .*$", re.M)
PARTS = {"model": "weights", "compute": "compute"}  # all others hold the context
LOADED = "model loaded"  # tools/server/server.cpp: after all of them
# What gate.py, as the unit's ExecStartPost, wrote to the journal before systemd ended the server.
REFUSED = re.compile(r"^(?:gpu memory|devices): expected .*$", re.M)
INVALID_DEVICE = re.compile(r"invalid device: (\S+)")
# Weights and cache are planned exactly, tensors that a backend cannot hold stay on the host; compute is an
# estimate from above. A fallback to the CPU holds none of them.
LEAST_SHARE = 0.9
MOST_SHARE, MOST_SPARE = 1.1, 256 * MIB
# With --split-mode tensor one name stands for all GPUs, and a size is that of the GPU that holds most; the plan has
# upper bounds (ggml/src/ggml-backend-meta.cpp, ggml_backend_meta_device_context).
SHARED, LEAST_SHARE_OF_BOUND = "Meta(", 0.5
LOST = "the release has no such backend, the driver is not ready, or the hardening hides the device"
# What could not be written.
unwritten: Dict[str, Any] = {}
# journald reads what a server writes a moment later.
JOURNAL_SECONDS = 10.0


def check_devices(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Does every planned device hold its part of the model, as the server reports it?"""
    if not spec["gpus"]:
        return None
    told = reported(spec["unit"])
    if told is None:
        return _result(
            False, "the sizes of the server's buffers in its log", "none in the journal of this start",
            "journald keeps nothing of this unit (Storage=, RateLimitBurst=), or the log's format is new",
        )  # fmt: skip
    shared = next((held for name, held in told.items() if name.startswith(SHARED)), {})
    for gpu in spec["gpus"]:
        found = told.get(gpu["device"], shared)
        low = gpu["weights_bytes"] + gpu["kv_bytes"]
        beside = gpu.get("beside_bytes", 0)
        high = low + gpu["compute_bytes"] + gpu["staging_bytes"] + (beside if isinstance(beside, int) else 0)
        held = found.get("weights", 0.0) + found.get("context", 0.0)
        name = f"{gpu['device']} ({gpu['name']})"
        expected = f"{low >> 20} MiB of weights and cache on {name}, {high >> 20} MiB with compute"
        if held < low * (LEAST_SHARE_OF_BOUND if found is shared else LEAST_SHARE):
            return _result(False, expected, _shown(told), f"llama-server runs, in part at least, on the CPU: {LOST}")
        if sum(found.values()) > high * MOST_SHARE + MOST_SPARE:
            return _result(False, expected, _shown(told), "llama.cpp allocates more than was planned: it may run out")
    return _result(True, f"the plan's bytes on {', '.join(gpu['device'] for gpu in spec['gpus'])}", _shown(told))


def _result(ok: bool, expected: str, found: str, hint: str = "") -> dict[str, Any]:
    return {"name": "devices", "ok": ok, "expected": expected, "found": found, "hint": hint}


def _shown(told: Told) -> str:
    parts = [f"{sum(held.values()) / MIB:.0f} MiB on {device}" for device, held in sorted(told.items())]
    return ", ".join(parts) or "no buffers at all"


def reported(unit: str, seconds: float = JOURNAL_SECONDS) -> Told | None:
    """Bytes of weights, context and compute by device, of the unit's present start; None where no log tells."""
    start = invocation(unit)
    path = f"{KEPT}/devices-{unit}.json"
    kept = read_json(path)
    if kept and kept["start"] == start:
        told: Told = kept["devices"]
        return told
    deadline = time.monotonic() + seconds
    while True:
        lines = journal(start)
        if LOADED in lines:
            found = parse(lines)
            keep(unit, {"start": start, "devices": found})
            return found
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.2)


def keep(unit: str, told: Dict[str, Any]) -> None:
    """Keep what the log told; in `unwritten`, where this process may not write."""
    try:
        write_json(f"{KEPT}/devices-{unit}.json", told)
    except OSError:
        unwritten.update(told)


def parse(lines: str) -> Told:
    """Sums of the buffers that the load log names. Compute may be reserved anew: its last size counts."""
    told: Told = {}
    for device, kind, size in BUFFER.findall(PROJECTOR.sub("", lines)):
        held = told.setdefault(device, {})
        part = PARTS.get(kind, "context")
        before = 0.0 if part == "compute" else held.get(part, 0.0)
        held[part] = before + float(size) * MIB
    return told


def cause_of_end(unit: str) -> str:
    """Why a server did not start, if it could not use a device; empty if the reason is another."""
    lines = journal(invocation(unit))
    refused, missed = REFUSED.findall(lines), INVALID_DEVICE.findall(lines)
    if refused:
        return str(refused[-1])
    return f"llama-server has no device {missed[-1]}: {LOST}" if missed else ""
