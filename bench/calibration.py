"""How much better predicted speeds get on a host whose rates a tune of one model has measured.

    python -m bench.calibration measure LLAMA_SERVER > bench/results/calibration.csv     some minutes
    python -m bench.calibration predict

`measure` serves models of several shapes and quantisations on this machine's processor, with planned flags, and
measures each with several workloads. One thread computes, and its processor time is measured, not wall time, so that
other programs matter less: they only take some of the caches and of the memory's bandwidth. The best of TURNS counts.
`predict` takes the file: each measurement in turn is what a tune would have recorded, and the speeds of all other
models are predicted with it, as the planner does; beside that stands the prediction without any measurement, and with
the survey's probe of the memory. An error is a factor less one: twice as fast and half as fast are both 100 %.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.published_cases import error
from llamafleet.cli.arguments import default_data, settings_for
from llamafleet.host.learned import Bandwidth, MeasuredSpeeds, measurements
from llamafleet.host.machine import Machine
from llamafleet.host.speeds import NOT_MEASURED, Measurements
from llamafleet.model.gguf import read_path
from llamafleet.planner.plan import plan_host
from llamafleet.planner.result import Plan
from sandbox import oracle, real_models
from sandbox.layouts import Layout
from sandbox.models import make
from sandbox.upstream import CACHE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "calibration.csv"
FOLDER = CACHE / "calibration"
REMOTE = ROOT / "llamafleet" / "remote"
TURNS = 3
CONTEXT_TOKENS, REPLY_TOKENS = 4096, 32
SMALL: dict[str, Any] = {"head_dim": 64, "vocab": 32000, "context": 8192, "rope_base": 10000.0}
RANDOM = (
    Layout("dense-0.5B", "llama", blocks=16, embd=1536, heads=24, kv_heads=8, ff=4096, quant="Q8_0", **SMALL),
    Layout("dense-0.2B", "llama", blocks=12, embd=1024, heads=16, kv_heads=8, ff=3072, quant="F16", **SMALL),
    Layout("experts-0.4B", "qwen3moe", blocks=8, embd=1024, heads=16, kv_heads=4, ff=512, experts=32, experts_used=4,
           quant="Q8_0", **SMALL),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A workload of one request alone, tokens; `depth` are in the cache before it."""

    name: str
    prompt: int
    depth: int

    @property
    def settings(self) -> dict[str, int]:
        """As an inventory says it."""
        live = self.depth + self.prompt + REPLY_TOKENS // 2
        return {"prompt_tokens": self.prompt, "reply_tokens": REPLY_TOKENS, "live_tokens": live, "concurrency": 1}


WORKS = (Work("short", 64, 0), Work("deep", 64, 1024))
COLUMNS = ("model", "bytes", "workload", "decode", "decode_low", "prefill", "prefill_low")


def main(argv: Sequence[str]) -> None:
    """Measure, or predict."""
    paths = dict(models())
    if argv[0] == "measure":
        table = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        table.writeheader()
        for row in measured(argv[1], paths):
            table.writerow(row)
            sys.stdout.flush()
        return
    with RESULTS.open() as file:
        print("\n".join(summary(paths, list(csv.DictReader(file)))))


def models() -> Iterator[tuple[str, Path]]:
    """Real models, and ones with random weights, which are made once, by name."""
    yield from _real(real_models.GEMMA_270M, real_models.QWEN_0_5B)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for layout in RANDOM:
        path = FOLDER / f"{layout.name}-{layout.quant}.gguf"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
                make(layout, Path(folder), seed=1).rename(path)
        yield path.stem, path
    yield from _real(real_models.QWEN_1_5B)


def _real(*those: real_models.RealModel) -> Iterator[tuple[str, Path]]:
    for model in those:
        for name, path in real_models.fetch(model).items():
            if name.endswith(".gguf"):
                yield path.stem, path


def machine() -> Machine:
    """This machine, as the probe finds it."""
    return Machine.from_json(json.loads(_said("probe.py")))


def probe(threads: int) -> Measurements:
    """The memory's bandwidth, as a survey measures it; nothing while the processors are busy."""
    found = json.loads(_said("probe_bandwidth.py", str(threads)))
    return measurements(Bandwidth(found["bytes_per_s"], "", found["why"], found["core_steps_per_s"]), [])


def _said(program: str, *words: str) -> str:
    return subprocess.run([sys.executable, REMOTE / program, *words], check=True, capture_output=True, text=True).stdout


def planned(host: Machine, path: Path, work: Work, known: Measurements = NOT_MEASURED) -> Plan:
    """The plan for this workload, with the speeds that these measurements predict."""
    asked = settings_for(str(path), default_data(), {"context_tokens": CONTEXT_TOKENS, "threads": 1, **work.settings})
    [plan] = plan_host(host, [(asked.models[0], read_path(path))], asked, known=known)
    assert isinstance(plan, Plan), f"{path.name} has no plan: {plan.reason}"
    return plan


# --- measuring --------------------------------------------------------------------------------------


