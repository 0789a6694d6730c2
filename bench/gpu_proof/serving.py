"""A llama-server of the proof: started, measured and ended. Prompt and reply are timed by the server's own clock."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.gpu_proof.cells import Workload
from sandbox.oracle import free_port

FIRST_TOKEN = 300  # behind control and byte tokens of sandbox.models.tokenizer
STOP_SECONDS = 20.0
WARMING_TOKENS = 4  # of the reply to the first prompt, which is not counted


class Failed(RuntimeError):
    """The server does not load or does not answer; the text has the reason of its log."""


@dataclass(frozen=True)
class Figures:
    """Tokens a second of each run, prompts and replies apart, and seconds to load."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    load_seconds: float
    log: str

    def seconds(self, work: Workload) -> float:
        """Of a request, by the middle of the runs."""
        return work.seconds(median(self.prefill), median(self.decode))


@dataclass(frozen=True)
class Launch:
    """How servers are started: program, model, environment; `deadline` of time.monotonic() is the whole run's."""

    server: Path
    model: Path
    vocabulary: int
    environment: Mapping[str, str]
    folder: Path
    deadline: float

    @property
    def log(self) -> Path:
        """Of the last server."""
        return self.folder / "server.log"

    def loads(self, flags: Sequence[str]) -> str | None:
        """The log of a server that loads with these flags; None if it does not."""
        try:
            with self.running([*flags, "--no-warmup"]):
                pass
        except Failed:
            return None
        return self.log.read_text(errors="replace")

    def measure(self, flags: Sequence[str], work: Workload, cpus: str = "") -> Figures:
        """Start a server, measure all runs, end it. Raises Failed."""
        with self.running(flags, cpus) as (url, took):
            found = list(self._requests(url, work))
        text = self.log.read_text(errors="replace")  # at its end it says what it allocated
        return Figures(tuple(one[0] for one in found), tuple(one[1] for one in found), took, text)

    def _requests(self, url: str, work: Workload) -> Iterator[tuple[float, float]]:
        """(prompt, reply) tokens a second of each run, behind a first request that fills the context or warms up."""
        chance = random.Random(1)

        def tokens(count: int) -> list[int]:
            return [chance.randrange(FIRST_TOKEN, self.vocabulary) for _ in range(count)]

        before = tokens(work.depth or work.prompt)
        before += self._post(url, before, WARMING_TOKENS)["tokens"]
        for _ in range(work.runs):
            prompt = [*(before if work.depth else []), *tokens(work.prompt)]
            answer = self._post(url, prompt, work.reply)
            before = [*prompt, *answer["tokens"]]  # a context that only grows is never read again by the server
            timings = answer["timings"]
            yield (
                1000 * timings["prompt_n"] / max(timings["prompt_ms"], 1e-3),
                1000 * max(1, timings["predicted_n"] - 1) / max(timings["predicted_ms"], 1e-3),
            )

    def _post(self, url: str, prompt: Sequence[int], reply: int) -> dict[str, Any]:
        body = {"prompt": list(prompt), "n_predict": reply, "temperature": 0, "ignore_eos": True, "cache_prompt": True,
                "id_slot": 0, "return_tokens": True}  # fmt: skip
        request = urllib.request.Request(
            f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self._left()) as reader:
                answer = json.load(reader)
                return {"tokens": list(answer["tokens"]), "timings": dict(answer["timings"])}
        except urllib.error.HTTPError as error:
            raise Failed(f"/completion: {error.code}: {error.read(300).decode(errors='replace')}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Failed(f"/completion: {type(error).__name__}: {error}") from error

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Failed("the time is over")
        return left

    @contextmanager
    def running(self, flags: Sequence[str], cpus: str = "") -> Iterator[tuple[str, float]]:
        """(address, seconds to load) of a server that is ended behind the block. Raises Failed."""
        self._left()
        port = free_port()
        affinity = ["taskset", "-c", cpus] if cpus else []
        # From 4 on the log has the bytes of every device; from 5 on it has prompts.
        words = ["--model", str(self.model), "--host", "127.0.0.1", "--port", str(port), "--no-ui", "--offline"]
        command = [*affinity, str(self.server), *words, *flags, "--log-verbosity", "4"]
        began = time.monotonic()
        with self.log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                       env={**os.environ, **self.environment})  # fmt: skip
        try:
            self._wait(process, f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}", time.monotonic() - began
        except Failed as error:
            if process.poll() is not None and "exited" not in str(error):
                raise Failed(f"llama-server exited with {process.returncode}: {reason(self.log)} ({error})") from error
            raise
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes], health: str) -> None:
        while process.poll() is None:
            self._left()
            with suppress(OSError), urllib.request.urlopen(health, timeout=2):
                return  # 503 while it loads is an OSError too
            time.sleep(0.05)
        raise Failed(f"llama-server exited with {process.returncode}: {reason(self.log)}")


def reason(log: Path) -> str:
    """The line of the log that says most, else its last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    words = ("out of memory", "failed to allocate", "outofdevicememory", "unable to allocate", "error")
    for word in words:
        if found := [line for line in lines if word in line.lower()]:
            return found[0][-300:]
    return lines[-1][-300:] if lines else "its log is empty"
