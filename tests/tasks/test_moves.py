"""Moves between hosts: what leaves waits for its successor, and stays where that failed."""

from types import SimpleNamespace

import gevent
import pytest

from llamafleet.host.recorded import PlanRecord
from llamafleet.service.succession import Handover
from tasks.lib import decision, jobs, moves, operations
from tasks.lib.switching import Options


class Data:
    def __init__(self, models):
        self.models = models

    def dict(self):
        return {"models": self.models}


class Host:
    groups = ()

    def __init__(self, name, state, *wanted):
        self.name, self.state, self.lines = name, state, []
        self.data = Data([{"name": one, "source": f"hf:o/r/{one}.gguf"} for one in wanted])

    def log(self, line, *_):
        self.lines.append(line)

    def log_styled(self, line, **_):
        self.lines.append(line)


class Asked:
    """Settings of a decision: the models of the host's data, unless a test gives others."""

    def __init__(self, data):
        self.data, self.others = data, None

    @property
    def models(self):
        return self.others or [SimpleNamespace(**one) for one in self.data.models]


class State:
    """pyinfra's, as far as moves look at it."""

    def __init__(self):
        self.inventory, self.active_hosts, self.outside, self.idle = [], set(), set(), set()
        self.is_executing = True

    def is_host_in_limit(self, host):
        return host not in self.outside

    def get_results_for_host(self, host):
        return SimpleNamespace(ops=0 if host in self.idle else 5, error_ops=0)


@pytest.fixture
def fleet(monkeypatch):
    """Adds hosts with {name: source} installed and names wanted; None: it was refused."""
    monkeypatch.setattr(decision, "_decisions", {})
    for name in ("_passed", "_failed", "_switched"):
        monkeypatch.setattr(moves, name, set())
    monkeypatch.setattr(moves, "_made", {})
    state = State()

    def add(name, there, *wanted, refused=False):
        host = Host(name, state, *wanted)
        state.inventory.append(host)
        if not refused:
            state.active_hosts.add(host)
            records = {one: SimpleNamespace(record=PlanRecord(raw={"source": f"hf:o/r/{one}.gguf"})) for one in there}
            decision._decisions[host] = SimpleNamespace(
                desired=SimpleNamespace(installed=SimpleNamespace(instances=records), settings=Asked(host.data)),
                changes=SimpleNamespace(services=[one for one in wanted if one not in there],
                                        removed=tuple(one for one in there if one not in wanted)),
            )  # fmt: skip
        return host

    add.state = state
    return add


def test_what_nobody_takes_over_waits_for_nobody(fleet):
    a, _ = fleet("a", ["x"]), fleet("b", ["x"], "x")
    assert moves.staying(a) == {} and not moves.is_taken_over(a, ("x",))


def test_a_move_waits_until_the_other_host_serves(fleet):
    a, b = fleet("a", ["x"]), fleet("b", [], "x")
    assert moves.is_taken_over(a, ("x",))
    waiting = gevent.spawn(moves.staying, a)
    gevent.sleep(0.05)
    assert not waiting.ready()
    moves.passed(b, Handover(("x",)))
    assert waiting.get(timeout=60) == {}


@pytest.mark.parametrize(
    "how", ["refused", "fails while it is waited for", "has not begun", "fails with --no-wait", "does not switch to it"]
)
def test_a_move_to_a_host_that_does_not_get_there_leaves_all_as_it_is(fleet, how):
    a, b = fleet("a", ["x"]), fleet("b", [], "x", refused=how == "refused")
    if how == "has not begun":  # --serial
        fleet.state.idle.add(b)
    waiting = gevent.spawn(moves.staying, a)
    gevent.sleep(0.05)
    if how.startswith(("fails", "does")):
        assert not waiting.ready()
        if how == "does not switch to it":
            moves.switched(b)
        elif how == "fails with --no-wait":
            moves._Failures.operation_host_error(fleet.state, b, "hash")
        else:
            fleet.state.active_hosts.discard(b)
    [why] = waiting.get(timeout=60).values()
    assert str(why).startswith("x does not serve on b: the host ")
    assert ("turn" in why.why) is (how == "has not begun")


