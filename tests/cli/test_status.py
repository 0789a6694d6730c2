"""The state of a fleet: one line for each instance, and every problem makes the state not fine."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from llamafleet.cli import main as cli
from llamafleet.cli.fleet_status import page as table
from llamafleet.cli.status import HostStatus, Wanted, of_host, plan_in_short
from llamafleet.host import answers
from llamafleet.host.recorded import PlanRecord
from llamafleet.remote import status as program
from tests import forked
from tests.service.test_changes import INSTALLED, INSTANCE

MIB = 2**20
ROOT = Path(__file__).parents[2]
RECORD = {
    "release": "k1", "backend": "cuda", "verified": {"binary_bytes": {"GPU0": 5}},
    "gate": {"context_tokens": 131072, "slots": 2, "gpus": [{"uuid": "GPU-1", "name": "x", "planned_bytes": 20480 * MIB}]},
    "plan": {"argv": ["--ctx-size", "262144", "--cache-type-k", "q8_0", "--n-gpu-layers", "37"],
             "predicted": {"decode_tokens_per_s": 30.0}},
}  # fmt: skip
GOOD = {"ok": True, "time": "2026-11-21T15:00:00Z", "checks": [], "decode_tokens_per_s": 25.25}
LIVE = {"rss_bytes": 900 * MIB, "cgroup_bytes": 3072 * MIB, "gpu_bytes": {"GPU-1": 20992 * MIB}, "since": "Sat",
        "gate": GOOD}  # fmt: skip
RESTARTED = {"restarts": 2, "by_systemd": 1, "time": "2026-11-21T16:00:00Z", "why": "no sign of life"}
AS_WANTED = Wanted({"demo": ()})


def live(**changes):
    """What the host answers, with other values."""
    return answers.status(json.dumps({"demo": {**LIVE, **changes}}))


def found(**changes):
    instance = dataclasses.replace(INSTANCE, **{"record": PlanRecord.of(RECORD), **changes})
    return dataclasses.replace(INSTALLED, instances={"demo": instance})


def line(host):
    """The instance's cells by column."""
    head, first = (row for row in table({"box1": host}).splitlines()[:2])
    starts = [head.index(name) for name in head.split("  ") if name.strip() for name in [name.strip()]]
    cells = [first[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return dict(zip([head[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)], cells, strict=True))


def test_a_host_as_it_should_be():
    host = of_host(found(), live(), AS_WANTED)
    assert host.is_fine
    assert line(host) == {
        "host": "box1", "instance": "demo", "state": "active", "plan": "131072 x 2 q8_0, 37 layers on 1 GPU, cuda",
        "RAM": "3.0 GiB", "GPU": "20.5 of 20.0 GiB", "tok/s": "25.2", "restarts": "0",
        "last gate": "good 2026-11-21T15:00:00Z", "drift": "none",
    }  # fmt: skip


def test_a_server_that_sleeps_is_fine():
    host = of_host(found(), live(asleep=True), AS_WANTED)
    assert host.is_fine and line(host)["state"] == "asleep"
    assert line(of_host(found(active="failed"), live(asleep=True), AS_WANTED))["state"] == "failed"


@pytest.mark.parametrize(
    ("active", "state", "fine"),
    [
        ("inactive", "on demand, stopped", True),
        ("active", "on demand, up", True),
        ("failed", "on demand, failed", False),
    ],
)
def test_a_server_on_demand_may_be_stopped(active, state, fine):
    host = of_host(found(active=active, demand_sha256={"llamafleet-demand-demo.socket": "0" * 64}), live(), AS_WANTED)
    assert line(host)["state"] == state and host.is_fine is fine


FAILED = {**GOOD, "ok": False, "checks": [{"name": "health", "ok": True}, {"name": "gpu memory", "ok": False}]}


@pytest.mark.parametrize(
    ("changes", "gate", "wanted", "column", "cell"),
    [
        ({"active": "failed"}, GOOD, AS_WANTED, "state", "failed"),
        ({}, GOOD, Wanted({"demo": ("its unit differs", "it is disabled")}), "drift", "its unit differs; it is disabled"),
        ({}, FAILED, AS_WANTED, "last gate", "FAILED gpu memory 2026-11-21T15:00:00Z"),
        ({}, GOOD, Wanted({}), "drift", "the inventory does not name it"),
    ],
    ids=["down", "drift", "gate", "left_over"],
)  # fmt: skip
def test_a_problem_is_shown_and_not_fine(changes, gate, wanted, column, cell):
    host = of_host(found(**changes), live(gate=gate), wanted)
    assert not host.is_fine and line(host)[column] == cell


def test_a_damaged_record_of_the_gate_is_named_and_hides_nothing_else():
    host = of_host(found(), live(gate={"ok": 7}), AS_WANTED)
    assert not host.is_fine and line(host)["last gate"] == "unusable record" and line(host)["RAM"] == "3.0 GiB"
    assert "box1: demo: the last gate is not known: record.ok: should be true or false, is 7" in table({"box1": host})
    assert json.loads(json.dumps(host.to_json()))["instances"]["demo"]["gate"] == {"ok": 7}


def test_a_measurement_that_no_longer_holds_is_named_and_is_no_drift():
    tuned = {"state": "stale", "stale": ["another kernel"], "notes": ["what was measured no longer holds"]}
    host = of_host(found(), live(), Wanted({"demo": ()}, tuned={"demo": tuned}))
    assert host.is_fine and "box1: demo: what was measured no longer holds" in table({"box1": host}).splitlines()
    assert json.loads(json.dumps(host.to_json()))["instances"]["demo"]["tuned"] == tuned


def test_a_wanted_instance_that_is_not_installed_has_a_line():
    host = of_host(dataclasses.replace(INSTALLED, instances={}), {}, Wanted({"demo": ("it is not installed",)}))
    assert not host.is_fine
    assert line(host)["state"] == "not installed" and line(host)["drift"] == "it is not installed"


def test_restarts_by_systemd_and_by_the_liveness_check_are_counted_with_the_last_reason():
    host = of_host(found(restarts=3), live(liveness=RESTARTED), AS_WANTED)
    assert host.is_fine and line(host)["restarts"] == "6"
    remark = "demo: restarted 2 times by the liveness check, last 2026-11-21T16:00:00Z: no sign of life"
    assert f"box1: {remark}" in table({"box1": host}).splitlines()
    assert host.to_json()["instances"]["demo"]["liveness_restarts"] == 2
    for damaged in (None, [], {"restarts": -1}, {"restarts": "x", "why": "y"}):
        assert line(of_host(found(restarts=3), live(liveness=damaged), AS_WANTED))["restarts"] == "3"


def test_changes_beside_the_services_are_shown():
    host = of_host(found(), live(), Wanted({"demo": ()}, ("helpers", "build")))
    assert not host.is_fine
    assert "box1: a run would change: helpers; build" in table({"box1": host})


def test_the_free_space_is_shown_once_for_folders_of_one_disk():
    free = {"/opt": 3 * 2**30 + 4096, "/var/lib/llamafleet": 3 * 2**30}
    host = dataclasses.replace(of_host(found(), live(), AS_WANTED), free_bytes=free)
    assert host.is_fine and host.to_json()["free_bytes"] == free
    assert "box1: 3.0 GiB free at /opt and /var/lib/llamafleet" in table({"box1": host}).splitlines()
    other = dataclasses.replace(host, free_bytes={**free, "/opt": 0})
    assert "box1: 0.0 GiB free at /opt, 3.0 GiB free at /var/lib/llamafleet" in table({"box1": other})


def test_a_host_that_cannot_be_reached_is_named():
    output = table({"box1": of_host(found(), live(), AS_WANTED), "box2": HostStatus(problem="cannot be reached")})
    assert "box2: cannot be reached" in output.splitlines()
    assert not HostStatus(problem="cannot be reached").is_fine


def test_an_inventory_that_cannot_be_deployed_hides_no_instance():
    host = of_host(found(), live(), None, "cannot be compared with the inventory: no such model")
    assert not host.is_fine and line(host)["state"] == "active" and line(host)["drift"] == "none"


def test_an_instance_of_an_earlier_version_shows_less():
    host = of_host(found(record=None), {}, AS_WANTED)
    assert host.is_fine
    assert line(host)["plan"] == line(host)["RAM"] == line(host)["last gate"] == ""


def test_what_the_probe_found_wrong_is_shown_and_in_the_json():
    """lyulyul/shine-cluster#30: a driver that was upgraded under a server that still runs."""
    problem = "NVIDIA: module 570 is loaded but the libraries are 580: reboot needed"
    host = dataclasses.replace(of_host(found(), live(), AS_WANTED), problems=(problem,))
    assert table({"box1": host}).splitlines()[-1] == f"box1: {problem}"
    assert host.to_json()["problems"] == [problem] and host.is_fine  # it serves as planned
    refused = dataclasses.replace(host, problem=f"cannot be compared with the inventory: the host: {problem}")
    assert table({"box1": refused}).count(problem) == 1


def test_memory_that_is_not_known():
    host = of_host(found(), live(cgroup_bytes=None, gpu_bytes={"GPU-1": None}), AS_WANTED)
    assert line(host)["RAM"] == "0.9 GiB" and line(host)["GPU"] == "? of 20.0 GiB"
    broken = of_host(found(), live(gpu_bytes="NVML: Driver Not Loaded"), AS_WANTED)
    assert line(broken)["GPU"] == "NVML: Driver Not Loaded"


def test_a_plan_for_the_cpu_in_short():
    record = {**RECORD, "backend": "cpu", "gate": {**RECORD["gate"], "gpus": []}}
    assert plan_in_short(PlanRecord.of(record)) == "131072 x 2 q8_0, CPU, cpu"


def test_the_json_has_everything():
    output = json.loads(json.dumps(of_host(found(), live(), AS_WANTED).to_json()))
    assert (
        set(output) == {"fine", "state", "problem", "drift", "instances", "free_bytes", "problems"}
        and output["fine"] is True
    )
    instance = output["instances"]["demo"]
    assert instance["gate"] == GOOD and instance["verified"] is True and instance["predicted_tokens_per_s"] == 30.0
    assert instance["gpu_bytes"] == {"GPU-1": 20992 * MIB} and instance["planned_gpu_bytes"] == {"GPU-1": 20480 * MIB}


# --- on the host ----------------------------------------------------------------------------------


@pytest.fixture
def on_host(monkeypatch):
    """One installed instance whose process is this one, with systemd's answers as given."""
    shown = {"MainPID": str(os.getpid()), "MemoryCurrent": "1048576", "ActiveEnterTimestamp": "Sat"}
    files = {program.plan_path("demo"): {"gate": {"gpus": [{}]}}, f"{program.GATES}/demo.json": GOOD,
             program.liveness_record("demo"): RESTARTED}  # fmt: skip
    survey = types.SimpleNamespace(
        names=lambda: ["demo"], show=lambda unit, *names: shown,
    )  # fmt: skip
    monkeypatch.setattr(program, "read_json", lambda path: files.get(path, {}))
    monkeypatch.setitem(sys.modules, "survey", survey)
    held = {"GPU-1": 5, "GPU-2": 0, "GPU-3": None}
    monkeypatch.setitem(sys.modules, "gate_nvml", types.SimpleNamespace(held_by=lambda pid: held))
    return shown


def test_where_nvml_does_not_tell_the_servers_own_log_does(on_host, monkeypatch):
    """canonical/lxd#9755: in a container NVML's process ids are not this host's."""
    plan = {"gate": {"gpus": [{"uuid": "GPU-3", "device": "CUDA0"}]}}
    log = {"start": "abc", "devices": {"CUDA0": {"weights": 5.0 * MIB, "context": 1.0 * MIB}, "CPU": {"weights": 9.0}}}
    files = {program.plan_path("demo"): plan, f"{program.RUN}/devices-llama-server-demo.service.json": log}
    monkeypatch.setattr(program, "read_json", lambda path: files.get(path, {}))
    monkeypatch.setattr(program, "invocation", lambda unit: "abc")
    assert program.status()["demo"]["gpu_bytes"] == {"GPU-1": 5, "GPU-3": 6 * MIB}
    plan["gate"]["backend"] = "hip"  # NVML knows no such GPU
    assert program.status()["demo"]["gpu_bytes"] == {"GPU-3": 6 * MIB}
    plan["gate"]["backend"] = "cuda"
    monkeypatch.setattr(program, "invocation", lambda unit: "of a later start")
    assert program.status()["demo"]["gpu_bytes"] == {"GPU-1": 5, "GPU-3": None}


def test_a_server_that_is_slower_under_this_kernel_is_named_and_fine(on_host, monkeypatch):
    record = {
        **GOOD,
        "slower": "slower since the kernel",
        "pace_again": {"kernel": os.uname().release, "driver": "570"},
    }
    files = {f"{program.GATES}/demo.json": record}
    monkeypatch.setattr(program, "read_json", lambda path: files.get(path, {}))
    for driver, told in (("570", True), ("575", False)):
        monkeypatch.setitem(sys.modules, "gate_pace", types.SimpleNamespace(driver=lambda driver=driver: driver))
        host = of_host(found(), live(gate=program.status()["demo"]["gate"]), AS_WANTED)
        assert host.is_fine and ("box1: demo: slower since the kernel" in table({"box1": host})) is told


def test_the_program_tells_memory_gate_and_since(on_host):
    states = json.loads(json.dumps(program.status()))
    assert list(states) == ["demo"]
    assert states["demo"].pop("rss_bytes") > MIB
    assert states["demo"] == {
        "cgroup_bytes": MIB,
        "gpu_bytes": {"GPU-1": 5, "GPU-3": None},
        "since": "Sat",
        "gate": GOOD,
        "liveness": RESTARTED,
        "asleep": False,
    }


@pytest.mark.parametrize("gate", [5, [], "text", {"gpus": 0}, None])
def test_a_damaged_plan_json_hides_nothing_but_the_gpus(on_host, monkeypatch, gate):
    monkeypatch.setattr(program, "read_json", lambda path: {"gate": gate} if path == program.plan_path("demo") else {})
    assert program.status()["demo"]["gpu_bytes"] == {} and program.status()["demo"]["cgroup_bytes"] == MIB


@pytest.mark.parametrize("value", ["[not set]", "18446744073709551615", "", None])
def test_memory_that_the_kernel_does_not_count(on_host, value):
    on_host["MemoryCurrent"] = value
    assert program.status()["demo"]["cgroup_bytes"] is None


def test_an_instance_that_is_down(on_host):
    on_host["MainPID"] = "0"
    state = program.status()["demo"]
    assert state["rss_bytes"] is None and state["gpu_bytes"] == {}


# --- the command ----------------------------------------------------------------------------------


def test_an_inventory_that_is_not_there_is_bad_input(tmp_path, capsys):
    assert cli.main(["status", "--inventory", str(tmp_path / "none.py")]) == 2
    assert "there is no such inventory file" in capsys.readouterr().err


def test_a_host_that_does_not_answer_is_named_and_exits_1(tmp_path):
    inventory = tmp_path / "fleet.py"
    inventory.write_text('hosts = [("gone", {"ssh_hostname": "127.0.0.1", "ssh_port": 1, "ssh_connect_retries": 0})]\n')
    words = [sys.executable, "-m", "llamafleet.cli", "status", "--inventory", str(inventory), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    state = json.loads(done.stdout)["gone"]
    assert state["fine"] is False and state["problem"].startswith("cannot be reached")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            'hosts = [("@local", {\n"allow_swap": true})]',
            "fleet.py: line 2: NameError: name 'true' is not defined: write True",
        ),
        ("hosts = [\n\n1 2]", "fleet.py: line 3: SyntaxError: "),
        ("import nothing_of_that_name", "fleet.py: line 1: ModuleNotFoundError: "),
        ('hosts = [("box1", 5)]', "fleet.py: TypeError: "),
        ("hosts = []", "fleet.py: the inventory has no host"),
    ],
)
@pytest.mark.parametrize("module", ["tasks.status", "tasks.lib.over_hosts", "tasks.rollout", "tasks.report"])
def test_an_inventory_that_cannot_be_used_is_bad_input_with_a_line(tmp_path, module, text, says):
    (tmp_path / "fleet.py").write_text(text)
    done = forked.pyinfra().run(["-m", module, str(tmp_path / "fleet.py")])
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_limit_that_names_nobody_is_bad_input(tmp_path):
    (tmp_path / "fleet.py").write_text('hosts = ["@local"]\n')
    done = forked.pyinfra().run(["-m", "tasks.status", str(tmp_path / "fleet.py"), "--limit", "nobody"])
    assert done.returncode == 2 and "nobody" in done.stderr


