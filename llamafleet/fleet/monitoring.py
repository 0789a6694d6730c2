"""Who watches a fleet and how: the files of Prometheus and node-exporter, from the inventory alone.

Each host has node-exporter, and a timer that writes what is known of its instances to a file which node-exporter reads.
Prometheus asks a server itself where every host of the group `monitoring` reaches it, it speaks plain http, and
asking does not start it. What all the others tell, also HAProxy at its loopback, the timer writes into the same file:
so no key leaves its host for it, and no further port is open.

Decision 26: docs/decisions/0026-watched-by-standard-parts.md.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamafleet.fleet import alerts
from llamafleet.remote.common import (
    EXPORTER_UNIT,
    METRICS,
    METRICS_TIMER,
    METRICS_UNIT,
    MONITORING,
    PROMETHEUS_UNIT,
    helper,
)
from llamafleet.service.command import unit_escape
from llamafleet.service.unit import Renderer, path_of
from llamafleet.settings.schema import DEMAND, Instance, Settings

SCRAPE_SECONDS = 15
CREDENTIALS = f"/run/credentials/{PROMETHEUS_UNIT}"
DATASOURCE = "llamafleet"
# Where packages put the programs; those of Debian and Arch call node-exporter otherwise.
PROMETHEUS = "/usr/bin/prometheus"
EXPORTERS = {"dnf": "/usr/bin/node_exporter", "zypper": "/usr/bin/node_exporter"}
EXPORTER = "/usr/bin/prometheus-node-exporter"
UNIT_TEMPLATES = {
    PROMETHEUS_UNIT: "llamafleet-prometheus.service.j2", EXPORTER_UNIT: "llamafleet-node-exporter.service.j2",
    METRICS_UNIT: "llamafleet-metrics.service.j2", METRICS_TIMER: "llamafleet-metrics.timer.j2",
}  # fmt: skip


@dataclass(frozen=True)
class Watched:
    """A host of the inventory: its name, the address or name by which others reach it, its settings, and whether it is
    of the groups `monitoring` and `gateway`."""

    name: str
    reached_at: str
    settings: Settings
    monitors: bool = False
    is_gateway: bool = False


@dataclass(frozen=True)
class Files:
    """What a host gets: units by name, the files of a configuration by name, and of these the secrets, for root alone.
    `digest` is that of all."""

    digest: str
    units: Mapping[str, str]
    texts: Mapping[str, str]
    secrets: Mapping[str, str] = field(repr=False)


def problems(host: Watched, fleet: Sequence[Watched]) -> Iterator[str]:
    """What keeps this host of the fleet from being watched, a sentence each."""
    settings = host.settings
    others = [one for one in fleet if one.monitors and one.name != host.name]
    listens = settings.metrics_listen or host.reached_at
    if others and not is_address(listens):
        yield (f"{host.name}: metrics_listen: {listens} is a name, and node-exporter listens at an address: set "
               "metrics_listen, or reached_at, to the address by which the hosts of `monitoring` reach it")  # fmt: skip
    elif others and ipaddress.ip_address(listens).is_loopback and listens != host.reached_at:
        yield (f"{host.name}: metrics_listen: Prometheus on {others[0].name} cannot reach {listens} of another host: "
               "give an address of this host")  # fmt: skip
    for one in others:
        if not is_address(one.reached_at) and not settings.metrics_allowed_clients:
            yield (f"{host.name}: metrics_allowed_clients: {one.name} of `monitoring` is known as {one.reached_at} "
                   "alone, which is no address: set its reached_at, or name its address here")  # fmt: skip
    ports = {f"the port of {one.name}": one.port for one in settings.models}
    if host.is_gateway:
        ports |= {key: getattr(settings, key) for key in ("gateway_port", "gateway_stats_port")}
    own = {"metrics_port": settings.metrics_port}
    own |= {"monitoring_port": settings.monitoring_port} if host.monitors else {}
    for key, port in own.items():
        for what in (what for what, taken in ports.items() if taken == port):
            yield f"{host.name}: {key}: {port} is {what}: give another one"


def files(
    render: Renderer, host: Watched, fleet: Sequence[Watched], keys: Mapping[tuple[str, str], str], dashboard: str,
    exporter: str = EXPORTER, program: str = PROMETHEUS,
) -> Files:  # fmt: skip
    """The files of a host of the fleet, of which no problem is known. `keys` are the API keys by host and instance, of
    servers that ask for one; `dashboard` is Grafana's, as JSON, `exporter` the path of
    node-exporter, `program` that of Prometheus."""
    texts: dict[str, str] = {}
    secrets: dict[str, str] = {}
    if host.monitors:
        secrets = {key_name(key): key for key in keys.values()}
        texts = {
            "prometheus.yml": as_yaml(prometheus(host, fleet, keys)),
            "rules.yml": as_yaml(alerts.rules()),
            "grafana-datasource.yml": as_yaml(datasource(host.settings)),
            "grafana-dashboards.yml": as_yaml(provider()),
            "llamafleet.json": dashboard,
        }
    units = dict(unit_texts(render, host, fleet, sorted(secrets), exporter, program))
    content = json.dumps([units, texts, secrets], sort_keys=True)
    return Files(hashlib.sha256(content.encode()).hexdigest()[:16], units, texts, secrets)


def as_yaml(value: object) -> str:
    """JSON is YAML too, and nothing in it is taken for something else."""
    return json.dumps(value, indent=1) + "\n"


def key_name(key: str) -> str:
    """The name of the file that has this key."""
    return f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


# --- who is asked by whom ---------------------------------------------------------------------------


def scraped(host: Watched, fleet: Sequence[Watched]) -> list[Instance]:
    """The servers of a host that Prometheus asks itself, wherever it runs."""
    monitors = [one for one in fleet if one.monitors]
    # How many copies "per_gpu" are, and so their ports, the inventory does not say.
    return [
        one for one in host.settings.models
        if one.copies == 1 and one.start != DEMAND and one.tls_certificate_file is None
        and monitors and all(reaches(monitor, host, one) for monitor in monitors)
    ]  # fmt: skip


def reaches(monitor: Watched, host: Watched, instance: Instance) -> bool:
    """Whether the server listens where a monitor comes by, and to it."""
    if monitor.name == host.name:
        return True
    listen = ipaddress.ip_address(instance.listen)
    if listen.is_loopback and instance.listen != host.reached_at:
        return False
    allowed = [ipaddress.ip_network(one, strict=False) for one in instance.allowed_clients]
    if not allowed or not is_address(monitor.reached_at):
        return not allowed
    return any(ipaddress.ip_address(monitor.reached_at) in network for network in allowed)


def relays_gateway(host: Watched, fleet: Sequence[Watched]) -> bool:
    """Whether the host's timer writes what its gateway tells, at loopback: Prometheus cannot ask for it everywhere."""
    return host.is_gateway and [one.name for one in fleet if one.monitors] != [host.name]


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def address(monitor: Watched, host: Watched, listen: str) -> str:
    """Where a monitor finds what listens there on a host."""
    listens = ipaddress.ip_address(listen)
    if not listens.is_unspecified:
        return listen
    if monitor.name == host.name:
        return "::1" if listens.version == 6 else "127.0.0.1"
    return host.reached_at


