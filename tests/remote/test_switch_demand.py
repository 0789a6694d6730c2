"""Switches of a server that starts on demand: its socket opens with it, is put back with it, and goes with it."""

from __future__ import annotations

import json
import os

import common
import instance_files
import pytest
import room
import starting
import switch
import transaction

from tests.remote import switching
from tests.remote.switching import NAME, TIMER, UNIT

SOCKET, HANDS_ON = common.demand_units(NAME)


class Systemd(switching.Systemd):
    """Sockets are open or not; a socket's link lies in sockets.target.wants."""

    def __init__(self, monkeypatch):
        self.open = set()
        super().__init__(monkeypatch)
        self.rooms = []
        monkeypatch.setattr(room, "make", self.make)

    def make(self, name, *_, **asked):
        self.rooms.append((name, asked.get("alone", False)))

    def boot(self):
        super().boot()
        self.open = set()

    def start_enabled(self, *names):
        if os.path.lexists(transaction.socket_link(NAME)):
            self.start(SOCKET)
        super().start_enabled(*names)

    @staticmethod
    def link(unit, wanted):
        if not unit.endswith(".socket"):
            if unit == UNIT and wanted:
                text = (common.read_file(f"{common.UNITS}/{UNIT}") or b"").decode()
                assert "on demand" not in text, "it must not start with the host"
            return switching.Systemd.link(unit, wanted)
        link = transaction.socket_link(NAME)
        if wanted and not os.path.lexists(link):
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(f"../{unit}", link)
        elif not wanted and os.path.lexists(link):
            os.unlink(link)

    def start(self, unit):
        if unit.endswith(".socket"):
            if os.path.exists(f"{common.UNITS}/{unit}"):
                self.open.add(unit)
            return
        super().start(unit)

    def stop(self, unit):
        if unit.endswith(".socket"):
            self.open.discard(unit)
            return
        super().stop(unit)


@pytest.fixture
def host(monkeypatch, tmp_path):
    switching.place(monkeypatch, tmp_path)
    return Systemd(monkeypatch)


def stage(version, on_demand=True, **options):
    files = switching.stage(version, **options)
    if on_demand:
        more = {unit: f"{common.MADE_BY}, {version}\n".encode() for unit in (SOCKET, HANDS_ON)}
        more[UNIT] = files[UNIT] + b"# on demand\n"
        files = {**files, **more}
        for file, data in files.items():
            with open(f"{common.STAGED}/{NAME}/{file}", "wb") as out:
                out.write(data)
    return files


def is_ready(host):
    """It starts when it is asked, and not with the host."""
    return host.open == {SOCKET} and os.path.lexists(transaction.socket_link(NAME)) and not switching.is_enabled(UNIT)


def starts_with_host(host):
    return not host.open and not os.path.lexists(transaction.socket_link(NAME)) and switching.is_enabled(UNIT)


def test_a_first_installation_opens_its_socket_and_passes_the_gate(host):
    new = stage("1")
    switch.install([NAME])
    assert host.serving == new and is_ready(host) and host.rooms == [(NAME, False)]
    assert instance_files.last_good(NAME) == new and switching.leftovers() == []


def test_a_boot_opens_its_socket_and_starts_nothing(host):
    stage("1")
    switch.install([NAME])
    host.boot()
    host.start_enabled()
    assert host.serving is None and is_ready(host)


def test_from_the_boot_to_on_demand_and_back(host):
    old = stage("1", on_demand=False)
    switch.install([NAME])
    assert host.serving == old and starts_with_host(host)
    new = stage("2")
    switch.install([NAME])
    assert host.serving == new and is_ready(host)
    again = stage("3", on_demand=False)
    switch.install([NAME])
    assert host.serving == again and starts_with_host(host)
    assert not any(os.path.lexists(f"{common.UNITS}/{unit}") for unit in (SOCKET, HANDS_ON))


def test_one_that_fails_its_gate_puts_the_old_one_back_with_its_socket(host):
    old = stage("1")
    switch.install([NAME])
    stage("2", serves=False)
    with pytest.raises(switch.Failed, match="put back and serves"):
        switch.install([NAME])
    assert host.serving == old and is_ready(host)


def test_one_that_did_not_run_is_put_back_and_is_not_started(host):
    stage("1")
    switch.install([NAME])
    host.stop(UNIT)
    stage("2", serves=False)
    with pytest.raises(switch.Failed, match="put back, and starts when it is asked for"):
        switch.install([NAME])
    assert host.serving is None and is_ready(host) and ("reset-failed", UNIT) in host.calls
    assert json.loads(instance_files.installed(NAME)["plan.json"])["version"] == "1"


