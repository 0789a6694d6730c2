"""Bytes of a context checkpoint: the planner's prediction compared with checkpoints that llama-server made.

    python -m bench.checkpoints > bench/results/checkpoints.csv

Tiny models with attention windows, with recurrent state, and with state alone are served by the oracle's build for
the CPU. They read prompts shorter and longer than the window, on all slots at once; at -lv 4 the server logs the size
of every checkpoint in MiB with three decimals.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from llamafleet.memory.checkpoints import checkpoint_bytes
from llamafleet.memory.context import Context
from llamafleet.model.gguf import read_path
from llamafleet.model.shape import Shape
from sandbox import models, oracle

MIB = 2**20
PRINTED_MIB = 0.001  # the log's last digit
KINDS = ("windowed", "hybrid", "recurrent")
PROMPTS = (100, 1000, 2040)  # tokens; the window has 256, a slot 2048
SLOT_TOKENS, UBATCH_TOKENS, BATCH_TOKENS = 2048, 64, 256
COLUMNS = ("model", "kv_type", "slots", "unified", "flash_attention", "slot_tokens", "prompt_tokens", "made",
           "largest_mib", "planned_mib")  # fmt: skip
_CREATED = re.compile(
    r"id\s+(?P<slot>\d+) \| task \d+ \| created context checkpoint (?P<number>\d+) of (?P<most>\d+) "
    r"\(.* n_tokens = (?P<tokens>\d+), size = (?P<mib>[\d.]+) MiB\)"
)


@dataclass(frozen=True)
class Made:
    """A checkpoint that llama-server made."""

    slot: int
    number: int  # of those that the slot has now
    most: int
    tokens: int  # read until then
    mib: float


@dataclass(frozen=True)
class Case:
    """A kind of tiny model, and the context that it is served with."""

    kind: str
    context: Context
    checkpoints: int = 32

    def flags(self) -> list[str]:
        """llama-server's flags, as a plan gives them."""
        context = self.context
        return [
            "--fit", "off", "--ctx-size", str(context.cells * context.slots), "--parallel", str(context.slots),
            "--kv-unified" if context.unified else "--no-kv-unified",
            "--cache-type-k", context.kv_type, "--cache-type-v", context.kv_type,
            "--flash-attn", "on" if context.flash_attention else "off", "--ubatch-size", str(context.ubatch_tokens),
            "--batch-size", str(BATCH_TOKENS), "--ctx-checkpoints", str(self.checkpoints), "--cache-ram", "0",
            "--threads", "1",
        ]  # fmt: skip

    def made(self, folder: Path, prompts: Sequence[int]) -> list[Made]:
        """The checkpoints that llama-server makes of these prompts."""
        return made(models.tiny(folder, self.kind), self.flags(), self.context.slots, prompts)

    def planned_mib(self, folder: Path) -> float:
        """The planner's prediction for one checkpoint."""
        return checkpoint_bytes(Shape.of(read_path(models.tiny(folder, self.kind))), self.context) / MIB


def cases() -> Iterator[Case]:
    """Every kind with both cache types, one slot and several, unified cache or not; and without flash attention."""
    for kind, kv_type, (slots, unified) in product(KINDS, ("f16", "q8_0"), ((1, False), (4, False), (4, True))):
        yield Case(kind, Context(SLOT_TOKENS, slots, kv_type, UBATCH_TOKENS, unified=unified))
    yield Case("windowed", Context(SLOT_TOKENS, 4, "f16", UBATCH_TOKENS, flash_attention=False))
    yield Case("windowed", Context(256, 2, "f16", UBATCH_TOKENS))  # a context no larger than the window


def made(model: Path, flags: Sequence[str], slots: int, prompts: Sequence[int]) -> list[Made]:
    """The checkpoints of these prompts, which each slot reads one after another, all slots at once."""
    log, port = model.with_suffix(".log"), oracle.free_port()
    command = [oracle.build().llama_server, "--model", model, *flags, "--port", str(port), "-lv", "4"]
    with oracle.serving(command, port, log) as url, ThreadPoolExecutor(slots) as pool:
        list(pool.map(lambda slot: [_read(url, slot, tokens) for tokens in prompts], range(slots)))
    return list(_parsed(log.read_text()))


def _read(url: str, slot: int, tokens: int) -> None:
    """Let a slot read a prompt of `tokens` tokens; all prompts begin with the same tokens."""
    prompt = [100 + (7 * n + slot) % 300 for n in range(tokens)]
    body = {"prompt": prompt, "n_predict": 1, "id_slot": slot, "cache_prompt": True}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()


def _parsed(log: str) -> Iterator[Made]:
    for match in _CREATED.finditer(log):
        numbers = (int(match[name]) for name in ("slot", "number", "most", "tokens"))
        yield Made(*numbers, mib=float(match["mib"]))


def main() -> None:
    """Print one line for each case and prompt's length: the largest checkpoint made."""
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        for case in cases():
            context, planned = case.context, case.planned_mib(Path(name))
            for tokens in sorted({min(tokens, context.cells - 8) for tokens in PROMPTS}):
                checkpoints = case.made(Path(name), [tokens])
                out.writerow([case.kind, context.kv_type, context.slots, context.unified, context.flash_attention,
                              context.cells, tokens, len(checkpoints), f"{max(made.mib for made in checkpoints):.3f}",
                              f"{planned:.4f}"])  # fmt: skip
                sys.stdout.flush()


if __name__ == "__main__":
    main()
