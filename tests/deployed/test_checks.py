"""Every check of tests/hosts reports its problem: the facts of a healthy host are changed in one place at a time."""

import copy
import dataclasses
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given

from llamafleet.cli.arguments import default_data
from llamafleet.service import wanted
from llamafleet.settings.schema import Settings
from tests.hosts import checks, facts, instance_checks
from tests.mutations import FUZZ, broken

ROOT = Path(__file__).resolve().parents[2]
COLLECTOR = ROOT / "tests/hosts/collect.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
KEY = "feedfacefeedface"
UNIT = "llama-server-tiny.service"
KEYS = "/etc/llamafleet/instances/tiny/api-keys"
MODEL = "/var/lib/llamafleet/models/tiny-0123/tiny.gguf"
OF_CHAT = tuple(name for name in instance_checks.GATE_CHECKS if name not in ("embedding", "scores"))


def settings(**model):
    spec = importlib.util.spec_from_file_location("all", ROOT / "inventory/group_data/all.py")
    defaults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(defaults)
    data = {name: value for name, value in vars(defaults).items() if not name.startswith("__")}
    entry = {
        "name": "tiny",
        "source": "hf:a/b/tiny.gguf",
        "port": 8080,
        "api_key_file": "keys",
        "context_tokens": 4096,
        "slots": 1,
        "projector": "hf:a/b/mmproj.gguf",
        "speculation": "ngram",
        "adapters": [{"source": "hf:a/b/l.gguf", "scale": 0.5}],
        "grammar_file": "/g",
        **model,
    }
    return Settings.from_data({**data, "llama_cpp_ref": "b11434", "models": [entry]})


def plan():
    record = {
        "schema": 1,
        "name": "tiny",
        "source": "hf:a/b/tiny.gguf",
        "release": KEY,
        "commit": COMMIT,
        "backend": "cuda",
        "files": [{"path": MODEL, "size_bytes": 100, "sha256": "aa"}],
        "gate": {
            "unit": UNIT,
            "argv": ["llama-server"],
            "url": "http://127.0.0.1:8080",
            "health_seconds": 60,
            "api_keys": "/etc/llamafleet/instances/tiny/api-keys",
            "context_tokens": 4096,
            "slots": 1,
            "backend": "cuda",
            "gpus": [{"uuid": "GPU-1", "name": "A", "planned_bytes": 5}],
            "modalities": ["vision"],
            "speculation": {"kind": "ngram", "most": 64, "least": 48, "kv_type": None},
            "prompt_files": {"grammar": {"sha256": "a", "served_sha256": "a"}},
            "adapters": [{"path": "/m/a.gguf", "scale": 0.5}],
        },
    }
    return {**record, "identity": instance_checks.identity_of(record), "plan": {"why": []}}


def healthy():
    def stat(mode="0755"):
        return {"owner": "root", "uid": 0, "gid": 0, "mode": mode, "size_bytes": 100, "mtime_ns": 1, "ctime_ns": 1}

    record = {
        "key": KEY,
        "ref": "b11434",
        "commit": COMMIT,
        "files": {"llama-server": "11", "libggml.so": "22"},
    }
    verdicts = [{"name": name, "ok": True, "expected": "e", "found": "e", "hint": ""} for name in OF_CHAT]
    paths = {place.path: {"kind": place.kind, "mode": place.mode, "uid": 0, "gid": 0} for place in wanted.folders()}
    return {
        "euid": 0,
        "release": {
            "target": f"releases/{KEY}",
            "record": record,
            "files": dict(record["files"]),
            "version": "version: 0.6.0 (build 11434, commit 0123456)\nbuilt with GNU 14",
        },
        "paths": {**paths, KEYS: {"kind": "file", "mode": 0o600, "uid": 0, "gid": 0}},
        "helpers": {"key": "h1", "damaged": []},
        "staged": [],
        "run": ["lock.json"],
        "units": [UNIT],
        "instances": {
            "tiny": {
                "plan": plan(),
                "kept_plan": plan(),
                "plan_sha256": "p",
                "plan_file": stat("0644"),
                "good": {"unit_sha256": "u", "plan_sha256": "p", "secrets_as_kept": True},
                "drop_ins": [],
                "unit": {**stat("0644"), "sha256": "u", "identity": plan()["identity"]},
                "state": {
                    "LoadState": "loaded",
                    "ActiveState": "active",
                    "SubState": "running",
                    "UnitFileState": "enabled",
                    "MainPID": "7",
                    "NRestarts": "0",
                    "DropInPaths": "",
                    "NeedDaemonReload": "no",
                    "FragmentPath": f"/etc/systemd/system/{UNIT}",
                },
                "process": {
                    "pid": 7,
                    "exe": f"/opt/llamafleet/releases/{KEY}/bin/llama-server",
                    "users": ["llamafleet"],
                    "age_seconds": 50.0,
                    "deleted": [],
                    "inherited": [],
                    "NoNewPrivs": 1,
                    "Seccomp": 2,
                    "CapInh": 0,
                    "CapPrm": 0,
                    "CapEff": 0,
                    "CapBnd": 0,
                    "CapAmb": 0,
                    "CoreLimit": "0 0",
                },
                "allowed_origin": "none",
                "listening": [["127.0.0.1", 8080]],
                "keys": {**stat("0600"), "count": 2},
                "models": {MODEL: {**stat("0644"), "sha256": "aa", "noted_sha256": "aa"}},
                "liveness": {
                    "active": "active",
                    "enabled": "enabled",
                    "drop_ins": [],
                    "units": ["s", "t"],
                    "as_kept": True,
                },
                "demand": {"active": "inactive", "enabled": "", "drop_ins": [], "units": [], "as_kept": True},
                "gate": {"ok": True, "checks": verdicts},
            }
        },
    }


