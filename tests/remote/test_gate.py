"""The gate: what it calls good, against a small HTTP server in llama-server's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import common
import gate_devices
import pytest

from llamafleet.remote import gate
from tests import fake_nvml
from tests.serving import Server, serving

GPU = {"uuid": "GPU-1", "name": "RTX 4090", "planned_bytes": 8 << 30, "device": "CUDA0", "weights_bytes": 7 << 30,
       "kv_bytes": 1 << 30, "compute_bytes": 0, "staging_bytes": 0}  # fmt: skip
KEY = "the-key"
UNTOLD = "in use; NVML does not tell here by whom, so the server's log decides"


class Answers(Server):
    """Answers each path with its (status, object), the last one for ever; asks for `key` where there is one."""

    def __init__(self):
        super().__init__()
        self.key, self.answers = None, {}

    def answer(self, path, *answers):
        self.answers[path] = list(answers)

    def respond(self, path, body, headers):
        answers = self.answers[path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if self.key and headers["Authorization"] != f"Bearer {self.key}":
            return 401, {"error": "Invalid API Key"}
        return answer


@pytest.fixture
def server():
    with serving(Answers()) as one:
        yield one


@pytest.fixture
def spec(server, monkeypatch):
    monkeypatch.setattr(gate, "unit_state", lambda unit: "active/running")
    monkeypatch.setattr(gate, "main_pid", lambda unit: 42)
    monkeypatch.setattr(gate, "cause_of_end", lambda unit: "")
    told = {"CUDA0": {"weights": float(7 << 30), "context": float(1 << 30)}}
    monkeypatch.setattr(gate_devices, "reported", lambda unit: told)
    return {"unit": "llama-server-chat.service", "argv": [], "url": server.url, "api_keys": None,
            "health_seconds": 5.0, "context_tokens": 8192, "slots": 4, "kv_type": "q8_0", "files": [], "backend": "cuda",
            "gpus": [GPU]}  # fmt: skip


@pytest.fixture
def keyed(spec, server, tmp_path):
    """A server that wants a key, and the file with it."""
    (tmp_path / "api-keys").write_text(f"{KEY}\nanother\n")
    server.key = KEY
    return {**spec, "api_keys": str(tmp_path / "api-keys")}


# --- the unit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "alive"),
    [
        ("active/running", True),
        ("activating/start-post", True),
        ("activating/auto-restart", False),
        ("failed/failed", False),
        ("inactive/dead", False),
        ("deactivating/stop-sigterm", False),
        ("None/None", False),
    ],
)
def test_a_unit_that_has_failed_once_is_not_alive(state, alive):
    assert gate.is_alive(state) is alive


def test_process_runs_with_the_planned_arguments(spec, monkeypatch):
    monkeypatch.setattr(gate, "main_pid", lambda unit: "self")
    with open("/proc/self/cmdline", "rb") as file:
        argv = file.read().decode("utf-8", "surrogateescape").split("\0")[:-1]
    assert gate.check_process({**spec, "argv": argv})["ok"] is True
    found = gate.check_process({**spec, "argv": [*argv, "--ctx-size"]})
    assert (found["ok"], found["found"]) == (False, argv)


def test_no_process(spec, monkeypatch):
    monkeypatch.setattr(gate, "main_pid", lambda unit: 0)
    assert gate.check_process({**spec, "argv": ["llama-server"]})["ok"] is False


# --- health -------------------------------------------------------------------------------------


def test_health_is_waited_for_while_the_model_loads(spec, server):
    server.answer("/health", (503, {"error": "Loading model"}), (503, {}), (200, {"status": "ok"}))
    assert gate.check_health(spec)["ok"] is True
    assert len(server.asked) == 3


def test_health_is_not_waited_for_once_the_server_has_ended(spec, server, monkeypatch):
    # ExecStartPost keeps the unit "activating" although nothing is left that could answer.
    monkeypatch.setattr(gate, "unit_state", lambda unit: "activating/start-post")
    monkeypatch.setattr(gate, "main_pid", lambda unit: 0)
    server.answer("/health", (503, {}))
    found = gate.check_health({**spec, "health_seconds": 600.0})
    assert (found["ok"], found["found"]) == (False, "503, unit activating/start-post, its server has ended")
    assert "journal" in found["hint"] and len(server.asked) == 1


def test_health_is_not_waited_for_once_the_process_is_gone(spec, server, monkeypatch):
    monkeypatch.setattr(gate, "unit_state", lambda unit: "activating/auto-restart")
    server.answer("/health", (503, {}))
    found = gate.check_health({**spec, "health_seconds": 600.0})
    assert (found["ok"], found["found"]) == (False, "503, unit activating/auto-restart")
    assert "journal" in found["hint"] and len(server.asked) == 1


@pytest.mark.parametrize(
    ("status", "says"),
    [(503, "loading takes longer than the deadline"), (500, "its journal says why"), (0, "runs and does not answer")],
)
def test_a_server_that_runs_and_is_not_ready_is_told_by_what_it_answers(spec, server, status, says):
    if status:
        server.answer("/health", (status, {}))
    url = server.url if status else "http://127.0.0.1:1"
    found = gate.check_health({**spec, "url": url, "health_seconds": 0.0})
    assert says in found["hint"] and ("loading" in found["hint"]) is (status == 503)


def test_a_stopped_process_is_named(spec, monkeypatch):
    """A real one: the kernel's word counts."""
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(gate, "main_pid", lambda unit: process.pid)
    try:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        found = gate.check_health({**spec, "url": "http://127.0.0.1:1", "health_seconds": 0.0})
    finally:
        process.kill()
        process.wait()
    assert "its process is stopped" in found["hint"] and "systemctl kill --signal=CONT" in found["hint"]


