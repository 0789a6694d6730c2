"""Wedged, at work, idle or asleep? Told apart by what the server says of itself, against a small HTTP server in
llama-server's place. tests/oracle/test_liveness.py has a real one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import threading
import time
from types import SimpleNamespace

import common
import pytest

from llamafleet.remote import liveness
from tests.serving import Server, serving

UNIT = "llama-server-chat.service"
SHORT = 0.05  # seconds: where a restart is expected


def slot(task, working=False, read=0, written=0, number=0, held=100):
    """What /slots says of a slot; of one that never had a task, with None, it says less."""
    least = {"id": number, "is_processing": working}
    if task is None:
        return least
    return {**least, "id_task": task, "n_prompt_tokens": held, "n_prompt_tokens_processed": read,
            "next_token": [{"n_decoded": written}]}  # fmt: skip


class LlamaServer(Server):
    """`slots` has what /slots says, answer by answer, the last one for ever; None is no answer, a number a status.
    `completion` is the status of a completion, None for one that never ends."""

    def __init__(self):
        super().__init__()
        self.slots, self.completion, self.over = [[slot(1)]], 200, threading.Event()
        self.props, self.working, self.waiting, self.metrics = {"is_sleeping": False}, 0, [0], None

    def respond(self, path, body, headers):
        if path == "/props":
            return self.as_answer(self.props)
        if path == "/slots":
            return self.as_answer(self.next(self.slots))
        if path == "/metrics":
            if self.metrics is not None:
                return self.as_answer(self.metrics)
            counts = {"processing": self.working, "deferred": self.next(self.waiting)}
            return 200, "".join(f"llamacpp:requests_{name} {count}\n" for name, count in counts.items())
        assert path == "/completion" and body["n_predict"] == 1 and body["id_slot"] == 0
        if self.completion is None:
            self.over.wait(10)
            return None
        return self.completion, {}

    @staticmethod
    def next(answers):
        return answers.pop(0) if len(answers) > 1 else answers[0]

    @staticmethod
    def as_answer(told):
        return None if told is None else (told, {}) if isinstance(told, int) else (200, told)


@pytest.fixture
def server():
    with serving(LlamaServer()) as one:
        yield one
        one.over.set()


class Systemd:
    def __init__(self):
        self.state, self.pids, self.calls, self.argv = "active/running", [7], [], []

    def pid(self, unit):
        return self.pids.pop(0) if len(self.pids) > 1 else self.pids[0]


@pytest.fixture
def systemd(monkeypatch):
    one = Systemd()
    monkeypatch.setattr(liveness, "unit_state", lambda unit: one.state)
    monkeypatch.setattr(liveness, "main_pid", one.pid)
    monkeypatch.setattr(liveness, "command_line", lambda pid: one.argv)
    monkeypatch.setattr(liveness, "systemctl", lambda *words, check=True: one.calls.append(["systemctl", *words]))
    return one


@pytest.fixture
def gate(server):
    """`gate` of plan.json."""
    return {"unit": UNIT, "url": server.url, "api_keys": None, "argv": ["llama-server"], "health_seconds": 0,
            "context_tokens": 4096, "slots": 2}  # fmt: skip


@pytest.fixture
def check(gate, systemd, tmp_path, monkeypatch):
    """One run of the liveness check; its exit code."""
    for module in (liveness, common):
        monkeypatch.setattr(module, "RUN", str(tmp_path / "run"))
    monkeypatch.setattr(common, "GATES", str(tmp_path / "gate"))
    monkeypatch.setattr(liveness, "POLL_SECONDS", 0.02)

    def run(seconds=30.0, plan=None):
        (tmp_path / "plan.json").write_text(json.dumps(plan or {"gate": gate, "batch_tokens": 2048}))
        return liveness.main([str(tmp_path / "plan.json"), str(seconds)])

    return run


def restarts(systemd):
    return [words for words in systemd.calls if "restart" in words]


# --- what a server without work is asked -----------------------------------------------------------


def test_an_idle_server_is_not_asked_for_a_token(check, server, systemd):
    assert check() == 0 and check() == 0
    assert "/completion" not in server.paths and not restarts(systemd)


def test_the_window_of_the_metrics_is_left_alone_where_a_slot_has_worked(check, server):
    """/metrics begins it anew."""
    check()
    server.asked.clear()
    server.slots = [[slot(5)]]  # a request came and went
    assert check() == 0 and "/metrics" not in server.paths
    assert check() == 0 and "/metrics" in server.paths  # nothing since


def test_a_sleeping_server_is_asked_for_nothing_that_wakes_it(check, server):
    server.props = {"is_sleeping": True}
    assert check() == 0 and set(server.paths) == {"/props"}


@pytest.mark.parametrize("where", ["process", "plan"])
def test_a_server_that_may_sleep_is_not_kept_awake(check, server, systemd, gate, where):
    """/slots would count as use. The process's own command line counts, the plan's where that cannot be read."""
    argv = ["llama-server", "--sleep-idle-seconds", "60"]
    if where == "process":
        systemd.argv = argv
    else:
        gate["argv"] = argv
    server.slots = [[slot(None)]]
    assert check() == 0 and server.paths == ["/props", "/metrics"]
    server.working = 1
    server.slots = [[slot(1, True, 5)], [slot(1, True, 6)]]
    assert check() == 0 and "/slots" in server.paths and "/completion" not in server.paths


EMPTY = {"never used": slot(None), "cleared after an error": slot(9, held=0)}


@pytest.mark.parametrize("second", EMPTY.values(), ids=EMPTY)
def test_a_server_without_cached_tokens_is_asked_for_one(check, server, systemd, second):
    server.slots = [[slot(None), {**second, "id": 1}]]
    assert check() == 0 and server.paths.count("/completion") == 1 and not restarts(systemd)


USED = {
    "one slot holds some": [slot(None), slot(9, number=1, held=1)],
    "of a release that does not say": [{"id": 0, "id_task": 9, "is_processing": False}],
}


@pytest.mark.parametrize("slots", USED.values(), ids=USED)
def test_a_server_that_may_have_cached_tokens_is_not(check, server, slots):
    server.slots = [slots]
    assert check() == 0 and "/completion" not in server.paths


def test_no_token_is_asked_for_while_requests_wait(check, server, systemd):
    server.slots, server.waiting = [[slot(None)]], [2, 2, 0]
    assert check() == 0
    assert server.paths == [*["/props", "/slots", "/metrics"] * 3, "/completion"]


@pytest.mark.parametrize("status", [500, None], ids=["errors all the time", "hangs"])
def test_an_empty_server_that_gives_no_token_is_restarted(check, server, systemd, status):
    server.slots, server.completion = [[slot(None)]], status
    assert check(SHORT) == 10 and restarts(systemd)


# --- what is wedged ----------------------------------------------------------------------------------


def test_a_server_that_does_not_answer_is_restarted(check, server, systemd, tmp_path, capsys):
    server.props = None
    assert check(SHORT) == 10
    assert restarts(systemd) == [["systemctl", "restart", "--no-block", UNIT]]
    noted = json.loads((tmp_path / "gate/liveness/chat.json").read_text())
    assert noted["restarts"] == 1 and "no sign of life within 0 s: /props: no answer" in noted["why"]
    assert f"{UNIT} is wedged" in capsys.readouterr().out
    check(SHORT)
    assert json.loads((tmp_path / "gate/liveness/chat.json").read_text())["restarts"] == 2


def test_a_main_loop_that_does_not_answer_is_wedged_although_http_does(check, server, systemd, capsys):
    server.slots = [None]
    assert check(SHORT) == 10 and restarts(systemd)
    assert "/slots: no answer" in capsys.readouterr().out


def test_a_request_that_hangs_is_no_sign_of_life(check, server, systemd, capsys):
    server.slots = [[slot(1, working=True, read=512, written=40), slot(2, number=1)]]
    assert check(SHORT) == 10 and restarts(systemd)
    assert "slots at work whose counters stand still: 0;" in capsys.readouterr().out


def test_a_request_that_only_begins_is_no_sign_of_life(check, server, systemd):
    server.slots = [[slot(1)], [slot(2, working=True)]]
    assert check() == 0
    assert check(SHORT) == 10 and restarts(systemd)


def test_a_queue_that_stands_still_is_wedged(check, server, systemd, capsys):
    server.waiting = [3]
    assert check(SHORT) == 10 and restarts(systemd)
    assert "requests that wait although no slot works: 3" in capsys.readouterr().out


def test_a_queue_that_stands_still_is_wedged_also_where_the_server_may_sleep(check, server, systemd):
    systemd.argv, server.waiting = ["llama-server", "--sleep-idle-seconds=60"], [3]
    assert check(SHORT) == 10 and restarts(systemd)


def test_a_queue_that_gets_on_is_not(check, server, systemd):
    server.waiting = [3, 3, 0]
    assert check() == 0 and not restarts(systemd)


@pytest.mark.parametrize(
    "then",
    [slot(1, True, 512, 41), slot(1, True, 2048, 40), slot(1, False, 512, 44), slot(2, True, 64, 0)],
    ids=["writes", "reads", "ends", "took the next"],
)
def test_a_busy_server_is_left_alone(check, server, systemd, then):
    server.slots, server.waiting = [[slot(1, True, 512, 40)], [slot(1, True, 512, 40)], [then]], [9]
    assert check() == 0 and not restarts(systemd) and "/completion" not in server.paths


def test_one_slot_that_gets_on_is_enough(check, server, systemd):
    stuck = slot(1, True, 512, 40)
    server.slots = [[stuck, slot(3, True, 9, 1, number=1)], [stuck, slot(3, True, 9, 2, number=1)]]
    assert check() == 0 and not restarts(systemd)


def test_a_server_that_wakes_up_is_given_the_time_to_load(check, server, systemd, gate):
    """It answers nothing meanwhile: the main loop holds the queue's lock."""
    systemd.argv, gate["health_seconds"] = ["llama-server", "--sleep-idle-seconds", "60"], 60
    server.props = None
    threading.Timer(0.5, lambda: setattr(server, "props", {"is_sleeping": False})).start()
    assert check(0.1) == 0 and not restarts(systemd)