def no_repository(repository, ref):
    raise AssertionError("a repository is asked only if the ref is neither the built ref nor the built commit")


def problems_by_check(facts, requested=None, resolve=no_repository):
    """The problems of each check, as texts."""
    box = checks.Box("web1", requested or settings(), facts)
    served = checks.served(box, box.settings.models[0])
    by_check = {"release": checks.release(box, resolve)}
    by_check |= {check.__name__: check(box) for check in checks.HOST_CHECKS}
    by_check |= {check.__name__: check(served) for check in instance_checks.INSTANCE_CHECKS}
    gate_checks = instance_checks.planned_gate_checks(served)
    by_check |= {f"gate {name}": instance_checks.gate(served, name) for name in gate_checks}
    return {name: [str(problem) for problem in problems] for name, problems in by_check.items()}


def test_a_healthy_host_has_no_problem():
    assert not [text for texts in problems_by_check(healthy()).values() for text in texts]


def test_a_host_that_serves_nothing_needs_no_release():
    """It is a gateway, or watches the others."""
    box = checks.Box("gw1", Settings.from_data({**default_data(), "models": []}), {**healthy(), "release": None})
    assert [*checks.release(box, no_repository), *checks.version(box)] == []


def test_every_function_of_the_tests_is_covered_here():
    """Every check that test_deployed.py calls has a case below in which it reports a problem."""
    text = (ROOT / "tests/hosts/test_deployed.py").read_text()
    used = set(re.findall(r"fail_on\((?:instance_)?checks\.(\w+)\(", text))
    assert used == {check for check, *_ in BROKEN} | {"gate"}