@pytest.mark.parametrize(
    "command", ["status", "rollout", *(pytest.param(one, marks=pytest.mark.long) for one in ("plan", "report"))]
)
def test_ctrl_c_while_a_host_is_silent_ends_within_seconds_with_130(tmp_path, command):
    """A host that accepts the connection and says nothing: as a terminal does, all processes get the signal."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        inventory = tmp_path / "fleet.py"
        inventory.write_text(f'hosts = [("silent", {{"ssh_hostname": "127.0.0.1", "ssh_port": {port}}})]\n')
        words = [sys.executable, "-m", "llamafleet.cli", command, "--inventory", str(inventory)]
        run = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT, process_group=0)  # fmt: skip
        try:
            silent.settimeout(30)
            silent.accept()
            began = time.monotonic()
            os.killpg(run.pid, signal.SIGINT)
            _, err = run.communicate(timeout=20)
            assert time.monotonic() - began < 10  # 2.7 on an idle machine
        finally:
            run.kill()
    assert run.returncode == 130 and "interrupted" in err and "Traceback" not in err


def test_types_of_k_and_v_apart_and_a_pool_in_short():
    argv = [
        "--ctx-size",
        "131072",
        "--parallel",
        "2",
        "--kv-unified",
        "--cache-type-k",
        "q8_0",
        "--cache-type-v",
        "f16",
    ]
    record = {**RECORD, "plan": {**RECORD["plan"], "argv": argv}, "gate": {**RECORD["gate"], "gpus": []}}
    assert plan_in_short(PlanRecord.of(record)) == "131072 x 2 of 131072 q8_0/f16, CPU, cuda"


def test_an_embedder_is_shown_with_the_speed_of_reading():
    gate = {**RECORD["gate"], "gpus": [], "serves": "embedding"}
    plan = {"argv": ["--cache-type-k", "f16"], "predicted": {"decode_tokens_per_s": 0.0, "prefill_tokens_per_s": 99.0}}
    record = PlanRecord.of({**RECORD, "gate": gate, "plan": plan})
    measured = {**GOOD, "decode_tokens_per_s": None, "read_tokens_per_s": 812.34}
    host = of_host(found(record=record), live(gate=measured, gpu_bytes={}), AS_WANTED)
    assert line(host)["plan"] == "embedding, 131072 x 2 f16, CPU, cuda" and line(host)["tok/s"] == "812.3"
    assert host.instances[0].predicted_tokens_per_s == 99.0
    damaged = live(gate={**measured, "read_tokens_per_s": "x"}, gpu_bytes={})
    assert line(of_host(found(record=record), damaged, AS_WANTED))["tok/s"] == ""