def test_health_deadline(spec, server):
    server.answer("/health", (503, {}))
    found = gate.check_health({**spec, "health_seconds": 0.3})
    assert found["ok"] is False and "longer than the deadline" in found["hint"]


def test_nobody_answers(spec):
    found = gate.check_health({**spec, "url": "http://127.0.0.1:1", "health_seconds": 0.0})
    assert found["found"] == "no answer, unit active/running"


def test_a_proxy_of_the_environment_is_not_asked(spec, server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    server.answer("/health", (200, {}))
    assert gate.check_health({**spec, "health_seconds": 0.0})["ok"] is True


# --- GPUs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "ok", "found"),
    [
        ({"GPU-1": 9 << 30}, True, "held"),
        ({"GPU-1": 4 << 30}, True, "held"),  # half of the plan is enough
        ({"GPU-1": (4 << 30) - 1}, False, "4095 MiB on RTX 4090 (GPU-1)"),
        ({"GPU-1": 0}, False, "0 MiB on RTX 4090 (GPU-1)"),
        ({"GPU-2": 9 << 30}, False, "0 MiB on RTX 4090 (GPU-1)"),
        ({"GPU-1": None}, True, UNTOLD),  # NVML does not tell, which is no proof of a fault
        ("NVML: Driver Not Loaded", False, "NVML: Driver Not Loaded"),
    ],
)
def test_the_planned_gpu_holds_the_process(spec, monkeypatch, held, ok, found):
    monkeypatch.setattr(gate, "held_by", lambda pid: held)
    told = gate.check_gpus(spec)
    assert (told["ok"], told["found"]) == (ok, found)


def test_every_planned_gpu_is_looked_at(spec, monkeypatch):
    other = {**GPU, "uuid": "GPU-2", "name": "RTX 3090"}
    monkeypatch.setattr(gate, "held_by", lambda pid: {"GPU-1": None, "GPU-2": 0})
    found = gate.check_gpus({**spec, "gpus": [GPU, other]})
    assert found["ok"] is False and "RTX 3090" in found["found"]


def test_a_plan_without_gpus_asks_no_driver(spec, monkeypatch):
    monkeypatch.setattr(gate, "held_by", lambda pid: pytest.fail("NVML was asked"))
    assert gate.check_gpus({**spec, "gpus": []}) is None


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def held(library, tmp_path):
    """What the gate reads of process 42, by the real pynvml from a stand-in for NVIDIA's library."""

    def ask(*state, call="held_by(42)", pids=os.readlink("/proc/self/ns/pid")):
        (tmp_path / "state").write_text("\n".join(state) + "\n")
        code = f"import json, common, gate_nvml; common.INITIAL_PIDS = {pids!r}; print(json.dumps(gate_nvml.{call}))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(gate.__file__).parent, capture_output=True, text=True, check=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(library.parent), "FAKE_NVML_STATE": str(tmp_path / "state")},
        )  # fmt: skip
        return json.loads(done.stdout)

    return ask


