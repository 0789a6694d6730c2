"""What the survey prints as installed: it becomes values, or is refused with the path of the invalid value."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given

from llamafleet.host.installed import Installed, InstalledError
from llamafleet.host.machine import MachineError
from tests.mutations import FUZZ, broken

REMOTE = Path(__file__).parents[2] / "llamafleet" / "remote"
SHA = "5e" * 32
TIMER = "llama-server-demo-liveness.timer"
ANSWER = {
    "euid": 0, "user": True, "missing_packages": ["cmake"], "helpers": "h1", "current": "k1",
    "paths": {"/opt/llamafleet": {"kind": "folder", "mode": 0o755, "uid": 0, "gid": 0, "target": None}},
    "cached_builds": {"k1": ["a" * 64]}, "release_digests": {"k1": SHA},
    "lock": {"run": "r", "who": "me@box", "machine": "box b", "pid": 7, "pid_started": 1.5, "began": "noon",
             "age_seconds": 3.0},
    "jobs": ["build-k1"], "releases": {"k1": {"files": ["llama-server"]}},
    "models": {"/var/lib/llamafleet/models/f/a.gguf": {"size_bytes": 5, "sha256": SHA}},
    "instances": {"demo": {
        "unit_sha256": SHA, "plan_sha256": SHA, "secrets": {"api-keys": SHA}, "good_sha256": None,
        "preflight": {"rendered_sha256": SHA, "unit_sha256": SHA, "ground": {"systemd": "257", "driver": None}},
        "active": "active", "sub": "running", "enabled": "enabled", "restarts": 0, "drop_ins": ["/etc/a.conf"],
        "stale": False, "pid": 7, "argv": ["llama-server", "--port", "8080"], "exe": "/opt/llama-server",
        "liveness_sha256": {TIMER: SHA}, "liveness": "active",
        "liveness_enabled": "enabled", "liveness_drop_ins": [], "unread_drop_ins": [], "loaded": {"api-keys": SHA},
        "deleted": ["/opt/x.so"], "good_plan_sha256": SHA, "good_is_whole": True, "good_liveness_sha256": {}, "record": {"plan": {"argv": []}},
    }},
    "listeners": [{"address": "127.0.0.1", "port": 8080, "pid": 7, "process": "llama-server", "unit": "x.service"}],
    "device_classes": ["drm", "nvidia-caps"], "ground": {"systemd": "257", "kernel": "6.12", "driver": None},
    "gpu_groups": ["render"], "nvidia_groups": ["video"], "foreign_units": ["llama-server-x.service"],
    "toolkits": [{"path": "/usr/local/cuda-12.8", "nvcc": "/usr/local/cuda-12.8/bin/nvcc", "version": "12.8",
                  "aliases": ["/usr/local/cuda"], "distro": False, "headers": True, "cublas": True, "cudart": True,
                  "driver_stub": True, "host_compiler": None, "accepted_compiler": None, "problems": [],
                  "gcc_limit": 14, "build": "12.8.93"}],
    "rocm": [{"path": "/opt/rocm", "version": "6.3", "compiler": "/opt/rocm/llvm/bin/clang++", "hipblas": True,
              "rocblas": False}],
    "compiler": "14.2.0", "tools": {"g++": "14.2.0", "cmake": None},
    "bandwidth": {"bytes_per_s": 2.5e10, "hardware": "a, 2 cores, 1 nodes, 8 GiB", "why": ""},
    "gate_speeds": [{"instance": "demo", "decode_tokens_per_s": 20.0, "prompt_tokens_per_s": None, "expected": {
        "decode_tokens_per_s": 10.0, "prompt_tokens_per_s": 50.0, "computed_on": "host", "host_bytes_per_s": 1e10,
        "host_flops": 1e11, "gpu_bytes_per_s": {}}}],
    "unbindable": {"203.0.113.7": "Cannot assign requested address"},
    "left": {"reboot": "", "closed": {"8080": "firewalld closes it"}, "model_bytes": {"/m/a.gguf": 5}, "spaces": {
        "/opt": {"place": "/opt", "device": "65024", "free_bytes": 7, "mount": "/", "unmounted": None, "read_only": False}}},
    "gated": {"demo": {"decode_tokens_per_s": 20.0, "prompt_tokens_per_s": None}},
    "nvidia_minors": {"0000:01:00.0": 0},
    "boot_units": {"gpu": ["nvidia-fabricmanager.service"], "network": ["openvpn-client@a\\x2db.service"]},
    "tuned": {"demo": {"schema": 1, "settings": {"threads": 2}}},
}  # fmt: skip


@pytest.fixture
def answer():
    return copy.deepcopy(ANSWER)


def test_the_answer_becomes_values(answer):
    installed = Installed.from_json(answer)
    assert (installed.euid, installed.user, installed.lock.who) == (0, True, "me@box")
    assert installed.models == {"/var/lib/llamafleet/models/f/a.gguf": SHA}
    instance = installed.instances["demo"]
    assert (instance.argv, instance.drop_ins) == (("llama-server", "--port", "8080"), ("/etc/a.conf",))
    assert (instance.record.plan.argv, instance.preflight["ground"]["systemd"]) == ((), "257")
    assert (installed.listeners[0].port, installed.toolkits[0]["aliases"]) == (8080, ("/usr/local/cuda",))


def test_what_the_survey_prints_is_read():
    """`Installed` reads what survey.py prints on this machine."""
    request = {"packages": {}, "build_cache": None, "toolkits": [], "paths": ["/opt"], "vulkan": False,
               "addresses": ["127.0.0.1", "203.0.113.7"]}  # fmt: skip
    command = [sys.executable, str(REMOTE / "survey.py"), json.dumps(request)]
    printed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["found"]
    assert printed.keys() == ANSWER.keys()
    installed = Installed.from_json(printed)
    assert installed.euid == printed["euid"] and len(installed.listeners) == len(printed["listeners"])


def test_a_newer_survey_may_say_more(answer):
    answer["listeners"][0]["since"] = answer["weather"] = "noon"
    assert Installed.from_json(answer) == Installed.from_json(ANSWER)


def test_names_of_any_bytes_are_shown_with_question_marks(answer):
    answer["instances"]["demo"]["argv"][1] = "\udcff--x"
    answer["listeners"][0]["process"] = "caf\udcc3"
    installed = Installed.from_json(answer)
    assert (installed.instances["demo"].argv[1], installed.listeners[0].process) == ("?--x", "caf?")


@pytest.mark.parametrize("record", [[], 0, "{}", None])
def test_a_plan_json_that_is_no_object_is_no_plan(answer, record):
    answer["instances"]["demo"]["record"] = record
    assert Installed.from_json(answer).instances["demo"].record is None


def at(*path_and_value):
    *path, key, value = path_and_value

    def change(answer):
        for step in path:
            answer = answer[step]
        answer[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: answer.pop("euid"), "euid: missing; should be a whole number from 0 to 4294967295"),
        (at("instances", []), "instances: should be an object, is []"),
        (at("instances", "demo", 3), "instances.demo: should be an object, is 3"),
        (at("instances", "demo", "pid", "7"), "instances.demo.pid: should be a whole number from 0 to 2147483647, is '7'"),
        (at("instances", "demo", "unit_sha256", "5E"),
         "instances.demo.unit_sha256: should be 64 lower-case hexadecimal digits or null, is '5E'"),
        (at("models", "/m", {"sha256": 3}), "models./m: should be text, is 3"),
        (at("models", "/m", 3), "models./m: should be text, is 3"),
        (at("models", "x" * 5000, SHA), "models.'xxx"),
        (at("releases", "k2", 3), "releases.k2: should be an object, is 3"),
        (at("lock", "pid", None), "lock.pid: should be a whole number from 0 to 2147483647, is None"),
        (at("lock", "age_seconds", float("nan")), "lock.age_seconds: should be a number, is nan"),
        (at("lock", "age_seconds", float("inf")), "lock.age_seconds: should be a number, is inf"),
        (at("lock", "age_seconds", True), "lock.age_seconds: should be a number, is True"),
        (at("device_classes", ["drm\nExecStart=/x"]),
         "device_classes[0]: should be a word of letters, digits and . _ -, is 'drm\\nExecStart=/x'"),
        (at("toolkits", 0, "version", "new"), "toolkits[0].version: should be a version like \"12.8\" or null, is 'new'"),
        (at("listeners", 0, "port", 65536), "listeners[0].port: should be a whole number from 0 to 65535, is 65536"),
        (at("paths", "/opt/llamafleet", "kind", "door"),
         "paths./opt/llamafleet.kind: should be one of file, folder, link, other, is 'door'"),
        (at("paths", "/opt/llamafleet", "mode", -1),
         "paths./opt/llamafleet.mode: should be a whole number from 0 to 4095, is -1"),
        (at("instances", "demo", "deleted", [3]), "instances.demo.deleted[0]: should be text, is 3"),
        (at("missing_packages", ["x"] * 1025), "missing_packages: should have at most 1024 items, has 1025"),
    ],
)  # fmt: skip
def test_refused_with_path_and_reason(answer, change, message):
    change(answer)
    with pytest.raises(InstalledError) as error:
        Installed.from_json(answer)
    assert str(error.value).startswith(f"installed.{message}")
    assert len(str(error.value)) < 400


def test_an_installed_error_is_a_machine_error():
    assert issubclass(InstalledError, MachineError)


@FUZZ
@given(broken(ANSWER))
def test_a_broken_answer_is_read_or_refused_in_one_line(data):
    try:
        installed = Installed.from_json(data)
    except InstalledError as error:
        assert str(error).startswith("installed") and ("should" in str(error) or "missing" in str(error))
        assert len(str(error)) < 400 and str(error).isprintable()
    else:
        hash(installed.toolkits and installed.listeners)
