"""A stand-in for a host, as metrics.py reads one, with a stand-in for llama-server's /metrics."""

import contextlib
import http.server
import json
import re
import shutil
import threading

import common
import metrics

from sandbox.oracle import free_port

PLANNED, HELD = 3 * 2**30, 2 * 2**30
SERVER = """# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 8192
# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
something_else 3
"""
HAPROXY = """# HELP haproxy_process_uptime_seconds x
# TYPE haproxy_process_uptime_seconds gauge
haproxy_process_uptime_seconds 3
# HELP haproxy_server_current_sessions Number of current sessions
# TYPE haproxy_server_current_sessions gauge
haproxy_server_current_sessions{proxy="model:tiny",server="gpu1:tiny"} 2
"""


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        key = self.headers.get("Authorization")
        status, text = (200, server.text) if not server.key or key == f"Bearer {server.key}" else (401, "{}")
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())


@contextlib.contextmanager
def stand_in():
    """llama-server, or HAProxy's exporter."""
    made = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
    made.text, made.key, made.asked = SERVER, "a-key-of-the-server", []
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


class Host:
    """A host with the instance `tiny`, as a deploy leaves it."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.units = {}
        for path in ("instances/tiny", "gate/liveness", "units"):
            (folder / path).mkdir(parents=True)
        good = folder / "good/tiny"
        good.mkdir(parents=True)
        for name in (common.unit_of("tiny"), *common.liveness_units("tiny")):
            for where in (folder / "units", good):
                (where / name).write_text("# Made by llamafleet\n")
        (folder / "keys").write_text(f"{server.key}\n")
        release = folder / "releases/0123456789abcdef"
        (release / "bin").mkdir(parents=True)
        (release / "bin/llama-server").write_text("")
        (release / "release.json").write_text(json.dumps({"files": {"llama-server": "0" * 64}}))
        self.plan()
        self.write("gate/tiny.json", {"ok": True, "time": "2026-11-30T10:00:00Z", "speeds": [40.0, 50.0, 60.0, 20.0]})
        self.shows("tiny", MemoryMax=4 * 2**30, ControlGroup="/system.slice/tiny", NRestarts=2)
        group = folder / "cgroups/system.slice/tiny"
        group.mkdir(parents=True)
        (group / "memory.stat").write_text(f"anon {HELD}\nshmem 0\nfile 9000\ninactive_file 4096\n")
        (group / "memory.current").write_text(f"{HELD + 9000}\n")

    def plan(self, gpus=(), **changes):
        """plan.json as a deploy writes it, and then edited by `changes`, where they are of its identity."""
        record = {
            "schema": 1, "name": "tiny", "release": "0123456789abcdef", "commit": "c0ffee", "allowed_drop_ins": [],
            "gate": {"unit": common.unit_of("tiny"), "url": f"http://127.0.0.1:{self.server.server_port}",
                     "api_keys": str(self.folder / "keys"), "argv": [], "gpus": list(gpus)},
            "plan": {"predicted": {"decode_tokens_per_s": 45.5},
                     "ledger": [{"device": "GPU0", "weights_bytes": 7}, {"device": "host", "weights_bytes": PLANNED}]},
        }  # fmt: skip
        record = {**record, "identity": common.identity_of(record), **changes}
        self.write("instances/tiny/plan.json", record)
        shutil.copy(self.folder / "instances/tiny/plan.json", self.folder / "good/tiny/plan.json")

    def write(self, path, value):
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(json.dumps(value))

    def shows(self, name, **properties):
        fine = {"ActiveState": "active", "SubState": "running", "MainPID": 0, "NeedDaemonReload": "no"}
        told = {**fine, **self.units.get(common.unit_of(name), {}), **properties}
        self.units[common.unit_of(name)] = {key: str(value) for key, value in told.items()}

    def show(self, unit, *properties, seconds=None):
        return self.units.get(unit, {"ActiveState": "active", "SubState": "waiting"})

    def wrote(self, *words):
        """The samples of the file after a run, by name with labels."""
        assert metrics.main(list(words)) == 0
        text = (self.folder / "run/metrics/llamafleet.prom").read_text()
        return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, re.M)}


def redirect(monkeypatch, folder):
    """Let our places be in this folder."""
    for name in ("INSTANCES", "GOOD", "RELEASES", "RUN", "UNITS", "GATEWAY"):
        monkeypatch.setattr(common, name, str(folder / name.lower()))
    monkeypatch.setattr(common, "METRICS", str(folder / "run/metrics"))
    monkeypatch.setattr(common, "GATES", str(folder / "gate"))
    monkeypatch.setattr(metrics, "CGROUPS", str(folder / "cgroups"))