TWO = ("count=2", "device0.uuid=GPU-1", "device1.uuid=GPU-2")


def test_memory_is_told_by_gpu_for_this_process_only(held):
    found = held(*TWO, "device0.processes_list=7:1,42:5", "device1.processes_list=7:3")
    assert found == {"GPU-1": 5 << 20, "GPU-2": 0}


def test_a_containers_process_ids_are_not_nvmls(held):
    """canonical/lxd#9755, NVIDIA/nvidia-docker#1483: NVML tells the host's ids, among them by chance this one's."""
    assert held(*TWO, "device0.processes_list=42:5,7:9000", pids="pid:[1]") == {"GPU-1": None, "GPU-2": None}


def test_a_process_without_bytes_is_unknown(held):
    """HAMi-core#112: the own process id with 0 bytes."""
    assert held(*TWO, "device0.processes_list=42:0") == {"GPU-1": None, "GPU-2": 0}


def test_a_driver_without_lists_of_processes_is_unknown(held):
    """Jetson, WSL."""
    assert held("device0.uuid=GPU-1", "device0.processes=3") == {"GPU-1": None}


def test_what_is_in_use_on_each_gpu_is_read(held):
    state = (*TWO, "device0.used_mib=700", "device0.reserved_mib=50", "device1.memory=3")
    assert held(*state, call="in_use_on_all()") == {"GPU-1": 750 << 20}


@pytest.mark.parametrize(
    ("in_use", "ok", "found"),
    [
        ({"GPU-1": 9 << 30}, True, UNTOLD),
        ({"GPU-1": 1 << 30}, False, "1024 MiB on RTX 4090 (GPU-1) in use by all together"),
        ({}, True, UNTOLD),  # a memory that GPU and CPU share
    ],
)
def test_without_process_ids_what_is_in_use_must_be_enough(spec, monkeypatch, in_use, ok, found):
    """canonical/lxd#9755: a healthy server was called CPU-only; one that is on the CPU is still found."""
    monkeypatch.setattr(gate, "held_by", lambda pid: {"GPU-1": None})
    monkeypatch.setattr(gate, "in_use_on_all", lambda: in_use)
    told = gate.check_gpus(spec)
    assert (told["ok"], told["found"]) == (ok, found)


def test_without_process_ids_the_servers_own_log_decides(spec, monkeypatch):
    """canonical/lxd#9755: another program fills the GPU, and our server is on the CPU."""
    monkeypatch.setattr(gate, "held_by", lambda pid: {"GPU-1": None})
    monkeypatch.setattr(gate, "in_use_on_all", lambda: {"GPU-1": 20 << 30})
    assert gate.check(spec, [gate.check_gpus, gate.check_devices])["ok"] is True
    monkeypatch.setattr(gate_devices, "reported", lambda unit: {"CPU": {"weights": float(8 << 30)}})
    found = gate.check(spec, [gate.check_gpus, gate.check_devices])
    assert (found["ok"], found["checks"][-1]["name"]) == (False, "devices")


def test_a_gpu_without_a_uuid_is_judged_by_the_log_alone(spec, monkeypatch):
    """ultralytics#20680: a Jetson of which NVML tells nothing."""
    monkeypatch.setattr(gate, "held_by", lambda pid: pytest.fail("NVML was asked"))
    assert gate.check_gpus({**spec, "gpus": [{**GPU, "uuid": ""}]}) is None


def test_memory_that_nvml_does_not_tell_is_unknown(held):
    assert held(*TWO, "device0.processes_list=42:?") == {"GPU-1": None, "GPU-2": 0}


def test_a_gpu_that_fell_off_the_bus_does_not_hide_the_other(held):
    assert held(*TWO, "device0.processes=15", "device1.processes_list=42:9") == {"GPU-2": 9 << 20}


def test_mig_instances_are_asked_one_by_one(held):
    found = held(
        "device0.mig_mode=1", "device0.mig=2", "device0.mig0.uuid=MIG-a", "device0.mig1.uuid=MIG-b",
        "device0.mig1.processes_list=42:6",
    )  # fmt: skip
    assert found == {"MIG-a": 0, "MIG-b": 6 << 20}


def test_a_driver_that_fails_is_told_in_words(held):
    assert held("init=9") == "NVML: Driver Not Loaded"


# --- what it serves -----------------------------------------------------------------------------


