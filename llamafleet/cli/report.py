"""What a report says of a fleet, as texts and figures in the order of the page; the page itself is made elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llamafleet.cli import figures
from llamafleet.cli.figures import Figure, gib
from llamafleet.cli.reported import HostFacts, InstanceFacts, Measured
from llamafleet.cli.status import HostStatus, InstanceStatus, remarks_of, space
from llamafleet.cli.tables import rate
from llamafleet.host.machine import Machine
from llamafleet.tuning.records import in_words
from llamafleet.tuning.tried import Tried, not_run, tried, why_ended
from llamafleet.units import GIB, MIB

GOOD, BAD, WARNING, PLAIN = "good", "bad", "warning", "plain"
Fact = tuple[str, str]
TRIED = ("candidate", "times as fast", "written/s", "read/s", "guesses right", "trials", "lost")


@dataclass(frozen=True)
class Badge:
    """A word about a state; `kind` is GOOD, BAD, WARNING or PLAIN."""

    text: str
    kind: str


@dataclass(frozen=True)
class Table:
    """Texts in rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class InstanceSection:
    """One instance of the page."""

    anchor: str
    name: str
    badges: tuple[Badge, ...]
    facts: tuple[Fact, ...]
    remarks: tuple[str, ...]
    figures: tuple[Figure, ...]
    tried: Table | None
    why: tuple[str, ...]
    flags: str


@dataclass(frozen=True)
class HostSection:
    """One host of the page."""

    anchor: str
    name: str
    badge: Badge
    facts: tuple[Fact, ...]
    remarks: tuple[str, ...]
    instances: tuple[InstanceSection, ...]


@dataclass(frozen=True)
class Line:
    """One line of the overview."""

    anchor: str
    host: str
    instance: str
    state: Badge
    plan: str
    speed: str
    tune: Badge


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    made: str  # when
    counts: tuple[tuple[int, str, str], ...]  # number, what of, kind
    lines: tuple[Line, ...]
    gains: Figure | None
    hosts: tuple[HostSection, ...] = field(default=())


def page(title: str, hosts: Mapping[str, HostFacts], now: float) -> Page:
    """The report of these hosts, by name; `now` is unix time."""
    tuned = [(f"{host}: {one.name}" if len(facts.instances) > 1 else host, one.measured.record)
             for host, facts in hosts.items() for one in facts.instances if one.measured]  # fmt: skip
    sections = tuple(_host(f"host-{n}", name, facts) for n, (name, facts) in enumerate(hosts.items(), 1))
    lines = [line for section, facts in zip(sections, hosts.values(), strict=True) for line in _lines(section, facts)]
    lines.sort(key=lambda line: line.state.kind != BAD)  # what is to be looked at comes first
    return Page(title, _moment(now), tuple(_counts(hosts)), tuple(lines), figures.gains(tuned), sections)


def _counts(hosts: Mapping[str, HostFacts]) -> Iterator[tuple[int, str, str]]:
    instances = [one for facts in hosts.values() for one in facts.instances]
    fine = sum(facts.status.is_fine for facts in hosts.values())
    stale = sum(bool(one.measured and one.measured.stale) for one in instances)
    yield len(hosts), "host" if len(hosts) == 1 else "hosts", PLAIN
    yield fine, "as it should be" if fine == 1 else "as they should be", GOOD
    yield len(hosts) - fine, "to look at", BAD if fine < len(hosts) else PLAIN
    yield len(instances), "instance" if len(instances) == 1 else "instances", PLAIN
    yield sum(one.measured is not None for one in instances), "measured by a tune", PLAIN
    if stale:
        yield stale, "of them stale", WARNING


def _lines(section: HostSection, facts: HostFacts) -> Iterator[Line]:
    for shown, one in zip(section.instances, facts.instances, strict=True):
        plan = one.status.plan if one.status else ""
        yield Line(shown.anchor, section.name, one.name, shown.badges[0], plan, _speed(one), _tune(one))
    if not section.instances:
        yield Line(section.anchor, section.name, "", section.badge, "", "", Badge("", PLAIN))


def _host(anchor: str, name: str, facts: HostFacts) -> HostSection:
    status = facts.status
    badge = Badge("as it should be", GOOD) if status.is_fine else Badge("look at it", BAD)
    if facts.machine is None:
        badge = Badge("not read", BAD)
    remarks = [status.problem] if status.problem else []
    remarks += [problem for problem in status.problems if problem not in status.problem]
    remarks += [f"a run would change: {'; '.join(status.drift)}"] if status.drift else []
    sections = tuple(_instance(f"{anchor}-{n}", one) for n, one in enumerate(facts.instances, 1))
    machine = tuple(_machine(facts.machine, status)) if facts.machine else ()
    return HostSection(anchor, name, badge, machine, tuple(remarks), sections)


def _machine(machine: Machine, status: HostStatus) -> Iterator[Fact]:
    cpu = machine.cpu
    hybrid = f", {cpu.performance_cores} of them fast" if 0 < cpu.performance_cores < cpu.physical_cores else ""
    yield "processor", f"{cpu.model}, {cpu.physical_cores} core{'s' if cpu.physical_cores != 1 else ''}{hybrid}"
    yield "RAM", f"{gib(machine.memory.total_bytes)} GiB"
    for gpu in machine.gpus:
        size = f"{gpu.name}, {gib(gpu.memory_total_bytes)} GiB"
        yield f"GPU{gpu.index}", size if gpu.problem is None else f"{size}: {gpu.problem}"
    if machine.driver.nvidia:
        yield "driver", machine.driver.nvidia
    yield (
        "system",
        f"{machine.os.id} {machine.os.version}".strip() + (f", {machine.os.kernel}" * bool(machine.os.kernel)),
    )
    if status.free_bytes:
        yield "disk", space(status)