def measured(server: str, paths: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """A row for each model and workload."""
    host = machine()
    for name, path in paths.items():
        for work in WORKS:
            plan = planned(host, path, work)
            with serving(server, path, plan.argv) as (process, url):
                found = speeds(process, url, work)
            yield {"model": name, "bytes": path.stat().st_size, "workload": work.name, **found}


@contextmanager
def serving(server: str, path: Path, argv: Sequence[str]) -> Iterator[tuple[psutil.Process, str]]:
    """llama-server with these flags until the block ends: its process and its address."""
    port = oracle.free_port()
    command = [server, "--model", str(path), "--host", "127.0.0.1", "--port", str(port), "--no-ui", *argv]
    with tempfile.TemporaryDirectory() as folder, oracle.serving(command, port, Path(folder) / "log") as url:
        [process] = [one for one in psutil.Process().children(recursive=True) if str(port) in one.cmdline()]
        yield process, url


def speeds(process: psutil.Process, url: str, work: Work) -> dict[str, Any]:
    """The best of the speeds, in tokens a second of processor time, and the lowest one."""
    found = [once(process, url, work, turn) for turn in range(TURNS + 1)][1:]  # the first one warms up
    row: dict[str, Any] = {}
    for kind in ("decode", "prefill"):
        values = [one[kind] for one in found]
        row |= {kind: round(max(values), 2), f"{kind}_low": round(min(values), 2)}
    return row


def once(process: psutil.Process, url: str, work: Work, turn: int) -> dict[str, float]:
    """Read a prompt behind what is cached, and write behind both."""
    words = [100 + number % 300 for number in range(work.depth + work.prompt)]
    words[work.depth] = 90 - turn % 50  # nothing of the prompt is in the cache
    if work.depth:
        post(url, words[: work.depth], 0)
    before = spent(process)
    read = post(url, words, 0)["prompt_n"]
    between = spent(process)
    post(url, words, REPLY_TOKENS)  # reads the last token again
    assert read == work.prompt, f"{read} tokens were read in place of {work.prompt}"
    return {"prefill": read / (between - before), "decode": (REPLY_TOKENS + 1) / (spent(process) - between)}


def spent(process: psutil.Process) -> float:
    """Processor seconds of the server since its start."""
    return float(sum(process.cpu_times()[:2]))


def post(url: str, prompt: Sequence[int], reply: int) -> dict[str, Any]:
    """llama-server's timings of a completion."""
    body = {"prompt": list(prompt), "n_predict": reply, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
    data, kind = json.dumps({**body, "id_slot": 0}).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/completion", data, kind)) as answer:
        told: dict[str, Any] = json.load(answer)["timings"]
    return told


# --- predicting -------------------------------------------------------------------------------------


def tuned(host: Machine, path: Path, rows: Sequence[Mapping[str, str]]) -> Measurements:
    """What the host knows of its rates after a tune of this model with each workload of these rows."""
    found = []
    for row in rows:
        plan = planned(host, path, _work(row))
        assert plan.at_work is not None, "each of these plans writes"
        found.append(MeasuredSpeeds(row["model"], float(row["decode"]), float(row["prefill"]), plan.at_work))
    return measurements(None, found)


def errors(
    host: Machine, paths: Mapping[str, Path], rows: Sequence[Mapping[str, str]], known: Measurements
) -> dict[str, list[float]]:
    """By "decode" and "prefill", the error of each row's predicted speed."""
    found: dict[str, list[float]] = {"decode": [], "prefill": []}
    for row in rows:
        predicted = planned(host, paths[row["model"]], _work(row), known).predicted
        found["decode"].append(error(predicted.decode_tokens_per_s, float(row["decode"])))
        found["prefill"].append(error(predicted.prefill_tokens_per_s, float(row["prefill"])))
    return found


def summary(paths: Mapping[str, Path], rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The errors as text."""
    host = machine()
    yield _line("estimated", errors(host, paths, rows, NOT_MEASURED))
    yield _line("with the probe", errors(host, paths, rows, probe(1)))
    after: dict[str, list[float]] = {"decode": [], "prefill": []}
    for name in paths:
        for work in WORKS:
            own = [row for row in rows if row["model"] == name and row["workload"] == work.name]
            if not own:
                continue
            found = errors(host, paths, [row for row in rows if row["model"] != name], tuned(host, paths[name], own))
            yield _line(f"after a tune of {name}, {work.name}", found)
            for kind, values in found.items():
                after[kind] += values
    yield _line("after any of these tunes", after)


def _line(what: str, found: Mapping[str, Sequence[float]]) -> str:
    parts = [f"{kind} {statistics.median(values):.0%} (most {max(values):.0%})" for kind, values in found.items()]
    return f"{what}: {len(found['decode'])} pairs, median error {', '.join(parts)}"


def _work(row: Mapping[str, str]) -> Work:
    return next(work for work in WORKS if work.name == row["workload"])


if __name__ == "__main__":
    main(sys.argv[1:])