def test_without_a_key_nobody_gets_in(keyed, server):
    server.answer("/v1/completions", (200, {}))
    assert gate.check_key(keyed)["ok"] is True
    server.key = None  # as llama-server does with an empty key file
    found = gate.check_key(keyed)
    assert (found["ok"], found["found"]) == (False, 200)


def test_without_keys_there_is_nothing_to_refuse(spec):
    assert gate.check_key(spec) is None


KV_LINE = "llama_kv_cache: size =  544.00 MiB (  8192 cells,  32 layers,  4/4 seqs), K ({}):  272.00 MiB, V (q8_0):  272.00 MiB\n"


def props(context, slots):
    return {"default_generation_settings": {"n_ctx": context}, "total_slots": slots}


@pytest.mark.parametrize(("context", "slots", "ok"), [(8192, 4, True), (4096, 4, False), (8192, 1, False)])
def test_context_is_the_planned_one(keyed, server, monkeypatch, context, slots, ok):
    monkeypatch.setattr(gate, "log_of_start", lambda unit: "")  # the journal has forgotten it, or has no such line
    server.answer("/props", (200, props(context, slots)))
    found = gate.check_context(keyed)  # its key is needed here too
    assert (found["ok"], found["found"]) == (ok, {"context_tokens": context, "slots": slots})


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (KV_LINE.format("q8_0") * 2, ["q8_0"]),
        (KV_LINE.format("f16"), ["f16/q8_0"]),  # llama-server took another for K
        (KV_LINE.format("q8_0") + KV_LINE.format("q4_0"), ["q4_0/q8_0", "q8_0"]),
    ],
)
def test_kv_types_are_those_of_the_log(spec, server, monkeypatch, log, found):
    monkeypatch.setattr(gate, "log_of_start", lambda unit: log)
    server.answer("/props", (200, props(8192, 4)))
    told = gate.check_context(spec)
    assert told["found"]["kv_types"] == found
    assert told["ok"] is (found == ["q8_0"])


@pytest.mark.parametrize(("key", "ok"), [("f16", True), ("q8_0", False), ("q4_0", False)])
def test_types_of_k_and_v_are_compared_apart(spec, server, monkeypatch, key, ok):
    monkeypatch.setattr(gate, "log_of_start", lambda unit: KV_LINE.format(key))
    server.answer("/props", (200, props(8192, 4)))
    told = gate.check_context({**spec, "kv_type": "f16/q8_0"})
    assert (told["ok"], told["expected"]["kv_types"]) == (ok, ["f16/q8_0"])


def test_a_record_without_a_kv_type_is_compared_without_it(spec, server, monkeypatch, tmp_path):
    monkeypatch.setattr(gate, "log_of_start", lambda unit: KV_LINE.format("f16"))
    server.answer("/props", (200, props(8192, 4)))
    del spec["kv_type"]
    (tmp_path / "plan.json").write_text(json.dumps({"gate": spec}))
    told = gate.check_context(gate.read_spec(str(tmp_path / "plan.json")))
    assert told["ok"] and "kv_types" not in told["found"]


@pytest.mark.parametrize("answer", [(500, "<html>"), (200, "[]"), (404, {"error": "no"})])
def test_no_props_is_told_by_status(spec, server, monkeypatch, answer):
    monkeypatch.setattr(gate, "kv_types", lambda unit: [])
    server.answer("/props", answer)
    found = gate.check_context(spec)
    assert (found["ok"], found["found"]) == (False, f"status {answer[0]}")


# --- all of it ----------------------------------------------------------------------------------


def run(argv):
    """gate.py, but for its unit, which test_gate_unit.py is about."""
    return gate.conclude(argv, gate.examine(argv))


def test_checks_stop_at_the_first_that_fails(spec):
    good, bad = gate.result("one", True, 1, 1), gate.result("two", False, 1, 2)
    never = pytest.fail
    found = gate.check(spec, [lambda spec: good, lambda spec: None, lambda spec: bad, lambda spec: never("asked")])
    assert found == {"ok": False, "checks": [good, bad]}
    assert gate.check(spec, [lambda spec: None, lambda spec: good]) == {"ok": True, "checks": [good]}


