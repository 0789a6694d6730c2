"""Predicted and measured speeds of every published case that names its hardware.

    python -m bench.published_cases > bench/results/published_cases.csv

For each case the speed is predicted twice: for the author's own flags, if they give the placement, and for the plan
that llamafleet makes for that machine. Every plan must fit, except for models that are too large for their machine:
these must be refused. The median errors, over all cases and without the unusual cases, go to standard error.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from llamafleet.cli.arguments import default_data
from llamafleet.host.backends import TRAITS
from llamafleet.host.gpus import find
from llamafleet.host.machine import Machine
from llamafleet.host.speeds import rates
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import NO_CORRECTION
from llamafleet.memory.placement import Segment
from llamafleet.memory.weights import Model, is_mapped
from llamafleet.model.gguf import Header, Tensor, read_path
from llamafleet.planner.backend import capacity_of, resolve_backend
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan
from llamafleet.planner.roofline import Prediction, Roofline
from llamafleet.planner.search import Candidate, Search
from llamafleet.settings.schema import Settings
from llamafleet.settings.workload import Workload
from llamafleet.units import MIB
from sandbox import outlines
from sandbox.layouts import PUBLISHED
from sandbox.models import weightless

GIB = 1024**3
DATA = Path(__file__).parent / "data/published-cases.json"
REPORTED = Path(__file__).resolve().parents[1] / "tests" / "reported"
CONTEXT, PROMPT, REPLY, CORES = 8192, 512, 128, 8  # defaults for cases without these values
# RAM of a case that gives none: the size of the model's files and this for the rest.
SPARE_GIB = 24

Case = Mapping[str, Any]
COLUMNS = (
    *("model", "quant", "gpus", "cpu", "flags"),
    *("decode_measured", "decode_theirs", "decode_low", "decode_high", "decode_plan"),
    *("prefill_measured", "prefill_theirs", "prefill_plan", "fits", "plan", "remark", "source_url"),
)


def main() -> None:
    """Print the table to standard output and the medians to standard error."""
    data = read()
    table = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    table.writeheader()
    rows = [row(case, data["numbers"]) for case in data["cases"]]
    wrong = [line["flags"] for line, case in zip(rows, data["cases"], strict=True) if not as_expected(line, case)]
    assert not wrong, f"refused although the model fits, or planned although it is too large: {wrong}"
    table.writerows({key: line.get(key, "") for key in COLUMNS} for line in rows)
    for line in summary(rows, data["cases"]):
        print(line, file=sys.stderr)


def read() -> dict[str, Any]:
    """The cases, and the main numbers of models that are not among the test layouts."""
    data: dict[str, Any] = json.loads(DATA.read_text())
    return data


def median(rows: list[dict[str, Any]], cases: list[Case], speed: str, *, usual: bool) -> float:
    """Median error of "decode" or "prefill"; `usual`: without the cases that are marked as unusual."""
    return statistics.median(errors(rows, cases, speed, usual=usual))


def errors(rows: list[dict[str, Any]], cases: list[Case], speed: str, *, usual: bool) -> list[float]:
    """The error of every case whose predicted and measured speeds are known."""
    return [
        error(line[f"{speed}_theirs"], line[f"{speed}_measured"])
        for line, case in zip(rows, cases, strict=True)
        if not (usual and "unusual" in case) and line.get(f"{speed}_theirs") and line.get(f"{speed}_measured")
    ]


def as_expected(line: Mapping[str, Any], case: Case) -> bool:
    """Does the plan fit, or is it refused for a model that is too large? Always true for a skipped case."""
    return "skipped" in case or (line["fits"] == "yes") is not case.get("too_large", False)


def summary(rows: list[dict[str, Any]], cases: list[Case]) -> list[str]:
    """The median errors as text. An error is a factor less one: twice as fast and half as fast are both 100 %."""
    lines = [f"{len(rows)} cases, {sum('skipped' in case for case in cases)} of models whose numbers are not known"]
    for usual, name in ((False, "all"), (True, "without the unusual")):
        for speed in ("decode", "prefill"):
            case_errors = errors(rows, cases, speed, usual=usual)
            lines.append(
                f"{speed}, {name}: {len(case_errors)} cases, median error {statistics.median(case_errors):.0%}"
            )
    usual_rows = [line for line, case in zip(rows, cases, strict=True) if "unusual" not in case]
    known = [line for line in usual_rows if line.get("decode_theirs") and line.get("decode_measured")]
    inside = sum(line["decode_low"] <= line["decode_measured"] <= line["decode_high"] for line in known)
    lines.append(f"decode, without the unusual: {inside} of {len(known)} measured speeds are between low and high")
    lines.append(f"plans: {sum(line.get('fits') == 'yes' for line in rows)} fit")
    return lines


def error(predicted: float, measured: float) -> float:
    """The factor between the two speeds (at least 1) less one."""
    return math.exp(abs(math.log(predicted / measured))) - 1


def row(case: Case, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The table's row for one case."""
    line: dict[str, Any] = {
        "model": case["model"],
        "quant": case["quant"],
        "gpus": " + ".join(gpu["name"] for gpu in case["gpus"]),
        "cpu": case.get("cpu", ""),
        "flags": case["flags"],
        "decode_measured": case.get("decode_tokens_per_s", ""),
        "prefill_measured": case.get("prefill_tokens_per_s", ""),
        "remark": case.get("skipped") or case.get("unusual") or case.get("assumed", ""),
        "source_url": case["source_url"],
    }
    if "skipped" in case:
        return line
    header = header_of(case, numbers)
    host, settings = machine(case, header), settings_for(case, header)
    [answer] = plan_host(host, [(settings.models[0], header)], settings)
    line["fits"] = "yes" if isinstance(answer, Plan) else "no: " + answer.reason
    if isinstance(answer, Plan):
        line["decode_plan"] = answer.predicted.decode_tokens_per_s
        line["prefill_plan"] = answer.predicted.prefill_tokens_per_s
        placed = answer.placement
        line["plan"] = f"-ngl {placed.gpu_layers}, {len(placed.spilled)} spilled, ub {answer.ubatch_tokens}"
    if theirs := as_flagged(case, header, host, settings):
        line["decode_theirs"], line["prefill_theirs"] = theirs.decode_tokens_per_s, theirs.prefill_tokens_per_s
        line["decode_low"], line["decode_high"] = theirs.decode_low_tokens_per_s, theirs.decode_high_tokens_per_s
    return line