def exporter_listens(host: Watched, fleet: Sequence[Watched]) -> str:
    """Where the host's node-exporter listens."""
    if host.settings.metrics_listen:
        return host.settings.metrics_listen
    return "127.0.0.1" if [one.name for one in fleet if one.monitors] == [host.name] else host.reached_at


def exporter_clients(host: Watched, fleet: Sequence[Watched]) -> list[str]:
    """Who may read the host's node-exporter beside the host itself, as systemd's IPAddressAllow= takes it."""
    monitors = [one.reached_at for one in fleet if one.monitors and is_address(one.reached_at)]
    return list(dict.fromkeys([*monitors, *host.settings.metrics_allowed_clients]))


# --- Prometheus ----------------------------------------------------------------------------------------


def prometheus(host: Watched, fleet: Sequence[Watched], keys: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """prometheus.yml of a host of the group `monitoring`."""
    settings = host.settings
    hosts = [target(one, address(host, one, exporter_listens(one, fleet)), one.settings.metrics_port) for one in fleet]
    jobs = [job("hosts", hosts), *servers(host, fleet, keys)]
    if host.is_gateway and not relays_gateway(host, fleet):
        jobs.append(job("gateway", [target(host, "127.0.0.1", settings.gateway_stats_port)]))
    jobs.append(job("prometheus", [target(host, "127.0.0.1", settings.monitoring_port)]))
    made: dict[str, Any] = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": jobs,
    }
    if settings.alertmanagers:
        made["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": list(settings.alertmanagers)}]}]}
    return made


