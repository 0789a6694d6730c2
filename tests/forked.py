"""Commands in processes of their own that need no start: they are forked from one that has imported what they need.

A start of pyinfra with our modules takes a second of CPU, and the start of a host's program a twentieth. The process is
the command's own in all else: `Server.run` gives its exit status and what it printed, as `subprocess.run` does.

    python -m tests.forked SOCKET MODULES...   # the one that is forked, started here
"""

import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Nothing of `tasks`: what it does where it is imported depends on who imports it.
OF_PYINFRA = (
    "pyinfra_cli.main", "pyinfra.operations.files", "pyinfra.operations.server", "pyinfra.connectors.ssh",
    "llamafleet.cli.main", "llamafleet.cli.fleet_status", "llamafleet.cli.report", "llamafleet.service.changes",
    "llamafleet.fleet.gateway", "llamafleet.fleet.monitoring", "llamafleet.fleet.rollout", "llamafleet.payload",
    "llamafleet.service.left", "llamafleet.service.tune", "cryptography.x509", "psutil",
)  # fmt: skip
# What programs of the hosts import, but for their neighbours.
OF_PROGRAMS = (
    "argparse", "concurrent.futures.thread", "ctypes.util", "datetime", "email.utils", "fcntl", "glob", "grp", "hashlib",
    "http.client", "json", "platform", "pwd", "select", "shlex", "shutil", "socket", "ssl", "subprocess", "tempfile",
    "threading", "traceback", "urllib.error", "urllib.parse", "urllib.request",
)  # fmt: skip
REQUEST_BYTES = 200_000
READY, START_SECONDS = b"ready", 300.0


class Server:
    """A process that is forked for every command; it ends with this one."""

    def __init__(self, modules, environment=None):
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(its.fileno()), *modules],
                cwd=ROOT, env={**os.environ, **(environment or {})}, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL,
            )  # fmt: skip
        atexit.register(self.stop)
        self._socket.settimeout(START_SECONDS)
        assert self._socket.recv(100) == READY

    def stop(self):
        self._socket.close()
        self._process.wait(timeout=START_SECONDS)

    def run(self, words, *, env=None, cwd=ROOT, stdin=None, log=None, text=True, timeout=120.0):
        """Python's words but for its options: "-m" and a module, or a program's path; then arguments. `stdin` is a file,
        or nothing; all that is printed goes to the file `log` where there is one. Raises TimeoutExpired, and the command
        is killed."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as nothing:
            request = {"words": [str(word) for word in words], "cwd": str(cwd), "env": dict(env or os.environ)}
            files = [file.fileno() for file in (stdin or nothing, log or out, log or err)]
            self._socket.settimeout(timeout)
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
            pid = int(self._socket.recv(100))
            try:
                code = int(self._socket.recv(100))
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self._socket.settimeout(timeout)
                self._socket.recv(100)
                raise subprocess.TimeoutExpired(words, timeout) from None
            printed = []
            for file in (out, err):
                file.seek(0)
                printed.append(file.read().decode() if text else file.read())
        return subprocess.CompletedProcess(words, code, *printed)


@functools.cache
def pyinfra():
    """For pyinfra's command, and for ours over an inventory."""
    return Server(OF_PYINFRA)


@functools.cache
def programs(library_path=None):
    """For programs of hosts; they find shared libraries in `library_path` as well."""
    return Server(OF_PROGRAMS, {"LD_LIBRARY_PATH": library_path} if library_path else None)


def serve(number, fork=os.fork, wait=os.waitpid, connection=socket.socket):
    """Fork for every request; returns in the forked process alone, with its words. The functions are those of before
    gevent."""
    with connection(fileno=number) as requests:
        requests.send(READY)
        while True:
            content, descriptors, _, _ = _received(requests)
            if not content:
                os._exit(0)
            if not (pid := fork()):
                break
            for descriptor in descriptors:
                os.close(descriptor)
            requests.send(str(pid).encode())
            requests.send(str(os.waitstatus_to_exitcode(wait(pid, 0)[1])).encode())
    for own, descriptor in enumerate(descriptors):
        os.dup2(descriptor, own)
        os.close(descriptor)
    request = json.loads(content)
    os.chdir(request["cwd"])
    for name in os.environ.keys() - request["env"].keys():
        del os.environ[name]
    os.environ.update(request["env"])
    return request["words"]


def _received(requests):
    """As `socket.recv_fds`, which gevent's sockets do not know."""
    descriptors = array.array("i")
    content, extra, flags, address = requests.recvmsg(REQUEST_BYTES, socket.CMSG_LEN(3 * descriptors.itemsize))
    for _, _, data in extra:
        descriptors.frombytes(data)
    return content, list(descriptors), flags, address


def main(words):
    """Run the command in this process."""
    if words[0] == "-m":
        _, name, *arguments = words
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)  # run anew, as it is in a process that starts
        sys.argv = [name, *arguments]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    of_before = {"fork": os.fork, "wait": os.waitpid, "connection": socket.socket}
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        main(serve(int(sys.argv[1]), **of_before))
