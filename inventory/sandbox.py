"""The disposable hosts that are up now (`python -m sandbox up --hosts 2`), as pyinfra hosts in the group `sandbox`."""

from __future__ import annotations

from sandbox import hosts

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
        },
    )
    for host in hosts.listed()
    if host.is_running
]
