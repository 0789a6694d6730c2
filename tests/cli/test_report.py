"""What a report says of a fleet, before it becomes a page: sections, figures with their numbers, sentences."""

import json
from dataclasses import replace

import pytest

from llamafleet.cli import charts, figures
from llamafleet.cli.reported import HostFacts, Measured
from llamafleet.cli.status import HostStatus
from llamafleet.host.answers import Gate
from llamafleet.host.learned import GatedSpeed
from llamafleet.tuning.tried import Range, tried
from llamafleet.units import GIB
from tests import reporting


def section(hosts, name):
    """The section of a host, and of its first instance."""
    [host] = [one for one in reporting.report(hosts).hosts if one.name == name]
    return host, host.instances[0] if host.instances else None


def figure(one, beginning):
    [found] = [figure for figure in one.figures if figure.title.startswith(beginning)]
    return found


@pytest.fixture(scope="module")
def fleet():
    return reporting.fleet()


def test_the_page_counts_hosts_instances_and_tunes(fleet):
    assert [(number, what) for number, what, _ in reporting.report(fleet).counts] == [
        (5, "hosts"), (3, "as they should be"), (2, "to look at"), (4, "instances"), (4, "measured by a tune"),
        (1, "of them stale"),
    ]  # fmt: skip


def test_every_instance_has_a_line_those_to_look_at_first(fleet):
    lines = reporting.report(fleet).lines
    assert [(one.host, one.instance, one.state.text, one.tune.text) for one in lines] == [
        ("gpu2", "chat", "active: look at it", "stale"), ("cpu9", "chat", "not read", "1.86 times as fast"),
        ("gpu1", "chat", "active", "1.31 times as fast"), ("cpu1", "chat", "active", "1.86 times as fast"),
        ("new1", "", "as it should be", ""),
    ]  # fmt: skip
    assert {one.anchor for one in lines} <= {
        one.anchor for host in reporting.report(fleet).hosts for one in (host, *host.instances)
    }


def test_a_host_that_was_not_reached_says_why_and_shows_what_was_measured_before(fleet):
    host, one = section(fleet, "cpu9")
    assert host.badge.text == "not read" and host.remarks == (
        "cannot be reached: the connection to 10.0.0.9 port 22 timed out",
    )
    assert host.facts == () and dict(one.facts)["tune"].startswith("guesses by n-grams, up to 16 + ubatch 1024: 1.86")
    assert figure(one, "Speed beside").rows and not [each for each in one.figures if each.title == "Memory"]


def test_a_record_that_no_longer_holds_is_named_with_what_differs(fleet):
    host, one = section(fleet, "gpu2")
    assert "what was measured no longer holds: another build of llama.cpp" in one.remarks[1]
    assert one.remarks[0] == "a run would change: its unit differs" and "on gpu1" in dict(one.facts)["tune"]
    assert host.remarks == ("GPU1: its fan is not seen: look at nvidia-smi", "a run would change: build")


def test_the_memory_of_a_plan_adds_up_to_the_device(fleet):
    _, one = section(fleet, "gpu1")
    shown, ledger = figure(one, "Memory"), fleet["gpu1"].instances[0].ledger
    for row, cells in zip(ledger, shown.rows, strict=True):
        parts = charts.memory_parts(row)
        assert sum(parts.values()) == row.capacity_bytes and all(size > 0 for size in parts.values())
        assert cells[0] == row.device and float(cells[-1]) == pytest.approx(row.capacity_bytes / GIB, abs=0.06)
    values = shown.chart["layer"][0]["data"]["values"]
    assert sum(one["gib"] for one in values if one["device"] == 0) == pytest.approx(ledger[0].capacity_bytes / GIB)
    assert shown.says.startswith(f"GPU0: {ledger[0].used_bytes / GIB:.1f} of 24.0 GiB planned, ")


def test_staging_below_nothing_is_taken_off_what_computes():
    row = replace(reporting.gpu_box().instances[0].ledger[0], staging_bytes=-5 * 2**20)
    parts = charts.memory_parts(row)
    assert parts["compute"] == row.compute_bytes - 5 * 2**20 and "staging" not in parts


