"""The state of many hosts on a page, and what changed between two looks at them."""

import dataclasses
import itertools

import pytest

from llamafleet.cli import fleet_status
from llamafleet.cli.fleet_status import folded, page, replicas, summary
from llamafleet.cli.status import STATES, HostStatus, InstanceStatus
from llamafleet.cli.tables import Look
from llamafleet.host.answers import Gate

GOOD = Gate(True, time="2026-11-21T15:00:00Z")
GIB = 2**30


def instance(name="chat", **changes):
    one = InstanceStatus(
        name=name, state="active", plan="8192 x 1 f16, CPU, cpu", release="k", rss_bytes=2 * GIB, cgroup_bytes=3 * GIB,
        gpu_bytes={}, planned_gpu_bytes={}, tokens_per_s=20.0, predicted_tokens_per_s=21.0, restarts=0,
        liveness_restarts=0, last_liveness_restart="", since="", gate=GOOD, verified=True, drift=(),
        source=f"hf:o/r/{name}.gguf",
    )  # fmt: skip
    return dataclasses.replace(one, **changes)


def host(*instances, **changes):
    return dataclasses.replace(
        HostStatus(instances or (instance(),), free_bytes={"/opt": 5 * GIB}, is_compared=True), **changes
    )


LOST = HostStatus(problem="cannot be reached: no route", expected={"chat": "hf:o/r/chat.gguf"})
# By the state of the host.
CASES = {
    "cannot be read": LOST,
    "not serving": host(instance(state="failed")),
    "failed its gate": host(instance(gate=Gate(False))),
    "has a problem": host(problem="cannot be compared with the inventory: no such model", is_compared=False),
    "differs": host(instance(drift=("its unit differs",))),
    "fine": host(),
}


def test_every_state_has_a_host_and_only_the_last_is_fine():
    assert {one.state: one for one in CASES.values()} == CASES and list(CASES) == list(STATES)
    assert [one.is_fine for one in CASES.values()] == [False] * 5 + [True]
    assert host(drift=("helpers",)).state == "differs" and host(instance(state="not installed")).state == "not serving"


def test_a_summary_comes_first_and_the_worst_host_after_it():
    hosts = dict(zip("fedcba", reversed(CASES.values()), strict=True))
    lines = page(hosts).splitlines()
    assert lines[:4] == [
        "6 hosts: 1 fine; cannot be read: 1; not serving: 1; failed its gate: 1; has a problem: 1; differs: 1",
        "models up: chat 4 of 6",
        "drift: 1 of 6 hosts: chat: its unit differs (1); not known of 2",
        "",
    ]
    assert [line.split()[0] for line in lines[5:11]] == list("abcdef")
    assert "a: cannot be reached: no route" in lines


def test_a_single_host_needs_no_summary():
    assert page({"box": host()}).startswith("host ")


def test_hosts_that_are_fine_and_alike_share_a_line_with_what_their_values_range_over():
    hosts = {f"gpu{n}": host(instance(tokens_per_s=20.0 + n, cgroup_bytes=(3 + n) * GIB,
                                      gate=Gate(True, time=f"2026-11-2{5 - n}")),
                             free_bytes={"/opt": (9 - n) * GIB, "/var": (9 - n) * GIB}) for n in range(4)}  # fmt: skip
    lines = page({**hosts, "bad": CASES["differs"]}).splitlines()
    row = next(line for line in lines if line.startswith("gpu0 and 3 more  "))
    cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
    assert cells == ["gpu0 and 3 more", "chat", "active", "8192 x 1 f16, CPU, cpu", "3.0 to 6.0 GiB", "20.0 to 23.0", "0",
                     "good 2026-11-22", "none"]  # fmt: skip
    assert "gpu0 and 3 more: at least 6.0 GiB free at /opt and /var" in lines
    assert not any(line.startswith("gpu1") for line in lines)
    everything = page({**hosts, "bad": CASES["differs"]}, everything=True).splitlines()
    assert sum(line.startswith("gpu") and "chat" in line for line in everything) == 4


