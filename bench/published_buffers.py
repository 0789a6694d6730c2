"""The ledger compared with buffer sizes in published llama.cpp logs from real GPUs.

    python -m bench.published_buffers       writes bench/results/published_buffers.csv

The logs are in bench/data/published-buffers.json, each with its source and with its flags as a placement (`ours`). The
ledger follows llama.cpp b11434 with llamafleet's flags. `as_that_build_mib` is the ledger with the rules of the log's
build (`that_build`, `RULES`) where these are known to differ. The log's `why` explains each remaining difference.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llamafleet.memory.context import Context, cache_cells
from llamafleet.memory.kv_cache import kv_bytes, row_bytes
from llamafleet.memory.ledger import Usage, usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header, read_path
from llamafleet.model.shape import Shape
from sandbox import models, outlines

ROOT = Path(__file__).resolve().parent
LOGS = ROOT / "data" / "published-buffers.json"
REPORTED = ROOT.parent / "tests" / "reported"
RESULTS = ROOT / "results" / "published_buffers.csv"
MIB = 2**20
SAME_MIB = 0.03  # logs print two decimals; token ids and positions add some KiB
HOST = "host"
HOST_NAMES = ("CPU", "CPU_Mapped", "CPU + CUDA_Host", "CUDA_Host", "Vulkan_Host", "Host")


RULES = {
    "mapped": "CPU_Mapped is the stretch of the file from the first to the last tensor on the CPU; what lies between"
    " is counted though it is on a GPU",
    "ffn": "the log's -ot moves all of ffn_*: norms and routers too, which our plans leave on the GPU",
    "inputs": "in builds of 2025 the host's compute buffer beside a GPU is the graph's inputs: masks in f32 and one"
    " hidden state",
    "indexer": "builds before https://github.com/ggml-org/llama.cpp/pull/28330 keep a V beside the indexer's keys,"
    " which nothing reads",
    "logits": "a build that reserves logits for a whole ubatch, not only for the tokens that are asked for",
}


class OlderContext(Context):
    """A context of a build before mid 2025, which reserves logits for every token of a ubatch."""

    @property
    def outputs(self) -> int:
        """Tokens whose logits are computed."""
        return self.batch_tokens


@dataclass(frozen=True)
class Row:
    """One figure of a log beside the ledger's. Differences are the log's figure less the ledger's."""

    source_url: str
    build: str
    model: str
    flags: str
    device: str  # as the log names it
    part: str
    published_mib: float
    ledger_mib: float
    difference_mib: float
    as_that_build_mib: float
    left_mib: float
    rule: str  # of RULES, which `as_that_build_mib` follows
    why: str

    @property
    def is_explained(self) -> bool:
        """Is there no remaining difference, or does the log's `why` explain it?"""
        return abs(self.left_mib) <= SAME_MIB or bool(self.why)


def rows() -> Iterator[Row]:
    """Every figure of every log whose model is a published layout."""
    for log in json.loads(LOGS.read_text())["logs"]:
        header = read_header(log["ours"]["layout"], log["ours"]["mix"])
        now = figures(header, log["ours"], Context)
        then = that_build(header, log["ours"], now)
        for device, part, published in published_figures(log):
            key = f"{HOST if device in HOST_NAMES else device} {part}"
            rule, as_then = then.get(f"{device} {part}") or then.get(key, ("", now[key]))
            yield Row(
                source_url=log["source_url"],
                build=log.get("build", ""),
                model=f"{log['ours']['layout']} {log['ours']['mix']}",
                flags=log["flags"],
                device=device,
                part=part,
                published_mib=published,
                ledger_mib=round(now[key], 2),
                difference_mib=round(published - now[key], 2),
                as_that_build_mib=round(as_then, 2),
                left_mib=round(published - as_then, 2),
                rule=RULES.get(rule, ""),
                why=log.get("why", {}).get(f"{device} {part}", ""),
            )


