"""Cgroups of hosts where cgroup v2 has controllers: on any machine with systemd. Real cgroups, no host."""

import contextlib
import subprocess

import pytest

from sandbox import cgroups, state

# With the others a cgroup may have processes and cgroups below all the same (Linux, cgroup-v2, "Threads").
THREADED = {"cpu", "cpuset", "perf_event", "pids"}


@pytest.fixture
def group(given):
    """A cgroup of this test in the machine's root, and whatever is below."""
    group = cgroups.Cgroup(cgroups.top(state.current()).path.with_name("disposable-hosts-test-cgroups"))
    group.kill()
    yield group
    group.kill()


@pytest.fixture
def given():
    """A controller that the root gives to all cgroups; as before afterwards, unless other hosts use it by then."""
    root = cgroups.top(state.current()).path.parent
    controllers = set((root / "cgroup.controllers").read_text().split()) - THREADED
    if not controllers:
        pytest.skip("cgroup v2 has no controller on this machine")
    enabled = root / "cgroup.subtree_control"
    if both := controllers & set(enabled.read_text().split()):
        yield both.pop()
        return
    controller = controllers.pop()
    enabled.write_text(f"+{controller}")
    yield controller
    with contextlib.suppress(OSError):
        enabled.write_text(f"-{controller}")


def test_a_process_enters_the_last_cgroup_which_has_the_controllers(group, given):
    last = cgroups.Cgroup(group.path / "host" / "loop")
    cgroups.Cgroup(last.path.parent).make()
    last.make()
    assert given in (last.path / "cgroup.controllers").read_text().split()
    subprocess.run(last.enter(["true"]), check=True)
