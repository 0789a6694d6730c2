"""Ours, planned and tuned, against `--fit on` as it ships, and `-ngl`, `--cpu-moe` and `--n-cpu-moe` by hand.

    python -m bench.gpu_proof --work /var/tmp/proof --minutes 15

Compiles llama-server for the card (`--server` gives a finished one), writes random-weight models of real shapes,
limits the card to 8, 12 and 24 GB, and adds a row to WORK/gpu_proof.csv for each finished cell, the most telling first.
It ends within `--minutes`; run again, it goes on with what is missing. It draws prefill.svg and decode.svg, too.

It needs an NVIDIA driver, the CUDA toolkit, cmake, g++ and Python from 3.11 on with numpy, gguf, pydantic, psutil and
nvidia-ml-py; 40 GB of disk; no root and no network. On a machine without a network: fetch the wheels elsewhere with
`python -m pip download -d wheels numpy gguf pydantic psutil nvidia-ml-py`, bring them with the checkout and llama.cpp's
source (`--source`: a tree, its archive or a bare repository; by default .cache/upstream of the checkout), then

    python3 -m venv proof-venv
    proof-venv/bin/pip install --no-index --find-links wheels numpy gguf pydantic psutil nvidia-ml-py
    proof-venv/bin/python -m bench.gpu_proof --work /var/tmp/proof

`--backend vulkan --scale tiny` does the same with small models on whatever Vulkan lists, such as Mesa's llvmpipe; the
limit is emulated there (see card.py). Exit status: 0 rows were written, or all were there; 1 nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from bench.gpu_proof import building, card, cells, rows, shapes
from bench.gpu_proof.approaches import Model, Proof, described
from bench.gpu_proof.cells import Cell
from bench.gpu_proof.serving import Launch
from llamafleet.model.gguf import read_path

# By scale: MiB that the card is limited to, contexts in tokens, and the plans' reserve (None: the default).
LIMITS = {"real": (8192, 12288, 24576), "tiny": (276, 296, 400)}
CONTEXTS = {"real": cells.CONTEXTS, "tiny": (256, 1024)}
RESERVES = {"real": None, "tiny": 0}
BUILD_SECONDS = 420.0  # of which the rest of the time is spared
ENDING_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    options = _parser().parse_args(arguments)
    over = time.monotonic() + 60 * options.minutes - ENDING_SECONDS
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        proof, models, wanted = _prepared(options, over)
    except (building.BuildError, card.CardError, ValueError) as error:
        say(f"gpu_proof: {error}")
        return 1
    path = options.work / "gpu_proof.csv"
    found = rows.read(path, proof.setting)
    try:
        for row in _measured(proof, models, wanted, found, over):
            rows.add(path, row)
            found.append(row)
            _draw(options.work, found)
    except card.CardError as error:
        say(f"gpu_proof: {error}")
    except KeyboardInterrupt:
        say("gpu_proof: interrupted; run again to go on")
    missing = len(set(wanted) - {one.cell for one in found})
    say(f"{len(found)} rows in {path}; {missing} cells are left" + (": run again to go on" if missing else ""))
    if options.json:
        print(json.dumps({"rows": [asdict(one) for one in found], "left": missing}, indent=1))
    return 0 if found else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_proof", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the build, the models and the results")
    parser.add_argument("--minutes", type=float, default=15.0, help="all of it, with compiling (default 15)")
    parser.add_argument("--backend", choices=("cuda", "vulkan"), default="cuda")
    parser.add_argument("--scale", choices=tuple(LIMITS), default="real", help="tiny: small models, to try it")
    parser.add_argument("--server", type=Path, help="a finished llama-server in place of compiling one")
    parser.add_argument("--source", type=Path, help=f"llama.cpp's source of {building.TAG}: tree, archive, repository")
    parser.add_argument("--models", nargs="+", choices=tuple(shapes.layouts("real")), help="these alone")
    parser.add_argument(
        "--limits", nargs="+", type=int, metavar="MIB", help="memory of the card, in place of the default"
    )
    parser.add_argument("--contexts", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--approaches", nargs="+", choices=cells.APPROACHES, help="these alone; -ngl as =-ngl")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON at the end")
    return parser


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def _prepared(options: argparse.Namespace, over: float) -> tuple[Proof, dict[str, Model], list[Cell]]:
    """All that is needed to measure. Raises BuildError, CardError, MachineError."""
    host = card.host_machine()
    capability = next((gpu.compute_capability for gpu in host.gpus if gpu.usable), None)
    began = time.monotonic()
    server = options.server or building.server(
        (options.work / f"build-{options.backend}").absolute(), options.source, options.backend, capability,
        min(over, began + BUILD_SECONDS),
    )  # fmt: skip
    say(f"llama-server: {server} ({time.monotonic() - began:.0f} s)")
    environment = {"GGML_VK_VISIBLE_DEVICES": "0"} if options.backend == "vulkan" else {"CUDA_VISIBLE_DEVICES": "0"}
    device = card.find(server, options.backend, {**os.environ, **environment})
    say(f"card: {device.device}, {device.name}, {device.free_mib} of {device.total_mib} MiB free")
    models = dict(_models(options))
    setting = rows.Setting(device.name, building.TAG, options.scale)

    def launch(model: Model) -> Launch:
        return Launch(server.absolute(), model.path, model.vocabulary, environment, options.work, over)

    wanted = cells.cells(
        {name: model.is_moe for name, model in models.items()}, options.limits or LIMITS[options.scale],
        options.contexts or CONTEXTS[options.scale],
    )  # fmt: skip
    wanted = [one for one in wanted if not options.approaches or one.approach in options.approaches]
    return Proof(setting, device, host, launch, RESERVES[options.scale], say), models, wanted


def _models(options: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    """The models by name, written where they are not there."""
    for name, layout in shapes.layouts(options.scale).items():
        if not options.models or name in options.models:
            began = time.monotonic()
            path = shapes.write(layout, options.work)
            say(f"model: {path.name}, {path.stat().st_size / 2**30:.2f} GiB ({time.monotonic() - began:.0f} s)")
            yield name, described(name, path, read_path(path), layout.experts > 0)


def _measured(
    proof: Proof, models: dict[str, Model], wanted: Sequence[Cell], done: Sequence[rows.Row], over: float
) -> Iterator[rows.Row]:
    """A row for each cell that is not done, while there is time. The card is limited as long as the limit stays."""
    took = [(one.cell, one.took_seconds) for one in done]
    left = [one for one in wanted if one not in {cell for cell, _ in took}]
    with ExitStack() as held:
        limit = 0
        while cell := cells.next_cell(left, took, over - time.monotonic()):
            left.remove(cell)
            if cell.limit_mib != limit:
                held.close()
                held.enter_context(card.limited(proof.card, cell.limit_mib))
                limit = cell.limit_mib
            spare = f"{over - time.monotonic():.0f} s left"
            say(f"{cell.model}, {cell.limit_mib} MiB, {cell.context} tokens, {cell.approach} ({spare})")
            row = proof.row(cell, models[cell.model])
            if row.error and time.monotonic() >= over:
                return  # its time was over, which says nothing of the flags
            said = row.error or f"{row.chosen}: prefill {row.prefill}, decode {row.decode} tokens/s"
            say(f"  {said}")
            took.append((cell, row.took_seconds))
            yield row


def _draw(folder: Path, found: Sequence[rows.Row]) -> None:
    for what in ("prefill", "decode"):
        (folder / f"{what}.svg").write_text(rows.plot(found, what))


if __name__ == "__main__":
    sys.exit(main())
