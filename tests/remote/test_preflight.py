"""The preflight: which directives are dropped, how a unit loses them, and what is tried, with a stand-in for
systemd-run that refuses what the test says."""

import json
import sys

import common
import hardening_trial
import preflight
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafleet.service.trial import told_to_host

NAME = "chat"


# --- the tightest set that works ------------------------------------------------------------------


def failing_with(*needed):
    """A host on which llama-server works where all of these are dropped."""

    def works(dropped):
        missing = sorted(set(needed) - dropped)
        return f"needs {missing[0]}" if missing else None

    return works


def test_where_the_whole_hardening_works_nothing_is_dropped():
    tried = []
    assert preflight.tightest(["a"], ["b"], tried.append) == {}
    assert tried == [frozenset()]


def test_a_moments_trouble_opens_nothing():
    answers = iter(["busy", None, None])  # with all, with none, with all again
    assert preflight.tightest(["a"], [], lambda dropped: next(answers)) == {}


def test_one_that_is_enough_is_dropped_alone_and_says_why():
    assert preflight.tightest(["a", "b", "c"], ["d"], failing_with("b")) == {"b": "needs b"}


def test_several_are_dropped_together_and_no_more():
    found = preflight.tightest(["a", "b", "c"], ["d", "e"], failing_with("a", "c"))
    assert found == {"a": "needs a", "c": "needs c"}


def test_others_are_dropped_only_where_the_suspects_are_not_enough():
    assert preflight.tightest(["a", "b"], ["d", "e"], failing_with("b", "e")) == {"b": "needs b", "e": "needs e"}


def test_what_does_not_work_even_without_hardening_is_unfit():
    with pytest.raises(preflight.Unfit, match="even without hardening: needs z"):
        preflight.tightest(["a"], ["b"], failing_with("z"))


LABELS = ["a", "b", "c", "d", "e", "f"]


@given(st.sets(st.sampled_from(LABELS)), st.integers(0, len(LABELS)))
def test_what_is_left_is_the_tightest(needed, suspects):
    found = preflight.tightest(LABELS[:suspects], LABELS[suspects:], failing_with(*needed))
    assert set(found) == needed


def test_what_keeps_instances_apart_is_never_dropped():
    apart = frozenset(["b", "c"])
    assert preflight.tightest(["a", "b"], ["c"], failing_with("a"), apart) == {"a": "needs a"}
    for needed in (["b"], ["a", "b"]):
        with pytest.raises(
            preflight.Unfit, match=r"on this host with b, which keeps instances .* needs b.*single model"
        ):
            preflight.tightest(["a", "b"], ["c", "d"], failing_with(*needed), apart)
    with pytest.raises(preflight.Unfit, match="even without hardening: needs"):
        preflight.tightest(["a", "b"], ["c"], failing_with("b", "z"), apart)


# --- the unit -------------------------------------------------------------------------------------

UNIT = """\
# Made by llamafleet, plan 0123
[Unit]
Description=MemoryDenyWriteExecute=yes

[Service]
ExecStart="/r/bin/llama-server" \\
    "--port" "8080"
Environment=A=b
MemoryDenyWriteExecute=yes
# a comment
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallFilter=~@resources
SocketBindDeny=any
SocketBindAllow=tcp:8080

[Install]
WantedBy=multi-user.target
"""


def test_directives_are_those_of_the_service():
    found = preflight.service_directives(UNIT)
    assert [one.line for one in found][1:4] == ["Environment=A=b", "MemoryDenyWriteExecute=yes",
                                               "SystemCallFilter=@system-service"]  # fmt: skip
    assert found[0].name == "ExecStart" and found[0].value.split() == ['"/r/bin/llama-server"', '"--port"', '"8080"']
    assert "Description" not in {one.name for one in found} and "WantedBy" not in {one.name for one in found}


def test_a_part_has_its_lines_and_no_other():
    directives = preflight.service_directives(UNIT)
    assert preflight.lines_of("SystemCallFilter=~@resources", directives) == ["SystemCallFilter=~@resources"]
    assert preflight.lines_of("SystemCallFilter", directives) == [
        "SystemCallFilter=@system-service",
        "SystemCallFilter=~@privileged",
    ]
    assert preflight.lines_of("SocketBindDeny", directives) == ["SocketBindDeny=any", "SocketBindAllow=tcp:8080"]
    assert preflight.lines_of("DeviceAllow", directives) == []


