"""The exposure of every unit that is installed or made for a while, against the table of docs/hardening.md."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from llamafleet.remote import common, confined, gate_unit, job_limits, switch_back, verify
from llamafleet.service.unit import liveness_texts
from tasks.lib.templates import render
from tests import planning
from tests.exposure import exposure, of_directives
from tests.fleet import monitors
from tests.service import test_demand

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hardening.md"
UNIT = "llama-server-m0.service"
GATE = {"unit": UNIT, "url": "http://10.0.0.7:8080", "api_keys": "/etc/k", "tls_certificate": None, "gpus": []}
GPU_UNIT = "DevicePolicy=closed\nDeviceAllow=char-nvidia rwm\nDeviceAllow=char-nvidia-uvm rwm\n"


@functools.cache
def documented():
    """By unit: the exposure of the table, and the limit."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.M)
    return {name.strip(): (float(found), float(most)) for name, found, most in rows}


def liveness(listen, folder):
    wanted = planning.settings({"context_tokens": 4096, "listen": listen, "allow_unauthenticated": True})
    (text,) = [
        text for name, text in liveness_texts(render, wanted.models[0], wanted, "k").items() if name.endswith("service")
    ]
    return exposure(text, folder)


def gate(folder, monkeypatch, gpus=(), user="DynamicUser=yes"):
    (folder / UNIT).write_text(GPU_UNIT)
    monkeypatch.setattr(gate_unit.confined, "user", lambda: user)
    monkeypatch.setattr(gate_unit, "UNITS", str(folder))
    return of_directives(gate_unit.directives({**GATE, "gpus": list(gpus)}), folder)


def monitoring(unit, folder):
    box = monitors.watched("box", monitors.model("tiny"), monitors=True)
    return exposure(monitors.files(box, (box,)).units[unit], folder, unit)


UNITS = {
    "monitoring: the timer's service": lambda folder, _: monitoring(common.METRICS_UNIT, folder),
    "monitoring: node-exporter": lambda folder, _: monitoring(common.EXPORTER_UNIT, folder),
    "monitoring: Prometheus": lambda folder, _: monitoring(common.PROMETHEUS_UNIT, folder),
    "liveness check, server on loopback": lambda folder, _: liveness("127.0.0.1", folder),
    "liveness check, server on another address": lambda folder, _: liveness("10.0.0.7", folder),
    "handing connections on to a server on demand": lambda folder, _: exposure(
        test_demand.texts(listen="0.0.0.0", allow_unauthenticated=True)[test_demand.HANDS_ON], folder
    ),
    "gate and start check, without a GPU": gate,
    "gate and start check, with an NVIDIA GPU": lambda folder, patch: gate(folder, patch, [{}]),
    "gate and start check, as nobody, without a GPU": lambda folder, patch: gate(folder, patch, user="User=nobody"),
    "gate and start check, as nobody, with an NVIDIA GPU": lambda folder, patch: gate(
        folder, patch, [{}], "User=nobody"
    ),
    "`llama-server --version` of a new release": lambda folder, _: of_directives(
        confined.properties(*confined.ALONE), folder
    ),
    "the question what a plan allocates": lambda folder, _: of_directives(
        verify.properties({"groups": []}), folder
    ),
    "recovery of a switch, at a boot": lambda folder, _: exposure(
        switch_back.RECOVER.format(python="/usr/bin/python3", name="m", units_of_group=UNIT, folder="/f", etc="/e", var="/v", units="/u"), folder
    ),
    "guard of a switch, or of a tune": lambda folder, _: of_directives(["MemoryMax=256M"], folder),
    "job: build": lambda folder, _: of_directives(job_limits.limits("build", "/mnt/builds"), folder),
    "job: checkout": lambda folder, _: of_directives(job_limits.limits("checkout"), folder),
    "job: fetch": lambda folder, _: of_directives(job_limits.limits("fetch"), folder),
    "job: switch, refresh, watch, tune": lambda folder, _: of_directives(job_limits.limits("tune"), folder),
    "job: packages, toolkit": lambda folder, _: of_directives(job_limits.limits("toolkit"), folder),
}  # fmt: skip


@pytest.mark.parametrize("name", UNITS)
def test_the_exposure_is_what_the_documents_say(name, tmp_path, monkeypatch):
    found, most = documented()[name]
    score = UNITS[name](tmp_path, monkeypatch)
    assert score <= most
    assert abs(score - found) <= 0.2, "docs/hardening.md has another figure"  # systemd's weights differ by version


@pytest.mark.parametrize("name", [name for name in UNITS if name.startswith(("liveness", "gate"))])
def test_what_reads_a_servers_answers_is_as_tight_as_the_server(name):
    assert documented()[name][1] <= 2.0
