"""Speed of attention on a processor core: multiply-adds per second in decode (token by token) and in prefill.

    python -m bench.cpu_attention LLAMA_SERVER > bench/results/cpu_attention.csv

One thread serves a random model whose work is nearly all attention. Processor time is measured, not wall time, so that
other processes do not matter. The cost of attention at a depth is the difference to a short context.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from sandbox.layouts import Layout
from sandbox.models import make

MODEL = Layout("attention", "llama", blocks=2, embd=512, heads=32, kv_heads=8, head_dim=128, ff=256,
               vocab=512, context=8192, quant="F16")  # fmt: skip
MACS_A_TOKEN = MODEL.blocks * MODEL.heads * MODEL.head_dim * 2  # for each token in the cache: K and V
DEPTHS, WRITTEN = (256, 1024, 2048, 4096), 48


def main(server: str) -> None:
    """Print one line for each depth."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        flags = ["--threads", "1", "--threads-batch", "1", "--ctx-size", "8192", "--parallel", "1", "--no-kv-unified"]
        flags += ["--flash-attn", "on", "--fit", "off", "--cache-ram", "0", "--port", str(port), "--no-ui"]
        process = subprocess.Popen(
            [server, "--model", str(make(MODEL, Path(folder), seed=1)), "--device", "none", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            measure(process.pid, f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait()


def measure(pid: int, url: str) -> None:
    """Print processor seconds of prefill and decode at each depth, and the multiply-adds per second of a core."""
    wait_until_ready(url)
    print("depth_tokens,read_seconds,write_seconds_a_token,read_macs_per_s,write_macs_per_s")
    base: tuple[float, float] | None = None
    for depth in DEPTHS:
        prompt = {"prompt": [100 + n % 300 for n in range(depth)], "cache_prompt": False, "ignore_eos": True}
        read = spent(pid, url, {**prompt, "n_predict": 1})
        both = spent(pid, url, {**prompt, "n_predict": 1 + WRITTEN})
        write = (both - read) / WRITTEN
        if base is None:
            base = (read / depth, write)
            print(f"{depth},{read:.3f},{write:.6f},,")
            continue
        read_macs = MACS_A_TOKEN * depth * depth / 2 / max(1e-9, read - base[0] * depth)
        write_macs = MACS_A_TOKEN * (depth - DEPTHS[0]) / max(1e-9, write - base[1])
        print(f"{depth},{read:.3f},{write:.6f},{read_macs:.3g},{write_macs:.3g}", flush=True)


def spent(pid: int, url: str, body: dict[str, Any]) -> float:
    """Processor seconds that the server needs for one completion."""
    server = psutil.Process(pid)
    before = sum(server.cpu_times()[:2])
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        json.load(answer)
    return sum(server.cpu_times()[:2]) - before


def wait_until_ready(url: str) -> None:
    """Wait until the model is loaded; RuntimeError after a minute."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{url}: not ready after a minute")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that no process listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(sys.argv[1])
