"""What a run leaves for people to do on a host."""

from __future__ import annotations

import dataclasses

from llamafleet.host.left import Left
from llamafleet.remote.common import MODELS
from llamafleet.service.left import open_ports, sentences
from tests import planning
from tests.service.test_disks import GIB, decided, everywhere

OPEN = {"listen": "10.0.0.7", "allow_unauthenticated": True}
WHY = "firewalld closes port 9000 (zone public): firewall-cmd ..."


def said(left, certificates=None, *, models=(), old=()):
    outcome, _ = decided(everywhere(100 * GIB), model_bytes=dict(old))
    settings = planning.settings(*models) if models else outcome.settings
    inputs = dataclasses.replace(outcome.inputs, settings=settings)
    return list(sentences(dataclasses.replace(outcome, inputs=inputs), left, certificates or {}))


def test_nothing_is_left_on_a_host_that_is_well():
    assert said(Left(spaces=everywhere(14 * GIB))) == [] == said(Left())


def test_a_port_that_the_firewall_closes():
    """ollama/ollama#8759: firewalld closes the port, and all was green."""
    left = Left(closed={"9000": WHY, "9001": "another"})
    assert said(left, models=({"name": "chat", **OPEN},)) == [f"open the firewall for chat: {WHY}"]
    # On loopback, or at another port, it does not matter.
    assert said(left, models=({"name": "chat"},)) == [] == said(left, models=({"port": 8080, **OPEN},))


def test_ports_are_asked_about_that_other_machines_are_to_reach():
    models = {"port": 1}, {"name": "b", "port": 2, **OPEN}, {"name": "c", "port": 3, **OPEN, "listen": "::"}
    settings = planning.settings(*models)
    assert open_ports(settings, is_gateway=False, is_watched=False) == {2: "b", 3: "c"}
    shared = dataclasses.replace(settings, gateway_listen="10.0.0.7", gateway_port=5, metrics_port=6)
    of_all = {2: "b", 3: "c", 5: "the gateway", 6: "the monitoring"}
    assert open_ports(shared, is_gateway=True, is_watched=True) == of_all
    local = dataclasses.replace(shared, gateway_listen="127.0.0.1", metrics_listen="::1")
    assert open_ports(local, is_gateway=True, is_watched=True) == {2: "b", 3: "c"}


def test_the_firewall_is_to_be_opened_for_the_monitoring_too():
    assert said(Left(closed={"9100": WHY})) == [f"open the firewall for the monitoring: {WHY}"]


def test_a_reboot_that_is_due():
    assert said(Left(reboot="packages want a reboot (/run/reboot-required)")) == [
        "reboot the host: packages want a reboot (/run/reboot-required)"
    ]


def test_a_certificate_that_ends_soon():
    assert said(Left(), {"m0": "models: m0: ... ends on 2026-12-01"}) == ["models: m0: ... ends on 2026-12-01"]


def test_a_disk_that_will_not_hold_the_next_model():
    full = Left(spaces=everywhere(5 * GIB))
    begin = f"make room for the next model: 5.0 GiB are free at {MODELS}, the largest model of this host has 12.0 GiB: "
    assert said(full) == [f"{begin}name a larger disk in models_dir"]
    assert said(full, old={f"{MODELS}/old-1/o.gguf": 9 * GIB}) == [
        f"{begin}remove what no instance uses: {MODELS}/old-1 (9.0 GiB)"
    ]
