"""What a host has measured of its own speed, read from records that may be anything."""

import json

import learned
import probe_bandwidth
import pytest

MACHINE = {"cpu": {"model": "a", "physical_cores": 2, "performance_cores": 2, "numa_nodes": 1},
           "memory": {"total_bytes": 8 * 2**30}}  # fmt: skip
HARDWARE = "a, 2 cores, 1 nodes, 8 GiB"
EXPECTED = {"decode_tokens_per_s": 10, "prompt_tokens_per_s": 50.0, "computed_on": "host", "host_bytes_per_s": 1e10,
            "host_flops": 1e11, "gpu_bytes_per_s": {}}  # fmt: skip
RECORD = {"schema": 1, "ok": True, "speeds": [10.0, 30.0, 20.0], "prompt_tokens_per_s": 70.0, "expected": EXPECTED}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host's records in a temporary folder, and a probe that counts its runs."""
    monkeypatch.setattr(learned, "INSTANCES", str(tmp_path / "instances"))
    monkeypatch.setattr(learned, "GATES", str(tmp_path / "gate"))
    monkeypatch.setattr(learned, "plan_path", lambda name: str(tmp_path / "instances" / name / "plan.json"))
    runs = []
    monkeypatch.setattr(
        probe_bandwidth, "measured",
        lambda threads: runs.append(threads) or {"bytes_per_s": 5e9, "core_steps_per_s": 4e8, "why": ""},
    )  # fmt: skip

    class Host:
        measured = runs

        def has(self, name, value):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value if isinstance(value, str) else json.dumps(value))

    return Host()


def plan(**probe):
    return {"schema": 1, "inputs": {"rates": {"probe": {"bytes_per_s": 7e9, "hardware": HARDWARE, **probe}}}}


def test_a_host_without_a_figure_is_measured(host):
    assert learned.bandwidth(MACHINE) == {
        "bytes_per_s": 5e9, "core_steps_per_s": 4e8, "why": "", "hardware": HARDWARE,
    }  # fmt: skip
    assert host.measured == [2]


def test_the_figure_of_an_installed_plan_is_used_again(host):
    host.has("instances/old/plan.json", {"schema": 1, "inputs": {"key": "k"}})
    host.has("instances/tiny/plan.json", plan())
    kept = {"bytes_per_s": 7e9, "core_steps_per_s": None, "why": "", "hardware": HARDWARE}  # of an earlier release
    assert learned.bandwidth(MACHINE) == kept and host.measured == []
    host.has("instances/tiny/plan.json", plan(core_steps_per_s=3e8))
    assert learned.bandwidth(MACHINE) == {**kept, "core_steps_per_s": 3e8}
    host.has("instances/tiny/plan.json", plan(core_steps_per_s="many"))
    assert learned.bandwidth(MACHINE) == kept


@pytest.mark.parametrize("text", [
    plan(hardware="another box"), plan(bytes_per_s=0), plan(bytes_per_s="fast"), plan(bytes_per_s=True), "{", "[]",
    {**plan(), "schema": 99}, {"inputs": {"rates": {"probe": None}}}, {"inputs": [1]},
])  # fmt: skip
def test_the_figure_of_another_box_or_of_a_damaged_plan_is_not(host, text):
    host.has("instances/tiny/plan.json", text)
    assert learned.bandwidth(MACHINE)["bytes_per_s"] == 5e9 and host.measured == [2]


def test_gates_that_say_what_was_expected_are_told(host):
    host.has("gate/tiny.json", RECORD)
    host.has("gate/liveness/tiny.json", {"restarts": 1})
    assert learned.gate_speeds() == [
        {"instance": "tiny", "decode_tokens_per_s": 20.0, "prompt_tokens_per_s": 70.0,
         "expected": {**EXPECTED, "decode_tokens_per_s": 10.0}}
    ]  # fmt: skip


@pytest.mark.parametrize("changed", [
    {"expected": None}, {"expected": {}}, {"expected": {**EXPECTED, "host_flops": 0}}, {"speeds": None}, {"speeds": ["x"]},
    {"expected": {**EXPECTED, "computed_on": "the moon"}}, {"expected": {**EXPECTED, "gpu_bytes_per_s": [1]}},
    {"schema": 99}, {"expected": {**EXPECTED, "host_bytes_per_s": float("nan")}},
])  # fmt: skip
def test_a_record_that_cannot_be_used_counts_as_not_measured(host, changed):
    host.has("gate/tiny.json", {**RECORD, **changed})
    host.has("gate/broken.json", "{")
    assert learned.gate_speeds() == []


def test_the_probe_is_measured_or_says_why_not():
    """For real: another program may keep this machine busy, which the answer then says."""
    found = probe_bandwidth.measured(1)
    if found["bytes_per_s"] is None:
        assert found["why"].startswith(("the processors were busy (", "only ")), found
    else:
        assert 1e8 < found["bytes_per_s"] < 1e12 and found["why"] == ""
        assert 1e7 < found["core_steps_per_s"] < 5e9


@pytest.mark.parametrize(("busy", "available", "why"), [(21.0, 2**40, "the processors were busy (21 %)"),
                                                       (0.0, 2**29, "only 512 MiB of memory were available")])  # fmt: skip
def test_a_busy_host_or_one_short_of_memory_is_not_measured(monkeypatch, busy, available, why):
    class Psutil:
        cpu_percent = staticmethod(lambda interval: busy)
        virtual_memory = staticmethod(lambda: type("Memory", (), {"available": available}))

    monkeypatch.setattr(probe_bandwidth, "psutil", Psutil)
    assert probe_bandwidth.bandwidth(2) == {"bytes_per_s": None, "core_steps_per_s": None, "why": why}


def test_what_gates_measured_is_told_whatever_was_expected(host):
    host.has("gate/tiny.json", RECORD)
    host.has("gate/early.json", {"ok": True, "decode_tokens_per_s": 12, "prompt_tokens_per_s": "many"})  # of 39f1a14
    host.has("gate/later.json", {**RECORD, "schema": 99})
    host.has("gate/failed.json", {"schema": 1, "ok": False, "speeds": []})
    host.has("gate/damaged.json", "{")
    assert learned.gated() == {
        "tiny": {"decode_tokens_per_s": 20.0, "prompt_tokens_per_s": 70.0},
        "early": {"decode_tokens_per_s": 12.0, "prompt_tokens_per_s": None},
    }


def test_of_a_server_that_writes_nothing_the_speed_of_reading_is_known(host):
    host.has("gate/vectors.json", {"schema": 1, "ok": True, "speeds": [], "read_speeds": [100.0, 300.0, 200.0, "x"]})
    assert learned.gated() == {"vectors": {"decode_tokens_per_s": None, "prompt_tokens_per_s": 200.0}}
    assert learned.gate_speeds() == []
