"""Types of the settings of monitoring, and the rules between them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from llamafleet.validation import Listed, Should, Text


def is_place(text: str) -> bool:
    """Whether it is a host's name or address with a port."""
    found = re.fullmatch(r"(?:[A-Za-z0-9][A-Za-z0-9.-]{0,251}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})", text)
    return found is not None and 0 < int(found.group(1)) < 65536


Alertmanagers = Listed[Annotated[Text, Should("be ADDRESS:PORT, such as alerts.example.net:9093", is_place)]]


def problems(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong between the settings of monitoring: the setting and a sentence each."""
    if settings["metrics_port"] == settings["monitoring_port"]:
        yield "monitoring_port", f"{settings['monitoring_port']} is the metrics_port: give another one"