def test_a_model_that_gets_another_name_on_its_way_is_the_same_move(fleet):
    a, b = fleet("a", ["x"]), fleet("b", [], "y")
    b.data.models[0]["source"] = "hf:o/r/x.gguf"
    fleet.state.active_hosts.discard(b)
    assert set(moves.staying(a)) == {"x"}


def served_as(host, **sources):
    """The host is to serve these instances, {name: source}, whatever its data says."""
    models = [
        SimpleNamespace(name=name.replace("_", "-"), source=f"hf:o/r/{one}.gguf") for name, one in sources.items()
    ]
    now = decision._decisions[host]
    now.desired.settings.others = models
    now.changes.services = [one.name for one in models if one.name not in now.desired.installed.instances]


def test_copies_on_another_host_take_over(fleet):
    a, b = fleet("a", ["x"]), fleet("b", [], "x")
    served_as(b, x_1="x", x_2="x")
    assert {name for _, name in moves._successors(a, "x", moves._new([a, b]))} == {"x-1", "x-2"}


def test_an_instance_that_becomes_copies_waits_for_nobody(fleet):
    """Two hosts with the same models, of which each gets copies, do not wait for each other."""
    hosts = fleet("a", ["x"]), fleet("b", ["x"])
    for host in hosts:
        served_as(host, x_1="x", x_2="x")
    assert all(moves.staying(host) == {} and not moves.is_taken_over(host, ("x",)) for host in hosts)


def test_a_host_outside_of_the_run_is_not_waited_for(fleet):
    a, b = fleet("a", ["x"]), fleet("b", [], "x", refused=True)
    fleet.state.outside.add(b)
    assert moves.staying(a) == {}


@pytest.fixture
def followed(monkeypatch):
    """The commands of jobs, all of which succeed."""
    commands = []
    monkeypatch.setattr(jobs, "follow", lambda state, host, job, command: commands.append(command[4:]) or True)
    return commands


def switch_py(command):
    return [command[0].rpartition("/")[2], *command[1:]]


def test_an_instance_that_leaves_is_removed_by_a_job_that_drains(fleet, followed):
    a = fleet("a", ["x"])
    assert operations._remove(None, a, "x", Handover(("y",), ("x",)), Options(30, "stop", None))
    assert [switch_py(one) for one in followed] == [
        ["switch.py", "remove", "x", "--drain", "30", "--overdue", "stop", "--after", "y"]
    ]


def test_an_instance_that_stays_is_told_and_nothing_is_done(fleet, followed):
    a, _ = fleet("a", ["x"]), fleet("b", [], "x", refused=True)
    assert operations._remove(None, a, "x", Handover(()), Options(30, "cut", None)) is True
    assert followed == [] and "llama-server-x.service stays: x does not serve on b" in a.lines[0]


def test_a_switch_that_took_the_place_of_one_that_stays_is_taken_back(fleet, followed):
    a, _ = fleet("a", ["x"], "y"), fleet("b", [], "x", refused=True)
    moves.passed(a, Handover(("y",), ("x",)))
    assert operations._remove(None, a, "x", Handover(("y",), ("x",)), Options(0, "stop", None)) is False
    assert [switch_py(one) for one in followed] == [["switch.py", "undo", "y", "--leaving", "x"]]
    assert "llama-server-x.service came back in place of llama-server-y.service: x does not serve on b" in a.lines[-1]


def test_a_model_that_every_host_of_a_large_fleet_gives_up_is_compared_with_each_host_once(fleet, monkeypatch):
    """Every one of them asks what stays: by comparing each with each, a thousand hosts would wait for minutes."""
    hosts = [fleet(f"h{n}", ["x"]) for n in range(100)]
    asked = []
    monkeypatch.setattr(moves, "_wanted", lambda host: asked.append(host.name) or decision.wanted_models(host))
    assert moves.staying(hosts[0]) == {}
    assert len(asked) <= 2 * len(hosts)
