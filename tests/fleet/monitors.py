"""A real Prometheus and a real node-exporter on loopback with what llamafleet writes for them."""

import contextlib
import json
import shlex
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

from llamafleet.cli.arguments import default_data
from llamafleet.fleet import monitoring
from llamafleet.fleet.monitoring import Watched
from llamafleet.settings.schema import Settings
from sandbox import programs
from sandbox.oracle import free_port
from tasks.lib.templates import TEMPLATES, render

WAIT_SECONDS = 90.0
PROGRAMS = ("prometheus", "promtool", "prometheus-node-exporter")

needs_prometheus = pytest.mark.skipif(
    not all(map(programs.find, PROGRAMS)), reason="no prometheus here: python -m sandbox.programs"
)


def model(name, **settings):
    return {"name": name, "source": "hf:o/r/m.gguf", "port": free_port(), **settings}


def watched(name, *models, reached_at="127.0.0.1", monitors=False, is_gateway=False, **settings):
    """A host of the fleet."""
    ports = {key: free_port() for key in ("metrics_port", "monitoring_port", "gateway_stats_port", "gateway_port")}
    data = {**default_data(), "models": list(models), **ports, **settings}
    return Watched(name, reached_at, Settings.from_data(data), monitors, is_gateway)


def files(host, fleet, keys=None):
    dashboard = (TEMPLATES / "grafana-dashboard.json").read_text()
    return monitoring.files(render, host, fleet, keys or {}, dashboard)


def until(is_so, seconds=WAIT_SECONDS):
    end = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.2)
    return found


@contextlib.contextmanager
def running(command, log):
    """A program that ends with the block."""
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


def exec_start(unit, **changes):
    """The command of a unit, with other words in place of these."""
    text = unit.replace("\\\n", " ").split("ExecStart=")[1].split("\n")[0]
    for old, new in changes.items():
        text = text.replace(old, str(new))
    return shlex.split(text)


def written(folder, made):
    """The configuration in a folder of the test's, asked each second; returns the path of prometheus.yml."""
    folder.mkdir(parents=True)
    for name, text in {**made.texts, **made.secrets}.items():
        (folder / name).write_text(text.replace(monitoring.CREDENTIALS, str(folder)))
    config = folder / "prometheus.yml"
    config.write_text(config.read_text().replace(f'"{monitoring.SCRAPE_SECONDS}s"', '"1s"'))
    return config


class Asked:
    """A Prometheus at this port of 127.0.0.1."""

    def __init__(self, port):
        self.port = port

    def is_ready(self):
        try:
            return self.get("/-/ready") is not None
        except OSError:
            return False

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def api(self, path):
        try:
            return json.loads(self.get(f"/api/v1/{path}"))["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from error

    def query(self, expression):
        """The samples by which it answers."""
        return self.api("query?" + urllib.parse.urlencode({"query": expression}))["result"]

    def known(self, expression):
        """The samples, as soon as there are any: on a busy machine a scrape fails now and then, and nothing is known."""
        return until(lambda: self.query(expression))

    def firing(self):
        """The alerts that are on: name, host, and the instance's name."""
        return {
            (one["labels"]["alertname"], one["labels"].get("host"), one["labels"].get("name"))
            for one in self.api("alerts")["alerts"]
            if one["state"] == "firing"
        }


class Prometheus(Asked):
    """One that runs, with the configuration that `files` gave."""

    def __init__(self, folder, host, made):
        super().__init__(host.settings.monitoring_port)
        self.folder = folder
        self.config = written(folder / "config", made)
        command = exec_start(made.units[monitoring.PROMETHEUS_UNIT])
        places = {"--config.file": self.config, "--storage.tsdb.path": folder / "data"}
        self.command = [
            f"{word.split('=')[0]}={places[word.split('=')[0]]}" if word.split("=")[0] in places else word
            for word in [programs.find("prometheus"), *command[1:]]
        ]

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        process = self.stack.enter_context(running(self.command, self.folder / "prometheus.log"))
        until(lambda: self.is_ready() or process.poll() is not None)
        assert process.poll() is None, (self.folder / "prometheus.log").read_text()
        return self

    def __exit__(self, *_):
        self.stack.close()


@contextlib.contextmanager
def exporter(folder, made, textfiles):
    """node-exporter, as its unit starts it, with the files of that folder."""
    folder.mkdir()
    command = exec_start(made.units[monitoring.EXPORTER_UNIT], **{"/run/llamafleet/metrics": textfiles})
    with running([programs.find("prometheus-node-exporter"), *command[1:]], folder / "exporter.log") as process:
        yield process