@pytest.mark.parametrize(("allowed", "may_go"), [("localhost", True), ("localhost 10.0.0.7 10.1.0.0/16", False)])
def test_clients_that_the_operator_allowed_are_not_dropped(allowed, may_go):
    unit = f"[Service]\nIPAddressDeny=any\nIPAddressAllow={allowed}\nPrivateDevices=yes\n"
    labels = preflight.droppable(preflight.SUSPECTS, preflight.service_directives(unit))
    assert labels == (["IPAddressDeny", "PrivateDevices"] if may_go else ["PrivateDevices"])


def test_dropped_lines_stay_as_comments():
    loosened = common.without_directives(UNIT, ["MemoryDenyWriteExecute=yes"])
    assert loosened.splitlines()[0] == UNIT.splitlines()[0]
    assert "\n# Dropped by the preflight (see plan.json): MemoryDenyWriteExecute=yes\n" in loosened
    assert preflight.service_directives(loosened) == [
        one for one in preflight.service_directives(UNIT) if one.name != "MemoryDenyWriteExecute"
    ]
    assert common.without_directives(UNIT, []) == UNIT


def test_every_directive_of_a_rendered_unit_is_known():
    """A directive that is added to the template must be said to be droppable or not."""
    from tests.service.test_unit import HYBRID, TWO_NODES, made

    kept = {"User", "Group", "Environment", "UnsetEnvironment", "CacheDirectory", "CacheDirectoryMode", "SyslogIdentifier",
            "LogExtraFields", "LogRateLimitIntervalSec", "LogRateLimitBurst", "MemoryMax", "MemorySwapMax", "OOMPolicy", "LimitMEMLOCK", "LimitCORE", "TasksMax",
            "NoNewPrivileges", "CapabilityBoundingSet", "AmbientCapabilities",
            "RestrictSUIDSGID", "SystemCallErrorNumber", "RemoveIPC", "UMask", "ProtectSystem", "ProtectHome",
            "PrivateTmp", "SupplementaryGroups"}  # fmt: skip
    known = kept | set(hardening_trial.NOT_TRIED)
    lines = {name for part in (*preflight.SUSPECTS, *preflight.OTHERS) for name in part.names}
    for gpus in ([], [24564]):
        unit = made(gpus, cpu=HYBRID | TWO_NODES, api_key_file="/keys")[0]
        for one in preflight.service_directives(unit):
            assert one.name in known or one.name in lines or one.line in lines, one.line


# --- a trial --------------------------------------------------------------------------------------

SYSTEMD_RUN = """\
#!{python} -IS
import json, os, sys
properties = [word.split("=", 1)[1] for word in sys.argv if word.startswith("--property=")]
refuses = json.load(open({refuses!r}))
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
for line in properties:
    if line.split("=")[0] in refuses.get("unknown", []):
        sys.exit("Unknown assignment: " + line)
print("Running as unit: x.service", file=sys.stderr)
command = sys.argv[sys.argv.index("--") + 1:]
for line in properties:
    if line in refuses.get("breaks", []):
        print("Main processes terminated with: code=exited/status=1\\nmprotect: permission denied", file=sys.stderr)
        sys.exit(1)
os.execv(command[0], command)
"""

SERVER = """\
#!{python} -IS
import json, sys
how = json.load(open({refuses!r}))
if "--list-devices" in sys.argv:
    print("Available devices:")
    for name in how.get("devices", []):
        print("  " + name + ": a device (1 MiB, 1 MiB free)")
    sys.exit(how.get("list_code", 0))
if "says" in how:
    sys.exit(how["says"])

import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.dumps({{"usage": {{"completion_tokens": how.get("tokens", 4)}}}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
server.handle_request()
"""


