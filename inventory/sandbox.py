"""The disposable hosts that are up now (`make sandbox-up`), in the group `sandbox`.

Each serves a model from the stand-in for the Hugging Face Hub, if the stand-ins run: `make sandbox-up` starts them by
`python -m sandbox.outside start`, with tiny random models; `make demo` with a real one.
"""

from __future__ import annotations

import json

from sandbox import hosts, outside

_outside = json.loads(outside.STATE.read_text()) if outside.STATE.exists() else {"settings": {}, "sources": {}}


def _models(host: hosts.SandboxHost) -> list[dict[str, object]]:
    """The real model where there is one. Else the dense model for hosts with odd numbers, and for the others the model
    with experts, in three shards."""
    sources = _outside["sources"]
    kind = "real" if "real" in sources else "dense" if host.number % 2 else "moe"
    name = "gemma" if kind == "real" else "tiny"
    return [{"name": name, "source": sources[kind], "port": 8080, "listen": host.address, "context_tokens": 4096}]


sandbox = [
    (
        host.name,
        {
            "ssh_hostname": host.address,
            "ssh_port": host.port,
            "ssh_user": "root",
            "ssh_key": str(host.ssh_key),
            "ssh_known_hosts_file": str(host.known_hosts),
            "ssh_strict_host_key_checking": "yes",
            # A folder that the hosts share: the first host compiles, the other hosts take its result.
            "build_cache": outside.BUILDS_ON_HOST,
            "models": _models(host) if _outside["sources"] else [],
            **_outside["settings"],
        },
    )
    for host in hosts.listed()
    if host.is_running
]