def that_build(header: Header, ours: Mapping[str, Any], now: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """The rule and the MiB by row, for figures where the log's build or flags are known to follow another rule."""
    by_row: dict[str, tuple[str, float]] = {}
    if ours.get("indexer_values"):
        keys = Shape.of(header).architecture.indexer_rows
        by_row["indexer kv"] = ("indexer", now["indexer kv"] * (keys + 1) / keys)
    if ours.get("logits_of_batch"):
        older = figures(header, ours, OlderContext)
        by_row |= {key: ("logits", mib) for key, mib in older.items() if key.endswith("compute") and mib != now[key]}
        if ours["layers"]:
            by_row[f"{HOST} compute"] = ("inputs", inputs_mib(header, Context(**ours["context"])))
    if first := ours.get("mapped_from"):  # the file's first tensor, on a GPU; the last is on the CPU
        rest = sum(tensor.bytes for tensor in header.tensors if tensor.name != first)
        by_row["CPU_Mapped model"] = ("mapped", rest / MIB)
    if ours.get("ffn_whole"):
        spilled = tuple(f"blk.{layer}.ffn" for layer in range(*ours["spilled"]))
        whole = sum(t.bytes for t in header.tensors if t.name.startswith(spilled))
        more = (whole - sum(Model.of(header).spill_bytes[slice(*ours["spilled"])])) / MIB
        by_row["CUDA0 model"] = ("ffn", now["CUDA0 model"] - more)
        by_row[f"{HOST} model"] = ("ffn", now[f"{HOST} model"] + more)
    return by_row


def inputs_mib(header: Header, context: Context) -> float:
    """MiB of the graph's inputs: an f32 mask for each kind of cache, and the tokens' embeddings."""
    cells = {cache_cells(context, window) for window in Shape.of(header).windows}
    floats = context.ubatch_tokens * (sum(cells) + int(str(header.get("embedding_length"))))
    return floats * 4 / MIB


def published_figures(log: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    for part in ("model", "kv", "compute"):
        for device, mib in log.get(f"{part}_buffers_MiB", {}).items():
            yield device, part, mib


def figures(header: Header, ours: Mapping[str, Any], kind: type[Context]) -> dict[str, float]:
    """MiB by "DEVICE part", with the log's names of devices."""
    context, backend = kind(**ours["context"]), ours["backend"]
    devices, host = usage(Model.of(header), context, placement(header, ours), backend)
    mib_by_part = {
        f"{name(backend, number)} {part}": mib for number, use in devices.items() for part, mib in parts(use)
    }
    shape = Shape.of(header)
    windowed = sum(size for size, window in zip(kv_bytes(shape, context), shape.windows, strict=True) if window)
    whole = {
        "windows kv": windowed / MIB,
        **caches(shape, context),
        "mapped model": Model.of(header).mapped_bytes / MIB,
    }
    return mib_by_part | {f"{HOST} {part}": mib for part, mib in parts(host)} | whole


def caches(shape: Shape, context: Context) -> dict[str, float]:
    """MiB of K and V of all layers together, and of the indexer's keys; without recurrent state."""
    row = row_bytes(shape.architecture.indexer_rows * shape.indexer.key, context.kv_type)
    indexer = sum(shape.indexer.layers) * row * context.stream_cells * context.streams
    layers = zip(kv_bytes(shape, context), shape.state.layers, strict=True)
    attending = sum(size for size, recurrent in layers if not recurrent)
    return {"cells kv": (attending - indexer) / MIB, "indexer kv": indexer / MIB}


def parts(use: Usage) -> Iterator[tuple[str, float]]:
    """Parts of a device's memory with their MiB; as in llama.cpp's log, staging is counted in the compute buffer."""
    yield "model", use.weights_bytes / MIB
    yield "kv", use.kv_bytes / MIB
    yield "compute", (use.compute_bytes + use.staging_bytes) / MIB


def name(backend: str, number: int) -> str:
    """A device's name in logs; Metal is planned as one device with host memory, as Vulkan devices are."""
    return {"cuda": "CUDA", "hip": "ROCm", "vulkan": "Vulkan", "metal": "Metal"}[backend] + str(number)


def placement(header: Header, ours: Mapping[str, Any]) -> Placement:
    holders: list[int | None] = [None] * ours.get("front", 0)
    for device, count in enumerate(ours["layers"]):
        holders += [device] * count
    holders += [None] * (int(str(header.get("block_count"))) - len(holders))
    last = None if ours.get("output_on_host") or not ours["layers"] else len(ours["layers"]) - 1
    return Placement.of((*holders, last), frozenset(range(*ours.get("spilled", (0,)))))


@cache
def read_header(layout: str, mix: str) -> Header:
    """The header of a published layout, or of an outline of `tests/reported`, whose mix is its own."""
    outline = REPORTED / f"{layout}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        if outline.exists():
            return read_path(outlines.weightless(outline, Path(folder)))
        return read_path(models.weightless(Path(folder), layout, mix))


def main() -> None:
    table = [asdict(row) for row in rows()]
    with RESULTS.open("w", newline="") as out:
        writer = csv.DictWriter(out, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
