"""Three models on a host that holds two: they start when they are asked, make room for each other without cutting a
reply, and are gone when nobody uses them."""

import json
import threading
import time
import urllib.request

import pytest

from sandbox import oracle_build
from tests.e2e import deploying
from tests.e2e.conftest import PREFIX
from tests.e2e.deploying import PORT, ask, on, pyinfra

NAMES = ("one", "two", "three")
PORTS = dict(zip(NAMES, range(PORT, PORT + 3), strict=True))
IDLE_SECONDS = 15
# Of each model; the room for all is a bit more than two of them.
CACHE_MIB, ROOM_MIB = 1000, 2600
LONG_TOKENS = 1500


@pytest.fixture(scope="module")
def host(boot):
    [made] = boot(1, f"{PREFIX}demand", 31, packages=oracle_build.COMPILER)
    return made


@pytest.fixture(scope="module")
def asked(host, outside):
    """Settings of the host: three models on demand, of which two have room."""
    total_mib = int(on(host, "awk", "/MemTotal/ {print int($2 / 1024)}", "/proc/meminfo"))
    base = deploying.settings(outside, host, ram_reserve_mib=total_mib - ROOM_MIB)
    model = {**base["models"][0], "start": "demand", "idle_seconds": IDLE_SECONDS, "prompt_cache_mib": CACHE_MIB,
             "context_tokens": 4096}  # fmt: skip
    return {**base, "models": [{**model, "name": name, "port": port} for name, port in PORTS.items()]}


@pytest.fixture(scope="module")
def deployed(host, asked, tmp_path_factory):
    written = deploying.write_inventory(tmp_path_factory.mktemp("demand") / "inventory.py", [(host, asked)])
    with oracle_build.compiling():
        done = pyinfra(written)
    assert done.code == 0, done.text
    return written


def up(host):
    """The models whose servers run."""
    states = on(host, "sh", "-c", "for name in one two three; do systemctl show --value --property=ActiveState "
                                  "llama-server-$name; done").split()  # fmt: skip
    return {name for name, state in zip(NAMES, states, strict=True) if state != "inactive"}


def servers(host):
    return int(on(host, "sh", "-c", "pgrep -c llama-server || true"))


def until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


def completion(host, name, tokens=4):
    body = {"prompt": "Once", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    status, answer = ask(host, "/v1/completions", body, port=PORTS[name])
    return status, (answer.get("usage") or {}).get("completion_tokens")


def patient_completion(host, name):
    """As a client that comes again where it is told to, or where it has lost patience."""
    while (answer := completion(host, name))[0] in (0, 503):
        time.sleep(5)
    return answer


class Reply(threading.Thread):
    """A long reply that comes in pieces; how it began and ended."""

    def __init__(self, host, name):
        super().__init__()
        self.url, self.began, self.ended, self.tokens = f"http://{host.address}:{PORTS[name]}/completion", None, None, 0

    def run(self):
        body = {"prompt": "Once", "n_predict": LONG_TOKENS, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=200) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    told = json.loads(line[6:])
                    self.began = self.began or time.monotonic()
                    self.tokens += bool(told.get("tokens")) or bool(told.get("content"))
                    if told.get("stop"):
                        self.ended = time.monotonic()


def test_a_second_run_changes_nothing_and_starts_nothing(host, deployed):
    until(lambda: up(host) == set(), IDLE_SECONDS + 30)
    assert servers(host) == 0, "idle ones are gone from RAM"
    assert pyinfra(deployed, "--dry").changed() == []
    assert up(host) == set()


def test_the_third_starts_when_asked_and_one_that_nobody_uses_makes_room(host, deployed):
    for name in NAMES:
        began = time.monotonic()
        assert completion(host, name) == (200, 4)
        print(f"{name}: first reply after {time.monotonic() - began:.2f} s")
        assert name in up(host)
    until(lambda: len(up(host)) == 2, 10)
    assert "three" in up(host)


def test_a_running_reply_is_never_cut(host, deployed):
    for name in ("one", "two"):
        assert completion(host, name) == (200, 4)
    until(lambda: up(host) == {"one", "two"}, 20)
    replies = [Reply(host, name) for name in ("one", "two")]
    for reply in replies:
        reply.start()
    until(lambda: all(reply.began for reply in replies), 30)
    assert patient_completion(host, "three") == (200, 4)
    answered = time.monotonic()
    for reply in replies:
        reply.join()
    print(
        f"replies of {[reply.tokens for reply in replies]} tokens, the third one's {answered - replies[0].began:.1f} s later"
    )
    assert all(reply.ended and reply.tokens >= LONG_TOKENS - 1 for reply in replies)
    assert min(reply.ended for reply in replies) < answered, "the third one waited"


def test_the_first_token_comes_within_the_load_time_and_two_seconds(host, deployed):
    until(lambda: up(host) == set(), IDLE_SECONDS + 60)
    began = time.monotonic()
    assert completion(host, "one") == (200, 4)
    took = time.monotonic() - began
    shown = on(host, "systemctl", "show", "--property=ExecMainStartTimestampMonotonic,ActiveEnterTimestampMonotonic",
               "llama-server-one")  # fmt: skip
    start, active = sorted(int(line.partition("=")[2]) for line in shown.splitlines())
    print(f"first reply {took:.2f} s after it was asked for, loading took {(active - start) / 1e6:.2f} s")
    assert took < (active - start) / 1e6 + 2


def test_after_a_reboot_nothing_runs_until_it_is_asked(host, deployed):
    host.kill()
    host.start()
    time.sleep(3)
    assert up(host) == set() and servers(host) == 0
    assert completion(host, "two") == (200, 4)
    assert up(host) == {"two"}
    assert pyinfra(deployed, "--dry").changed() == []


def checked_hosts(written):
    done = deploying.shipped_checks(written)
    return done.returncode, done.stdout + done.stderr


def test_the_checks_of_deployed_hosts_start_nothing(host, deployed):
    before = up(host)
    code, text = checked_hosts(deployed)
    assert code == 0, text
    assert before >= up(host)


def test_an_uninstall_leaves_no_socket(host, deployed):
    assert completion(host, "one") == (200, 4)
    done = pyinfra(deployed, deploy="tasks.uninstall.uninstall")
    assert done.code == 0, done.text
    left = on(host, "sh", "-c", "ls -d /run/llama-server-* /etc/systemd/system/*lama* 2>/dev/null; "
                                "systemctl list-units --all --no-legend 'llama*'; true")  # fmt: skip
    assert left == ""
    assert completion(host, "one")[0] == 0 and servers(host) == 0
