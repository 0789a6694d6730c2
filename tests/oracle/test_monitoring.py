"""A real llama-server, asked by a real Prometheus with its key: it has each metric that alerts and dashboard name."""

import json
import re
import urllib.request

import pytest

from llamafleet.fleet import alerts
from sandbox import models, oracle
from sandbox.layouts import TINY
from tasks.lib.templates import TEMPLATES
from tests.fleet.monitors import Prometheus, files, model, needs_prometheus, until, watched

pytestmark = [pytest.mark.oracle, needs_prometheus]
KEY = "the-servers-own-key-0001"


def test_llama_server_has_what_alerts_and_dashboard_name(tmp_path):
    build, port, keys = oracle.build(), oracle.free_port(), tmp_path / "keys"
    keys.write_text(f"{KEY}\n{KEY}\n")
    box = watched("box", model("tiny", port=port), monitors=True)
    texts = [(TEMPLATES / "grafana-dashboard.json").read_text(), json.dumps(alerts.rules())]
    named = {name for text in texts for name in re.findall(r"llamacpp:[a-z_]+", text)}
    command = [build.llama_server, "--model", models.make(TINY["dense"], tmp_path, seed=0), "--host", "127.0.0.1",
               "--port", str(port), "--ctx-size", "512", "--threads", "1", "--metrics", "--no-ui", "--offline",
               "--api-key-file", str(keys)]  # fmt: skip
    with oracle.serving(command, port, tmp_path / "log"):
        body = json.dumps({"prompt": "a b c", "n_predict": 4}).encode()
        asked = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/completion", body, asked), timeout=60)
        with Prometheus(tmp_path / "prometheus", box, files(box, (box,), {("box", "tiny"): KEY})) as prometheus:
            until(lambda: prometheus.query('up{job="servers"} == 1'))
            found = {one["metric"]["__name__"] for one in prometheus.query('{__name__=~"llamacpp:.*"}')}
    assert len(named) >= 8 and named - found == set()
