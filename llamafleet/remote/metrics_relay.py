"""What a host's servers and its gateway tell of themselves, for metrics.py to pass on.

Part of metrics.py and under its contract: Python 3.8, standard library; common.py, gate_server.py and liveness.py lie
beside it. What is passed on is bounded, and of known names and forms: a server may have been taken over.

Decision 26: docs/decisions/0026-watched-by-standard-parts.md.
"""

from __future__ import annotations

import http.client
import re
from typing import Dict, List, Optional, Sequence

import common
from gate_server import ask, first_key, trust
from liveness import read_spec

ANSWER_SECONDS = 5.0
ANSWER_LIMIT_BYTES = 16 * 2**20
# Of HAProxy's some hundred metrics for each server, those that tell who waits, for how long, and what is answered.
OF_GATEWAY = re.compile(
    r"haproxy_(?:frontend|backend|server)_(?:status|current_sessions|current_queue|limit_sessions|http_requests_total|"
    r"http_responses_total|response_time_average_seconds|queue_time_average_seconds|total_time_average_seconds|"
    r"check_failures_total|redispatch_warnings_total|retry_warnings_total)"
)
# node-exporter passes over the whole file where one line is no metric. So of what a server tells, these lines alone.
OF_SERVER = re.compile(r"(llamacpp:[a-z_]{1,60}) ([+-]?(?:[0-9]{1,20}(?:\.[0-9]{1,20})?(?:e[+-]?[0-9]{1,3})?|inf)|nan)")
KIND = re.compile(r"# TYPE llamacpp:[a-z_]{1,60} (?:counter|gauge)")


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def together(relayed: Sequence[str]) -> List[str]:
    """Samples of several servers, ordered so that those of one metric follow each other, behind one HELP and TYPE."""
    found: Dict[str, Dict[str, None]] = {}
    for one in relayed:
        words = one.split(None, 3)
        name = words[2] if one.startswith("#") else re.split(r"[{ ]", one, maxsplit=1)[0]
        kept = found.setdefault(name, {})
        begins = " ".join(words[:3]) + " "
        if not one.startswith("#") or not any(other.startswith(begins) for other in kept):
            kept[one] = None
    return [one for kept in found.values() for one in kept]


def is_running(shown: Dict[str, str]) -> bool:
    return (shown.get("ActiveState"), shown.get("SubState")) == ("active", "running")


def of_server(name: str) -> Optional[List[str]]:
    """What an instance's server tells at /metrics, nothing where it does not answer; None for one that does not run.
    Raises OSError, ValueError and SubprocessError where its plan or its key cannot be read."""
    if not is_running(common.show(common.unit_of(name), "ActiveState", "SubState", seconds=10.0)):
        return None
    spec = read_spec(common.plan_path(name))
    trust(spec)
    status, told = ask(spec["url"], "/metrics", first_key(spec), seconds=ANSWER_SECONDS)
    return labelled(told, name) if status == 200 and isinstance(told, str) else []


def labelled(told: str, name: str) -> List[str]:
    """llama-server's metrics with the name of the instance, each once, without their help."""
    found: Dict[str, str] = {}
    for one in told.splitlines():
        sample, kind = OF_SERVER.fullmatch(one), KIND.fullmatch(one)
        if sample:
            found.setdefault(sample.group(1), f'{sample.group(1)}{{name="{escaped(name)}"}} {sample.group(2)}')
        elif kind:
            found.setdefault(kind.group(), one)
    return list(found.values())


def is_comment(one: str, names: "re.Pattern[str]") -> bool:
    words = one.split(None, 3)
    return len(words) == 4 and words[0] == "#" and words[1] in ("HELP", "TYPE") and bool(names.fullmatch(words[2]))


def of_gateway(port: int) -> List[str]:
    """What HAProxy tells, of OF_GATEWAY. Raises OSError and HTTPException where it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/metrics?scope=frontend&scope=backend&scope=server")
        told = connection.getresponse().read(ANSWER_LIMIT_BYTES).decode("utf-8", "replace")
    finally:
        connection.close()
    return [
        one
        for one in told.splitlines()
        if is_comment(one, OF_GATEWAY) or OF_GATEWAY.fullmatch(re.split(r"[{ ]", one, maxsplit=1)[0])
    ]
