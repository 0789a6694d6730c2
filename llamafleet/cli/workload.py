"""What the servers of a fleet were asked for, as a table and as JSON, with the settings that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from llamafleet.cli.tables import aligned
from llamafleet.host.answers import Figures, Observed
from llamafleet.printable import one_line
from llamafleet.tuning.observed import Fitting

KEYS = ("prompt_tokens", "live_tokens", "reply_tokens", "concurrency")
COUNTED = ("prompt_tokens", "cached_tokens", "reply_tokens")
COLUMNS = ("host", "instance", "requests", *KEYS, "nearest profile")


@dataclass(frozen=True)
class InstanceWorkload:
    """What an instance's server was asked for, what fits it, and what its settings are: none where the inventory does
    not name it."""

    observed: Observed
    fitting: Fitting | None
    now: Mapping[str, int | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For `--json`: everything."""
        fits = asdict(self.fitting) if self.fitting else None
        return {"observed": asdict(self.observed), "fitting": fits, "now": dict(self.now)}


@dataclass(frozen=True)
class HostWorkload:
    """The instances of a host by name, or why they cannot be read."""

    instances: Mapping[str, InstanceWorkload] = field(default_factory=dict)
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        instances = {name: one.to_json() for name, one in self.instances.items()}
        return {"problem": self.problem, "instances": instances}


def table(hosts: Mapping[str, HostWorkload]) -> str:
    """A line for each instance: mean, median and what nine tenths do not exceed; below them the settings that fit."""
    rows = [COLUMNS, *(tuple(map(one_line, row)) for name, host in hosts.items() for row in _rows(name, host))]
    below = (one_line(f"{name}: {line}") for name, host in hosts.items() for line in _below(host))
    return "\n".join([*aligned(rows), *below])


def _rows(name: str, host: HostWorkload) -> Iterator[tuple[str, ...]]:
    for instance, one in host.instances.items():
        found = one.observed
        profile = f"{one.fitting.profile} (within {one.fitting.factor:.1f}x)" if one.fitting else ""
        cells = (_cell(getattr(found, key)) for key in KEYS)
        yield (name, instance, str(found.requests), *cells, profile)
    if not host.instances:
        yield (name, "-", *[""] * (len(COLUMNS) - 2))


def _cell(figures: Figures | None) -> str:
    return "" if figures is None else f"{figures.mean:.4g} ({figures.p50:.4g}, {figures.p90:.4g})"


def _below(host: HostWorkload) -> Iterator[str]:
    if host.problem:
        yield host.problem
    for name, one in host.instances.items():
        found = one.observed
        if found.counters is not None:
            read, cached, wrote = (f"{getattr(found.counters, key):,.0f}" for key in COUNTED)
            yield f"{name}: since its start it has read {read} tokens, taken {cached} from its cache, written {wrote}"
        if one.fitting is None:
            yield f"{name}: the journal has no request of a user in this time"
            continue
        if found.since is not None and found.until is not None:
            short = f", {found.cut_short} were cut short" if found.cut_short else ""
            yield f"{name}: {found.requests} requests from {_day(found.since)} to {_day(found.until)}{short}"
        now = {key: one.now[key] for key in one.fitting.settings if key in one.now}
        yield f"{name}: fits: {_entry(one.fitting.settings)}" + (f"; the inventory has {_entry(now)}" if now else "")
        yield from (f"{name}: {remark}" for remark in one.fitting.remarks)


def _entry(settings: Mapping[str, int | None]) -> str:
    """As an inventory has it."""
    return ", ".join(f'"{key}": {value}' for key, value in settings.items())


def _day(seconds: float) -> str:
    """A unix time as people write it, in UTC; a host may say any number."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return f"{seconds:.0f}"
