"""A new commit that compiles and is no good: the gate turns it away, and the previous release serves again.

Each fault shows itself only in the real service: llama-server's own answer to the planner, and the try-out
of the hardening before the switch, find nothing wrong.
"""

import json

import pytest

from sandbox import upstream
from tests.e2e.deploying import main_pid, on, pyinfra, serves

SECONDS = 60  # from the failed gate to the previous release serving

# In place of llama-server's main(): `real` is the service, in its own cache folder and with its metrics.
MAIN = """\
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <unistd.h>

struct llama_context;
int llama_server(int argc, char ** argv);
static bool real = false;

static float * logits_of(llama_context * ctx, int i) {
    using function = float * (*)(llama_context *, int);
    static const function original = (function) dlsym(RTLD_NEXT, "llama_get_logits_ith");
    return original(ctx, i);
}
%(before)s
int main(int argc, char ** argv) {
    const char * home = getenv("HOME");
    for (int i = 1; i < argc; i++) {
        real = real || strcmp(argv[i], "--metrics") == 0;
    }
    real = real && home && strncmp(home, "/var/cache/llama-server-", 24) == 0;
    %(first)s
    return llama_server(argc, argv);
}
"""
# The library's function by its name: llama-server finds this one first.
GARBAGE = """
extern "C" float * llama_get_logits_ith(llama_context * ctx, int i) {
    float * logits = logits_of(ctx, i);
    if (real) { logits[rand() % 200] += 40.0f; }
    return logits;
}
"""
SLOW = """
static double now() { timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
extern "C" float * llama_get_logits_ith(llama_context * ctx, int i) {
    static double last = now();
    double took = now() - last;
    if (took > 0.1) { took = 0.1; }
    if (real) { usleep((useconds_t) (took * 10e6)); }
    float * logits = logits_of(ctx, i);
    last = now();
    return logits;
}
"""
FAULTS = {
    "exits": ({"before": "", "first": "if (real) { return 0; }"}, "health: expected 200", "auto-restart (its journal says why)"),
    "hangs": ({"before": "", "first": "while (real) { pause(); }"}, "health: expected 200", "within 60 s"),
    "garbage": ({"before": GARBAGE, "first": "srand(time(nullptr));"}, "completion: expected the same answer twice", "garbage"),
    "slow": ({"before": SLOW, "first": ""}, "speed: expected at least", "a regression in this llama.cpp"),
}  # fmt: skip


@pytest.fixture(scope="module")
def host(builder):
    return builder


@pytest.fixture
def good(settings, inventory, host):
    """The settings with which the previous release serves, its speed known."""
    data = settings(host, speed_floor_percent=25)
    done = pyinfra(inventory((host, data)))
    assert done.code == 0, done.text
    return data


def last_gate(host):
    return json.loads(on(host, "cat", "/var/lib/llamafleet/gate/tiny.json"))


def seconds_until_active(host, since):
    """From this moment (UTC) to the unit's becoming active, which it is when it has answered."""
    active = on(
        host, "systemctl", "show", "--property=ActiveEnterTimestamp", "--value", "--timestamp=unix", "llama-server-tiny"
    )
    return int(active.lstrip("@")) - int(on(host, "date", "-d", since, "+%s"))


# A minute each: all but one in `make test-long`. The gate alone tells them from good servers in tests/remote, too.
SHORT = "garbage"


@pytest.mark.parametrize(
    "fault", [name if name == SHORT else pytest.param(name, marks=pytest.mark.long) for name in FAULTS]
)
def test_a_bad_commit_is_turned_away_and_the_previous_release_serves(good, inventory, outside, host, fault):
    parts, reason, cause = FAULTS[fault]
    upstream.add_commit(outside.clone, {"tools/server/main.cpp": MAIN % parts}, fault)
    before = main_pid(host, "tiny")
    release = on(host, "readlink", "/opt/llamafleet/current")

    run = pyinfra(inventory((host, {**good, "llama_cpp_ref": fault})))
    assert run.code != 0
    [told] = [line for line in run.text.splitlines() if "did not pass the gate" in line]
    assert reason in told and cause in told, told
    assert "the previous one was put back and serves" in told
    assert [name for name in run.failed(host.name) if "Start and check" in name]
    assert f"[{host.name}]" in run.text

    assert serves(host) and main_pid(host, "tiny") != before
    assert on(host, "readlink", "/opt/llamafleet/current") == release
    assert f"/opt/llamafleet/{release}/" in on(host, "readlink", f"/proc/{main_pid(host, 'tiny')}/exe")
    record = last_gate(host)
    assert record["ok"] and record["last_failure"]["release"] != record["release"]
    took = seconds_until_active(host, record["last_failure"]["time"])
    print(f"{fault}: served again {took} s after the failed gate")
    assert took <= SECONDS
    # What is installed is what was: nothing is left to do.
    assert pyinfra(inventory((host, good)), "--dry").changed() == []


@pytest.mark.long
def test_a_first_deploy_that_does_not_serve_is_stopped_and_leaves_its_log(good, inventory, outside, host):
    upstream.add_commit(outside.clone, {"tools/server/main.cpp": MAIN % FAULTS["exits"][0]}, "exits")
    other = {**good["models"][0], "name": "first", "port": 8081}
    run = pyinfra(inventory((host, {**good, "llama_cpp_ref": "exits", "models": [other]})))
    assert run.code != 0 and "there was no previous one, so it was stopped" in run.text
    assert on(
        host, "sh", "-c", "systemctl is-active llama-server-first; systemctl is-enabled llama-server-first; true"
    ).split() == [
        "inactive",
        "disabled",
    ]
    assert on(host, "journalctl", "-q", "--no-pager", "-u", "llama-server-first.service")
    assert pyinfra(inventory((host, good))).code == 0
    assert serves(host)
