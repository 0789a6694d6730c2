"""What a monitored host should have, from the inventory, and what the stage does about it; its operations are recorded."""

from types import SimpleNamespace

import pytest
from pyinfra.context import ctx_host

from llamafleet.host import answers
from llamafleet.remote.common import EXPORTER_UNIT, METRICS_TIMER, METRICS_UNIT, PROMETHEUS_UNIT, sha256
from tasks import monitoring
from tasks.lib import decision, lookups, monitors

KEY = "the-servers-own-key-0001"
EXPORTER = "/usr/bin/prometheus-node-exporter"
OWN = answers.Monitoring("/opt/prometheus/prometheus", "/usr/local/bin/node_exporter", None, {})
NOTHING = answers.Monitoring(None, None, None, {})


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
    return answers.Monitoring(**{"prometheus": "/usr/bin/prometheus", "exporter": EXPORTER, "digest": files.digest, "units": units,
                                 **changes})  # fmt: skip


def test_prometheus_gets_the_first_key_of_a_server_in_a_file_for_root_alone(fleet):
    made = monitors.wanted(fleet.mon, "apt", NOTHING)
    assert list(made.secrets.values()) == [KEY]
    assert KEY not in str({**made.texts, **made.units}) and KEY not in repr(made)
    assert [(name, mode) for name, (mode, text) in monitors.sent(made).items() if KEY in text.decode()] == [
        (next(iter(made.secrets)), 0o600)
    ]
    assert f"LoadCredential={next(iter(made.secrets))}:" in made.units[PROMETHEUS_UNIT]


def test_a_host_that_is_watched_gets_no_prometheus_and_no_key(fleet):
    made = monitors.wanted(fleet.gpu, "apt", NOTHING)
    assert sorted(made.units) == sorted((EXPORTER_UNIT, METRICS_UNIT, METRICS_TIMER))
    assert (made.secrets, made.texts) == ({}, {})


def test_without_the_group_nobody_is_watched(fleet):
    assert monitors.is_watched(fleet.gpu)
    fleet.mon.groups.clear()
    assert not monitors.is_watched(fleet.gpu)


def test_node_exporter_is_called_as_the_distribution_calls_it(fleet):
    for manager, path in (("apt", "/usr/bin/prometheus-node-exporter"), ("zypper", "/usr/bin/node_exporter")):
        assert f'ExecStart="{path}" ' in monitors.wanted(fleet.gpu, manager, NOTHING).units[EXPORTER_UNIT]


def test_what_is_as_it_should_be_differs_in_nothing(fleet):
    made = monitors.wanted(fleet.mon, "apt", NOTHING)
    assert list(monitors.differences(made, installed(made))) == []
    assert next(monitors.differences(made, NOTHING)) == "it is new"


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"sha256": "0" * 64}, "differs"), ({"active": False}, "does not run, or does not start with the host"),
     ({"enabled": False}, "does not run, or does not start with the host")],
)  # fmt: skip
def test_each_difference_of_a_unit_is_named(fleet, changes, said):
    made = monitors.wanted(fleet.mon, "apt", NOTHING)
    there = installed(made)
    found = {**there.units[PROMETHEUS_UNIT].__dict__, **changes}
    units = {**there.units, PROMETHEUS_UNIT: answers.MonitoringUnit(**found)}
    assert list(monitors.differences(made, installed(made, units=units))) == [f"{PROMETHEUS_UNIT} {said}"]


def test_a_unit_that_is_no_longer_needed_is_named(fleet):
    there = installed(monitors.wanted(fleet.mon, "apt", NOTHING))
    fleet.mon.groups.clear()
    fleet.gpu.groups.append("monitoring")
    assert f"{PROMETHEUS_UNIT} is no longer needed" in monitors.differences(
        monitors.wanted(fleet.mon, "apt", NOTHING), there
    )


def test_a_host_that_cannot_be_reached_by_its_name_alone_is_told_what_to_set(fleet):
    fleet.gpu.data.get = {"ssh_hostname": "gpu1.example.net"}.get
    with pytest.raises(monitors.MonitoringError, match=r"gpu1: metrics_listen: gpu1.example.net is a name"):
        monitors.wanted(fleet.gpu, "apt", NOTHING)