def servers(host: Watched, fleet: Sequence[Watched], keys: Mapping[tuple[str, str], str]) -> Iterator[dict[str, Any]]:
    """A job for each key, since a job has one; all have the label job="servers"."""
    by_key: dict[str, list[dict[str, Any]]] = {}
    for one in fleet:
        for instance in scraped(one, fleet):
            labels = {"name": instance.name, "job": "servers"}
            found = target(one, address(host, one, instance.listen), instance.port, labels)
            by_key.setdefault(keys.get((one.name, instance.name), ""), []).append(found)
    for number, (key, targets) in enumerate(by_key.items(), 1):
        made = job(f"servers-{number}", targets)
        if key:
            made["authorization"] = {"credentials_file": f"{CREDENTIALS}/{key_name(key)}"}
        yield made


def job(name: str, targets: list[dict[str, Any]]) -> dict[str, Any]:
    return {"job_name": name, "static_configs": targets}


def target(host: Watched, at: str, port: int, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    place = f"[{at}]:{port}" if ":" in at else f"{at}:{port}"
    return {"targets": [place], "labels": {"host": host.name, **(labels or {})}}


# --- Grafana -------------------------------------------------------------------------------------------


def datasource(settings: Settings) -> dict[str, Any]:
    """Provisioning of Grafana: Prometheus of this host."""
    one = {
        "name": DATASOURCE, "uid": DATASOURCE, "type": "prometheus", "access": "proxy",
        "url": f"http://127.0.0.1:{settings.monitoring_port}", "jsonData": {"timeInterval": f"{SCRAPE_SECONDS}s"},
    }  # fmt: skip
    return {"apiVersion": 1, "datasources": [one]}


def provider() -> dict[str, Any]:
    """Provisioning of Grafana: the dashboard beside this file."""
    options = {"path": f"{MONITORING}/current"}
    return {"apiVersion": 1, "providers": [{"name": "llamafleet", "type": "file", "options": options}]}


# --- units ---------------------------------------------------------------------------------------------


def unit_texts(
    render: Renderer, host: Watched, fleet: Sequence[Watched], secrets: Sequence[str], exporter: str,
    program: str,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """The units of a host by name."""
    settings, listens = host.settings, exporter_listens(host, fleet)
    words = [helper("metrics.py")]
    words += [word for one in scraped(host, fleet) for word in ("--scraped", one.name)]
    words += ["--gateway", str(settings.gateway_stats_port)] if relays_gateway(host, fleet) else []
    asked = dict.fromkeys(one.listen for one in settings.models if not is_local(one.listen))
    values = {
        "python": path_of(settings.python), "command": [unit_escape(word) for word in words], "asked": list(asked),
        "listen": f"[{listens}]:{settings.metrics_port}" if ":" in listens else f"{listens}:{settings.metrics_port}",
        "clients": exporter_clients(host, fleet), "own": [] if is_local(listens) else [listens],
        "metrics": METRICS, "folder": f"{MONITORING}/current", "port": settings.monitoring_port,
        "days": settings.monitoring_days, "secrets": secrets,
        "exporter": unit_escape(exporter), "program": unit_escape(program),
    }  # fmt: skip
    for unit, template in UNIT_TEMPLATES.items():
        if unit != PROMETHEUS_UNIT or host.monitors:
            yield unit, render(template, values)


def is_local(listen: str) -> bool:
    """Whether systemd's `localhost` has the address by which the host itself asks there."""
    found = ipaddress.ip_address(listen)
    return found.is_loopback or found.is_unspecified
