"""Running the real deploy on sandbox hosts, as an operator would, and reading what came of it."""

import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.outside import BUILDS_ON_HOST
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
PYINFRA = Path(sys.executable).with_name("pyinfra")
PORT = 8080


@dataclass
class Run:
    """What one run of pyinfra did."""

    code: int
    text: str
    operations: list = field(default_factory=list)

    def changed(self, host=None):
        """Names of the operations that changed something (on this host), in order."""
        return [one["name"] for one in self.operations if (host in one["changed"] if host else one["changed"])]

    def failed(self, host):
        return [one["name"] for one in self.operations if host in one["failed"]]


def environment():
    return {**os.environ, "PYINFRA_PROGRESS": "off", "NO_COLOR": "1"}


def write_inventory(path, hosts):
    """An inventory file of sandbox hosts, each with its settings; no `group_data` lies beside it."""
    entries = [(host.name, {**connection(host), **data}) for host, data in hosts]
    path.write_text(f"sandbox = {entries!r}\n")
    return path


def connection(host):
    return {
        "ssh_hostname": host.address, "ssh_port": host.port, "ssh_user": "root", "ssh_key": str(host.ssh_key),
        "ssh_known_hosts_file": str(host.known_hosts), "ssh_strict_host_key_checking": "yes",
    }  # fmt: skip


def settings(outside, host, kind="dense", **overrides):
    """Settings of a host with one model, with `overrides` of the host's settings, and of the model's in `model`."""
    model = {"name": "tiny", "source": outside.sources[kind], "port": PORT, "listen": host.address,
             # One thread: several that wait for each other crawl where cores are shared.
             "context_tokens": 1024, "threads": 1, **overrides.pop("model", {})}  # fmt: skip
    return {**outside.settings(), "build_cache": BUILDS_ON_HOST, "models": [model], **overrides}


def command(inventory, *options, deploy="deploy.py"):
    return [str(PYINFRA), *options, str(inventory), deploy]


def with_names(names, folder):
    """Words before a command that give it, and nobody else, an /etc/hosts with these names of loopback."""
    file = folder / "hosts"
    file.write_text(Path("/etc/hosts").read_text() + f"\n127.0.0.1 {' '.join(names)}\n")
    return ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(file)]


def pyinfra(inventory, *options, timeout=1500, before=(), deploy="deploy.py", forks=True):
    """Run the deploy: without options for real, with `--dry` to see only. `before`: words before the command; `deploy`:
    another file than the story itself; `forks`: from a process that has imported pyinfra, where that can be."""
    dry = "--dry" in options
    words = command(inventory, *(options if dry else ("-y", *options)), "--json", deploy=deploy)
    if forks and not before and threading.current_thread() is threading.main_thread():
        done = forked.pyinfra().run(["-m", "pyinfra", *words[1:]], env=environment(), timeout=timeout)
    else:
        done = subprocess.run(
            [*before, *words], cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip
    return read(done.returncode, done.stdout, done.stderr, dry)


def read(code, stdout, stderr, dry):
    try:
        told = json.loads(stdout)
    except ValueError:  # where no host is left pyinfra prints no JSON
        return Run(code, stderr + stdout, list(read_text(stderr)))
    if dry:
        operations = [{"name": one["name"], "changed": one["hosts_with_change"], "failed": []} for one in told["plan"]]
    else:
        operations = [{"name": one["name"], "changed": one["success"], "failed": one["error"]}
                      for one in told["results"]["operations"]]  # fmt: skip
    return Run(code, stderr, operations)


def read_text(text):
    """The operations as pyinfra tells them while it runs."""
    for part in text.split("--> Starting operation: ")[1:]:
        name, *lines = part.splitlines()
        told = {kind: [line.split("[")[1].split("]")[0] for line in lines if f"] {kind}" in line]
                for kind in ("Success", "Error:")}  # fmt: skip
        yield {"name": name.strip(), "changed": told["Success"], "failed": told["Error:"]}


def shipped_checks(inventory, *options):
    """What `tests/hosts` says of an inventory's hosts."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/hosts", *options]
    return subprocess.run(
        [*words, "--inventory", str(inventory)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )


def ask(host, path, body=None, key=None, port=PORT):
    """(status, JSON) of the host's server."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://{host.address}:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith(b"{") else text
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")
    except OSError as error:
        return 0, {"error": str(error)}


def serves(host, port=PORT, key=None):
    """Does a real completion come out of it?"""
    status, answer = ask(host, "/v1/completions", {"prompt": "Once", "max_tokens": 4, "temperature": 0}, key, port)
    return status == 200 and answer["usage"]["completion_tokens"] == 4


def on(host, *words):
    """Run a command on the host by SSH; its stdout, stripped."""
    done = host.run(list(words))
    assert done.returncode == 0, f"{host.name}: {words}: {done.stderr}"
    return done.stdout.strip()


def main_pid(host, name):
    return int(on(host, "systemctl", "show", "--property=MainPID", "--value", f"llama-server-{name}.service"))