STAGED, CONF = "/var/lib/llamafleet/staged", "/etc/llamafleet"
# The check that must report a problem, the place of the changed fact, its new value, and a part of the message.
TINY = ("instances", "tiny")
ZEROS = "0" * 16
BROKEN = [
    ("release", ("release",), None, "expected a link to a release, found nothing"),
    ("release", ("release", "target"), "elsewhere", "expected a link to releases/KEY, found elsewhere"),
    ("release", ("release", "record"), None, "expected the record of a whole build, found nothing"),
    ("release", ("release", "record", "key"), ZEROS, f"expected releases/{KEY}, found {ZEROS}"),
    ("release", ("release", "files", "libggml.so"), "33", "libggml.so: expected sha256 22, found sha256 33"),
    ("release", ("release", "files"), {"llama-server": "11"}, "expected sha256 22, found nothing"),
    ("release", ("release", "files", "evil.so"), "44", "evil.so: expected nothing, found sha256 44"),
    ("version", ("release", "version"), "commit fedcba9)", "commit 0123456, found commit fedcba9)"),
    ("version", ("release", "version"), "", "expected commit 0123456, found nothing"),
    ("folders", ("paths", f"{CONF}/instances", "mode"), 0o777, "mode 0755, found it has mode 0777 instead of 0755"),
    ("folders", ("paths", CONF, "uid"), 12, "expected root's folder with mode 0755, found it belongs to 12:0 instead of root"),
    ("folders", ("paths", "/opt/llamafleet"), None, "found it is missing (changed by hand? deploy again)"),
    ("folders", ("paths", KEYS, "kind"), "link", "found it is a link instead of a file"),
    ("folders", ("paths", STAGED, "mode"), 0o755, "mode 0700, found it has mode 0755 instead of 0700"),
    ("helpers", ("helpers", "key"), None, "expected a link to the helpers, found nothing"),
    ("helpers", ("helpers", "damaged"), ["gate.py"], "helpers/h1: expected helpers as they were installed, found others: gate.py"),
    ("leftovers", ("run",), ["hub-token.curl"], "expected no Hub token, found ['hub-token.curl']"),
    ("leftovers", ("staged",), ["tiny"], "expected an empty folder, found ['tiny']"),
    ("undeclared", ("units",), [UNIT, "llama-server-old.service"], "found llama-server-old.service"),
    ("plan_file", (*TINY, "plan"), None, "was deployed, found no JSON object"),
    ("plan_file", (*TINY, "plan_file", "mode"), "0666", "expected root 0644, found root 0666"),
    ("plan_file", (*TINY, "plan", "commit"), "x", "changed by hand? deploy again"),
    ("plan_file", (*TINY, "plan_sha256"), "q", "sha256 p, found sha256 q"),
    ("plan_file", (*TINY, "plan", "release"), ZEROS, f"the host's current release, {KEY}, found {ZEROS}"),
    ("plan_file", (*TINY, "plan", "source"), "hf:a/b/c.gguf", "hf:a/b/tiny.gguf, found hf:a/b/c.gguf"),
    ("plan_file", (*TINY, "plan", "gate", "url"), "http://127.0.0.1:9", "expected 8080, found 9"),
    ("plan_file", (*TINY, "plan", "gate", "slots"), 4, "expected 1, found 4"),
    ("plan_file", (*TINY, "plan", "gate", "api_keys"), None, "expected True, found False"),
    ("plan_file", (*TINY, "plan", "gate", "adapters"), [{"path": "/x", "scale": 1}], "scales of adapters in plan.json: expected [0.5], found [1]"),
    ("plan_file", (*TINY, "plan", "gate", "prompt_files"), {}, "prompt files in plan.json: expected ['grammar'], found nothing"),
    ("plan_file", (*TINY, "plan", "gate", "modalities"), [], "a projector in plan.json: expected True, found False"),
    ("plan_file", (*TINY, "plan", "gate", "speculation"), None, "speculation in plan.json: expected ngram, found none"),
    ("plan_file", (*TINY, "plan", "gate", "context_tokens"), 2048, "at least 4096 tokens a slot, found 2048"),
    ("models", (*TINY, "plan", "files"), [], "expected at least one, found nothing"),
    ("models", (*TINY, "models", MODEL), None, "expected a model of 100 bytes, found nothing"),
    ("models", (*TINY, "models", MODEL, "size_bytes"), 99, "expected 100 bytes, found 99 bytes"),
    ("models", (*TINY, "models", MODEL, "sha256"), "bb", f"aa, found bb (damaged: remove {MODEL}.verified and deploy again"),
    ("models", (*TINY, "models", MODEL, "noted_sha256"), None, "the note of its checksum, found missing, damaged, or older"),
    ("models", (*TINY, "models", MODEL, "owner"), "joe", "found joe 0644"),
    ("models", (*TINY, "models", MODEL, "mode"), "0664", "found root 0664"),
    ("models", (*TINY, "models", MODEL, "mode"), "0646", "found root 0646"),
    ("unit", (*TINY, "unit"), None, "expected the unit, found nothing"),
    ("unit", (*TINY, "unit", "owner"), "joe", "expected root, group 0, 0644, found joe, group 0, 0644"),
    ("unit", (*TINY, "unit", "gid"), 5, "found root, group 5, 0644"),
    ("unit", (*TINY, "unit", "mode"), "0664", "found root, group 0, 0664"),
    ("unit", (*TINY, "unit", "identity"), None, "found nothing"),
    ("unit", (*TINY, "unit", "identity"), ZEROS, f"found {ZEROS}"),
    ("unit", (*TINY, "unit", "sha256"), "v", "sha256 u, found sha256 v"),
    ("unit", (*TINY, "state", "DropInPaths"), "/etc/x.conf", "expected nothing, found /etc/x.conf"),
    ("unit", (*TINY, "drop_ins"), ["/etc/x.conf"], "expected nothing, found /etc/x.conf"),
    ("unit", (*TINY, "good", "secrets_as_kept"), False, "expected as they passed the gate, found others"),
    ("unit", (*TINY, "state", "FragmentPath"), "/run/x", f"/etc/systemd/system/{UNIT}, found /run/x"),
    ("unit", (*TINY, "state", "NeedDaemonReload"), "yes", "expected no, found yes"),
    ("running", (*TINY, "state", "ActiveState"), "failed", "expected active, found failed"),
    ("running", (*TINY, "state", "SubState"), "auto-restart", "expected running, found auto-restart"),
    ("running", (*TINY, "state", "UnitFileState"), "disabled", "expected enabled, found disabled"),
    ("running", (*TINY, "state", "NRestarts"), "3", "found 3, the last 50.0 s ago"),
    ("process", (*TINY, "process"), None, "expected a running llama-server, found nothing"),
    ("process", (*TINY, "process", "exe"), "/usr/bin/llama-server", "found /usr/bin/llama-server"),
    ("process", (*TINY, "process", "deleted"), ["/opt/l.so"], "expected nothing, found /opt/l.so"),
    ("process", (*TINY, "process", "inherited"), ["LLAMA_ARG_HOST"], "expected nothing, found LLAMA_ARG_HOST"),
    ("process", (*TINY, "process", "users"), ["root"], "expected llamafleet, found root"),
    ("hardening", (*TINY, "process"), None, "expected a running llama-server, found nothing"),
    ("hardening", (*TINY, "process", "NoNewPrivs"), 0, "expected 1, found 0"),
    ("hardening", (*TINY, "process", "Seccomp"), 0, "expected 2, found 0"),
    ("hardening", (*TINY, "process", "CapEff"), 2**21, "CapEff in /proc/7/status: expected 0, found 0x200000"),
    ("hardening", (*TINY, "process", "CoreLimit"), "0 unlimited", "CoreLimit in /proc/7/limits: expected 0 0"),
    ("origins", (*TINY, "allowed_origin"), "http://other.example", "expected none, found http://other.example"),
    ("origins", (*TINY, "allowed_origin"), None, "expected none, found nothing"),
    ("hardening", (*TINY, "process", "CapBnd"), 1, "CapBnd in /proc/7/status: expected 0, found 0x1"),
    ("listening", (*TINY, "listening"), [], "expected 127.0.0.1:8080, found nothing"),
    ("listening", (*TINY, "listening"), [["0.0.0.0", 8080]], "127.0.0.1:8080, found 0.0.0.0:8080"),
    ("listening", (*TINY, "listening"), [["127.0.0.1", 80]], "127.0.0.1:8080, found 127.0.0.1:80"),
    ("listening", (*TINY, "listening"), [["127.0.0.1", 8080], ["0.0.0.0", 9]], ":8080, 0.0.0.0:9"),
    ("keys", (*TINY, "keys"), None, "expected API keys, found nothing"),
    ("keys", (*TINY, "keys", "mode"), "0644", "expected root 0600, found root 0644"),
    ("keys", (*TINY, "keys", "owner"), "joe", "expected root 0600, found joe 0600"),
    ("keys", (*TINY, "keys", "count"), 0, "expected at least one key, found an empty file"),
    ("liveness", (*TINY, "liveness", "units"), [], "expected service and timer, found nothing"),
    ("liveness", (*TINY, "liveness", "as_kept"), False, "expected the units that last passed the gate, found other texts"),
    ("liveness", (*TINY, "liveness", "active"), "inactive", "expected an active timer, found inactive"),
    ("liveness", (*TINY, "liveness", "enabled"), "disabled", "expected an enabled timer, found disabled"),
    ("liveness", (*TINY, "liveness", "drop_ins"), ["/x.conf"], "expected no drop-ins, found /x.conf"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "place", "value", "message"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_changed_fact_is_a_problem(check, place, value, message):
    facts = healthy()
    part = facts
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    found = problems_by_check(facts)[check]
    assert any(message in text and text.startswith("web1") for text in found), found


@pytest.mark.parametrize("name", OF_CHAT)
def test_each_verdict_of_the_gate_counts(name):
    facts = healthy()
    verdicts = facts["instances"]["tiny"]["gate"]["checks"]
    at = OF_CHAT.index(name)
    verdicts[at] = {"name": name, "ok": False, "expected": "this", "found": "that", "hint": "look there"}
    del verdicts[at + 1 :]
    found = problems_by_check(facts)
    assert found[f"gate {name}"] == [f"web1/tiny: gate: {name}: expected this, found that (look there)"]
    # A check that the gate did not reach has not passed.
    for later in OF_CHAT[at + 1 :]:
        assert f"the gate stopped at {name}" in found[f"gate {later}"][0]


def test_without_its_keys_the_gate_is_not_asked_and_says_so():
    facts = healthy()
    facts["instances"]["tiny"].update(keys=None, gate={"error": "Traceback (most recent call last): ..."})
    found = [problems_by_check(facts)[f"gate {name}"][0] for name in OF_CHAT]
    assert all(text.endswith("expected a result, found no API keys to ask with (deploy again)") for text in found)


def test_a_damaged_plan_hides_nothing_else():
    """What passed the gate says which model there should be."""
    facts = healthy()
    facts["instances"]["tiny"]["plan"] = None
    facts["instances"]["tiny"]["models"][MODEL]["sha256"] = "bb"
    found = problems_by_check(facts)
    assert "expected sha256 aa, found bb" in found["models"][0] and "found no JSON object" in found["plan_file"][0]
    facts["instances"]["tiny"]["kept_plan"] = None
    assert "expected at least one" in problems_by_check(facts)["models"][0]


def test_a_gate_that_cannot_be_asked_is_no_success():
    facts = healthy()
    facts["instances"]["tiny"]["gate"] = {"error": "gate.py ended with exit code 3"}
    assert all("exit code 3" in problems_by_check(facts)[f"gate {name}"][0] for name in OF_CHAT)


def served_with(gate):
    facts = healthy()
    facts["instances"]["tiny"]["gate"] = gate
    box = checks.Box("web1", settings(), facts)
    return checks.served(box, box.settings.models[0])


def test_a_gate_that_stopped_is_reported_once_where_it_stopped():
    good = [{"name": "health", "ok": True}, {"name": "process", "ok": False}]
    served = served_with({"ok": False, "checks": [{**one, "expected": 1, "found": 2, "hint": ""} for one in good]})
    planned = instance_checks.planned_gate_checks(served)
    assert [instance_checks.reported_at(served, name) for name in planned] == [
        None,
        None,
        *["process"] * (len(planned) - 2),
    ]


@pytest.mark.parametrize("gate", [{"error": "gate.py ended with exit code 3: KeyError: 'x'"}, [], None])
def test_a_gate_without_a_result_is_reported_once(gate):
    served = served_with(gate)
    first, *others = instance_checks.planned_gate_checks(served)
    assert instance_checks.reported_at(served, first) is None and list(instance_checks.gate(served, first))
    assert {instance_checks.reported_at(served, name) for name in others} == {first}


def test_of_a_traceback_the_collector_keeps_the_last_line(collector, monkeypatch, tmp_path):
    monkeypatch.setattr(collector, "OPT", str(tmp_path))
    program = tmp_path / "helpers/current/gate.py"
    program.parent.mkdir(parents=True)
    program.write_text("open('/nowhere/api-keys')")
    answer = collector.gate("/plan.json", {"url": "x"})
    assert answer == {
        "error": "gate.py ended with exit code 1: FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/api-keys'"
    }


def test_the_gate_asks_what_the_plan_has():
    facts = healthy()
    facts["instances"]["tiny"]["plan"]["gate"].update(
        gpus=[], modalities=[], prompt_files={}, adapters=[], speculation=None
    )
    box = checks.Box("web1", settings(api_key_file=None), facts)
    served = checks.served(box, box.settings.models[0])
    assert instance_checks.planned_gate_checks(served) == ("health", "process", "context", "completion", "speed")


@pytest.mark.parametrize(("serves", "name"), [("embedding", "embedding"), ("reranking", "scores")])
def test_the_gate_asks_for_what_the_server_serves(serves, name):
    facts = healthy()
    facts["instances"]["tiny"]["plan"]["gate"] |= {
        "serves": serves, "gpus": [], "modalities": [], "prompt_files": {}, "adapters": [], "speculation": None,
    }  # fmt: skip
    box = checks.Box("web1", settings(serves=serves, projector=None, grammar_file=None, speculation="none"), facts)
    served = checks.served(box, box.settings.models[0])
    assert instance_checks.planned_gate_checks(served) == ("health", "process", "api key", "context", name, "speed")


def test_a_key_file_that_nobody_asked_for_is_found():
    found = problems_by_check(healthy(), settings(api_key_file=None))["keys"]
    assert "expected no file, because api_key_file is not set, found a file with 2 keys" in found[0]


def test_another_version_is_found():
    """The repository says which commit the requested tag is; the build has another commit."""
    facts = healthy()
    facts["release"]["record"]["ref"] = "master"
    found = problems_by_check(facts, resolve=lambda repository, ref: "f" * 40)["release"]
    assert f"expected b11434 (commit {'f' * 40}), found master (commit {COMMIT})" in found[0]


def test_two_names_of_one_commit_are_the_same_version():
    """A build key depends on the commit, not on the ref's name."""
    facts = healthy()
    facts["release"]["record"]["ref"] = "master"
    assert not problems_by_check(facts, resolve=lambda repository, ref: COMMIT)["release"]


def test_an_old_crash_is_no_loop():
    facts = healthy()
    facts["instances"]["tiny"]["state"]["NRestarts"] = "1"
    facts["instances"]["tiny"]["process"]["age_seconds"] = 86400.0
    assert not problems_by_check(facts)["running"]


@pytest.mark.parametrize(("noted", "good"), [("aa", True), ("bb", False), (None, False)])
def test_quick_trusts_the_note_of_an_unchanged_file(noted, good):
    facts = healthy()
    facts["instances"]["tiny"]["models"][MODEL].update(sha256=None, noted_sha256=noted)
    assert (not problems_by_check(facts)["models"]) == good


def test_a_model_without_a_known_checksum_is_compared_with_the_note():
    facts = healthy()
    facts["instances"]["tiny"]["plan"]["files"][0]["sha256"] = None
    assert not problems_by_check(facts)["models"]
    facts["instances"]["tiny"]["models"][MODEL]["noted_sha256"] = "bb"
    assert "expected sha256 bb, found aa" in problems_by_check(facts)["models"][0]


@pytest.mark.parametrize("listen", ["::1", "0:0:0:0:0:0:0:1"])
def test_addresses_are_compared_not_texts(listen):
    facts = healthy()
    facts["instances"]["tiny"]["listening"] = [["::1", 8080]]
    assert not problems_by_check(facts, settings(listen=listen))["listening"]


# --- a server that starts on demand ---------------------------------------------------------------

OPEN = {"active": "active", "enabled": "enabled", "drop_ins": [], "units": ["s", "c"], "as_kept": True}


def on_demand(**changes):
    """A host whose server nobody uses now; `changes` are of its facts."""
    known = healthy()
    tiny = known["instances"]["tiny"]
    tiny["state"].update(ActiveState="inactive", SubState="dead", UnitFileState="static")
    tiny["liveness"]["active"] = "inactive"
    tiny.update(demand=OPEN, process=None, gate=None, allowed_origin=None)
    tiny.update(changes)
    return known


def found_of(known):
    box = checks.Box("web1", settings(start="demand"), known)
    served = checks.served(box, box.settings.models[0])
    every = (instance_checks.running, instance_checks.process, instance_checks.hardening, instance_checks.origins,
             instance_checks.listening, instance_checks.liveness)  # fmt: skip
    return [str(problem) for check in every for problem in check(served)]


def test_a_server_that_nobody_uses_has_no_problem():
    assert found_of(on_demand()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demand": {**OPEN, "active": "inactive"}}, "a socket that is active and enabled, found one that is inactive"),
        ({"demand": {**OPEN, "enabled": "disabled"}}, "found one that is active and disabled"),
        ({"demand": {**OPEN, "as_kept": False}}, "the units that last passed the gate, found other texts"),
        ({"demand": {**OPEN, "units": ["s"]}}, "expected socket and service"),
        ({"demand": {**OPEN, "drop_ins": ["/x.conf"]}}, "expected no drop-ins, found /x.conf"),
        ({"listening": []}, "listens on"),
    ],
)
def test_what_is_wrong_with_it_is_named(changes, message):
    assert any(message in text for text in found_of(on_demand(**changes)))


def test_one_that_runs_or_has_failed_is_looked_at():
    known = on_demand()
    known["instances"]["tiny"]["state"]["ActiveState"] = "failed"
    assert any("expected active, found failed" in text for text in found_of(known))


# --- answers and records that are no good -------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([1], "expected a readable record, found : should be an object"),
        ({"gate": 5}, "expected a readable record, found gate: should be an object, is 5 (deploy again)"),
        ({**plan(), "schema": 2}, "expected a readable record, found schema: should be 1, is 2 (deploy again)"),
        ({**plan(), "files": [5]}, "found files[0]: should be an object, is 5"),
        ({**plan(), "release": "\x1b[2J", "commit": 5, "source": 5}, "found source: should be text, is 5"),
    ],
    ids=["list", "gate", "later", "files", "source"],
)
def test_a_damaged_plan_json_is_named_and_no_check_raises(plan, message):
    known = healthy()
    known["instances"]["tiny"].update(plan=plan if isinstance(plan, dict) else None, kept_plan=None)
    found = problems_by_check(known)
    if isinstance(plan, dict):
        assert any(message in text for text in found["plan_file"]), found["plan_file"]
        assert all(
            text.startswith("web1/tiny: /etc/llamafleet/instances/tiny/plan.json: ") for text in found["plan_file"]
        )
    assert found["plan_file"] and found["models"] and found["process"]
    assert not found["listening"] and not found["keys"]


