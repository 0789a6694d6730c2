"""The state of many hosts on a page: how many are in which state, the models' replicas, what differs, then a table with
the worst first, in which hosts that are fine and alike share a line. And what changed between two looks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llamafleet.cli.status import (
    AS_WANTED,
    CANNOT_BE_READ,
    COLUMNS,
    GIB,
    STATES,
    HostStatus,
    InstanceStatus,
    gate_of,
    ram_of,
    remarks,
    rows_of,
    space,
)
from llamafleet.cli.tables import PLAIN, Look, aligned
from llamafleet.printable import one_line

Hosts = Mapping[str, HostStatus]

FOLDED_FROM = 3  # hosts that are alike: of fewer each has its lines
PHRASES = 5  # kinds of differences that the summary names
DRIFT = COLUMNS.index("drift")
# Columns that a narrow terminal does without, in this order.
LEAVE_OUT = ("restarts", "RAM", "plan", "GPU", "last gate", "tok/s")
BELOW = "see below"
_COPY = re.compile(r"-\d+$")  # of the names of copies


def page(hosts: Hosts, look: Look = PLAIN, everything: bool = False) -> str:
    """The state of all hosts. A summary comes first where there are several hosts. `everything`: with a line for each
    host that is fine, too."""
    lines = [look.wrapped(line) for line in summary(hosts)] + [""] if len(hosts) > 1 else []
    groups = folded(hosts, everything)
    rows = [tuple(map(one_line, row)) for group in groups for row in group.rows()]
    below = [f"{group.label}: {remark}" for group in groups for remark in group.remarks()]
    if not _fits((COLUMNS, *rows), look):
        below = [f"{row[0]}: {row[1]}: {row[DRIFT]}" for row in rows if row[DRIFT] not in ("none", "")] + below
        rows = [(*row[:DRIFT], BELOW if row[DRIFT] not in ("none", "") else row[DRIFT]) for row in rows]
    lines += aligned(_narrowed((COLUMNS, *rows), look))
    return "\n".join([*lines, *(look.wrapped(remark) for remark in below)])


# --- the summary --------------------------------------------------------------------------------


def summary(hosts: Hosts) -> Iterator[str]:
    """Hosts by state, replicas by model, and what differs, a line each."""
    counted = Counter(host.state for host in hosts.values())
    others = [f"{state}: {counted[state]}" for state in STATES if counted[state] and state != AS_WANTED]
    yield "; ".join([f"{len(hosts)} hosts: {counted[AS_WANTED]} fine", *others])
    models = sorted(replicas(hosts), key=lambda one: (one.up == one.wanted, one.up / one.wanted))
    if models:
        yield "models up: " + "; ".join(f"{one.label} {one.up} of {one.wanted}" for one in models)
    yield f"drift: {_drift(hosts)}"


@dataclass(frozen=True)
class Replicas:
    """The servers of one model on all hosts."""

    label: str  # the instances' name without the numbers of copies; several names one after another
    up: int
    wanted: int  # with those of hosts that cannot be read


def replicas(hosts: Hosts) -> list[Replicas]:
    """By the source of the model. Where that is not known, as of an instance that is not installed, it is that of
    another instance of the same name."""
    known = {name: source for host in hosts.values() for name, source in _sources(host) if source}
    names: dict[str, dict[str, None]] = {}
    wanted, up = Counter[str](), Counter[str]()
    for host in hosts.values():
        states = {one.name: one.is_up for one in host.instances}
        for name, source in _sources(host):
            model = source or known.get(name) or name
            names.setdefault(model, {})[name] = None
            wanted[model] += 1
            up[model] += states.get(name, False)
    return [Replicas(_label(list(names[model])), up[model], wanted[model]) for model in names]


def _sources(host: HostStatus) -> Iterator[tuple[str, str]]:
    yield from ((one.name, one.source) for one in host.instances)
    if host.state == CANNOT_BE_READ:
        yield from host.expected.items()


def _label(names: Sequence[str]) -> str:
    bases = list(dict.fromkeys(_COPY.sub("", name) for name in names)) if len(names) > 1 else list(names)
    return ", ".join(bases[:3]) + (", ..." if len(bases) > 3 else "")


def _drift(hosts: Hosts) -> str:
    """What a run would change, by the number of hosts."""
    phrases = Counter[str]()
    for host in hosts.values():
        phrases.update({*host.drift, *(f"{one.name}: {why}" for one in host.instances for why in one.drift)})
    drifted = sum(bool(host.drift or any(one.drift for one in host.instances)) for host in hosts.values())
    unknown = sum(not host.is_compared for host in hosts.values())
    text = f"{drifted} of {len(hosts)} hosts" if drifted else "none"
    if phrases:
        named = [f"{phrase} ({count})" for phrase, count in phrases.most_common(PHRASES)]
        more = len(phrases) - len(named)
        text += ": " + "; ".join([*named, *([f"{more} more"] if more else [])])
    return text + (f"; not known of {unknown}" if unknown else "")


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Hosts that share their lines: one, or several that are fine and alike."""

    hosts: Hosts = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The host's name, or the first one's with the number of others."""
        first, *others = self.hosts
        return f"{first} and {len(others)} more" if others else first

    @property
    def rank(self) -> int:
        """Its place among STATES: the worst first."""
        return STATES.index(next(iter(self.hosts.values())).state)

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The cells of COLUMNS for each instance; of several hosts what their values range over."""
        together = zip(*(rows_of(self.label, host) for host in self.hosts.values()), strict=True)
        instances = list(zip(*(host.instances for host in self.hosts.values()), strict=True))
        for number, rows in enumerate(together):
            if len(rows) == 1:
                yield rows[0]
            else:
                cells = dict(zip(COLUMNS, map(_same, zip(*rows, strict=True)), strict=True))
                yield tuple((cells | _ranges(instances[number]))[column] for column in COLUMNS)

    def remarks(self) -> Iterator[str]:
        """As those of one host; of several the least free space."""
        first, *others = self.hosts.values()
        if not others:
            yield from remarks(first)
        elif first.free_bytes:
            least = {path: min(host.free_bytes[path] for host in self.hosts.values()) for path in first.free_bytes}
            yield f"at least {space(HostStatus(free_bytes=least))}"