def as_flagged(case: Case, header: Header, host: Machine, settings: Settings) -> Prediction | None:
    """The speed predicted for the author's own flags; None if they do not give the placement."""
    if len(case["gpus"]) > 1:
        return None
    search, context = search_for(case, header, host, settings)
    if case.get("fit"):
        candidate = fitted(search, context)
        return search.roofline.predict(candidate.order, candidate.segments, context) if candidate else None
    layers, moved = search.model.layers, search.movable
    if "gpu_layers" in case:
        front = max(0, layers + 1 - case["gpu_layers"])
        segments = [Segment(0, front, layers, layers)]
        segments = [Segment(None, 0, front, front), *segments] if front else segments
    elif "n_cpu_moe" in case or case.get("n_cpu_ffn"):
        away = min(len(moved), case.get("n_cpu_moe", case.get("n_cpu_ffn", 0)))
        segments = [Segment(0, 0, layers, moved[-away] if away else layers)]
    else:
        return None
    return search.roofline.predict((0,), segments, context)


def fitted(search: Search, context: Context) -> Candidate | None:
    """The placement of llama.cpp's --fit: experts of the last layers, or whole front layers, on the CPU."""
    wanted = ("none", "spill") if search.model.is_moe else ("none", "layers")
    return next((candidate for candidate in search.candidates([(context, 1.0)]) if candidate.kind in wanted), None)


def search_for(case: Case, header: Header, host: Machine, settings: Settings) -> tuple[Search, Context]:
    """The planner's search and context, to predict a placement that the planner did not choose."""
    instance, backend = settings.models[0], resolve_backend(host, settings)
    assert isinstance(backend, str)
    capacity = capacity_of(host, host.usable_gpus, settings)
    tokens = instance.context_tokens or CONTEXT
    reached = rates(host.cpu, capacity.gpus, instance.threads or CORES)
    model = Model.of(header)
    roofline = Roofline(model, Workload.of(instance, tokens), reached, op_offload=TRAITS[backend].op_offload)
    context = Context(tokens, case.get("slots", 1), case.get("kv_type", "f16"), case.get("ubatch_tokens", 512))
    return Search(model, capacity, backend, 0, NO_CORRECTION, roofline), context


def settings_for(case: Case, header: Header) -> Settings:
    """Settings with the case's context and workload; ubatch and placement are left to the plan."""
    trained = header.get("context_length")
    most = trained if isinstance(trained, int) else 262144
    entry = {
        "name": "case", "source": "/model.gguf", "port": 9000, "threads": case.get("cores", CORES),
        "context_tokens": min(case.get("context_tokens", CONTEXT), most), "kv_types": [case.get("kv_type", "f16")],
        "prompt_tokens": case.get("prompt_tokens", PROMPT), "reply_tokens": REPLY,
        "live_tokens": case.get("live_tokens", case.get("prompt_tokens", PROMPT)),
    }  # fmt: skip
    return Settings.from_data({**default_data(), "models": [entry]})


def machine(case: Case, header: Header) -> Machine:
    """The case's machine."""
    needed = header.file_bytes_total / GIB + SPARE_GIB
    ram = int((case.get("ram_gib") or math.ceil(needed / 16) * 16) * GIB)
    budget = case.get("gpu_budget_gib")
    cores = case.get("cores", CORES)
    return Machine.from_json({
        "schema": 1, "hostname": "case", "os": {"id": "debian", "version": "13", "arch": "x86_64", "libc": "2.41"},
        "cpu": {"model": case.get("cpu", ""), "sockets": 1, "physical_cores": cores, "logical_cores": 2 * cores,
                "performance_cores": cores, "numa_nodes": 1, "flags": ["avx2"]},
        "memory": {"total_bytes": ram, "available_bytes": ram, "swap_total_bytes": 0},
        "gpus": [gpu(number, entry, budget) for number, entry in enumerate(case["gpus"])],
        "driver": {"nvidia": None, "cuda": None}, "disks": [],
    })  # fmt: skip


