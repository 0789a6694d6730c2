"""What is there is what was planned: what somebody changes by hand is named by status, `--dry` and tests/hosts alike, one
run sets it right, and the next one changes nothing. The server restarts only where it must."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from tests.e2e import deploying
from tests.e2e.deploying import ROOT, ask, environment, main_pid, on, pyinfra, serves, shipped_checks

ETC, VAR, OPT = "/etc/llamafleet", "/var/lib/llamafleet", "/opt/llamafleet"
UNITS, PLAN = "/etc/systemd/system", f"{ETC}/instances/tiny/plan.json"
UNIT, TIMER, CHECK = (
    "llama-server-tiny.service",
    "llama-server-tiny-liveness.timer",
    "llama-server-tiny-liveness.service",
)
RELEASE, MODEL = "$(readlink -f /opt/llamafleet/current)", f"$(ls {VAR}/models/*/*.gguf)"
LIBRARY = f"$(readlink -f {OPT}/current/bin/libllama.so)"
KEYS = f"{ETC}/instances/tiny/api-keys"


@dataclass(frozen=True)
class Drift:
    """Something done by hand, what status and `--dry` say of it, and what tests/hosts says."""

    done: str
    said: str
    checked: str = ""

    def __str__(self):
        return self.done


def edited(path, *named):
    return Drift(f"echo '#' >>{path}", *named)


def mode(path, wrong, right):
    return Drift(f"chmod {wrong} {path}", f"has mode {wrong} instead of {right}", f"{wrong}")


def owner(path):
    return Drift(f"chown 12:34 {path}", "belongs to 12:34 instead of root")


def drop_in(unit, text, said):
    folder = f"{UNITS}/{unit}.d"
    return Drift(f"mkdir -p {folder}; printf '{text}' >{folder}/x.conf; systemctl daemon-reload", said, "DropInPaths")


# Set right while the server runs on, all at once.
QUIET = [
    edited(PLAN, "its plan.json was edited or damaged", "plan.json"),
    mode(KEYS, "0644", "0600"),
    mode(f"{ETC}/instances", "0777", "0755"),
    owner(f"{ETC}/instances/tiny"),
    mode(f"{VAR}/good", "0755", "0700"),
    owner(f"{UNITS}/{UNIT}"),
    mode(MODEL, "0600", "0644"),
    mode(LIBRARY, "0600", "0755"),
    Drift(f"systemctl disable {UNIT}", "it is disabled", "UnitFileState"),
    Drift(f"systemctl stop {TIMER}", "its liveness timer is inactive", "active timer"),
]
# Further ones, those of each list at once. Still the server runs on.
MORE_QUIET = {
    "removed": [
        Drift(f"rm {PLAN}", "its plan.json is missing", "plan.json"),
        Drift(f"rm {KEYS}", "its API keys differ", "api-keys"),
        Drift(f"rm {UNITS}/{TIMER}", "its liveness check differs", "liveness"),
        Drift(f"rm {OPT}/current", "current release", "current"),
        Drift(f"rm {MODEL}", "is missing", "model"),
        Drift(f"rm -r {VAR}/jobs {VAR}/gate", f"{VAR}/gate is missing", f"{VAR}/jobs"),
        Drift(f"rm -r {OPT}/helpers", "helpers", "helpers"),
    ],
    "emptied": [
        Drift(f"echo '{{' >{PLAN}", "its plan.json was edited or damaged", "plan.json"),
        Drift(f": >{KEYS}", "its API keys differ", "api-keys"),
        Drift(f": >{MODEL}", "was changed since it was verified", "gguf"),
        Drift(f": >{OPT}/helpers/current/gate.py", "helpers", "gate.py"),
        Drift(f": >{VAR}/good/tiny/{UNIT}", "the files to go back to are damaged", "last passed the gate"),
        Drift(f": >{UNITS}/{CHECK}", "its liveness check differs", "liveness"),
    ],
    "edited": [
        edited(KEYS, "its API keys differ", "api-keys"),
        edited(f"{UNITS}/{UNIT}", "its unit differs in lines that need no restart", "edited by hand"),
        edited(f"{UNITS}/{TIMER}", "its liveness check differs", "liveness"),
        edited(f"{OPT}/helpers/current/gate.py", "helpers", "gate.py"),
        edited(f"{VAR}/good/tiny/{CHECK}", "the files to go back to are damaged", "liveness"),
        Drift(f"f={MODEL}; cp -p $f /root/m; printf x | dd of=$f bs=1 seek=9999 conv=notrunc; touch -r /root/m $f",
              "was changed since it was verified", "remove "),
    ],
    "of another mode or owner": [
        mode(PLAN, "0666", "0644"),
        owner(KEYS),
        mode(f"{UNITS}/{UNIT}", "0666", "0644"),
        owner(f"{OPT}/helpers"),
        owner(MODEL),
        mode(f"{VAR}/good/tiny/plan.json", "0666", "0600"),
        owner(f"{RELEASE}/bin/llama-server"),
        Drift(f"chown 12:34 {OPT}/helpers/current/gate.py", "helpers", "gate.py"),
    ],
    "folders": [
        Drift(f"rm {PLAN}; mkdir {PLAN}", "its plan.json is missing", "plan.json"),
        Drift(f"rm {UNITS}/{TIMER}; mkdir {UNITS}/{TIMER}", "its liveness check differs", "liveness"),
        Drift(f"rm {OPT}/current; mkdir {OPT}/current", "current release", "current"),
        Drift(f"f={MODEL}; rm $f; mkdir $f", "is a folder instead of a file", "gguf"),
        Drift(f"rm -r {VAR}/staged; echo >{VAR}/staged", "is a file instead of a folder", "staged"),
        Drift(f"rm {OPT}/helpers/current; mkdir {OPT}/helpers/current", "helpers", "helpers"),
    ],
    "links": [
        Drift(f"mv {PLAN} /root/p; ln -s /root/p {PLAN}", "is a link instead of a file", "plan.json"),
        Drift(f"mv {KEYS} /root/k; ln -s /root/k {KEYS}", "is a link instead of a file", "api-keys"),
        Drift(f"ln -sf /dev/null {UNITS}/{CHECK}; systemctl daemon-reload", "its liveness check differs", "liveness"),
        Drift(f"f={MODEL}; cp $f /root/m; rm $f; ln -s /root/m $f", "is a link instead of a file", "gguf"),
        Drift(f"mv {VAR}/jobs /root/jobs; ln -s /root/jobs {VAR}/jobs", "is a link instead of a folder", "jobs"),
        Drift(f"echo '[]' >{MODEL}.verified", "is a link instead of a file", "verified"),
    ],
    "units": [
        Drift(f"systemctl disable {TIMER}", "its liveness timer is disabled", "liveness"),
        drop_in(TIMER, "[Timer]\\nOnActiveSec=9\\n", "drop-ins change its liveness check"),
        Drift(f"mkdir {UNITS}/{UNIT}.d; echo '[Service]' >{UNITS}/{UNIT}.d/x.conf", "at its next start", "x.conf"),
        Drift(f"rm {MODEL}.verified", "was changed since it was verified", "verified"),
        Drift(f"rm {VAR}/good/tiny/api-keys", "the files to go back to are damaged", "as they passed the gate"),
    ],
    "what passed the gate": [Drift(f"rm -r {VAR}/good/tiny", "the files to go back to are damaged", "passed the gate")],
    "all state": [Drift(f"rm -r {VAR}", f"{VAR} is missing", "gguf")],
    "all settings": [Drift(f"rm -r {ETC}", f"{ETC} is missing", "plan.json")],
}  # fmt: skip

# The server itself does not run as planned: it restarts.
RESTARTS = [
    Drift(f"systemctl stop {UNIT}", "it is inactive", "ActiveState"),
    Drift(f"rm {UNITS}/{UNIT}; systemctl daemon-reload", "its unit is missing", UNIT),
    Drift(f": >{UNITS}/{UNIT}", "its unit differs", UNIT),
    Drift(f"rm {UNITS}/{UNIT}; systemctl mask {UNIT}", "its unit differs", UNIT),
    Drift(f"rm {UNITS}/{UNIT}; mkdir {UNITS}/{UNIT}", "its unit is missing", UNIT),
    Drift(f"sed -i s/TasksMax=2048/TasksMax=99/ {UNITS}/{UNIT}", "its unit differs", UNIT),
    drop_in(UNIT, "[Service]\nNice=5\n", "drop-ins change its unit"),
    drop_in(UNIT, "[Service]\nExecStart=\nExecStart=/usr/bin/sleep 9999\n", "drop-ins change its unit"),
    Drift(f"rm {RELEASE}/bin/libllama.so*", "build", "libllama"),
    Drift(f"f={LIBRARY}; cp -p $f /root/l; printf x | dd of=$f bs=1 seek=99999 "
          "conv=notrunc; touch -r /root/l $f", "build", "libllama"),
    Drift(f"cp {RELEASE}/bin/llama-server {RELEASE}/bin/other", "build", "other"),
    Drift(f"rm {RELEASE}/release.json", "build", "release.json"),
    Drift(f"rm -r {OPT}", "is missing", "current"),
]  # fmt: skip


@pytest.fixture(scope="module")
def host(builder):
    return builder


@pytest.fixture(scope="module")
def planned(outside, host, tmp_path_factory):
    """The inventory of a host that is as it should be, with keys."""
    folder = tmp_path_factory.mktemp("drift")
    (folder / "keys").write_text("a-secret-key\n")
    (folder / "keys").chmod(0o600)
    asked = deploying.settings(outside, host, model={"api_key_file": str(folder / "keys")})
    written = deploying.write_inventory(folder / "inventory.py", [(host, asked)])
    done = pyinfra(written)
    assert done.code == 0, done.text
    return written


def status(inventory, host):
    """All that `llamafleet status` says of drift on the host; empty where it is fine."""
    words = [sys.executable, "-m", "llamafleet.cli", "status", "--inventory", str(inventory), "--json"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    told = json.loads(done.stdout)[host.name]
    assert done.returncode == (0 if told["fine"] else 1), done.stderr
    said = [told["problem"], *told["drift"], *(one for tiny in told["instances"].values() for one in tiny["drift"])]
    text = "; ".join(part for part in said if part)
    assert bool(text) is not told["fine"], done.stdout
    return text


def checks(inventory):
    """What tests/hosts says; empty where all is well."""
    done = shipped_checks(inventory, "--no-header")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout if done.returncode else ""


def drift(host, inventory, *drifts):
    """Do it, have it named everywhere, repaired by one run, and changed by no other; whether the server ran on."""
    before = main_pid(host, "tiny")
    for one in drifts:
        done = host.run(["sh", "-c", one.done])
        assert done.returncode == 0, f"{one.done}: {done.stderr}"
    said, dry, told = status(inventory, host), pyinfra(inventory, "--dry"), checks(inventory)
    run, again = pyinfra(inventory), pyinfra(inventory)  # before anything is asserted, for the tests that follow
    unsaid = [f"{where} does not say {text!r} of {one}" for one in drifts for where, text, told_there in
              (("status", one.said, said), ("--dry", one.said, dry.text), ("tests/hosts", one.checked, told))
              if text not in told_there]  # fmt: skip
    assert not unsaid, "\n".join([*unsaid, said, told])
    assert dry.code == 0 and dry.changed() and told, dry.text
    assert run.code == 0, run.text
    assert serves(host, key="a-secret-key")
    assert again.code == 0 and again.changed() == [], again.text
    assert status(inventory, host) == ""
    return main_pid(host, "tiny") == before


def test_what_the_server_was_asked_for_is_read_from_its_journal(host, planned):
    since = int(on(host, "date", "+%s")) + 1
    while int(on(host, "date", "+%s")) < since:  # the gate has asked it, too
        time.sleep(0.1)
    for length in (40, 80, 80):
        body = {"prompt": [300] * length, "n_predict": 12, "ignore_eos": True, "cache_prompt": False}
        assert ask(host, "/completion", body, key="a-secret-key")[0] == 200
    words = ["workload", "--inventory", str(planned), "--since", f"@{since}", "--json"]
    done = subprocess.run([sys.executable, "-m", "llamafleet.cli", *words], cwd=ROOT, env=environment(),
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    tiny = json.loads(done.stdout)[host.name]["instances"]["tiny"]
    found = tiny["observed"]
    assert (found["requests"], found["cut_short"]) == (3, 0)
    assert found["prompt_tokens"]["p50"] == 80 and found["reply_tokens"]["mean"] == 12
    assert found["live_tokens"]["max"] == 80 + 12 - 1 - 12 / 2
    assert found["concurrency"]["max"] == tiny["fitting"]["settings"]["concurrency"] == 1
    assert found["counters"]["prompt_tokens"] >= 200 and found["counters"]["reply_tokens"] >= 36
    assert tiny["now"]["concurrency"] == 1 and tiny["fitting"]["settings"]["prompt_tokens"] == 67


def test_what_does_not_concern_the_running_server_is_set_right_while_it_runs(host, planned):
    assert drift(host, planned, *QUIET)


@pytest.mark.long
@pytest.mark.parametrize("drifts", MORE_QUIET.values(), ids=MORE_QUIET)
def test_each_is_named_and_set_right_while_the_server_runs(host, planned, drifts):
    assert drift(host, planned, *drifts) and checks(planned) == ""


@pytest.mark.long
@pytest.mark.parametrize("one", RESTARTS, ids=str)
def test_each_is_named_and_set_right_by_a_restart(host, planned, one):
    assert not drift(host, planned, one) and checks(planned) == ""
