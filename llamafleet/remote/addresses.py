"""Whether a server of this host can listen at an address.

Contract: a module of survey.py and switch_checks.py. It asks the kernel by binding a socket to no port in particular,
so that addresses count which no interface has and the kernel takes all the same. Changes nothing. Python 3.8, standard
library.
"""

from __future__ import annotations

import socket
from typing import Optional


def cannot_bind(listen: str) -> Optional[str]:
    """Why no server of this host can listen at the address; None where one can."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            listen, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.bind(place)
    except OSError as error:
        return error.strerror or str(error)
    return None