def _instance(anchor: str, one: InstanceFacts) -> InstanceSection:
    found = tried(one.measured.record) if one.measured else ()
    status = one.status
    remarks = [f"a run would change: {'; '.join(status.drift)}"] if status and status.drift else []
    remarks += remarks_of(status) if status else []
    if one.measured and one.measured.stale:
        remarks.append(f"what was measured no longer holds: {'; '.join(one.measured.stale)}")
    return InstanceSection(
        anchor, one.name, tuple(_badges(one)), tuple(_facts(one)), (*remarks, *one.problems),
        tuple(_figures(one, found)), _tried(found, one), one.why, " ".join(one.argv),
    )  # fmt: skip


def _badges(one: InstanceFacts) -> Iterator[Badge]:
    if one.status is None:
        yield Badge("not read", BAD)
    else:
        state = one.status.state
        yield Badge(state, GOOD) if one.status.is_fine else Badge(f"{state}: look at it", BAD)
    if (tune := _tune(one)).text:
        yield tune


def _tune(one: InstanceFacts) -> Badge:
    """The state of an instance's tune: not measured, stale, or what was gained."""
    if one.measured is None:
        return Badge("not measured", PLAIN)
    if one.measured.stale:
        return Badge("stale", WARNING)
    gain = figures.gain_of(one.measured.record)
    if gain is None:
        return Badge("the default does not run", GOOD)
    return Badge(f"{gain.middle:.2f} times as fast", GOOD) if gain.low > 1 else Badge("no gain proven", PLAIN)


def _facts(one: InstanceFacts) -> Iterator[Fact]:
    if one.source:
        yield "model", one.source
    if (status := one.status) is not None:
        yield from _state(status)
    if text := _speed(one):
        yield "speed", text
    if one.work:
        work = one.work
        yield (
            "workload",
            (
                f"{work.prompt_tokens} tokens read, {work.reply_tokens} written at {work.live_tokens} in the context, "
                f"{work.concurrency} at once"
            ),
        )
    if one.measured:
        yield from _of_tune(one.measured)
    elif one.chance:
        yield "tune", one.chance


def _state(status: InstanceStatus) -> Iterator[Fact]:
    if status.plan:
        yield "plan", status.plan
    used = status.rss_bytes if status.cgroup_bytes is None else status.cgroup_bytes
    if used is not None:
        yield "RAM in use", f"{gib(used)} GiB" if used >= GIB else f"{used / MIB:.0f} MiB"
    if isinstance(status.gpu_bytes, str):
        yield "GPU memory", status.gpu_bytes
    else:
        for number, (uuid, planned) in enumerate(status.planned_gpu_bytes.items(), 1):
            used = status.gpu_bytes.get(uuid, 0)
            held = "not known" if used is None else f"{gib(used)} GiB"
            many = f" {number}" if len(status.planned_gpu_bytes) > 1 else ""
            yield f"GPU memory{many}", f"{held} in use, {gib(planned)} GiB planned"
    if status.gate is not None:
        failed = next((check.name for check in status.gate.checks if not check.ok), "")
        verdict = "not known" if status.gate.problem else "good" if status.gate.ok else f"failed: {failed}"
        yield "last gate", f"{verdict} {status.gate.time}".strip()
    yield "restarts", str(status.restarts)


def _of_tune(measured: Measured) -> Iterator[Fact]:
    record = measured.record
    where = f", {measured.where}" if measured.where else ""
    why = why_ended(record)
    yield "tune", f"{in_words(record)}{f' ({why})' if why else ''}; {_moment(record.ended)}{where}"
    if record.settings:
        yield "chosen", ", ".join(f"{key} = {_shown(value)}" for key, value in record.settings.items())


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _speed(one: InstanceFacts) -> str:
    """The speed as it was measured, else as it is predicted."""
    if one.gated and one.gated.decode_tokens_per_s:
        return f"{rate(one.gated.decode_tokens_per_s)} tokens/s written, by its gate"
    if one.status and one.status.tokens_per_s:
        return f"{rate(one.status.tokens_per_s)} tokens/s, by its gate"
    if one.status and one.status.predicted_tokens_per_s:
        return f"{rate(one.status.predicted_tokens_per_s)} tokens/s, predicted"
    return ""


def _figures(one: InstanceFacts, found: tuple[Tried, ...]) -> Iterator[Figure]:
    record = one.measured.record if one.measured else None
    winner = record.winner.label if record else ""
    if one.ledger:
        yield figures.memory(one.ledger)
    yield from (figure for figure in (figures.speeds(found, winner), figures.energy(found, winner)) if figure)
    yield from figures.curves(one.curves, one.work, one.gated, record)


def _tried(found: tuple[Tried, ...], one: InstanceFacts) -> Table | None:
    """Everything that a tune tried, what was lost, and what did not fit."""
    rows = [
        (
            each.label, figures.times(each.speed), figures.spread(each.decode_tokens_per_s),
            figures.spread(each.prompt_tokens_per_s), "" if each.accepted is None else f"{each.accepted:.0%}",
            f"{each.trials}, {each.throttled} while the host was slowed" if each.throttled else str(each.trials),
            f"{each.lost}: {each.why_lost}" if each.lost else "",
        )
        for each in found
    ]  # fmt: skip
    left_out = not_run(one.measured.record) if one.measured else ()
    rows += [(each.label, "", "", "", "", "0", f"not run: {each.why}") for each in left_out]
    return Table("What was tried, and what was lost", TRIED, tuple(rows)) if rows else None


def _moment(seconds: float) -> str:
    """Unix time as a date and a time of day, UTC; empty where it is none."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return ""