def test_a_failed_move_to_on_demand_leaves_one_that_starts_with_the_host(host):
    old = stage("1", on_demand=False)
    switch.install([NAME])
    stage("2", serves=False)
    with pytest.raises(switch.Failed, match="put back and serves"):
        switch.install([NAME])
    assert host.serving == old and starts_with_host(host)


def test_a_failed_first_installation_opens_nothing(host):
    stage("1", serves=False)
    with pytest.raises(switch.Failed, match="no previous one"):
        switch.install([NAME])
    assert host.serving is None and host.open == set() and not os.path.lexists(transaction.socket_link(NAME))


def test_a_switch_that_was_cut_off_is_led_back_at_the_boot_without_a_start(host):
    stage("1")
    switch.install([NAME])
    host.stop(UNIT)
    stage("2")
    host.at = lambda number, verb: (_ for _ in ()).throw(switching.PowerCut) if verb == "start" else None
    with pytest.raises(switching.PowerCut):
        switch.install([NAME])
    host.at = None
    host.boot()
    switch.recover(NAME)
    assert json.loads(instance_files.installed(NAME)["plan.json"])["version"] == "1"
    assert host.serving is None and is_ready(host) and switching.leftovers() == []


def test_it_is_removed_with_all_its_units(host):
    stage("1")
    switch.install([NAME])
    switch.remove(NAME)
    assert host.serving is None and host.open == set()
    assert not os.path.lexists(transaction.socket_link(NAME))
    assert [name for name in os.listdir(common.UNITS) if NAME in name] == []


def test_what_hands_connections_on_is_replaced_while_its_server_runs_on(host):
    old = stage("1")
    switch.install([NAME])
    start = host.running[NAME]
    new = stage("1")
    new[HANDS_ON] = f"{common.MADE_BY}, other helpers\n".encode()
    with open(f"{common.STAGED}/{NAME}/{HANDS_ON}", "wb") as out:
        out.write(new[HANDS_ON])
    host.open.clear()
    os.unlink(transaction.socket_link(NAME))
    switch.refresh(NAME)
    assert host.running[NAME] == start and is_ready(host)
    assert instance_files.installed(NAME)[HANDS_ON] == new[HANDS_ON] != old[HANDS_ON]


def test_a_stopped_one_is_refreshed_without_a_start_and_without_its_timer(host):
    stage("1")
    switch.install([NAME])
    host.stop(UNIT)
    host.watched.clear()
    stage("1")
    switch.refresh(NAME)
    assert host.serving is None and is_ready(host) and not host.watching
    assert os.path.lexists(switching.link_of(TIMER)[1]), "it starts with the server"


def test_two_of_a_switch_are_started_one_after_another(host, monkeypatch):
    """Each with its socket, which is closed until both have passed: a client would start it in the next one's way."""
    events = []
    monkeypatch.setattr(common, "is_on_demand", lambda name: True)
    monkeypatch.setattr(starting, "enable", lambda name: None)
    monkeypatch.setattr(starting, "gate", lambda name, *options: events.append(("gate", name)))
    monkeypatch.setattr(starting, "systemctl", lambda verb, *units, check=True: events.append((verb, *units)))
    assert starting.start_and_check(["a", "b"]) is None
    [(a, b), (door, other)] = (map(common.unit_of, "ab"), (common.demand_units(name)[0] for name in "ab"))
    assert [one for one in events if one[0] != "reset-failed"] == [
        ("stop", door, other), ("stop", a, b),
        ("start", door), ("start", a), ("gate", "a"), ("stop", door), ("stop", a),
        ("start", other), ("start", b), ("gate", "b"), ("stop", other), ("stop", b),
        ("start", door), ("start", other),
    ]  # fmt: skip


def test_without_room_it_is_not_started(host, monkeypatch):
    monkeypatch.setattr(room, "make", lambda name, *_, **asked: "no room for it")
    stage("1")
    with pytest.raises(switch.Failed, match="no room for it"):
        switch.install([NAME])
    assert host.serving is None


@pytest.mark.parametrize(
    ("before", "now", "clears"),
    [(None, 5, True), (5, 5, False), (5, 6, True), (6, 5, False)],
    ids=["new", "same", "more", "less"],
)
def test_one_of_the_boot_that_needs_more_has_the_others_leave(host, before, now, clears):
    def planned(version, size):
        stage(version, on_demand=False)
        path = f"{common.STAGED}/{NAME}/plan.json"
        record = {**common.read_json(path), "plan": {"ledger": [{"device": "GPU0", "weights_bytes": size}]}}
        common.write_json(path, record)

    if before is not None:
        planned("1", before)
        switch.install([NAME])
        host.rooms.clear()
    planned("2", now)
    switch.install([NAME])
    assert host.rooms == ([(NAME, True)] if clears else [])