@pytest.mark.parametrize(("held", "code"), [({"GPU-1": 9 << 30}, 0), ({"GPU-1": 0}, 1)])
def test_start_post_asks_health_and_gpus_and_tells_the_journal(spec, server, tmp_path, monkeypatch, capsys, held, code):
    server.answer("/health", (200, {}))
    monkeypatch.setattr(gate, "held_by", lambda pid: held)
    (tmp_path / "plan.json").write_text(json.dumps({"gate": spec}))
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))
    assert run(["start", str(tmp_path / "plan.json")]) == code
    told = capsys.readouterr()
    assert told.out == "" and ("gpu memory" in told.err) is bool(code)
    assert server.paths == ["/health"]


@pytest.mark.parametrize("keys", ["asked for", "not asked for"])
def test_a_start_without_the_planned_keys_fails(keyed, server, tmp_path, monkeypatch, capsys, keys):
    """As with an empty key file, which switches llama-server's authentication off."""
    server.answer("/health", (200, {}))
    server.answer("/v1/completions", (200, {"choices": []}))
    server.key = KEY if keys == "asked for" else None
    monkeypatch.setattr(gate, "wait_for_health", lambda *_: 200)
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))
    (tmp_path / "plan.json").write_text(json.dumps({"gate": {**keyed, "gpus": []}}))
    assert run(["start", str(tmp_path / "plan.json")]) == (0 if server.key else 1)
    said = capsys.readouterr().err
    assert said == "" if server.key else "api key: expected 401 without a key, found 200 (an empty key file" in said


def test_a_key_file_that_is_gone_is_named(keyed, server, tmp_path, monkeypatch):
    server.answer("/v1/completions", (200, {}))
    os.unlink(keyed["api_keys"])
    found = gate.check(keyed, [gate.check_key, gate.check_context])
    assert [one["ok"] for one in found["checks"]] == [True, False]
    assert found["checks"][1]["name"] == "context" and "No such file" in found["checks"][1]["found"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda plan: [plan], "it is no JSON object"),
        (lambda plan: {**plan, "schema": 2}, "it has schema 2, and this llamafleet knows up to 1"),
        (lambda plan: {**plan, "schema": "1"}, "it has schema '1'"),
        (lambda plan: {"schema": 1}, "gate: should be an object"),
        (lambda plan: {**plan, "gate": [1]}, "gate: should be an object"),
        (
            lambda plan: {"gate": {key: plan["gate"][key] for key in plan["gate"] if key != "url"}},
            "gate.url is missing",
        ),
        (lambda plan: {"gate": {**plan["gate"], "argv": "llama-server"}}, "gate.argv: should be a list of texts"),
        (
            lambda plan: {"gate": {**plan["gate"], "unit": "sshd.service"}},
            "gate.unit: should be the name of a unit of ours",
        ),
        (lambda plan: {"gate": {**plan["gate"], "gpus": {}}}, "gate.gpus: should be a list of objects"),
        (lambda plan: {"gate": {**plan["gate"], "gpus": [1]}}, "gate.gpus[0]: should be an object"),
        (lambda plan: {"gate": {**plan["gate"], "gpus": [{"uuid": "x"}]}}, "gate.gpus[0].name is missing"),
        (lambda plan: {**plan, "files": [{"path": 1}]}, "files[0].path: should be a text"),
        (lambda plan: {**plan, "files": 5}, "files[0]: should be an object"),
    ],
)
@pytest.mark.parametrize("verb", ["start", "check"])
def test_a_plan_of_another_form_is_refused_by_name(spec, tmp_path, capsys, verb, change, problem):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(change({"gate": spec})))
    assert run([verb, str(path), "--record"]) == 1
    said = capsys.readouterr()
    text = said.err if verb == "start" else json.loads(said.out)["checks"][0]["found"]
    assert f"{path}: {problem}" in text
    assert said.err == "" if verb == "check" else said.out == ""


