"""`make demo`: deploy to two disposable hosts, from bare Debian to a completion.

Only the sources of llama.cpp and of the models are special to the demo: deploy, checks and second run are the commands
of the README.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from sandbox import hosts, outside, real_models

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
INVENTORY = "inventory/sandbox.py"
PROMPT = "Once upon a time"
MAX_TOKENS = 40


def step(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def command(*words: str) -> None:
    """Run one of the README's commands; if it fails, the demo ends."""
    print("$ " + " ".join(words), flush=True)
    done = subprocess.run([str(BIN / words[0]), *words[1:]], cwd=ROOT, env={**os.environ, "PYINFRA_PROGRESS": "off"})
    if done.returncode:
        raise SystemExit(f"`{' '.join(words)}` failed with exit code {done.returncode}")


def sentence(address: str, port: int) -> str:
    """PROMPT and what the model writes after it, up to the first full stop."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "stop": ["."]}).encode()
    request = urllib.request.Request(
        f"http://{address}:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        choice = json.loads(answer.read())["choices"][0]
    text: str = choice["text"]
    return PROMPT + text + ("." if choice["finish_reason"] == "stop" else " ...")


def no_change_run() -> None:
    """Check with `pyinfra --dry --json` that a further run would change nothing."""
    words = ["pyinfra", "--dry", "--json", INVENTORY, "deploy.py"]
    print("$ " + " ".join(words), flush=True)
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    changing = [operation["name"] for operation in json.loads(done.stdout)["plan"] if operation["hosts_with_change"]]
    print(f"operations that would change something: {changing or 'none'}")
    if changing:
        raise SystemExit(f"a further run would change: {', '.join(changing)}")


def main() -> None:
    began = time.monotonic()
    hosts.prepare()
    step("a real model, Gemma 3 270M: 238 MB are downloaded once, under the Gemma Terms of Use")
    try:
        outside.start(real=True)
    except real_models.RealModelError as error:
        raise SystemExit(f"error: {error}") from error
    try:
        step("two bare Debian hosts with systemd and SSH")
        outside.BUILDS.mkdir(parents=True, exist_ok=True)
        up = hosts.up(2, binds=[f"{outside.BUILDS}:{outside.BUILDS_ON_HOST}"])
        step("deploy: probe, plan, compile llama.cpp, fetch the model, serve")
        command("pyinfra", "-y", INVENTORY, "deploy.py")
        step("the plans of the hosts")
        command("llamafleet", "plan", "--inventory", INVENTORY)
        step(f"each host completes {PROMPT!r}")
        for host in up:
            print(f"{host.name}: {sentence(host.address, 8080)}")
        step("check the deployed hosts")
        command("pytest", "-q", "tests/hosts", "--inventory", INVENTORY)
        step("a second run changes nothing")
        command("pyinfra", "-y", INVENTORY, "deploy.py")
        no_change_run()
    finally:
        hosts.down()
        outside.stop()
    print(f"\ndemo done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
