"""What stages beside a host's own changes would do, as they say it while a run is prepared: gateways, monitoring."""

from __future__ import annotations

from collections.abc import Iterable

from pyinfra.api.host import Host

_said: dict[str, list[str]] = {}


def say(host: Host, part: str, reasons: Iterable[str]) -> None:
    """Log what is to be done to this part of the host, and why, and remember it."""
    for reason in reasons:
        host.log(f"to do: {part}: {reason}")
        _said.setdefault(host.name, []).append(f"{part}: {reason}")


def said() -> dict[str, tuple[str, ...]]:
    """All that was said in this process, by host."""
    return {name: tuple(phrases) for name, phrases in _said.items()}
