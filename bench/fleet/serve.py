"""The process that answers for all simulated hosts: python -m bench.fleet.serve COUNT FOLDER

Until it is ended. In the folder it writes the models' headers, the hosts' keys and the inventory, and then a socket
that tells whoever connects how often each program was run on the hosts, as JSON.
"""

from __future__ import annotations

import pyinfra_cli  # isort: skip  # first: it makes threads greenlets, of which a process can have thousands  # noqa: F401

import json
import socket
import sys
from pathlib import Path

from bench.fleet.converged import Converged
from bench.fleet.scale import COMMIT, CONTROL, KINDS, address, settings, write_inventory
from bench.fleet.ssh import Servers
from sandbox import models
from sandbox.hub import Hub


def serve(count: int, folder: Path) -> None:
    """Answer for so many hosts."""
    with Hub() as hub:
        files = {}
        for layout in {layout for _, layout in KINDS[:count]}:
            path = models.weightless(folder, layout)
            hub.add(f"bench/{layout}", path.name, path)
            files[layout] = path.name
        data = [settings(number, hub.url, files) for number in range(count)]
        answers = {
            address(number): Converged(f"host{number}", KINDS[number % len(KINDS)][0], one, COMMIT)
            for number, one in enumerate(data)
        }
        with Servers(answers) as servers, socket.socket(socket.AF_UNIX) as control:
            servers.write_known_hosts(folder / "known_hosts")
            write_inventory(folder, data, [servers.port(address(number)) for number in range(count)])
            control.bind(str(folder / f"{CONTROL}.made"))
            control.listen()
            (folder / f"{CONTROL}.made").rename(folder / CONTROL)
            while True:
                connection, _ = control.accept()
                with connection:
                    connection.sendall(json.dumps(servers.asked).encode())


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