@pytest.mark.parametrize("record", [{}, {"key": KEY, "ref": "b1", "commit": "c", "files": [1]}, {"key": 5}])
def test_a_damaged_release_json_is_named(record):
    known = healthy()
    known["release"]["record"] = record
    found = problems_by_check(known)
    assert "releases/feedfacefeedface/release.json: expected a readable record" in found["release"][0]


@pytest.mark.parametrize("answer", [5, [], {}, {"checks": 5}, {"checks": [{"name": "health"}]}])
def test_an_unusable_result_of_the_gate_is_named(answer):
    known = healthy()
    known["instances"]["tiny"]["gate"] = answer
    assert "web1/tiny: gate: health: expected a result, found " in problems_by_check(known)["gate health"][0]


def test_texts_of_a_host_are_printed_clean():
    known = healthy()
    known["instances"]["tiny"]["process"]["exe"] = "/tmp/\x1b[2J\u202e"
    [text] = problems_by_check(known)["process"]
    assert text.endswith(r"found /tmp/\x1b[2J\u202e")


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        ("", "collect.py on the host: answer: is no JSON"),
        ("Welcome!\nTraceback", "answer: is no JSON"),
        ("[1]", "answer: should be an object, is [1]"),
        (json.dumps({**healthy(), "euid": "0"}), "answer.euid: should be a whole number, is '0'"),
        (json.dumps({**healthy(), "instances": {}}), "answer.instances: tiny is missing"),
    ],
)
def test_an_unusable_answer_is_refused_in_one_line(printed, message):
    with pytest.raises(facts.FactsError) as error:
        facts.read(printed, ["tiny"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_banner_may_stand_before_the_answer():
    assert facts.read(f"Welcome!\n{json.dumps(healthy())}\n", ["tiny"]) == healthy()


@FUZZ
@given(broken(healthy()))
def test_a_broken_answer_is_refused_or_every_check_says_what_it_finds(data):
    try:
        found = facts.read(json.dumps(data), ["tiny"])
    except (ValueError, RecursionError):  # no JSON can be made of it
        return
    except facts.FactsError as error:
        assert len(str(error)) < 500
        return
    for texts in problems_by_check(found, resolve=lambda repository, ref: COMMIT).values():
        assert all(one.isprintable() or one == "\n" for text in texts for one in text)


# --- the collector ---------------------------------------------------------------------------


@pytest.fixture
def collector():
    spec = importlib.util.spec_from_file_location("collect", COLLECTOR)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape(value, depth=0):
    """Names of the facts, without the levels whose names are data."""
    if not isinstance(value, dict):
        return None
    return {name: shape(part, depth + 1) if depth < 1 else None for name, part in value.items()}


def test_it_runs_as_it_is_sent_and_knows_a_bare_host():
    """On a host without llamafleet every check reports a problem, and no check raises."""
    request = json.dumps({"instances": ["tiny"], "quick": True})
    done = subprocess.run(
        [sys.executable, "-I", "-c", COLLECTOR.read_text(), request],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    facts = json.loads(done.stdout)
    whole = healthy()
    assert set(facts) == set(whole)
    assert set(facts["instances"]["tiny"]) == set(whole["instances"]["tiny"])
    if Path("/opt/llamafleet").exists():
        pytest.skip("llamafleet is deployed on this machine: it is not bare")
    found = problems_by_check(facts)
    silent = {name for name, texts in found.items() if not texts}
    assert silent <= {"leftovers", "undeclared"}


def test_it_sees_a_process_and_where_it_listens(collector):
    six = ("::1", socket.AF_INET6) if socket.has_dualstack_ipv6() else ("127.0.0.1", socket.AF_INET)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server((six[0], 0), family=six[1]) as other,
    ):
        expected = sorted(list(listener.getsockname()[:2]) for listener in (server, other))
        assert [address for address in collector.listening(os.getpid()) if address in expected] == expected
    found = collector.process(os.getpid())
    assert found["exe"] == os.path.realpath(sys.executable)
    assert found["users"] == [collector.user_name(os.getuid())]
    assert {"NoNewPrivs", "Seccomp", "CapEff", "CapBnd"} <= set(found)
    assert 0 <= found["age_seconds"] < 86400


def test_a_process_that_is_gone_is_nothing(collector):
    assert collector.process(0) is None
    assert collector.listening(0) == []


ACTIVE, STOPPING, INACTIVE = ({"ActiveState": state, "MainPID": pid}
                              for state, pid in (("active", "7"), ("deactivating", "7"), ("inactive", "0")))  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "read"),
    [
        ([ACTIVE, ACTIVE], ACTIVE),
        ([ACTIVE, INACTIVE, INACTIVE, INACTIVE, INACTIVE], INACTIVE),
        ([STOPPING, STOPPING, STOPPING, INACTIVE, INACTIVE, INACTIVE], INACTIVE),
    ],
)
def test_a_server_that_stops_while_it_is_read_is_read_again(collector, monkeypatch, shown, read):
    """On demand: its facts would be of a server that is gone, and the checks would call that a fault."""
    states = iter(shown)
    monkeypatch.setattr(collector, "show", lambda unit: next(states))
    monkeypatch.setattr(
        collector, "look", lambda *_: {"plan": {"gate": {"socket": "/run/s"}}, "state": collector.show("")}
    )
    assert collector.instance("tiny", True)["state"] == read
    assert list(states) == []


