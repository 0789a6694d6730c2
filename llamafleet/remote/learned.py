"""What this host has measured of its own speed: the memory's bandwidth, once, and what gates found.

Part of survey.py and under its contract: Python 3.8, standard library and psutil; common.py and probe_bandwidth.py lie
beside it. Changes nothing. Records may be damaged or of another version: what cannot be used counts as not measured.
"""

from __future__ import annotations

import statistics
from typing import Any, Dict, Iterator, List

import probe_bandwidth
from common import GATE_SCHEMA, GATES, INSTANCES, PLAN_SCHEMA, later_schema, listing, plan_path, read_json

RATES = ("decode_tokens_per_s", "prompt_tokens_per_s", "host_bytes_per_s", "host_flops")


def bandwidth(machine: Dict[str, Any]) -> Dict[str, Any]:
    """{"bytes_per_s": float | null, "core_steps_per_s": float | null, "hardware", "why"}: as a plan.json has it, where
    one of an earlier release has no steps; or measured now."""
    hardware = probe_bandwidth.hardware(machine)
    kept = next((value for value in recorded() if value.get("hardware") == hardware), None)
    if kept is not None:
        steps: Any = kept.get("core_steps_per_s")
        return {
            "bytes_per_s": float(kept["bytes_per_s"]), "core_steps_per_s": float(steps) if is_rate(steps) else None,
            "hardware": hardware, "why": "",
        }  # fmt: skip
    cpu = machine["cpu"]
    threads = cpu["performance_cores"] or cpu["physical_cores"]
    return {**probe_bandwidth.measured(threads), "hardware": hardware}


def recorded() -> Iterator[Dict[str, Any]]:
    """The probe's figures in the plans of installed instances."""
    for name in listing(INSTANCES):
        found: Any = read_json(plan_path(name))
        if later_schema(found, PLAN_SCHEMA):
            continue
        for key in ("inputs", "rates", "probe"):
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and is_rate(found.get("bytes_per_s")):
            yield found


def gate_speeds() -> List[Dict[str, Any]]:
    """What the gates measured and what was expected, an object for each record that has both; of the last speeds of an
    instance the median."""
    found = []
    for name in listing(GATES):
        record = read_json(f"{GATES}/{name}") if name.endswith(".json") else {}
        expected: Any = record.get("expected")
        speeds: Any = record.get("speeds")
        if later_schema(record, GATE_SCHEMA) or not is_expected(expected) or not isinstance(speeds, list):
            continue
        speeds = [speed for speed in speeds if is_rate(speed)]
        prompt: Any = record.get("prompt_tokens_per_s")
        if speeds:
            found.append({
                "instance": name[: -len(".json")], "decode_tokens_per_s": float(statistics.median(speeds)),
                "prompt_tokens_per_s": float(prompt) if is_rate(prompt) else None, "expected": as_floats(expected),
            })  # fmt: skip
    return found


def gated() -> Dict[str, Dict[str, Any]]:
    """By instance the speeds that its gates measured, with the model and flags of the last one."""
    found = {}
    for name in listing(GATES):
        record = read_json(f"{GATES}/{name}") if name.endswith(".json") else {}
        kept: Any = record.get("speeds")
        measured: List[Any] = kept if isinstance(kept, list) else [record.get("decode_tokens_per_s")]
        speeds = [float(speed) for speed in measured if is_rate(speed)]
        inputs: Any = record.get("read_speeds")
        read = [float(speed) for speed in inputs if is_rate(speed)] if isinstance(inputs, list) else []
        if read and not speeds and not later_schema(record, GATE_SCHEMA):  # of a server that writes nothing
            found[name[: -len(".json")]] = {
                "decode_tokens_per_s": None, "prompt_tokens_per_s": float(statistics.median(read)),
            }  # fmt: skip
        if speeds and not later_schema(record, GATE_SCHEMA):
            prompt: Any = record.get("prompt_tokens_per_s")
            found[name[: -len(".json")]] = {
                "decode_tokens_per_s": statistics.median(speeds),
                "prompt_tokens_per_s": float(prompt) if is_rate(prompt) else None,
            }
    return found


def is_expected(value: Any) -> bool:
    """Is it what plan.json says of the gate's own request?"""
    if not isinstance(value, dict) or not all(is_rate(value.get(name)) for name in RATES):
        return False
    gpus = value.get("gpu_bytes_per_s")
    by_gpu = isinstance(gpus, dict) and len(gpus) <= 256 and all(map(is_rate, gpus.values()))
    return by_gpu and value.get("computed_on") in ("host", "gpus", "both")


def as_floats(value: Dict[str, Any]) -> Dict[str, Any]:
    """Those of its values that are used; JSON may have written a whole number."""
    gpus = {str(uuid): float(rate) for uuid, rate in value["gpu_bytes_per_s"].items()}
    return {
        **{name: float(value[name]) for name in RATES}, "computed_on": value["computed_on"], "gpu_bytes_per_s": gpus
    }  # fmt: skip


def is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e18
