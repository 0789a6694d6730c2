"""One host answers oddly: it fails by name, the other one is deployed to, shown and checked; nothing odd reaches the
terminal. The host itself may be root's own enemy: what it says is in the hands of whoever broke it."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.e2e.deploying import ROOT, environment, main_pid, on, pyinfra, serves, shipped_checks

# Before /usr/bin in the path of commands over SSH.
PYTHON = "/usr/local/bin/python3"
PLAN = "/etc/llamafleet/instances/tiny/plan.json"
ODD = r"\x1b[2J\x1b]0;owned\x07 \u202egpj.exe"  # escape sequences and a mark of direction, as Python writes them
# How the survey's line is changed, and what is said of it.
ANSWERS = {
    "bytes": (f"line = '\\udcff\\udcc3 {ODD}'", "survey.py on the host: answer: is no JSON"),
    "endless": ("line = 'x' * 40_000_000", "survey.py on the host: answer: is no JSON"),
    "types": (f"found['found']['instances'] = '{ODD}'; line = json.dumps(found)",
              "installed.instances: should be an object, is "),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(deployed):
    return deployed


@pytest.fixture(scope="module")
def inventory_of_both(pair, outside, tmp_path_factory):
    from tests.e2e import deploying

    entries = [
        (host, deploying.settings(outside, host, kind)) for host, kind in zip(pair, ("dense", "moe"), strict=True)
    ]
    written = deploying.write_inventory(tmp_path_factory.mktemp("odd") / "inventory.py", entries)
    run = pyinfra(written)  # other tests may have left another state
    assert run.code == 0, run.text
    return written


@contextmanager
def odd_survey(host, change):
    """The host's Python runs our programs, but what the survey prints is changed."""
    program = f"""#!/usr/bin/python3
import json, os, subprocess, sys
words = ["/usr/bin/python3", *sys.argv[1:]]
if not any(word.endswith("/survey.py") for word in words):
    os.execv(words[0], words)
done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
line = done.stdout.decode(); found = json.loads(line)
{change}
sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape") + bytes([10]))
"""
    done = host.run(["sh", "-c", f"cat > {PYTHON} && chmod 755 {PYTHON}"], input=program)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        on(host, "rm", PYTHON)


def llamafleet(*words):
    """Exit status, standard output and both, which must be clean."""
    done = subprocess.run(
        [sys.executable, "-m", "llamafleet.cli", *map(str, words)], cwd=ROOT, env=environment(),
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    check_clean(done.stdout + done.stderr)
    return done.returncode, done.stdout, done.stdout + done.stderr


def check_clean(text):
    assert "Traceback" not in text, text
    assert all(one.isprintable() or one == "\n" for one in text), ascii(text)


@pytest.mark.parametrize("kind", ["bytes", pytest.param("endless", marks=pytest.mark.long)])
def test_status_names_the_odd_host_and_shows_the_other(pair, inventory_of_both, kind):
    change, message = ANSWERS[kind]
    with odd_survey(pair[0], change):
        code, out, both = llamafleet("status", "--inventory", inventory_of_both, "--json")
    told = json.loads(out)
    assert code == 1 and message in told[pair[0].name]["problem"], both
    assert told[pair[1].name]["fine"] is True, both


def test_the_other_host_is_planned(pair, inventory_of_both):
    change, message = ANSWERS["types"]
    with odd_survey(pair[0], change):
        code, out, both = llamafleet("plan", "--inventory", inventory_of_both)
    assert code == 2 and f"{pair[0].name}: {message}" in out, both
    assert r"\x1b[2J" in out and f"tiny on {pair[1].name}" in out and "flags: " in out


def test_a_damaged_plan_json_fails_the_shipped_checks_by_a_line(pair, inventory_of_both):
    kept = on(pair[1], "cat", PLAN)
    broken = {**json.loads(kept), "gate": ["\x1b[2J"]}
    try:
        pair[1].run(["sh", "-c", f"cat > {PLAN}"], input=json.dumps(broken))
        done = shipped_checks(inventory_of_both, "--quick", "--limit", pair[1].name)
    finally:
        pair[1].run(["sh", "-c", f"cat > {PLAN}"], input=kept + "\n")
    check_clean(done.stdout + done.stderr)
    assert done.returncode == 1
    assert f"{pair[1].name}/tiny: {PLAN}: expected a readable record, found gate: should be an object" in done.stdout
    assert f"{pair[0].name}" not in done.stdout


def test_the_other_host_is_deployed_to_and_its_damaged_plan_json_is_made_anew(pair, inventory_of_both):
    odd, other = pair
    pid, wanted = main_pid(other, "tiny"), json.loads(on(other, "cat", PLAN))
    other.run(["sh", "-c", f"cat > {PLAN}"], input="[1]")
    change, message = ANSWERS["types"]
    with odd_survey(odd, change):
        run = pyinfra(inventory_of_both)
    check_clean(run.text)
    assert f"[{odd.name}]" in run.text and f"refused: {message}" in run.text
    assert run.changed(odd.name) == [] and run.changed(other.name), run.text
    now = json.loads(on(other, "cat", PLAN))
    assert {name: now[name] for name in ("gate", "identity", "inputs")} == {
        name: wanted[name] for name in ("gate", "identity", "inputs")
    }
    assert main_pid(other, "tiny") == pid and serves(other)
    again = pyinfra(inventory_of_both)
    assert again.code == 0 and again.changed() == [], again.text


def test_a_user_s_process_of_an_odd_name_is_named_cleanly(pair, inventory, settings):
    """An ordinary user listens on the port of a new instance, under a name with escape sequences, cut in mid-character."""
    host, scope = pair[1], "odd-name.scope"  # of no service, as a user's session
    code = (
        "import socket, time; open('/proc/self/comm', 'wb').write(b'\\x1b[2J\\xff\\xc3\\nx');"
        f" s = socket.create_server(('{host.address}', 8099)); time.sleep(600)"
    )
    words = ["systemd-run", "--scope", "--quiet", "--collect", f"--unit={scope}", "--uid=nobody", "python3", "-c", code]
    on(host, "sh", "-c", '"$@" </dev/null >/dev/null 2>&1 & sleep 1', "sh", *words)
    first = settings(host, "moe")["models"][0]
    written = inventory((host, settings(host, models=[first, {**first, "name": "second", "port": 8099}])))
    try:
        code, out, both = llamafleet("status", "--inventory", written)
    finally:
        on(host, "systemctl", "stop", scope)
    assert code == 1 and r"second: port 8099 on " in out and r"is taken by \x1b[2J" in out, both
