"""Accuracy of the ledger's memory estimate from the header alone, beside node-llama-cpp's estimate.

    python -m bench.plan_accuracy       writes bench/results/plan_accuracy.csv and plan_accuracy.svg

For every test layout: the memory of one device with all layers, for 8192 tokens in one slot, f16 cache, flash
attention and a ubatch of 512. The reference is the breakdown that llama-server prints before it loads (`--fit` uses the
same figures), on an RPC device, so that it has only weights, KV cache and compute. node-llama-cpp counts logits for a
whole batch, which its own contexts have but llama-server's do not; its estimate is listed with and without them.

Needs node, npm and the oracle's build (made where it is missing).
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import dot_plot
from llamafleet.memory.context import Context
from llamafleet.memory.ledger import usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header, read_path
from llamafleet.model.shape import Shape
from sandbox import models, oracle

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
NODE = ROOT / ".cache" / "node-llama-cpp"
VERSION = "3.22.1"
PACKAGES = (f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}")
MIB = 1024**2
CONTEXT_TOKENS, UBATCH_TOKENS = 8192, 512


def install() -> None:
    """Install node-llama-cpp with its prebuilt binary for the CPU; nothing is compiled and no install script runs."""
    if (NODE / "node_modules" / "node-llama-cpp").is_dir():
        return
    NODE.mkdir(parents=True, exist_ok=True)
    (NODE / "package.json").write_text('{"private": true}\n')
    quiet = ("--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--omit=optional")
    subprocess.run(["npm", "install", *quiet, *PACKAGES], cwd=NODE, check=True)


def node(paths: Sequence[Path]) -> dict[str, dict[str, int]]:
    """node-llama-cpp's estimate for each file; where it fails, `problem` has its error."""
    script = NODE / "node_estimate.mjs"  # beside node_modules, where node searches for imports
    script.write_bytes((ROOT / "bench" / "node_estimate.mjs").read_bytes())
    estimates = {}
    for path in paths:
        done = subprocess.run(["node", str(script), str(path)], cwd=NODE, capture_output=True, text=True, timeout=300)
        estimate = json.loads(done.stdout) if done.returncode == 0 and done.stdout else {"problem": done.stderr[-300:]}
        if "problem" in estimate:
            print(f"{path.name}: node-llama-cpp: {estimate['problem']}")
        estimates[str(path)] = estimate
    return estimates


def ours(header: Header, tokens: int) -> dict[str, int]:
    """The ledger's figures for one device, MiB."""
    model = Model.of(header)
    context = Context(tokens, 1, "f16", UBATCH_TOKENS)
    devices, _ = usage(model, context, Placement.of((0,) * (model.layers + 1)), "cuda")
    parts = {"weights": devices[0].weights_bytes, "kv": devices[0].kv_bytes, "compute": devices[0].compute_bytes}
    return {name: size // MIB for name, size in parts.items()}  # llama-server rounds down too


def rows(paths: Mapping[str, Path]) -> Iterator[dict[str, object]]:
    """One row for each layout."""
    estimated = node(list(paths.values()))
    for name, path in paths.items():
        header = read_path(path)
        tokens = min(CONTEXT_TOKENS, Shape.of(header).context_tokens or CONTEXT_TOKENS)
        flags = ["-c", str(tokens), "-np", "1", "-ngl", "999", "-fa", "on", "-ub", str(UBATCH_TOKENS)]
        [device] = oracle.ask(path, flags, 1).devices
        we = ours(header, tokens)
        estimate = estimated[str(path)]
        row: dict[str, object] = {
            "layout": name, "context_tokens": tokens, "server_mib": device.total, "server_weights_mib": device.model,
            "server_kv_mib": device.context, "server_compute_mib": device.compute, "ours_mib": sum(we.values()),
            "ours_weights_mib": we["weights"], "ours_kv_mib": we["kv"], "ours_compute_mib": we["compute"],
            "ours_error_percent": _percent(sum(we.values()), device.total),
            "node_mib": "", "node_less_logits_mib": "", "node_error_percent": "", "node_less_logits_error_percent": "",
        }  # fmt: skip
        if "problem" not in estimate:
            whole = round((estimate["weights"] + estimate["context"]) / MIB)
            less = whole - round((UBATCH_TOKENS - 1) * Shape.of(header).vocabulary * 4 / MIB)
            row |= {"node_mib": whole, "node_less_logits_mib": less,
                    "node_error_percent": _percent(whole, device.total),
                    "node_less_logits_error_percent": _percent(less, device.total)}  # fmt: skip
        print(row)
        yield row


def _percent(estimate: int, truth: int) -> float:
    return round(100 * (estimate - truth) / truth, 2)


def summary(table: Sequence[Mapping[str, object]], column: str, mib: str) -> str:
    """The median and the worst error as text."""
    known = [row for row in table if row[column] != ""]
    errors = [abs(float(str(row[column]))) for row in known]
    off = max(abs(int(str(row[mib])) - int(str(row["server_mib"]))) for row in known)
    return f"median {statistics.median(errors):.2f} %, worst {max(errors):.2f} % and {off} MiB, of {len(known)} layouts"


def main() -> None:
    install()
    oracle.build()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: models.weightless(Path(folder), name) for name in models.PUBLISHED}
        table = list(rows(paths))
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "plan_accuracy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    series = {
        "llamafleet": ("ours_error_percent", "ours_mib"),
        f"node-llama-cpp {VERSION}": ("node_error_percent", "node_mib"),
        "the same, less its batch's logits": ("node_less_logits_error_percent", "node_less_logits_mib"),
    }
    for name, (column, mib) in series.items():
        print(f"{name}: {summary(table, column, mib)}")
    picture = dot_plot.svg(
        "Estimated memory of one GPU, from the header alone, against llama-server's own figures",
        "error in percent: 8192 tokens, one device, every layer on it",
        [str(row["layout"]) for row in table],
        {name: [row[column] for row in table] for name, (column, _) in series.items()},
    )
    (RESULTS / "plan_accuracy.svg").write_text(picture)


if __name__ == "__main__":
    main()
