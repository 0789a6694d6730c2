"""Types of the gateway's settings, and the rules between them."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from llamafleet.settings.kinds import LONGEST, is_ip_address, is_network
from llamafleet.settings.secrets import MAKE_KEYS
from llamafleet.validation import Listed, Should, Text, Whole

Port = Annotated[Whole, Field(ge=1, le=65535, description="TCP's; with 0 the kernel would choose")]
Address = Annotated[Text, Should("be an IP address, such as 10.0.0.5 or 0.0.0.0", is_ip_address)]
Networks = Listed[Annotated[Text, Should("be an IP address or network, such as 10.0.0.7 or 10.0.0.0/8", is_network)]]
ReachedAt = Annotated[
    Text,
    Should(
        "be an IP address or a host's name without a port, such as 10.0.0.7 or gpu1.example.net",
        lambda text: is_ip_address(text) or re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", text),
    ),
]
Headers = Annotated[
    Listed[
        Annotated[
            Text,
            Should(
                "be the name of a header, such as X-Session-Id",
                functools.partial(re.fullmatch, r"[A-Za-z0-9_-]{1,100}"),
            ),
        ]
    ],
    Field(max_length=32),
]
Seconds = Annotated[Whole, Field(ge=1, le=LONGEST)]
QueueRequests = Annotated[Whole, Field(ge=1, le=100_000, description="one waits at least")]
# HAProxy reserves two buffers of this size for a connection that is at work.
BodyKib = Annotated[Whole, Field(ge=16, le=16384, description="HAProxy's own buffer, to 16 MiB")]


def problems(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong between the settings of the gateway: the setting and a sentence each."""
    listen, keys = settings["gateway_listen"], settings["gateway_api_key_file"]
    guarded = keys is not None or settings["gateway_allow_unauthenticated"]
    if not ipaddress.ip_address(listen).is_loopback and not guarded:
        yield (
            "gateway_listen",
            f"other machines reach {listen}, and no key is asked: give a gateway_api_key_file (made by {MAKE_KEYS}), "
            "or set gateway_allow_unauthenticated = True",
        )
    if (settings["gateway_tls_certificate_file"] is None) != (settings["gateway_tls_key_file"] is None):
        missing = next(one for one in ("gateway_tls_certificate_file", "gateway_tls_key_file") if not settings[one])
        yield missing, "missing; certificate and key are given together"
    if settings["gateway_port"] == settings["gateway_stats_port"]:
        yield "gateway_stats_port", f"{settings['gateway_stats_port']} is the gateway_port: give another one"