# --- answers of a server that somebody took over, or of another release ------------------------------

ODD_SLOTS = {
    "no list": {"slots": []}, "text": "[]]", "numbers": [1], "lists": [[slot(1)]], "nothing": [None],
    "a task that is text": [slot("1")], "a task that is a list": [slot([1])], "a number that is a fraction": [slot(1.5)],
    "a number that is not one": [{**slot(1), "n_prompt_tokens_processed": None}],
    "a truth that is text": [slot(1, working="yes")], "a truth that is a number": [slot(1, working=1)],
    "a count that is a truth": [slot(True)], "a number without end": [slot(10**400)],
    "tokens that are text": [{**slot(1), "next_token": "abc"}], "tokens that are numbers": [{**slot(1), "next_token": [1]}],
    "brackets without end": "[" * 100_000, "infinity": '[{"id": 0, "id_task": Infinity}]', "too many slots": [slot(None)] * 257, "digits": '[{"id": ' + "9" * 5000 + "}]",
}  # fmt: skip


@pytest.mark.parametrize("told", ODD_SLOTS.values(), ids=ODD_SLOTS)
def test_odd_answers_count_as_none_and_are_named(check, server, systemd, capsys, told):
    server.slots = [told]
    assert check(SHORT) == 10 and restarts(systemd)
    said = capsys.readouterr().out
    assert "no sign of life within 0 s: /slots: " in said and len(said) < 300


