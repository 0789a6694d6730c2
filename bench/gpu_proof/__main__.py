"""Ours, planned and tuned, against `--fit on` as it ships, and `-ngl`, `--cpu-moe` and `--n-cpu-moe` by hand.

    python -m bench.gpu_proof --work /var/tmp/proof --minutes 15

Compiles llama-server for the card (`--server` gives a finished one), writes random-weight models of real shapes,
limits the card to 8, 12 and 24 GB, and adds a row to WORK/gpu_proof.csv for each finished cell, the most telling first.
It ends within `--minutes`; run again, it goes on with what is missing. It draws prefill.svg and decode.svg, too.

It needs an NVIDIA driver, the CUDA toolkit, cmake, g++, taskset and Python from 3.11 on with numpy, gguf, pydantic,
psutil and nvidia-ml-py; 40 GB of disk, 40 GB of RAM; no root and no network. On a machine without a network: fetch the
wheels elsewhere with `python -m pip download -d wheels numpy gguf pydantic psutil nvidia-ml-py`, bring them with the
checkout and llama.cpp's source (`--source`: a tree or its git repository; by default .cache/upstream of the checkout),
then

    python3 -m venv proof-venv
    proof-venv/bin/pip install --no-index --find-links wheels numpy gguf pydantic psutil nvidia-ml-py
    proof-venv/bin/python -m bench.gpu_proof --work /var/tmp/proof

`--backend vulkan --scale tiny` does the same with small models on whatever Vulkan lists, such as Mesa's llvmpipe; the
limit is emulated there (see card.py). Exit status: 0 rows were written, or all were there; 1 nothing could be measured.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.gpu_proof import building, card, cells, rows, shapes
from bench.gpu_proof.approaches import Model, Proof
from bench.gpu_proof.cells import Cell
from bench.gpu_proof.serving import Launch
from llamafleet.host.machine import Machine
from llamafleet.model.gguf import read_path
from llamafleet.units import MIB

BUILD_SECONDS = 420.0  # at most, so that the rest of the time is left to measure
ENDING_SECONDS = 5.0


@dataclass(frozen=True)
class Scale:
    """What is measured by default: MiB of the card, contexts in tokens, the workload's tokens and runs; the plans'
    reserve in MiB (None: the default), the seconds of a tune, and the room that the models need on disk."""

    limits: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt: int
    reply: int
    runs: int
    reserve_mib: int | None
    tune_seconds: float
    disk_mib: int


SCALES = {
    "real": Scale((8192, 12288, 24576), (1024, 32768), 2048, 48, 3, None, 300.0, 38 * 1024),
    "tiny": Scale((288, 304, 336), (256, 512), 48, 8, 2, 0, 60.0, 512),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    options = _parser().parse_args(arguments)
    over = time.monotonic() + 60 * options.minutes - ENDING_SECONDS
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "gpu_proof.csv"
    found: list[rows.Row] = []
    try:
        proof, models = _prepared(options, over)
        wanted = _wanted(options, models)
        found = rows.read(path, proof.setting)
        for row in _measured(proof, models, wanted, found, over):
            rows.add(path, row)
            found.append(row)
            for what in ("prefill", "decode"):
                (options.work / f"{what}.svg").write_text(rows.plot(found, what))
    except (building.BuildError, card.CardError, ValueError) as error:
        say(f"gpu_proof: {error}")
        return 1
    except KeyboardInterrupt:
        say("gpu_proof: interrupted: run again to go on")
        return 1
    missing = len(set(wanted) - {one.cell for one in found})
    say(f"{len(found)} rows in {path}; {missing} cells are missing" + (": run again to go on" if missing else ""))
    return 0 if found else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_proof", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the build, the models and the results")
    parser.add_argument("--minutes", type=float, default=15.0, help="all of it, with compiling (default 15)")
    parser.add_argument("--backend", choices=("cuda", "vulkan"), default="cuda")
    parser.add_argument("--scale", choices=tuple(SCALES), default="real", help="tiny: small models, to try it")
    parser.add_argument("--server", type=Path, help="a finished llama-server in place of compiling one")
    parser.add_argument("--source", type=Path, help=f"llama.cpp's source of {building.TAG}: a tree or a git repository")
    parser.add_argument("--models", nargs="+", choices=tuple(shapes.layouts("real")), help="these alone")
    parser.add_argument("--limits", nargs="+", type=int, metavar="MIB", help="memory of the card")
    parser.add_argument("--contexts", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--approaches", nargs="+", choices=cells.APPROACHES, help="these alone")
    parser.add_argument("--tune-seconds", type=float, help="of each tune")
    return parser


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


# --- before anything is measured ----------------------------------------------------------------------


def _prepared(options: argparse.Namespace, over: float) -> tuple[Proof, dict[str, Model]]:
    """All that is needed to measure. Raises BuildError, CardError, MachineError."""
    scale, backend, work = SCALES[options.scale], options.backend, options.work.absolute()
    host = card.host_machine()
    if lacking := list(_lacking(options, host)):
        raise building.BuildError("what is missing here:\n" + "\n".join(f"  {one}" for one in lacking))
    began = time.monotonic()
    server = options.server or building.server(
        work / f"build-{backend}",
        options.source,
        backend,
        replace(host, gpus=host.gpus[:1]),
        min(over, began + BUILD_SECONDS),
    )
    say(f"llama-server: {server} ({time.monotonic() - began:.0f} s)")
    variables = card.environment(backend, work) | ({} if options.server else building.libraries(backend, host))
    find = partial(card.find, server.absolute(), backend, variables)
    device = find()
    say(f"card: {device.device}, {device.name}, {device.free_mib} of {device.total_mib} MiB free")

    def launch(model: Model) -> Launch:
        vocabulary = int(model.header.get("vocab_size") or 0)
        return Launch(server.absolute(), model.path, vocabulary, variables, work, over)

    proof = Proof(
        rows.Setting(device.name, building.TAG, options.scale), device, find, host, launch,
        lambda context: cells.workload(context, scale.prompt, scale.reply, scale.runs),
        options.tune_seconds or scale.tune_seconds, scale.reserve_mib, say,
    )  # fmt: skip
    return proof, dict(_models(options))


def _lacking(options: argparse.Namespace, host: Machine) -> Iterator[str]:
    """What this machine lacks, with the way out."""
    if options.backend == "cuda":
        gpu = next(iter(host.gpus), None)
        if gpu is None or gpu.vendor != "nvidia":
            yield "an NVIDIA card that its driver lists (see nvidia-smi), and nvidia-ml-py in this Python"
        elif gpu.problem or gpu.unified_memory:
            yield f"memory of its own that can be held: {gpu.name}: {gpu.problem or 'it has the memory of the CPU'}"
    if not options.server:
        yield from building.lacking(options.backend, options.source, host)
    elif not options.server.is_file():
        yield f"{options.server}, which --server names"
    written = sum(one.stat().st_blocks * 512 for one in options.work.glob("*.gguf"))
    free, needed = shutil.disk_usage(options.work).free + written, SCALES[options.scale].disk_mib * MIB
    if free < needed:
        yield f"{(needed - free) // MIB} MiB of disk in {options.work}: give another --work"


def _models(options: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    """The models by name, written where they are not there."""
    for name, layout in shapes.layouts(options.scale).items():
        if not options.models or name in options.models:
            began = time.monotonic()
            path = shapes.write(layout, options.work)
            say(f"model: {path.name}, {path.stat().st_size / 2**30:.2f} GiB ({time.monotonic() - began:.0f} s)")
            yield name, Model(name, path, read_path(path), layout.experts > 0)


def _wanted(options: argparse.Namespace, models: Mapping[str, Model]) -> list[Cell]:
    scale = SCALES[options.scale]
    every = cells.cells({name: model.is_moe for name, model in models.items()}, options.limits or scale.limits,
                        options.contexts or scale.contexts)  # fmt: skip
    return [one for one in every if not options.approaches or one.approach in options.approaches]


# --- measuring ----------------------------------------------------------------------------------------


def _measured(
    proof: Proof, models: Mapping[str, Model], wanted: Sequence[Cell], done: Sequence[rows.Row], over: float
) -> Iterator[rows.Row]:
    """A row for each cell that is not done, while there is time. The card is limited as long as the limit stays."""
    took = [(one.cell, one.took_seconds) for one in done]
    left = [one for one in wanted if one not in {cell for cell, _ in took}]

    def fitting() -> list[Cell]:
        return cells.fitting(left, took, over - time.monotonic(), proof.tune_seconds)

    now = fitting()
    say(f"{len(left)} cells are missing, {len(now)} of them probably fit into {over - time.monotonic():.0f} s:")
    say("\n".join(f"  {one}" for one in now))
    with ExitStack() as held:
        limit = 0
        while now := fitting():
            cell = now[0]
            if cell.limit_mib != limit:
                held.close()
                try:
                    held.enter_context(card.limited(proof.card, cell.limit_mib))
                except card.CardError as error:
                    say(f"{cell.limit_mib} MiB: left out: {error}")
                    left[:] = [one for one in left if one.limit_mib != cell.limit_mib]
                    limit = 0
                    continue
                limit = cell.limit_mib
            left.remove(cell)
            say(f"{cell} ({over - time.monotonic():.0f} s left)")
            row = proof.row(cell, models[cell.model])
            if row.error and time.monotonic() >= over:
                return  # its time was over, which says nothing of the flags
            said = row.error or f"{row.chosen}: prefill {row.prefill}, decode {row.decode} tokens/s"
            say(f"  {said}")
            took.append((cell, float(row.took_seconds)))
            yield row


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