def test_the_speeds_name_the_winner_and_the_baseline(fleet):
    _, one = section(fleet, "gpu1")
    shown = figure(one, "Speed beside")
    kinds = [value["kind"] for value in shown.chart["layer"][1]["data"]["values"]]
    assert [row[0] for row in shown.rows] == ["llama-server as it ships", "ubatch 1024", "the plan", "2 threads"]
    assert kinds == ["baseline", "chosen", "other", "other"]
    assert shown.rows[0][1].startswith("1.00 (") and shown.says.startswith("ubatch 1024: 1.3")


def test_what_was_lost_has_its_reason(fleet):
    _, one = section(fleet, "cpu1")
    rows = {row[0]: row for row in one.tried.rows}
    assert rows["2 slots"][-1] == "2: the server ended: out of memory (SIGKILL)" and rows["2 slots"][-2] == "0"
    assert rows["guesses by n-grams, up to 16"][4] == "65%" and rows["the plan"][4] == ""


def test_energy_is_shown_where_a_meter_was_read_and_nowhere_else(fleet):
    _, one = section(fleet, "gpu1")
    shown = figure(one, "Tokens for a joule")
    assert shown.rows[0][0] == "llama-server as it ships"
    # Four requests of 2048 and 128 tokens for 45 W over about 21 seconds.
    assert float(shown.rows[0][1].split()[0]) == pytest.approx(4 * 2176 / (45 * 21), rel=0.05)
    box = reporting.gpu_box()
    record = box.instances[0].measured.record
    unmetered = replace(record, raw={**record.raw, "trials": reporting.trials(joules=False)})
    assert figures.energy(tried(unmetered), "ubatch 1024") is None and figures.energy(tried(record), "") is not None


def test_predicted_and_measured_values_are_told_apart(fleet):
    _, one = section(fleet, "cpu1")
    each = figure(one, "Time for each token")
    sources = [row[3] for row in each.rows]
    assert sources.count("measured by the gate") == sources.count("measured by the tune") == 1
    assert sources.count("predicted") == 9 and "predicted" in each.note
    gate = next(row for row in each.rows if row[3] == "measured by the gate")
    assert gate[:3] == ("36", "27.6", "")  # 36.2 tokens/s
    assert next(row for row in each.rows if row[3] == "predicted")[2] != ""
    assert figure(one, "Time to read 2048 tokens")


def test_speed_over_requests_has_the_tune_s_point_where_it_was_measured(fleet):
    _, one = section(fleet, "gpu1")
    shown = figure(one, "Speed of all together")
    assert [row for row in shown.rows if row[3] == "measured by the tune"] == [
        ("4", "35.4", "", "measured by the tune")
    ]
    # The latency of one request alone is not what four at once took.
    assert "measured by the tune" not in [row[3] for row in figure(one, "Time for each token").rows]
    _, alone = section(fleet, "cpu1")
    assert [each.title for each in alone.figures if each.title.startswith("Speed of all together")]


def test_one_slot_without_a_measurement_has_no_curve_over_requests():
    box = reporting.cpu_box()
    [one] = box.instances
    bare = {"cpu1": HostFacts(box.status, box.machine, (replace(one, measured=None),))}
    assert not [each for each in section(bare, "cpu1")[1].figures if each.title.startswith("Speed of all together")]


def test_a_server_of_vectors_has_the_time_for_its_inputs():
    host = reporting.planning.machine((24564,))
    facts, *_ = reporting.instance(host, serves="embedding", pooling="mean", context_tokens=2048,
                                   gated=GatedSpeed(None, 5000.0))  # fmt: skip
    hosts = {"vec1": HostFacts(HostStatus((facts.status,)), host, (facts,))}
    titles = [each.title for each in section(hosts, "vec1")[1].figures]
    assert titles == ["Memory", "Time to read an input, over its length"]


def test_nothing_measured_is_said_and_makes_no_figure():
    box = reporting.cpu_box()
    [one] = box.instances
    hosts = {"cpu1": HostFacts(box.status, box.machine, (replace(one, measured=None, gated=None),))}
    report = reporting.report(hosts)
    assert report.gains is None and report.lines[0].tune.text == "not measured"
    assert not [each for each in report.hosts[0].instances[0].figures if each.title.startswith("Speed beside")]
    assert "nothing of it was measured" in figure(report.hosts[0].instances[0], "Time for each token").note