def folded(hosts: Hosts, everything: bool = False) -> list[Group]:
    """The hosts in groups, the worst first, else as in the inventory."""
    alike: dict[object, dict[str, HostStatus]] = {}
    for name, host in hosts.items():
        alike.setdefault(name if everything or not _may_fold(host) else _likeness(host), {})[name] = host
    groups = []
    for members in alike.values():
        together = len(members) >= FOLDED_FROM
        groups += [Group(members)] if together else [Group({name: host}) for name, host in members.items()]
    return sorted(groups, key=lambda group: group.rank)


def _may_fold(host: HostStatus) -> bool:
    """Is there nothing to say of it, but its free space?"""
    said = [remark for remark in remarks(host) if not host.free_bytes or remark != space(host)]
    return host.is_fine and bool(host.instances) and not said and not any(one.restarts for one in host.instances)


def _likeness(host: HostStatus) -> object:
    return (tuple(host.free_bytes), *((one.name, one.state, one.plan, one.source) for one in host.instances))


def _same(cells: Sequence[str]) -> str:
    return cells[0] if len(set(cells)) == 1 else ""


def _ranges(instances: Sequence[InstanceStatus]) -> dict[str, str]:
    """What differs among hosts that are alike: memory, speed, and the time of the last gate, of which the oldest
    counts."""
    speeds = [one.tokens_per_s for one in instances if one.tokens_per_s is not None]
    sizes = [one.cgroup_bytes if one.cgroup_bytes is not None else one.rss_bytes for one in instances]
    held = [sum(size or 0 for size in one.gpu_bytes.values()) for one in instances
            if not isinstance(one.gpu_bytes, str) and one.gpu_bytes]  # fmt: skip
    gated = min((one for one in instances if one.gate), key=lambda one: one.gate.time if one.gate else "", default=None)
    known = [size / GIB for size in sizes if size is not None]
    return {
        "tok/s": _span(speeds), "last gate": gate_of(gated) if gated else "",
        "RAM": f"{_span(known)} GiB" if len(known) > 1 else ram_of(instances[0]),
        "GPU": f"{_span([size / GIB for size in held])} GiB" if held else "",
    }  # fmt: skip


def _span(values: Sequence[float]) -> str:
    texts = [f"{value:.1f}" for value in (min(values), max(values))] if values else []
    return " to ".join(dict.fromkeys(texts))


def _fits(rows: Sequence[Sequence[str]], look: Look) -> bool:
    return look.columns is None or max(map(len, aligned(rows))) <= look.columns


def _narrowed(rows: Sequence[Sequence[str]], look: Look) -> Sequence[Sequence[str]]:
    """The rows without the columns for which the terminal has no room."""
    for column in LEAVE_OUT:
        if _fits(rows, look):
            break
        place = rows[0].index(column)
        rows = [(*row[:place], *row[place + 1 :]) for row in rows]
    return rows


# --- what changed -------------------------------------------------------------------------------


def changes(before: Hosts, after: Hosts) -> Iterator[str]:
    """What is different in the second look at the hosts, a line each, without what always moves: memory and space."""
    for name in dict.fromkeys([*before, *after]):
        old, new = _facts(before.get(name)), _facts(after.get(name))
        for fact in dict.fromkeys([*old, *new]):
            if old.get(fact, "") != new.get(fact, ""):
                yield one_line(f"{name}: {fact}: {old.get(fact) or 'none'} -> {new.get(fact) or 'none'}")


def _facts(host: HostStatus | None) -> dict[str, str]:
    if host is None:
        return {}
    facts = {"state": host.state, "problem": host.problem, "a run would change": "; ".join(host.drift)}
    facts["what is wrong with the host"] = "; ".join(host.problems)
    for one in host.instances:
        facts |= {
            one.name: one.state, f"{one.name}, drift": "; ".join(one.drift), f"{one.name}, last gate": gate_of(one),
            f"{one.name}, restarts": str(one.restarts), f"{one.name}, plan": one.plan,
        }  # fmt: skip
    return facts