@pytest.mark.parametrize(
    "other",
    [
        host(instance(restarts=2)),
        host(instance(plan="another")),
        host(instance(state="asleep")),
        host(instance(), instance("second")),
        host(problems=("NVIDIA: reboot needed",)),
        host(instance(tuned={"notes": ["what was measured no longer holds"]})),
        host(free_bytes={"/mnt": GIB}),
        CASES["differs"],
    ],
)
def test_a_host_that_is_different_has_lines_of_its_own(other):
    hosts = {**{f"gpu{n}": host() for n in range(3)}, "other": other}
    assert [list(group.hosts) for group in folded(hosts)] in (
        [["gpu0", "gpu1", "gpu2"], ["other"]],
        [["other"], ["gpu0", "gpu1", "gpu2"]],
    )


def test_two_hosts_that_are_alike_keep_their_lines():
    assert [group.label for group in folded({"a": host(), "b": host()})] == ["a", "b"]


def test_replicas_are_counted_by_model_with_those_of_hosts_that_cannot_be_read():
    hosts = {
        "a": host(instance("chat"), instance("embed", source="hf:o/r/e.gguf")),
        "b": host(instance("chat", state="not installed", source="", gate=None)),
        "c": LOST,
        "d": host(instance("copy-1", source="hf:o/r/c.gguf"), instance("copy-2", source="hf:o/r/c.gguf")),
        "e": host(instance("qwen3-8", source="hf:o/r/q.gguf", state="on demand, stopped")),
    }
    assert [(one.label, one.up, one.wanted) for one in replicas(hosts)] == [
        ("chat", 1, 3), ("embed", 1, 1), ("copy", 2, 2), ("qwen3-8", 1, 1),
    ]  # fmt: skip
    assert list(summary(hosts))[1] == "models up: chat 1 of 3; embed 1 of 1; copy 2 of 2; qwen3-8 1 of 1"


def test_the_drift_of_a_fleet_is_one_line_with_the_most_common_first():
    hosts = {f"h{n}": host(drift=("helpers",), problem="") for n in range(3)}
    hosts |= {f"d{n}": host(instance(drift=(f"reason {n}",))) for n in range(6)} | {"fine": host()}
    line = list(summary(hosts))[2]
    assert (
        line
        == "drift: 9 of 10 hosts: helpers (3); " + "; ".join(f"chat: reason {n} (1)" for n in range(4)) + "; 2 more"
    )
    assert list(summary({"a": host(), "b": host()}))[2] == "drift: none"


@pytest.mark.parametrize("columns", range(40, 200, 12))
def test_a_page_fits_a_terminal_as_far_as_names_and_states_do(columns):
    """What the table has no room for is below it, broken into lines."""
    why = "its plan.json was edited, and this is a long reason for a line"
    hosts = {"gpu1": host(instance(drift=(why,))), **{f"box{n}": host() for n in range(3)}, "gone": LOST}
    lines = page(hosts, Look(columns)).splitlines()
    assert max(map(len, lines)) <= max(columns, len("box0 and 2 more  chat      active   see below"))
    assert why in " ".join(" ".join(lines).split())


def test_texts_of_hosts_do_not_act_on_the_terminal():
    shown = page({"a": host(problem="no \x1b[2J\nsecond"), "b": host(instance(state="x\x1b[2J"))})
    assert "\x1b" not in shown and r"no \x1b[2J\nsecond" in shown


def test_what_changed_is_a_line_each_and_memory_does_not_count():
    before = {"a": host(), "b": host(), "gone": host(), "same": host()}
    after = {
        "a": host(instance(state="failed", restarts=3)),
        "b": dataclasses.replace(LOST),
        "same": host(instance(cgroup_bytes=9 * GIB, tokens_per_s=20.0), free_bytes={"/opt": 1}),
        "new": host(),
    }
    lines = list(fleet_status.changes(before, after))
    assert lines[:3] == ["a: state: fine -> not serving", "a: chat: active -> failed", "a: chat, restarts: 0 -> 3"]
    assert "b: problem: none -> cannot be reached: no route" in lines and "gone: state: fine -> none" in lines
    assert "new: state: none -> fine" in lines and not any(line.startswith("same") for line in lines)
    assert all(list(fleet_status.changes(one, one)) == [] for one in (before, after))


def test_every_pair_of_states_is_a_change():
    for old, new in itertools.permutations(CASES, 2):
        assert f"x: state: {old} -> {new}" in list(fleet_status.changes({"x": CASES[old]}, {"x": CASES[new]}))