@pytest.mark.parametrize("told", [[1], "text", 503])
def test_odd_properties_count_as_no_answer(check, server, systemd, capsys, told):
    server.props = told
    assert check(SHORT) == 10 and "no sign of life within 0 s: /props: " in capsys.readouterr().out


@pytest.mark.parametrize("told", [[1], 500], ids=["a list", "an error"])
def test_odd_metrics_count_as_no_answer(check, server, systemd, capsys, told):
    server.metrics = told
    assert check(SHORT) == 10 and "no sign of life within 0 s: /metrics: " in capsys.readouterr().out


@pytest.mark.parametrize("told", [501, "llamacpp:requests_waiting 3\n", "llamacpp:requests_deferred ²\n"])
def test_a_release_without_these_metrics_is_no_reason_to_restart(check, server, systemd, told):
    server.metrics = told
    assert check() == 0 and not restarts(systemd)


def test_tokens_of_a_single_object_are_read_too(check, server, systemd):
    """As other releases have it."""
    server.slots = [[{**slot(1, True), "next_token": {"n_decoded": count}}] for count in (3, 4)]
    assert check() == 0 and not restarts(systemd)


# --- checks that cannot be made, and units that are not to be checked --------------------------------


def test_a_server_that_refuses_our_key_fails_the_check_and_is_not_restarted(check, server, systemd, capsys):
    server.props = 401
    assert check() == 1 and not restarts(systemd)
    assert f"error: the liveness check could not look: {server.url}/props answers 401" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["activating/start-post", "inactive/dead", "failed/failed", "deactivating/stop"])