@pytest.mark.parametrize("text", ["", "{", "\0" * 9, "[" * 100_000])
def test_a_plan_that_is_damaged_is_refused_by_name(tmp_path, capsys, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    for where in (path, tmp_path / "none.json"):
        assert run(["start", str(where)]) == 1
        assert f"plan: expected a plan.json that this gate knows, found {where}: " in capsys.readouterr().err


def test_a_plan_of_39f1a14_is_read(spec, tmp_path, monkeypatch):
    """It had no tls_certificate at first, no kv_type and no floor."""
    (tmp_path / "plan.json").write_text(
        json.dumps({"gate": {key: value for key, value in spec.items() if key != "kv_type"}})
    )
    found = gate.read_spec(str(tmp_path / "plan.json"))
    assert (found["kv_type"], found["tls_certificate"], found["speed_floor_percent"]) == (None, None, 0)


@pytest.mark.parametrize(
    "damage",
    [
        {"speeds": 5}, {"speeds": ["fast"]}, {"speeds": [True]}, {"prompt_tokens_per_s": "x"}, {"prompt_tokens_per_s": 0},
        {"first": []}, {"first": {"model": "m"}}, {"first": {"model": "m", "top": {"a": 1}}}, {"first": {"top": {"1": None}}},
        {"schema": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_of_another_form_counts_as_never_measured(spec, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(common, "GATES", str(tmp_path))
    (tmp_path / "plan.json").write_text(json.dumps({"gate": spec}))
    good = {"speeds": [1.0, 2], "prompt_tokens_per_s": 3.5, "first": {"model": "m", "top": {"1": -0.5}}}
    (tmp_path / "chat.json").write_text(json.dumps(good))
    assert gate.read_spec(str(tmp_path / "plan.json"))["last"] == good
    (tmp_path / "chat.json").write_text(json.dumps({**good, **damage}))
    last = gate.read_spec(str(tmp_path / "plan.json"))["last"]
    assert set(good) - set(last) == (set(good) if "schema" in damage else set(damage))


@pytest.fixture
def recorded(spec, tmp_path, monkeypatch):
    """Runs `gate.py check PLAN --record` with one check that gives this verdict and measures this speed."""
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))

    def recorded(ok, speed=None, record=True, **plan):
        def verdict(spec):
            spec["measured"].update({"decode_tokens_per_s": speed} if speed else {})
            return gate.result("speed", ok, "a lot", "something", "the hint")

        monkeypatch.setattr(gate, "CHECKS", (verdict,))
        (tmp_path / "plan.json").write_text(json.dumps({"gate": spec, "identity": "i", "release": "r1", **plan}))
        code = run(["check", str(tmp_path / "plan.json"), *(["--record"] if record else [])])
        file = tmp_path / "gate/chat.json"
        return code, json.loads(file.read_text()) if file.exists() else None

    return recorded


def test_a_verdict_is_recorded_for_people_and_for_the_next_gate(recorded, capsys):
    code, record = recorded(True, 50.0)
    assert code == 0 and record["ok"] and record["time"].endswith("Z")
    assert (record["identity"], record["release"], record["decode_tokens_per_s"]) == ("i", "r1", 50.0)
    assert record["checks"][0]["name"] == "speed" and "last_failure" not in record
    assert json.loads(capsys.readouterr().out)["decode_tokens_per_s"] == 50.0


def test_only_a_gate_that_is_told_to_records(recorded):
    assert recorded(True, 50.0, record=False) == (0, None)


def test_a_failure_is_kept_beside_what_is_compared_with(recorded):
    recorded(True, 50.0)
    code, record = recorded(False, 9.0, release="r2")
    assert code == 1 and not record["ok"] and record["speeds"] == [50.0]
    assert record["last_failure"]["release"] == "r2" and record["last_failure"]["check"]["hint"] == "the hint"
    record = recorded(True, 40.0)[1]  # the one that was put back
    assert record["ok"] and record["speeds"] == [50.0, 40.0] and record["last_failure"]["release"] == "r2"


def test_the_last_speeds_are_remembered_for_one_plan_only(recorded, spec):
    for speed in range(1, 8):
        record = recorded(True, float(speed))[1]
    assert record["speeds"] == [3.0, 4.0, 5.0, 6.0, 7.0]
    spec["argv"] = ["llama-server", "--ctx-size", "1"]
    assert recorded(True, 2.0)[1]["speeds"] == [2.0]
    assert recorded(True)[1]["speeds"] == [2.0]  # a busy server was not measured


def test_without_a_floor_any_speed_is_good(spec, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))
    monkeypatch.setattr(gate, "CHECKS", (lambda spec: seen.append(spec["speed_floor_percent"]),))
    (tmp_path / "plan.json").write_text(json.dumps({"gate": {**spec, "speed_floor_percent": 40}}))
    for options in ([], ["--no-floor"]):
        assert run(["check", str(tmp_path / "plan.json"), *options]) == 0
    assert seen == [40, 0]
