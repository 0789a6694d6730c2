"""llama.cpp itself, built once for the CPU with its RPC backend: what the `oracle` tests compare against.

`build()` compiles llama-server and ggml-rpc-server of the upstream stand-in into `.cache/llama.cpp-cpu/`, and
afterwards only returns the paths (oracle_build.py).

`ask()` tells what llama-server would allocate: a model (weightless is enough) and flags in, MiB by device
out. With its default `--fit on` llama-server first makes the model and the context without memory, exactly as
the flags say, and prints where the bytes would be (common/fit.cpp, common_memory_breakdown_print). Only then
does fit change anything; it is ended before that. ggml-rpc-server's devices stand in for GPUs; they have no
size of their own (each reports the machine's RAM), which does not matter because nothing is allocated.

Decision 5: docs/decisions/0005-known-or-bound-never-guessed.md.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import threading
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic, sleep

from sandbox.oracle_build import Oracle, OracleError, Source, build, end

__all__ = ["Breakdown", "Oracle", "OracleError", "Row", "Source", "ask", "build", "free_port", "rpc_server", "serving"]

START_TIMEOUT_SECONDS = 60
STOP_TIMEOUT_SECONDS = 10
ASK_TIMEOUT_SECONDS = 60  # 0.5 s alone; a loaded machine of two cores is slower
PORTS = (20000, 32768)  # those from 32768 on Linux takes for connections
START_ATTEMPTS = 3  # a port found free can be taken by somebody else before the server has it
TAIL_LINES = 30
REFUSED_FLAGS = ("-fit", "--fit")  # the breakdown is what fit prints

_ROW = re.compile(  # with the device's total and free memory before the figures, or, on the host, without
    r"common_memory_breakdown_print: \|   - (?P<name>\S+).*?(?P<self>\d+) =\s+(?P<model>\d+) \+\s+(?P<context>\d+)"
    r" \+\s+(?P<compute>\d+)\)?(?: \+\s+-?\d+)?\s+\|"
)
_BUFFER = re.compile(r"sched_reserve: +(?P<name>[^\[\s]+)(?:\[\S+\])? compute buffer size = +(?P<size>[\d.]+) MiB")


_ports, _given = threading.Lock(), set[int]()


@contextmanager
def serving(command: Sequence[str | Path], port: int, log: Path) -> Iterator[str]:
    """Run llama-server (the given argv, which must listen on `port`) until the block ends; gives its URL once
    healthy.

    Raises OracleError if it exits or is not healthy within a minute.
    """
    with (
        log.open("wb") as out,
        subprocess.Popen([str(part) for part in command], stdout=out, stderr=out) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_healthy(process, url, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass(frozen=True)
class Row:
    """What one device, or one of the host's kinds of memory, would hold, in whole MiB."""

    name: str  # RPC0, CUDA0, Vulkan0; Host, CPU_REPACK
    model: int
    context: int
    compute: int

    @property
    def total(self) -> int:
        """All three."""
        return self.model + self.context + self.compute


@dataclass(frozen=True)
class Breakdown:
    """llama-server's answer."""

    devices: tuple[Row, ...]  # in llama.cpp's order
    host: Row
    others: Mapping[str, Row] = field(default_factory=dict)  # CPU_REPACK, for one: host memory besides `host`
    buffers: Mapping[str, float] = field(default_factory=dict)  # to compute in: MiB to the hundredth; the host's is CPU
    # Of a draft model, or of a head's own context, where one was asked for: common_fit_extra_model. The weights of a
    # head are counted in both.
    beside: Breakdown | None = None

    @property
    def repacked(self) -> int:
        """MiB of weights that the CPU backend keeps in a layout of its own."""
        return self.others["CPU_REPACK"].model if "CPU_REPACK" in self.others else 0