def test_a_unit_that_does_not_run_is_not_looked_at(check, server, systemd, state):
    systemd.state = state
    assert check() == 0 and server.asked == []


def test_a_server_that_was_replaced_meanwhile_is_not_restarted(check, server, systemd):
    server.props, systemd.pids = None, [7, 8]
    assert check(SHORT) == 0 and not restarts(systemd)


@pytest.mark.parametrize("props", [None, 401], ids=["no answer", "new keys"])
def test_a_deploy_that_is_at_it_is_not_disturbed(check, server, systemd, tmp_path, props):
    server.props = props
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/switch-chat.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check(SHORT) == 0 and not restarts(systemd)


PLANS = {"a list": [1], "no gate": {"schema": 1}, "a gate of text": {"gate": "x"}, "no unit": {"gate": {"url": "http://x"}},
         "a number for a url": {"gate": {"unit": UNIT, "url": 1}}}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_plan_that_is_none_fails_the_check(check, systemd, capsys, plan):
    assert check(plan=plan) == 1 and not restarts(systemd)
    assert "plan.json has no gate with a unit and a url" in capsys.readouterr().err


def test_a_plan_of_a_later_version_fails_the_check_by_its_number(check, server, gate, capsys):
    assert check(plan={"schema": 2, "gate": gate}) == 1 and server.asked == []
    assert "plan.json: it has schema 2" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", None], ids=["empty", "cut off", "missing"])
def test_a_plan_that_cannot_be_read_fails_the_check(tmp_path, capsys, text):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    assert liveness.main([str(path), "5"]) == 1
    assert capsys.readouterr().err.startswith("error: the liveness check could not look: ")


def test_systemd_that_does_not_answer_fails_the_check(check, systemd, monkeypatch, capsys):
    def show(unit):
        raise subprocess.CalledProcessError(1, ["systemctl", "show"])

    monkeypatch.setattr(liveness, "unit_state", show)
    assert check() == 1 and "systemctl" in capsys.readouterr().err


# --- files of ours -----------------------------------------------------------------------------------

NOTES = ["[1]", "{", '{"pid": 7, "slots": [1]}', '{"pid": 7, "slots": {"0": 5}}', '{"pid": 7, "slots": {"0": [1]}}',
         '{"pid": 7, "slots": {"0": [[], {}, "x", null]}}', '{"pid": "7"}']  # fmt: skip


@pytest.mark.parametrize("text", NOTES)
def test_a_note_of_another_form_is_worth_nothing(check, server, systemd, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/liveness-chat.json").write_text(text)
    assert check() == 0 and not restarts(systemd)
    assert json.loads((tmp_path / "run/liveness-chat.json").read_text()) == {"pid": 7, "slots": {"0": [1, False, 0, 0]}}


def full(path, value):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def test_a_note_that_cannot_be_written_fails_nothing(check, server, monkeypatch, capsys):
    monkeypatch.setattr(liveness, "write_json", full)
    assert check() == 0 and "could not be noted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["[1]", '{"restarts": "x"}', '{"restarts": null}', '{"restarts": -3}', '{"restarts": NaN}']
)
def test_a_count_of_another_form_begins_anew(check, server, systemd, tmp_path, text):
    (tmp_path / "gate/liveness").mkdir(parents=True)
    (tmp_path / "gate/liveness/chat.json").write_text(text)
    server.props = None
    assert check(SHORT) == 10 and restarts(systemd)
    assert json.loads((tmp_path / "gate/liveness/chat.json").read_text())["restarts"] == 1


def test_a_count_that_cannot_be_written_keeps_no_server_from_its_restart(check, server, systemd, monkeypatch, capsys):
    monkeypatch.setattr(liveness, "write_json", full)
    server.props = None
    assert check(SHORT) == 10 and restarts(systemd)
    assert "the restart could not be recorded" in capsys.readouterr().err


