"""The guard against regressions on a host: a build that is slower is put back unless it is accepted by name; one of the
same speed passes; one that is slower under another kernel is told."""

import json

import pytest

from sandbox import upstream
from tests.e2e.deploying import ask, main_pid, on, pyinfra, serves
from tests.e2e.test_08_rollback import MAIN

RECORD = "/var/lib/llamafleet/gate/tiny.json"
# Three times the work for each token: the service computes, beside what llama-server's main thread does between two
# looks at its likelihoods, for twice as long.
SLOWER = """
static double now() { timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
extern "C" float * llama_get_logits_ith(llama_context * ctx, int i) {
    static double last = now();
    double until = now() + 2.0 * (now() - last);
    while (real && now() < until) { }
    float * logits = logits_of(ctx, i);
    last = now();
    return logits;
}
"""
TRIES = 4


@pytest.fixture(scope="module")
def host(builder):
    return builder


@pytest.fixture
def data(settings, host):
    """Settings by which the floor turns nothing away that serves, so that the guard alone decides."""
    return settings(host, speed_floor_percent=1)


def gate(host):
    return json.loads(on(host, "cat", RECORD))


def remarks(run):
    return [line for line in run.text.splitlines() if "nothing was compared" in line]


def test_a_slower_build_is_put_back_and_installed_where_it_is_accepted(data, inventory, outside, host):
    commit = upstream.add_commit(outside.clone, {"tools/server/main.cpp": MAIN % {"before": SLOWER, "first": ""}}, "slower")
    slower = {**data, "llama_cpp_ref": "slower"}
    for _ in range(TRIES):  # others compute on this machine: then nothing is compared, and nothing is turned away
        assert pyinfra(inventory((host, data))).code == 0
        release, before = on(host, "readlink", "/opt/llamafleet/current"), main_pid(host, "tiny")
        run = pyinfra(inventory((host, slower)))
        if run.code != 0 or not remarks(run):
            break
    [told] = [line for line in run.text.splitlines() if "did not pass the gate" in line]
    assert run.code != 0 and "pace: expected" in told and f'accept_slower = "{commit}"' in told
    assert "the previous one was put back and serves" in told and "tokens/s written" in run.text
    assert serves(host) and main_pid(host, "tiny") != before
    assert on(host, "readlink", "/opt/llamafleet/current") == release
    assert gate(host)["last_failure"]["check"]["name"] == "pace" and gate(host)["pace"]["release"] == release

    model = {**data["models"][0], "accept_slower": commit[:10]}
    run = pyinfra(inventory((host, {**slower, "models": [model]})))
    assert run.code == 0 and serves(host), run.text
    assert gate(host)["ok"] and gate(host)["pace"]["commit"] == commit
    assert pyinfra(inventory((host, {**slower, "models": [model]})), "--dry").changed() == []