def ask(
    model: Path,
    flags: Sequence[str],
    devices: int = 0,
    *,
    server: Path | None = None,
    environment: Mapping[str, str] | None = None,
    oracle: Oracle | None = None,
    beside: bool = False,
) -> Breakdown:
    """What llama-server would allocate for these flags (no model, port or --fit among them).

    `devices` RPC devices are there for it, all by default unless the flags say --device. `server` is another
    llama-server than the oracle's own, `oracle` programs of another release than the pinned one. `beside`: a draft or
    a head is reported too. Raises OracleError with the end of its log.
    """
    if given := [flag for flag in flags if flag in REFUSED_FLAGS]:
        raise OracleError(f"{given[0]} is not for the oracle: leave it out, its default prints the breakdown")
    with ExitStack() as stack:
        rpc = ("--rpc", stack.enter_context(rpc_server(devices, oracle))) if devices else ()
        program = server or (oracle or build()).llama_server
        command = [str(program), "-m", str(model), *rpc, *flags, "-lv", "5", "--port", "0"]
        return _breakdown(command, {**os.environ, **(environment or {})}, beside=beside)


@contextmanager
def rpc_server(devices: int, oracle: Oracle | None = None) -> Iterator[str]:
    """A fresh ggml-rpc-server with that many devices on a free port of the loopback; its endpoint."""
    program = (oracle or build()).rpc_server
    for _ in range(START_ATTEMPTS):
        endpoint = ("127.0.0.1", free_port())
        command = [str(program), "-H", endpoint[0], "-p", str(endpoint[1]), "-d", ",".join(["CPU"] * devices)]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                if _listens(process, endpoint):
                    yield f"{endpoint[0]}:{endpoint[1]}"
                    return
            finally:
                process.kill()
    raise OracleError(f"{program} did not start, tried {START_ATTEMPTS} times")


def _wait_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = monotonic() + START_TIMEOUT_SECONDS
    while monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
            return  # 503 while loading is an OSError too (HTTPError)
        sleep(0.1)
    state = "still not healthy" if process.returncode is None else f"exited with {process.returncode}"
    raise OracleError(f"llama-server {state} after at most {START_TIMEOUT_SECONDS} s; {log} ends:\n{end(log)}")


def free_port() -> int:
    """A port of loopback that nobody listens on now, and that this process has not got before: below those that Linux
    takes for connections, where another program's, or our own to a server that does not listen yet, could take it."""
    while True:
        port = random.randrange(*PORTS)
        with _ports, socket.socket() as probe, suppress(OSError):
            if port not in _given:
                probe.bind(("127.0.0.1", port))
                _given.add(port)
                return port


def _listens(process: subprocess.Popen[bytes], endpoint: tuple[str, int]) -> bool:
    """Wait until the server takes connections; False if it ends or does not within its time."""
    deadline = monotonic() + START_TIMEOUT_SECONDS
    while monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(endpoint, timeout=1):
            return process.poll() is None
        sleep(0.01)
    return False


def _breakdown(command: Sequence[str], environment: Mapping[str, str], *, beside: bool) -> Breakdown:
    tables: list[Breakdown] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        timer = threading.Timer(ASK_TIMEOUT_SECONDS, process.kill)
        timer.start()
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        rows: list[Row] = []
        buffers: dict[str, float] = {}
        assert process.stdout is not None  # for mypy: a pipe was asked for
        try:
            for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip()
                tail.append(line)
                if match := _ROW.search(line):
                    rows.append(Row(match["name"], *(int(match[part]) for part in ("model", "context", "compute"))))
                elif match := _BUFFER.search(line):
                    buffers[match["name"]] = float(match["size"])
                elif rows:
                    tables.append(replace(_sorted(rows, command, tail), buffers=buffers))
                    rows, buffers = [], {}
                    if len(tables) > beside:
                        break  # fit may print others of its own later
        finally:
            timer.cancel()
            process.kill()
    if len(tables) <= beside:
        raise OracleError(
            f"{' '.join(command)} reported {len(tables)} memory breakdowns; its log ends:\n" + "\n".join(tail)
        )
    return replace(tables[0], beside=tables[1] if beside else None)


def _sorted(rows: Sequence[Row], command: Sequence[str], tail: Sequence[str]) -> Breakdown:
    by_name = {row.name: row for row in rows}
    if "Host" not in by_name:
        raise OracleError(f"{' '.join(command)} printed no memory breakdown; its log ends:\n" + "\n".join(tail))
    split = list(by_name).index("Host")  # devices are printed before it, the host's other kinds after
    ordered = list(by_name.values())
    return Breakdown(tuple(ordered[:split]), by_name["Host"], {row.name: row for row in ordered[split + 1 :]})