def test_a_slow_host_is_given_the_time_of_its_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "GATES", str(tmp_path))
    spec = {"unit": UNIT, "batch_tokens": 2048, "context_tokens": 4096, "slots": 2}
    assert liveness.patience(spec, 120.0) == 120.0
    (tmp_path / "chat.json").write_text('{"prompt_tokens_per_s": 16.0}')
    assert liveness.patience(spec, 120.0) == 3 * 2048 / 16.0
    spec["batch_tokens"] = None  # a record of an earlier version: no batch is longer than all slots' context
    assert liveness.patience(spec, 120.0) == 3 * 8192 / 16.0


def test_a_large_picture_is_waited_for_by_what_the_gate_measured_of_a_small_one(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "GATES", str(tmp_path))
    spec = {"unit": UNIT, "batch_tokens": 2048, "picture_ratio": 1300.5}
    (tmp_path / "chat.json").write_text('{"prompt_tokens_per_s": 1000.0}')
    assert liveness.patience(spec, 120.0) == 120.0
    (tmp_path / "chat.json").write_text('{"prompt_tokens_per_s": 1000.0, "picture_seconds": 0.5}')
    assert liveness.patience(spec, 120.0) == 3 * 0.5 * 1300.5
    assert liveness.patience({**spec, "picture_ratio": "much"}, 120.0) == 120.0


@pytest.mark.parametrize("speed", ['"x"', "[16]", "null", "true", "0", "-16", "NaN", "Infinity", "1" + "0" * 400])
def test_a_speed_that_is_none_counts_as_unknown(tmp_path, monkeypatch, speed):
    monkeypatch.setattr(common, "GATES", str(tmp_path))
    (tmp_path / "chat.json").write_text(f'{{"prompt_tokens_per_s": {speed}}}')
    assert liveness.patience({"unit": UNIT, "batch_tokens": 2048}, 120.0) == 120.0


def test_a_record_of_an_earlier_version_is_enough(check, server, systemd, tmp_path, gate):
    for key in ("argv", "health_seconds"):
        del gate[key]
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate/chat.json").write_text('{"prompt_tokens_per_s": 1e9}')
    assert check(plan={"gate": gate}) == 0
    server.props = None
    assert check(SHORT, {"gate": gate}) == 10 and restarts(systemd)


# --- a damaged plan.json ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"gate": 5}',
        b'{"gate": {"unit": "u", "url": "x"}, "schema": {}}',
    ],
    ids=["cut", "empty", "a list", "bytes", "nested", "no gate", "an odd schema"],
)
def test_a_damaged_plan_is_a_failed_check_with_a_line(check, tmp_path, capsys, text):
    (tmp_path / "plan.json").write_bytes(text)
    assert liveness.main([str(tmp_path / "plan.json"), "5"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: the liveness check could not look: ") and "plan.json" in line
    assert line.count("\n") == 1 and len(line) < 500


@pytest.mark.parametrize(
    "change", [{"argv": 5}, {"tls_certificate": 5}, {"api_keys": 5}, {"url": "gopher"}, {"unit": "x" * 10}]
)
def test_values_of_another_kind_end_in_a_line_too(check, gate, server, capsys, change):
    assert check(SHORT, plan={"gate": {**gate, **change}, "batch_tokens": []}) in (0, 1, 10)
    assert "Traceback" not in capsys.readouterr().err


def test_what_systemd_counted_before_a_restart_is_added_up(check, server, systemd, tmp_path, monkeypatch):
    monkeypatch.setattr(liveness, "show", lambda unit, *names, seconds: {"NRestarts": "3"})
    server.props = None
    assert check(SHORT) == 10 == check(SHORT)
    record = json.loads((tmp_path / "gate/liveness/chat.json").read_text())
    assert (record["restarts"], record["by_systemd"]) == (2, 6) and "no sign of life" in record["why"]


def test_a_systemd_that_does_not_say_it_keeps_no_server_from_its_restart(check, server, systemd, tmp_path, monkeypatch):
    def silent(*_, **__):
        raise subprocess.TimeoutExpired("systemctl", 10)

    monkeypatch.setattr(liveness, "show", silent)
    server.props = None
    assert check(SHORT) == 10 and restarts(systemd)
    assert json.loads((tmp_path / "gate/liveness/chat.json").read_text())["by_systemd"] == 0


def ran(monkeypatch, seconds, restarts):
    """What systemd says of a server that it restarted so often, and that has run so long since. The clock of systemd
    begins with the machine: this one has been up for longer, whatever the tests' own has."""
    up_for_a_day = SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() + 86_400})
    said = {"NRestarts": str(restarts), liveness.ENTERED: str(int((up_for_a_day.monotonic() - seconds) * 1e6))}
    monkeypatch.setattr(liveness, "time", up_for_a_day)
    monkeypatch.setattr(liveness, "show", lambda unit, *names, seconds: {name: said[name] for name in names})


