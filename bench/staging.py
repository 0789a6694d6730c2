"""Bytes that op-offload stages on a device, by llama-server and by the ledger: bench/results/staging.csv.

    python -m bench.staging HOST      a sandbox host on which the deploy has built Vulkan (tests/e2e/test_04_vulkan.py)

llama-server reports the memory of each model twice, wholly on the device and with a part of it on the host; staging is
the growth of the compute buffer. The weightless models must be in the host's /srv/oracle.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llamafleet.memory.context import Context
from llamafleet.memory.ledger import usage
from llamafleet.memory.placement import Placement
from llamafleet.memory.weights import Model
from llamafleet.model.gguf import Header, read_path
from llamafleet.units import MIB
from sandbox import hosts, models, oracle
from sandbox.layouts import PUBLISHED

RESULTS = Path(__file__).parent / "results" / "staging.csv"
ON_HOST = "/srv/oracle"
RELEASE = "/opt/llamafleet/current/bin/llama-server"
CONTEXT_TOKENS = 8192
# llvmpipe takes no tensor above 128 MiB (its maxStorageBufferRange): larger tensors stay on the host in spite of the
# flags, and are never staged. So each published model is also made once with all tensors below that size.
_QWEN, _LLAMA = PUBLISHED["Qwen3-30B-A3B"], PUBLISHED["Llama-3.1-8B"]
MODELS = (
    _QWEN,
    replace(_QWEN, name="Qwen3-30B-A3B-64-experts", experts=64, vocab=65536),
    _LLAMA,
    replace(_LLAMA, name="Llama-3.1-8B-vocabulary-32k", vocab=32768),
)
SMALL = ("Qwen3-30B-A3B-64-experts", "Llama-3.1-8B-vocabulary-32k")
UBATCHES = (512, 2048)
# Runs llama-server on the host until its table is printed, so that a killed connection leaves nothing behind.
PROGRAM = """
import os, subprocess, sys
os.environ["GGML_VK_VISIBLE_DEVICES"] = "0,0"  # one device twice is two
with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
    try:
        seen = False
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            if seen and b"memory_breakdown_print" not in line:
                break
            seen = seen or b"| memory breakdown [MiB]" in line
    finally:
        process.kill()
"""

Ask = Callable[[Path, Sequence[str]], oracle.Breakdown]


@dataclass(frozen=True)
class Case:
    """A model with some of its weights on the host; `spilled` layers keep their attention on the device."""

    name: str
    front: int = 0  # layers wholly on the host
    spilled: int = 0  # the last layers of each device whose experts (dense: feed-forward) are there
    second: int = 0  # the last layers, which are on a second device

    def placement(self, layers: int) -> Placement:
        first = layers - self.front - self.second
        output = 1 if self.second else 0
        holders = (*(None,) * self.front, *(0,) * first, *(1,) * self.second, output)
        ends = (layers - self.second, layers) if self.second else (layers,)
        return Placement.of(holders, frozenset(n for end in ends for n in range(end - self.spilled, end)))

    def flags(self, model: Model) -> list[str]:
        placement = self.placement(model.layers)
        words = [
            "--n-gpu-layers",
            str(placement.gpu_layers),
            "--device",
            ",".join(f"Vulkan{n}" for n in placement.devices),
        ]
        if self.second:
            words += ["--tensor-split", ",".join(map(str, placement.split()))]
        if self.spilled:
            chosen = "|".join(map(str, sorted(placement.spilled)))
            part = r"ffn_(up|down|gate|gate_up)_(ch|)exps\." if model.is_moe else r"ffn_(up|down|gate)\.weight"
            words += ["--override-tensor", rf"blk\.({chosen})\.{part}=CPU"]
        return words

    def whole(self) -> Case:
        """The same case with all weights on its devices."""
        return Case("", second=self.second)


CASES = {
    True: (
        Case("experts of 1 layer", spilled=1),
        Case("experts of 10 layers", spilled=10),
        Case("experts of all layers", spilled=48),
        Case("8 whole front layers", front=8),
        Case("8 whole front layers, experts of 10", front=8, spilled=10),
        Case("two devices, experts of 10 layers of each", spilled=10, second=20),
        Case("two devices, 8 whole front layers", front=8, second=20),
        Case("two devices, 8 whole front layers, experts of 10 of each", front=8, spilled=10, second=20),
    ),
    False: (
        Case("FFN of 1 layer", spilled=1),
        Case("FFN of 10 layers", spilled=10),
        Case("8 whole front layers", front=8),
        Case("all layers but the output", front=32),
        Case("two devices, FFN of 5 layers of each", spilled=5, second=12),
        Case("two devices, 8 whole front layers", front=8, second=12),
    ),
}


@dataclass(frozen=True)
class Row:
    """One device of one case; sizes in MiB."""

    model: str
    case: str
    ubatch_tokens: int
    device: int
    compute_all_on_device: int
    compute: int
    staging: int
    ledger_compute: int
    ledger_staging: int
    host_weights: int
    ledger_host_weights: int
    repacked: int


def measure(host: hosts.SandboxHost) -> Iterator[Row]:
    """Measure every case on a host whose current release has Vulkan."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [models.weightless(Path(scratch), layout) for layout in MODELS]
        send(host, Path(scratch))
        yield from _measured(paths, on_host(host, Path(scratch)))