def test_any_other_server_is_read_once(collector, monkeypatch):
    monkeypatch.setattr(collector, "look", lambda *_: {"plan": {"gate": {}}, "state": ACTIVE})
    monkeypatch.setattr(collector, "show", lambda unit: pytest.fail("read again"))
    assert collector.instance("tiny", True)["state"] == ACTIVE


def test_keys_are_counted_and_never_shown(collector, tmp_path):
    path = tmp_path / "api-keys"
    path.write_text("topsecret\n\nsecond\n")
    path.chmod(0o600)
    found = collector.keys(str(path))
    assert (found["count"], found["mode"]) == (2, "0600")
    assert "topsecret" not in json.dumps(found)


def test_a_note_counts_only_for_an_unchanged_file(collector, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    note = {"size_bytes": 4, "mtime_ns": path.stat().st_mtime_ns, "sha256": "noted"}
    (tmp_path / "tiny.gguf.verified").write_text(json.dumps(note))
    found = collector.model(str(path), True)
    assert (found["sha256"], found["noted_sha256"], found["size_bytes"]) == (None, "noted", 4)
    os.utime(path, ns=(1, 1))
    assert collector.model(str(path), True)["noted_sha256"] is None


def test_a_model_is_read_unless_quick(collector, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"abc")
    # sha256 of "abc": FIPS 180-2, appendix B.1.
    assert collector.model(str(path), False)["sha256"].startswith("ba7816bf8f01cfea")


def test_a_release_is_read_as_it_lies_there(collector, tmp_path, monkeypatch):
    monkeypatch.setattr(collector, "OPT", str(tmp_path))
    monkeypatch.setattr(collector, "AS_NOBODY", ())  # who may not enter this folder
    folder = tmp_path / "releases" / KEY
    (folder / "bin").mkdir(parents=True)
    server = folder / "bin/llama-server"
    server.write_text("#!/bin/sh\necho 'version: 1 (0123456)'\n")
    server.chmod(0o755)
    (folder / "release.json").write_text(json.dumps({"key": KEY}))
    (tmp_path / "current").symlink_to(f"releases/{KEY}")
    found = collector.release()
    assert (found["target"], found["record"], found["version"]) == (
        f"releases/{KEY}", {"key": KEY}, "version: 1 (0123456)"
    )  # fmt: skip
    assert found["files"] == {"llama-server": collector.sha256_of(str(server))}


@pytest.mark.parametrize(
    "record",
    [{"files": 5, "gate": 5}, {"files": [5, {}, {"path": 5}, {"path": "a\0b"}], "gate": {"url": 5, "health_seconds": "x"}},
     {"gate": {"url": "http://127.0.0.1:1\x00"}}, [1]],
    ids=["numbers", "nested", "address", "list"],
)  # fmt: skip
def test_a_damaged_plan_json_does_not_end_the_collector(collector, tmp_path, monkeypatch, record):
    monkeypatch.setattr(collector, "ETC", str(tmp_path))
    (tmp_path / "instances/tiny").mkdir(parents=True)
    (tmp_path / "instances/tiny/plan.json").write_text(json.dumps(record))
    found = json.loads(json.dumps(collector.instance("tiny", True)))
    assert found["plan"] == (record if isinstance(record, dict) else None) and found["models"] == {}


def test_healthy_facts_are_not_shared():
    """`healthy` returns new facts each time: the cases above change them."""
    first = healthy()
    second = copy.deepcopy(first)
    first["instances"]["tiny"]["plan"]["gate"]["slots"] = 9
    assert healthy() == second


def test_a_liveness_check_that_is_switched_off_is_not_missed():
    requested = dataclasses.replace(settings(), liveness_seconds=0)
    assert "expected none" in problems_by_check(healthy(), requested)["liveness"][0]
    facts = healthy()
    facts["instances"]["tiny"]["liveness"].update(active="inactive", enabled="", units=[])
    assert not problems_by_check(facts, requested)["liveness"]