def test_a_server_that_has_run_well_since_its_restarts_is_restarted_soon_again(check, systemd, tmp_path, monkeypatch):
    """systemd/systemd#43813: RestartSteps= is never begun anew by itself."""
    (tmp_path / "gate/liveness").mkdir(parents=True)
    (tmp_path / "gate/liveness/chat.json").write_text('{"restarts": 1, "by_systemd": 2, "why": "x", "time": "t"}')
    ran(monkeypatch, liveness.SETTLED_SECONDS + 5, 3)
    assert check() == 0
    assert systemd.calls == [["systemctl", "reset-failed", UNIT]]
    record = json.loads((tmp_path / "gate/liveness/chat.json").read_text())
    assert record == {"restarts": 1, "by_systemd": 5, "why": "x", "time": "t"}


@pytest.mark.parametrize(
    ("seconds", "restarts"), [(liveness.SETTLED_SECONDS - 60, 3), (10_000, 0)], ids=["soon", "never"]
)
def test_a_server_that_started_lately_or_was_never_restarted_is_left_as_it_is(
    check, systemd, monkeypatch, seconds, restarts
):  # fmt: skip
    ran(monkeypatch, seconds, restarts)
    assert check() == 0 and systemd.calls == []


def test_restarts_that_cannot_be_recorded_stay_with_systemd(check, systemd, monkeypatch):
    ran(monkeypatch, 10_000, 3)
    monkeypatch.setattr(liveness, "write_json", full)
    assert check() == 0 and systemd.calls == []


@pytest.mark.parametrize(("slots", "asked"), [([slot(None)], ["chat"]), ([slot(1)], []), ([slot(1, working=True)], [])])
def test_a_server_without_a_cached_token_may_be_measured_under_another_kernel(
    server, check, systemd, slots, asked, monkeypatch
):
    seen = []
    monkeypatch.setattr(liveness.pace, "measure_again", seen.append)
    server.slots = [slots]
    check(SHORT if slots[0]["is_processing"] else 30.0)  # one at work is waited for
    assert seen == asked


class Vectors(LlamaServer):
    """A server of embeddings or scores, which knows no completions."""

    def respond(self, path, body, headers):
        if path in ("/embeddings", "/rerank"):
            return (self.completion, {}) if self.completion else None
        assert path in ("/props", "/slots", "/metrics")
        return super().respond(path, body, headers)


@pytest.mark.parametrize(("serves", "path"), [("embedding", "/embeddings"), ("reranking", "/rerank")])
def test_a_server_of_vectors_is_asked_for_one_although_its_slots_hold_tokens(serves, path):
    """It keeps no prompts that the request could cost."""
    with serving(Vectors()) as server:
        spec = {"url": server.url, "api_keys": None, "may_sleep": False, "serves": serves}
        assert liveness.look(spec, {}, 5.0)[0] is None and server.paths[-1] == path
        server.completion = 500
        assert liveness.look(spec, {}, 5.0)[0] == "no slot works, and it gives no answer"
        server.asked.clear()
        server.waiting = [3]
        assert "requests that wait" in liveness.look(spec, {}, 5.0)[0] and path not in server.paths
        server.slots = [[slot(8, working=True)]]
        assert "stand still" in liveness.look(spec, {}, 5.0)[0] and path not in server.paths


def test_an_input_is_one_batch_so_that_another_task_is_progress():
    """Whenever a busy server is looked at, nothing of its input is read yet."""
    before, now = {"0": [4, True, 0, 0]}, {"0": [5, True, 0, 0]}
    assert not liveness.moved(before, now) and liveness.moved(before, now, in_steps=False)
    assert not liveness.moved(before, before, in_steps=False)


@pytest.mark.parametrize(
    ("told", "serves"), [({}, "chat"), ({"serves": 5}, "chat"), ({"serves": "embedding"}, "embedding")]
)
def test_what_is_served_is_read_from_the_plan(tmp_path, told, serves):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"schema": 1, "gate": {"unit": UNIT, "url": "http://x", **told}}))
    assert liveness.read_spec(str(path))["serves"] == serves