class Host:
    """A host whose systemd-run and llama-server do what `how` says."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("bin", "models", "staged"):
            (folder / name).mkdir()
        self.how()
        places = {"python": sys.executable, "refuses": str(folder / "how.json"), "calls": str(folder / "calls")}
        self.program("systemd-run", SYSTEMD_RUN.format(**places))
        self.server = self.program("llama-server", SERVER.format(**places))
        self.program("systemctl", "#!/bin/sh\n[ \"$1\" = --version ] && echo 'systemd 999 (999-1)'\nexit 0\n")

    def program(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def how(self, **how):
        (self.folder / "how.json").write_text(json.dumps(how))

    def stage(self, unit=UNIT, devices="none", alone=True):
        argv = [self.server, "--model", "/m.gguf", "--device", devices, "--cache-type-k", "q8_0", "--port", "8080"]
        (self.folder / f"staged/llama-server-{NAME}.service").write_text(unit)
        (self.folder / "staged/plan.json").write_text(
            json.dumps({"gate": {"argv": argv}, **told_to_host([*argv, "--batch-size", "1", "--ctx-size", "1"], alone)})
        )

    def staged(self):
        unit = (self.folder / f"staged/llama-server-{NAME}.service").read_text()
        return unit, json.loads((self.folder / "staged/plan.json").read_text())["preflight"]

    def calls(self):
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def host(tmp_path, monkeypatch):
    one = Host(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(hardening_trial, "MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(common, "UNITS", str(tmp_path / "units"))
    one.prepare = lambda installed=tmp_path / "none": preflight.prepare(str(tmp_path / "staged"), NAME, str(installed))
    return one


def test_hardening_that_works_is_left_as_it_is(host):
    host.stage()
    host.prepare()
    unit, found = host.staged()
    assert unit == UNIT and found["dropped"] == [] and found["checked"] == ["list-devices", "completion"]
    assert found["rendered_sha256"] == found["unit_sha256"] and found["ground"]["systemd"] == "999 (999-1)"
    listing, serving = host.calls()
    for call in (listing, serving):
        assert {"--property=MemoryDenyWriteExecute=yes", "--property=Environment=A=b"} <= set(call)
        assert not [word for word in call if "ExecStart" in word]
    # The planned port may be the running service's: its directive gets the port that is tried.
    port = serving[serving.index("--port") + 1]
    assert f"--property=SocketBindAllow=tcp:{port}" in serving and port != "8080"
    assert serving[serving.index("--cache-type-k") + 1] == "q8_0"
    assert list((host.folder / "models").iterdir()) == []


def test_the_directive_that_breaks_it_is_dropped_and_told(host, capsys):
    host.stage()
    host.how(breaks=["MemoryDenyWriteExecute=yes"])
    host.prepare()
    unit, found = host.staged()
    assert "\n# Dropped by the preflight (see plan.json): MemoryDenyWriteExecute=yes\n" in unit
    [dropped] = found["dropped"]
    assert dropped["directives"] == ["MemoryDenyWriteExecute=yes"]
    assert "permission denied" in dropped["why"] and "code=exited/status=1" in dropped["why"]
    assert found["unit_sha256"] != found["rendered_sha256"]
    assert "note: hardening without MemoryDenyWriteExecute=yes: --list-devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("breaks", "dropped"),
    [
        ("CPUAffinity=64-70", ["CPUAffinity=64-70"]),  # systemd: 215/CPUAFFINITY, where a host has none of them
        ("NUMAPolicy=interleave", ["NUMAPolicy=interleave", "NUMAMask=0-1"]),  # a container that lets nobody set it
    ],
)
def test_a_placement_that_the_host_refuses_costs_nothing_of_the_hardening(host, breaks, dropped):
    placed = "Environment=A=b\nCPUAffinity=64-70\nNUMAPolicy=interleave\nNUMAMask=0-1\n"
    host.stage(UNIT.replace("Environment=A=b\n", placed))
    host.how(breaks=[breaks])
    host.prepare()
    assert [one["directives"] for one in host.staged()[1]["dropped"]] == [dropped]


def test_where_nothing_helps_the_switch_ends_and_the_staged_unit_stays(host):
    host.stage()
    host.how(says="libcuda.so.1 cannot be loaded: error")
    with pytest.raises(preflight.Unfit, match=r"even without hardening: a tiny model: the server ends: .*libcuda"):
        host.prepare()
    assert (host.folder / f"staged/llama-server-{NAME}.service").read_text() == UNIT
    assert list((host.folder / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"devices": ["CUDA0"]}, "shows no CUDA1, only CUDA0"),
        ({"devices": []}, "shows no CUDA0, CUDA1, only no device"),
        ({"devices": ["CUDA0", "CUDA1"], "list_code": 3}, "exit code 3"),
        ({"devices": ["CUDA0", "CUDA1"], "tokens": 0}, "answers with 0 tokens"),
    ],
)
def test_every_planned_device_must_be_there_and_answer(host, how, says):
    host.stage(devices="CUDA0,CUDA1")
    host.how(**how)
    with pytest.raises(preflight.Unfit, match=says):
        host.prepare()


def test_a_card_that_the_running_service_fills_is_left_to_the_gate(host):
    host.stage(devices="CUDA0")
    host.how(devices=["CUDA0"], says="CUDA error: out of memory")
    host.prepare()
    _, found = host.staged()
    assert found["dropped"] == [] and "no memory beside the running service" in found["checked"][0]


def test_a_directive_that_this_systemd_does_not_know_is_not_tried(host):
    host.stage()
    host.how(unknown=["SocketBindDeny", "SocketBindAllow"])
    host.prepare()
    unit, found = host.staged()
    assert unit == UNIT and found["dropped"] == []
    assert not [word for word in host.calls()[-1] if "SocketBind" in word]


@pytest.mark.parametrize("change", [None, "unit", "ground"])
def test_what_was_found_holds_as_long_as_unit_and_ground_are_the_same(host, change):
    host.stage()
    host.how(breaks=["MemoryDenyWriteExecute=yes"])
    host.prepare()
    unit, found = host.staged()
    if change == "ground":
        found = {**found, "ground": {**found["ground"], "kernel": "0"}}
    installed = host.folder / "installed.json"
    installed.write_text(json.dumps({"preflight": found}))
    before = len(host.calls())
    host.stage(UNIT + ("# new\n" if change == "unit" else ""))
    host.prepare(installed)
    assert (len(host.calls()) == before) is (change is None)
    if change is None:
        assert host.staged() == (unit, found)


APART = UNIT.replace("MemoryDeny", "PrivateUsers=yes\nMemoryDeny")


@pytest.mark.parametrize("installed", [(), (NAME,), ("other",)], ids=["nothing", "itself", "another one"])
@pytest.mark.parametrize("planned_alone", [True, False])
def test_private_users_is_dropped_only_for_a_single_instance(host, installed, planned_alone):
    (host.folder / "units").mkdir()
    for name in installed:
        (host.folder / f"units/llama-server-{name}.service").write_text(f"{common.MADE_BY}\n")
    host.stage(APART, alone=planned_alone)
    host.how(breaks=["PrivateUsers=yes"])
    if planned_alone and "other" not in installed:
        host.prepare()
        assert [one["directives"] for one in host.staged()[1]["dropped"]] == [["PrivateUsers=yes"]]
    else:
        with pytest.raises(preflight.Unfit, match="with PrivateUsers, which keeps instances of one host"):
            host.prepare()
        assert (host.folder / f"staged/llama-server-{NAME}.service").read_text() == APART


def test_what_was_dropped_while_alone_is_tried_again_beside_another_one(host):
    host.stage(APART)
    host.how(breaks=["PrivateUsers=yes"])
    host.prepare()
    installed = host.folder / "installed.json"
    installed.write_text(json.dumps({"preflight": host.staged()[1]}))
    host.how()
    host.stage(APART, alone=False)
    host.prepare(installed)
    assert host.staged()[0] == APART and host.staged()[1]["dropped"] == []


@pytest.mark.parametrize(
    "found", [[1], {"dropped": 5}, {"dropped": [{"directives": "x", "why": ""}]}, {"dropped": [[]]}, "x"]
)
def test_findings_of_another_form_are_worth_nothing(host, found):
    installed = host.folder / "installed.json"
    installed.write_text(json.dumps({"preflight": found}))
    host.stage()
    host.prepare(installed)
    assert host.staged()[0] == UNIT and host.calls()


def test_a_unit_that_is_refreshed_stays_loosened(host):
    host.stage()
    host.how(breaks=["MemoryDenyWriteExecute=yes"])
    host.prepare()
    unit, found = host.staged()
    host.stage(UNIT.replace("[Service]\n", "[Service]\nExecStartPost=new\n"))
    before = len(host.calls())
    preflight.keep(str(host.folder / "staged"), NAME, {"preflight": found}, unit)
    again, kept = host.staged()
    assert len(host.calls()) == before and kept["dropped"] == found["dropped"] and "ExecStartPost=new\n" in again
    assert "(see plan.json): MemoryDenyWriteExecute=yes" in again
    assert kept["unit_sha256"] == common.sha256(again.encode()) and kept["rendered_sha256"] != found["rendered_sha256"]


def test_the_trial_is_the_operator_s_with_model_and_port_filled_in():
    trial = {"serve": ["x", "--weights", "{model}", "{port}", "a{port}"], "devices": []}
    command = hardening_trial.Trial(NAME, trial).command(5)
    assert command == ["x", "--weights", f"{hardening_trial.MODELS}/.preflight-{NAME}/tiny.gguf", "5", "a{port}"]


def test_a_record_without_a_trial_is_refused_before_anything_runs(host):
    host.stage()
    plan = json.loads((host.folder / "staged/plan.json").read_text())
    del plan["trial"]
    (host.folder / "staged/plan.json").write_text(json.dumps(plan))
    with pytest.raises(preflight.Unfit, match="made by another version of llamafleet: deploy again"):
        host.prepare()
    assert host.calls() == []
