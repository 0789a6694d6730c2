"""The disposable hosts that are up now (`make sandbox-up`), in the group `sandbox`.

Each serves a tiny random model, from the stand-ins for GitHub and the Hugging Face Hub where those
run (`python -m sandbox.outside start`, which `make sandbox-up` does).
"""

from __future__ import annotations

import json

from sandbox import hosts, outside

_outside = json.loads(outside.STATE.read_text()) if outside.STATE.exists() else {"settings": {}, "sources": {}}


def _models(host: hosts.SandboxHost) -> list[dict[str, object]]:
    """The dense model for the hosts of odd number, the one with experts, in three shards, for the others."""
    source = _outside["sources"].get("dense" if host.number % 2 else "moe")
    return [{"name": "tiny", "source": source, "port": 8080, "listen": host.address, "context_tokens": 4096}]


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
            # A folder that the hosts share: one compiles, the others take the result.
            "build_cache": outside.BUILDS_ON_HOST,
            "models": _models(host) if _outside["sources"] else [],
            **_outside["settings"],
        },
    )
    for host in hosts.listed()
    if host.is_running
]
