"""Run a release's llama-server in a transient unit with given directives, and see whether it works.

Contract: `Trial(name, trial)` is used in a `with` block. `name` is the instance's; `trial` is the key of that name in
plan.json: {"list_devices": the command that lists devices, "devices": the names that it must list, "serve": the command
that serves a tiny model, in which {model} stands for the model's path, {port} for a free port of "host", and {socket}
for the path of a socket in the unit's own RuntimeDirectory=}.
`run(directives)` returns None where every device is listed and the tiny model answers, else the reason. The model and
the unit are gone after the block. Raises `Unfit` where systemd-run itself cannot be used. Root, systemd, standard
library; boot.py, common.py, confined.py, gate_server.py and tiny_gguf.py lie beside it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from typing import IO, Any, Dict, List, NamedTuple, Optional, Sequence, Set
from urllib.parse import urlsplit

import boot
import gate_server
import tiny_gguf
from common import MODELS, transient_unit, unit_words
from confined import UNKNOWN, forget

ANSWER_BYTES = 1 << 20
# Deadlines, seconds: a device list comes at once, a CUDA context can take ten seconds on a cold driver.
LIST_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 60, 60, 10
# Directives that are no hardening: what is started, when it is started again, and files that are installed later.
NOT_TRIED = ("Type", "ExecStart", "ExecCondition", "ExecStartPre", "ExecStartPost", "TimeoutStartSec", "TimeoutStopSec",
             "Restart", "RestartSec", "RestartSteps", "RestartMaxDelaySec", "LoadCredential", "WatchdogSec",
             "RuntimeDirectory")  # fmt: skip
# Messages of llama.cpp's backends when a device has no memory left.
NO_MEMORY = re.compile(r"out of memory|cudaMalloc failed|failed to allocate|ErrorOutOfDeviceMemory", re.IGNORECASE)
# Lines that systemd-run itself prints at the end of a unit.
OF_SYSTEMD_RUN = (r"Running as unit|Press \^\]|Finished with result|Main processes|Service runtime|CPU time|Memory|IO |"
                  r"IP traffic")  # fmt: skip


class Unfit(Exception):
    """No hardening can be tried, or llama-server does not work even without any; the text is for the operator."""


class Directive(NamedTuple):
    name: str
    value: str

    @property
    def line(self) -> str:
        return f"{self.name}={self.value}"


class Trial:
    def __init__(self, name: str, trial: Dict[str, Any]) -> None:
        self.unit = transient_unit("preflight", name)
        self.trial = trial
        self.devices: List[str] = trial["devices"]  # the planned ones, as llama-server names them
        self.folder = f"{MODELS}/.preflight-{name}"
        self.socket = f"/run/llamafleet-preflight-{name}/http.sock"
        self.ignored: Set[str] = set()  # directives that this systemd does not know
        self.checked: List[str] = []  # what the last run that worked has seen

    def __enter__(self) -> "Trial":
        self.stop()  # of a job that was killed
        os.makedirs(self.folder, mode=0o755, exist_ok=True)
        tiny_gguf.write(f"{self.folder}/tiny.gguf")
        os.chmod(f"{self.folder}/tiny.gguf", 0o644)
        if "CUDA0" in self.devices:
            boot.make_nodes()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, directives: Sequence[Directive]) -> Optional[str]:
        checked = ["list-devices"]
        why = self.lists_devices(directives)
        if why is None:
            why = self.answers(directives)
            checked.append("completion")
        if why is not None and self.devices and NO_MEMORY.search(why):
            # A running service fills the card. The gate checks the real model once that service has stopped.
            why, checked = None, ["list-devices; no memory beside the running service for a completion"]
        if why is None:
            self.checked = checked
        return why

    def lists_devices(self, directives: Sequence[Directive]) -> Optional[str]:
        """Why the planned devices are not all listed; None where they are."""
        with self.started(self.trial["list_devices"], directives) as process:
            code, said = process.wait(LIST_SECONDS), process.said()
        unknown = UNKNOWN.search(said)
        if code and unknown and unknown[1] in {one.name for one in directives} - self.ignored:
            self.ignored.add(unknown[1])
            return self.lists_devices(directives)
        if code is None:
            return f"--list-devices does not end within {LIST_SECONDS} s"
        listed = set(re.findall(r"^\s+([A-Za-z]+\d+): ", said, re.MULTILINE))
        missing = [name for name in self.devices if name not in listed]
        if code:
            return f"--list-devices: {how_it_ended(said, code)}"
        if missing:
            return f"--list-devices shows no {', '.join(missing)}, only {', '.join(sorted(listed)) or 'no device'}"
        return None

    def answers(self, directives: Sequence[Directive]) -> Optional[str]:
        """Why the tiny model gives no completion; None where it does."""
        host = self.trial["host"]
        port = free_port(host)
        bound = [Directive(one.name, f"tcp:{port}") if one.name == "SocketBindAllow" else one for one in directives]
        with self.started(self.command(port), bound) as process:
            path = self.socket if "{socket}" in self.trial["serve"] else None
            why = completion(process, url_of(host, port), path)
            self.stop()
            code = process.wait(STOP_SECONDS)
            return why and f"a tiny model: {why}: {how_it_ended(process.said(), code)}"

    def command(self, port: int) -> List[str]:
        """The command that serves the tiny model, with its path and this port."""
        known = {"{model}": f"{self.folder}/tiny.gguf", "{port}": str(port), "{socket}": self.socket}
        return [known.get(word, word) for word in self.trial["serve"]]

    def started(self, command: Sequence[str], directives: Sequence[Directive]) -> "Started":
        tried = [one for one in directives if one.name not in (*NOT_TRIED, *self.ignored)]
        folder = os.path.basename(os.path.dirname(self.socket))
        lines = [one.line for one in tried]
        return Started(self.unit, run_words(self.unit, command, lines, folder, ANSWER_SECONDS + 30))

    def stop(self) -> None:
        forget(self.unit)


def run_words(
    unit: str, command: Sequence[str], lines: Sequence[str], folder: str, seconds: float,
    environment: Optional[Dict[str, str]] = None,
) -> List[str]:  # fmt: skip
    """The words that start a command in a unit with these directives, and a RuntimeDirectory= of its own; systemd ends
    it after so many seconds."""
    return [
        "systemd-run", "--collect", "--pipe", "--wait", f"--unit={unit}", "--property=Type=exec",
        f"--property=RuntimeDirectory={folder}", f"--property=TimeoutStopSec={STOP_SECONDS}",
        f"--property=RuntimeMaxSec={seconds:.0f}", *(f"--property={line}" for line in lines),
        *(f"--setenv={key}={value}" for key, value in (environment or {}).items()), "--", *unit_words(command),
    ]  # fmt: skip


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Started:
    """A running systemd-run with its unit and their output. Both are stopped at the end of the `with` block."""

    def __init__(self, unit: str, words: Sequence[str]) -> None:
        self.unit = unit
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by __exit__
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output)

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            forget(self.unit)
            self.process.kill()
            self.process.wait()
        self.output.close()

    def wait(self, seconds: float) -> Optional[int]:
        """The exit code; None if it still runs after this time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read().decode("utf-8", "replace")