def gpu(number: int, entry: Mapping[str, Any], budget_gib: float | None) -> dict[str, Any]:
    """One of the machine's GPUs; memory beyond the case's budget, reserve and overhead counts as used by others."""
    known = find(entry["name"], int(entry["gib"] * GIB))
    size = known.memory_bytes if known else int(entry["gib"] * GIB)
    used = max(0, size - int(budget_gib * GIB) - 512 * MIB) if budget_gib else 0
    return {
        "index": number, "uuid": f"GPU-{number}", "name": entry["name"], "compute_capability": None,
        "memory_total_bytes": size, "memory_used_by_others_bytes": used, "pci_bus_id": f"0000:{number + 1:02x}:00.0",
        "pcie_generation": None, "pcie_width": entry.get("pcie_width"), "unified_memory": False,
        "vendor": known.vendor if known else "nvidia",
    }  # fmt: skip


def header_of(case: Case, numbers: Mapping[str, Any]) -> Header:
    """The model's header; the tensors' sizes are scaled to the size of the published file."""
    name = case["layout"]
    header = published(name) if name not in numbers else built(name, numbers[name])
    if "model_gib" not in case:
        return header
    # A table that is mapped from the file has its own type in every mix.
    mapped = {tensor.name for tensor in header.tensors if is_mapped(tensor)}
    kept = sum(tensor.bytes for tensor in header.tensors if tensor.name in mapped)
    scale = (case["model_gib"] * GIB - kept) / (sum(tensor.bytes for tensor in header.tensors) - kept)
    tensors = tuple(
        tensor if tensor.name in mapped else replace(tensor, bytes=int(tensor.bytes * scale))
        for tensor in header.tensors
    )
    return replace(header, tensors=tensors, file_bytes=(int(case["model_gib"] * GIB),))


@cache
def published(name: str) -> Header:
    """The header of a published test layout, or of an outline of `tests/reported`."""
    with tempfile.TemporaryDirectory() as folder:
        if name not in PUBLISHED:
            return read_path(outlines.weightless(REPORTED / f"{name}.yaml", Path(folder)))
        return read_path(weightless(Path(folder), name))


def built(name: str, its: Mapping[str, Any]) -> Header:
    """A header from a model's main numbers: for each layer one attention matrix and three feed-forward matrices."""
    arch, embd, heads, kv, size = (its[key] for key in ("architecture", "embd", "heads", "kv_heads", "head_dim"))
    given = {
        "block_count": its["blocks"], "embedding_length": embd, "attention.head_count": heads,
        "attention.head_count_kv": kv, "attention.key_length": size, "attention.value_length": size,
        "feed_forward_length": its["ff"], "expert_feed_forward_length": its["ff"], "context_length": 262144,
        "expert_count": its.get("experts", 0), "expert_used_count": its.get("experts_used", 0),
        "vocab_size": its["vocab"], "full_attention_interval": its.get("full_attention_interval", 0),
        "ssm.inner_size": its.get("ssm_inner", 0), "ssm.state_size": its.get("ssm_state", 0),
        "ssm.group_count": its.get("ssm_groups", 0), "ssm.conv_kernel": its.get("ssm_conv", 0),
        "ssm.time_step_rank": its.get("ssm_inner", 0) // 128,
    }  # fmt: skip
    metadata = {f"{arch}.{key}": value for key, value in given.items() if value}
    shapes = [("token_embd.weight", (embd, its["vocab"])), ("output.weight", (embd, its["vocab"]))]
    for layer in range(its["blocks"]):
        interval = its.get("full_attention_interval", 0)
        wide = (heads + kv) * size * 2
        if interval and (layer + 1) % interval:
            wide = 3 * its["ssm_inner"] + 2 * its["ssm_groups"] * its["ssm_state"]
        shapes.append((f"blk.{layer}.attn_qkvo.weight", (embd, wide)))
        experts = its.get("experts", 0)
        suffix, many = ("_exps", (experts,)) if experts else ("", ())
        shapes += [
            (f"blk.{layer}.ffn_{part}{suffix}.weight", (embd, its["ff"], *many)) for part in ("up", "gate", "down")
        ]
        if its.get("shared_ff"):
            shapes.append((f"blk.{layer}.ffn_shexp.weight", (embd, 3 * its["shared_ff"])))
    tensors = tuple(Tensor(key, shape, "Q4_K", 0, math.prod(shape) * 9 // 16, 0) for key, shape in shapes)
    return Header(3, arch, {**metadata, "general.name": name}, tensors, (sum(tensor.bytes for tensor in tensors),))


if __name__ == "__main__":
    main()