def send(host: hosts.SandboxHost, folder: Path) -> None:
    """Copy the models to the host as sparse files."""
    with subprocess.Popen(["tar", "-S", "-C", str(folder), "-cf", "-", "."], stdout=subprocess.PIPE) as tar:
        receive = f"mkdir -p {ON_HOST} && tar -S -C {ON_HOST} -xf -"
        subprocess.run([*host.ssh(), "--", receive], stdin=tar.stdout, check=True)


def _measured(paths: Sequence[Path], ask: Ask) -> Iterator[Row]:
    for path in paths:
        header = read_path(path)
        model = Model.of(header)
        for ubatch in UBATCHES:
            wholes: dict[Case, oracle.Breakdown] = {}
            for case in CASES[model.is_moe]:
                if case.whole() not in wholes:
                    wholes[case.whole()] = _breakdown(ask, path, ubatch, case.whole().flags(model))
                partly = _breakdown(ask, path, ubatch, case.flags(model))
                yield from _rows(case, header, model, ubatch, wholes[case.whole()], partly)


def _rows(
    case: Case, header: Header, model: Model, ubatch: int, whole: oracle.Breakdown, partly: oracle.Breakdown
) -> Iterator[Row]:
    context = Context(CONTEXT_TOKENS, 1, "f16", ubatch)
    devices, host = usage(model, context, case.placement(model.layers), "vulkan")
    for device, used in devices.items():
        before, compute = whole.devices[device].compute, partly.devices[device].compute
        yield Row(
            header.name, case.name, ubatch, device, before, compute, compute - before,
            used.compute_bytes // MIB, used.staging_bytes // MIB,
            partly.host.model, host.weights_bytes // MIB, partly.repacked,
        )  # fmt: skip


def _breakdown(ask: Ask, path: Path, ubatch: int, flags: Sequence[str]) -> oracle.Breakdown:
    context = ["--ctx-size", str(CONTEXT_TOKENS), "--parallel", "1", "--no-kv-unified", "--flash-attn", "on"]
    batch = ["--batch-size", str(max(2048, ubatch)), "--ubatch-size", str(ubatch), "--load-mode", "none"]
    return ask(path, [*context, *batch, *flags])


def on_host(host: hosts.SandboxHost, scratch: Path) -> Ask:
    """An `Ask` that runs the release of a sandbox host; the models are in ON_HOST there, under their names."""
    # A program of this machine in llama-server's place, which has the host run its own.
    program = scratch / "llama-server"
    program.write_text(
        f"#!{sys.executable}\nimport os, shlex, sys\n"
        f"words = ['python3', '-c', {PROGRAM!r}, {RELEASE!r}, *sys.argv[1:]]\n"
        f"words = [{ON_HOST!r} + '/' + os.path.basename(w) if w.endswith('.gguf') else w for w in words]\n"
        f"os.execvp('ssh', [*{host.ssh()!r}, '--', shlex.join(words)])\n"
    )
    program.chmod(0o755)
    return lambda model, flags: oracle.ask(model, flags, server=program)


def write(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Write the rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row.__dataclass_fields__)
        writer.writerows([getattr(row, name) for name in Row.__dataclass_fields__] for row in rows)


def main(name: str) -> None:
    """Measure on the running sandbox host `name`."""
    write(list(measure(hosts.get(name))))


if __name__ == "__main__":
    main(sys.argv[1])
