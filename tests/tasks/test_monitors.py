"""What a monitored host should have, from the inventory: who is in it, which keys, and what differs from the host."""

from types import SimpleNamespace

import pytest

from llamafleet.host import answers
from llamafleet.remote.common import EXPORTER_UNIT, METRICS_TIMER, METRICS_UNIT, PROMETHEUS_UNIT, sha256
from tasks.lib import lookups, monitors

KEY = "the-servers-own-key-0001"
NOTHING = answers.Monitoring(False, False, None, {})


class Host(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.fixture
def fleet(tmp_path):
    """A host that monitors, and one that serves, with a key."""
    (tmp_path / "keys").write_text(f"{KEY}\nanother-key-of-the-servers\n")
    (tmp_path / "keys").chmod(0o600)
    lookups._known.clear()
    state = SimpleNamespace(inventory=[])

    def host(name, address, *groups, **data):
        made = Host(name=name, state=state, groups=list(groups))
        made.data = SimpleNamespace(dict=lambda: data, get={"ssh_hostname": address}.get)
        state.inventory.append(made)
        return made

    model = {"name": "qwen", "source": "/m.gguf", "port": 8080, "listen": "10.0.0.7",
             "api_key_file": str(tmp_path / "keys")}  # fmt: skip
    yield SimpleNamespace(
        mon=host("mon", "10.0.0.5", "monitoring"), gpu=host("gpu1", "10.0.0.7", models=[model]), state=state
    )
    lookups._known.clear()


def installed(files, **changes):
    """What the host answers that has these files."""
    units = {
        name: answers.MonitoringUnit(sha256(text.encode()), name != METRICS_UNIT, name != METRICS_UNIT)
        for name, text in files.units.items()
    }
    return answers.Monitoring(**{"prometheus": True, "exporter": True, "digest": files.digest, "units": units,
                                 **changes})  # fmt: skip


def test_prometheus_gets_the_first_key_of_a_server_in_a_file_for_root_alone(fleet):
    made = monitors.wanted(fleet.mon, "apt")
    assert list(made.secrets.values()) == [KEY]
    assert KEY not in str({**made.texts, **made.units}) and KEY not in repr(made)
    assert [(name, mode) for name, (mode, text) in monitors.sent(made).items() if KEY in text.decode()] == [
        (next(iter(made.secrets)), 0o600)
    ]
    assert f"LoadCredential={next(iter(made.secrets))}:" in made.units[PROMETHEUS_UNIT]


def test_a_host_that_is_watched_gets_no_prometheus_and_no_key(fleet):
    made = monitors.wanted(fleet.gpu, "apt")
    assert sorted(made.units) == sorted((EXPORTER_UNIT, METRICS_UNIT, METRICS_TIMER))
    assert (made.secrets, made.texts) == ({}, {})


def test_without_the_group_nobody_is_watched(fleet):
    assert monitors.is_watched(fleet.gpu)
    fleet.mon.groups.clear()
    assert not monitors.is_watched(fleet.gpu)


def test_node_exporter_is_called_as_the_distribution_calls_it(fleet):
    for manager, path in (("apt", "/usr/bin/prometheus-node-exporter"), ("zypper", "/usr/bin/node_exporter")):
        assert f"ExecStart={path} " in monitors.wanted(fleet.gpu, manager).units[EXPORTER_UNIT]


def test_what_is_as_it_should_be_differs_in_nothing(fleet):
    made = monitors.wanted(fleet.mon, "apt")
    assert list(monitors.differences(made, installed(made))) == []
    assert next(monitors.differences(made, NOTHING)) == "it is new"


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"sha256": "0" * 64}, "differs"), ({"active": False}, "does not run, or does not start with the host"),
     ({"enabled": False}, "does not run, or does not start with the host")],
)  # fmt: skip
def test_each_difference_of_a_unit_is_named(fleet, changes, said):
    made = monitors.wanted(fleet.mon, "apt")
    there = installed(made)
    found = {**there.units[PROMETHEUS_UNIT].__dict__, **changes}
    units = {**there.units, PROMETHEUS_UNIT: answers.MonitoringUnit(**found)}
    assert list(monitors.differences(made, installed(made, units=units))) == [f"{PROMETHEUS_UNIT} {said}"]


def test_a_unit_that_is_no_longer_needed_is_named(fleet):
    there = installed(monitors.wanted(fleet.mon, "apt"))
    fleet.mon.groups.clear()
    fleet.gpu.groups.append("monitoring")
    assert f"{PROMETHEUS_UNIT} is no longer needed" in monitors.differences(monitors.wanted(fleet.mon, "apt"), there)


def test_a_host_that_cannot_be_reached_by_its_name_alone_is_told_what_to_set(fleet):
    fleet.gpu.data.get = {"ssh_hostname": "gpu1.example.net"}.get
    with pytest.raises(monitors.MonitoringError, match=r"gpu1: metrics_listen: gpu1.example.net is a name"):
        monitors.wanted(fleet.gpu, "apt")