# --- the stage --------------------------------------------------------------------------------------

MASKED = {"gpu1": ("prometheus-node-exporter.service",),
          "mon": ("prometheus-node-exporter.service", "prometheus.service")}  # fmt: skip


class Recorded:
    """Each operation with its arguments, by its function's name."""

    def __init__(self, patch):
        self.done = {}
        for module, names in ((monitoring.operations, ("install_helpers", "install_packages", "release_lock")),
                              (monitors, ("mask_units", "put_in_service"))):  # fmt: skip
            for name in names:
                patch.setattr(module, name, lambda _name=name, **arguments: self.done.update({_name: arguments}))

    def of(self, name, argument):
        return self.done[name][argument]


@pytest.fixture
def run(fleet, monkeypatch):
    """The stage on a host that answers so; its manager is apt."""
    machine = SimpleNamespace(package_manager="apt", os=SimpleNamespace(arch="x86_64"))

    def on(host, there, manager="apt"):
        recorded, failed = Recorded(monkeypatch), []
        host.log = host.log_styled = lambda *_, **__: None
        host.state.fail_hosts = failed.append
        machine.package_manager = manager
        now = SimpleNamespace(desired=SimpleNamespace(machine=machine, settings=None),
                              changes=SimpleNamespace(helpers=False))  # fmt: skip
        monkeypatch.setattr(decision, "for_stage", lambda stage: now)
        monkeypatch.setattr(monitoring.lookups, "network", lambda settings: None)
        monkeypatch.setattr(monitors, "read", lambda host: there)
        with ctx_host.use(host):
            monitoring.monitoring._inner()
        return recorded, failed

    return on


@pytest.mark.parametrize("name", MASKED)
def test_a_bare_host_gets_packages_whose_own_units_are_masked_before(fleet, run, name):
    recorded, _ = run(next(one for one in fleet.state.inventory if one.name == name), NOTHING)
    assert recorded.of("mask_units", "units") == MASKED[name]
    assert list(recorded.done).index("mask_units") < list(recorded.done).index("install_packages")
    assert set(recorded.of("install_packages", "needs")) == {
        "node-exporter",
        *(["prometheus"] if name == "mon" else []),
    }
    assert recorded.of("put_in_service", "files")() is not None


def test_what_an_operator_has_installed_stays_as_it_is(fleet, run):
    recorded, _ = run(fleet.mon, OWN)
    assert recorded.of("mask_units", "units") == () and recorded.of("install_packages", "needs") == {}
    units = recorded.of("put_in_service", "files")().units
    assert f'ExecStart="{OWN.prometheus}" ' in units[PROMETHEUS_UNIT]
    assert f'ExecStart="{OWN.exporter}" ' in units[EXPORTER_UNIT]


def test_packages_that_start_nothing_are_not_masked(fleet, run):
    recorded, _ = run(fleet.mon, NOTHING, "zypper")
    assert recorded.of("mask_units", "units") == () and len(recorded.of("install_packages", "needs")) == 2


def test_a_second_run_changes_nothing(fleet, run):
    recorded, _ = run(fleet.mon, installed(monitors.wanted(fleet.mon, "apt", NOTHING)))
    assert recorded.of("put_in_service", "files")() is None
    assert recorded.of("install_packages", "needs") == {} and not recorded.of("release_lock", "needed")


def test_without_the_group_nothing_is_asked_of_a_host(fleet, run):
    fleet.mon.groups.clear()
    recorded, _ = run(fleet.gpu, NOTHING)
    assert recorded.done == {}


def test_a_host_that_cannot_be_watched_fails_before_anything_is_installed(fleet, run):
    fleet.gpu.data.get = {"ssh_hostname": "gpu1.example.net"}.get
    recorded, failed = run(fleet.gpu, NOTHING)
    assert recorded.done == {} and failed == [{fleet.gpu}]