def completion(process: Started, url: str, path: Optional[str] = None) -> Optional[str]:
    """Ask for four tokens until the server has loaded; the reason why they do not come, or None. `path`: of its socket,
    where it has one in place of the URL's port."""
    deadline = time.monotonic() + ANSWER_SECONDS
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    said: Any = "nothing"
    while time.monotonic() < deadline:
        if process.wait(0) is not None:
            return "the server ends"
        try:
            with ExitStack() as stack:
                connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_SECONDS)
                stack.callback(connection.close)
                if path:
                    connection.sock = gate_server.unix_connection(path, ANSWER_SECONDS)
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
                answer = connection.getresponse()
                text = answer.read(ANSWER_BYTES)
            if answer.status == 200:
                tokens = json.loads(text)["usage"]["completion_tokens"]
                return None if tokens == 4 else f"it answers with {tokens} tokens instead of 4"
            if answer.status != 503:  # 503: it loads
                return f"it answers {answer.status}"
            said = "503"
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            said = error
        time.sleep(0.1)
    return f"no answer within {ANSWER_SECONDS} s ({said})"


def free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


def how_it_ended(said: str, code: Optional[int]) -> str:
    """How the program ended, and the last two lines of its output that speak of an error."""
    ended = re.search(r"^\s*Main processes terminated with: (.*)$", said, re.MULTILINE)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(OF_SYSTEMD_RUN, line)]
    telling = [line for line in lines if re.search(r"error|fail|denied|permitted|refused", line, re.IGNORECASE)]
    words = (telling or lines)[-2:]
    return " | ".join([ended[1].strip() if ended else f"exit code {code}", *words])[:400]