def test_a_baseline_that_does_not_run_has_no_ratio():
    box = reporting.cpu_box()
    [one] = box.instances
    record = one.measured.record
    record = replace(record, winner=replace(record.winner, gain=None, low=None, high=None))
    hosts = {"cpu1": HostFacts(box.status, box.machine, (replace(one, measured=Measured(record, "", ())),))}
    report = reporting.report(hosts)
    assert report.gains is None and report.lines[0].tune.text == "the default does not run"
    assert "llama-server as it ships does not run here" in dict(report.hosts[0].instances[0].facts)["tune"]


def test_a_gain_that_is_not_proven_is_not_praised():
    box = reporting.cpu_box()
    [one] = box.instances
    record = one.measured.record
    record = replace(record, winner=replace(record.winner, gain=1.0, low=0.0, high=None),
                     raw={**record.raw, "why": "candidate 7: not proven faster in 19 pairs",
                          "not_run": [{"label": "4 slots", "why": "it does not fit"}]})  # fmt: skip
    hosts = {"cpu1": HostFacts(box.status, box.machine, (replace(one, measured=Measured(record, "", ())),))}
    report = reporting.report(hosts)
    assert report.lines[0].tune.text == "no gain proven" and report.gains.rows[0][1] == "1.00 (1.00 to 1.00)"
    [shown] = report.hosts[0].instances
    assert "(guesses by n-grams, up to 16 + ubatch 1024: not proven faster in 19 pairs); " in dict(shown.facts)["tune"]
    assert shown.tried.rows[-1] == ("4 slots", "", "", "", "", "0", "not run: it does not fit")


def test_a_long_chart_ends_and_its_table_does_not():
    bars = [charts.Bar(f"b{n}", Range(1.0, 1.0, 1.0)) for n in range(100)]
    assert len(charts.bars(bars, "x", one=True)["layer"][1]["data"]["values"]) == charts.MOST_ROWS
    shown = reporting.report(reporting.many()).gains
    assert (
        len(shown.rows) == 95
        and "55 more are in the table" in shown.note
        and shown.says.endswith("92 more in the table")
    )


def test_charts_are_plain_data(fleet):
    """JSON, without an address that would be fetched or an expression of Vega."""
    shown = [figure.chart for host in reporting.report(fleet).hosts for one in host.instances for figure in one.figures]
    assert len(shown) > 15
    for text in map(json.dumps, shown):
        assert '"url"' not in text and "expr" not in text and "http" not in text and "NaN" not in text


def test_what_is_wrong_with_an_instance_is_a_remark():
    box = reporting.cpu_box()
    [one] = box.instances
    status = replace(one.status, gate=Gate(False, problem="record.ok: should be true or false, is 7"), liveness_restarts=2,
                     last_liveness_restart="2026-11-21: no sign of life")  # fmt: skip
    hosts = {
        "cpu1": HostFacts(
            box.status, box.machine, (replace(one, status=status, measured=None, chance="not measured: try"),)
        )
    }
    _, shown = section(hosts, "cpu1")
    assert shown.remarks == (
        "the last gate is not known: record.ok: should be true or false, is 7",
        "restarted 2 times by the liveness check, last 2026-11-21: no sign of life",
    )
    assert dict(shown.facts)["last gate"] == "not known" and dict(shown.facts)["tune"] == "not measured: try"


def test_memory_and_disks_are_said_in_units_that_show_them():
    box = reporting.cpu_box()
    [one] = box.instances
    status = replace(one.status, cgroup_bytes=None, rss_bytes=300 * 2**20)
    free = {"/opt": 50 * GIB, "/var/lib/llamafleet": 50 * GIB}
    hosts = {"cpu1": HostFacts(replace(box.status, free_bytes=free), box.machine, (replace(one, status=status),))}
    host, shown = section(hosts, "cpu1")
    assert dict(shown.facts)["RAM in use"] == "300 MiB"
    assert dict(host.facts)["disk"] == "50.0 GiB free at /opt and /var/lib/llamafleet"
